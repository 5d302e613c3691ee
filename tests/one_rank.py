"""Be one rank of a layout without the others: its memory, and its own work, on a single device.

Shapes and memory are those of a real run, and so are the kernels that compute. Messages are not:
what others would send is a copy of what is sent to them, or noise, and what they would add to a sum
a constant. Nor is there what NCCL needs, memory and time of its own.
"""

import contextlib
import os
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  makes "fake"; nothing public does

# What other ranks add to each element of a matrix. Without it a token whose embedding is on another
# rank would be zeros in all layers, and its gradient would overflow.
FROM_OTHERS = 0.01


@contextlib.contextmanager
def one_rank(rank, size):
    """Within, this process is one of `size` ranks of the step whose `process_group` is imported."""
    import process_group as pg

    join = dist.init_process_group

    def init_process_group(**options):
        join("fake", store=dist.HashStore(), rank=rank, world_size=size)

    def all_reduce(x, op=None, group=None, async_op=False):
        if x.dim() > 1:  # and not a loss, or a wish to stop
            x += FROM_OTHERS
        return pg.Done()

    def all_gather(out, x, group=None, async_op=False):
        for part in out.view(-1, *x.shape):  # as if all had the same
            if part.data_ptr() != x.data_ptr():  # x may be a part of out
                part.copy_(x)
        return pg.Done()

    def reduce_scatter(out, x, group=None, async_op=False):
        torch.add(x[: len(out)], FROM_OTHERS, out=out)
        return pg.Done()

    def exchange(group, send=(), receive=()):
        sent = {x.shape: x for x, _ in send}
        for out, _ in receive:
            if out.shape in sent:
                out.copy_(sent[out.shape])
            else:
                out.normal_()
        return []

    environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}  # asked for, and not used
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {k: str(v) for k, v in environment.items()}))
        stack.enter_context(patch.object(dist, "init_process_group", init_process_group))
        stack.enter_context(patch.object(dist, "all_reduce", all_reduce))
        for name, instead in {
            "gather_into": all_gather,
            "scatter_into": reduce_scatter,
            "exchange": exchange,
            "from_first": lambda group, make: make(),
        }.items():
            stack.enter_context(patch.object(pg, name, instead))
        yield
        dist.destroy_process_group()
