"""Processes, meshes and collectives; ranks that differ or fail."""

import torch
from workers_setup import build


def mesh_of(sizes, device):
    """What each rank of a mesh knows of its place, axis by axis and for the combined groups."""
    import process_group as pg

    device = pg.init_processes(device)
    mesh = pg.Mesh(**sizes)
    groups = {}
    for axes in [("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), ("tp", "pp")]:
        group = mesh.group(*axes)
        assert mesh.group(*reversed(axes)) is group, "asked twice, made once"
        total = pg.all_reduce(torch.tensor([2.0**mesh.rank], device=device), group)
        members = [rank for rank in range(len(mesh.grid.flatten())) if int(total) >> rank & 1]
        assert members == sorted(group.ranks), "the group that communicates is the one named"
        groups[axes] = {
            "axis": group.axis,
            "ranks": group.ranks,
            "rank": group.rank,
            "next": group.next,
            "previous": group.previous,
            "first": group.is_first,
            "last": group.is_last,
        }
    return groups, str(mesh), mesh.world.is_first


def collectives(dtype, size, device):
    """Every collective on a group of some size, and on one rank alone: {name: array of this rank}.

    Row i of rank r's tensor is [2i, 2i + 1] + 10r; there are as many rows as ranks.
    """
    import ledger
    import process_group as pg

    device = pg.init_processes(device)
    mesh = pg.Mesh(tp=size)
    group, alone = mesh.group("tp"), mesh.group("dp")
    rank, dtype = group.rank, getattr(torch, dtype)

    def mine(rows=size):
        return torch.arange(rows * 2, dtype=dtype, device=device).view(rows, 2) + 10 * rank

    found = {}
    with ledger.recorded() as counted:
        x = mine()
        assert pg.all_reduce(x, group) is x
        found["all_reduce"] = x
        found["all_reduce max"] = pg.all_reduce(mine(), group, pg.ReduceOp.MAX)
        x = mine()
        pg.all_reduce(x, group, async_op=True).wait()
        found["all_reduce later"] = x
        found["all_gather"] = pg.all_gather(mine(), group)
        out, work = pg.all_gather(mine(), group, async_op=True)
        work.wait()
        found["all_gather later"] = out
        found["reduce_scatter"] = pg.reduce_scatter(mine(), group)
        out, work = pg.reduce_scatter(mine(), group, async_op=True)
        work.wait()
        found["reduce_scatter later"] = out
        found["broadcast"] = pg.broadcast(mine(), group, source=1)
        arrived = torch.empty_like(mine())
        for work in pg.exchange(group, [(mine(), group.next)], [(arrived, group.previous)]):
            work.wait()
        found["exchange"] = arrived
        for collective in (pg.all_reduce, pg.all_gather, pg.reduce_scatter, pg.broadcast):
            assert torch.equal(collective(mine(), alone), mine()), "nothing to do on a group of one"
        arrived = torch.empty_like(mine())
        assert pg.exchange(alone, [(mine(), alone.next)], [(arrived, alone.previous)]) == []
        assert torch.equal(arrived, mine())
        for collective in (pg.all_reduce, pg.all_gather, pg.reduce_scatter, pg.broadcast):
            try:
                collective(mine(4)[:, :1], group)
            except AssertionError as error:
                assert "slice" in str(error)
            else:
                raise AssertionError(f"{collective.__name__} took a slice")
    found["largest"] = pg.max_over_ranks([7 - rank, rank], group, device)
    found["from_first"] = torch.tensor(pg.from_first(group, lambda: 100 + rank))
    return {name: value.double().cpu().numpy() for name, value in found.items()}, dict(counted)


def error_on_the_first_rank():
    """The text of an error that only the first rank met, as every rank sees it."""
    import process_group as pg
    from errors import UserError

    pg.init_processes("cpu")

    def fail():
        raise UserError("only here")

    try:
        pg.from_first(pg.Mesh(tp=pg.dist.get_world_size()).world, fail)
    except UserError as error:
        return str(error)


def replicas(spoiled_rank):
    """Whether assert_replicas_equal speaks up when one weight of one rank moved by one bit."""
    import process_group as pg

    state = build("--num_hidden_layers 1 --seq_len 8")
    group = state.mesh.group("dp")
    if group.rank == spoiled_rank:
        with torch.no_grad():
            weight = state.parameters[-1].view(-1)
            weight[3] = torch.nextafter(weight[3], weight[3] + 1)
    try:
        pg.assert_replicas_equal(state.parameters, group)
    except AssertionError as error:
        return str(error)


def fail_on(bad_rank, how):
    """Fail on one rank while the others wait for it."""
    import os
    import time

    import process_group as pg

    pg.init_processes("cpu")
    if pg.dist.get_rank() == bad_rank:
        if how == "raise":
            raise ValueError("this rank has had enough")
        if how == "die":
            os.kill(os.getpid(), 9)
        time.sleep(60)
    pg.dist.barrier()
