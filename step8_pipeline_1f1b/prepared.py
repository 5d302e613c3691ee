"""A folder that prepare.py made, read as a data set: its tokens are mapped, and checked first.

processed/metadata.json     what is there, and what it was made of
processed/tokenizer/        files that AutoTokenizer opens
processed/0_NAME/           the tokens of the first text: about.json, tokens_00000.npy, …
"""

import bisect
import hashlib
import itertools
import json
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from errors import UserError, note
from files import shown
from presets import PRESETS


class Shards:
    """Mapped arrays of tokens, one after the other: their length, and slices."""

    def __init__(self, files):
        self.filename = files[0]
        self.arrays = [np.load(file, mmap_mode="r") for file in files]
        self.ends = [*itertools.accumulate(map(len, self.arrays))]

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, place):  # a slice without a step
        start, stop, _ = place.indices(len(self))
        parts = []
        for number in range(bisect.bisect_right(self.ends, start), len(self.arrays)):
            begun = self.ends[number] - len(self.arrays[number])
            if begun >= stop:
                break
            parts.append(self.arrays[number][max(0, start - begun) : stop - begun])
        return np.concatenate(parts) if len(parts) != 1 else parts[0]


def mapped(folder, name):
    """The tokens in a file `tokens.npy` of a folder, or in shards `tokens_00000.npy`, …"""
    shards = sorted(folder.glob(f"{Path(name).stem}_*.npy"))
    return Shards(shards) if shards else np.load(folder / name, mmap_mode="r")


def read_metadata(name):
    """metadata.json of a folder, a dict; None for a name that is no such folder."""
    try:
        found = json.loads((Path(name).expanduser() / "metadata.json").read_text())
        return found if {"prepared", "texts", "tokenizer_files"} <= found.keys() else None
    except (AttributeError, OSError, RuntimeError, ValueError):  # RecursionError is one
        return None


def prepared_text(name):
    """The folder with the tokens of one text, after a check of all; None for any other name.

    Raises UserError where a file is not as it was written. That reads all tokens once.
    """
    folder = Path(name).expanduser()
    metadata = read_metadata(folder.parent)
    if metadata is None or folder.name not in metadata["prepared"]:
        return None
    about = metadata["texts"][folder.name]
    with as_written(name, "about.json"):
        if json.loads((folder / "about.json").read_text()) != about:
            raise ValueError
    for file, digest in about["files"].items():
        with as_written(name, file):
            if hashlib.sha256(np.load(folder / file, mmap_mode="r")).hexdigest() != digest:
                raise ValueError
    return folder


@contextmanager
def as_written(name, file):
    """Raise UserError where a file of a prepared folder is missing, unreadable or another one."""
    try:
        yield
    except (OSError, ValueError):
        raise UserError(
            f"--dataset_name {shown(name)}: {file} is not as prepare.py wrote it: prepare the "
            "text again"
        ) from None


def choose_prepared(args, weights):
    """Texts with their weights, where a prepared folder gives way to what is in it.

    Its tokenizer becomes that of the run, and its vocabulary that of a preset. Raises UserError
    for a tokenizer that is another one.
    """
    found, first = {}, None
    for name, weight in weights.items():
        metadata = read_metadata(name)
        if metadata is None and (above := read_metadata(Path(name).parent)):
            text = Path(name).name
            if text in above["prepared"]:  # one text of a prepared folder
                name, metadata = str(Path(name).parent), {**above, "prepared": {text: 1}}
        if metadata is None:
            found[name] = weight
            continue
        first = first or (name, metadata)
        if metadata["tokenizer"] != first[1]["tokenizer"]:
            raise UserError(
                f"--dataset_name: {shown(first[0])} and {shown(name)} were prepared with different "
                "tokenizers: prepare them together"
            )
        whole = sum(metadata["prepared"].values())
        for text, part in metadata["prepared"].items():
            inside = f"{name.rstrip('/')}/{text}"
            if inside in found:
                raise UserError(f"--dataset_name: {shown(inside)} is in the mix twice")
            found[inside] = weight * Fraction(part, whole)
    if first is not None:
        take_over(args, *first)
    return found


def take_over(args, name, metadata):
    """Let a run have the tokenizer and the vocabulary of a prepared folder."""
    flag, own = f"--dataset_name {shown(name)}", str(Path(name).expanduser() / "tokenizer")
    if args.tokenizer_name not in (None, own):
        raise UserError(
            f"{flag}: it was prepared with its own tokenizer; leave --tokenizer_name "
            f"{args.tokenizer_name} out, or prepare the text with that one"
        )
    for file, digest in metadata["tokenizer_files"].items():
        with as_written(name, f"tokenizer/{file}"):
            if hashlib.sha256((Path(own) / file).read_bytes()).hexdigest() != digest:
                raise ValueError
    args.tokenizer_name = own
    if args.vocab_size is None and args.model_name in PRESETS:
        args.vocab_size = metadata["vocab_size"]
        note(f"{flag}: its tokenizer gives the model a vocabulary of {args.vocab_size}")
