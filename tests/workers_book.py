"""What the code of step 9 deals out to the ranks of a mesh, for the widget of the mesh."""

import itertools
import math
from types import SimpleNamespace
from unittest.mock import Mock, patch

AXES = ("pp", "dp", "cp", "tp")  # slowest first


def groups_of(cases):
    """For each (rank, sizes, sets of axes): its place {axis: number}, and its groups' ranks.

    As this rank sees a Mesh, without other processes.
    """
    import process_group as pg

    found = []
    for rank, sizes, asked in cases:
        dist = Mock(get_rank=lambda: rank, get_world_size=lambda: math.prod(sizes.values()))  # noqa: B023
        with patch.object(pg, "dist", dist):
            mesh = pg.Mesh(**sizes)
            place = (mesh.grid == rank).nonzero()[0].tolist()
            groups = [list(mesh.group(*axes).ranks) for axes in asked]
        found.append((dict(zip(AXES, place, strict=True)), groups))
    return found


def parts_of(cases):
    """For each (length, ranks, place): [start, stop) of what tensor parallelism cuts out."""
    import torch

    from tensor_parallel import part

    found = []
    for length, ranks, place in cases:
        weight = torch.empty(length, 1, device="meta")
        weight.held = (slice(None), slice(None))
        held = part(weight, 0, SimpleNamespace(size=ranks, rank=place)).held[0]
        found.append([held.start, held.stop])
    return found


def tokens_of(cases):
    """For each (length, ranks, place): the positions that a rank of the ring has."""
    from context_parallel import zigzag_positions

    return [
        zigzag_positions(length, SimpleNamespace(size=ranks, rank=place)).tolist()
        for length, ranks, place in cases
    ]


def sequences_of(cases):
    """For each (count, ranks, place): which of the first sequences the data loader hands out."""
    import dataloader

    found = []
    with patch.object(dataloader, "DataLoader", lambda _, batch_sampler: batch_sampler):
        for count, ranks, place in cases:
            group = SimpleNamespace(size=ranks, rank=place)
            batches = SimpleNamespace(group=group, windows=None, options={})
            dealt = dataloader.Batches.load(batches, ([window] for window in range(count)))
            found.append([*itertools.chain(*dealt)])
    return found


def layers_of(model, cases):
    """For each (stages, stage): [start, stop) of the layers, and how many the model has."""
    from pipeline_parallel import deal_layers
    from presets import preset

    config = preset(model)
    dealt = [deal_layers(config, stages)[stage] for stages, stage in cases]
    return [(layers.start, layers.stop, config.num_hidden_layers) for layers in dealt]
