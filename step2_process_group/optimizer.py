"""AdamW, its learning rate, and the norm of the whole model's gradient."""

import math

import torch


def build_optimizer(parameters, learning_rate, weight_decay):
    """AdamW with decay on matrices only: shrinking a norm's weight would shrink its layer.

    Source: AdamW (arXiv:1711.05101), algorithm 2; betas as in Llama 2 (arXiv:2307.09288), 2.2.
    """
    matrices = [p for p in parameters if len(p.full_shape) >= 2]
    vectors = [p for p in parameters if len(p.full_shape) < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate_at(step, args):
    """Linear warm-up to `--learning_rate`, then a cosine down to a tenth of it at `--max_tokens`.

    step counts from 1. Source: SGDR (arXiv:1608.03983), section 3.
    """
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    decay_steps = max(1, args.total_steps - args.warmup_steps)
    progress = min(1.0, (step - args.warmup_steps) / decay_steps)
    return args.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def gradient_norm(parameters, names):
    """The 2-norm of the whole model's gradient, a float64 scalar.

    One sum of squares per parameter, added in the order of `names`, the names of all weights of
    the whole model. So the order of the additions is the same however the model is laid out.
    """
    # Not `vector_norm`: on CUDA it makes a float64 copy first. `_foreach_norm` is private, but it
    # reads a gradient once, and what it adds is float64.
    norms = torch._foreach_norm([p.grad for p in parameters], 2, torch.float64)
    found = {p.global_name: norm for p, norm in zip(parameters, norms, strict=True)}
    return torch.stack([found[name] for name in names]).square().sum().sqrt()


def clip_gradients(parameters, max_norm, norm):
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)). Source: arXiv:1211.5063, 3.2."""
    norm = norm.to(parameters[0].dtype)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
