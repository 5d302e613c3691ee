"""The walk player's part of a page, and its data: how the items of a page write its code.

What a page's data script holds is said in `data`. The player is assets/web/walk.js.
"""

import functools
import html
import json
import re
import sys
from pathlib import Path

import markdown
from pygments.lexers import PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import book_edits  # noqa: E402
import lessons  # noqa: E402

# Letters of no language stand where a colour begins, END + its number, and END where it ends.
END = 0xE000
COLOURS = {
    1: (Keyword, Operator.Word, Name.Decorator),
    2: (Comment, String.Doc),
    3: (String,),
    4: (Number,),
    5: (Keyword.Constant, Name.Builtin),
    6: (Name.Function, Name.Class, Name.Exception),
}
WRITER = markdown.Markdown(extensions=["tables", "sane_lists", "pymdownx.superfences"])
HEADING = re.compile(r'(<h4 id="[^"]*">(\d+)\. .*?)(</h4>)', re.DOTALL)


# --- the data of a page ---------------------------------------------------------------------------


def data(page):
    """What the player needs for the items of a page.

    files: {name: {what: new or changed, lines before the first item}}. items: each with its shots
    (pieces that one looks at together: file, names, and `lit`, the numbers of their lines when the
    item is written) and its edits. An edit says: in `file`, after `at` lines of those before the
    item, `remove` lines go and the lines `add` come, in shot number `shot`, or untyped without one.
    """
    step, walk = page.parent, lessons.walk(page.parent)
    mine = [index for index, item in enumerate(walk) if item.page == page.name]
    files = [*dict.fromkeys(piece.file for index in mine for piece in walk[index].pieces)]
    begun, items = mine[0] - 1, []
    for done, index in zip([begun, *mine], mine, strict=False):
        items.append(item_data(page, index, files, done))
    old = lessons.before(step)
    return {
        "step": lessons.step_number(step),
        "name": step.name,
        "page": page.name,
        "before": old and old.name,
        "first": begun < 0,
        "files": {
            file: {
                "what": "changed" if old and (old / file).exists() else "new",
                "lines": [text for line, text in marked_lines(step, file) if line.is_there(begun)],
            }
            for file in files
        },
        "items": items,
    }


def item_data(page, index, files, done):
    """An item, where those up to index `done` of the walk are written."""
    step, item = page.parent, lessons.walk(page.parent)[index]
    shots = [
        {
            "file": shot.file,
            "names": [piece.name for piece in shot.pieces],
            "lit": book_edits.lit(step, index, shot),
        }
        for shot in book_edits.shots(step, index)
    ]
    return {
        "number": item.number,
        "title": inline(item.title),
        "milestone": item.milestone,
        "milestone_title": inline(item.milestone_title),
        "explanation": explained(item.explanation, step),
        "shots": shots,
        "edits": [edit for file in files for edit in edits(step, file, done, index)],
    }


def edits(step, file, done, index):
    """What leads from a file after item `done` to the same after item `index`, from its top on."""
    found, at, joins = [], 0, False
    for line, text in marked_lines(step, file):
        was, is_now = line.is_there(done), line.is_there(index)
        if was and is_now:
            joins = False
        elif was or is_now:
            shot = line.shot if line.item == index else None
            if not joins or found[-1].get("shot") != shot:
                found.append({"file": file, "at": at, "remove": 0, "add": []})
                found[-1].update({} if shot is None else {"shot": shot})
            joins = True
            if was:
                found[-1]["remove"] += 1
            else:
                found[-1]["add"].append(text)
        at += was
    return found


def marked_lines(step, file):
    """The lines of a file, before and after a step, each with its text and marks for colours."""
    before = lessons.before(step) and lessons.before(step) / file
    old = marked(before) if before and before.exists() else []
    new = marked(step / file)
    for line in book_edits.lines(step, file):
        yield line, new[line.new - 1] if line.old is None else old[line.old - 1]


@functools.cache
def marked(path):
    """The lines of a Python file with marks where colours begin and end."""
    lines, now = [""], 0
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(path.read_text()):
        for number, part in enumerate(value.split("\n")):
            if number:
                lines[-1] += chr(END) * bool(now)
                lines.append("")
                now = 0
            if part.strip() and colour_of(kind) != now:
                now = colour_of(kind)
                lines[-1] += chr(END + now)
            lines[-1] += part
    return lines[:-1]


@functools.cache
def colour_of(kind):
    """The number of the colour of a kind of token, 0 for that of the text."""
    fitting = [(len(k), n) for n, kinds in COLOURS.items() for k in kinds if kind in k]
    return max(fitting, default=(0, 0))[1]


def plain(line):
    """A line without its marks."""
    return re.sub(f"[{chr(END)}-{chr(END + max(COLOURS))}]", "", line)


# --- words ----------------------------------------------------------------------------------------


def explained(text, step):
    """The HTML of an explanation. A link leads to a page of the book, or is left out."""
    written = WRITER.reset().convert(text)
    return re.sub(r'<a href="([^"]*)">(.*?)</a>', lambda m: link(m[1], m[2], step), written)


def link(target, text, step):
    path, _, anchor = target.partition("#")
    if path.startswith("http") or not path:
        return f'<a href="{target}">{text}</a>'
    if not (path.endswith(".md") and (step / path).exists()):
        return text
    path = re.sub(r"README\.md$", "index.md", path).removesuffix(".md") + ".html"
    return f'<a href="{path}{anchor and "#" + anchor}">{text}</a>'


def inline(text):
    """The HTML of a few words."""
    return WRITER.reset().convert(text).removeprefix("<p>").removesuffix("</p>")


# --- a page ---------------------------------------------------------------------------------------


@functools.cache
def pages():
    """{name of the data: page} of all pages with items."""
    found = [step / item.page for step in lessons.steps() for item in lessons.walk(step)]
    return {data_name(page): page for page in found}


def data_name(page):
    return f"walk_{lessons.step_number(page.parent)}_{page.stem}"


def with_player(text, page):
    """A page's Markdown with the player at the head of The code, where the page has items."""
    if page not in pages().values():
        return text
    options = html.escape(json.dumps({"data": data_name(page)}))
    player = f'<div id="walk" data-widget="walk" data-options="{options}"></div>'
    return re.sub(r"^## The code\n", lambda m: f"{m[0]}\n{player}\n", text, count=1, flags=re.M)


def with_links(text):
    """A page's HTML with a link from each item's heading to the player, where the page has one."""
    if 'data-widget="walk"' not in text:
        return text
    return HEADING.sub(
        r'\1<a class="walk-link" href="#walk?item=\2&amp;play=yes" title="Play item \2">play'
        r'<span class="walk-hidden"> item \2</span></a>\3',
        text,
    )
