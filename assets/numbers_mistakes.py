"""Curves of runs with mistakes, as mistakes.py has recorded them, for the widget of mistakes."""

import json
from pathlib import Path


def mistakes():
    """{right: {flags: curves of one process}, mistakes: {name: curves}}; see mistakes.py."""
    return json.loads((Path(__file__).parent / "mistakes.json").read_text())
