"""Measure the attention work of each rank, in contiguous chunks and in a zigzag, and draw it.

    python assets/ring_work.py [--ranks 4] [--seq_len 8192] [--output assets/ring_work.png]

One process plays the ranks one after the other, with one thread, and times the blocks of attention
that each of them computes in one layer, forward and backward. Prints a table.
"""

import argparse
import sys
import time
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "step5_context_parallel"), str(ROOT / "tests")]
from launch import machine, table  # noqa: E402
from numbers_ring import contiguous  # noqa: E402

from attention_blocks import backward_block, forward_block  # noqa: E402
from context_parallel import attending  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16


def blocks_of(rank, ranks, length, zigzag):
    """(rows, columns, causal) of the blocks that a rank computes on its way round the ring."""
    sources = [(rank - step) % ranks for step in range(ranks)]
    blocks = [
        attending(rank, source, length // 2) if zigzag else contiguous(rank, source)
        for source in sources
    ]
    return [block for block in blocks if block]


def seconds(blocks, q, k, v):
    """Time that the CPU spent on these blocks, forward and backward."""
    begun = time.thread_time()  # does not run while others have the core
    for rows, columns, causal in blocks:
        block = q[:, :, rows], k[:, :, columns], v[:, :, columns]
        out, log_sum = forward_block(*block, causal)
        backward_block(out, *block, out, log_sum, causal)
    return time.thread_time() - begun


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7, help="the fastest of so many counts")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("ring_work.png"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ranks, length = options.ranks, options.seq_len // options.ranks
    q = torch.randn(1, HEADS, length, HEAD_DIM)
    k, v = torch.randn(2, 1, KV_HEADS, length, HEAD_DIM)
    layouts = {"contiguous": False, "zigzag": True}
    work = {
        (name, rank): blocks_of(rank, ranks, length, zigzag)
        for name, zigzag in layouts.items()
        for rank in range(ranks)
    }
    taken = dict.fromkeys(work, float("inf"))
    for _ in range(options.rounds):  # in turn, so that a busy moment strikes all alike
        for key, blocks in work.items():
            taken[key] = min(taken[key], seconds(blocks, q, k, v))

    rows = []
    for name in layouts:
        times = [taken[name, rank] for rank in range(ranks)]
        slowest = max(times)
        rows.append([name, *(f"{x:.3f}" for x in times), f"{sum(times):.3f}", f"{slowest:.3f}"])
    headers = ["CPU seconds", *(f"rank {rank}" for rank in range(ranks)), "all", "slowest"]
    print(f"{machine()}, one thread\n\n{table(headers, rows)}")

    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    for index, (name, colour) in enumerate(zip(layouts, ["#ee6677", "#4477aa"], strict=True)):
        places = [rank + 0.4 * index - 0.2 for rank in range(ranks)]
        times = [taken[name, rank] for rank in range(ranks)]
        bars = axes.bar(places, times, 0.38, color=colour, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7.5)
    axes.set_xticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_ylabel("CPU seconds in attention blocks")
    axes.legend(loc="upper left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"One layer, forward and backward: {options.seq_len:,} tokens, {HEADS} heads, "
        f"{KV_HEADS} kv heads of {HEAD_DIM}\nfastest of {options.rounds}, one thread; {machine()}",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(options.output, dpi=130)


if __name__ == "__main__":
    main()
