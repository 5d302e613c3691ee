"""The pages of the book: the repository's Markdown files, made ready for the generator."""

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import lessons  # noqa: E402

WIDGET = re.compile(r"^<!-- widget: (\w+)((?: \w+=\S+)*) -->\n(!\[.*?\]\(.*?\))$", re.MULTILINE)


def write(stage):
    """Write the folder that the generator reads: docs/ and mkdocs.yml."""
    docs = stage / "docs"
    docs.mkdir(parents=True)
    nav = [{"Four D from scratch": "index.md"}]
    (docs / "index.md").write_text(staged(ROOT / "README.md"))
    for step in lessons.steps():
        (docs / step.name).mkdir()
        entries = []
        for page in [*lessons.pages(step), step / "COSTS.md"]:
            (docs / step.name / page.name).write_text(staged(page))
            entries.append(f"{step.name}/{page.name}")
        nav.append({title_of(step / "README.md"): entries})
    (docs / "GLOSSARY.md").write_text(staged(ROOT / "GLOSSARY.md"))
    nav.append({"Glossary": "GLOSSARY.md"})
    (docs / "assets").mkdir()
    for picture in (ROOT / "assets").glob("*.png"):
        (docs / "assets" / picture.name).write_bytes(picture.read_bytes())
    config = yaml.safe_load((ROOT / "assets" / "web" / "book.yml").read_text())
    (stage / "mkdocs.yml").write_text(yaml.safe_dump({**config, "nav": nav}))


def title_of(page):
    return re.search(r"^# (.+)$", page.read_text(), re.MULTILINE)[1]


def staged(page):
    """The text of a page as the generator wants it."""
    text = page.read_text()
    text = WIDGET.sub(widget, text)
    return text.replace("<details>", '<details markdown="1">')


def widget(found):
    """Where GitHub shows a picture, the book has a widget."""
    name, options, _ = found.groups()
    given = dict(option.split("=") for option in options.split())
    written = str(given).replace("'", "&quot;")
    return f'<div id="{name}" data-widget="{name}" data-options="{written}"></div>'


def finish(site):
    """What the generator leaves to be done in the pages that it made."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        up = "../" * (len(page.relative_to(site).parts) - 1)
        # A page from disk may start no worker; the theme asks another host for what helps then.
        text = re.sub(r"https://unpkg\.com/iframe-worker/shim", f"{up}web/worker.js", text)
        page.write_text(text)
