"""What a step's video shows and says: its scenes, made from the lesson's README and its walk.

    python assets/video_script.py 5        prints the script

The scenes in their order: the title; *Why* and *The idea*, paragraph by paragraph, over the figures
and the widgets; the widgets of *By hand*; for each milestone a card and its items; the takeaways.
"""

import argparse
import html
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "assets"))
sys.path.append(str(ROOT / "tests"))
import lessons  # noqa: E402
import video_speech as speech  # noqa: E402

LONGEST = 75  # words of prose that stand in one view
BLOCK = re.compile(
    r"""<details>[\s\S]*?</details>
    | <!--\ widget:\ (?P<widget>\w+)(?P<options>(\ \w+=\S+)*)\ -->\n!\[.*?\]\((?P<still>.*?)\)
    | <!--[\s\S]*?-->
    | !\[.*?\]\((?P<picture>.*?)\)
    | ^```.*\n(?P<code>[\s\S]*?)\n```$
    | (?P<table>(^\|.*\|$\n?)+)
    | (?P<item>^(-|\d+\.)\ .*(\n\ +\S.*)*)
    | (?P<prose>^\S.*(\n\S.*)*)""",
    re.MULTILINE | re.VERBOSE,
)
SEES = re.compile(
    r"\b(figure|on the (left|right)|in the middle|(upper|lower) half)\b", re.IGNORECASE
)


@dataclass
class Scene:
    """Something to look at while some sentences are spoken."""

    kind: str  # title, words, picture, widget, card, item
    chapter: str
    content: dict = field(default_factory=dict)  # for the page that draws it: film.js says what
    said: list = field(default_factory=list)  # of speech.Sentence; a widget adds its own captions


@dataclass
class Block:
    """A piece of a page: prose, an item of a list, code, a table, a picture or a widget."""

    kind: str
    text: str
    options: dict = field(default_factory=dict)  # of a widget
    still: str = ""  # the picture that stands for a widget elsewhere
    seen: int | None = None  # the number of the picture that it is spoken over

    @property
    def is_said(self):
        return self.kind in ("prose", "item")

    @property
    def is_seen(self):
        return self.kind in ("picture", "widget")


def script(step):
    """The scenes of the video of a step's README."""
    page, text = step / "README.md", (step / "README.md").read_text()
    parts = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    title = title_of(step)
    items = lessons.items_of(page)
    milestones = list(dict.fromkeys((item.milestone, item.milestone_title) for item in items))
    told = [f"Milestone {number}: {speech.plain(name)}" for number, name in milestones]
    scenes = [Scene("title", "Why", {"title": title, "lines": told}, speech.sentences(f"{title}."))]
    for name in ("Why", "The idea"):
        scenes += section(parts[name], name)
    by_hand = section(parts["By hand"], "The idea")
    scenes += [scene for scene in by_hand if scene.kind == "widget"]
    for (number, name), chapter in zip(milestones, told, strict=True):
        card = {"title": f"Milestone {number}", "lines": [speech.plain(name)]}
        scenes.append(
            Scene("card", chapter, card, speech.sentences(f"Milestone {number}: {name}."))
        )
        for place, item in enumerate(items):
            if item.milestone == number:
                scenes.append(Scene("item", chapter, {"item": place}, spoken(item)))
    return scenes + section(parts["Takeaways"], "Takeaways")


def title_of(step):
    return re.search(r"^# (.+)$", (step / "README.md").read_text(), re.M)[1]


def spoken(item):
    """The sentences of an item: its title, and its explanation without code and tables."""
    said = speech.sentences(f"{item.title}.".replace("?.", "?"))
    for block in blocks(item.explanation):
        said += speech.sentences(block.text) if block.is_said else []
    return said


# --- a section ------------------------------------------------------------------------------------


def blocks(markdown):
    """The blocks of a piece of a page, in order."""
    found = []
    for match in BLOCK.finditer(markdown):
        kinds = ("widget", "picture", "code", "table", "item", "prose")
        kind = next((kind for kind in kinds if match[kind] is not None), None)
        if kind is None or match[0].startswith("#") or is_loop(match):
            continue
        options = dict(option.split("=") for option in (match["options"] or "").split())
        text = re.sub(r"^(-|\d+\.) ", "", match[kind]) if kind == "item" else match[kind]
        found.append(Block(kind, text, options, match["still"] or ""))
    return found


def is_loop(match):
    """Whether it is the page's own loop, which a film of the page does not need."""
    return bool(match["picture"]) and match["picture"].endswith(".gif")


