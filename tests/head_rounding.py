"""How exact the head's gradient for its input is in float32, by how many rows its product has.

    python tests/head_rounding.py --after 28 --device cuda --micro_batch_size 4 ...

Trains step 3 with these flags, in float32. Then, for the sequences of the next step, at most 16,
the gradient of the last hidden states, (p - y) W, a sum over the vocabulary, is computed as
autograd does for micro-batches of 1, 2, 4, … of them: with the whole head, and as the sum over its
halves, which tp 2 makes. The table has the distance ‖float32 − float64‖ / ‖float64‖ from the same
p - y and W; of the whole head's error the share of the norm that all tokens have in common; and on
CUDA the kernel that PyTorch's library chose for the whole head.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from kernel_times import profiled
from launch import machine, table

sys.path.insert(0, str(Path(__file__).parents[1] / "step3_dataloader"))
import train
from errors import UserError

MOST = 16  # sequences


def head_and_gradient(state):
    """h [batch, seq, hidden], W [vocab, hidden] and p - y [batch, seq, vocab] of the next step."""
    *pairs, positions = zip(*state.data.micro_batches(state.step), strict=True)
    tokens, targets = (torch.cat(parts)[:MOST] for parts in pairs)
    weight = state.model.lm_head.weight.detach()
    with torch.no_grad():
        hidden = torch.cat([state.model.model(row, positions[0]) for row in tokens.split(1)])
        gradient = torch.softmax(F.linear(hidden, weight).double(), -1)
        gradient -= F.one_hot(targets, len(weight))
    return hidden, weight, gradient.float()


def of_hidden(hidden, weight, gradient, size):
    """The gradient of h, of so many sequences at a time, and the names of its kernels on CUDA."""
    found, kernels = [], set()
    for h, part in zip(hidden.split(size), gradient.split(size), strict=True):
        h = h.clone().requires_grad_()
        out, part = F.linear(h, weight), part.contiguous()
        if h.is_cuda:
            names = {kernel["name"] for kernel in profiled(functools.partial(out.backward, part))}
            kernels |= {name[:70] for name in names if "gemm" in name}
        else:
            out.backward(part)
        found.append(h.grad)
    return torch.cat(found), kernels


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--after", type=int, default=10, help="steps of training before")
    options, flags = parser.parse_known_args()
    if options.after < 0:
        sys.exit(f"error: --after {options.after}: choose 0 or more")
    try:
        state = train.setup(train.parse_args([*flags, "--dtype", "float32"]))
    except UserError as error:
        sys.exit(f"error: {error}")
    for _ in range(options.after):
        train.train_step(state)
    hidden, weight, gradient = head_and_gradient(state)
    exact = torch.cat([row.double() @ weight.double() for row in gradient.split(1)])
    middle = len(weight) // 2
    halves = [slice(0, middle), slice(middle, None)]
    rows, size = [], 1
    while size <= len(hidden):
        whole, kernels = of_hidden(hidden, weight, gradient, size)
        split = sum(of_hidden(hidden, weight[h], gradient[..., h], size)[0] for h in halves)
        errors = [x.double() - exact for x in (whole, split)]
        cells = [f"{(error.norm() / exact.norm()).item():.2e}" for error in errors]
        alike = errors[0].mean((0, 1)).expand_as(exact).norm() / errors[0].norm()
        cells.append(f"{alike.item():.2f}")
        rows.append([size * hidden.shape[1], *cells, ", ".join(sorted(kernels))])
        size *= 2
    print(f"{machine()}, after {options.after} steps\n{' '.join(flags)}\n")
    print(table(["rows", "whole head", "sum of its halves", "in common", "kernel"], rows))


if __name__ == "__main__":
    main()
