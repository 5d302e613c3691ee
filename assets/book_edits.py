"""Which item of a walk writes which line: how the files of a step grow out of those before it."""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import book_hunks  # noqa: E402
import lessons  # noqa: E402

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
    before, after = lessons.source(old) if old and old.exists() else [], lessons.source(step / file)
    changes = [(*owner(step, item, file, hunk), hunk) for item, hunk in hunks_of(step, file)]
    found, at, gap = [], 1, 0  # at: the next line of the old file; gap: its distance to the new one
    for item, shot, hunk in changes:
        found += [Line(before[n - 1], n, n + gap) for n in range(at, hunk.old.start)]
        found += [Line(before[n - 1], n, None, item, shot) for n in hunk.old]
        found += [Line(after[n - 1], None, n, item, shot) for n in hunk.new]
        at, gap = hunk.old.stop, hunk.new.stop - hunk.old.stop
    for line, after in reversed([*zip(found, found[1:], strict=False)]):
        if line.old is None and after.old is None and not line.text.strip():
            line.item, line.shot = after.item, after.shot  # a blank line comes with the next one
    return found + [Line(before[n - 1], n, n + gap) for n in range(at, len(before) + 1)]


def hunks_of(step, file):
    """(item or None, hunk) of a file, from its top on."""
    found = [(item, hunk) for item, name, hunk in book_hunks.hunks_by_item(step) if name == file]
    return sorted(found, key=lambda entry: (entry[1].new.start, entry[1].old.start))


def owner(step, item, file, hunk):
    """(index of the item in the walk, its shot). What no item shows comes untyped, without a shot,
    with the first item that touches the file.
    """
    walk = lessons.walk(step)
    if item is None:
        touching = (i for i, one in enumerate(walk) if any(p.file == file for p in one.pieces))
        return next(touching, 0), None
    index = next(i for i, one in enumerate(walk) if one is item)
    place = range(hunk.new.start - (not hunk.new), hunk.new.stop + (not hunk.new))
    for number, shot in enumerate(shots(step, index)):
        for piece in shot.pieces if shot.file == file else ():
            if set(place) & set(piece.lines):
                return index, number
    raise AssertionError(f"{step.name}/{file}: no piece of item {item.title} shows {hunk}")


def lit(step, index, shot):
    """The lines that a shot shows, as numbers in the file once its item is written: [[1, 9], …]."""
    file = lines(step, shot.file)
    shown = set().union(*(shown_by(piece, file) for piece in shot.pieces))
    numbers, blank, number = set(), set(), 0
    for place, line in enumerate(file):
        if line.is_there(index):
            number += 1
            if not line.text.strip():
                blank.add(number)
            if place in shown:
                numbers.add(number)
    return ranges(numbers, blank)


def shown_by(piece, file):
    """The places in a file of what a piece shows: all of it, or its changes and lines around."""
    inside, new = set(), 1  # new: the number that a deleted line would have
    for place, line in enumerate(file):
        new = line.new or new
        if new in piece.lines:
            inside.add(place)
        new += line.new is not None
    if piece.kind == "code":
        return inside
    near = {
        place + i for place in inside if file[place].changes for i in range(-CONTEXT, CONTEXT + 1)
    }
    return inside & near | {min(inside)}


def ranges(numbers, blank):
    """Sorted numbers as [[first, last], …]; blank lines between two of them do not part them."""
    found = []
    for n in sorted(numbers):
        if found and set(range(found[-1][1] + 1, n)) <= blank:
            found[-1][1] = n
        else:
            found.append([n, n])
    return found
