"""What the checks of step 2's milestones run on each rank, with other numbers on each."""

import contextlib
import os
import weakref
from unittest.mock import patch

from same import same

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world():
    """The rank and the size, after joining."""
    import torch.distributed as dist

    import process_group as pg

    pg.init_processes("cpu")
    return dist.get_rank(), dist.get_world_size()


def mine(*shape, rank=None):
    """A float64 tensor of this rank, or of another one; no two of its numbers are alike."""
    import torch
    import torch.distributed as dist

    rank = dist.get_rank() if rank is None else rank
    size = torch.Size(shape).numel()
    return (torch.arange(size, dtype=torch.float64) + 100.0 * rank + 1).view(shape)


# --- 1. processes that find each other ------------------------------------------------------------


def join_and_leave():
    import torch
    import torch.distributed as dist

    import process_group as pg

    device = pg.init_processes("cpu")
    assert device == torch.device("cpu"), f"init_processes returns {device}; on the CPU it is cpu"
    assert dist.is_initialized(), "init_processes must call init_process_group"
    assert dist.get_backend() == "gloo", f"the CPU needs gloo, not {dist.get_backend()}"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert (dist.get_rank(), dist.get_world_size()) == (rank, size), "as torchrun has said"
    x = torch.tensor([2.0**rank])
    dist.all_reduce(x)
    same(x, torch.tensor([2.0**size - 1]), "a sum over all ranks", "of 1, 2, 4, …")
    with patch.object(dist, "barrier", wraps=dist.barrier) as barrier:
        pg.finish()
    assert barrier.called, "finish must wait in a barrier, so that no rank leaves before the others"
    assert not dist.is_initialized(), "finish must call destroy_process_group"


def join_alone():
    import torch.distributed as dist

    import process_group as pg

    with patch.dict(os.environ):
        for name in LAUNCH:
            os.environ.pop(name, None)
        pg.init_processes("cpu")
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1), "without torchrun: a world of one"


# --- 2. a mesh and its groups ---------------------------------------------------------------------


def groups_of(sizes, axes):
    """For each of some axes: ranks, rank, next, previous, first, last; the mesh as text."""
    import torch
    import torch.distributed as dist

    import process_group as pg

    rank, _ = world()
    mesh, found = pg.Mesh(**sizes), {}
    new_group = dist.new_group
    for names in axes:
        with patch.object(dist, "new_group", side_effect=new_group) as made:
            group = mesh.group(*names)
        assert mesh.group(*reversed(names)) is group, f"group{names} is made once, and kept"
        assert group.axis == "_".join(n for n in pg.AXES if n in names), f"axis {group.axis}"
        if group.size > 1:
            assert made.call_count == 1, f"{made.call_count} calls of new_group for group{names}"
            assert made.call_args.kwargs.get("use_local_synchronization"), (
                "new_group without use_local_synchronization=True must be called by all ranks for "
                "every group; here a rank calls it for its own group only, so it would hang"
            )
            assert isinstance(group.pointer, weakref.ref), "pointer: a weak reference to the group"
            total = torch.tensor([2.0**rank])
            dist.all_reduce(total, group=group.handle)
            members = sorted(r for r in range(32) if int(total) >> r & 1)
            assert members == sorted(group.ranks), f"group{names} talks among {members}"
        found[names] = (group.ranks, group.rank, group.next, group.previous, group.is_first,
                        group.is_last)  # fmt: skip
    return found, mesh.world.ranks, str(mesh)


# --- 3. the collectives ---------------------------------------------------------------------------


def end(work, what):
    """Wait for what a collective gave as its handle."""
    assert hasattr(work, "wait"), f"{what} gives {type(work).__name__}, no handle to wait() for"
    work.wait()


