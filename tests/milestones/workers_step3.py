"""What the checks of step 3's loader, tokens and loss run in its processes."""

import hashlib
import math
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from same import same

TOKENS = np.arange(1000, dtype=np.uint16)  # 99 windows of 10 + 1: 98 for training, one held out


def arguments(**other):
    """What `Batches` reads of the command line."""
    fields = {"seq_len": 10, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
    rest = {"seed": 3, "num_workers": 0, "dataset_name": "random", "stride": 0, "eval_tokens": None}
    return SimpleNamespace(**(fields | rest | {"streaming": False} | other))


def refused(function, *words, by=None):
    """Demand that a call raises UserError, with these words in its message; by: who should."""
    from errors import UserError

    who = f"{by}: " if by else ""
    try:
        function()
    except UserError as error:
        lacking = [word for word in words if word not in str(error)]
        assert not lacking, f"{who}the message “{error}” does not say {', '.join(lacking)}"
    else:
        raise AssertionError(f"{who}no UserError is raised that says {', '.join(words)}")


# --- 1. windows and their order -------------------------------------------------------------------


def windows():
    from dataloader import Windows

    for tokens, count in ((0, 0), (1, 0), (5, 0), (6, 1), (10, 1), (11, 2), (18, 3)):
        found = len(Windows(TOKENS[:tokens], 5))
        assert found == count, (
            f"Windows.__len__: {tokens} tokens give {found} windows of --seq_len 5; it should be "
            f"{count}: each one takes 5 tokens, and the last one needs one more as its last target"
        )
    for tokens, count in ((5, 0), (6, 1), (8, 1), (9, 2), (12, 3)):
        found = len(Windows(TOKENS[:tokens], 5, 2))
        assert found == count, (
            f"Windows.__len__: {tokens} tokens give {found} windows of --seq_len 5 --stride 2; it "
            f"should be {count}: each one begins 3 tokens after the one before"
        )
    found = Windows(TOKENS, 5, 2)[2].tolist()
    assert found == [6, 7, 8, 9, 10, 11], (
        f"Windows.__getitem__(2) with --seq_len 5 --stride 2 is {found}; it should begin with "
        "token 6, two times 3"
    )
    made = Windows(TOKENS, 5)
    for index in (0, 1, 7):
        window, due = made[index], list(range(5 * index, 5 * index + 6))
        assert isinstance(window, torch.Tensor) and window.dtype == torch.int64, (
            "Windows.__getitem__ should give a tensor of int64: the embedding takes no other whole "
            "numbers of NumPy"
        )
        assert window.tolist() == due, (
            f"Windows.__getitem__({index}) of the tokens 0, 1, 2, … is {window.tolist()}; it "
            f"should be {due}: seq_len + 1 tokens, the first one the last of the window before"
        )


def order():
    from dataloader import Order

    def row(seed, positions=range(30)):
        made = Order(10, 4, seed)
        return [made.sequence(position) for position in positions]

    first = row(3)
    epochs = [first[start : start + 10] for start in (0, 10, 20)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(10)), (
            f"Order.sequence: epoch {number} of 10 windows is {epoch}; each of 0 to 9 should be "
            "there once"
        )
    what = "Order.sequence:"
    for number, epoch in enumerate(epochs):
        digest = hashlib.sha256(f"3 epoch {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        due = torch.randperm(10, generator=generator).tolist()
        assert epoch == due, (
            f"{what} epoch {number} of seed 3 has the order {epoch}; by the rule in its docstring "
            f"it has {due}. Any order would train as well, but then the losses are not ours"
        )
    assert list(range(10)) not in epochs, f"{what} an epoch is in the text's order, not shuffled"
    assert epochs[0] != epochs[1], f"{what} two epochs have one order: put the epoch into the seed"
    torch.manual_seed(1)
    assert row(3) == first, (
        f"{what} the same seed gives another order the next time: it depends on something else "
        "too, maybe on torch's own generator. Make a new one from the seed and the epoch"
    )
    assert row(4) != first, f"{what} another seed gives the same order"
    back = [25, 3, 17, 4]
    assert row(3, back) == [first[position] for position in back], (
        f"{what} position 3 asked for after position 25 gives another window than in order: an "
        "epoch must be a function of the seed and its number, not of what was asked before"
    )


def cut():
    from itertools import islice

    from dataloader import Order

    made, expected = Order(10, 4, 3), Order(10, 4, 3)
    for size in (1, 2, 4):
        for step in (0, 2, 6):
            found = list(islice(made.cut(size, step), 4 // size))
            due = [expected.sequence(4 * step + row) for row in range(4)]
            assert sum(found, []) == due, (
                f"Order.cut: step {step} in micro-batches of {size} has the windows {found}; it "
                f"should have {due} in this order: the positions from step x batch_size on"
            )
            sizes = {len(part) for part in found}
            assert sizes == {size}, f"Order.cut: not all have {size} windows: {found}"
    assert len(list(islice(made.cut(4, 0), 50))) == 50, "Order.cut ends; it should go on for ever"


def one_line():
    from files import shown

    found = shown("a\nb/é")
    assert found == "a\\nb/é", f"`shown` writes the path a\\nb/é as {found!r}, not in one line"


# --- 2. the sequences of a step -------------------------------------------------------------------


def batches(tokens=TOKENS, validation=None, **other):
    from dataloader import Batches

    return Batches(arguments(**other), tokens, torch.device("cpu"), validation)


def starts(micro_batches):
    """The number of each window, from its first token; tokens and targets are what they should."""
    found = []
    for tokens, targets, positions in micro_batches:
        what = "Batches.split: the tensor of"
        same(positions, torch.arange(10), f"{what} positions", "0 to seq_len - 1")
        same(targets, tokens + 1, f"{what} targets", "the token after each token, here + 1")
        found += (tokens[:, 0] // 10).tolist()
    return found


def held_out():
    init, evaluation = "Batches.__init__:", "Batches.evaluation:"
    data = batches(np.arange(6401, dtype=np.uint16), micro_batch_size=5)  # 640 windows
    assert data.order.count == 630, (
        f"{init} of 640 windows {data.order.count} are for training; it should be 630: 640 // 64 "
        "are held out"
    )
    size = batches(micro_batch_size=2, gradient_accumulation_steps=4).order.batch_size
    assert size == 8, f"{init} Order gets the batch_size {size}; a step of 4 times 2 has 8"
    count = batches(TOKENS[:401]).order.count  # 40 windows
    assert count == 39, (
        f"{init} of 40 windows {count} are for training; one at least is always held out"
    )
    due = list(range(630, 640))
    chosen = sorted(data.held_out)
    assert chosen == due, (
        f"{init} the held-out windows are {chosen}; it should be the last ones, 630 to 639"
    )
    found = starts(data.evaluation())
    assert sorted(found) == due, f"{evaluation} it reads {found}; `held_out` has {due}"
    again = starts(data.evaluation())
    assert again == found, f"{evaluation} the second time it reads other windows, {again}"
    assert set(starts(batches().evaluation())) == {98}, (
        f"{init} of 99 windows the last one is held out; an evaluation reads only that"
    )
    for windows, size, due in (
        (6000, 4, [5907 + row * 93 // 92 for row in range(92)]),
        (32_768, 4, list(range(32_256, 32_768, 2))),
    ):
        long = batches(np.arange(10 * windows + 1, dtype=np.uint32), micro_batch_size=size)
        assert list(long.held_out) == due, (
            f"{init} of {windows // 64} held-out windows an evaluation reads "
            f"{len(long.held_out)}, from {long.held_out[0]} to {long.held_out[-1]}; it should be "
            f"{len(due)}, whole batches of {size} and at most HELD_OUT_SEQUENCES, spread evenly "
            f"from {due[0]} to {due[-1]}"
        )
    near = batches(np.arange(6401, dtype=np.uint16), micro_batch_size=1, stride=8)
    first, last = 2 * min(near.held_out), 2 * (near.order.count - 1) + 10
    assert first == last, (
        f"{init} with --seq_len 10 --stride 8 training reads up to token {last}, and the first "
        f"held-out window begins with token {first}; they may share that one, and no more"
    )
    train, apart = TOKENS, np.arange(5000, 5101, dtype=np.uint16)
    named = batches(train, apart, micro_batch_size=3)
    assert named.order.count == 99 and set(starts(named.evaluation())) <= set(range(500, 510)), (
        f"{init} where the data set has a text for validation, all 99 windows of the other one "
        "are for training and only that text is held out"
    )
    words = "dataset_name", "seq_len", "micro_batch_size"
    refused(lambda: batches(TOKENS[:50]), *words, by=init[:-1])
    refused(lambda: batches(train, apart[:10]), "10 tokens", by=init[:-1])


def splits():
    steps = [0, 1, 2, 13, 3, 40]
    whole = batches(micro_batch_size=8)
    in_order = [starts(whole.micro_batches(step)) for step in range(41)]
    row = sum(in_order, [])
    assert sorted(row[:98]) == list(range(98)), (
        "Batches.micro_batches: the 98 windows of 12 steps and a quarter are no epoch: some are "
        "there twice, or held out."
    )
    for flags in ((4, 2, 0), (1, 8, 0), (2, 4, 2)):
        names = ("micro_batch_size", "gradient_accumulation_steps", "num_workers")
        data = batches(**dict(zip(names, flags, strict=True)))
        words = ", ".join(f"--{name} {value}" for name, value in zip(names, flags, strict=True))
        for step in steps:
            found = starts(data.micro_batches(step))
            assert found == in_order[step], (
                f"Batches.micro_batches: with {words} step {step} has the windows {found}; one "
                f"micro-batch of 8 has {in_order[step]}. A step must have the same ones however "
                "it is cut, also when it is not the one after the last"
            )
    data = batches(micro_batch_size=2, gradient_accumulation_steps=4)
    starts(data.micro_batches(0))
    for step in (1, 2):
        next(data.micro_batches(1))
        assert starts(data.micro_batches(step)) == in_order[step], (
            f"Batches.micro_batches: step {step} has other windows where only the first "
            "micro-batch of step 1 was read before it: after a step that was left half read, the "
            "loader must start anew"
        )


def ahead():
    """The micro-batch after the one that is computed is there already, over the end of a step."""
    data, events = batches(micro_batch_size=2, gradient_accumulation_steps=2), []

    def watched(function, name):
        return lambda *args: (events.append(name), function(*args))[1]

    data.load, data.split = watched(data.load, "load"), watched(data.split, "split")
    for step in (0, 1):
        for _ in data.micro_batches(step):
            events.append("compute")
    due = ["load", "split", *4 * ["compute", "split"]]
    assert events == due, (
        f"Batches.micro_batches: two steps of two do {events}; it should be {due}: `load` once "
        "for all steps, and `split` of the next micro-batch, which copies it to the device, when "
        "the caller asks for more: so the first one of a step is ready when the step before ends"
    )


# --- 7. the loss of a step ------------------------------------------------------------------------


class Mark:
    """Lives as long as what autograd keeps of one forward pass."""


def toy():
    """(a weight [8], the summed loss of tokens and targets [batch, seq] by it)."""
    weight = torch.linspace(1, 2, 8, dtype=torch.float64).requires_grad_()

    def summed_loss(tokens, targets, positions):
        return (weight[tokens].square() * targets).sum()

    return weight, summed_loss


def micro_batches_of(*sizes):
    """Micro-batches [size, 3] of tokens and targets that differ everywhere."""
    made = []
    for place, size in enumerate(sizes):
        tokens = (torch.arange(3 * size).view(size, 3) * 5 + place) % 8
        made.append((tokens, tokens + 1 + place, torch.arange(3)))
    return made


def state_of(model, **other):
    return SimpleNamespace(model=model, device=torch.device("cpu"), step=0, **other)


def usual_mistake(found, sums, counts):
    """What usually makes a loss, or a gradient, what it is, in words; nothing if unknown."""
    own = [one / count for one, count in zip(sums, counts, strict=True)]
    known = {
        "each micro-batch is divided by its own number of targets": sum(own),
        "the mean of the micro-batches' means is taken": sum(own) / len(own),
        "nothing is divided": sum(sums),
        "only the last micro-batch counts": sums[-1] / sum(counts),
        "only the first micro-batch counts": sums[0] / sum(counts),
        "it is divided by the number of micro-batches": sum(sums) / len(sums),
    }
    for words, value in known.items():
        if torch.allclose(found.detach().double(), value.detach(), rtol=1e-9, atol=0):
            return f". It is what comes out where {words}"
    return ""


def mean(sizes):
    import train

    parts = micro_batches_of(*sizes)
    weight, model = toy()
    counts = [targets.numel() for _, targets, _ in parts]
    sums = [model(*part).detach() for part in parts]
    gradients = [torch.autograd.grad(model(*part), weight)[0] for part in parts]
    found = train.mean_loss(state_of(model), iter(parts), sum(counts), True)
    kind = found.dtype
    assert kind == torch.float64, f"mean_loss: the loss is {kind}; add it up in float64"
    due = "the sum over all micro-batches, divided by the number of targets of all of them"
    for what, one, each in (("gradient", weight.grad, gradients), ("loss", found, sums)):
        hint = usual_mistake(one, each, counts) if one is not None else ""
        named = f"mean_loss: the {what} of micro-batches of {', '.join(map(str, counts))} targets"
        same(one, sum(each) / sum(counts), named, due + hint)
    assert not found.requires_grad, "mean_loss: the loss carries autograd's graph: detach each part"
    weight.grad = None
    again = train.mean_loss(state_of(model), iter(parts), sum(counts), False)
    same(again, found, "mean_loss: that with backward=False", "the same as with backward=True")
    assert weight.grad is None, "mean_loss: with backward=False there must be no gradient"


def graphs():
    """How many micro-batches' graphs there are when a forward pass begins, without backward."""
    import weakref

    import train

    weight, marks, alive = torch.ones(3, requires_grad=True), [], []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark = Mark()
            marks.append(weakref.ref(ctx.mark))
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(3)

    def model(tokens, targets, positions):
        alive.append(sum(mark() is not None for mark in marks))
        return Marked.apply(weight)

    train.mean_loss(state_of(model), iter(micro_batches_of(1, 1, 1)), 9, False)
    assert alive == [0, 0, 0], (
        f"mean_loss: when the micro-batches of an evaluation go forward, the graphs of {alive} "
        "earlier ones are still in memory; it should be none: nothing goes backward, so let go of "
        "the loss (`del`) before the next one"
    )


def of_a_step():
    import train

    parts, asked = micro_batches_of(2, 2), []
    weight, model = toy()
    text = SimpleNamespace(part=1, bytes_per_token=2, args=None)
    data = SimpleNamespace(
        held_out=range(6),
        evaluation=lambda: iter(parts),
        mixed=[],
        texts=[text],
        micro_batches=lambda step: (asked.append(step), iter(parts))[1],
    )
    args = SimpleNamespace(tokens_per_step=12, seq_len=3, learning_rate=1.0, warmup_steps=2)
    scale = SimpleNamespace(value=4.0)
    state = state_of(model, data=data, args=args, loss_scale=scale)
    state.step = 5
    due = sum(model(*part) for part in parts) / 12
    same(train.forward_backward(state), due, "the loss of forward_backward", "the step's mean")
    assert asked == [5], f"forward_backward reads the steps {asked}; it should read state.step, 5"
    expected = torch.autograd.grad(due, weight)[0]
    what = "the gradient of forward_backward with a loss scale of 4"
    same(weight.grad, 4 * expected, what, "4 times that of the mean")
    weight.grad = None
    found = train.evaluate(state)["held_out"]
    due = due.item() * 12 / 18
    assert isinstance(found, float) and math.isclose(found, due, rel_tol=1e-12), (
        f"evaluate: the held-out loss is {found!r}; it should be the number {due}: the sum "
        "divided by the targets of all held-out sequences, len(held_out) x seq_len"
    )
    text.args, data.mixed = SimpleNamespace(dataset_name="a"), [data, data]
    data.texts = [text, SimpleNamespace(part=3, bytes_per_token=2, args=text.args)]
    both = train.evaluate(state)["held_out"]
    assert math.isclose(both, due, rel_tol=1e-12), (
        f"evaluate: two equal texts have the held-out loss {both!r} together, not {due}: take the "
        "loss of each of `parts_of(data)` by itself, and hand the list to held_out_metrics"
    )
    assert weight.grad is None, "evaluate must leave no gradient"
    with torch.no_grad(), patch.object(state, "model", lambda *_: torch.tensor(math.nan)):
        refused(lambda: train.evaluate(state), "step 5", by="evaluate")
