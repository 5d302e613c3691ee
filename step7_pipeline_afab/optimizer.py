"""The optimizer, and the norm of the whole model's gradient."""

import torch

import process_group as pg


def build_optimizer(parameters, args):
    """The optimizer of `--optimizer`, by default AdamW.

    Only matrices decay. A norm's weight would shrink, and its layer with it.
    Source: AdamW (arXiv:1711.05101), algorithm 2.
    """
    matrices = [p for p in parameters if len(p.full_shape) >= 2]
    vectors = [p for p in parameters if len(p.full_shape) < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return args.make_optimizer(groups, lr=args.learning_rate)


@torch.no_grad()
def gradient_norm(parameters, names, group):
    """The 2-norm of the whole model's gradient, a float64 scalar.

    One sum of squares per parameter, added in the order of `names`, the names of all weights of
    the whole model. So the order of the additions is the same however the model is laid out.
    group: the ranks that hold the model between them; what several of them hold is `counted` on
    one.
    """
    # Not `vector_norm`: on CUDA it makes a float64 copy first. `_foreach_norm` is private, but it
    # reads a gradient once, and what it adds is float64.
    norms = torch._foreach_norm([p.grad for p in parameters], 2, torch.float64)
    zero = torch.zeros_like(norms[0])  # for what this rank does not count
    found = {p.global_name: n for p, n in zip(parameters, norms, strict=True) if p.counted}
    squares = torch.stack([found.get(name, zero) for name in names]).square()
    return pg.all_reduce(squares, group).sum().sqrt()


def clip_gradients(parameters, max_norm, norm):
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)). Source: arXiv:1211.5063, 3.2."""
    norm = norm.to(parameters[0].dtype)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