def collectives(sizes):
    import torch

    import process_group as pg
    from ledger import recorded

    world()
    mesh = pg.Mesh(**sizes)
    group, alone = mesh.group("dp"), mesh.group("cp")
    rank, size, last = group.rank, group.size, group.ranks[-1]
    every = [mine(size, 2, rank=r) for r in group.ranks]
    total = sum(every)
    with recorded() as counted:
        x = mine(size, 2)
        assert pg.all_reduce(x, group) is x, "all_reduce works in place, and returns its input"
        same(x, total, "all_reduce", "the sum over the ranks")
        x = mine(size, 2)
        end(pg.all_reduce(x, group, async_op=True), "all_reduce with async_op")
        same(x, total, "all_reduce with async_op, after wait()", "the sum over the ranks")
        same(pg.all_reduce(mine(2), group, pg.ReduceOp.MAX), mine(2, rank=last),
             "all_reduce with MAX", "the largest over the ranks")  # fmt: skip
        due = torch.cat(every)
        same(pg.all_gather(mine(size, 2), group), due, "all_gather", "all parts, in order of rank")
        out, work = pg.all_gather(mine(size, 2), group, async_op=True)
        end(work, "all_gather with async_op")
        same(out, due, "all_gather with async_op", "all parts, in order of rank")
        due, meaning = total[rank : rank + 1], "row r of the sum (no mean), on rank r"
        same(pg.reduce_scatter(mine(size, 2), group), due, "reduce_scatter", meaning)
        out, work = pg.reduce_scatter(mine(size, 2), group, async_op=True)
        end(work, "reduce_scatter with async_op")
        same(out, due, "reduce_scatter with async_op", meaning)
        found = pg.broadcast(mine(size, 2), group, source=1)
        same(found, every[1], "broadcast from source 1", "that of the group's rank 1")
        out = torch.empty(3, dtype=torch.float64)
        for work in pg.exchange(group, [(mine(3), group.next)], [(out, group.previous)]):
            work.wait()
        due = mine(3, rank=group.ranks[rank - 1])
        same(out, due, "exchange with the neighbours in a ring", "that of the previous rank")
    on_one_rank(alone)
    slices(group, mine(4, 2)[:, :1])
    return dict(counted)


def on_one_rank(alone):
    import torch

    import process_group as pg
    from ledger import recorded

    with recorded() as counted:
        for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
            found = getattr(pg, name)(mine(2, 2), alone)
            same(found, mine(2, 2), f"{name} on a group of one", "its input")
        work = pg.all_reduce(mine(2), alone, async_op=True)
        end(work, "all_reduce with async_op on a group of one")
        out = torch.zeros(2, dtype=torch.float64)
        assert pg.exchange(alone, [(mine(2), alone.next)], [(out, alone.previous)]) == []
        same(out, mine(2), "exchange on a group of one", "what this rank itself has sent")
    assert not counted, f"nothing is sent on a group of one, but {counted} is recorded"


def slices(group, x):
    import process_group as pg

    for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
        try:
            getattr(pg, name)(x, group)
        except AssertionError as error:
            assert "slice" in str(error), f"{name} of a slice says: {error}"
        else:
            raise AssertionError(f"{name} takes a slice; gloo would write over its neighbours")


# --- 4. one rank works for all --------------------------------------------------------------------


def first_works():
    import torch

    import process_group as pg
    from errors import UserError

    rank, size = world()
    group, calls = pg.Mesh(dp=size).world, []

    def make():
        calls.append(rank)
        return {"made by": rank}

    found = pg.from_first(group, make)
    assert found == {"made by": 0}, f"from_first returns {found} on rank {rank}"
    assert calls == ([0] if rank == 0 else []), (
        f"from_first calls make {len(calls)} times on rank {rank}; only rank 0 calls it, once"
    )

    def fail():
        raise UserError("no such file")

    try:
        pg.from_first(group, fail)
    except UserError as error:
        assert str(error) == "no such file"
    else:
        raise AssertionError(f"from_first: rank {rank} hears nothing of the first one's error")
    found = pg.max_over_ranks([rank, 7 - rank], group, torch.device("cpu"))
    due = torch.tensor([size - 1, 7], dtype=torch.float64)
    same(found, due, "max_over_ranks", "the largest of each number")