def section(markdown, chapter):
    """The scenes of a section: views of prose, and the pictures where the prose is about them."""
    found = blocks(markdown)
    look(found)
    scenes, group = [], []
    for block in found:
        if group and parted(group, block):
            scenes += scenes_of(group, found, chapter)
            group = []
        group.append(block)
    return scenes + scenes_of(group, found, chapter)


def look(found):
    """Say which paragraphs are spoken over a picture: those beside it, and those that name it."""
    seen = [place for place, block in enumerate(found) if block.is_seen]
    for place, block in enumerate(found):
        if not (seen and block.is_said):
            continue
        after = found[place + 1] if place + 1 < len(found) else None
        beside = (place + 1 in seen, place - 1 in seen)
        if after and after.kind in ("code", "table"):
            continue
        if beside[0] and not beside[1]:
            block.seen = place + 1
        elif beside[1] or SEES.search(block.text):
            block.seen = max((p for p in seen if p < place), default=seen[0])
    for before, block in zip(found, found[1:], strict=False):
        if block.kind == "item" and before.seen is not None and seen:
            block.seen = before.seen  # a list belongs to what stands before it


def parted(group, block):
    """Whether a block begins a new scene."""
    last = group[-1]
    if block.is_seen or last.is_seen or block.seen != last.seen:
        return True
    length = sum(len(b.text.split()) for b in [*group, block] if b.is_said)
    follows = block.kind in ("code", "table") or (block.kind == "item" and last.text.endswith(":"))
    return length > LONGEST and not follows


def scenes_of(group, found, chapter):
    """A view of prose, or of a picture, as a list of one scene; of a silent picture none."""
    if not group:
        return []
    first = group[0]
    if first.kind == "widget":
        return [Scene("widget", chapter, {"widget": first.text, "options": first.options})]
    if first.kind == "picture":
        return []  # it is shown with the words that are about it
    if first.seen is None:
        return [Scene("words", chapter, *view(group))]
    said = [sentence for block in group for sentence in speech.sentences(block.text)]
    seen = found[first.seen]
    if seen.still and not seen.still.endswith(("_widget.png", ".gif")):
        return [Scene("picture", chapter, {"picture": Path(seen.still).name}, said)]
    if seen.kind == "widget":
        # Before its own scene a widget stands at its first moment, afterwards at its last.
        moment = "first" if found.index(first) < first.seen else "last"
        content = {"widget": seen.text, "options": seen.options, "moment": moment}
        return [Scene("still", chapter, content, said)]
    return [Scene("picture", chapter, {"picture": Path(seen.text).name}, said)]


def view(group):
    """The parts of a view of prose, as HTML, and what is said; each sentence has its number."""
    parts, said = [], []
    for block in group:
        if block.is_said:
            mine = speech.sentences(block.text)
            spans = [
                f'<span data-sentence="{len(said) + place}">{inline(sentence.markdown)}</span>'
                for place, sentence in enumerate(mine)
            ]
            said += mine
            parts.append({"kind": block.kind, "html": " ".join(spans)})
        elif block.kind == "code":
            parts.append({"kind": "code", "html": html.escape(block.text)})
        elif block.kind == "table":
            parts.append({"kind": "table", "html": table(block.text)})
    return {"parts": parts}, said


def inline(markdown):
    """The HTML of a sentence: code, stars; links are their text."""
    text, kept = speech.hide_code(speech.without_links(markdown))
    text = html.escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"\*(.+?)\*", r"<i>\1</i>", text)
    return speech.show_code(text, [f"<code>{html.escape(code.strip('`'))}</code>" for code in kept])


def table(markdown):
    """The HTML of a table."""
    lines = (line.strip().removeprefix("|").removesuffix("|") for line in markdown.split("\n"))
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    head, body = rows[0], [row for row in rows[2:] if any(row)]
    lines = ["".join(f"<th>{inline(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{inline(cell)}</td>" for cell in row) for row in body]
    return "".join(f"<tr>{line}</tr>" for line in lines)


def main():
    parser = argparse.ArgumentParser(description="Print a video's script; see the file.")
    parser.add_argument("step", type=int)
    args = parser.parse_args()
    for number, scene in enumerate(script(lessons.step_of(args.step))):
        print(f"\n{number:3} {scene.kind:8} {scene.chapter}")
        for sentence in scene.said:
            print(f"      {sentence.spoken}")


if __name__ == "__main__":
    main()
