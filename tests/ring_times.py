"""What hides behind what in ring attention: one layer of step 5, on the GPUs of a host.

    torchrun --nproc_per_node 4 tests/ring_times.py
    torchrun --nproc_per_node 2 tests/ring_times.py --batch 8 --kv_heads 8

Times of the ring as it is; of its blocks alone, without a message; with messages that the GPUs'
copy engines carry in place of NCCL's kernels; and of one message alone. The slowest rank counts.
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


class CopyEngines:
    """`process_group.exchange`, of one message each way, by the engines that copy memory.

    A rank writes into memory of the other's GPU and then sets a signal there; both wait for
    nothing that occupies a multiprocessor. PyTorch's symmetric memory is not public yet (2.13).
    """

    slots = 8  # a message lies in the next one; no rank is ahead of another by as many

    def __init__(self, group, nbytes):
        from torch.distributed import _symmetric_memory as symmetric

        shape = self.slots, nbytes
        self.mine = symmetric.empty(shape, dtype=torch.uint8, device="cuda")
        self.handle = symmetric.rendezvous(self.mine, group.handle)
        ranks = range(group.size)
        self.of = [self.handle.get_buffer(rank, shape, torch.uint8) for rank in ranks]
        self.group, self.count = group, 0
        self.sending, self.receiving = torch.cuda.Stream(), torch.cuda.Stream()

    def exchange(self, group, send, receive):
        ((x, to),), ((out, by),) = send, receive
        to, by = group.ranks.index(to), group.ranks.index(by)
        slot, self.count = self.count % self.slots, self.count + 1
        for stream in (self.sending, self.receiving):
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.sending):
            self.of[to][slot, : x.nbytes].copy_(x.flatten().view(torch.uint8))
            self.handle.put_signal(to, channel=slot)
            sent = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(self.receiving):
            self.handle.wait_signal(by, channel=slot)
            out.view(-1).view(torch.uint8).copy_(self.mine[slot, : out.nbytes])
            received = torch.cuda.current_stream().record_event()
        return [sent, received]  # an event has a `wait`, like a handle


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
    if pg.world_size() == 1:
        sys.exit("error: one rank is no ring; start this with torchrun --nproc_per_node 2 or more")
    mesh = pg.Mesh(cp=pg.world_size())
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

    exchange, block = pg.exchange, kv.detach()
    ways = {"as it is": exchange, "blocks alone": lambda *_: []}
    if cuda:
        ways["copy engines"] = CopyEngines(group, block.nbytes).exchange
    rows, exact = [], None
    for name, pg.exchange in ways.items():
        found = [x.float() for x in both()]
        exact = exact or found
        off = max((x - y).norm() / y.norm() for x, y in zip(found, exact, strict=True))
        times = (milliseconds(f, group, device, options.calls) for f in (forward, both))
        came = name != "blocks alone"  # or there are no numbers to compare
        rows.append([name, *(f"{ms:.2f}" for ms in times), f"{off:.0e}" if came else "-"])
    pg.exchange, arriving = exchange, torch.empty_like(block)

    def message():
        send, receive = [(block, group.next)], [(arriving, group.previous)]
        for handle in pg.exchange(group, send, receive):
            handle.wait()

    ms = milliseconds(message, group, device, options.calls)
    if mesh.world.is_first:
        print(f"{machine()}\n\n{table(['', 'forward ms', 'with backward ms', 'differs by'], rows)}")
        print(f"\none message: {block.nbytes / 1e6:,.0f} MB, {ms:.2f} ms")
    pg.finish()


if __name__ == "__main__":
    main()
