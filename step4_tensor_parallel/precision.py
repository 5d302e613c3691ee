"""Half precision: which dtypes go together, and the loss scale that float16 needs.

The smallest number of float16 is 2^-24, the largest is 65504. Many gradients are below the
smallest, and would be zero. So the loss is multiplied by a scale before it goes backward, and with
it every gradient. A power of two changes no digit of a number.

Source: mixed precision training (arXiv:1710.03740), sections 3.1 and 3.2.
"""

import math

import torch

from errors import UserError

CAN_SKIP = ("adam", "adamw", "sgd")


def check_precision(args):
    """Fill in `args.dtype` and `args.weights_dtype`; raises UserError for what does not fit."""
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    whole = "float64" if args.dtype == "float64" else "float32"
    args.weights_dtype = weights = args.weights_dtype or whole
    if weights not in (whole, args.dtype):
        raise UserError(
            f"--weights_dtype {weights} with --dtype {args.dtype}: choose {whole} for the weights, "
            f"or --dtype {weights}"
        )
    if args.dtype == "float16" and not args.make_optimizer.keywords.get("fused"):
        raise UserError(
            f"--dtype float16 with --optimizer {args.optimizer} that is not fused: it can't skip a "
            f"step; choose one of {', '.join(CAN_SKIP)}, which are, or --dtype bfloat16"
        )


class LossScale:
    """What the loss is multiplied by before it goes backward: a power of two.

    It is halved when a gradient overflows, and that step is skipped. It is doubled after many good
    steps in a row. Every rank sees the same gradient norm. So all of them have the same scale, and
    need no message for it. In any other dtype than float16 it stays 1.
    """

    start, good_steps_to_double = 2.0**16, 2000  # as in torch.amp.GradScaler

    def __init__(self, dtype):
        self.dynamic = dtype == "float16"
        self.value = self.start if self.dynamic else 1.0
        self.good_steps = 0  # since it was changed

    def step(self, optimizer, grad_norm):
        """Let the optimizer update the weights, or do nothing if the norm is not finite.

        grad_norm: a float64 scalar on the device. The host need not know it yet: a fused optimizer
        divides each gradient by `grad_scale`, and does nothing if `found_inf` is not zero.
        """
        if self.dynamic:
            optimizer.grad_scale = torch.full_like(grad_norm, self.value, dtype=torch.float32)
            optimizer.found_inf = (~grad_norm.isfinite()).float()
        self.was_fresh = not optimizer.state
        optimizer.step()

    def update(self, optimizer, grad_norm):
        """Choose the next scale, once the host knows the norm; returns what is reported of a step.

        loss_scale, that of the step; skipped. If the scale falls below 1, the step is not reported
        as skipped, so `train_step` raises.
        """
        if not self.dynamic:
            return {}
        report = {"loss_scale": self.value, "skipped": False}
        if math.isfinite(grad_norm):
            self.good_steps += 1
            if self.good_steps == self.good_steps_to_double:
                self.value, self.good_steps = self.value * 2, 0
            return report
        self.value, self.good_steps = self.value / 2, 0
        if self.was_fresh:  # torch's SGD has made buffers, and has not filled them
            optimizer.state.clear()
        return report | {"skipped": self.value >= 1}

    @property
    def remedy(self):
        """What an error about a step says before its own advice; nothing for a good scale."""
        return "the loss scale fell below 1: use --dtype bfloat16, " if self.value < 1 else ""
