"""How far rounding takes the gradients of a step, for each way to split its batch.

    python tests/rounding.py 16x2 8x4 4x8
    python tests/rounding.py 16x2 4x8 --after 40 --flags "--device cuda --seq_len 1024"

16x2 are two micro-batches of 16 sequences. After some steps of training in float32 the gradient of
the next one is computed in float64 and in float32, with the same weights, once for each split. The
table has, for each kind of tensor, the largest distance ‖float32 − float64‖ / ‖float64‖ of the
layers' tensors.
"""

import argparse
import re
import sys

from convergence import BASELINE, ROOT
from launch import machine, table
from tqdm import trange

sys.path.insert(0, str(ROOT / BASELINE))
import train
from dataloader import Batches
from errors import UserError, stop


def gradients(state, args):
    """{name: gradient, in float64} of the next step, its batch split as args say."""
    state.args, state.data = args, Batches(args, state.data.windows.tokens, state.device)
    state.optimizer.zero_grad()
    train.forward_backward(state)
    return {parameter.global_name: parameter.grad.double() for parameter in state.parameters}


def distances(found, exact):
    """{kind of tensor: largest relative distance among the layers' tensors}."""
    largest = {}
    for name, gradient in exact.items():
        kind = re.sub(r"layers\.\d+", "layers.*", name)
        distance = ((found[name] - gradient).norm() / gradient.norm()).item()
        largest[kind] = max(largest.get(kind, 0), distance)
    return largest


def measure(splits, after, flags):
    """[distances of each split] after so many steps of training with the first one."""

    def args_of(split, dtype):
        size, _, count = split.partition("x")
        sizes = ["--micro_batch_size", size, "--gradient_accumulation_steps", count]
        return train.parse_args([*flags, *sizes, "--dtype", dtype])

    args = [args_of(split, "float32") for split in splits]
    if len({one.tokens_per_step for one in args}) > 1:
        sys.exit(f"error: {' '.join(splits)}: not the same number of sequences; let them agree")
    state = train.setup(args[0])
    for _ in trange(after, disable=not sys.stderr.isatty()):
        train.train_step(state)
    train.pg.finish()  # the next one begins anew
    exact = train.setup(args_of(splits[-1], "float64"))
    exact.step = state.step
    for parameter, weight in zip(exact.parameters, state.parameters, strict=True):
        parameter.data.copy_(weight.data)
    reference = gradients(exact, exact.args)
    del exact
    return [distances(gradients(state, one), reference) for one in args]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("splits", nargs="+", metavar="SIZExCOUNT")
    parser.add_argument("--after", type=int, default=10, help="steps of training before")
    parser.add_argument("--flags", default="", help="of step 3, in quotes")
    options = parser.parse_args()
    try:
        found = measure(options.splits, options.after, options.flags.split())
    except UserError as error:
        stop(error)
    print(f"{machine()}, after {options.after} steps\n")
    rows = [[kind, *(f"{split[kind]:.1e}" for split in found)] for kind in found[0]]
    print(table(["gradient of", *options.splits], rows))


if __name__ == "__main__":
    main()
