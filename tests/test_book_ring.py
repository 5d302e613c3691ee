"""The widget of the ring: steps as in step 5's code, numbers as in its formula."""

import sys

import browser
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "assets"))
import numbers_ring  # noqa: E402
import recorded  # noqa: E402

pytestmark = pytest.mark.browser

PAGE = "step5_context_parallel/index.html"
EVERY = [(dealing, cp) for dealing in ("zigzag", "contiguous") for cp in numbers_ring.RANKS]


@pytest.fixture(scope="module")
def rings():
    return numbers_ring.rings()


@pytest.fixture(scope="module")
def page(site, chromium):
    with browser.opened(chromium, f"file://{site}/{PAGE}#ring?cp=4") as (page, problems):
        browser.ready(page, "#ring")
        yield page
        assert not problems


def squares(ring, rank, does):
    """{(chunk of queries, chunk of keys): work} of a step."""
    chunks, keys = ring[rank]["chunks"], ring[does["block"]]["chunks"]
    pairs = [(chunks[i], keys[j]) for i in does["queries"] for j in does["keys"]]
    return {(q, k): 0.5 if q == k else 1 for q, k in pairs if k <= q or not does["causal"]}


@pytest.mark.parametrize("dealing, cp", EVERY)
def test_all_is_computed_once_and_blocks_come_from_the_neighbour(rings, dealing, cp):
    ring = rings[dealing][cp]
    triangle = sorted((q, k) for q in range(2 * cp) for k in range(q + 1))
    for direction, way in (("forward", 1), ("backward", -1)):
        steps = [(r, does) for r, rank in enumerate(ring) for does in rank[direction]]
        cells = [cell for r, does in steps for cell in squares(ring, r, does)]
        assert sorted(cells) == triangle
        for r, rank in enumerate(ring):
            for now, then in zip(rank[direction], rank[direction][1:], strict=False):
                if now["block_to"] is not None:
                    assert now["block_to"] == (r + way) % cp
                    there = ring[now["block_to"]][direction]
                    assert there[rank[direction].index(then)]["block"] == now["block"]
                elif direction == "backward":  # the last one that travels; then comes its own
                    assert then["block"] == r
    assert [rank["backward"][0]["block"] for rank in ring] == [
        rank["forward"][-1]["block"] for rank in ring
    ]


@pytest.mark.parametrize("cp", [2, 4])
def test_backward_is_what_processes_do(rings, cp):
    run = recorded.record("step5_context_parallel", cp, recorded.backward_round_the_ring)
    drawn = [
        [
            does | {key: 2 * len(does[key]) for key in ("queries", "keys")}
            for does in rank["backward"]
        ]
        for rank in rings["zigzag"][cp]
    ]
    for steps in drawn:
        for does in steps:
            del does["causal"]
    assert drawn == run


def test_contiguous_chunks_are_those_that_ring_work_measures(rings):
    (blocks,) = recorded.record("step5_context_parallel", 1, blocks_that_ring_work_measures)
    for cp, ring in rings["contiguous"].items():
        for rank, due in zip(ring, blocks[cp], strict=True):
            steps = [does for does in rank["forward"] if does["keys"]]
            assert [(does["queries"], does["keys"], does["causal"]) for does in steps] == due


def blocks_that_ring_work_measures():
    import ring_work

    return {
        cp: [
            [([0, 1][rows], [0, 1][columns], causal) for rows, columns, causal in blocks]
            for blocks in (ring_work.blocks_of(rank, cp, 2, False) for rank in range(cp))
        ]
        for cp in numbers_ring.RANKS
    }


def formula():
    return {
        cp: [
            sum(calls * size for _, kind, calls, size in numbers_ring.traffic(cp, rank))
            for rank in range(cp)
        ]
        for cp in numbers_ring.RANKS
    }