def replicas(spoiled):
    """What assert_replicas_equal says where one weight of a rank moved by one bit."""
    import torch

    import process_group as pg

    rank, size = world()
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(4))]
    for name, weight in zip(("first", "second"), weights, strict=True):
        weight.global_name = name
    if rank == spoiled:
        weights[1].data[2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    try:
        pg.assert_replicas_equal(weights, pg.Mesh(dp=size).group("dp"))
    except AssertionError as error:
        return str(error)


# --- 5. the table of the ledger -------------------------------------------------------------------


def ledger_of_a_step():
    """What the first rank prints of two all-reduces, beside a prediction; the others nothing."""
    import io

    import process_group as pg
    from ledger import communication_ledger

    _, size = world()
    mesh = pg.Mesh(dp=size)
    group, said = mesh.group("dp"), []
    for active in (True, False):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            predicted = [("dp", "all_reduce", 2, 48), ("dp", "all_gather", 1, 100)]
            with communication_ledger(mesh, active, predicted):
                for _ in range(2):
                    pg.all_reduce(mine(3, 2), group)
        said.append(out.getvalue())
    return said


# --- 7. what was started --------------------------------------------------------------------------


def told(function, *args, **environment):
    """The UserError of a call in some environment; None if there is none."""
    from errors import UserError

    with patch.dict(os.environ):
        for name in LAUNCH:
            os.environ.pop(name, None)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        os.environ.update(environment)
        try:
            return function(*args) and None
        except UserError as error:
            return str(error)


def started():
    import socket

    import started as ours

    whole = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}
    with patch.dict(os.environ, whole):
        assert ours.world_size() == 4, f"world_size() is {ours.world_size()}; WORLD_SIZE is 4"
    said = told(ours.world_size)
    assert said is None, f"without RANK it is a world of one, but world_size says: {said}"
    said = told(ours.world_size, **whole)
    assert said is None, f"rank 0 of 4 is as it should be, but world_size says: {said}"
    half = {name: value for name, value in whole.items() if name != "MASTER_PORT"}
    said = told(ours.world_size, **half)
    assert said and "MASTER_PORT" in said, f"MASTER_PORT is missing, but world_size says: {said}"
    said = told(ours.world_size, **{**whole, "RANK": "4"})
    assert said and "RANK 4" in said, f"there is no rank 4 of 4, but world_size says: {said}"
    said = told(ours.check_world, "cpu", 2, **whole)
    assert said and "= 2 ranks, but 4 started" in said, (
        f"4 ranks started for tp_size 2, but check_world says: {said}"
    )
    said = told(ours.check_world, "cpu", 2, 1, 2, **whole)
    assert said is None, f"4 ranks started for tp 2 x dp 2, but check_world says: {said}"
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        taken_port = {**whole, "MASTER_PORT": port}
        said = told(ours.check_port, **taken_port)
        under = told(ours.check_port, **taken_port, TORCHELASTIC_USE_AGENT_STORE="True")
    assert said and port in said, f"port {port} is in use, but check_port says: {said}"
    assert under is None, f"under torchrun the launcher has the port, but check_port says: {under}"


def raised(function, *args):
    """The type of what a call raises."""
    try:
        function(*args)
    except BaseException as error:
        return type(error)
    return type(None)


def lost_neighbours():
    """How `together` ends a main that lost a neighbour, on the first rank and on another one."""
    import started as ours
    from errors import UserError

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    def main(words):
        raise RuntimeError(words)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(ours.time, "sleep", lambda seconds: None))
        stack.enter_context(patch.object(ours.signal, "signal", lambda *_: None))
        stack.enter_context(patch.object(ours.os, "_exit", end))
        for rank, due in ((0, UserError), (1, Ended)):
            with patch.object(ours, "RANK", rank):
                how = raised(ours.together(main), "read: Connection reset by peer")
                assert how is due, (
                    f"a neighbour is lost, and together raises {how.__name__} on rank {rank}: the "
                    "first rank should raise UserError, another one end by os._exit"
                )
        how = raised(ours.together(main), "shapes do not fit")
        assert how is RuntimeError, (
            f"an error of this rank itself should go through, but together raises {how.__name__}"
        )
        assert ours.together(lambda args: args + 1)(1) == 2, "together returns what main returns"


def ledger_off():
    """A recorded call outside of a block goes nowhere."""
    import ledger

    ledger.record("dp", "all_reduce", 8)
    with ledger.recorded() as counted:
        ledger.record("dp", "all_reduce", 8)
        ledger.record("dp", "all_reduce", 16)
        ledger.record("tp", "send", 4)
    due = {("dp", "all_reduce"): [2, 24], ("tp", "send"): [1, 4]}
    assert counted == due, f"recorded() counts {counted}; it should count {due}"
    return ledger.ledger
