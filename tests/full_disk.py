"""A file system that is as small as a test wants it."""

import contextlib
import subprocess
import sys

import pytest


@contextlib.contextmanager
def disk(path, kilobytes):
    """A directory with room for so many kilobytes; skips the test where nothing can be mounted."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root on Linux can mount a small disk")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path, leave=0):
    """Leave only so many bytes of room on the disk of a directory; the file that fills it."""
    file = path / "filling"
    with contextlib.suppress(OSError), open(file, "wb", buffering=0) as filling:
        while True:
            filling.write(bytes(4096))
    if leave:
        with open(file, "r+b") as filling:
            filling.truncate(max(0, file.stat().st_size - leave))
    return file
