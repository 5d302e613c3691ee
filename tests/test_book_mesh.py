"""The widget of the mesh: places, groups and parts are those that the steps' code deals out."""

import itertools
import math
import random
import sys
from types import SimpleNamespace
from unittest.mock import Mock, patch

import browser
import pytest

sys.path.append(str(browser.ROOT / "assets"))
import numbers_mesh as numbers  # noqa: E402

pytestmark = pytest.mark.browser
AXES = ("pp", "dp", "cp", "tp")
SIZES = numbers.mesh()["sizes"]


def layouts(count, seed=1):
    """Sizes of meshes of up to 64 ranks, and a rank of each."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        sizes = {axis: draw.randint(1, 8) for axis in AXES}
        if (ranks := math.prod(sizes.values())) <= 64:
            found.append((draw.randrange(ranks), sizes))
    return found


GROUPS = [axes for count in range(1, 5) for axes in itertools.combinations(AXES, count)]


def mesh_of(rank, sizes, asked=GROUPS):
    """The Mesh of step 9 as this rank sees it without other processes, and groups asked for."""
    import process_group as pg

    dist = Mock(get_rank=lambda: rank, get_world_size=lambda: math.prod(sizes.values()))
    with patch.object(pg, "dist", dist):
        mesh = pg.Mesh(**sizes)
        return mesh, {axes: list(mesh.group(*axes).ranks) for axes in asked}


def answers(chromium, function, inputs):
    with browser.bare(chromium, "mesh") as page:
        return browser.answers(page, f"Book.formulas.mesh.{function}", inputs)


def test_places_and_groups(chromium):
    draw = random.Random(7)
    cases = [
        (rank, sizes, *mesh_of(rank, sizes, draw.sample(GROUPS, 2))) for rank, sizes in layouts(500)
    ]
    places = [
        dict(zip(AXES, (mesh.grid == rank).nonzero()[0].tolist(), strict=True))
        for rank, _, mesh, _ in cases
    ]
    assert answers(chromium, "placeOf", [case[:2] for case in cases]) == places
    there = [[place, case[1]] for place, case in zip(places, cases, strict=True)]
    assert answers(chromium, "rankAt", there) == [case[0] for case in cases]
    asked = [
        (rank, axes, sizes, ranks)
        for rank, sizes, _, groups in cases
        for axes, ranks in groups.items()
    ]
    found = answers(chromium, "group", [one[:3] for one in asked])
    assert found == [one[3] for one in asked]


def test_parts_of_a_matrix(chromium):
    import torch

    from tensor_parallel import part

    draw = random.Random(2)
    cases = []
    for _ in range(500):
        ranks = draw.randint(1, 16)
        cases.append((draw.randint(ranks, 200_000), ranks, draw.randrange(ranks)))

    def by_the_step(length, ranks, place):
        weight = torch.empty(length, 1, device="meta")
        weight.held = (slice(None), slice(None))
        held = part(weight, 0, SimpleNamespace(size=ranks, rank=place)).held[0]
        return [held.start, held.stop]

    assert answers(chromium, "part", cases) == [by_the_step(*case) for case in cases]


def test_tokens_of_a_rank(chromium):
    from context_parallel import zigzag_positions

    draw = random.Random(3)
    cases = []
    for _ in range(500):
        ranks = draw.randint(1, 8)
        cases.append((draw.randint(2 * ranks, 300), ranks, draw.randrange(ranks)))
    for (length, ranks, place), chunks in zip(
        cases, answers(chromium, "chunks", cases), strict=True
    ):
        positions = zigzag_positions(length, SimpleNamespace(size=ranks, rank=place)).tolist()
        assert [p for start, stop in chunks for p in range(start, stop)] == positions


def sequences_of(count, ranks, place):
    """Which of the first sequences the data loader of step 9 hands to a rank of a group."""
    import dataloader

    group, windows = SimpleNamespace(size=ranks, rank=place), list(range(count))
    batches = SimpleNamespace(group=group, windows=windows, options={})
    with patch.object(dataloader, "DataLoader", lambda _, batch_sampler: batch_sampler):
        dealt = dataloader.Batches.load(batches, ([window] for window in windows))
    return [window for (window,) in dealt]


def test_sequences_of_a_rank(chromium):
    draw = random.Random(4)
    cases = []
    for _ in range(500):
        ranks = draw.randint(1, 8)
        cases.append((draw.randint(1, 64), ranks, draw.randrange(ranks)))
    found = answers(chromium, "sequences", cases)
    assert found == [sequences_of(*case) for case in cases]


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


def test_what_a_rank_holds(page):
    from pipeline_parallel import deal_layers
    from presets import preset

    config, draw = preset(numbers.MODEL), random.Random(5)
    for _ in range(12):
        sizes = {axis: draw.choice(SIZES[axis]) for axis in AXES}
        if math.prod(sizes.values()) > 64:
            continue
        rank = draw.randrange(math.prod(sizes.values()))
        mesh, groups = mesh_of(rank, sizes)
        place = dict(zip(AXES, (mesh.grid == rank).nonzero()[0].tolist(), strict=True))
        widget = go(page, **sizes, rank=rank)
        assert browser.number(widget, "ranks") == str(mesh.grid.numel())
        assert browser.number(widget, "place") == ", ".join(f"{a} {place[a]}" for a in AXES)
        assert eval(browser.number(widget, "formula").replace("·", "*").replace("=", "=="))
        shapes = browser.shapes(widget)
        said = {name: shape["text"] for name, shape in shapes.items()}
        for axis in AXES:
            ranks = groups[axis,]
            assert said[f"tag {axis}"] == f"{axis} {place[axis]}"
            assert said[f"group {axis}"] == f"group: {', '.join(map(str, ranks))}"
            assert all(said[f"rank {r}"] == f"{r} {axis}" for r in ranks if r != rank)
        rows, heads = (size // sizes["tp"] for size in (4096, config.num_attention_heads))
        first = place["tp"]
        assert said["words tp"] == (
            f"q_proj: rows {span(first * rows, (first + 1) * rows)} of 4,096, "
            f"heads {span(first * heads, (first + 1) * heads)}"
        )
        chunk, last = numbers.SEQ_LEN // (2 * sizes["cp"]), 2 * sizes["cp"] - 1 - place["cp"]
        both = [span(c * chunk, (c + 1) * chunk) for c in (place["cp"], last)]
        if sizes["cp"] > 1:
            assert said["words cp"] == f"tokens {both[0]} and {both[1]}"
        lit = [shapes[f"dp piece {i}"]["fill"] != "quiet" for i in range(numbers.SEQUENCES)]
        mine = sequences_of(numbers.SEQUENCES, sizes["dp"], place["dp"])
        assert [i for i, here in enumerate(lit) if here] == mine
        layers = deal_layers(config, sizes["pp"])[place["pp"]]
        dealt = f"layers {span(layers.start, layers.stop)} of {config.num_hidden_layers}"
        ends = {0: ", the embedding"}.get(place["pp"], "")
        ends += ", the head" if place["pp"] == sizes["pp"] - 1 else ""
        assert said["words pp"] == dealt + ends


def test_ranks_are_chosen_by_mouse_and_keys(page):
    widget = go(page, tp=2, cp=2, dp=2, pp=2, rank=5)
    widget.get_by_role("button", name="rank 12:").click()
    assert browser.number(widget, "place") == "pp 1, dp 1, cp 0, tp 0"
    assert "rank=12" in page.url
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert browser.number(widget, "place") == "pp 1, dp 1, cp 0, tp 1"
    assert page.evaluate("document.activeElement.dataset.id") == "rank 13"
    assert widget.locator(".choice[tabindex='0']").count() == 1
    page.fill("#mesh-rank", "7")
    assert browser.number(widget, "place") == "pp 0, dp 1, cp 1, tp 1"
    assert page.url.endswith("#mesh?tp=2&cp=2&dp=2&pp=2&rank=7&step=0")


def test_each_size_has_its_control_and_64_ranks_are_the_most(page):
    widget = go(page, tp=1, cp=1, dp=1, pp=1, rank=0)
    assert not widget.locator(".transport").is_visible(), "one rank: nothing to play"
    for axis, steps in [("tp", 3), ("cp", 1), ("dp", 1), ("pp", 1)]:
        for _ in range(steps):
            page.press(f"#mesh-{axis}", "ArrowRight")
    assert browser.number(widget, "ranks") == "64"
    page.fill("#mesh-rank", "63")
    page.press("#mesh-pp", "ArrowRight")
    assert "tp=4&cp=2&dp=2&pp=3&rank=47" in page.url
    assert page.locator("#mesh-rank").get_attribute("max") == "47"


def test_groups_of_one_colour(page):
    widget = go(page, tp=2, cp=2, dp=2, pp=2, rank=5)
    moments = [("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), ("pp", "dp", "cp"), ("pp", "tp")]
    assert widget.locator(".place").inner_text() == f"1 / {len(moments) + 1}"
    for axes in moments:
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
            _, groups = mesh_of(rank, dict.fromkeys(AXES, 2))
            assert same == groups[axes]


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
    every = itertools.product(*(SIZES[axis] for axis in AXES))
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
