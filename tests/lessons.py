"""Put the real code into the lessons, and say what of a step no lesson shows.

python tests/lessons.py write          renew the code and the tables of changes in every page, and
                                       the code tours that an editor plays (.tours/)
python tests/lessons.py check          prove that the pages keep the rules
python tests/lessons.py shown 4        which of the lines that step 4 adds its pages do not show
python tests/lessons.py walk 4         the walk through step 4 as a list

A page of a step is its README.md or another .md file beside it, COSTS.md apart. Under the heading
"The code" it has milestones (`### Milestone 1: …`), each with items (`#### 1. …`). In an item

    <!-- code tensor_parallel.py: AllReduce, PLAN -->     definitions of a file, as they stand there
    <!-- diff train.py: setup -->                         what the step changes in one

are followed by the lines that `write` puts there, up to `<!-- end -->`. A name is that of a
function, class or variable, `Class.method`, `Class.head` (all before its first method), or the
file's own `docstring` or `imports`.
"""

import argparse
import ast
import re
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import chain
from definitions import definitions_in
from tours import tour

ROOT = Path(__file__).resolve().parents[1]
NO_LESSON = {"flags.py", "errors.py", "presets.py"}  # and traffic*.py
LEAST_SHOWN = {9: 80, 10: 80}  # percent of a README; 90 in the other steps, 80 on other pages
MOST_WORDS = 1500
SECTIONS = ["Why", "The idea", "By hand", "What changes", "The code", "Run it", "Check yourself",
            "Takeaways", "The same with the library", "Read more"]  # fmt: skip
DIRECTIVE = re.compile(r"(<!-- (code|diff) (\S+\.py): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- chain:begin -->\n).*?(<!-- chain:end -->)", re.DOTALL)
HUNK = re.compile(r"^@@ -\d+(?:,\d+)? \+(\d+)(?:,(\d+))? @@", re.MULTILINE)


class LessonError(Exception):
    """What the user is told, in one line."""


@dataclass
class Piece:
    """Lines of a file that an item shows."""

    kind: str  # code or diff
    file: str
    name: str
    lines: range  # of the file, counted from 1
    text: str


@dataclass
class Item:
    """One thing to write: its code, and one explanation."""

    page: str
    milestone: int
    milestone_title: str
    number: int
    title: str
    pieces: list = field(default_factory=list)
    explanation: str = ""


# --- the code of a step ---------------------------------------------------------------------------


def step_number(step):
    return int(re.match(r"step(\d+)_", step.name)[1])


@cache
def steps():
    """The folders of the steps, in order."""
    return sorted(ROOT.glob("step[0-9]*_*"), key=step_number)


def step_of(number):
    for step in steps():
        if step_number(step) == number:
            return step
    raise LessonError(f"there is no step {number}: choose one of 1 to {len(steps())}")


def before(step):
    """The folder of the step before, None for the first."""
    return steps()[step_number(step) - 2] if step_number(step) > 1 else None


@cache
def source(path):
    return path.read_text().splitlines()


@cache
def definitions(path):
    """{name: range of lines} of a Python file: functions, classes, methods and variables."""
    return definitions_in("\n".join(source(path)))


def lines_of(path, name):
    if name not in definitions(path):
        raise LessonError(f"{path.parent.name}/{path.name} defines no {name}")
    return definitions(path)[name]


def git_diff(old, new, context):
    """What `git diff` says of two files, without its head; the old one may be None."""
    command = ["git", "diff", "--no-index", "--diff-algorithm=histogram", f"-U{context}"]
    done = subprocess.run([*command, old or "/dev/null", new], capture_output=True, text=True)
    return done.stdout[done.stdout.find("@@ ") :] if "@@ " in done.stdout else ""


@cache
def added(path):
    """The numbers of the lines that a step adds to, or changes in, a file."""
    previous = before(path.parent) and before(path.parent) / path.name
    if previous is None or not previous.exists():
        return set(range(1, len(source(path)) + 1))
    hunks = HUNK.findall(git_diff(previous, path, 0))
    return {n for start, count in hunks for n in range(int(start), int(start) + int(count or 1))}


def is_no_lesson(path):
    return path.name in NO_LESSON or path.name.startswith("traffic")


@cache
def lesson_lines(path):
    """The added lines that a lesson should show: no import, blank line or check of arguments."""
    if is_no_lesson(path):
        return set()
    left = {n for n in added(path) if source(path)[n - 1].strip()}
    for node in ast.walk(ast.parse("\n".join(source(path)))):
        is_check = isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
        if is_check or isinstance(node, ast.Import | ast.ImportFrom):
            left -= set(range(node.lineno, node.end_lineno + 1))
    return left


# --- the pages of a step --------------------------------------------------------------------------


