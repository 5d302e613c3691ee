"""What hides behind what in ring attention: one layer of step 5, on the GPUs of a host.

    torchrun --nproc_per_node 4 tests/ring_times.py
    torchrun --nproc_per_node 2 tests/ring_times.py --batch 8 --kv_heads 8

Times of the ring as it is, of its blocks alone, without a message, and of one message alone. The
slowest rank counts.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from launch import machine, table

sys.path.insert(0, str(Path(__file__).parents[1] / "step5_context_parallel"))
import context_parallel
import process_group as pg


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(function, group, device, calls):
    """The mean time of a call, on the slowest rank."""
    for count in (3, calls):
        pg.all_reduce(torch.zeros(1, device=device), group)  # so that all begin together
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(count):
            function()
        synchronize(device)
        seconds = time.perf_counter() - begun
    return 1e3 * pg.max_over_ranks([seconds / calls], group, device).item()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("batch", 16), ("seq_len", 8192), ("heads", 32), ("kv_heads", 32), ("head_dim", 64),
        ("calls", 20),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    device = pg.init_processes("cuda" if torch.cuda.is_available() else "cpu")
    if pg.dist.get_world_size() == 1:
        sys.exit("error: one rank is no ring; start this with torchrun --nproc_per_node 2 or more")
    mesh = pg.Mesh(cp=pg.dist.get_world_size())
    group, cuda = mesh.group("cp"), device.type == "cuda"
    tokens = options.seq_len // group.size
    torch.manual_seed(group.rank)
    like = {"device": device, "dtype": torch.bfloat16}
    q, grad = torch.randn(2, options.batch, options.heads, tokens, options.head_dim, **like)
    kv = torch.randn(2, options.batch, tokens, options.kv_heads, options.head_dim, **like)
    inputs = [x.requires_grad_() for x in (q, kv)]
    ring = context_parallel.Ring(group, "inductor" if cuda else None)

    def forward():
        with torch.no_grad():
            context_parallel.RingAttention.apply(*inputs, ring)

    def both():
        out = context_parallel.RingAttention.apply(*inputs, ring)
        return torch.autograd.grad(out, inputs, grad)

    def times(name):
        found = (milliseconds(f, group, device, options.calls) for f in (forward, both))
        return [name, *(f"{ms:.2f}" for ms in found)]

    rows, exchange = [times("as it is")], pg.exchange
    pg.exchange = lambda *_: []  # what should have come is whatever lies there
    rows.append(times("blocks alone"))
    pg.exchange, block = exchange, kv.detach()
    arriving = torch.empty_like(block)

    def message():
        send, receive = [(block, group.next)], [(arriving, group.previous)]
        for handle in pg.exchange(group, send, receive):
            handle.wait()

    ms = milliseconds(message, group, device, options.calls)
    if mesh.world.is_first:
        print(f"{machine()}\n\n{table(['', 'forward ms', 'with backward ms'], rows)}")
        print(f"\none message: {block.nbytes / 1e6:,.0f} MB, {ms:.2f} ms")
    pg.finish()


if __name__ == "__main__":
    main()
