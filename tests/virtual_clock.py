"""A pipeline's own code in a time in which only passes and messages take any.

All ranks run in one process, each a greenlet with a clock of its own. A pass moves its rank's clock
on. A message has come a while after both ranks have posted it, and who waits for it sets his clock
to that moment.
"""

import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1] / "assets"))


def run(engine, ranks, count, chunks, ratio, message, head):
    """The passes of each rank, a list of (kind, chunk, micro-batch, start, end).

    In the units of the widget: a rank goes forward through its layers in 1, the head comes on top.
    """
    import greenlet
    from numbers_pipelines import stand_in

    import process_group as pg

    now, links, rows = [0.0] * ranks, defaultdict(lambda: ([], [])), [[] for _ in range(ranks)]
    hub = greenlet.getcurrent()

    def went(rank, kind, chunk, micro_batch):
        is_last = rank == ranks - 1 and chunk == chunks - 1
        start, forward = now[rank], 1 / chunks + (head if is_last else 0)
        now[rank] += forward if kind == "F" else ratio * forward
        rows[rank].append((kind, chunk, micro_batch, start, now[rank]))

    def exchange(group, send=(), receive=()):
        me, handles = group.rank, []
        ways = [(0, (me, peer)) for _, peer in send] + [(1, (peer, me)) for _, peer in receive]
        for side, between in ways:
            posted = links[between]
            posted[side].append(now[me])
            there = partial(wait, me, posted, len(posted[side]) - 1)
            handles.append(SimpleNamespace(wait=there))
        return handles

    def wait(rank, posted, number):
        while min(map(len, posted)) <= number:
            hub.switch()
        now[rank] = max(now[rank], posted[0][number] + message, posted[1][number] + message)

    def one(rank):
        stage = stand_in(engine, chunks, ranks, count, rank, partial(went, rank))
        stage.run(range(count), 1, backward=True)

    with patch.object(pg, "exchange", exchange):
        waiting = [greenlet.greenlet(partial(one, rank)) for rank in range(ranks)]
        while waiting:
            for rank in waiting:
                rank.switch()
            waiting = [rank for rank in waiting if not rank.dead]
    return rows


def run_all(cases):
    """On a rank of step 8 or 9: `run` for each case."""
    return [run(*case) for case in cases]
