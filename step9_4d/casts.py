"""One cast of each weight for all micro-batches of a step.

A product in bfloat16 needs its float32 weight in bfloat16, forward and backward. So autograd keeps
the cast from the forward to the backward pass: 2 bytes a weight. In a pipeline several
micro-batches are alive at once. Each would keep a cast of its own, and all of these are equal.
Source: mixed precision (arXiv:1710.03740), section 3.1.
"""

import contextlib
import functools


def cast_of(weight):
    """The cast of a weight that all micro-batches share, or the weight itself if there is none."""
    return getattr(weight, "cast", weight)


def hand_over(weight, engine, cast):
    """Hook: add the gradient that a backward pass has found for a cast to its weight's.

    The sum is in float32, and one kernel makes it; autograd would first make a float32 copy.
    """
    if weight.grad is None:
        weight.grad = cast.grad.to(weight.dtype)
    else:
        weight.grad += cast.grad
    cast.grad = None
    engine.on_gradient(weight)  # autograd has told it of no gradient of the weight


@contextlib.contextmanager
def shared_casts(model, engine, args):
    """Inside, all micro-batches of a step use one cast of each matrix.

    No cast is made for a single micro-batch, nor where layers are computed again and so keep none.
    Weights that have no shared cast: those in the dtype of the computation, as zero3 gathers them;
    column parallel ones (step 4), which are cast again in backward; and the embedding, as a lookup
    casts no table. A head that is tied to it has none either: zero3 gathers this weight in float32,
    but only when the model is called, and the casts are made before.
    """
    again = args.activation_checkpointing or args.recompute_elementwise
    weights, dtype = [], model.model.dtype
    if args.gradient_accumulation_steps > 1 and not again:
        # Matrices that have all their rows: of a column parallel one a rank has only some.
        weights = [w for w in model.parameters() if w.dim() > 1 and len(w) == w.full_shape[0]]
        weights = [w for w in weights if "embed_tokens" not in w.global_name and w.dtype != dtype]
    for weight in weights:
        weight.cast = weight.detach().to(dtype).requires_grad_()
        hook = functools.partial(hand_over, weight, engine)
        weight.cast.register_post_accumulate_grad_hook(hook)
    try:
        yield
    finally:
        for weight in weights:
            del weight.cast
