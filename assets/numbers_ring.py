"""The numbers of the widget `ring`: step 5's ring on 2 to 8 ranks, and who attends to what.

Nothing is trained: the code of step 5 says who sends what to whom, and which chunks take part.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.append(str(Path(__file__).parent))
from recorded import record  # noqa: E402

RANKS = range(2, 9)
SEQUENCES, TOKENS = 4, 32  # of each on a rank: as in the lesson's run, which has 4 ranks


def rings():
    """What the widget draws: see `ring_of`, for each dealing and number of ranks."""
    (found,) = record("step5_context_parallel", 1, rings_by_step_5)
    return found


def contiguous(rank, source):
    """`attending` for ranks that hold one chunk of neighbouring tokens; None: nothing to do."""
    return (slice(None), slice(None), source == rank) if source <= rank else None


def rings_by_step_5():
    """Runs with the modules of step 5. A chunk counts as one token, so a rank has two of them."""
    from context_parallel import Ring, attending, zigzag_positions

    def zigzag(rank, source):
        return attending(rank, source, 1)

    found = {"block_bytes": traffic(2, 0)[0][-1], "zigzag": {}, "contiguous": {}}
    for count in RANKS:
        groups = [group_of(count, rank) for rank in range(count)]
        found["zigzag"][count] = [
            {"chunks": zigzag_positions(2 * count, group).tolist()}
            | ring_of(Ring(group, None), zigzag)
            for group in groups
        ]
        found["contiguous"][count] = [
            {"chunks": [2 * group.rank, 2 * group.rank + 1]}
            | ring_of(Ring(group, None), contiguous)
            for group in groups
        ]
    return found


def group_of(count, rank):
    """A ring without processes: enough to ask who comes next."""
    import process_group as pg

    return pg.Group("cp", tuple(range(count)), rank, None)


def traffic(count, rank):
    """What a rank sends in one layer by step 5's formula: rows of (axis, kind, calls, bytes)."""
    from presets import preset
    from traffic_context import context_parallel_traffic

    args = SimpleNamespace(
        config=preset("debug"), dtype="float32", cp_size=count, tp_size=1, seq_len=TOKENS * count,
        micro_batch_size=SEQUENCES, gradient_accumulation_steps=1, activation_checkpointing=False,
    )  # fmt: skip
    model = SimpleNamespace(model=SimpleNamespace(layers=[None]), parameters=list)
    return context_parallel_traffic(args, model, group_of(count, rank))


def ring_of(ring, rule):
    """The steps of a rank, forward and backward, a dict for each block that it has.

    block: the place of its owner. queries, keys, causal: which of the rank's two chunks attend to
    which of the block's, and under a mask or not; without any where the block is skipped. block_to:
    who gets the block while it is used; gradients_to: who gets the share of its gradients
    afterwards; None for nobody.
    """
    import torch

    import process_group as pg
    from context_parallel import travel

    group, posted = ring.group, []

    def exchange(group, send, receive):
        posted.extend(peer for _, peer in send)
        return []

    def taken():
        return posted.pop() if posted else None

    def step(source, block_to):
        rows, columns, causal = rule(group.rank, source) or (slice(0), slice(0), False)
        queries, keys = [0, 1][rows], [0, 1][columns]
        does = {"block": source, "queries": queries, "keys": keys, "causal": causal}
        return {**does, "block_to": block_to, "gradients_to": None}

    def round_the_ring(sources, to, by):
        block = torch.empty(0)
        return [step(source, taken()) for source, _ in travel(block, sources, to, by, group)]

    with patch.object(pg, "exchange", exchange):
        forward = round_the_ring(ring.order, group.next, group.previous)
        backward = round_the_ring(ring.back, group.previous, group.next)
        for does in backward:
            if does["keys"]:
                ring.send_home(torch.empty(2, 1, len(does["keys"]), 1, 1), does["block"], 1)
                does["gradients_to"] = taken()
    return {"forward": forward, "backward": [*backward, step(group.rank, None)]}
