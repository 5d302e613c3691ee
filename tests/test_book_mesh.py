"""The widget of the mesh: places, groups and parts are those that the steps' code deals out."""

import itertools
import math
import random
import sys

import browser
import pytest
import workers_book
from workers_book import AXES

sys.path.append(str(browser.ROOT / "assets"))
import numbers_mesh as numbers  # noqa: E402

pytestmark = pytest.mark.browser
GROUPS = [axes for count in range(1, 5) for axes in itertools.combinations(AXES, count)]


@pytest.fixture
def step9(worlds):
    """step9(function, *args): what a function of workers_book.py gives in a process of step 9."""
    world = worlds(browser.ROOT / numbers.STEP, 1)
    return lambda function, *args: world.run(function, *args)[0]


def answers(chromium, function, inputs):
    with browser.bare(chromium, "mesh") as page:
        return browser.answers(page, f"Book.formulas.mesh.{function}", inputs)


def test_places_and_groups(chromium, step9):
    draw, cases = random.Random(1), []
    while len(cases) < 500:
        sizes = {axis: draw.randint(1, 8) for axis in AXES}
        if (ranks := math.prod(sizes.values())) <= 64:
            cases.append((draw.randrange(ranks), sizes, draw.sample(GROUPS, 2)))
    found = step9(workers_book.groups_of, cases)
    places = [place for place, _ in found]
    assert answers(chromium, "placeOf", [case[:2] for case in cases]) == places
    there = [[place, sizes] for place, (_, sizes, _) in zip(places, cases, strict=True)]
    assert answers(chromium, "rankAt", there) == [rank for rank, *_ in cases]
    asked = [(rank, axes, sizes) for rank, sizes, several in cases for axes in several]
    ranks = [ranks for _, groups in found for ranks in groups]
    assert answers(chromium, "group", asked) == ranks


def cases_of(seed, longest, shortest=1):
    """500 times (length, ranks, place)."""
    draw, cases = random.Random(seed), []
    for _ in range(500):
        ranks = draw.randint(1, 8)
        cases.append((draw.randint(shortest * ranks, longest), ranks, draw.randrange(ranks)))
    return cases


def test_parts_of_a_matrix(chromium, step9):
    cases = cases_of(2, 200_000)
    assert answers(chromium, "part", cases) == step9(workers_book.parts_of, cases)


def test_tokens_of_a_rank(chromium, step9):
    cases = cases_of(3, 300, shortest=2)
    chunks = answers(chromium, "chunks", cases)
    positions = [[p for start, stop in both for p in range(start, stop)] for both in chunks]
    assert positions == step9(workers_book.tokens_of, cases)


def test_sequences_of_a_rank(chromium, step9):
    cases = cases_of(4, 64)
    assert answers(chromium, "sequences", cases) == step9(workers_book.sequences_of, cases)


# --- on the screen --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(site, chromium):
    """The page of step 9, with the widget."""
    with browser.opened(chromium, f"file://{site}/step9_4d/index.html#mesh?step=0") as (
        page,
        problems,
    ):
        browser.ready(page, "#mesh")
        yield page
        assert not problems, problems


def go(page, **state):
    """Follow a link to a state."""
    said = "&".join(f"{key}={value}" for key, value in state.items())
    page.evaluate("said => { location.hash = said; }", f"mesh?{said}&step=0")
    name = f"rank {state['rank']} and its groups"
    page.wait_for_function(
        "([name, count]) => document.querySelector('#mesh [data-id=title]')?.textContent === name"
        " && document.querySelectorAll('#mesh .choice').length === count",
        arg=[name, math.prod(state[axis] for axis in AXES)],
    )
    return page.locator("#mesh")


def span(start, stop):
    return f"{start:,} – {stop - 1:,}" if stop - start > 1 else f"{start:,}"


