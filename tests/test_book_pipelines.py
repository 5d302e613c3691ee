"""The widget of pipelines: its times are those of the steps' code, its numbers are Python's."""

import itertools
import json
import random
import re

import browser
import numpy as np
import pytest
import virtual_clock
from conftest import ROOT
from harness import World

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


@pytest.fixture(scope="module")
def by_the_code():
    """by_the_code(inputs): (passes, chunks a rank) of each case, as the code of its step goes."""
    with World(ROOT / "step8_pipeline_1f1b", 1) as plain, World(ROOT / "step9_4d", 1) as chunked:

        def both(inputs):
            chunks = [case[3] if case[0] == "interleaved" else 1 for case in inputs]
            given = [[*case[:3], c, *case[4:]] for case, c in zip(inputs, chunks, strict=True)]
            found = {}
            for world, several in ((plain, False), (chunked, True)):
                mine = [i for i, c in enumerate(chunks) if (c > 1) == several]
                if mine:
                    (rows,) = world.run(virtual_clock.run_all, [given[i] for i in mine])
                    found |= dict(zip(mine, rows, strict=True))
            return [(found[i], chunks[i]) for i in range(len(inputs))]

        yield both


def most_alive(row, chunks):
    """Micro-batches between their passes forward and backward, at most."""
    changes = [1 if kind == "F" else -1 for kind, *_ in row]
    return max(itertools.accumulate(changes)) / chunks


def idle_share(rows):
    """The share of a step, to its last pass, in which ranks compute nothing."""
    spans = [pass_[-2:] for row in rows for pass_ in row]
    whole = max(end for _, end in spans) * len(rows)
    return 1 - sum(end - start for start, end in spans) / whole


def summaries(page, inputs):
    """What the widget computes of each case; as one text, as there are many numbers."""
    summary = "(given) => Book.formulas.pipelines.summary(...given)"
    return json.loads(page.evaluate(f"(inputs) => JSON.stringify(inputs.map({summary}))", inputs))


def test_times_are_those_of_the_code(script, by_the_code):
    inputs = [*cases(1, 500)]
    assert {case[0] for case in inputs} == set(PAGES)
    found = summaries(script, inputs)
    for case, (rows, chunks), said in zip(inputs, by_the_code(inputs), found, strict=True):
        by_rank = [[time for *_, start, end in row for time in (start, end)] for row in rows]
        most, share = [most_alive(row, chunks) for row in rows], idle_share(rows)
        right = [*itertools.chain(*by_rank), *most, max(map(max, by_rank)), share]
        mine = [*itertools.chain(*said["times"]), *said["most"], said["time"], said["share"]]
        np.testing.assert_allclose(mine, right, rtol=1e-9, atol=1e-9, err_msg=str(case))


def test_the_bubble_where_the_formula_holds(script):
    """Without messages and with even ranks, for each size that the code allows.

    Interleaved also needs backward passes of at most twice the time: in some sizes ranks wait for
    what they send, else.
    """
    sizes = [
        [engine, p, m, v]
        for engine, chunks in (("afab", [2]), ("1f1b", [2]), ("interleaved", [2, 3, 4]))
        for p, m, v in itertools.product(range(1, 9), range(1, 17), chunks)
        if engine != "interleaved" or (p > 1 and m % p == 0)
    ]
    ratios = itertools.cycle([1, 2, 1.5, 2.75])
    inputs = [
        [*size, min(ratio, 2) if size[0] == "interleaved" else ratio, 0, 0]
        for size, ratio in zip(sizes, ratios, strict=False)
    ]
    found = summaries(script, inputs)
    said = browser.answers(script, "Book.formulas.pipelines.bubble", sizes)
    for (engine, p, m, v), idle, bubble in zip(sizes, found, said, strict=True):
        passes = (v if engine == "interleaved" else 1) * m
        assert bubble == pytest.approx((p - 1) / (passes + p - 1), abs=1e-12)
        assert idle["share"] == pytest.approx(bubble, abs=1e-9), (engine, p, m, v)


def percent(share):
    return f"{100 * share:.1f}\u00a0%"


def pieces(widget, panel):
    """How many passes a panel shows, and those of them with their number."""
    drawn = widget.locator(f'[data-id^="{panel} "]')
    ids = [drawn.nth(i).get_attribute("data-id") for i in range(drawn.count())]
    return [one for one in ids if re.fullmatch(rf"{panel} \d+ \d+", one)]


@pytest.mark.parametrize("engine", PAGES)
def test_each_lesson_has_its_schedule(site, chromium, engine):
    with browser.opened(chromium, f"file://{site}/{PAGES[engine]}") as (page, problems):
        widget = browser.ready(page, "#pipelines")
        chosen = [widget.locator(f"#pipelines-{name}").input_value() for name in ("above", "below")]
        before = {"afab": [], "1f1b": ["afab"], "interleaved": ["1f1b"]}[engine]
        assert chosen == [*before, engine, "nothing"][:2]
        assert f"3 / 11 = {percent(3 / 11)}" in browser.number(widget, "formula")
        if engine == "interleaved":
            assert browser.number(widget, "formula_below") == f"3 / 19 = {percent(3 / 19)}"
            assert browser.number(widget, "alive_below") == "5.5"  # (1 * 4 + 2 * 3 + 1) / 2
        assert problems == []


