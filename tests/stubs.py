"""What a reader's folder of a step begins with: the files of the step before, and stubs.

A stub is a function of the walk with its head, its docstring and a line that raises. What holds no
lesson (flags, checks of arguments, formulas of traffic, imports) is there whole. A definition that
a step changes stays that of the reader's step before, for the reader to change.
"""

import ast
import re

import lessons
from definitions import definitions_in

MARK = re.compile(r'raise NotImplementedError\("(\S+) item (\d+), ')


def lay(ours, start, own):
    """Fill a reader's folder of a step: `start`, of the step before, and what the next one brings.

    ours: our folder of the step. start: the folder to begin with, None for step 1. own: an empty
    folder.
    """
    for path in start.glob("*.py") if start else ():
        (own / path.name).write_text(path.read_text())
    old = lessons.before(ours)
    for path in sorted(ours.glob("*.py")):
        past = old / path.name if old else None
        is_there = past is not None and past.exists()
        if is_there and past.read_text() == path.read_text() and (own / path.name).exists():
            continue
        whole = lessons.is_no_lesson(path) or path.name in later(ours)
        text = path.read_text() if whole else stubbed(path, lessons.walk(ours))
        if is_there and not lessons.is_no_lesson(path):
            text = with_imports((own / path.name).read_text(), path.read_text())
        (own / path.name).write_text(text)


def later(ours):
    """{file: its first milestone} of files that are shown only after the last one of README.md.

    The program needs them before: they are laid whole. What a milestone is about becomes stubs when
    it begins, and what comes after it stays ours until then.
    """
    walk = lessons.walk(ours)
    last = max(item.milestone for item in walk if item.page == "README.md")
    first = {}
    for item in walk:
        for piece in item.pieces:
            first.setdefault(piece.file, item.milestone)
    past = lessons.before(ours)
    new = {name for name in first if not (past and (past / name).exists())}
    return {name: first[name] for name in sorted(new) if first[name] > last}


# --- a new file -----------------------------------------------------------------------------------


def stubbed(path, walk):
    """The text of a new file of a step, with the functions of its walk to be written."""
    lines, found = path.read_text().splitlines(), {}
    for item in walk:
        for piece in item.pieces:
            if piece.file == path.name:
                for node in functions_of(path.read_text()):
                    if node.lineno in piece.lines:
                        found.setdefault(node.lineno, (node, item))
    for _, (node, item) in sorted(found.items(), reverse=True):
        put_stub(lines, node, item)
    return "\n".join(lines) + "\n"


def later_milestones(ours):
    """The milestones about files that `later` names, in order."""
    files = later(ours)
    found = {i.milestone for i in lessons.walk(ours) for p in i.pieces if p.file in files}
    return sorted(found)


def stubbed_for(milestone, ours, file, mine):
    """The text of a reader's file, in which the functions of one milestone are to be written."""
    lines, found = mine.splitlines(), {}
    theirs, here = named((ours / file).read_text()), named(mine)
    for item in lessons.walk(ours):
        for piece in item.pieces if item.milestone == milestone else ():
            for name, node in theirs.items() if piece.file == file else ():
                if node.lineno in piece.lines and name in here:
                    found.setdefault(here[name].lineno, (here[name], item))
    for _, (node, item) in sorted(found.items(), reverse=True):
        put_stub(lines, node, item)
    return "\n".join(lines) + "\n"


def named(text):
    """{"name" or "Class.name": function} of a file."""
    return {
        name: node
        for name, lines in definitions_in(text).items()
        for node in functions_of(text)
        if (name.split(".")[-1], lines[-1]) == (node.name, node.end_lineno)
    }


def put_stub(lines, node, item):
    """Replace a function's body, all but its docstring, by a line that raises."""
    first, start = node.body[0], node.body[0].lineno
    if is_text(first):
        start = first.end_lineno + 1
        if len(node.body) == 1:
            return
    indent = " " * (node.col_offset + 4)
    stub = [f'{indent}raise NotImplementedError("{item.page} item {item.number}, {item.title}")']
    if start == node.lineno:  # the body stands beside its head
        stub.insert(0, lines[start - 1][: first.col_offset].rstrip())
    lines[start - 1 : node.end_lineno] = stub


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def functions_of(text):
    """The functions and methods of a file, without those within them."""
    found, todo = [], list(ast.parse(text).body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, ast.FunctionDef):
            found.append(node)
        elif isinstance(node, ast.ClassDef | ast.If | ast.Try):
            todo += node.body + getattr(node, "orelse", [])
    return found


def left_in(text):
    """The items, (page, number), whose stubs are still in a text."""
    return {(page, int(number)) for page, number in MARK.findall(text)}


# --- a file that is there already -----------------------------------------------------------------


def with_imports(mine, ours):
    """A reader's file with the imports of ours that it lacks, after its own."""
    tree, lines = ast.parse(mine), mine.splitlines()
    own = imports_of(tree)
    known = {name for node in own for name in bound(node)}
    new = [n for n in imports_of(ast.parse(ours)) if not bound(n) <= known]
    end = own[-1].end_lineno if own else 0
    lines[end:end] = [line for n in new for line in segment(ours, n)]
    return "\n".join(lines) + "\n"


def imports_of(tree):
    return [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


def bound(node):
    """What an import makes known: (name, where it is from)."""
    module = getattr(node, "module", None)
    return {(alias.asname or alias.name, module or alias.name) for alias in node.names}


def segment(text, node):
    return text.splitlines()[node.lineno - 1 : node.end_lineno]
