"""Which change of a step belongs to which item of its walk.

The pages of changes fold their diffs by it, and the walk player types the changes in its order.
"""

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import lessons  # noqa: E402

HEAD = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", re.MULTILINE)


@dataclass(frozen=True)
class Hunk:
    """Lines of the step before, and the lines that stand in their place in the step.

    Both are ranges counted from 1. An empty one names the place: range(8, 8) lies before line 8.
    """

    old: range
    new: range


@cache
def hunks_by_item(step):
    """[(item or None, name of the file, Hunk)]: what a step changes, in the order of its walk.

    A hunk that several items show is cut where one ends and the next begins. Last come the hunks
    that no item shows, with None, by file. Put together, the hunks of a file make it new.
    """
    items = lessons.walk(step)
    found = []
    for file in files_of(step):
        pieces = pieces_of(items, file)
        for hunk in hunks(step, file):
            found += [(rank, file, part) for rank, part in cut(step / file, hunk, pieces)]
    last = (len(items), 0)
    found.sort(key=lambda entry: (entry[0] or last, entry[1], entry[2].new.start))
    return [(items[rank[0]] if rank else None, file, hunk) for rank, file, hunk in found]


def files_of(step):
    """The names of the Python files of a step and of the one before, sorted."""
    folders = filter(None, (lessons.before(step), step))
    return sorted({path.name for folder in folders for path in folder.glob("*.py")})


def hunks(step, file):
    """What a step changes in a file, as `git diff` sees it."""
    previous = lessons.before(step)
    old = previous / file if previous and (previous / file).exists() else None
    if not (step / file).exists():
        return [Hunk(range(1, len(lessons.source(old)) + 1), range(1, 1))]
    heads = HEAD.findall(lessons.git_diff(old, step / file, 0))
    return [Hunk(lines(*head[:2]), lines(*head[2:])) for head in heads]


def lines(start, count):
    """The range that a head of a hunk means: "12,0" is the place after line 12."""
    start, count = int(start), int(count or 1)
    return range(start, start + count) if count else range(start + 1, start + 1)


def pieces_of(items, file):
    """[((number of the item, number of its piece), lines)] of a file, the shortest first."""
    found = [
        ((i, j), piece.lines)
        for i, item in enumerate(items)
        for j, piece in enumerate(item.pieces)
        if piece.file == file
    ]
    return sorted(found, key=lambda entry: (len(entry[1]), entry[0]))


def cut(path, hunk, pieces):
    """The parts of a hunk, as (the piece that shows it or None, Hunk)."""

    def shows(number):
        return next((rank for rank, lines in pieces if number in lines), None)

    if not hunk.new:  # lines are gone: ask the lines around the place
        return [(shows(hunk.new.start - 1) or shows(hunk.new.start), hunk)]
    parts = []  # [rank, first line]
    for number in hunk.new:
        blank = not lessons.source(path)[number - 1].strip()
        rank = shows(number)
        if not parts or (rank != parts[-1][0] and not blank):
            parts.append([rank, number])
    ends = [first for _, first in parts[1:]] + [hunk.new.stop]
    # The lines that were there go where the first shown line stands that replaces them.
    home = next((i for i, (rank, _) in enumerate(parts) if rank), 0)
    old = [
        range(hunk.old.start, hunk.old.start) if i < home else
        hunk.old if i == home else range(hunk.old.stop, hunk.old.stop)
        for i in range(len(parts))
    ]  # fmt: skip
    return [
        (rank, Hunk(before, range(first, end)))
        for (rank, first), end, before in zip(parts, ends, old, strict=True)
    ]
