"""Muon beside AdamW at equal tokens: step 9's default run, three seeds, each at its best rate.

    python tests/muon_curves.py --save assets/muon.json

First one seed at three learning rates. While the best one of an optimizer, by the held-out loss, is
at an end of its rates, a further rate is tried there. Then two more seeds at the best. What is in
the file is not run again; assets/figures_training.py draws it.
"""

import argparse
import re
import statistics
from pathlib import Path

from launch import Saved, launch, machine, table

STEP = Path(__file__).resolve().parents[1] / "step9_4d"
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
FIRST = 1e-3, 3e-3, 1e-2
SEEDS = 42, 43, 44
MEANS = 10  # steps to a point of a curve


def train(saved, optimizer, rate, seed):
    """{"held_out": the loss at the end, "losses": means of ten steps}, from the file or a run."""
    flags = f"--optimizer {optimizer} --learning_rate {rate} --seed {seed}"
    if flags not in saved.runs:
        result = launch(STEP, flags, timeout=3600, OMP_NUM_THREADS="1")
        assert result.code == 0, result.errors
        losses = [step["loss"] for step in result.metrics]
        starts = range(0, len(losses) - MEANS + 1, MEANS)
        parts = [losses[start : start + MEANS] for start in starts]
        held_out = float(re.search(r"held-out loss ([0-9.]+)", result.out)[1])
        means = [round(statistics.mean(part), 4) for part in parts]
        saved.runs[flags] = {"held_out": held_out, "losses": means}
        saved.keep()
        print(f"{flags}: held-out loss {held_out:.4f}, {result.seconds:.0f} s", flush=True)
    return saved.runs[flags]


def best_rate(saved, optimizer):
    """The rate of the lowest held-out loss, and {rate: held-out loss} of all that were tried."""
    tried = {rate: train(saved, optimizer, rate, SEEDS[0])["held_out"] for rate in FIRST}
    while True:
        best = min(tried, key=tried.get)
        place = RATES.index(best)
        around = [rate for rate in RATES[max(0, place - 1) : place + 2] if rate not in tried]
        if not around:
            return best, dict(sorted(tried.items()))
        tried[around[0]] = train(saved, optimizer, around[0], SEEDS[0])["held_out"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, required=True)
    saved, rows = Saved(parser.parse_args().save), []
    for optimizer in ("adamw", "muon"):
        best, tried = best_rate(saved, optimizer)
        losses = [train(saved, optimizer, best, seed)["held_out"] for seed in SEEDS]
        rates = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items())
        mean = f"{statistics.mean(losses):.4f}"
        rows.append([optimizer, rates, f"{best:g}", ", ".join(f"{x:.4f}" for x in losses), mean])
    print(machine())
    seeds = ", ".join(map(str, SEEDS))
    print(table(["optimizer", "tried", "best", f"held-out loss, seeds {seeds}", "mean"], rows))


if __name__ == "__main__":
    main()
