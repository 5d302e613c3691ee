"""The learning rate over a run: a way up, and several ways down."""

import math

from errors import UserError


def cosine(progress):
    """Slow, fast, slow. Source: SGDR (arXiv:1608.03983), section 3."""
    return (1 + math.cos(math.pi * progress)) / 2


def linear(progress):
    return 1 - progress


def constant(progress):
    return 1.0


def one_minus_root(progress):
    """Steep at first, for a short decay. Source: Hägele et al. (arXiv:2405.18392), section 3."""
    return 1 - math.sqrt(progress)


# By the name of `--lr_schedule`: what is left of the way from the peak to the lowest rate, where
# `progress` goes from 0 to 1 over the decay.
WAYS_DOWN = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": one_minus_root}


def learning_rate_at(step, args):
    """Linear warm-up to `--learning_rate`, then down to `--min_lr_ratio` of it.

    The last `--decay_steps` steps go down; between warm-up and decay the rate stays. step counts
    from 1.
    """
    if step <= args.warmup_steps:
        return args.learning_rate * step / args.warmup_steps
    decayed = step - (args.total_steps - args.decay_steps)
    progress = min(1.0, max(0.0, decayed / args.decay_steps))
    left = WAYS_DOWN[args.lr_schedule](progress)
    return args.learning_rate * (args.min_lr_ratio + (1 - args.min_lr_ratio) * left)


def check_schedule(args):
    """Fill in `--min_lr_ratio` and `--decay_steps` where they are not given; raises UserError."""
    if args.lr_schedule == "constant":
        for name in ("min_lr_ratio", "decay_steps"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"--{name} with --lr_schedule constant, which has no decay: leave one out"
                )
    after = max(1, args.total_steps - args.warmup_steps)
    if args.decay_steps is None:
        args.decay_steps = max(1, after // 5) if args.lr_schedule == "wsd" else after
    elif args.decay_steps > after:
        raise UserError(
            f"--decay_steps {args.decay_steps}: --max_tokens {args.max_tokens} are "
            f"{args.total_steps} steps, {args.warmup_steps} of them --warmup_steps; at most "
            f"{after} can decay"
        )
    if args.min_lr_ratio is None:
        args.min_lr_ratio = 0.1
    elif args.min_lr_ratio > 1:
        raise UserError(f"--min_lr_ratio {args.min_lr_ratio}: choose 0 to 1")
