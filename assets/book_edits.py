"""Which item of a walk writes which line: how the files of a step grow out of those before it."""

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import lessons  # noqa: E402

HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", re.MULTILINE)
CONTEXT = 2  # lines around a change that its item shows too


@dataclass
class Shot:
    """Pieces of an item that stand together: what one looks at, at once."""

    file: str
    pieces: list


@dataclass
class Line:
    """A line of a file, before or after the step. What both have, has both numbers."""

    text: str
    old: int | None = None  # its number in the step before
    new: int | None = None  # and in this one, both counted from 1
    item: int | None = None  # the index in the walk of the item that adds or deletes it
    shot: int | None = None  # of that item; None where no item shows the line: it comes untyped

    @property
    def changes(self):
        return self.old is None or self.new is None

    def is_there(self, done):
        """Whether the line is in the file when the items up to index `done` are written."""
        if not self.changes:
            return True
        return (self.item <= done) == (self.old is None)


@cache
def shots(step, index):
    """An item's pieces, in their order; neighbours in a file are one shot."""
    found = []
    for piece in lessons.walk(step)[index].pieces:
        last = found[-1].pieces[-1] if found else None
        if last and last.file == piece.file and 0 <= piece.lines[0] - last.lines[-1] <= 3:
            found[-1].pieces.append(piece)
        else:
            found.append(Shot(piece.file, [piece]))
    return found


@cache
def lines(step, file):
    """All lines of a file of a step and of the step before, in order, each with its item."""
    old = lessons.before(step) and lessons.before(step) / file
    old = old if old and old.exists() else None
    before, after = lessons.source(old) if old else [], lessons.source(step / file)
    by_new, by_old, first = owners(step, file, old)
    found, at, gap = [], 1, 0  # at: the next line of the old file; gap: its distance to the new one

    def same(end):
        return [Line(before[n - 1], n, n + gap) for n in range(at, end)]

    for old_lines, new_lines in hunks(old, step / file):
        found += same(old_lines.start)
        gone = [Line(before[n - 1], old=n) for n in old_lines]
        come = [Line(after[n - 1], new=n) for n in new_lines]
        settle(come, [by_new.get(line.new) for line in come], first)
        typed = [(line.item, line.shot) for line in come if line.shot is not None]
        settle(gone, [by_old.get(line.old) for line in gone], min(typed, default=first))
        found += gone + come
        at, gap = old_lines.stop, new_lines.stop - old_lines.stop
    return found + same(len(before) + 1)


def hunks(old, new):
    """The changes of a file as pairs of ranges of lines, old and new, counted from 1."""
    for start, count, new_start, new_count in HUNK.findall(lessons.git_diff(old, new, 0)):
        yield span(start, count), span(new_start, new_count)


def span(start, count):
    """What a diff calls `start,count`; with a count of 0, start is the line before."""
    start, count = int(start), int(count or 1)
    return range(start, start + count) if count else range(start + 1, start + 1)


def owners(step, file, old):
    """Who shows which line: {new number: (item, shot)} and {old number: (item, shot)}; and last
    (item, None), the first item that touches the file: with it comes what no item shows.
    """
    by_new, by_old, first = {}, {}, None
    known = lessons.definitions(old) if old else {}
    for index in range(len(lessons.walk(step))):
        for number, shot in enumerate(shots(step, index)):
            for piece in shot.pieces if shot.file == file else ():
                first = first or (index, None)
                for n in piece.lines:
                    by_new.setdefault(n, (index, number))
                for n in known.get(piece.name, ()):
                    by_old.setdefault(n, (index, number))
    return by_new, by_old, first or (0, None)


def settle(found, given, otherwise):
    """Say who writes these neighbours. A blank line goes with the line after it."""
    after = None
    for line, owner in reversed([*zip(found, given, strict=True)]):
        if owner is None:
            owner = after if after and not line.text.strip() else otherwise
        line.item, line.shot = after = owner


def lit(step, index, shot):
    """The lines that a shot shows, as numbers in the file once its item is written: [[1, 9], …]."""
    file = lines(step, shot.file)
    near = set()
    for place, line in enumerate(file):
        if line.changes:
            near.update(range(place - CONTEXT, place + CONTEXT + 1))
    numbers, blank, number = set(), set(), 0
    for place, line in enumerate(file):
        if not line.is_there(index):
            continue
        number += 1
        if not line.text.strip():
            blank.add(number)
        for piece in shot.pieces:
            shown = piece.kind == "code" or place in near or line.new == piece.lines[0]
            if line.new in piece.lines and shown:
                numbers.add(number)
    return ranges(numbers, blank)


def ranges(numbers, blank):
    """Sorted numbers as [[first, last], …]; blank lines between two of them do not part them."""
    found = []
    for n in sorted(numbers):
        if found and set(range(found[-1][1] + 1, n)) <= blank:
            found[-1][1] = n
        else:
            found.append([n, n])
    return found
