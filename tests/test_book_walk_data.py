"""The walk player's data: edits that lead from the files of one step to those of the next."""

import json
import re
import sys
from functools import cache

import lessons
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "assets"))
import book_edits  # noqa: E402
import book_walk  # noqa: E402

PAGES = book_walk.pages()


@cache
def data(page):
    """That of a page, without colours, which cost most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book_walk, "marked", lessons.source)
        return book_walk.data(page)


def states(made):
    """The files of a page before its first item and after each: [{name: lines}]."""
    files = {name: list(file["lines"]) for name, file in made["files"].items()}
    found = [{name: list(lines) for name, lines in files.items()}]
    for item in made["items"]:
        for edit in reversed(item["edits"]):
            place = edit["at"]
            files[edit["file"]][place : place + edit["remove"]] = edit["add"]
        found.append({name: list(lines) for name, lines in files.items()})
    return found


def text_of(path):
    return path.read_text() if path and path.exists() else ""


def joined(lines):
    return "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("step", lessons.steps(), ids=lambda step: step.name)
def test_a_walk_leads_from_the_step_before_to_this_one(step):
    old, files, mended = lessons.before(step), {}, {}  # files: as the pages so far leave them
    order = [page for page in PAGES if page.parent == step]
    walked = {page: iter(states(data(page))[1:]) for page in order}
    begun = {page: states(data(page))[0] for page in order}
    for item in lessons.walk(step):
        page = step / item.page
        for file, lines in begun.pop(page, {}).items():
            assert joined(lines) == files.get(file, text_of(old and old / file)), (page, file)
        for file, lines in next(walked[page]).items():
            files[file] = joined(lines)
        mended.update({piece.file: True for piece in item.pieces})
    assert not begun and files.keys() == mended.keys()
    for file, text in files.items():
        assert text == text_of(step / file), file


@pytest.mark.parametrize("page", PAGES, ids=book_walk.data_name)
def test_the_lit_lines_are_those_that_the_page_shows(page):
    items = [item for item in lessons.walk(page.parent) if item.page == page.name]
    for item, made, files in zip(items, data(page)["items"], states(data(page))[1:], strict=True):
        assert (made["number"], made["milestone"]) == (item.number, item.milestone)
        assert [name for shot in made["shots"] for name in shot["names"]] == [
            piece.name for piece in item.pieces
        ]
        lit = {
            (shot["file"], line)
            for shot in made["shots"]
            for first, last in shot["lit"]
            for line in files[shot["file"]][first - 1 : last]
        }
        shown = {
            (piece.file, line[1:] if piece.kind == "diff" else line)
            for piece in item.pieces
            for line in piece.text.split("\n")
            if piece.kind == "code" or line.startswith(("+", " ")) and line != "    ..."
        }
        assert {pair for pair in lit if pair[1]} == {pair for pair in shown if pair[1]}, item.title


def test_typed_is_what_the_items_show():
    """Most of what a step adds is typed; the rest comes with the first item of its file."""
    for page in PAGES:
        for item in data(page)["items"]:
            for edit in item["edits"]:
                if "shot" in edit:
                    assert item["shots"][edit["shot"]]["file"] == edit["file"]
    items = data(lessons.step_of(5) / "README.md")["items"]
    typed = sum(len(e["add"]) for item in items for e in item["edits"] if "shot" in e)
    untyped = sum(len(e["add"]) for item in items for e in item["edits"] if "shot" not in e)
    assert typed > 10 * untyped > 0
    first = {}
    for item in items:
        for edit in item["edits"]:
            touched = {shot["file"] for shot in item["shots"]}
            assert edit["file"] in touched
            first.setdefault(edit["file"], item["number"])
            assert "shot" in edit or first[edit["file"]] == item["number"]


def test_neighbours_are_one_shot():
    index = next(i for i, item in enumerate(lessons.walk(lessons.step_of(5))) if item.number == 3)
    shots = book_edits.shots(lessons.step_of(5), index)
    assert [[piece.name for piece in shot.pieces] for shot in shots] == [
        ["OnCpu", "Cudnn", "Efficient"],
        ["kernel_for", "forward_block", "backward_block"],
    ]


def test_marks_of_colours_leave_the_text_as_it_is():
    for path in sorted(lessons.step_of(5).glob("*_parallel.py")):
        lines = book_walk.marked(path)
        assert joined(map(book_walk.plain, lines)) == path.read_text()
        for line in lines:
            marks = [ord(letter) - book_walk.END for letter in line if ord(letter) >= book_walk.END]
            assert not marks or marks[-1] == 0, line
    define = next(line for line in lines if "apply_tensor_parallel" in line)
    assert define.startswith("\ue001def \ue004apply_tensor_parallel\ue000(")


def test_explanations_link_to_pages_of_the_book():
    texts = [*ROOT.glob("step*/*.md"), ROOT / "GLOSSARY.md"]
    places = {path.with_suffix(".html") for path in texts if path.name != "README.md"}
    places |= {path.with_name("index.html") for path in texts if path.name == "README.md"}
    places |= {path.parent / "files" / f"{path.name}.html" for path in ROOT.glob("step*/*.py")}
    for page in PAGES:
        for target in re.findall(r'<a href=\\"([^#\\]+)', json.dumps(data(page)["items"])):
            assert (page.parent / target).resolve() in places, (page, target)


def test_the_player_stands_at_the_head_of_the_code():
    page = lessons.step_of(5) / "README.md"
    code = '<h2 id="the-code">The code</h2>\n<p>a</p>\n'
    assert re.fullmatch(
        r'<h2 .*</h2>\n<div id="walk" class="walk" .*walk_5_README.*></div>\n<p>a</p>\n',
        book_walk.with_player(code, page),
    )
    assert book_walk.with_player(code, ROOT / "README.md") == code
    html = '<h4 id="2-a">2. A<a class="headerlink" href="#2-a">¶</a></h4>'
    assert book_walk.with_links(html) == html  # this page has no player
    linked = book_walk.with_links('<div data-widget="walk"></div>' + html)
    assert 'A<a class="walk-link" href="#walk?item=2&amp;play=yes"' in linked
