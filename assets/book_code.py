"""Pages that show a file of the repository, with numbers at its lines, and the lists of a step.

A file that several steps share has one page, in the step that brings it.
"""

import html
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import lessons  # noqa: E402
from book_markdown import coloured, marked  # noqa: E402

LANGUAGES = {".py": "python", ".json": "json", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml"}


@cache
def home(path):
    """The file that has this text first: an earlier step's, if no step since has changed it."""
    while is_of_step(path) and lessons.before(path.parent):
        older = lessons.before(path.parent) / path.name
        if not older.exists() or older.read_bytes() != path.read_bytes():
            break
        path = older
    return path


def is_of_step(path):
    return path.parent in lessons.steps()


def own_files(step):
    """The Python files that a step brings or changes."""
    return [path for path in sorted(step.glob("*.py")) if home(path) == path]


@cache
def coloured_file(path):
    """The lines of a file as HTML."""
    language = LANGUAGES.get(path.suffix, "bash" if path.name == "run" else "text")
    return coloured(path.read_text(), language)


def numbered(path):
    """A file as HTML; each line has a name, L13."""
    lines = [f'<span id="L{n}">{line}</span>' for n, line in enumerate(coloured_file(path), 1)]
    return f'<div class="highlight source"><pre><code>{"".join(lines)}</code></pre></div>\n'


def source_page(path, link):
    """The page of a file. `link(path, words)` is a link to another page of the book."""
    where = [html.escape(path.name)]
    if is_of_step(path):
        where = [link(path.parent / "README.md", title(path.parent)),
                 link(path.parent / "files", "files"), *where]  # fmt: skip
    history = f"<p>{said(path, link)}</p>\n" if is_of_step(path) else ""
    crumbs = f'<p class="crumbs">{" / ".join(where)}</p>\n'
    return f"{crumbs}<h1><code>{html.escape(path.name)}</code></h1>\n{history}{numbered(path)}"


def said(path, link):
    """Which steps have a file as it is, and where it was another one."""
    step, number = path.parent, lessons.step_number(path.parent)
    same = [s for s in lessons.steps() if (s / path.name).exists() and home(s / path.name) == path]
    last = lessons.step_number(same[-1])
    changed = lessons.before(step) and (lessons.before(step) / path.name).exists()
    words = f"Step {number} {'changes' if changed else 'brings'} this file"
    words += f", and the steps up to {last} have it as it is." if last > number else "."
    if changed:
        words += f" See {link(step / 'changes', 'what it changes')}."
    return words


def title(step):
    return f"Step {lessons.step_number(step)}"


def files_page(step, link):
    """The list of a step's files: what each is for, and where it comes from."""
    rows = []
    for path in sorted(step.glob("*.py")):
        first = home(path)
        old = lessons.before(step) and (lessons.before(step) / path.name).exists()
        what = (
            f"as in step {lessons.step_number(first.parent)}" if first != path
            else "changed" if old else "new"
        )  # fmt: skip
        name = link(first, f"<code>{path.name}</code>")
        rows.append((first != path, name, what, len(lessons.source(path)), purpose(path)))
    rows.sort(key=lambda row: row[0])
    cells = "".join(
        f"<tr{' class=same' if same else ''}><td>{name}</td><td>{what}</td>"
        f'<td style="text-align:right">{count}</td><td>{use}</td></tr>\n'
        for same, name, what, count, use in rows
    )
    return (
        f"<h1>The files of step {lessons.step_number(step)}</h1>\n"
        '<div class="table"><table class="data files"><thead><tr><th>file</th><th>what</th>'
        '<th style="text-align:right">lines</th><th>its first words</th></tr></thead>\n'
        f"<tbody>{cells}</tbody></table></div>\n"
    )


def purpose(path):
    """The first line of a file's docstring."""
    first = next((line for line in lessons.source(path) if line.startswith('"""')), "")
    return marked(first.strip('"'))
