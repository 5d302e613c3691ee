"""The page of a step's changes: before and after side by side, folded by the items of its walk."""

import difflib
import sys
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import lessons  # noqa: E402
from book_code import coloured_file, title  # noqa: E402
from book_hunks import Hunk, hunks_by_item  # noqa: E402
from book_markdown import link_to_itself, marked  # noqa: E402
from lessons import before  # noqa: E402

AROUND = 3  # lines that are shown before and after a change


@dataclass
class Place:
    """Hunks of a file with nothing but a few lines between them, shown as one."""

    file: str
    hunks: list = field(default_factory=list)


def changes_page(step, link):
    """What a step changes. `link(path, words)` is a link to another page of the book."""
    number = lessons.step_number(step)
    parts = [f"<h1>What step {number} changes</h1>\n{introduction(step, link)}"]
    several = len(lessons.pages(step)) > 1
    milestone = None
    for item, entries in groupby(hunks_by_item(step), key=lambda entry: id(entry[0])):
        entries = list(entries)
        item = entries[0][0]
        at = item and (item.milestone, item.milestone_title)
        if at != milestone:
            words = f"Milestone {at[0]}: {at[1]}" if at else "In no item"
            anchor = f"milestone-{at[0]}" if at else "in-no-item"
            parts.append(f'<h2 id="{anchor}">{marked(words)}{link_to_itself(anchor)}</h2>\n')
            if not at:
                parts.append("<p>No page of the lesson walks through these lines.</p>\n")
            milestone = at
        if item:
            parts.append(folded(step, item, entries, link, several))
        else:
            for file, of_file in groupby(entries, key=lambda entry: entry[1]):
                parts.append(fold(file, f"<code>{file}</code>", step, list(of_file), "", link))
    return "".join(parts)


def introduction(step, link):
    lesson = link(step / "README.md", "The lesson")
    if not before(step):
        return (
            f"<p>Step 1 comes after no other: here is its whole code, in the order of the lesson. "
            f"{lesson} explains it.</p>\n"
        )
    older = link(before(step) / "README.md", title(before(step)).lower())
    return (
        f"<p>The code of {older} at the left, that of {title(step).lower()} at the right, in the "
        f"order in which the lesson shows the changes. {lesson} explains each of them.</p>\n"
        '<p><button type="button" class="open-all" hidden>Open all</button></p>\n'
    )


def anchor_of(item):
    """What the address of an item's changes ends with."""
    return f"{item.page.removesuffix('.md').lower()}-{item.number}"


def folded(step, item, entries, link, several):
    words = f"{item.number}. {marked(item.title)}"
    page = step / item.page
    name = "the lesson" if item.page == "README.md" else item.page
    words_of_link = f"item {item.number} of {name}"
    said = f'<p class="where">Explained in {link(page, words_of_link, heading(item))}.</p>\n'
    if several and item.page != "README.md":
        words += f' <span class="page">{item.page}</span>'
    return fold(anchor_of(item), words, step, entries, said, link)


def heading(item):
    """The words of an item's heading in its page."""
    return f"{item.number}. {item.title}".replace("`", "")


def fold(anchor, words, step, entries, said, link):
    plus = sum(len(hunk.new) for _, _, hunk in entries)
    minus = sum(len(hunk.old) for _, _, hunk in entries)
    counts = [f'<span class="plus">+{plus}</span>'] if plus else []
    counts += [f'<span class="minus">−{minus}</span>'] if minus else []
    body = "".join(place_html(step, place, link) for place in places(step, entries))
    return (
        f'<details class="change" id="{anchor}"><summary><span class="name">{words}</span> '
        f'<span class="counts">{" ".join(counts)}</span></summary>\n{said}{body}</details>\n'
    )


def places(step, entries):
    """Hunks that lie close together in a file, as one place."""
    found = []
    for _, file, hunk in entries:
        last = found[-1] if found else None
        if (
            last
            and last.file == file
            and 0 <= hunk.new.start - last.hunks[-1].new.stop <= 2 * AROUND
        ):
            last.hunks.append(hunk)
        else:
            found.append(Place(file, [hunk]))
    return found


