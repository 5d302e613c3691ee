"""The entries of the glossary, for the cards that links to them show."""

import re
from pathlib import Path

from book_markdown import Document

GLOSSARY = Path(__file__).resolve().parents[1] / "GLOSSARY.md"


def entries():
    """{anchor: its term and its text as HTML}. Links in it are plain text: a card has none."""
    found = {}
    for part in re.split(r"^(?=### )", GLOSSARY.read_text(), flags=re.MULTILINE)[1:]:
        term, _, text = part.removeprefix("### ").partition("\n")
        anchor = next(iter(Document(f"### {term}").anchors))
        html = Document(text).html(lambda link, line: None)
        found[anchor] = {"term": term, "html": html.strip()}
    return found
