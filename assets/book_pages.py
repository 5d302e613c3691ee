"""The pages of the book: which there are, where their links lead, and how one turns to the next."""

import html
import re
import shutil
import struct
import sys
from pathlib import Path, PurePosixPath

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import book_code  # noqa: E402
import book_diffs  # noqa: E402
import book_walk  # noqa: E402
import lessons  # noqa: E402
from book_markdown import Document  # noqa: E402

WEB = ROOT / "assets" / "web"
PICTURES = {".png", ".gif"}
LOOP = re.compile(r"(?<=\n\n)!\[[^\]]*\]\(\S+_loop\.gif\)$", re.MULTILINE)
REFERENCE = ["GLOSSARY.md", "COMING_FROM.md", "tests/README.md", "tests/COACH.md",
             "tests/RESULTS.md", "assets/BOOK.md"]  # fmt: skip


def write(stage):
    """Write the folder that the generator reads: docs/, html/ and mkdocs.yml."""
    book = Pages()
    nav = [{"Overview": book.page(ROOT / "README.md")}]
    for step in lessons.steps():
        entries = [{title_of(page): book.page(page)} for page in lessons.pages(step)[1:]]
        entries.append({"What it costs": book.page(step / "COSTS.md")})
        changes = book_diffs.changes_page(step, book.linker(step / "changes"))
        entries.append({"Changes": book.add(step / "changes", changes, wide=True, search=False)})
        files = book_code.files_page(step, book.linker(step / "files"))
        entries.append({"Files": book.add(step / "files", files, search=False)})
        nav.append({title_of(step / "README.md"): [book.page(step / "README.md"), *entries]})
    nav += [{title_of(ROOT / page): book.page(ROOT / page)} for page in REFERENCE]
    book.add_sources()
    for path, text in book.made.items():
        (stage / "html" / path).parent.mkdir(parents=True, exist_ok=True)
        (stage / "html" / path).write_text(text)
        (stage / "docs" / path).parent.mkdir(parents=True, exist_ok=True)
        head = yaml.safe_dump(book.heads[path], allow_unicode=True)
        name = stage / "docs" / f"{path.removesuffix('.html')}.md"
        name.write_text(f"---\n{head}---\nhtml/{path}\n")
    for picture in book.pictures:
        there = stage / "docs" / picture.relative_to(ROOT)
        there.parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, there)
    config = yaml.safe_load((WEB / "book.yml").read_text())
    (stage / "mkdocs.yml").write_text(yaml.safe_dump({**config, "nav": nav}, allow_unicode=True))


def title_of(page):
    """What the list of pages calls a page: its heading, that of a second page without its step."""
    heading = re.search(r"^# (.+)$", page.read_text(), re.MULTILINE)[1]
    if page.parent in lessons.steps() and page.name != "README.md":
        heading = heading.partition(": ")[2] or heading
        heading = heading[0].upper() + heading[1:]
    return heading


def markdown_pages():
    """The Markdown files that are pages, in their order."""
    of_steps = [
        page for step in lessons.steps() for page in [*lessons.pages(step), step / "COSTS.md"]
    ]
    return [ROOT / "README.md", *of_steps, *(ROOT / name for name in REFERENCE)]


def text_of(page):
    """A page with the code of today, not with what was put there once."""
    if page.parent not in lessons.steps():
        return page.read_text()
    for directive in lessons.DIRECTIVE.finditer(page.read_text()):
        try:
            lessons.filled(page.parent, *directive.group(2, 3, 4))
        except lessons.LessonError as error:
            line = page.read_text()[: directive.start()].count("\n") + 1
            raise lessons.LessonError(f"{page.relative_to(ROOT)}:{line}: {error}") from None
    # A loop that does not stand for a widget is for GitHub: here the widgets move.
    return LOOP.sub("", lessons.renewed(page))


