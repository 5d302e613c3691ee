"""Where an export is written: beside its directory, until it is whole and gets that name."""

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

import torch

from errors import UserError
from model import Llama


def check_save_hf(directory):
    """Make the directory to write; raises UserError if that can't be, or if it is in use."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        used = any(Path(directory).iterdir())
        if os.path.ismount(directory):
            raise OSError(errno.EBUSY, "a mount point, whose name no other can take")
        if not (os.access(directory, os.W_OK) and os.access(hidden(directory).parent, os.W_OK)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--save_hf {directory}: {error.strerror}; name a directory") from None
    if used:
        raise UserError(f"--save_hf {directory}: not empty; name another directory")


def check_room(directory, config, dtype, copies):
    """Raise UserError unless so many copies of the weights fit beside a directory to write."""
    with torch.device("meta"):
        count = Llama(config).parameter_count
    weight = getattr(torch, dtype).itemsize
    needed, free = copies * count * weight, shutil.disk_usage(hidden(directory).parent).free
    if free < needed:
        raise UserError(
            f"--save_hf {directory}: that takes {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are "
            "free: make room, or name a directory elsewhere"
        )


def hidden(directory):
    """Where to write before it gets that name."""
    path = Path(directory).absolute()
    return path.with_name(f".{path.name}.export")


@contextlib.contextmanager
def writing(directory, advice="", kept=(), cleans=True):
    """Around what writes an export: if that fails, what is half written is removed.

    kept: what is whole, and stays if it was the disk that refused. cleans: whether this rank is the
    one that removes. Raises UserError, in the words of the operating system where there are any,
    and with advice.
    """
    try:
        yield
    except Exception as error:
        code = number_of(error)
        if cleans:
            clear(directory, kept if code else ())
        if str(error).startswith("--") or not (code or isinstance(error, UserError)):
            raise
        reason = os.strerror(code) if code else error
        raise UserError(f"--save_hf {directory}: {reason}{advice}") from error


def number_of(error):
    """The operating system's number of the error that an exception is about, or None."""
    said = str(error)
    if found := re.search(r"\(os error (\d+)\)", said):  # as libraries in Rust have it
        return int(found[1])
    full = errno.ENOSPC if os.strerror(errno.ENOSPC) in said else None
    return getattr(error, "errno", None) or full


def clear(directory, kept=()):
    """Delete what `save_hf` and `export` write before a directory gets its name."""
    for name in {"parts", "whole"} - {*kept}:
        shutil.rmtree(hidden(directory) / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # something else is in it
        hidden(directory).rmdir()


def give_name(directory):
    """The last act of an export; raises UserError if something was put there meanwhile."""
    aside = hidden(directory) / "whole"
    try:
        aside.rename(directory)  # empty, as `check_save_hf` left it
    except OSError as error:
        raise UserError(f"--save_hf {directory}: {error.strerror}; all is in {aside}") from None
    clear(directory)
