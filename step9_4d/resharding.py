"""Tensors of which each rank holds parts, written to a directory and read by any other layout.

Each rank says what it holds as rectangles of the full tensors, and reads what it will hold from
whatever rectangles are there. A rectangle is a tensor of a safetensors file, and its key tells its
place in the full tensor, as in "model.norm.weight[0:64]". For each there is a checksum, computed
when it is written and compared by whoever reads it.
"""

import errno
import inspect
import itertools
import math
import os
import re
import zlib

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import process_group as pg
from errors import UserError, in_one_line

FILE_BYTES = 2**30  # of tensors in a file, which are copied from a GPU to the host together


def rectangles(parameter):
    """Where the elements that this rank holds lie in the full tensor.

    Yields (offsets, sizes, part): a rectangle of the full tensor, and the slice of this rank's
    elements, flattened, that fills it. A sharding engine's piece is a stretch of what the layout's
    slices hold: the end of a row, whole rows, the beginning of a row, any of them missing.
    In rows of 4 the stretch 3:10 is 3:4, 4:8 and 8:10. A vector is one row.
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


class Tensors(dict):
    """{key: {place: view}}: what this rank holds of each tensor, as views of its own memory.

    A place is a rectangle of the full tensor: (start, stop) of each dim.
    """

    def put(self, key, parameter, tensor):
        """Enter a tensor of this rank, laid out like a parameter."""
        flat, parts = tensor.detach().view(-1), self.setdefault(key, {})
        for offsets, sizes, part in rectangles(parameter):
            place = tuple((start, start + size) for start, size in zip(offsets, sizes, strict=True))
            parts[place] = flat[part].view(sizes)


def tensors_of(parameters, optimizer=None):
    """Weights, and with an optimizer what it keeps of each number of them, as `Tensors`."""
    tensors = Tensors()
    for parameter in parameters:
        name = parameter.global_name
        tensors.put(name, parameter, parameter)
        kept = kept_of(optimizer, parameter) if optimizer is not None else {}
        for key, value in kept.items():
            if value.dim():
                tensors.put(f"{name}.{key}", parameter, value)
    return tensors


def kept_of(optimizer, parameter):
    """What an optimizer keeps of a parameter: tensors of its shape, and scalars.

    Before the first step there is nothing. Then a step on a single number shows what there will be.
    """
    entry = optimizer.state[parameter]
    if not entry:
        number = parameter.detach().flatten()[:1].clone().requires_grad_()
        number.grad = torch.zeros_like(number)
        known = inspect.signature(type(optimizer)).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in known}
        trial = type(optimizer)([number], **options)
        trial.step()
        for name, value in trial.state[number].items():
            entry[name] = torch.zeros_like(parameter if value.dim() else value)
    return entry


def scalars_of(optimizer, parameters):
    """What an optimizer keeps once for all numbers, {name: number}: of AdamW the `step`."""
    kept = optimizer.state[parameters[0]]
    return {name: value.item() for name, value in kept.items() if not value.dim()}


def stored_key(key, place):
    """The key of a rectangle in a file: "name[0:64,128:256]"."""
    return f"{key}[{','.join(f'{start}:{stop}' for start, stop in place)}]"


def place_of(stored):
    """What `stored_key` was made from: (key, place)."""
    key, _, place = stored[:-1].rpartition("[")
    return key, tuple(tuple(map(int, part.split(":"))) for part in place.split(","))


def checksum(tensor):
    """CRC-32 of a CPU tensor's bytes. It finds every change of up to 32 bits in a row."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


