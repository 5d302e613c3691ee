"""The widget of pipelines: its times are those of the steps' code, its numbers are Python's."""

import itertools
import json
import random
import re
import sys

import browser
import pytest
import virtual_clock
from conftest import ROOT
from harness import World

sys.path.append(str(ROOT / "assets"))
import numbers_pipelines  # noqa: E402
import timeline  # noqa: E402

pytestmark = pytest.mark.browser
PAGES = {
    "afab": "step7_pipeline_afab/index.html",
    "1f1b": "step8_pipeline_1f1b/index.html",
    "interleaved": "step9_4d/INTERLEAVED.html",
}


@pytest.fixture(scope="module")
def script(site, chromium):
    """A page with the widget's formulas and numbers."""
    with browser.bare(chromium, "pipelines") as page:
        page.add_script_tag(path=site / "web" / "data" / "pipelines.js")
        yield page


def cases(seed, number):
    """Random inputs: engine, ranks, micro-batches, chunks, backward / forward, message, head."""
    draw = random.Random(seed)
    for _ in range(number):
        engine, p = draw.choice(["afab", "1f1b", "interleaved"]), draw.randint(1, 8)
        m = draw.randint(1, 16)
        if engine == "interleaved":
            p = max(p, 2)
            m = p * draw.randint(1, 16 // p)
        some = [draw.choice([0, draw.random()]) for _ in range(2)]
        yield [engine, p, m, draw.randint(2, 4), 1 + 2 * draw.random(), *some]


def by_the_code(inputs):
    """The passes of each case, as the code of its step goes through them."""
    chunks = [case[3] if case[0] == "interleaved" else 1 for case in inputs]
    given = [[*case[:3], c, *case[4:]] for case, c in zip(inputs, chunks, strict=True)]
    found = {}
    for step, here in (("step8_pipeline_1f1b", False), ("step9_4d", True)):
        mine = [i for i, case in enumerate(given) if (case[0] == "interleaved") == here]
        with World(ROOT / step, 1) as world:
            (rows,) = world.run(virtual_clock.run_all, [given[i] for i in mine])
        found |= dict(zip(mine, rows, strict=True))
    return [found[i] for i in range(len(inputs))], chunks


def most_alive(row, chunks):
    """Micro-batches between their passes forward and backward, at most."""
    changes = [1 if kind == "F" else -1 for kind, *_ in row]
    return max(itertools.accumulate(changes)) / chunks


def idle_share(rows):
    """What the script that draws a trace says of it."""
    return timeline.idle_share([[(kind, *pass_[-2:]) for kind, *pass_ in row] for row in rows])


def test_times_are_those_of_the_code(script):
    inputs = [*cases(1, 500)]
    assert {case[0] for case in inputs} == set(PAGES)
    found = browser.answers(script, "Book.formulas.pipelines.times", inputs)
    alive = browser.answers(script, "Book.formulas.pipelines.alive", inputs)
    idle = browser.answers(script, "Book.formulas.pipelines.idle", inputs)
    for case, rows, chunks, times, most, time_and_share in zip(
        inputs, *by_the_code(inputs), found, alive, idle, strict=True
    ):
        for row, mine in zip(rows, times, strict=True):
            both = [time for *_, start, end in row for time in (start, end)]
            assert mine == pytest.approx(both, rel=1e-9, abs=1e-9), case
        assert most == pytest.approx([most_alive(row, chunks) for row in rows], rel=1e-9), case
        assert time_and_share["time"] == pytest.approx(max(r[-1][-1] for r in rows), rel=1e-9)
        assert time_and_share["share"] == pytest.approx(idle_share(rows), abs=1e-9), case
