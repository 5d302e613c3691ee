"""The numbers of the widget `tensor_parallel`: two layers of step 4 on 1 to 4 ranks, as they ran.

The first layer is cut by output features, the second by input features. There are as many tokens
as features between the layers. With two of them the weights, the first token and the gradient of
its z are those of the lesson's "By hand".
"""

import sys
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).parent))
from recorded import record  # noqa: E402

X = [[1, 2], [2, 1], [0, 3], [1, 1]]  # [tokens, in]
W1 = [[1, 2], [3, 4], [2, 1], [0, 3]]  # [features, in]
W2 = [[5, 6, 1, 2], [7, 8, 4, 3]]  # [out, features]
GRAD_Z = [[1, 1], [0, 2], [2, 1], [1, 0]]  # [tokens, out], from the layers behind
FEATURES = {1: 2, 2: 2, 3: 3, 4: 4}  # on so many ranks
# What the collectives are about, in the order in which a rank calls them.
ABOUT = {False: ("z", "grad x"), True: ("x", "z", "grad z", "x again", "grad x")}


def blocks():
    """{ranks: {"no" or "yes", for sequence parallelism: what `block` says}}."""
    return {
        ranks: {"yes" if cut else "no": block(ranks, cut) for cut in (False, True)[:ranks]}
        for ranks in FEATURES
    }


def block(ranks, sequence_parallel):
    """What one device computes, what each rank does (see `on_a_rank`), and

    off: the largest difference between the two.
    """
    each = record("step4_tensor_parallel", ranks, on_a_rank, FEATURES[ranks], sequence_parallel)
    one = on_one_device(*tensors(FEATURES[ranks]))
    return {"one": one, "ranks": each, "off": difference(one, each)}


def tensors(features):
    """x, W1, W2 and the gradient of z, with so many features and tokens."""
    return X[:features], W1[:features], [row[:features] for row in W2], GRAD_Z[:features]


def on_a_rank(features, sequence_parallel):
    """The two layers on this rank, forward and backward: tensors as lists of rows, and

    features, tokens: what it holds, [first, the one after the last]; messages, a dict for each
    collective in its order: about, kind, bytes in the ledger, bytes that the rank sends, what it
    took and what it gave.
    """
    import torch

    import process_group as pg
    from tensor_parallel import ColumnParallelLinear, RowParallelLinear

    def whole(weight):
        layer = torch.nn.Linear(len(weight[0]), len(weight), bias=False)
        layer.weight.data = torch.tensor(weight, dtype=torch.float32)
        layer.weight.held = tuple(slice(0, size) for size in layer.weight.shape)
        return layer

    x, w1, w2, grad_z = tensors(features)
    pg.init_processes("cpu")
    group = pg.Mesh(tp=torch.distributed.get_world_size()).group("tp")
    first = ColumnParallelLinear(whole(w1), group, sequence_parallel)
    last = RowParallelLinear(whole(w2), group, sequence_parallel)
    tokens = [0, len(x)]
    if sequence_parallel:
        tokens = [len(x) * rank // group.size for rank in (group.rank, group.rank + 1)]
    x, grad_z = (torch.tensor([t[slice(*tokens)]], dtype=torch.float32) for t in (x, grad_z))
    x.requires_grad_()

    messages = []
    with noted(messages):
        y = first(x)
        y.retain_grad()
        z = last(y)
        z.retain_grad()
        z.backward(grad_z)

    held = first.weight.held[0]
    about = ABOUT[sequence_parallel][: len(messages)]
    return {
        "features": [held.start, held.stop],
        "tokens": tokens,
        **with_gradients(x=x, w1=first.weight, w2=last.weight, y=y, z=z),
        "messages": [
            {
                "about": name,
                "kind": kind,
                "bytes": size,
                # Step 2: a ring of n sends (n - 1) / n of that, of an all-reduce twice as much.
                "sent": size * (1 + (kind == "all_reduce")) * (group.size - 1) // group.size,
                "took": rows(took),
                "gave": rows(gave),
            }
            for name, (kind, size, took, gave) in zip(about, messages, strict=True)
        ],
    }


def noted(messages):
    """While this is entered, each collective adds (kind, bytes in the ledger, input, output)."""
    import contextlib

    import process_group as pg

    entered = contextlib.ExitStack()

    def record(axis, kind, size, original=pg.record):
        messages.append([kind, size])
        return original(axis, kind, size)

    def call(original):
        def instead(x, group, async_op=False):
            took, before = x.clone(), len(messages)
            out = original(x, group, async_op=async_op)
            if len(messages) > before:  # more than one rank
                # An all-reduce writes into x; of the others that may overlap, out has a handle.
                result = x if original is all_reduce else out[0] if async_op else out
                messages[-1] += [took, result]
            return out

        return instead

    all_reduce = pg.all_reduce
    entered.enter_context(patch.object(pg, "record", record))
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        entered.enter_context(patch.object(pg, kind, call(getattr(pg, kind))))
    return entered


def rows(tensor):
    """Whole numbers, token by token or as a weight has them, without the dims of batch and rank."""
    exact = tensor.detach().reshape(-1, tensor.shape[-1])
    assert exact.equal(exact.round()), "a number on the screen would not be the whole number"
    return exact.long().tolist()


def with_gradients(**tensors):
    grads = {f"grad {name}": tensor.grad for name, tensor in tensors.items()}
    return {name: rows(tensor) for name, tensor in {**tensors, **grads}.items()}


def on_one_device(x, w1, w2, grad_z):
    """The same in plain PyTorch."""
    import torch

    x, w1, w2 = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (x, w1, w2))
    y = x @ w1.T
    y.retain_grad()
    z = y @ w2.T
    z.retain_grad()
    z.backward(torch.tensor(grad_z, dtype=torch.float64))
    return with_gradients(x=x, w1=w1, w2=w2, y=y, z=z)


def difference(one, each):
    """How far the ranks' tensors are from the same part of one device's, at most."""
    off = 0
    for rank in each:
        features, tokens = slice(*rank["features"]), slice(*rank["tokens"])
        everything = slice(None)
        parts = {"x": (tokens, everything), "w1": (features, everything), "z": (tokens, everything),
                 "w2": (everything, features), "y": (everything, features)}  # fmt: skip
        for name, (down, across) in parts.items():
            for tensor in (name, f"grad {name}"):
                due = [row[across] for row in one[tensor][down]]
                pairs = zip(sum(due, []), sum(rank[tensor], []), strict=True)
                off = max(off, *(abs(a - b) for a, b in pairs))
    return off
