"""The book without a browser: pages as GitHub shows them, links that lead somewhere, one line of
what is wrong."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest
from conftest import ROOT

pytest.importorskip("markdown_it", reason="the extra book is not installed")
pytest.importorskip("pygments", reason="the extra book is not installed")
sys.path.append(str(ROOT / "assets"))
import book_code  # noqa: E402
import book_glossary  # noqa: E402
import book_hunks  # noqa: E402
import book_pages  # noqa: E402
import lessons  # noqa: E402
from book_markdown import Document, coloured  # noqa: E402
from markdown_it import MarkdownIt  # noqa: E402

EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Read(HTMLParser):
    """What is in a page: texts by kind of element, anchors, and what it names or loads."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.ids = [], [], set()
        self.links, self.loaded, self.counts = [], [], Counter()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.counts[tag] += 1
        self.ids |= {given["id"]} if given.get("id") else set()
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(given["href"])
        if tag not in EMPTY:
            beside = given.get("class") in ("headerlink", "walk-link")  # links that the book adds
            self.open.append(("beside" if beside else tag, []))

    def handle_endtag(self, tag):
        if tag in EMPTY or not self.open:
            return
        own, parts = self.open.pop()
        self.texts.append((own, "".join(parts)))
        if self.open and own != "beside":
            self.open[-1][1].extend(parts)

    def handle_data(self, data):
        if self.open:
            self.open[-1][1].append(data)

    def of(self, *tags):
        """The texts of some kinds of elements; spaces count in code alone."""
        return [
            (tag, text if tag == "pre" else " ".join(text.split()))
            for tag, text in self.texts
            if tag in tags
        ]


def article(text):
    return re.search(r"<article.*?>(.*)</article>", text, re.DOTALL)[1]


def test_the_book_is_whole(tmp_path):
    """Built as the page says. Each page has GitHub's headings, lists, tables and code; each link
    and picture is there; nothing comes from another host; it is small and made in a minute."""
    pytest.importorskip("zensical", reason="the extra book is not installed")
    site = tmp_path / "site"
    command = [sys.executable, "assets/book.py", "--output", site]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages, size, seconds = re.search(r"(\d+) pages, ([\d.]+) MB, (\d+) s", done.stdout).groups()
    assert float(size) <= 15 and int(pages) > 100
    alone = os.getloadavg()[0] <= 2 * os.cpu_count()  # or others have the cores
    assert int(seconds) <= 60 or not alone
    found = {page: Read(page.read_text()) for page in site.rglob("*.html")}
    for page, read in found.items():
        names_nothing_that_is_missing(site, page, read, found)
    for page in book_pages.markdown_pages():
        is_as_on_github(page, site / book_pages.Pages.place_of_markdown(page))
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?(https?:[^)]*)", style.read_text()), style


def names_nothing_that_is_missing(site, page, read, found):
    for address in read.links + read.loaded:
        if re.match(r"(https?|mailto):", address):
            assert address not in read.loaded, f"{page} loads {address}"
            continue
        name, _, part = address.partition("#")
        part = part.partition("?")[0]  # of a widget: #ring?cp=4
        there = (page.parent / name.split("?")[0]).resolve() if name else page
        assert there.is_file(), f"{page.relative_to(site)}: {address}"
        if part and not re.fullmatch(r"L\d+-L\d+", part):
            assert part in found[there].ids, f"{page.relative_to(site)}: {address}"


def is_as_on_github(path, page):
    """The same headings, items, cells and code, in the same order, as GitHub's own dialect."""
    plain = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    kinds = ["h1", "h2", "h3", "h4", "li", "td", "th", "pre", "summary", "blockquote", "em"]
    ours = Read(article(page.read_text()))
    theirs = Read(plain.render(book_pages.LOOP.sub("", path.read_text())))
    for mine, other in zip(ours.of(*kinds), theirs.of(*kinds), strict=True):
        assert mine == other, path
    assert ours.counts["details"] == theirs.counts["details"], path
    assert ours.counts["img"] == theirs.counts["img"], path