def test_numbers_of_every_rank(page, rings):
    """Bytes are those of traffic_context.py; work is that of the squares."""
    (due,) = recorded.record("step5_context_parallel", 1, formula)
    states = [
        {"cp": cp, "dealing": dealing, "rank": rank} for dealing, cp in EVERY for rank in range(cp)
    ]
    last = "((state) => Book.widgets.ring.scene(state, 760).at(2 * state.cp).numbers)"
    found = browser.answers(page, last, [[state] for state in states])
    for state, numbers in zip(states, found, strict=True):
        shown = {number["name"]: number["text"] for number in numbers}
        cp, rank, ring = state["cp"], state["rank"], rings[state["dealing"]][state["cp"]]
        work = [
            sum(sum(squares(ring, r, does).values()) for does in ring[r]["forward"])
            for r in range(cp)
        ]
        assert float(shown["ratio"]) == pytest.approx(max(work) * cp / sum(work), abs=5e-4)
        assert shown["work"] == f"{work[rank]:g} of {work[rank]:g}"
        if state["dealing"] == "zigzag":
            assert shown["bytes"] == f"{due[cp][rank]:,}"
            assert shown["messages"] == f"{2 * cp - 3} kv, {cp - 1} ∇"
    assert due[4][0] * 8 == 4_194_304  # what the lesson's run prints, of 8 layers


def test_pictures_fit(page):
    states = [{"cp": cp, "dealing": d, "rank": cp - 1} for d, cp in EVERY]
    assert browser.faults(page, "ring", states) == []


def test_cells_and_blocks_on_the_screen(page, rings):
    """A rank's squares have its number, and its box has the block that it has."""
    step = 3  # of backward
    address = page.url.split("#")[0]
    page.goto(f"{address}?cells#ring?cp=8&dealing=zigzag&rank=1&step={8 + step}")
    browser.ready(page, "#ring")
    ring = rings["zigzag"][8]
    for r, rank in enumerate(ring):
        for query, key in squares(ring, r, rank["backward"][step]):
            assert of(page, f"digit-{query}-{key}").text_content() == str(r)
        block = of(page, f"kv-{rank['backward'][step]['block']}")
        assert inside(block.bounding_box(), of(page, f"node-{r}").bounding_box())


def of(page, name):
    return page.locator(f'#ring [data-id="{name}"]')


def inside(small, large):
    return all(
        large[at] <= small[at] and small[at] + small[size] <= large[at] + large[size]
        for at, size in (("x", "width"), ("y", "height"))
    )


def test_controls(page):
    """Each by mouse or keyboard; the address says what one sees, and a page begins with it."""
    page.goto(f"{page.url.split('?')[0].split('#')[0]}?controls#ring?cp=4&rank=3&step=6")
    ring = browser.ready(page, "#ring")
    assert browser.number(ring, "messages") == "5 kv, 3 ∇"
    assert ring.locator(".caption").inner_text().startswith("Backward, step 2. Rank 3 has kv 2.")

    ring.get_by_label("ranks (cp)").press("ArrowLeft")  # rank 3 is gone then
    assert "cp=3" in browser.address(page) and "rank=2" in browser.address(page)
    ring.get_by_label("chunks").select_option("contiguous")
    assert "dealing=contiguous" in browser.address(page)
    assert browser.number(ring, "ratio") == "1.667"
    ring.locator("#ring-rank").press("ArrowLeft")
    assert "rank=1" in browser.address(page)
    box = of(page, "node-name-0").bounding_box()  # what stands in a box lets clicks through
    page.mouse.click(box["x"] + 3, box["y"] + 3)
    assert "rank=0" in browser.address(page)
    of(page, "node-2").press("Enter")
    assert "rank=2" in browser.address(page)
    assert of(page, "node-2").evaluate("node => node === document.activeElement")

    ring.get_by_label("one moment on").click()
    assert browser.address(page).endswith("step=6")  # the last one of 3 ranks
    ring.get_by_label("one moment back").click()
    assert browser.address(page).endswith("step=5")
    of(page, "node-2").press("ArrowLeft")
    assert browser.address(page).endswith("step=4")
    ring.get_by_label("moment", exact=True).press("Home")
    assert browser.address(page).endswith("step=0")
    assert "Rank 2 computes with its own block" in ring.locator(".caption").inner_text()
    ring.get_by_label("speed").select_option("4")
    ring.get_by_label("play", exact=True).last.click()
    page.wait_for_function("document.querySelector('#ring .place').value != '1 / 7'", timeout=5_000)


def test_narrow(site, chromium):
    address = f"file://{site}/{PAGE}#ring?cp=8&dealing=contiguous&step=9"
    with browser.opened(chromium, address, "narrow") as (page, problems):
        browser.assert_narrow(page, browser.ready(page, "#ring"))
        assert not problems
