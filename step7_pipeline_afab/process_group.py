"""Many processes: a mesh of ranks, its groups, and the collectives that run on them.

A mesh is an array of ranks with one dim per kind of parallelism, `pp × dp × cp × tp`. Ranks that
differ along a single axis form a group. Ranks talk only in groups, by collectives.
tp varies fastest, so the group that talks most sits on the closest devices.
Source: Megatron-LM (arXiv:2104.04473), section 3.
"""

import itertools
import math
import os
import weakref
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from ledger import record
from profiling import span
from started import check_port

AXES = ("pp", "dp", "cp", "tp")  # slowest first
# torch 2.13 renamed both functions; the old names, second in each line, now give a warning.
gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
scatter_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def init_processes(device_type):
    """Join the world that `torchrun` describes; plain `python` is a world of one.

    Returns this rank's device: a GPU of its own on CUDA (NCCL), the CPU otherwise (gloo).
    """
    # A long timeout: the others may wait while one rank works for all. A rank that dies needs no
    # short one: the launcher then ends the job.
    options = {"backend": "gloo", "timeout": timedelta(hours=1)}
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        options.update(backend="nccl", device_id=device)
    if "RANK" in os.environ:
        check_port()
    else:
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(**options)
    return device


def finish():
    """Leave the world together: a rank that goes first would break its neighbours' connections."""
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Group:
    """The ranks of one line through the mesh, and this rank's place among them."""

    axis: str  # "tp", or "dp_cp" for axes taken together
    ranks: tuple  # global ranks in order
    rank: int  # place of this rank in `ranks`
    # A weak reference to the torch.distributed group; None for a group of one. If our code still
    # held a gloo group when Python ends, the group's threads would abort the process. So torch
    # alone holds the group, and `finish` frees it.
    pointer: weakref.ref

    @property
    def handle(self):
        return self.pointer() if self.pointer else None

    @property
    def size(self):
        return len(self.ranks)

    @property
    def is_first(self):
        return self.rank == 0

    @property
    def is_last(self):
        return self.rank == self.size - 1

    @property
    def next(self):
        """Global rank of the neighbour after this one; a ring, so the last one's is the first."""
        return self.ranks[(self.rank + 1) % self.size]

    @property
    def previous(self):
        """Global rank of the neighbour before this one; the first one's is the last."""
        return self.ranks[self.rank - 1]


class Mesh:
    """All ranks as an array [pp, dp, cp, tp], cut into groups along any axis or set of axes."""

    def __init__(self, tp=1, cp=1, dp=1, pp=1):
        self.rank = dist.get_rank()
        self.grid = torch.arange(dist.get_world_size()).view(pp, dp, cp, tp)
        self.sizes = dict(zip(AXES, self.grid.shape, strict=True))
        self.groups = {}

    @property
    def world(self):
        """All ranks; the first of them speaks for all."""
        pointer = weakref.ref(dist.group.WORLD)
        return Group("world", tuple(range(self.grid.numel())), self.rank, pointer)

    def group(self, *axes):
        """The ranks that differ from this one along `axes` only, made when first asked for.

        `group("tp")` is one line. `group("dp", "cp")` holds the ranks that divide the data, and
        `group("pp", "tp")` those that divide the model. Every rank must ask for the same axes in
        the same order, or ranks wait for each other for ever.
        """
        axes = tuple(axis for axis in AXES if axis in axes)
        if axes not in self.groups:
            last = list(range(-len(axes), 0))
            lines = self.grid.movedim([AXES.index(axis) for axis in axes], last)
            lines = lines.reshape(-1, math.prod(self.sizes[axis] for axis in axes)).tolist()
            ranks = next(line for line in lines if self.rank in line)
            # By default all ranks must make all groups, and wait for the whole world each time.
            # This way a rank makes the groups that it is in, and waits for their ranks only.
            pointer, name = None, "_".join(axes)
            if len(ranks) > 1:
                options = {"use_local_synchronization": True, "group_desc": name}
                pointer = weakref.ref(dist.new_group(ranks, **options))
            self.groups[axes] = Group(name, tuple(ranks), ranks.index(self.rank), pointer)
        return self.groups[axes]

    def __str__(self):
        """The mesh as text: a line for each (pp, dp, cp), a column for each tp rank."""
        shape = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        lines = [f"{self.grid.numel()} ranks = {shape}, {dist.get_backend()}"]
        for (pp, dp, cp), row in zip(
            itertools.product(*map(range, self.grid.shape[:3])),
            self.grid.flatten(0, 2).tolist(),
            strict=True,
        ):
            cells = " ".join(f"{rank:3d}" for rank in row)
            lines.append(f"  pp {pp} dp {dp} cp {cp} | {cells}")
        return "\n".join(lines)


