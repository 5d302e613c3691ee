"""How far a reader's own version of a step has come, by the walk of its lesson."""

import ast
import re
from pathlib import Path

import lessons


def missing(own):
    """The first item of the walk that is not there yet: (its milestone, a sentence), or None.

    own: the folder of a reader's step, called like ours.
    """
    ours = lessons.step_of(lessons.step_number(own))
    if files := not_copied(own, ours):
        needs = f"Step {lessons.step_number(ours)} needs {', '.join(files)} of {ours.name}."
        return 1, f"{needs} They hold no lesson: copy them."
    for item in lessons.walk(ours):
        for piece in item.pieces:
            if lack := lack_of(own, ours, piece):
                where = f"{ours.name}/{item.page}, item {item.number}, “{item.title}”"
                return item.milestone, f"{lack} Read {where}."
    return None


def not_copied(own, ours):
    """The files without a lesson that are new or changed in our step, and not yet in another."""
    old = lessons.before(ours)
    files = [path for path in sorted(ours.glob("*.py")) if lessons.is_no_lesson(path)]
    there = {p.name: p.read_text() for p in own.glob("*.py")}
    past = {p.name: p.read_text() for p in old.glob("*.py")} if old else {}
    changed = [path.name for path in files if path.read_text() != past.get(path.name)]
    return [f"`{name}`" for name in changed if there.get(name) == past.get(name)]


def lack_of(own, ours, piece):
    """A sentence about what of a piece of the walk a reader's version lacks; None if nothing."""
    step, path = f"Step {lessons.step_number(ours)}", own / piece.file
    name = re.sub(r"\.head$", "", piece.name)
    what = f"`{piece.file}`" + (f" with `{name}`" if name != "docstring" else "")
    if not path.is_file():
        return f"{step} needs {what}; it is not there yet."
    try:
        found = lessons.definitions(path)
    except SyntaxError as error:
        return f"`{piece.file}`, line {error.lineno}: {error.msg}. Python can't read the file."
    if name == "docstring":
        return None
    if name not in found:
        return f"{step} needs {what}; it is not there yet."
    old = lessons.before(ours)
    if piece.kind == "diff" and text_of(path, name) == text_of(old / piece.file, name):
        return f"{step} changes `{name}` in `{piece.file}`; it is still that of {old.name}."
    return None


def syntax_error(path):
    """`FILE, line N: what` of a file that Python can't read; None otherwise."""
    try:
        ast.parse(path.read_text())
    except SyntaxError as error:
        return f"{path.name}, line {error.lineno}: {error.msg}"
    return None


def text_of(path, name):
    """The lines of a definition; None where the file, or the name in it, is not there."""
    if not path.is_file() or name not in lessons.definitions(path):
        return None
    lines = lessons.lines_of(path, name)
    return lessons.source(path)[lines.start - 1 : lines.stop - 1]


def titles(own):
    """{number: (title, first item, last item, page)} of the milestones of a step."""
    found = {}
    for item in lessons.walk(lessons.step_of(lessons.step_number(own))):
        title, first, _, page = found.get(
            item.milestone, (item.milestone_title, item.number, 0, "")
        )
        found[item.milestone] = title, first, item.number, page or item.page
    return found


def not_reached(own, number):
    """What a reader is told whose version fails a check of a milestone."""
    title, first, last, page = titles(own)[number]
    step = lessons.step_of(lessons.step_number(own)).name
    items = f"items {first} to {last}" if last > first else f"item {first}"
    return f"Milestone {number}, “{title}”, is not reached. Read {step}/{page}, {items}."


def of(item):
    """The number of the milestone that a test checks; after all of them if it checks none."""
    marker = item.get_closest_marker("milestone")
    return marker.args[1] if marker else 99


def checks(own):
    """The file with the checks of a step's milestones."""
    return Path(__file__).parent / "milestones" / f"test_step{lessons.step_number(own)}.py"
