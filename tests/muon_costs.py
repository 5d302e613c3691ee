"""What Muon costs where each matrix has one owner, beside the naive way, and beside AdamW.

    torchrun --nproc_per_node 2 tests/muon_costs.py --tp_size 2
    torchrun --nproc_per_node 2 tests/muon_costs.py --dp_size 2 --dp_engine zero1 --device cuda \\
        --model_name smollm-360m --micro_batch_size 2

All flags are those of step 9's train.py. In the naive way every rank gets all parts of all matrices
and makes all of them orthogonal. The table has the time of an update on the slowest rank, the least
of 30, because other programs only make it longer; how many matrices the busiest rank makes
orthogonal; and what all ranks send.
"""

import sys
import time
from pathlib import Path

import torch
from launch import machine, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step9_4d"))
import ledger
import muon
import owners
import process_group as pg
import train

UPDATES = 30


class Everywhere(owners.Owners):
    """The naive way: each rank owns everything."""

    def plan(self, bucket):
        ranks, there, back = range(self.group.size), [], []
        for name, shape in bucket:
            for rank in ranks:
                there += self.to_owner(name, shape, rank)
                if name in self.held[rank]:
                    back.append(owners.Route(name, self.held[rank][name], rank, rank))
        return there, back


def update(state):
    """(seconds of an update of all weights on the slowest rank, bytes that this rank sends)."""
    pg.all_reduce(torch.zeros(1, device=state.device), state.mesh.world)  # all begin together
    synchronize(state.device)
    begun = time.perf_counter()
    with ledger.recorded() as counted:
        state.optimizer.step()
    synchronize(state.device)
    seconds = time.perf_counter() - begun
    sent = sum(size for (_, kind), (_, size) in counted.items() if kind == "send")
    return pg.max_over_ranks([seconds], state.mesh.world, state.device).item(), sent


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def row(argv, name, *flags):
    """A line of the table, and the first layer's weights after the updates."""
    state = train.setup(train.parse_args([*argv, *flags]))
    state.engine.zero_grad()
    train.forward_backward(state)
    times = []
    for _ in range(UPDATES + 2):  # the first two warm up
        seconds, sent = update(state)
        times.append(seconds)
    made = 0
    if isinstance(state.optimizer, muon.Muon):
        held = state.optimizer.owners
        made = max(list(held.of.values()).count(rank) for rank in range(held.group.size))
        made = len(held.of) if isinstance(held, Everywhere) else made
    sent = sum(pg.from_all(state.mesh.world, lambda: sent))
    own = [parameter.detach().clone() for parameter in state.parameters]
    state.engine.finish_update()
    milliseconds = f"{1e3 * min(times[2:]):.1f}"
    return [name, milliseconds, made or "", f"{sent / 1e6:.1f}"], own


def main():
    argv = ["--dataset_name", "random", *sys.argv[1:]]
    rows, weights = [], []
    device = pg.init_processes(train.parse_args(argv).device)
    pg.init_processes = lambda _: device  # once for all three
    for name, flags, kind in (
        ("AdamW", (), owners.Owners),
        ("Muon, every rank owns everything", ("--optimizer", "muon"), Everywhere),
        ("Muon, one owner", ("--optimizer", "muon"), owners.Owners),
    ):
        muon.Owners = kind
        found, own = row(argv, name, *flags)
        rows.append(found)
        weights.append(own)
    largest = max((a - b).abs().max().item() for a, b in zip(*weights[1:], strict=True))
    if pg.dist.get_rank() == 0:
        print(f"{machine()}, {pg.dist.get_world_size()} ranks, {' '.join(sys.argv[1:])}")
        print(table(["optimizer", "update, ms", "matrices", "sent, MB"], rows))
        print(f"the weights of both ways of Muon differ by at most {largest:.1e}")
    pg.finish()


if __name__ == "__main__":
    main()