class Done:
    """The handle of a collective on a group of one: nothing to do, nothing to count."""

    def wait(self):
        pass


def assert_contiguous(collective, x):
    """Refuse a slice: gloo writes as if memory were dense, over the neighbouring elements."""
    assert x.is_contiguous(), f"{collective} of a slice: shape {x.shape}, strides {x.stride()}"


def all_reduce(x, group, op=ReduceOp.SUM, async_op=False):
    """Replace x, in place on every rank, by the sum over the group.

    Returns x, or with async_op a handle to `wait()` for.
    """
    assert_contiguous("all_reduce", x)
    if group.size == 1:
        return Done() if async_op else x
    with record(group.axis, "all_reduce", x.nbytes):
        work = dist.all_reduce(x, op=op, group=group.handle, async_op=async_op)
    return work if async_op else x


def all_gather(x, group, out=None, async_op=False):
    """Join the x of all ranks along dim 0: [rows, ...] -> [size * rows, ...].

    Returns the result, or with async_op (result, handle). With `out`, the result is written there;
    x may be a slice of it.
    """
    assert_contiguous("all_gather", x)
    work = Done()
    if out is None:
        out = x if group.size == 1 else x.new_empty(group.size * x.shape[0], *x.shape[1:])
    if group.size > 1:
        with record(group.axis, "all_gather", out.nbytes):
            work = gather_into(out, x, group=group.handle, async_op=async_op)
    return (out, work) if async_op else out


def reduce_scatter(x, group, async_op=False):
    """Sum x over the group, keep this rank's part of dim 0: [size * rows, ...] -> [rows, ...].

    Returns the result, or with async_op (result, handle).
    """
    assert_contiguous("reduce_scatter", x)
    out, work = x, Done()
    if group.size > 1:
        assert x.shape[0] % group.size == 0, f"{x.shape[0]} rows for {group.size} ranks"
        out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
        with record(group.axis, "reduce_scatter", x.nbytes):
            work = scatter_into(out, x, group=group.handle, async_op=async_op)
    return (out, work) if async_op else out


def broadcast(x, group, source=0):
    """Overwrite x, on every rank, with the x of the rank at place `source` of the group."""
    assert_contiguous("broadcast", x)
    if group.size > 1:
        with record(group.axis, "broadcast", x.nbytes):
            dist.broadcast(x, group=group.handle, src=group.ranks[source])
    return x


def exchange(group, send=(), receive=()):
    """Post sends and receives together, so that it does not matter which of them comes first.

    send, receive: lists of (tensor, global rank of the peer). Returns the handles to `wait()` for;
    between two ranks messages arrive in the order in which they were sent.
    """
    if group.size == 1:
        for (x, _), (out, _) in zip(send, receive, strict=True):
            out.copy_(x)
        return []
    operations = []
    for collective, posted in ((dist.isend, send), (dist.irecv, receive)):
        for x, peer in posted:
            assert_contiguous(collective.__name__, x)
            operations.append(dist.P2POp(collective, x, peer, group.handle))
    for x, _ in send:
        record(group.axis, "send", x.nbytes)
    with span(f"exchange {group.axis}"):
        return dist.batch_isend_irecv(operations) if operations else []


def from_first(group, make):
    """Call `make` on the group's first rank only; every rank returns its result (an object).

    An exception there is raised on every rank, so that none is left waiting.
    """
    result = [None, None]
    if group.is_first:
        try:
            result[0] = make()
        except Exception as error:
            result[1] = error
    if group.size > 1:
        dist.broadcast_object_list(result, src=group.ranks[0], group=group.handle)
    if result[1] is not None:
        raise result[1]
    return result[0]


def max_over_ranks(numbers, world, device):
    """For each number in a list its largest over all ranks, float64 [count] on the device."""
    numbers = torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)
    return all_reduce(numbers, world, ReduceOp.MAX)
