"""A folder with the tokens of each text that was tokenised: complete, or not there.

What is being written lies aside, in a folder that its process has locked. A process that is killed
lets go of the lock, and the next one that tokenises removes what it left.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from errors import UserError

ASIDE = "aside-"  # how the names of folders begin that are being written
DTYPES = (np.uint16, np.uint32)  # of tokens
FILES = {"tokens": "tokens.npy", "held_out": "held_out.npy"}  # field of about.json: its tokens


def cache_folder():
    """Where tokens are kept; raises UserError for a user who has no home."""
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError(
            "there is no home directory to keep tokens in: set XDG_CACHE_HOME to a folder that can "
            "be written"
        ) from None
    return Path(caches) / "four-d-from-scratch"


def place_for_libraries():
    """Give Hugging Face's libraries a folder where there is no home: they would make one called ~.

    To be called before they are imported.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ.setdefault("HF_HOME", str(cache_folder() / "huggingface"))


def read_about(folder):
    """What about.json says of a folder of the cache; None unless all is as it was written.

    That reads the tokens once, to compare their hash: 1 to 2 GB a second.
    """
    try:
        about = json.loads((folder / "about.json").read_text())
        digest = hashlib.sha256()
        for field, name in FILES.items():
            if about[field] is not None:
                tokens = np.load(folder / name, mmap_mode="r")
                if about[field] != len(tokens) or tokens.ndim != 1 or tokens.dtype not in DTYPES:
                    return None
                digest.update(tokens)
    except Exception:  # a damaged header can make NumPy raise anything
        return None
    whole = {"notes", "largest_id", "tokenizer", "bytes", *FILES} <= about.keys()
    return about if whole and about.get("sha256") == digest.hexdigest() else None


@contextmanager
def room_for(folder):
    """A new folder that becomes `folder` of the cache at the end of the context; raises UserError.

    Whatever goes wrong, what lies aside is removed.
    """
    cache = folder.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Else another process could remove our new folder before `mark` locks it.
        gate = lock(cache, fcntl.LOCK_EX)
        try:
            remove_leftovers(cache)
            aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=cache))
            mark = lock(aside)
        finally:
            unlock(gate)
        try:
            # Only `part` is renamed. `aside` keeps the lock, and takes a damaged `folder`, too.
            (aside / "part").mkdir()
            yield aside / "part"
            if folder.exists() and not read_about(folder):
                folder.rename(aside / "broken")
            try:
                (aside / "part").rename(folder)
            except OSError:
                if not read_about(folder):  # else another run was quicker
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            unlock(mark)
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a folder that can be written and has room"
        raise UserError(f"{cache}: {error.strerror}; {remedy}") from None


def remove_leftovers(cache):
    """Remove what killed processes were writing: folders of such a name that nobody has locked."""
    for aside in cache.iterdir():
        if re.fullmatch(ASIDE + "[a-z0-9_]{8}", aside.name) and (held := lock(aside)):
            shutil.rmtree(aside, ignore_errors=True)
            unlock(held)


def lock(folder, how=fcntl.LOCK_EX | fcntl.LOCK_NB):
    """Lock a folder until `unlock`, or the end of this process; None where that can't be done."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, how)
    except OSError:  # another has it, or the file system knows no locks
        os.close(file)
        return None
    return file


def unlock(file):
    if file is not None:
        os.close(file)


def write_tokens(parts, path, dtype, digest):
    """Write arrays one after the other as a .npy of [tokens]; returns (their number, largest id).

    By writing, not through a mapped file: where the disk is full that would kill the process.
    digest: a hash that is to cover the tokens.
    """
    count = largest = 0
    with open(path, "wb") as file:
        write_header(file, dtype, count)
        start = file.tell()
        for part in parts:
            file.write(part)
            digest.update(part)
            count += len(part)
            largest = max(largest, int(part.max(initial=0)))
        file.seek(0)
        write_header(file, dtype, count)
        assert file.tell() == start, "a header of another length"
    return count, largest


def write_header(file, dtype, count):
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