@pytest.mark.parametrize(
    "text, html",
    [
        ("a\n- b\n- c\n", "<p>a</p> <ul> <li>b</li> <li>c</li> </ul>"),
        ("- a\n  - b\n", "<ul> <li>a <ul> <li>b</li> </ul> </li> </ul>"),
        ("1. a\n\n   ```\n   b\n   ```\n",
         "<ol> <li> <p>a</p> <pre><code>b </code></pre> </li> </ol>"),
        ("<details><summary>s</summary>\n\n*a*\n\n</details>\n",
         "<details><summary>s</summary> <p><em>a</em></p> </details>"),
        ("|a|b|\n|-|-:|\n|`x\\|y`|2|\n",
         "<table> <thead> <tr> <th>a</th> <th style=\"text-align:right\">b</th> </tr> </thead> "
         "<tbody> <tr> <td><code>x|y</code></td> <td style=\"text-align:right\">2</td> </tr> "
         "</tbody> </table>"),
        ("a<!-- b -->\n<!-- runnable -->\n", "<p>a</p>"),
        ("[a](gone) and [b](there)", '<p>a and <a href="found">b</a></p>'),
    ],
)  # fmt: skip
def test_the_dialect_is_that_of_github(text, html):
    made = Document(text).html(lambda link, line: {"there": "found"}.get(link))
    made = re.sub(r'</?div.*?>| class="data"', "", made)
    assert " ".join(made.split()) == html


def test_headings_have_the_anchors_that_github_gives_them():
    text = "# A `b`, c!\n## Über_x\n## 1. Two\n## 1. Two\n## [a](b)"
    assert list(Document(text).anchors) == ["a-b-c", "über_x", "1-two", "1-two-1", "a"]


@pytest.mark.parametrize("language", ["python", "bash", "diff", "json", "", "unknown"])
def test_colours_change_no_letter_of_code(language):
    text = 'def f(a):\n    """x\n\n    y"""\n    return a<b>c & "&lt;"\n\n\n'
    lines = coloured(text, language)
    assert len(lines) == 7
    assert "".join(Read(f"<pre>{''.join(lines)}</pre>").of("pre")[0][1]) == text


def test_a_widget_stands_where_its_picture_is_on_github():
    made = Document("<!-- widget: ring cp=4 x=a=b -->\n![a](b.png)\n").html(lambda link, line: link)
    options = "{&quot;cp&quot;: &quot;4&quot;, &quot;x&quot;: &quot;a=b&quot;}"
    assert f'<div id="ring" data-widget="ring" data-options="{options}"></div>' in made
    assert '<p class="still"><img src="b.png"' in made


def test_a_link_has_the_line_on_which_its_paragraph_begins():
    seen = []
    Document("# a\n\nb\n[c](d)\n\n- [e](f)\n").html(lambda *given: seen.append(given))
    assert seen == [("d", 3), ("f", 6)]


@pytest.fixture(scope="module")
def pages():
    return book_pages.Pages()


@pytest.mark.parametrize(
    "link, words",
    [
        ("train.py#L3-L9999", r"has no #L3-L9999"),
        ("../GLOSSARY.md#nothing", r"has no #nothing"),
        ("gone.py", "is not there"),
        ("#nothing", "has no #nothing"),
    ],
)
def test_a_link_to_nowhere_is_named_with_its_line(pages, link, words):
    page = ROOT / "step4_tensor_parallel" / "README.md"
    with pytest.raises(lessons.LessonError, match=rf"^step4\S+/README.md:7: {link} {words}$"):
        pages.address(page, link, 7)


