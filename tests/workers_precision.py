"""The dtypes in which a step computes, and how far one product is off."""

from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # the public way to see every operator
from workers_setup import build


class Dtypes(TorchDispatchMode):
    """Records the dtype of each tensor that any operator takes or returns."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self.seen.setdefault(leaf.dtype, set()).add(str(function))
        return out


def error_of_the_heads_gradient(argv):
    """How far `head_rounding`'s p - y is from autograd's gradient of the logits, relatively."""
    from head_rounding import head_and_gradient

    state = build(argv)
    hidden, weight, gradient = head_and_gradient(state)
    _, targets, _ = next(state.data.micro_batches(0))
    logits = (hidden @ weight.T).requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    return ((gradient - expected).norm() / expected.norm()).item()


def dtypes_of_a_step(argv):
    """{dtype: operators} of a step, the optimizer's update apart; dtypes of the state by kind."""
    import train

    state = build(argv)
    with Dtypes() as dtypes, patch.object(state.optimizer, "step", lambda: None):
        train.train_step(state)
    train.train_step(state)
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return {str(dtype): sorted(names) for dtype, names in dtypes.seen.items()}, {
        "weights": {str(p.dtype) for p in state.parameters},
        "gradients": {str(p.grad.dtype) for p in state.parameters},
        "optimizer": {str(moment.dtype) for moment in moments if moment.dim()},
    }


def reduction_dtypes(argv):
    """{axis: dtypes that were summed over it in a step}, activations apart, and the state's."""
    import process_group as pg
    import train

    state, seen = build(argv), {}
    real = {name: getattr(pg, name) for name in ("all_reduce", "reduce_scatter")}

    def watched(name):
        def call(x, group, *args, **options):
            if group.axis != "tp" or x.dim() < 3:
                seen.setdefault(group.axis, set()).add(str(x.dtype))
            return real[name](x, group, *args, **options)

        return call

    with patch.multiple(pg, **{name: watched(name) for name in real}):
        train.train_step(state)
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    seen["weights"] = {str(p.dtype) for p in state.parameters}
    seen["gradients"] = {str(p.grad.dtype) for p in state.parameters}
    seen["optimizer"] = {str(moment.dtype) for moment in moments if moment.dim()}
    return seen