def write_tensors(tensors, directory, world):
    """All ranks together write their parts of all tensors to a directory.

    What several ranks hold, the least busy of them writes. Returns what `read_tensors` has to know
    of the files, {name: dict}, on every rank; an OSError of one rank is raised on all.
    """
    parts = {stored_key(key, at): view for key in tensors for at, view in tensors[key].items()}
    sizes = pg.from_all(world, lambda: {key: view.nbytes for key, view in parts.items()})
    load, mine = [0] * world.size, []
    for key, size in sorted(merged(sizes).items(), key=lambda item: (-item[1], item[0])):
        holders = [rank for rank in range(world.size) if key in sizes[rank]]
        writer = min(holders, key=load.__getitem__)
        load[writer] += size
        if writer == world.rank:
            mine.append(key)

    def write_own():
        files = {}
        for number, keys in enumerate(batches(mine, parts)):
            name = f"{world.rank:05d}_{number:04d}.safetensors"
            files[name] = write_file(directory / name, {key: parts[key] for key in keys})
        return files

    return merged(pg.from_all(world, write_own))


def merged(dicts):
    """All entries of several dicts in one."""
    return dict(itertools.chain.from_iterable(found.items() for found in dicts))


def batches(keys, parts):
    """Cut a list of keys where FILE_BYTES are full. A larger tensor is alone in its file."""
    batch, size = [], 0
    for key in keys:
        if batch and size + parts[key].nbytes > FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(key)
        size += parts[key].nbytes
    if batch:
        yield batch


def write_file(path, parts):
    """Write tensors by key; returns the file's size and the checksums of header and tensors."""
    parts = {key: view.cpu() for key, view in parts.items()}
    try:
        save_file(parts, path)
    except SafetensorError as error:  # how that library says that a disk is full
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        header = zlib.crc32(header_of(file))
    sums = {key: checksum(view) for key, view in parts.items()}
    return {"bytes": path.stat().st_size, "header": header, "parts": sums}


def header_of(file):
    """The bytes of a safetensors file before its tensors: a length, and JSON that long."""
    length = file.read(8)
    size = os.fstat(file.fileno()).st_size  # a damaged length may be any number
    return length + file.read(min(int.from_bytes(length, "little"), size))


def read_tensors(tensors, directory, files):
    """Fill this rank's parts of tensors from the files that `write_tensors` told of.

    Raises UserError for a part that is missing or that is not as it was written.
    """
    wanted = sum(view.numel() for parts in tensors.values() for view in parts.values())
    for name, about in files.items():
        overlaps = {key: list(overlapping(tensors, key)) for key in about["parts"]}
        if any(overlaps.values()):
            wanted -= read_file(directory / name, about, overlaps)
    if wanted:
        raise UserError(f"{directory}: {wanted} numbers of this model are not there")


def read_file(path, about, overlaps):
    """Copy out of a file what overlaps; returns how many numbers that is. Raises UserError."""
    count = 0
    try:
        with open(path, "rb") as file:
            if zlib.crc32(header_of(file)) != about["header"]:
                raise UserError(f"{path}: its header is not as it was written")
        with safe_open(path, "pt") as file:
            for key in (key for key, found in overlaps.items() if found):
                stored = file.get_tensor(key)
                if checksum(stored) != about["parts"][key]:
                    raise UserError(f"{path}: {key} is not as it was written")
                for there, view in overlaps[key]:
                    view.copy_(stored[there])
                    count += view.numel()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: {in_one_line(error)}") from None
    return count


def overlapping(tensors, stored):
    """Yield where a stored rectangle overlaps with this rank's parts: (its slices, our view)."""
    key, place = place_of(stored)
    for at, view in tensors.get(key, {}).items():
        both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(place, at, strict=True)]
        if all(start < stop for start, stop in both):
            yield within(place, both), view[within(at, both)]


def within(place, inner):
    """Slices of a rectangle's own tensor that cut out another one inside of it."""
    return tuple(slice(a - o, b - o) for (o, _), (a, b) in zip(place, inner, strict=True))


def read_weights(model, directory, files):
    """Fill a model's parameters only; raises UserError."""
    read_tensors(tensors_of(model.parameters()), directory, files)


def all_finite(tensors):
    """Whether no number of this rank's parts is infinite or NaN."""
    for view in itertools.chain.from_iterable(parts.values() for parts in tensors.values()):
        # A finite sum has no such term, and reads the memory once. A sum that is not finite may
        # just be too large, so then each number is looked at.
        if not math.isfinite(view.sum()) and not torch.isfinite(view).all():
            return False
    return True