def test_links_lead_to_the_page_that_has_what_they_name(pages):
    page = ROOT / "step5_context_parallel" / "README.md"
    assert pages.address(page, "train.py#L1-L2", 1) == "files/train.py.html#L1-L2"
    # Step 4 brings this file, and step 5 has it as it is.
    assert pages.address(page, "tensor_parallel.py", 1) == (
        "../step4_tensor_parallel/files/tensor_parallel.py.html"
    )
    assert pages.address(page, "../GLOSSARY.md#rank", 1) == "../GLOSSARY.html#rank"
    assert pages.address(page, "../README.md", 1) == "../index.html"
    assert pages.address(page, "../tests", 1) == "../tests/index.html"
    assert pages.address(page, "..", 1) == "../index.html"
    assert pages.address(page, "../assets/web", 1) is None  # a folder without a page: plain text
    assert pages.address(page, "https://x.org", 1) == "https://x.org"


@pytest.mark.parametrize("step", lessons.steps(), ids=lambda step: step.name)
def test_the_hunks_of_the_items_make_the_step_from_the_one_before(step):
    hunks = book_hunks.hunks_by_item(step)
    places = [lessons.walk(step).index(item) for item, _, _ in hunks if item]
    assert places == sorted(places)
    assert all(item is None for item, _, _ in hunks[len(places) :])
    for file in book_hunks.files_of(step):
        old, new = (
            lessons.source(folder / file) if folder and (folder / file).exists() else []
            for folder in (lessons.before(step), step)
        )
        made, at = [], 1
        mine = [hunk for _, name, hunk in hunks if name == file]
        for hunk in sorted(mine, key=lambda h: (h.new.start, h.old.start, h.old.stop, h.new.stop)):
            assert hunk.old.start >= at, (file, hunk)
            made += old[at - 1 : hunk.old.start - 1] + [new[n - 1] for n in hunk.new]
            at = hunk.old.stop
        assert made + old[at - 1 :] == new, file


def test_a_hunk_belongs_to_the_item_that_shows_it():
    step = lessons.step_of(4)

    def shown(items, file):
        pieces = [piece for item in items for piece in item.pieces if piece.file == file]
        return {n for piece in pieces for n in piece.lines}

    for item, file, hunk in book_hunks.hunks_by_item(step):
        lines = {n for n in hunk.new if lessons.source(step / file)[n - 1].strip()}
        if item:
            assert lines <= shown([item], file)
        else:
            assert not lines & shown(lessons.walk(step), file)


def test_each_file_of_each_step_has_one_page():
    own = [path for step in lessons.steps() for path in book_code.own_files(step)]
    everything = [path for step in lessons.steps() for path in step.glob("*.py")]
    assert {book_code.home(path) for path in everything} == set(own)
    for path in everything:
        assert book_code.home(path).read_bytes() == path.read_bytes()


def test_each_term_has_a_card_without_links():
    entries = book_glossary.entries()
    headings = re.findall(r"^### (.+)$", (ROOT / "GLOSSARY.md").read_text(), re.MULTILINE)
    assert [entry["term"] for entry in entries.values()] == headings
    assert not any("<a" in entry["html"] for entry in entries.values())
    assert "collective" in entries["all-reduce"]["html"]


def test_a_function_with_another_name_stops_the_book_and_the_place_is_named(tmp_path):
    copy = tmp_path / "copy"
    skip = shutil.ignore_patterns(".*", "__pycache__", "site", "build", "runs", "my_steps", "*.png")
    shutil.copytree(ROOT, copy, ignore=skip)
    path = copy / "step4_tensor_parallel" / "tensor_parallel.py"
    text = path.read_text()
    assert "def part(" in text
    path.write_text(text.replace("def part(", "def piece("))
    command = [sys.executable, "assets/book.py", "--output", tmp_path / "site"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    said = (
        r"error: step4_tensor_parallel/README\.md:\d+: step4_tensor_parallel/tensor_parallel\.py "
    )
    assert done.returncode == 1
    assert re.fullmatch(rf"{said}defines no part\n", done.stderr), done.stderr
