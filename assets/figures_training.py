"""What training does over a run: learning rates, and losses of two optimizers."""

import json
import statistics
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


def muon():
    """Losses of AdamW and Muon in step 9's default run, as tests/muon_curves.py kept them.

    Thin lines are seeds, and the thick one is their mean; each at the best rate that was tried.
    """
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    for (optimizer, (rate, seeds)), colour in zip(seeds_of_muon().items(), COLOURS, strict=False):
        steps = [10 * place + 5.5 for place in range(len(seeds[0]["losses"]))]
        for seed in seeds:
            axes.plot(steps, seed["losses"], color=colour, lw=0.5, alpha=0.6)
        mean = [statistics.mean(x) for x in zip(*(s["losses"] for s in seeds), strict=True)]
        axes.plot(steps, mean, color=colour, lw=1.8, label=f"{optimizer}, learning rate {rate}")
    axes.set(xlabel="step", ylabel="loss, mean of 10 steps", ylim=(None, 3.5), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def seeds_of_muon():
    """{optimizer: (best rate as it was given, its runs, one a seed)} of assets/muon.json."""
    runs = json.loads((Path(__file__).parent / "muon.json").read_text())["runs"]
    found = {}
    for flags, run in runs.items():
        _, optimizer, _, rate, _, _ = flags.split()
        found.setdefault(optimizer, {}).setdefault(rate, []).append(run)
    return {name: max(rates.items(), key=lambda one: len(one[1])) for name, rates in found.items()}