def place_html(step, place, link):
    """A place as rows of two cells, before and after."""
    old, new = sources(step, place.file)
    taken = taken_lines(step, place.file)
    rows = []
    for i, hunk in enumerate(place.hunks):
        stop = place.hunks[i - 1].new.stop if i else max(1, hunk.new.start - AROUND)
        above = range(hunk.new.start - 1, stop - 1, -1)
        rows += reversed(context(above, hunk.old.start - hunk.new.start, taken))
        rows += pairs(hunk, old, new)
    below = range(hunk.new.stop, min(len(new) + 1, hunk.new.stop + AROUND))
    rows += context(below, hunk.old.stop - hunk.new.stop, taken)
    first, last = place.hunks[0], place.hunks[-1]
    where = range(first.new.start, max(last.new.stop, first.new.start + 1))
    path = step / place.file if new else before(step) / place.file
    words = lessons.place(where) if new else "the file is gone"
    head = link(path, f"<code>{place.file}</code>, {words}", where if new else None)
    kind = "both" if any(h.old for h in place.hunks) and any(h.new for h in place.hunks) else "one"
    lines = "".join(row_html(step, place.file, row, kind) for row in rows)
    return f'<p class="where">{head}</p>\n<div class="highlight hunk {kind}">{lines}</div>\n'


def sources(step, file):
    """The lines of a file before and after, none where it is not."""
    previous = before(step)
    old = lessons.source(previous / file) if previous and (previous / file).exists() else []
    return old, lessons.source(step / file) if (step / file).exists() else []


@cache
def taken_lines(step, file):
    """The lines that go or come, ("before", 3) or ("after", 4): they are no context of a change."""
    hunks = [hunk for _, name, hunk in hunks_by_item(step) if name == file]
    gone = {("before", n) for hunk in hunks for n in hunk.old}
    return gone | {("after", n) for hunk in hunks for n in hunk.new}


def context(numbers, shift, taken):
    """Rows of lines that both files have, up to the first that one has not."""
    rows = []
    for n in numbers:
        if ("after", n) in taken or ("before", n + shift) in taken:
            break
        rows.append((n + shift, n, "same"))
    return rows


def pairs(hunk: Hunk, old, new):
    """The rows of a hunk, (old line, new line, "changed"): lines that are alike stand together."""
    gone = [old[n - 1].strip() for n in hunk.old]
    come = [new[n - 1].strip() for n in hunk.new]
    while come and not come[-1] and not gone:  # empty lines behind what comes
        come.pop()
    rows, i, j = [], 0, 0
    for a, b in [*alike(gone, come), (len(gone), len(come))]:
        rows += [(n, None, "changed") for n in hunk.old[i:a]]
        rows += [(None, n, "changed") for n in hunk.new[j:b]]
        if a < len(gone):
            rows.append((hunk.old[a], hunk.new[b], "changed"))
        i, j = a + 1, b + 1
    return rows


def alike(gone, come):
    """Pairs of places, in order, of lines that resemble each other."""
    found, start = [], 0
    for i, line in enumerate(gone):
        scores = [
            (difflib.SequenceMatcher(None, line, other).ratio(), -j)
            for j, other in enumerate(come[start:], start)
            if line and other
        ]
        if scores and max(scores)[0] > 0.6:
            start = -max(scores)[1] + 1
            found.append((i, start - 1))
    return found


def row_html(step, file, row, kind):
    """A row: what was there and what is; one cell if the lines only go or only come."""
    old, new, what = row
    if kind == "one":
        return cell(step, file, new, "b", what) if new else cell(before(step), file, old, "a", what)
    return cell(before(step), file, old, "a", what) + cell(step, file, new, "b", what)


def cell(folder, file, number, side, what):
    """A line of a file, at the side a (before) or b (after)."""
    if number is None:
        return f'<code class="{side} none"></code>'
    line = coloured_file(folder / file)[number - 1].rstrip("\n")
    sign = {"a": "−", "b": "+"}[side] if what == "changed" else " "
    indent = len(line) - len(line.lstrip())  # what does not fit in a line goes on with its indent
    style = f' style="--in:{indent}ch"' if indent else ""
    return f'<code class="{side} {what}" data-n="{number} {sign}"{style}>{line}</code>\n'
