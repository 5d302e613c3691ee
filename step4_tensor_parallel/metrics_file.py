"""The file that `--metrics_file` names: whose it is, and one line of JSON a step."""

import json
import math
from pathlib import Path

from errors import UserError, check_writable, note


class MetricsFile:
    """One line of JSON a step. A disk that is full ends the lines, but not the training.

    Beside it stand the run's flags, so that the same command may be given again, and no other run
    writes over these lines.
    """

    def __init__(self, path, flags):
        self.path, self.waiting, self.failed = path, b"", None
        try:
            self.file = open(path, "ab", buffering=0)
            if Path(path).is_file():
                part = Path(f"{path}.config.part")  # a full disk leaves the old flags
                part.write_text(json.dumps(flags, indent=1) + "\n")
                part.replace(flags_beside(path))
                self.file.truncate(0)
        except OSError as error:
            raise UserError(f"--metrics_file {path}: {error.strerror}; name another file") from None

    def write(self, metrics):
        """Add a line. What finds no room waits for the next call."""
        line = {name: None if infinite(value) else value for name, value in metrics.items()}
        self.waiting += json.dumps(line).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if self.failed is None:
                note(f"--metrics_file {self.path}: {error.strerror}; training goes on")
            self.failed = error

    def close(self):
        self.file.close()
        if lines := self.waiting.count(b"\n"):
            why = self.failed.strerror
            raise UserError(f"--metrics_file {self.path}: {why}; its last {lines} lines are lost")


def infinite(value):
    """Whether it is a number for which JSON has no word."""
    return isinstance(value, float) and not math.isfinite(value)


def flags_beside(path):
    """Where the flags of the run stand that wrote a file of metrics."""
    return Path(f"{path}.config.json")


def check_metrics_file(args):
    """Raise UserError unless `--metrics_file` can be written, and nothing is lost by that.

    It may be new, or empty, or hold the lines of a run of the same flags.
    """
    path = args.metrics_file
    check_writable("--metrics_file", path)
    if path is None or not Path(path).is_file():
        return
    empty = Path(path).stat().st_size == 0
    if empty and not flags_beside(path).exists():
        return
    *lines, _ = Path(path).read_bytes().split(b"\n")  # the last one may be cut off
    try:
        before = json.loads(flags_beside(path).read_text())
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict) or "metrics_file" not in before or None in map(step_of, lines):
        raise UserError(f"--metrics_file {path}: it holds something else; name another file")
    if not empty and not same_flags(before, args.flags):
        raise UserError(
            f"--metrics_file {path}: it is of a run of other flags, which are in "
            f"{flags_beside(path)}; name another file"
        )


def step_of(line):
    """The step that a line of metrics is of; None if it is no such line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def same_flags(one, other):
    """Whether two runs have the same flags, wherever they write their metrics."""
    return all(one.get(key) == other.get(key) for key in {*one, *other} - {"metrics_file"})