def test_what_a_rank_holds(page, step9):
    draw, sizes_of, cases = random.Random(5), page.evaluate("Book.data.mesh.sizes"), []
    while len(cases) < 10:
        sizes = {axis: draw.choice(sizes_of[axis]) for axis in AXES}
        if (ranks := math.prod(sizes.values())) <= 64:
            cases.append((draw.randrange(ranks), sizes, [(axis,) for axis in AXES]))
    found = step9(workers_book.groups_of, cases)
    for (rank, sizes, _), (place, groups) in zip(cases, found, strict=True):
        widget = go(page, **sizes, rank=rank)
        assert browser.number(widget, "ranks") == str(math.prod(sizes.values()))
        assert browser.number(widget, "place") == ", ".join(f"{a} {place[a]}" for a in AXES)
        assert eval(browser.number(widget, "formula").replace("·", "*").replace("=", "=="))
        shapes = browser.shapes(widget)
        said = {name: shape["text"] for name, shape in shapes.items()}
        for axis, ranks in zip(AXES, groups, strict=True):
            assert said[f"tag {axis}"] == f"{axis} {place[axis]}"
            assert said[f"group {axis}"] == f"group: {', '.join(map(str, ranks))}"
            assert all(said[f"rank {r}"] == f"{r} {axis}" for r in ranks if r != rank)
        lengths = {"tp": 4096, "cp": numbers.SEQ_LEN, "dp": numbers.SEQUENCES}
        of = {axis: [(lengths[axis], sizes[axis], place[axis])] for axis in lengths}
        heads = step9(workers_book.parts_of, [(32, sizes["tp"], place["tp"])])[0]
        rows = step9(workers_book.parts_of, of["tp"])[0]
        assert said["words tp"] == f"q_proj: rows {span(*rows)} of 4,096, heads {span(*heads)}"
        tokens, chunk = step9(workers_book.tokens_of, of["cp"])[0], numbers.SEQ_LEN // sizes["cp"]
        assert len(tokens) == chunk
        if sizes["cp"] > 1:
            early, late = tokens[: chunk // 2], tokens[chunk // 2 :]
            both = [span(part[0], part[-1] + 1) for part in (early, late)]
            assert said["words cp"] == f"tokens {both[0]} and {both[1]}"
        lit = [shapes[f"dp piece {i}"]["fill"] != "quiet" for i in range(numbers.SEQUENCES)]
        mine = step9(workers_book.sequences_of, of["dp"])[0]
        assert [i for i, here in enumerate(lit) if here] == mine
        stage = [(sizes["pp"], place["pp"])]
        start, stop, count = step9(workers_book.layers_of, numbers.MODEL, stage)[0]
        ends = [", the embedding"] * (start == 0) + [", the head"] * (stop == count)
        assert said["words pp"] == f"layers {span(start, stop)} of {count}{''.join(ends)}"


def test_ranks_are_chosen_by_mouse_and_keys(page):
    widget = go(page, tp=2, cp=2, dp=2, pp=2, rank=5)
    widget.get_by_role("button", name="rank 12:").click()
    assert browser.number(widget, "place") == "pp 1, dp 1, cp 0, tp 0"
    assert "rank=12" in browser.address(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert browser.number(widget, "place") == "pp 1, dp 1, cp 0, tp 1"
    assert page.evaluate("document.activeElement.dataset.id") == "rank 13"
    assert widget.locator(".choice[tabindex='0']").count() == 1
    page.fill("#mesh-rank", "7")
    assert browser.number(widget, "place") == "pp 0, dp 1, cp 1, tp 1"
    assert browser.address(page).endswith("#mesh?tp=2&cp=2&dp=2&pp=2&rank=7&step=0")


def test_each_size_has_its_control_and_64_ranks_are_the_most(page):
    widget = go(page, tp=1, cp=1, dp=1, pp=1, rank=0)
    assert not widget.locator(".transport").is_visible(), "one rank: nothing to play"
    for axis, steps in [("tp", 3), ("cp", 1), ("dp", 1), ("pp", 1)]:
        for _ in range(steps):
            page.press(f"#mesh-{axis}", "ArrowRight")
    assert browser.number(widget, "ranks") == "64"
    page.fill("#mesh-rank", "63")
    page.press("#mesh-pp", "ArrowRight")
    assert "tp=4&cp=2&dp=2&pp=3&rank=47" in browser.address(page)
    assert page.locator("#mesh-rank").get_attribute("max") == "47"


def test_groups_of_one_colour(page, step9):
    widget = go(page, tp=2, cp=2, dp=2, pp=2, rank=5)
    moments = [("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), ("pp", "dp", "cp"), ("pp", "tp")]
    assert widget.locator(".place").inner_text() == f"1 / {len(moments) + 1}"
    sizes = dict.fromkeys(AXES, 2)
    found = step9(workers_book.groups_of, [(rank, sizes, moments) for rank in range(16)])
    for i, axes in enumerate(moments):
        widget.locator(".on").click()
        shapes = browser.shapes(widget)
        named = ", ".join(f'"{axis}"' for axis in axes)
        assert shapes["title"]["text"] == f"group({named})"
        colours = [shapes[f"rank {rank}"]["fill"] for rank in range(16)]
        own = {"tp": "rank-0", "cp": "rank-2", "dp": "rank-1", "pp": "rank-5"}[axes[-1]]
        assert colours[5] == own and all(colour.startswith("rank-") for colour in colours)
        letters = [shapes[f"rank {rank}"]["text"].split()[-1] for rank in range(16)]
        assert [*map(colours.index, colours)] == [*map(letters.index, letters)]
        for rank, colour in enumerate(colours):
            same = [other for other, its in enumerate(colours) if its == colour]
            assert same == found[rank][1][i]


def test_the_lesson_of_step_2_begins_with_its_figure(site, chromium):
    address = f"file://{site}/step2_process_group/index.html"
    with browser.opened(chromium, address, "narrow") as (page, problems):
        mesh = browser.ready(page, "#mesh")
        assert browser.number(mesh, "ranks") == "8"
        assert browser.shapes(mesh)["title"]["text"] == 'group("tp")'
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not problems, problems


@pytest.mark.parametrize("width", [760, 360])
def test_every_rank_has_its_place(page, width):
    sizes_of = page.evaluate("Book.data.mesh.sizes")
    every = itertools.product(*(sizes_of[axis] for axis in AXES))
    possible = [sizes for sizes in every if math.prod(sizes) <= 64]
    for sizes in random.Random(6).sample(possible, 12) + [(1, 8, 8, 1), (8, 1, 1, 8), (8, 8, 1, 1)]:
        ranks = math.prod(sizes)
        state = {**dict(zip(AXES, sizes, strict=True)), "rank": ranks - 1}
        assert not browser.misplaced(page, "mesh", state, width)
        cells = page.evaluate(
            "([state, width]) => Book.widgets.mesh.scene(state, width).at(0).shapes"
            ".filter((shape) => shape.choose).map(({x, y, w}) => [x, y, w])",
            [state, width],
        )
        assert len(cells) == ranks
        for (x, y, w), (x2, y2, _) in itertools.combinations(cells, 2):
            assert max(abs(x - x2), abs(y - y2)) >= w + 2, (state, width)
