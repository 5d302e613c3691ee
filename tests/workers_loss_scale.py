"""Steps with a loss scale, and with a gradient that overflows on one rank only."""

import contextlib
import importlib
import math
from unittest.mock import patch

import torch
from harness import pieces, run_steps
from workers_setup import build


@contextlib.contextmanager
def scaled(start):
    """Every dtype has the dynamic loss scale of float16, with another one to begin with."""
    import train

    class Scaled(train.LossScale):
        def __init__(self, dtype):
            super().__init__("float16")
            self.value = start

    with patch.object(train, "LossScale", Scaled):
        yield


def run_scaled(argv, steps, start):
    """`run_steps` with a loss scale; the scale is taken out of the gradients again."""
    with scaled(start):
        result = run_steps(argv, steps)
    result["gradients"] = [
        [(*tags, gradient / start) for *tags, gradient in held] for held in result["gradients"]
    ]
    return result


def kept_of(state):
    """Copies of all that an update changes: weights, and what the optimizer keeps."""
    entries = [state.optimizer.state.get(p, {}) for p in state.parameters]
    kept = [value for entry in entries for value in entry.values() if value is not None]
    return [tensor.detach().clone() for tensor in [*state.parameters, *kept]]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def overflows(state, rank):
    """Let one gradient of a rank be infinite in the backward passes to come; a handle to end it."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_rank() != rank:
        return None
    weights = [w for w in state.model.parameters() if "q_proj" in w.global_name]

    def spoil(grad):
        grad = grad.clone()
        grad.view(-1)[-1] = math.inf
        return grad

    return weights[-1].register_hook(spoil)


def train_with_overflow(argv, rank, at, steps, start=None):
    """Train up to a step; on one rank one gradient overflows in some steps.

    It saves as the flags say. Returns what the steps report, whether each left weights and
    optimizer state as they were, the scale after each, AdamW's own count, and pieces of the
    weights.
    """
    import train

    with scaled(start) if start else contextlib.nullcontext():
        state = build(argv)
    reports, still, scales = [], [], []
    while state.step < steps:
        handle = overflows(state, rank) if state.step + 1 in at else None
        before = kept_of(state)
        reports.append(train.train_step(state))
        still.append(same(before, kept_of(state)))
        scales.append(state.loss_scale.value)
        if handle:
            handle.remove()
        if getattr(state.args, "checkpoint_dir", None):
            importlib.import_module("checkpoint").save_if_due(state)
    counts = {e["step"].item() for e in state.optimizer.state.values() if "step" in e}
    return reports, still, scales, counts, pieces(state.parameters, lambda p: p)


def scales(argv, norms, to_double):
    """What `LossScale` says of steps with these norms: (scale, skipped, scale after) of each."""
    from precision import LossScale

    made, found = LossScale("float16"), []
    made.good_steps_to_double = to_double
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], fused=True)
    for norm in norms:
        weight.grad = torch.ones(1)
        made.step(optimizer, torch.tensor(norm, dtype=torch.float64))
        report = made.update(optimizer, norm)
        found.append((report["loss_scale"], report["skipped"], made.value))
    return found, made.remedy


def first_step_overflows(argv):
    """Two steps of which the first is skipped: its loss scale, SGD's buffers, and gradients."""
    import train

    state = build(argv)
    handle = overflows(state, 0)
    train.train_step(state)
    handle.remove()
    left = dict(state.optimizer.state)
    train.train_step(state)
    buffers = [state.optimizer.state[p]["momentum_buffer"] for p in state.parameters]
    return left, same(buffers, [p.grad for p in state.parameters])
