"""Where a stream goes on after a step, for a checkpoint: complete, and of no layout."""

import process_group as pg
from streaming import first_in
from virtual_shards import SHARDS, START, Place


def position_of(state):
    """The position, in the row of all sequences, of the first one after the last step."""
    return state.step * state.data.order.batch_size


def places_after(state):
    """The Place of each shard after the last step, a list of 64, on all ranks; None for no stream.

    A rank knows the places of the shards that it reads, and of those that nobody has read yet.
    """
    if not state.args.streaming:
        return None
    first = [first_in(shard, position_of(state)) for shard in range(SHARDS)]

    def known():
        places = enumerate(state.data.stream.known)
        return {shard: own[first[shard]] for shard, own in places if first[shard] in own}

    together = {}
    for part in pg.from_all(state.mesh.world, known):
        together |= part
    return [together[shard] for shard in range(SHARDS)]


def go_on(state):
    """Let each shard of a stream go on where the checkpoint in `args.resumed` says.

    If the files are others now, each shard begins anew: its place would be one in another text.
    """
    args, position = state.args, position_of(state)
    if not args.streaming:
        return
    places = args.resumed.get("stream") if args.resumed["data"] == args.data else None
    places = [Place(*place) for place in places or [START] * SHARDS]
    state.data.stream.known = [
        {first_in(shard, position): place} for shard, place in enumerate(places)
    ]
