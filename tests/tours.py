"""The walks of the lessons as code tours, in the JSON format of CodeTour: `.tours/` of an editor.

https://github.com/microsoft/codetour: a tour has steps, each with a file, a line or a selection,
and a description in Markdown.
"""

import json
import re

SCHEMA = "https://aka.ms/codetour-schema"


def tour(step, walk):
    """The text of a step's tour: one stop for each piece of each item, in the order of the walk."""
    stops = [stop for item in walk for stop in stops_of(step, item)]
    number, name = re.match(r"step(\d+)_(\w+)", step.name).groups()
    title = f"{number}. {name.replace('_', ' ')}"
    return json.dumps({"$schema": SCHEMA, "title": title, "steps": stops}, indent=1) + "\n"


def stops_of(step, item):
    """The first stop of an item has its explanation; the others say only where one is."""
    title = f"{item.number}. {item.title}"
    for piece in item.pieces:
        first = piece is item.pieces[0]
        text = linked(item.explanation, step) if first else f"Also `{piece.name}`."
        yield {
            "file": f"{step.name}/{piece.file}",
            "title": title if first else f"{title}: {piece.name}",
            "description": f"Milestone {item.milestone}, {item.milestone_title}\n\n{text}",
            "selection": {
                "start": {"line": piece.lines[0], "character": 1},
                "end": {"line": piece.lines[-1] + 1, "character": 1},
            },
        }


def linked(text, step):
    """A page's text with its links as seen from the root, where an editor looks for them."""

    def moved(match):
        place = match[1]
        if place.startswith(("http", "#")):
            return match[0] if place.startswith("http") else f"]({step.name}/README.md{place})"
        return f"](./{place[3:]})" if place.startswith("../") else f"](./{step.name}/{place})"

    return re.sub(r"\]\(([^)]+)\)", moved, text)