def pages(step):
    """README.md first, then the step's other pages."""
    others = sorted(p for p in step.glob("*.md") if p.name not in ("README.md", "COSTS.md"))
    return [step / "README.md", *others]


def shown_code(path, name):
    lines = lines_of(path, name)
    return lines, "\n".join(source(path)[lines.start - 1 : lines.stop - 1])


def shown_diff(path, name):
    """What a step changes in a definition, with two lines around each change."""
    lines, hunks, number = lines_of(path, name), [], 0
    old = before(path.parent) and before(path.parent) / path.name
    for line in git_diff(old, path, 2).splitlines():
        if head := HUNK.match(line):
            number = int(head[1])
            hunks.append([])
            continue
        if number in lines:
            hunks[-1].append(line)
        number += not line.startswith("-")
    hunks = [hunk for hunk in hunks if any(line[0] in "+-" for line in hunk)]
    if not hunks:
        raise LessonError(f"{path.parent.name}/{path.name} does not change {name}")
    first = " " + source(path)[lines[0] - 1]  # says what these lines belong to
    if first not in hunks[0] and "+" + first[1:] not in hunks[0] and len(first) > 1:
        hunks.insert(0, [first])
    return lines, "\n    ...\n".join("\n".join(hunk) for hunk in hunks)


def filled(step, kind, file, names):
    """The pieces of a directive, and the text between it and its end."""
    path, pieces = step / file, []
    if not path.exists():
        raise LessonError(f"{step.name} has no {file}")
    for name in re.split(r",\s*", names):
        lines, text = (shown_diff if kind == "diff" else shown_code)(path, name)
        pieces.append(Piece(kind, file, name, lines, text))
    gap = "\n\n" if kind == "diff" or any("." in p.name for p in pieces) else "\n\n\n"
    body = gap.join(piece.text for piece in pieces)
    links = ", ".join(f"[{place(p.lines)}]({file}#L{p.lines[0]}-L{p.lines[-1]})" for p in pieces)
    language = "diff" if kind == "diff" else "python"
    return pieces, f"```{language}\n{body}\n```\n\n`{file}`, {links}\n"


def place(lines):
    return f"line {lines[0]}" if len(lines) == 1 else f"lines {lines[0]} to {lines[-1]}"


def renewed(page):
    """The text of a page with the code and the table as they should be."""
    step, text = page.parent, page.read_text()

    def put(match):
        return match[1] + filled(step, *match.group(2, 3, 4))[1] + match[5]

    text = TABLE.sub(lambda match: f"{match[1]}\n{changes(step)}\n\n{match[2]}", text)
    return DIRECTIVE.sub(put, text)


def changes(step):
    """The table of a step: which modules are new, changed, deleted, with the lines."""
    old, new = (
        {p.name: p.read_bytes() for p in s.glob("*.py")} if s else {} for s in (before(step), step)
    )
    rows = {"new": [], "changed": [], "deleted": []}
    for file in sorted({*old, *new}):
        if old.get(file) != new.get(file):
            what, plus, minus = chain.change(old.get(file), new.get(file))
            rows[what].append(f"| `{file}` | {what} | {plus} | {minus} |")
    same = ", ".join(f"`{file}`" for file in sorted(new) if old.get(file) == new[file])
    last = [f"| {same} | unchanged | | |"] if same else []
    head = ["| file | what | added | deleted |", "|---|---|---:|---:|"]
    return "\n".join([*head, *rows["new"], *rows["changed"], *rows["deleted"], *last])


@cache
def walk(step):
    """The items of all pages of a step, in the order of the milestones, which all pages share."""
    items = [item for page in pages(step) for item in items_of(page)]
    return sorted(items, key=lambda item: item.milestone)


