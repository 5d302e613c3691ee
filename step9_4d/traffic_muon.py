"""The traffic of Muon's matrices to their owners and back, by formula."""

from muon import Muon
from owners import count


def muon_traffic(optimizer, engine):
    """What this rank sends in a step: rows of (axis, collective, calls, bytes).

    To an owner goes what it has not got: where an engine deals weights out, all that is here of its
    matrix; else only what its own tp group has. Back from it goes to every rank what that holds.
    """
    if not isinstance(optimizer, Muon):
        return []
    owners, number = optimizer.owners, optimizer.like.itemsize
    group, tp, rows = owners.group, owners.tp, []
    held = [{name: count(part) for name, part in parts.items()} for parts in owners.held]
    for bucket in owners.buckets:
        for rank in set(range(group.size)) - {group.rank}:
            from_here = engine.axes or rank // tp == group.rank // tp
            there = [held[group.rank].get(n, 0) for n, _ in bucket if owners.of[n] == rank]
            back = [held[rank].get(n, 0) for n, _ in bucket if owners.of[n] == group.rank]
            sizes = [sum(there) if from_here else 0, sum(back)]
            rows += [(group.axis, "send", 1, number * size) for size in sizes if size]
    return rows
