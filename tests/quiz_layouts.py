"""Five questions for each of steps 4 to 9, in the manner of quiz_basics.py."""

import math

from quiz_basics import mesh, of_step, places

# --- 4. tensor parallel ---------------------------------------------------------------------------


@of_step(4)
def rank_of_a_row(r):
    n = r.choice([2, 4, 8])
    rows = n * r.randint(4, 64)
    row = r.randrange(rows)
    question = f"q_proj has {rows} rows on tp {n}. Which rank holds row {row}?"
    return question, row // (rows // n), f"{rows // n} rows each, one part after the other"


@of_step(4)
def part_of_down_proj(r):
    n, h = r.choice([2, 4]), 128 * r.randint(1, 8)
    f = 3 * h
    question = f"down_proj is [{h}, {f}]. Which shape is a rank's part on tp {n}? (two numbers)"
    return question, (h, f // n), "cut by input features: its columns"


@of_step(4)
def all_reduces_of_the_layers(r):
    layers, m = r.randint(2, 32), r.randint(1, 4)
    question = (
        f"{layers} layers, {m} micro-batches, no sequence parallelism. How many all-reduces of "
        "activations do the layers need in a step?"
    )
    return question, 4 * layers * m, "two blocks a layer, one sum forward and one backward each"


@of_step(4)
def bytes_of_the_sums(r):
    layers, b, s, h = r.randint(2, 16), r.randint(1, 8), 128, 64 * r.randint(2, 16)
    question = (
        f"{layers} layers, x of [{b}, {s}, {h}] in float32. How many bytes do the tensors "
        "have that "
        "the layers all-reduce in one micro-batch?"
    )
    return question, 4 * layers * b * s * h * 4, "4 sums a layer, of b · s · h numbers of 4 bytes"


@of_step(4)
def numbers_between_the_blocks(r):
    n, b, s, h = r.choice([2, 4]), r.randint(1, 8), 128, 64 * r.randint(2, 16)
    question = (
        f"tp {n} with sequence parallelism, x of [{b}, {s}, {h}]. How many numbers of x does a "
        "rank hold between two blocks?"
    )
    return question, b * s * h // n, "the tokens are dealt out: b · s · h / n"


# --- 5. context parallel --------------------------------------------------------------------------


@of_step(5)
def chunks_of_a_rank(r):
    n = r.choice([2, 3, 4, 8])
    rank = r.randrange(n)
    question = f"cp {n}, zigzag. Which chunks does rank {rank} hold? (two numbers, from 0)"
    return question, (rank, 2 * n - 1 - rank), "r and 2 n − 1 − r"


@of_step(5)
def position_in_the_late_chunk(r):
    n = r.choice([2, 4])
    s, rank = 2 * n * r.randint(4, 64), r.randrange(n)
    question = (
        f"cp {n}, {s} tokens, zigzag. Which position has the first token of rank {rank}'s "
        "late chunk?"
    )
    return (
        question,
        (2 * n - 1 - rank) * s // (2 * n),
        "chunk 2 n − 1 − r, each of s / (2 n) tokens",
    )


@of_step(5)
def share_of_a_block(r):
    a, b = r.randint(0, 4), r.randint(0, 4)
    question = (
        f"One block's log_sum is {a}, the other's {b}. Which share has the first block's output in "
        "the merged one?"
    )
    return question, 1 / (1 + math.exp(b - a)), "its part of both denominators: sigmoid(a − b)"


@of_step(5)
def bytes_of_the_ring(r):
    n, s, kv = r.choice([2, 4, 8]), 1024 * r.randint(1, 8), 64 * r.randint(1, 8)
    question = (
        f"cp {n}, one sequence of {s} tokens, keys and values of {kv} numbers each in bfloat16. "
        "How many bytes does a rank send forward in one layer?"
    )
    return question, (n - 1) * (s // n) * 2 * kv * 2, "n − 1 blocks of s/n tokens, k and v, 2 bytes"


@of_step(5)
def pairs_of_a_rank(r):
    n = r.choice([2, 4])
    c = r.randint(2, 16)
    s = 2 * n * c
    question = (
        f"cp {n}, {s} tokens, zigzag, causal. How many pairs (query, key) does each rank compute, "
        "a token with itself included?"
    )
    return question, s * (s + 1) // 2 // n, "all s (s + 1) / 2 pairs, evenly dealt out"


# --- 6. data parallel -----------------------------------------------------------------------------


@of_step(6)
def a_rank_of_its_own(r):
    dp, norm = r.choice([2, 4, 8]), r.randint(10, 90) / 10
    question = (
        f"dp {dp}. Each rank divides by the targets that it saw itself; then the gradients are "
        f"summed. The right gradient norm is {norm}. Which one is reported?"
    )
    return question, dp * norm, "each divisor is dp times too small"


@of_step(6)
def bytes_of_zero(r):
    n, billions, stage = r.choice([4, 8, 16]), r.randint(1, 13), r.choice([1, 2, 3])
    kept = {1: (4 + 4 + 8 / n), 2: (4 + 4 / n + 8 / n), 3: 16 / n}[stage]
    question = (
        f"ZeRO {stage} on {n} ranks, {billions} billion weights in float32. How many GB "
        "of weights, "
        "gradients and moments does a rank keep?"
    )
    return (
        question,
        billions * kept,
        "4 N weights, 4 N gradients, 8 N moments; ZeRO k divides k of them, from the last",
    )


@of_step(6)
def calls_of_zero2(r):
    buckets, m = r.randint(2, 12), r.randint(1, 8)
    question = (
        f"{buckets} buckets, {m} micro-batches. How many reduce-scatters does zero2 start in "
        "a step?"
    )
    return question, buckets * m, "one a bucket and micro-batch"


@of_step(6)
def tokens_that_hide_zero3(r):
    tflops, gigabytes = r.choice([300, 400, 600]), r.choice([50, 100, 300])
    question = (
        f"bfloat16, {tflops} TFLOP/s, a link of {gigabytes} GB/s. How many tokens must a "
        "micro-batch have, so that zero3 can hide its messages?"
    )
    return question, 1.5 * tflops * 1000 / gigabytes, "1.5 F / W"


@of_step(6)
def sequences_of_the_step(r):
    b, m, dp = r.randint(1, 8), r.randint(1, 8), r.choice([2, 3, 4])
    total = b * m * dp
    question = (
        f"{total} sequences a step, dp {dp}, micro-batches of {b}. How many micro-batches has "
        "a rank?"
    )
    return question, m, "total / (dp · b)"


# --- 7. the pipeline, all forward, all backward ---------------------------------------------------


@of_step(7)
def bubble(r):
    p, m = r.randint(2, 8), r.randint(2, 32)
    question = f"{p} stages, {m} micro-batches. Which share of a step does a stage wait? (percent)"
    return question, 100 * (p - 1) / (m + p - 1), "(p − 1) / (m + p − 1)"


@of_step(7)
def layers_of_a_stage(r):
    p = r.randint(2, 5)
    layers, stage = r.randint(p, 40), r.randrange(p)
    first, last = layers * stage // p, layers * (stage + 1) // p - 1
    question = (
        f"{layers} layers on {p} stages. What are the first and the last layer of stage "
        f"{stage}? (two numbers, from 0)"
    )
    return question, (first, last), "from L · r // p up to before L · (r + 1) // p"


@of_step(7)
def alive_under_afab(r):
    p, m = r.randint(2, 8), r.randint(2, 32)
    question = (
        f"AFAB with {p} stages and {m} micro-batches. How many does a stage keep alive at most?"
    )
    return question, m, "all of them: no backward pass begins before the last forward pass"


@of_step(7)
def bytes_of_a_middle_stage(r):
    m, b, s, h = r.randint(2, 16), r.randint(1, 4), 128, 64 * r.randint(2, 16)
    question = (
        f"{m} micro-batches of [{b}, {s}, {h}] in float32. How many bytes does a stage in the "
        "middle send in a step?"
    )
    return question, 2 * m * b * s * h * 4, "an activation forward and a gradient backward for each"


@of_step(7)
def micro_batches_for_a_bubble(r):
    p, percent = r.randint(2, 8), r.choice([5, 10, 20])
    m = math.ceil((p - 1) * (100 - percent) / percent)
    question = f"{p} stages. How many micro-batches are needed for a bubble of at most {percent} %?"
    return question, m, "(p − 1) / (m + p − 1) ≤ x, so m ≥ (p − 1)(1 − x)/x"


# --- 8. the pipeline, one forward, one backward ---------------------------------------------------


def pipeline(r):
    p, m = r.randint(2, 8), r.randint(2, 16)
    return p, m, r.randrange(p)


@of_step(8)
def warm_up(r):
    p, m, rank = pipeline(r)
    question = (
        f"1F1B, {p} stages, {m} micro-batches. How many forward passes has the warm-up of "
        f"stage {rank}?"
    )
    return question, min(p - 1 - rank, m), "one for each stage after it: p − 1 − r, m at most"


@of_step(8)
def alive_under_1f1b(r):
    p, m, rank = pipeline(r)
    question = (
        f"1F1B, {p} stages, {m} micro-batches. How many does stage {rank} keep alive at most?"
    )
    return question, min(p - rank, m), "the warm-up and one more: p − r, m at most"


@of_step(8)
def memory_saved(r):
    p = r.randint(2, 6)
    m = p * r.randint(2, 6)
    question = (
        f"{p} stages, {m} micro-batches. How many times as many does AFAB keep alive on stage "
        "0 as 1F1B?"
    )
    return question, m / p, "m against p"


@of_step(8)
def ticks_of_a_step(r):
    p, m, _ = pipeline(r)
    question = (
        "A forward pass takes 1 tick, a backward pass 2. How many ticks does a step take with "
        f"{p} stages and {m} micro-batches?"
    )
    return (
        question,
        3 * (m + p - 1),
        "3 ticks for each of m micro-batches, and for p − 1 that fill and drain",
    )


@of_step(8)
def backward_passes_before(r):
    p, m, rank = pipeline(r)
    k = r.randint(1, m)
    ahead = min(p - 1 - rank, m)
    question = (
        f"1F1B, {p} stages, {m} micro-batches. How many backward passes has stage {rank} done "
        f"when it begins its forward pass number {k}, counted from 1?"
    )
    return question, max(0, k - 1 - ahead), "none in the warm-up, then one after each forward pass"


# --- 9. all four ----------------------------------------------------------------------------------


@of_step(9)
def ranks_of_a_layout(r):
    sizes, rank = mesh(r)
    tp, cp, dp, pp = sizes
    answer = places(sizes, rank)
    question = (
        f"--tp_size {tp} --cp_size {cp} --dp_size {dp} --pp_size {pp}. Which rank has the places "
        f"{answer} along tp, cp, dp, pp?"
    )
    return question, rank, "tp + size tp · (cp + size cp · (dp + size dp · pp))"


@of_step(9)
def bubble_of_chunks(r):
    p, c = r.randint(2, 8), r.randint(2, 4)
    m = p * r.randint(1, 6)
    question = f"{p} ranks, {c} chunks each, {m} micro-batches. How large is the bubble? (percent)"
    return question, 100 * (p - 1) / (c * m + p - 1), "(p − 1) / (c m + p − 1)"


@of_step(9)
def bytes_of_a_checkpoint(r):
    millions = r.randint(10, 2000)
    question = f"How many MB has a checkpoint of {millions} million weights?"
    return question, 12 * millions, "weight and two moments, 4 bytes each"


@of_step(9)
def messages_of_chunks(r):
    p, c = r.randint(3, 8), r.randint(2, 4)
    m = p * r.randint(1, 6)
    first = r.random() < 0.5
    place = "the first" if first else "a middle"
    question = (
        f"{p} ranks, {c} chunks each, {m} micro-batches. How many messages does {place} rank send?"
    )
    return question, 2 * c * m - m * first, "2 c m; m fewer on the first and on the last rank"


@of_step(9)
def global_batch(r):
    tp, dp, pp, b, m = (r.choice([1, 2, 4]) for _ in range(5))
    question = (
        f"--tp_size {tp} --dp_size {dp} --pp_size {pp} --micro_batch_size {b} "
        f"--gradient_accumulation_steps {m}. How many sequences has a step?"
    )
    return question, b * m * dp, "b · m · dp: tp and pp see the same sequences"
