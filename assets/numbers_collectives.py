"""The collectives of step 2: what each hop sends, what comes out on real ranks, and how fast.

The results come from step 2's own `process_group.py`, called on eight gloo processes; the speed of
a link from its COSTS.md. The hops are those of a ring, as in the lesson, and of a tree.
"""

import re
import weakref

from recorded import ROOT, record

STEP = "step2_process_group"
RANKS = range(2, 9)


def collectives():
    """What `web/collectives.js` draws."""
    found = record(STEP, max(RANKS), results_on_ranks, tuple(RANKS))
    return {
        "inputs": {n: inputs(n) for n in RANKS},
        "hops": {
            kind: {way: {n: hops(n) for n in RANKS} for way, hops in ways.items()}
            for kind, ways in HOPS.items()
        },
        "results": {
            kind: {n: [of_rank[n][kind] for of_rank in found[:n]] for n in RANKS} for kind in HOPS
        },
        "sends": sends(),
        "links": links(),
    }


def inputs(n):
    """The numbers of each rank, [rank][part]; few ranks have those of the lesson's "By hand"."""
    if n <= 4:
        return [[(part + 1) * 10**rank for part in range(n)] for rank in range(n)]
    return [[10 * rank + part for part in range(n)] for rank in range(n)]


# --- what comes out -------------------------------------------------------------------------------


def results_on_ranks(sizes):
    """Every collective in groups of the first n ranks: {n: {kind: this rank's numbers}}.

    Runs on each rank of a world. Kinds that hold one part of a tensor on a rank have part r on
    rank r, before or after.
    """
    import torch
    import torch.distributed as dist

    import process_group as pg

    pg.init_processes("cpu")
    rank, found = dist.get_rank(), {}
    for n in sizes:
        handle = dist.new_group(range(n))
        if rank >= n:
            continue
        group = pg.Group("tp", tuple(range(n)), rank, weakref.ref(handle))
        mine = torch.tensor(inputs(n)[rank])
        arrived, dealt = torch.empty_like(mine), torch.empty_like(mine)
        for work in pg.exchange(group, [(mine, group.next)], [(arrived, group.previous)]):
            work.wait()
        dist.all_to_all_single(dealt, mine, group=handle)
        outcomes = {
            "all-reduce": pg.all_reduce(mine.clone(), group),
            "reduce-scatter": pg.reduce_scatter(mine, group),
            "all-gather": pg.all_gather(mine[rank : rank + 1].clone(), group),
            "broadcast": pg.broadcast(mine.clone(), group),
            "exchange": arrived,
            "all-to-all": dealt,
        }
        found[n] = {kind: outcome.tolist() for kind, outcome in outcomes.items()}
    return found


# --- hop by hop -----------------------------------------------------------------------------------
# A hop is a list of messages [from, to, parts, what], which travel at the same time. The receiver
# does with the parts what `what` says: "add" them to its own, or "put" them in their place; "swap"
# puts the part, which was for this rank, in the place of the one that the sender gets.


def ring(n, first, what):
    """n - 1 hops; at the first one rank r sends part first(r), then always what came last."""
    return [
        [[rank, (rank + 1) % n, [(first(rank) - hop) % n], what] for rank in range(n)]
        for hop in range(n - 1)
    ]


def up_the_tree(n, parts, what):
    """To rank 0; at each hop half of the ranks that still have something send it, and are done."""
    distances = [2**k for k in range((n - 1).bit_length())]
    return [
        [[rank, rank - d, parts(rank, min(rank + d, n)), what] for rank in range(d, n, 2 * d)]
        for d in distances
    ]


def down_the_tree(n, parts):
    """From rank 0: the way up, backward."""
    return [
        [[to, source, sent, "put"] for source, to, sent, _ in hop]
        for hop in reversed(up_the_tree(n, parts, "put"))
    ]


def in_a_chain(n):
    """Each rank hands on to the next; while it sends a part, the one after it arrives."""
    last = n - 1
    return [
        [
            [rank, rank + 1, [hop - rank], "put"]
            for rank in range(last)
            if 0 <= hop - rank < n
        ]
        for hop in range(n + last - 1)
    ]  # fmt: skip


def in_pairs(n):
    """Every rank meets every other one, as in a tournament, and both swap a part.

    Of an odd number of ranks one has nobody at each hop.
    """
    around, hops = n - 1 + n % 2, []
    for hop in range(around):
        partners = {rank: (hop - rank) % around for rank in range(around)}
        alone = next(rank for rank, partner in partners.items() if rank == partner)
        partners |= {alone: n - 1, n - 1: alone} if around < n else {}
        hops.append([[a, b, [b], "swap"] for a, b in sorted(partners.items()) if a != b])
    return hops


def all_of(n):
    return lambda start, stop: list(range(n))


def some(start, stop):
    return list(range(start, stop))


HOPS = {
    "all-reduce": {
        "ring": lambda n: ring(n, lambda r: r, "add") + ring(n, lambda r: r + 1, "put"),
        "tree": lambda n: up_the_tree(n, all_of(n), "add") + down_the_tree(n, all_of(n)),
    },
    "reduce-scatter": {
        "ring": lambda n: ring(n, lambda r: r - 1, "add"),
        "tree": lambda n: up_the_tree(n, all_of(n), "add") + down_the_tree(n, some),
    },
    "all-gather": {
        "ring": lambda n: ring(n, lambda r: r, "put"),
        "tree": lambda n: up_the_tree(n, some, "put") + down_the_tree(n, all_of(n)),
    },
    "broadcast": {"ring": in_a_chain, "tree": lambda n: down_the_tree(n, all_of(n))},
    "exchange": {"ring": lambda n: [[[r, (r + 1) % n, list(range(n)), "put"] for r in range(n)]]},
    "all-to-all": {"pairs": in_pairs},
}


# --- how fast -------------------------------------------------------------------------------------


def costs(step, pattern):
    """What a page of costs says."""
    found = re.search(pattern, (ROOT / step / "COSTS.md").read_text(), re.MULTILINE)
    assert found, f"{step}/COSTS.md says no longer what the widget reads: {pattern}"
    return found[1]


def sends():
    """What a rank sends of M bytes, in a ring: the formulas of the lesson, by kind."""
    table = {
        kind: costs(STEP, rf"^\| {kind} \| [^|]+\| `([^`]+)`")
        for kind in HOPS
        if kind != "all-to-all"
    }
    return table | {"all-to-all": table["all-gather"]}  # all parts but its own


def links():
    """Links that the lessons measure or name: latency in ms, bandwidths in GB/s."""
    two_hops = float(costs(STEP, r"^ +1 floats: +([\d.]+) ms"))  # of two ranks: there and back
    return {
        "latency": round(two_hops / 2, 3),
        "gloo": float(costs(STEP, r"^[\d,]{10,} floats: .* ([\d.]+) GB/s a rank\n```")),
        "host": float(costs("step9_4d", r"sends (\d+) GB/s inside its host")),
        "network": float(costs("step9_4d", r"network with (\d+) GB/s")),
    }
