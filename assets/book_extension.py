"""What the generator calls to read a page: it finds the name of a file with HTML, made before."""

import re
from pathlib import Path

from markdown.extensions import Extension

HEADING = re.compile(r'<h([1-3]) id="([^"]+)">(.*?)<a class="headerlink"', re.DOTALL)


class Ready(Extension):
    """In place of Python-Markdown's own dialect: pages that book_markdown.py has made."""

    def extendMarkdown(self, md):  # noqa: N802 (the name is theirs)
        def convert(name):
            text = Path(name.strip()).read_text()
            md.toc_tokens = contents(text)
            return text

        md.convert = convert


def contents(text):
    """The headings of a page, each within the one above it, as Python-Markdown would give them."""
    top, path = [], []
    for level, anchor, words in HEADING.findall(text):
        entry = {"level": int(level), "id": anchor, "html": words, "data-toc-label": "",
                 "name": re.sub("<.*?>", "", words), "children": []}  # fmt: skip
        while path and path[-1]["level"] >= entry["level"]:
            path.pop()
        (path[-1]["children"] if path else top).append(entry)
        path.append(entry)
    return top


def makeExtension(**options):  # noqa: N802
    return Ready(**options)
