"""One cast of each weight for all micro-batches of a step.

A product in bfloat16 needs its float32 weight in bfloat16, forward and backward, so autograd keeps
the cast from the one pass to the other: 2 bytes a weight. Of one micro-batch after the other that
is one cast at a time; of several that are alive on a stage it would be one each, all the same.
Source: mixed precision (arXiv:1710.03740), section 3.1.
"""

import contextlib

import torch


class SharedCast(torch.autograd.Function):
    """A cast that is there already. Its gradient is cast back, as if it had been made here."""

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
    """Meanwhile so many micro-batches share a cast of each matrix, which autograd then keeps once.

    One micro-batch has nothing to share, and with activation checkpointing none is kept. Left out
    are weights that have the dtype of the computation, as those that zero3 gathers, and the table
    of the embedding, which is not cast, be it tied or not.
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