def items_of(page):
    code = re.search(r"^## The code\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
    items, milestone, title = [], 0, ""
    for part in re.split(r"^(?=#{3,4} )", code[1] if code else "", flags=re.M):
        head, _, body = part.partition("\n")
        if found := re.match(r"### Milestone (\d+): (.+)", head):
            milestone, title = int(found[1]), found[2]
        elif found := re.match(r"#### (\d+)\. (.+)", head):
            item = Item(page.name, milestone, title, int(found[1]), found[2])
            for directive in DIRECTIVE.finditer(body):
                item.pieces += filled(page.parent, *directive.group(2, 3, 4))[0]
            item.explanation = DIRECTIVE.sub("", body).strip()
            items.append(item)
    return items


def not_shown(step):
    """{file: numbers of the lines} that a step adds and none of its pages shows."""
    seen = {}
    for piece in (piece for item in walk(step) for piece in item.pieces):
        seen.setdefault(piece.file, set()).update(piece.lines)
    return {
        path.name: lesson_lines(path) - seen.get(path.name, set())
        for path in sorted(step.glob("*.py"))
        if lesson_lines(path)
    }


def share_shown(page):
    """Percent of the lines to be shown of the files that a page walks through."""
    files = {piece.file for item in items_of(page) for piece in item.pieces}
    missing = not_shown(page.parent)
    due = sum(len(lesson_lines(page.parent / file)) for file in files)
    left = sum(len(missing.get(file, ())) for file in files)
    return 100 * (due - left) / due if due else 100.0


def words(page):
    """The number of words of a page's prose: without code, comments and the table of changes."""
    text = TABLE.sub("", DIRECTIVE.sub("", page.read_text()))
    text = re.sub(r"^( *)```.*?^ *```", "", text, flags=re.M | re.S)
    labels = r"<summary>.*?</summary>|<!--.*?-->|</?\w+>|\]\([^)]*\)"
    text = re.sub(labels, " ", text, flags=re.S)
    return len(re.findall(r"[^\s|]*\w[^\s|]*", text))


# --- commands -------------------------------------------------------------------------------------


def chosen(number):
    return steps() if number is None else [step_of(number)]


def write(number):
    """Renew the code and the tables in the pages, and the code tours."""
    for page in (page for step in chosen(number) for page in pages(step)):
        if (text := renewed(page)) != page.read_text():
            page.write_text(text)
            print(f"{page.relative_to(ROOT)}  renewed")
    walk.cache_clear()
    for step in chosen(number):
        path, text = tour_of(step)
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(f"{path.relative_to(ROOT)}  renewed")


def tour_of(step):
    """Where a step's code tour is, and its text."""
    return ROOT / ".tours" / f"{step.name}.tour", tour(step, walk(step))


def problems_of(page):
    """Yield what is wrong with a page."""
    least = LEAST_SHOWN.get(step_number(page.parent), 90) if page.name == "README.md" else 80
    share, count = share_shown(page), words(page)
    name = page.relative_to(ROOT)
    print(f"{str(name):40} {share:5.1f} % shown  {count:5} words  {len(items_of(page)):2} items")
    if share < least:
        yield f"{name} shows {share:.1f} % of the lines, {least} are due (see lessons.py shown)"
    if count > MOST_WORDS:
        yield f"{name} has {count} words, {MOST_WORDS} are allowed"
    if renewed(page) != page.read_text():
        yield f"{name} shows old code or an old table: run lessons.py write"
    if page.name == "README.md":
        sections = re.findall(r"^## (.+)$", page.read_text(), re.M)
        if sections != SECTIONS:
            yield f"{name} has the sections {sections}, not {SECTIONS}"
    for number, item in enumerate(items_of(page), 1):
        if item.number != number:
            yield f"{name}: item {item.number} should be number {number}"
        if not (item.milestone and item.pieces and item.explanation):
            yield f"{name}: item {number} lacks a milestone, its code or an explanation"


def check(number):
    """Prove that the pages keep the rules, a line for each, and name what breaks them."""
    problems = [p for step in chosen(number) for page in pages(step) for p in problems_of(page)]
    for step in chosen(number):
        walked = {piece.file for item in walk(step) for piece in item.pieces}
        for file in not_shown(step).keys() - walked:
            problems.append(f"{step.name}/{file}: no page walks through it")
        path, text = tour_of(step)
        if not path.exists() or path.read_text() != text:
            problems.append(f"{path.relative_to(ROOT)} is old: run lessons.py write")
    for problem in problems:
        print(problem)
    if problems:
        raise LessonError(f"{len(problems)} breaches of the rules: mend what is named above")


def shown(number):
    """Print the lines that a step adds and its pages do not show."""
    for step in chosen(number):
        for file, numbers in not_shown(step).items():
            due = len(lesson_lines(step / file))
            print(f"{step.name}/{file}: {due - len(numbers)} of {due} lines shown")
            for n in sorted(numbers):
                print(f"  {n:4}  {source(step / file)[n - 1]}")


def print_walk(number):
    """Print the walk through a step, an item a line."""
    for step in chosen(number):
        for item in walk(step):
            code = ", ".join(f"{piece.file}: {piece.name}" for piece in item.pieces)
            print(f"{item.page} {item.milestone} {item.number:2}. {item.title} ({code})")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    functions = {"write": write, "check": check, "shown": shown, "walk": print_walk}
    for name, function in functions.items():
        sub = commands.add_parser(name, help=function.__doc__)
        sub.add_argument("number", metavar="N", type=int, nargs="?", help="the step; default: all")
        sub.set_defaults(function=function)
    args = parser.parse_args()
    args.function(args.number)


if __name__ == "__main__":
    try:
        main()
    except LessonError as error:
        sys.exit(f"error: {error}")
