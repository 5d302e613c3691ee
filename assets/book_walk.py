"""The walk player's part of a page, and its data: how the items of a page write its code.

What a page's data script holds is said in `data`. The player is assets/web/walk.js.
"""

import functools
import html
import json
import re
import sys
from pathlib import Path

from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import book_code  # noqa: E402
import book_edits  # noqa: E402
import lessons  # noqa: E402
from book_markdown import Document, colour  # noqa: E402

# Letters of no language stand where a colour begins, END + its number, and END where it ends.
END = 0xE000
COLOURS = ["", "k", "nb", "nd", "nf", "nc", "sd", "s", "m", "c"]  # those of `colour`
HEADING = re.compile(r'(<h4 id="[^"]*">(\d+)\. .*?)(<a class="headerlink")', re.DOTALL)


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
        "colours": COLOURS,
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
        number = COLOURS.index(colour(STANDARD_TYPES.get(kind, "")))
        for again, part in enumerate(value.split("\n")):
            if again:
                lines[-1] += chr(END) * bool(now)
                lines.append("")
                now = 0
            if part.strip() and number != now:
                now = number
                lines[-1] += chr(END + now)
            lines[-1] += part
    return lines[:-1]


def plain(line):
    """A line without its marks."""
    return re.sub(f"[{chr(END)}-{chr(END + len(COLOURS))}]", "", line)


# --- words ----------------------------------------------------------------------------------------


def explained(text, step):
    """The HTML of an explanation, with links to the book's pages."""
    return Document(text).html(lambda link, line: address(link, step))


def address(link, step):
    """Where a link of a lesson leads in the book, seen from the lesson."""
    name, _, part = link.partition("#")
    if not name or re.match(r"[a-z]+:", name):
        return link
    if name.endswith(".md"):
        there = re.sub(r"README\.md$", "index.md", name).removesuffix(".md") + ".html"
    else:
        source = book_code.home((step / name).resolve())
        there = f"../{source.parent.name}/files/{source.name}.html"
    return f"{there}#{part}" if part else there


def inline(text):
    """The HTML of a few words."""
    return explained(text, ROOT).strip().removeprefix("<p>").removesuffix("</p>")


# --- a page ---------------------------------------------------------------------------------------


def data_name(page):
    return f"walk_{lessons.step_number(page.parent)}_{page.stem}"


@functools.cache
def pages():
    """All pages with items."""
    found = (page for step in lessons.steps() for page in lessons.pages(step))
    return [page for page in found if re.search(r"^#### 1\. ", page.read_text(), re.M)]


def with_player(text, page):
    """A page's HTML with the player at the head of The code, where the page has items."""
    if page not in pages():
        return text
    options = html.escape(json.dumps({"data": data_name(page)}))
    player = f'<div id="walk" class="walk" data-widget="walk" data-options="{options}"></div>'
    return re.sub(r'<h2 id="the-code">.*\n', lambda m: f"{m[0]}{player}\n", text, count=1)


def with_links(text):
    """A page's HTML with a link from each item's heading to the player, where the page has one."""
    if 'data-widget="walk"' not in text:
        return text
    return HEADING.sub(
        r'\1<a class="walk-link" href="#walk?item=\2&amp;play=yes" title="Play item \2">play'
        r'<span class="walk-hidden"> item \2</span></a>\3',
        text,
    )


DATA = {data_name(page): functools.partial(data, page) for page in pages()}