def test_controls_numbers_and_address(site, chromium, by_the_code):
    address = f"file://{site}/{PAGES['1f1b']}#pipelines?below=nothing&above=1f1b&p=3"
    with browser.opened(chromium, address) as (page, problems):
        widget = browser.ready(page, "#pipelines")

        def control(name):
            return page.locator(f"#pipelines-{name}")

        def shows(engine, p, m, v=2, ratio=2, message=0, head=0):
            ((rows, chunks),) = by_the_code([[engine, p, m, v, ratio, message, head]])
            assert browser.number(widget, "idle") == percent(idle_share(rows))
            assert float(browser.number(widget, "time")) == pytest.approx(rows[0][-1][-1], abs=0.01)
            most = max(most_alive(row, chunks) for row in rows)
            assert float(browser.number(widget, "alive")) == pytest.approx(most, abs=0.01)
            assert len(pieces(widget, "above")) == 2 * p * m * chunks

        shows("1f1b", 3, 8)
        for name, key in (("p", "ArrowRight"), ("m", "ArrowLeft")):
            control(name).press(key)
        shows("1f1b", 4, 7)
        control("above").select_option("afab")
        for name, times in (("message", 4), ("head", 2)):
            for _ in range(times):
                control(name).press("ArrowRight")
        control("ratio").press("ArrowLeft")
        shows("afab", 4, 7, ratio=1.75, message=0.2, head=0.2)
        control("above").select_option("interleaved")  # m becomes a multiple of p
        control("v").press("End")
        shows("interleaved", 4, 8, 4, 1.75, 0.2, 0.2)
        slider = control("p")
        slider.click(position={"x": 1, "y": 8})
        assert slider.input_value() == "2"  # one rank interleaves nothing
        widget.get_by_label("one moment on").click()
        assert "step=1" in page.url and "above=interleaved" in page.url and "v=4" in page.url
        page.keyboard.press("ArrowRight")
        assert widget.locator('[data-id="now is"]').count() == 1
        saved = page.url
        page.goto("about:blank")
        page.goto(saved)
        widget = browser.ready(page, "#pipelines")
        assert control("v").input_value() == "4"
        assert widget.locator(".place").inner_text().startswith("3 /")
        shows("interleaved", 2, 8, 4, 1.75, 0.2, 0.2)
        assert problems == []


STATES = [
    {"above": "1f1b", "below": "afab"},
    {"above": "interleaved", "below": "1f1b", "v": 4, "p": 8, "m": 16},
    {"above": "interleaved", "below": "nothing", "message": 0.35, "head": 0.3},
    {"above": "afab", "below": "nothing", "p": 1, "m": 1},
    {"above": "1f1b", "below": "1f1b_2ranks_2cores", "p": 2},
]


def test_each_shape_has_its_place(site, chromium):
    usual = {"p": 4, "m": 8, "v": 2, "ratio": 2, "message": 0, "head": 0}
    states = [usual | state for state in STATES]
    with browser.opened(chromium, f"file://{site}/{PAGES['afab']}#pipelines?p=2") as (page, _):
        browser.ready(page, "#pipelines")
        assert browser.faults(page, "pipelines", states) == []
        for state, width in itertools.product(states, (760, 360)):
            if state["p"] < 8:  # a look at each moment of many passes takes long
                assert browser.misplaced(page, "pipelines", state, width) == []


RUNS = sorted((ROOT / "assets").glob("timeline_*.json"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_recorded_run_has_the_passes_of_the_code(path, by_the_code):
    run = json.loads(path.read_text())
    case = [run["engine"], run["ranks"], run["micro_batches"], run["chunks"], 2, 0, 0]
    ((rows, _),) = by_the_code([case])
    assert run["command"].startswith(f"torchrun --nproc_per_node {run['ranks']} step")
    for mine, row in zip(run["rows"], rows, strict=True):
        assert [kind for kind, *_ in mine] == [kind for kind, *_ in row]
        times = [time for _, *both in mine for time in both]
        assert times == sorted(times)


def test_a_recorded_run_on_a_narrow_screen(site, chromium):
    path = RUNS[0]
    run, name = json.loads(path.read_text()), path.stem.removeprefix("timeline_")
    address = f"file://{site}/{PAGES['afab']}#pipelines?below={name}"
    with browser.opened(chromium, address, "narrow") as (page, problems):
        widget = browser.ready(page, "#pipelines")
        assert browser.number(widget, "idle_below") == percent(idle_share(run["rows"]))
        all_ends = [end for row in run["rows"] for *_, end in row]
        assert browser.number(widget, "time_below") == f"{max(all_ends):,.0f} ms"
        caption = widget.locator(".caption").inner_text()
        forward = sum(end - start for row in run["rows"] for kind, start, end in row if kind == "F")
        unit = forward / (run["ranks"] * run["micro_batches"])
        assert run["machine"] in caption and f"1 on the axis is {unit:.1f} ms" in caption
        assert len(pieces(widget, "below")) == sum(map(len, run["rows"]))
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert problems == []
