"""Tensors of which each rank holds parts, written to a directory and read by any other layout.

Each rank says what it holds as rectangles of the full tensors, and reads what it will hold from
whatever rectangles are there. `torch.distributed.checkpoint` finds where they overlap, and writes
and reads files; here stand its plans, in these terms.
"""

import contextlib
import itertools
import warnings
from dataclasses import dataclass, field

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from errors import UserError, in_one_line


def rectangles(parameter):
    """Where the elements that this rank holds lie in the full tensor.

    Yields (offsets, sizes, part): a rectangle of the full tensor, and the slice of this rank's
    elements, flattened, that fills it. A sharding engine's piece is a run of elements of what the
    layout's slices hold: the end of a row, whole rows, the beginning of a row, any of them missing.
    In rows of 4 the run 3:10 is 3:4, 4:8 and 8:10. A vector is one row.
    """
    first = [held.start for held in parameter.held]
    width = parameter.held[-1].stop - first[-1]
    piece = getattr(parameter, "piece", slice(0, parameter.numel()))
    whole_start = min(-(-piece.start // width) * width, piece.stop)
    whole_stop = max(piece.stop // width * width, whole_start)
    for start, stop in itertools.pairwise([piece.start, whole_start, whole_stop, piece.stop]):
        if start < stop:
            rows = max(1, (stop - start) // width)
            corner, sizes = divmod(start, width), (rows, (stop - start) // rows)
            offsets = [a + b for a, b in zip(first, corner[-len(first) :], strict=True)]
            part = slice(start - piece.start, stop - piece.start)
            yield torch.Size(offsets), torch.Size(sizes[-len(first) :]), part


@dataclass
class Tensor:
    """A full tensor's shape, and views of this rank's memory by their offsets in it."""

    shape: torch.Size
    parts: dict = field(default_factory=dict)


class Tensors(dict):
    """{key: Tensor}, with a key for each tensor of the whole model, held here or not."""

    def put(self, key, parameter, tensor):
        """Enter a tensor of this rank, laid out like a parameter."""
        whole = self.setdefault(key, Tensor(parameter.full_shape))
        for offsets, sizes, part in rectangles(parameter):
            whole.parts[offsets] = tensor.detach().view(-1)[part].view(sizes)


class SavePlanner(dcp.DefaultSavePlanner):
    """Writes the parts of `Tensors`; what several ranks hold, the least busy of them writes."""

    def create_local_plan(self):
        """What this rank has: an item for each part."""
        items = []
        for key, tensor in self.state_dict.items():
            for offsets, view in tensor.parts.items():
                chunk = ChunkStorageMetadata(offsets, view.shape)
                properties = TensorProperties.create_from_tensor(view)
                data = TensorWriteData(chunk, properties, tensor.shape)
                index = MetadataIndex(key, offsets)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def resolve_data(self, item):
        """The tensor that one of those items writes."""
        return self.state_dict[item.index.fqn].parts[item.index.offset]


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Fills the parts of `Tensors` from whatever parts a checkpoint has."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        """The library's first call, with what the checkpoint says of itself."""
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self):
        """What this rank wants: an item for each overlap of a part of its own with a stored one."""
        items = []
        for key, tensor in self.state_dict.items():
            mine = [ChunkStorageMetadata(at, view.shape) for at, view in tensor.parts.items()]
            stored = self.metadata.state_dict_metadata[key]
            items += create_read_items_for_chunk_list(key, stored, mine)
        return LoadPlan(items)

    def lookup_tensor(self, index):
        """Where to put what one such item reads."""
        return self.state_dict[index.fqn].parts[index.offset]


def tensors_of(parameters, names, optimizer=None):
    """Weights, and with an optimizer its two averages of each, as `Tensors`."""
    averages = [] if optimizer is None else ["exp_avg", "exp_avg_sq"]
    tensors = Tensors()
    for parameter in parameters:
        name = parameter.global_name
        tensors.put(name, parameter, parameter)
        for average in averages:
            tensors.put(f"{name}.{average}", parameter, moments(optimizer, parameter)[average])
    for name in names:  # those of other pipeline stages, too
        for key in (name, *(f"{name}.{average}" for average in averages)):
            tensors.setdefault(key, Tensor(torch.Size()))
    return tensors


def moments(optimizer, parameter):
    """AdamW's state of a parameter; zeros before the first step."""
    entry = optimizer.state[parameter]
    if not entry:
        entry["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        entry["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
        entry["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
    return entry


@contextlib.contextmanager
def in_our_words(directory):
    """Make one line of what the library raises when one of the ranks could not read or write."""
    try:
        yield
    except dcp.CheckpointException as failed:
        error, _ = next(iter(failed.failures.values()))
        raise UserError(f"{directory}: {in_one_line(error)}") from failed


def write_tensors(tensors, directory):
    """All ranks together write their parts of all tensors to a directory; raises UserError."""
    plan = SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with in_our_words(directory):
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(directory), planner=plan)


def read_tensors(tensors, directory, no_dist=False):
    """Fill this rank's parts, with no_dist without the other ranks; raises UserError."""
    reader = dcp.FileSystemReader(directory)
    with in_our_words(directory), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it warns of no_dist
        dcp.load(tensors, storage_reader=reader, planner=LoadPlanner(), no_dist=no_dist)


def read_weights(model, directory, no_dist=False):
    """Fill a model's parameters only, with no_dist in this process alone; raises UserError."""
    tensors = tensors_of(model.parameters(), model.parameter_names)
    read_tensors(tensors, directory, no_dist)
