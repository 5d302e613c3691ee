"""What a reader is told of an item of the walk: the task, and three hints, each one saying more."""

import ast
import re

import lessons
import stubs

HINTS = ("the idea", "the outline", "the lines")


def task(item, ours):
    """What to write: the heads and docstrings of the item's definitions, and who uses them."""
    parts = [part for piece in item.pieces for part in task_of(piece, ours)]
    return "\n".join(parts)


def task_of(piece, ours):
    path = ours / piece.file
    if piece.kind == "diff":
        yield f"In `{piece.file}` change `{piece.name}`." + new_head(piece, ours)
        return
    nodes = [n for n in stubs.functions_of(path.read_text()) if n.lineno in piece.lines]
    if not nodes:
        yield f"In `{piece.file}`: `{piece.name.removesuffix('.head')}`. It is there."
    for node in nodes:
        name = full_name(path, node)
        yield f"In `{piece.file}` write `{name}`:\n\n```python\n{head_of(path, node)}\n```\n"
        if shapes := shapes_in(path, node):
            yield "Shapes: " + ", ".join(f"`{shape}`" for shape in shapes) + ".\n"
        if users := users_of(node.name, ours, path, node):
            yield "Used by " + ", ".join(f"`{user}`" for user in users[:4]) + ".\n"


def new_head(piece, ours):
    """The head of a function that a step changes, where its arguments or docstring differ."""
    heads = []
    for step in (lessons.before(ours), ours):
        path = step / piece.file
        nodes = stubs.functions_of(path.read_text()) if path.exists() else []
        heads.append([head_of(path, n) for n in nodes if full_name(path, n) == piece.name])
    return f"\n\n```python\n{heads[1][0]}\n```\n" if heads[1] and heads[0] != heads[1] else ""


def full_name(path, node):
    """`Class.method` of a method, the name of any other function."""
    found = lessons.definitions(path).items()
    return next(n for n, at in found if node.lineno in at and n.split(".")[-1] == node.name)


def head_of(path, node):
    """A function's lines up to the end of its docstring."""
    lines = path.read_text().splitlines()
    first = node.body[0]
    end = first.end_lineno if stubs.is_text(first) else max(first.lineno - 1, node.lineno)
    return dedent(lines[node.lineno - 1 : end])


def dedent(lines):
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def shapes_in(path, node):
    """The shapes that comments in a function name: `[batch, seq, hidden]`."""
    lines = path.read_text().splitlines()[node.lineno - 1 : node.end_lineno]
    comments = " ".join(line.partition("#")[2] for line in lines)
    return list(dict.fromkeys(re.findall(r"\[[^\[\]]*\w[^\[\]]*\]", comments)))


def users_of(name, ours, home, own):
    """The functions of a step that use a function of a module, without itself: `f in file`."""
    module, users = home.stem, []
    known = re.compile(rf"from {module} import .*\b{name}\b|import {module}\b")
    for path in sorted(ours.glob("*.py")):
        text = path.read_text()
        for node in stubs.functions_of(text) if path == home or known.search(text) else ():
            names = {getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(node)}
            if name in names and (path, node.lineno) != (home, own.lineno):
                users.append(f"{full_name(path, node)} in {path.name}")
    return [] if name.startswith("__") or name in ("forward", "backward") else users


def hint(item, ours, level):
    """The text of a hint, 1 to 3."""
    if level == 1:
        names = dict.fromkeys(name for piece in item.pieces for name in calls_in(piece, ours))
        used = f"\n\nOur lines call {', '.join(f'`{n}`' for n in names)}." if names else ""
        return item.explanation + used
    parts = []
    pieces = [p for p in item.pieces if level == 3 or p.name not in ("docstring", "imports")]
    for piece in pieces or item.pieces:
        lines = piece.text if level == 3 else outline(piece, ours)
        language = "diff" if piece.kind == "diff" and level == 3 else "python"
        parts.append(f"`{piece.file}`:\n\n```{language}\n{lines}\n```")
    return "\n\n".join(parts)


# --- the outline ----------------------------------------------------------------------------------


def new_statements(piece, ours):
    """The statements of a piece that the step adds."""
    new = lessons.added(ours / piece.file) if piece.kind == "diff" else piece.lines
    tree = ast.parse("\n".join(lessons.source(ours / piece.file)))
    return [node for node in statements(tree) if node.lineno in piece.lines and node.lineno in new]


def calls_in(piece, ours):
    """What the new lines of a piece call, as it is written there: `pg.exchange`."""
    nodes = sorted(new_statements(piece, ours), key=lambda node: node.lineno)
    calls = [n for node in nodes for n in ast.walk(node) if isinstance(n, ast.Call)]
    return [ast.unparse(call.func) for call in calls if is_dotted(call.func)]


def is_dotted(node):
    return isinstance(node, ast.Name) or isinstance(node, ast.Attribute) and is_dotted(node.value)


def outline(piece, ours):
    """The lines of a piece without what stands to the right: who is assigned, what is called."""
    lines, shown = lessons.source(ours / piece.file), []
    for node in new_statements(piece, ours):
        shown.append((node.lineno, " " * node.col_offset + sketch(node, lines)))
    if not shown:
        return "# nothing is added here: lines leave"
    first = min(len(text) - len(text.lstrip()) for _, text in shown)
    return "\n".join(text[first:] for _, text in sorted(shown))


def statements(tree):
    return [
        node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not stubs.is_text(node)
    ]


def sketch(node, lines):
    """One line about a statement."""
    calls = [called(n) for n in ast.walk(node) if isinstance(n, ast.Call)]
    by = f"  # with {', '.join(dict.fromkeys(filter(None, calls)))}" if any(calls) else ""
    if isinstance(node, ast.Assign):
        return " = ".join(ast.unparse(target) for target in node.targets) + f" = …{by}"
    if isinstance(node, ast.AugAssign):
        return f"{ast.unparse(node.target)} … …{by}"
    if isinstance(node, ast.Return):
        return f"return …{by}" if node.value else "return"
    if isinstance(node, ast.Expr):
        return f"…{by}"
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return f"raise {called(node.exc)}(…)"
    return lines[node.lineno - 1].strip()  # the head of a loop, a condition, a function


def called(call):
    return getattr(call.func, "attr", getattr(call.func, "id", None))
