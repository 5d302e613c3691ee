"""One cast of each weight for all micro-batches of a step.

A product in bfloat16 needs its float32 weight in bfloat16, forward and backward, so autograd keeps
the cast from the one pass to the other: 2 bytes a weight. Micro-batches that go backward one by one
keep one at a time; those that are alive together on a stage would keep one each, all the same.
Source: mixed precision (arXiv:1710.03740), section 3.1.
"""

import contextlib

import torch


class SharedCast(torch.autograd.Function):
    """A cast that is there already, in the place of one made here: its gradient is cast back here,
    in the middle of the backward pass, and goes to the weight at once."""

    @staticmethod
    def forward(ctx, weight, cast):
        ctx.dtype = weight.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def shared(weight):
    """The cast of a weight that all micro-batches share, or the weight itself if there is none."""
    cast = getattr(weight, "cast", None)
    return weight if cast is None else SharedCast.apply(weight, cast)


@contextlib.contextmanager
def shared_casts(model, micro_batches):
    """Meanwhile so many micro-batches share one cast of each matrix.

    One alone has nothing to share, and with activation checkpointing none is kept. Left out are
    weights in the dtype of the computation, such as those that zero3 gathers, and the table of the
    embedding: it is not cast, and where it is tied zero3 has not gathered it yet.
    """
    matrices = []
    if micro_batches > 1 and not model.model.activation_checkpointing:
        matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    dtype, table = model.model.dtype, "model.embed_tokens.weight"
    weights = [w for w in matrices if w.dtype != dtype and w.global_name != table]
    for weight in weights:
        weight.cast = weight.detach().to(dtype)
    try:
        yield
    finally:
        for weight in weights:
            del weight.cast
