"""What training does over a run: learning rates."""

import sys
from pathlib import Path
from types import SimpleNamespace

from drawing import COLOURS, plt

sys.path.append(str(Path(__file__).parents[1] / "step1_model"))


def learning_rates():
    """The rate at each of 200 steps, by step 1's `learning_rate_at`, for each `--lr_schedule`."""
    from learning_rate import WAYS_DOWN, check_schedule, learning_rate_at

    figure, axes = plt.subplots(figsize=(6.4, 2.6))
    steps = range(1, 201)
    for name, colour in zip(WAYS_DOWN, COLOURS, strict=False):
        args = SimpleNamespace(
            lr_schedule=name, learning_rate=1.0, warmup_steps=20, total_steps=200, max_tokens=0,
            min_lr_ratio=None, decay_steps=None,
        )  # fmt: skip
        check_schedule(args)
        rates = [learning_rate_at(step, args) for step in steps]
        style = "--" if name == "constant" else "-"
        axes.plot(steps, rates, style, color=colour, lw=1.6, label=name)
    axes.set(xlabel="step", ylabel="rate / --learning_rate", xlim=(0, 200), ylim=(0, 1.05))
    axes.set_xticks([0, 20, 100, 164, 200])
    axes.set_yticks([0, 0.1, 0.5, 1.0])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.12, 0.08))
    return figure
