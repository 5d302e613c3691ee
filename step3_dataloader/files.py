"""Which files a data set is made of: by their endings, their places and the names of splits."""

import os
import re
import sysconfig
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

from errors import UserError

KINDS = {".txt": "texts", ".jsonl": "JSON", ".json": "JSON", ".parquet": "parquet"}
PACKED = (".gz", ".bz2", ".xz", ".zst")  # may follow the endings of texts and JSON
SAVED_TO_DISK = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in its folder
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}

VALIDATION = ("validation", "valid", "val", "dev")
SPLIT = f"(train|test|{'|'.join(VALIDATION)})"
BEGINS = re.compile(
    rf"{SPLIT}(?=[-_.0-9]|$)"
)  # train.txt, valid_1.txt, test-00000-of-00002.parquet
WITHIN = re.compile(rf"[-_.]{SPLIT}[-_.][0-9]")  # c4-train.00000-of-01024.json.gz


@dataclass
class Files:
    """The files behind a data set's name, in the order in which they are read."""

    kind: str  # a value of KINDS, "source", "saved", or "hub"
    train: list = field(default_factory=list)
    validation: list = field(default_factory=list)  # none: a part of the training text is held out
    notes: list = field(default_factory=list)  # one line, where anything was left out


def shown(path):
    """A path in one line: what can't be printed is written as in a Python string."""
    letters = (c if c.isprintable() else ascii(c)[1:-1] for c in str(path))
    return "".join(letters)


def kind_of(name):
    """(kind, packing) of a file by its endings, in any case: ("JSON", ".gz") of a.JSONL.gz.

    The kind is None for a file that is not read. Parquet is packed inside, not as a whole.
    """
    name = name.lower()
    packing = next((ending for ending in PACKED if name.endswith(ending)), "")
    kind = KINDS.get(os.path.splitext(name.removesuffix(packing))[1])
    return (None if kind == "parquet" and packing else kind), packing


def local_files(name):
    """The `Files` behind a data set's name; for a name on the hub there are none.

    Raises UserError for what looks like a path and is not there, or holds no text.
    """
    if name == "python-stdlib":
        return Files("source", library_files())
    flag, left_out = f"--dataset_name {shown(name)}", defaultdict(list)
    try:
        path = Path(name).expanduser()
        there = path.exists()
        if any((path / marker).exists() for marker in SAVED_TO_DISK):
            return Files("saved", sorted(file for file in path.rglob("*") if file.is_file()))
        if path.is_dir():
            found = files_below(path, left_out)
        else:
            found = [path] if path.is_file() else []
    except (OSError, RuntimeError) as error:  # the latter: ~ of a user who has no home
        raise UserError(f"{flag}: {getattr(error, 'strerror', None) or error}") from None
    if not there:
        if kind_of(name)[0] or name.count("/") > 1 or name[0] in "./~":
            raise UserError(f"{flag}: there is no such file or directory")
        return Files("hub")
    known = [file for file in found if kind_of(file.name)[0]]
    left_out["of another kind"] = [file for file in found if not kind_of(file.name)[0]]
    train, validation = by_split(path, known, left_out)
    kinds = sorted({kind_of(file.name)[0] for file in train + validation})
    if len(kinds) > 1:
        raise UserError(f"{flag}: {' and '.join(kinds)} together; name one kind")
    notes = decisions(path, train, validation, left_out)
    if not kinds:
        wanted = f"no file with one of the endings {', '.join([*KINDS, *PACKED])}"
        raise UserError("; ".join([f"{flag}: {wanted}", *notes]))
    line = [f"{flag}: {'; '.join(notes)}"] if notes else []
    return Files(kinds[0], train, validation, line)


def library_files():
    """The source files of the running interpreter's standard library, in order."""
    files = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - NOT_LIBRARY  # walk into the others only
        files += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(files)


def files_below(top, left_out):
    """All files below a folder, in order; links are followed, but no file is there twice.

    left_out: {why: paths}, to which those are added that are no files, or not to be read.
    """
    files, seen = [], set()
    paths, links = [(top, os.path.realpath(top))], deque()
    # Links wait, so that a file is found by its own path first.
    while paths or links:
        path, real = paths.pop() if paths else links.popleft()
        if path.name.startswith(".") and path != top:
            left_out["hidden"].append(path)
            continue  # not added to `seen`, so a link to it that is not hidden is followed
        if real in seen:
            left_out["reached twice by links"].append(path)
        elif path.is_dir():
            for child in sorted(path.iterdir(), reverse=True):
                if child.is_symlink():
                    links.append((child, os.path.realpath(child)))
                else:
                    paths.append((child, os.path.join(real, child.name)))
        elif path.is_file():
            files.append(path)
        else:
            left_out["with no file behind them"].append(path)
        seen.add(real)
    return sorted(files)


def split_of(name):
    """The split that a file or folder is named for: train, validation or test; None for none."""
    found = BEGINS.match(name.lower()) or WITHIN.search(name.lower())
    return found and ("validation" if found[1] in VALIDATION else found[1])


def by_split(top, files, left_out):
    """(files to train on, files to hold out): names of splits count beside one named train.

    left_out: {why: paths}, to which the others are added.
    """
    splits = defaultdict(list)
    names = {file: file.relative_to(top).parts for file in files}  # () where top is the file itself
    trained = {
        parts[:depth]
        for parts in names.values()
        for depth, part in enumerate(parts)
        if split_of(part) == "train"
    }
    for file, parts in names.items():
        depth = next((depth for depth in range(len(parts)) if parts[:depth] in trained), None)
        splits["train" if depth is None else split_of(parts[depth])].append(file)
    left_out["named test"] += splits["test"]
    left_out["beside train, named for no split"] += splits[None]
    return splits["train"], splits["validation"]


def decisions(top, train, validation, left_out):
    """What a reader has to know of how the files were chosen, as phrases."""

    def count(paths, what):
        names = [
            shown(path.relative_to(top) if path != top else path.name) for path in sorted(paths)[:3]
        ]
        return f"{len(paths)} {what} ({', '.join(names + ['…'] * (len(paths) > 3))})"

    phrases = []
    if validation or left_out["named test"] or left_out["beside train, named for no split"]:
        phrases.append(f"trained on {count(train, 'files')}")
    if validation:
        phrases.append(f"held out {count(validation, 'named for validation')}")
    if any(left_out.values()):
        every = [count(paths, why) for why, paths in left_out.items() if paths]
        phrases.append(f"left out {', '.join(every)}")
    return phrases