class Pages:
    """All pages while they are made: texts, addresses, and what links ask for."""

    def __init__(self):
        self.documents = {page: Document(text_of(page)) for page in markdown_pages()}
        self.made = {}  # {path in the book: HTML}
        self.heads = {}  # {path in the book: what the generator is told of it}
        self.pictures = set()
        self.sources = {path for step in lessons.steps() for path in book_code.own_files(step)}

    # --- addresses ------------------------------------------------------------------------------

    def place(self, path):
        """Where a file's page stands in the book, None if it has none."""
        name = path.relative_to(ROOT).as_posix()
        if path in self.documents:
            return self.place_of_markdown(path)
        if path.name in ("changes", "files") and path.parent in lessons.steps():
            return f"{name}.html"
        if path.suffix in PICTURES:
            return name
        if not path.is_file():
            return None
        path = book_code.home(path)
        folder = path.parent.relative_to(ROOT)
        return (PurePosixPath(folder) / "files" / f"{path.name}.html").as_posix()

    @staticmethod
    def place_of_markdown(path):
        name = path.relative_to(ROOT).as_posix().removesuffix(".md")
        return re.sub(r"(^|/)README$", r"\1index", name) + ".html"

    def address(self, page, link, line):
        """Where a link of a page leads in the book, seen from the page; None if nowhere in it."""
        if re.match(r"[a-z]+:", link):
            return link
        name, _, part = link.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            self.wrong(page, line, link, "is not there")
        if path.is_dir() and (path / "README.md") in self.documents:
            path /= "README.md"
        place = self.place(path)
        if place is None:
            return None
        if path.suffix in PICTURES:
            self.pictures.add(path)
        elif path not in self.documents:
            self.sources.add(book_code.home(path))
        if part and not self.has(path, part):
            self.wrong(page, line, link, f"has no #{part}")
        there = relative(place, self.place(page)) if name else ""
        return f"{there}#{part}" if part else there

    def has(self, path, part):
        if path in self.documents:
            return part in self.documents[path].anchors
        lines = re.fullmatch(r"L(\d+)(?:-L(\d+))?", part)
        return bool(lines) and int(lines[2] or lines[1]) <= len(path.read_text().splitlines())

    def wrong(self, page, line, link, what):
        raise lessons.LessonError(f"{page.relative_to(ROOT)}:{line}: {link} {what}")

    def linker(self, page):
        """link(path, words, part) for a page that a program writes: the link as HTML."""

        def link(path, words, part=None):
            if isinstance(part, range):
                part = f"L{part[0]}-L{part[-1]}"
            elif part:  # a heading
                anchors = self.documents[path].anchors
                part = next(anchor for anchor, heading in anchors.items() if heading == part)
            there = relative(self.place(path), self.place(page))
            return f'<a href="{there}{"#" + part if part else ""}">{words}</a>'

        return link

    # --- pages ----------------------------------------------------------------------------------

    def page(self, path):
        """Make the page of a Markdown file; its name for the list of pages."""

        def address(link, line):
            return self.address(path, link, line)

        def size(picture):
            return size_of((path.parent / picture).resolve())

        heading = next(iter(self.documents[path].anchors.values()))
        made = book_walk.with_player(self.documents[path].html(address, size), path)
        return self.add(path, book_walk.with_links(made), heading)

    def add(self, path, text, heading=None, wide=False, search=True):
        place = self.place(path)
        heading = heading or html.unescape(
            re.sub("<.*?>", "", re.search(r"<h1>(.*)</h1>", text)[1])
        )
        self.made[place] = text
        self.heads[place] = {"title": heading} | ({"hide": ["toc"]} if wide else {})
        if not search:
            self.heads[place]["search"] = {"exclude": True}
        return place.removesuffix(".html") + ".md"

    def add_sources(self):
        """Make the pages of files that steps bring or that a page links to."""
        for path in sorted(self.sources):
            text = book_code.source_page(path, self.linker(path))
            self.add(path, text, wide=True, search=False)


def relative(there, here):
    """The address of one page seen from another."""
    up = len(PurePosixPath(here).parts) - 1
    ours, theirs = PurePosixPath(here).parts[:-1], PurePosixPath(there).parts
    same = 0
    while same < up and same < len(theirs) - 1 and ours[same] == theirs[same]:
        same += 1
    return "/".join([".."] * (up - same) + list(theirs[same:]))


def size_of(picture):
    """The width and height of a PNG or a GIF, so that a page does not jump when it comes."""
    head = picture.read_bytes()[:24]
    form, part = (">II", head[16:24]) if picture.suffix == ".png" else ("<HH", head[6:10])
    return dict(zip(("width", "height"), struct.unpack(form, part), strict=True))


def finish(site):
    """What the generator leaves to be done."""
    (site / "404.html").unlink()  # its links hold at one address only
    shutil.rmtree(site / "assets" / "stylesheets" / "classic")  # another look, which no page has
    for page in site.rglob("*.html"):
        page.write_text(slim(page.read_text()))


def slim(text):
    """A page without the empty lines and the indents of its frame, a fifth of the whole book."""
    parts = re.split(r"(<pre>.*?</pre>)", text, flags=re.DOTALL)
    return "".join(p if i % 2 else re.sub(r"\s*\n\s*", "\n", p) for i, p in enumerate(parts))
