"""How far rounding takes the gradients of a step, for each layout and each split of its batch.

    python tests/rounding.py "step3_dataloader --micro_batch_size 8" \\
        "step4_tensor_parallel --tp_size 2 --micro_batch_size 8" --after 40 --flags "--seq_len 512"

The first RUN trains some steps in float32. Then, with its weights, the gradient of the next step is
computed by each RUN in float32, or in bfloat16 with --dtype, and by the first one in float64. The
table has the distance ‖rounded − float64‖ / ‖float64‖ of the loss and of the whole gradient, and
for each kind of tensor the largest among the layers'.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import workers_steps
from convergence import ROOT, check_runs
from harness import World, assemble
from launch import machine, ranks_of, sequences_of, table
from tqdm import tqdm


def call(run, flags, dtype, function, *args):
    """Full tensors {name: array} that a worker function gives for a RUN, called on its ranks."""
    step, _, layout = run.partition(" ")
    argv = f"{flags} {layout} --dtype {dtype}"
    if dtype == "float64":  # the compiler of torch 2.11 has none for the norms of a wide model
        argv = re.sub(r"--(recompute_elementwise|compile([ =][a-z]\w*)?)", "", argv)
    with World(ROOT / step, ranks_of(run)) as world:
        return assemble(world.run(function, argv, *args, timeout=1200))


def distances(found, exact):
    """Relative distances: {"loss", "whole gradient", kind of tensor: its largest among layers}."""
    names = [name for name in exact if name != "loss"]
    squares = sum(np.linalg.norm(found[name] - exact[name]) ** 2 for name in names)
    whole = np.sqrt(squares / sum(np.linalg.norm(exact[name]) ** 2 for name in names))
    largest = {"loss": 0, "whole gradient": whole}
    for name, gradient in exact.items():
        kind = re.sub(r"layers\.\d+", "layers.*", name)
        distance = np.linalg.norm(found[name] - gradient) / np.linalg.norm(gradient)
        largest[kind] = np.maximum(largest.get(kind, 0), distance)  # NaN, if there is one
    return largest


def measure(runs, after, flags, dtype):
    """[distances of each RUN in that dtype] after some steps of training with the first one."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        np.savez(weights, **call(runs[0], flags, "float32", workers_steps.weights_after, after))
        exact = call(runs[0], flags, "float64", workers_steps.gradients_at, weights, after)
        rows = []
        for run in tqdm(runs, unit="runs", disable=not sys.stderr.isatty()):
            found = call(run, flags, dtype, workers_steps.gradients_at, weights, after)
            if found.keys() != exact.keys() or abs(found["loss"] / exact["loss"] - 1) > 1e-3:
                sys.exit(f"error: {run}: another model or batch than the first RUN's; use --flags")
            rows.append(distances(found, exact))
        return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--after", type=int, default=10, help="steps of training before")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--flags", default="", help="further flags for every run, in quotes")
    options = parser.parse_args()
    if options.after < 0:
        sys.exit(f"error: --after {options.after}: choose 0 or more")
    check_runs(options.runs, sequences_of(f"{options.flags} {options.runs[0]}"), options.flags)
    try:
        found = measure(options.runs, options.after, options.flags, options.dtype)
    except AssertionError as error:  # of a rank, or of weights that are no numbers
        words = str(error).strip()
        line = words.partition("errors.UserError: ")[2].partition("\n")[0]  # and its traceback
        sys.exit(f"error: {line or words}")
    print(f"{options.dtype}, {machine()}, after {options.after} steps\n")
    for number, run in enumerate(options.runs, 1):
        print(f"{number}. {run}")
    rows = [[kind, *(f"{run[kind]:.1e}" for run in found)] for kind in found[0]]
    print("\n" + table(["", *range(1, len(found) + 1)], rows))


if __name__ == "__main__":
    main()
