"""What the code of the steps does, written down by running it, for the figures to draw.

Each function runs on every rank of a world of processes on the CPU; `record` starts such a world.
Modules of a step are imported inside, because several steps have modules of the same name.
"""

import functools
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from harness import World  # noqa: E402


@functools.cache
def record(step, ranks, function, *args):
    """Call a function of this file on every rank of a step's world; the list of results."""
    with World(ROOT / step, ranks) as world:
        return world.run(function, *args)


def backward_round_the_ring():
    """One backward pass of step 5's ring attention, as this rank does it.

    Returns a list, a dict for each block that it computes with, in order: block, the place of the
    rank that owns the block; queries and keys, how many of them take part, of 4 each; block_to, who
    gets the block next, and gradients_to, who gets the share of its gradients, None for nobody.
    """
    import torch

    import context_parallel as cp
    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(cp=torch.distributed.get_world_size()).group("cp")
    kinds, steps, leaving = ["block"], [], {}

    class Ring(cp.Ring):
        def send_home(self, *args):
            kinds.append("gradients")
            try:
                return super().send_home(*args)
            finally:
                kinds.pop()

    def exchange(group, send, receive, original=pg.exchange):
        ((_, peer),) = send
        if kinds[-1] == "block":  # it is posted before the block is computed with
            leaving["block_to"] = peer
        else:
            steps[-1]["gradients_to"] = peer
        return original(group, send, receive)

    def backward_block(grad, q, k, *rest, original=cp.backward_block):
        sizes = {"queries": q.shape[2], "keys": k.shape[2]}
        places = {"block": round(k.mean().item()), "block_to": None, "gradients_to": None}
        steps.append(places | sizes | leaving)
        leaving.clear()
        return original(grad, q, k, *rest)

    q = torch.zeros(1, 1, 4, 8, requires_grad=True)
    kv = torch.full((2, 1, 4, 1, 8), float(group.rank), requires_grad=True)  # says whose it is
    out = cp.RingAttention.apply(q, kv, Ring(group, None))
    with (
        patch.object(pg, "exchange", exchange),
        patch.object(cp, "backward_block", backward_block),
    ):
        out.sum().backward()
    return steps


def ticks_of(ranks, chunks, count):
    """Step 9's plan of interleaved 1F1B: of each tick what each rank does, (kind, chunk, micro)."""
    from interleaved import plan

    return [
        [one and (one.kind, one.stage // ranks, one.micro_batch) for one in tick]
        for tick in plan(ranks, chunks, count)
    ]


def order_of_a_schedule(engine, ranks, count):
    """For each stage the passes of a schedule of step 8 in order: (forward or backward, micro)."""
    import types

    from pipeline_parallel import SCHEDULES

    orders = []
    for rank in range(ranks):
        order, alive = [], []

        def forward(x, micro_batch, order=order, alive=alive):
            order.append(("forward", micro_batch))
            alive.append(micro_batch)

        def backward(grad, order=order, alive=alive):
            order.append(("backward", alive.pop(0)))

        stage = types.SimpleNamespace(
            group=types.SimpleNamespace(rank=rank, size=ranks),
            micro_batches=count,
            alive=alive,
            before=None,
            after=None,
            forward=forward,
            backward=backward,
            talk=lambda peer, send=None, receive=False: None,
        )
        SCHEDULES[engine](stage, range(count))
        orders.append(order)
    return orders
