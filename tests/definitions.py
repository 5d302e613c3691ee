"""Where the functions, classes and variables of a Python file stand."""

import ast


def definitions_in(text):
    """{name: range of lines, counted from 1} of Python code.

    A name is that of a function, class or variable, `Class.method`, `Class.head` (all before its
    first method), or the file's own `docstring` or `imports`. The comment above a definition
    belongs to it.
    """
    tree, lines, found = ast.parse(text), text.splitlines(), {}

    def add(name, first, last):
        while first > 1 and lines[first - 2].lstrip().startswith("#"):  # the comment above it
            first -= 1
        found.setdefault(name, range(first, last + 1))

    def visit(body, prefix):
        for node in body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = getattr(node, "targets", None) or [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            for name in names:
                add(prefix + name, first, node.end_lineno)
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                starts = [min([m.lineno, *(d.lineno for d in m.decorator_list)]) for m in methods]
                end = min(starts, default=node.end_lineno + 1) - 1
                while not lines[end - 1].strip():
                    end -= 1
                add(f"{prefix}{node.name}.head", first, end)
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.If | ast.Try):
                visit([*node.body, *node.orelse], prefix)

    visit(tree.body, "")
    if ast.get_docstring(tree):
        add("docstring", 1, tree.body[0].end_lineno)
    if imports := [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]:
        add("imports", imports[0].lineno, imports[-1].end_lineno)
    return found
