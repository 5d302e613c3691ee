"""Five questions for each of steps 1 to 3, with numbers drawn anew.

A function draws its numbers from `r`, a `random.Random`, and returns the question, the answer (a
number, or a tuple of whole numbers) and the way to it. The formulas are those of the lessons.
"""

import math

QUESTIONS = {}  # by step


def of_step(step):
    def add(function):
        QUESTIONS.setdefault(step, []).append(function)
        return function

    return add


# --- 1. the model ---------------------------------------------------------------------------------


@of_step(1)
def weights_of_a_layer(r):
    h, heads, kv_heads = 64 * r.randint(2, 16), 8, r.choice([2, 4, 8])
    f, kv = 3 * h, h // heads * kv_heads
    answer = 2 * h * h + 2 * h * kv + 3 * h * f + 2 * h
    question = (
        f"A layer has width {h}, {heads} heads, {kv_heads} key/value heads and an MLP of {f}. "
        "How many weights does it have, with its two norms?"
    )
    return question, answer, "2 h² for q and o, 2 h · kv for k and v, 3 h f, and 2 h for the norms"


@of_step(1)
def first_loss(r):
    vocabulary = r.choice([128, 1000, 32_000, 49_152, 128_256])
    question = f"A model with {vocabulary:,} symbols knows nothing yet. About which loss has it?"
    return question, math.log(vocabulary), "all symbols are alike: ln V"


@of_step(1)
def bytes_of_a_model(r):
    millions = r.randint(10, 900)
    question = (
        f"A model of {millions} million weights trains in float32 with AdamW. How many GB do "
        "weights, gradients and the optimizer's two moments take?"
    )
    return question, 16 * millions / 1000, "4 bytes each for weight, gradient and two moments: 16 N"


@of_step(1)
def operations_of_a_token(r):
    n, layers, h, s = 10**6 * r.randint(1, 50), r.randint(4, 32), 64 * r.randint(2, 32), 1024
    question = (
        f"N = {n:,} weights, {layers} layers of width {h}, sequences of {s} tokens. How many "
        "floating-point operations does a token take, forward and backward?"
    )
    return question, 6 * n + 12 * layers * h * s, "6 N + 12 L h s"


@of_step(1)
def learning_rate_in_the_warm_up(r):
    warm_up, rate = r.choice([20, 50, 100]), r.choice([1e-3, 3e-4, 2e-3])
    step = r.randint(1, warm_up)
    question = f"--learning_rate {rate:g} --warmup_steps {warm_up}: the rate at step {step}?"
    return question, rate * step / warm_up, "linear from 0: rate · step / warm-up"


# --- 2. the process group -------------------------------------------------------------------------


@of_step(2)
def bytes_of_an_all_reduce(r):
    n, megabytes = r.choice([2, 3, 4, 8]), r.randint(1, 64) * 24
    question = (
        f"A ring of {n} ranks sums a tensor of {megabytes} MB. How many MB does each rank send?"
    )
    return (
        question,
        2 * (n - 1) / n * megabytes,
        "a reduce-scatter and an all-gather: 2 (n − 1)/n · M",
    )


@of_step(2)
def bytes_of_an_all_gather(r):
    n, megabytes = r.choice([2, 4, 8]), r.randint(1, 64) * 8
    question = (
        f"{n} ranks hold {megabytes // n} MB each and all-gather {megabytes} MB. How many MB does "
        "each rank receive?"
    )
    return question, (n - 1) * megabytes // n, "all but its own part: (n − 1)/n · M"


def mesh(r):
    """Sizes of tp, cp, dp, pp, and a rank."""
    sizes = [r.choice([1, 2, 2, 3]) for _ in range(4)]
    return sizes, r.randrange(math.prod(sizes))


def places(sizes, rank):
    """The place of a rank along tp, cp, dp, pp: tp varies fastest."""
    found = []
    for size in sizes:
        rank, place = divmod(rank, size)
        found.append(place)
    return tuple(found)


@of_step(2)
def place_of_a_rank(r):
    sizes, rank = mesh(r)
    tp, cp, dp, pp = sizes
    question = (
        f"tp {tp}, cp {cp}, dp {dp}, pp {pp}. What is the place of rank {rank} along "
        "tp, cp, dp, pp? (four numbers)"
    )
    return question, places(sizes, rank), "divide by the sizes from tp on; the remainders"


@of_step(2)
def ranks_of_a_group(r):
    tp, dp = r.choice([2, 3, 4]), r.choice([2, 3])
    rank = r.randrange(tp * dp)
    answer = tuple(rank % tp + tp * place for place in range(dp))
    question = f"tp {tp}, dp {dp}. Which ranks are in the dp group of rank {rank}? ({dp} numbers)"
    return question, answer, "same place along tp; dp neighbours are tp ranks apart"


@of_step(2)
def number_of_groups(r):
    sizes, _ = mesh(r)
    axis = r.randrange(4)
    name, ranks = ("tp", "cp", "dp", "pp")[axis], math.prod(sizes)
    question = f"tp, cp, dp, pp = {sizes}: {ranks} ranks. How many {name} groups are there?"
    return question, ranks // sizes[axis], "each rank is in one, and each has as many as the axis"


# --- 3. the data loader ---------------------------------------------------------------------------


@of_step(3)
def windows_of_a_text(r):
    s = r.choice([64, 128, 256])
    tokens = s * r.randint(20, 400) + r.randint(1, s)
    question = f"{tokens:,} tokens, sequences of {s}. How many windows of s + 1 tokens are there?"
    return question, (tokens - 1) // s, "neighbours share one token: (tokens − 1) // s"


@of_step(3)
def tokens_of_a_step(r):
    b, m, dp, s = r.randint(1, 8), r.randint(1, 8), r.choice([1, 2, 4]), r.choice([64, 128])
    question = (
        f"--micro_batch_size {b} --gradient_accumulation_steps {m} --dp_size {dp} --seq_len {s}. "
        "How many target tokens has a step?"
    )
    return question, b * m * dp * s, "b · m · dp sequences of s tokens"


@of_step(3)
def a_mean_of_micro_batches(r):
    m, loss = r.randint(2, 8), r.randint(20, 60) / 10
    question = (
        f"{m} equal micro-batches have a mean loss of {loss} each. Somebody divides each sum by "
        "the targets of its own micro-batch and adds up. Which loss is reported?"
    )
    return (
        question,
        m * loss,
        "divided by the step's targets it would be right; so m times too much",
    )


@of_step(3)
def updates_in_an_epoch(r):
    windows, sequences = r.randint(500, 5000), r.choice([4, 8, 16, 32])
    question = (
        f"{windows} training windows, {sequences} sequences a step. How many whole steps has an "
        "epoch?"
    )
    return question, windows // sequences, "windows // sequences"


@of_step(3)
def held_out_windows(r):
    windows = r.randint(64, 20_000)
    question = f"A text has {windows:,} windows. How many of them are held out?"
    return question, max(1, windows // 64), "the last 1/64, one at least"
