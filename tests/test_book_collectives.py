"""The widget of the collectives: its hops do what real ranks do, and what the lesson says."""

import random
import re
import sys

import browser
import pytest

sys.path.append(str(browser.ROOT / "assets"))
import numbers_collectives as numbers  # noqa: E402

pytestmark = pytest.mark.browser
LESSON = browser.ROOT / "step2_process_group" / "README.md"
PAGE = "step2_process_group/index.html"
WAYS = [(kind, way) for kind, ways in numbers.HOPS.items() for way in ways]
CASES = [(kind, way, n) for kind, way in WAYS for n in numbers.RANKS]


@pytest.fixture(scope="module")
def page(site, chromium):
    """The page of the lesson, with the widget."""
    with browser.opened(chromium, f"file://{site}/{PAGE}#collectives?step=0") as (page, problems):
        browser.ready(page, "#collectives")
        yield page
        assert not problems, problems


def played(page, kind, way, n):
    """What the widget shows on every rank, [moment][rank][part]: a number, or None."""
    moments = page.evaluate(
        """([kind, way, n]) => {
          const {hops, inputs} = Book.data.collectives;
          const moments = Book.formulas.collectives.play(kind, hops[kind][way][n], inputs[n]);
          return moments.map((ranks) => ranks.map((row) => row.map((cell) => cell && cell.value)));
        }""",
        [kind, way, n],
    )
    assert len(moments) == len(numbers.HOPS[kind][way](n)) + 1
    return moments


def test_the_last_hop_leaves_what_real_ranks_get(page):
    results = page.evaluate("Book.data.collectives.results")
    for kind, way, n in CASES:
        ranks = played(page, kind, way, n)[-1]
        if kind == "reduce-scatter":  # only this part counts
            ranks = [[row[rank]] for rank, row in enumerate(ranks)]
        assert ranks == results[kind][str(n)], (kind, way, n)


def test_the_numbers_are_those_of_the_lesson_hop_by_hop(page):
    printed = re.findall(r"^after step \d: (.+)$", LESSON.read_text(), re.MULTILINE)
    by_hand = [[eval(f"{row}]") for row in line.split("]")[:-1]] for line in printed]
    assert played(page, "all-reduce", "ring", 3)[1:] == by_hand


def test_nobody_sends_what_it_does_not_have(page):
    for kind, way, n in CASES:
        moments, given = played(page, kind, way, n), numbers.inputs(n)
        if kind == "all-gather":  # at first each rank has only its own part
            given = [
                [x if p == r else None for p, x in enumerate(row)] for r, row in enumerate(given)
            ]
        if kind == "broadcast":  # and here only the first rank has any
            given = [given[0]] + [[None] * n] * (n - 1)
        assert moments[0] == given
        for ranks, hop in zip(moments, numbers.HOPS[kind][way](n), strict=False):
            senders = [sender for sender, *_ in hop]
            assert len(set(senders)) == len(hop) and len({to for _, to, *_ in hop}) == len(hop)
            for sender, to, parts, _ in hop:
                assert sender != to and parts
                assert all(ranks[sender][part] is not None for part in parts), (kind, way, n)


# --- bytes and time -------------------------------------------------------------------------------


def depth(n):
    """Hops up a tree of n ranks."""
    return len(bin(n - 1)) - 2


def gathered(n):
    """Parts in the largest message of each hop up a tree in which parts are collected."""
    spans = [[(rank, 2**k) for rank in range(2**k, n, 2 ** (k + 1))] for k in range(depth(n))]
    return [max(min(span, n - rank) for rank, span in hop) for hop in spans]


def parts_in_hops(kind, way, n):
    """By formula: how many parts of M / n bytes the largest message of each hop has."""
    if way == "tree":
        whole = [n] * depth(n)
        return {
            "all-reduce": whole * 2,
            "broadcast": whole,
            "all-gather": gathered(n) + whole,
            "reduce-scatter": whole + gathered(n)[::-1],
        }[kind]
    hops = {"all-reduce": 2 * (n - 1), "broadcast": 2 * (n - 1), "all-to-all": n - 1 + n % 2}
    return [n] if kind == "exchange" else [1] * hops.get(kind, n - 1)


def lesson_sends(kind, n, size):
    """Bytes that a rank of a ring sends, by the formula in the lesson's table of costs."""
    formula = numbers.sends()[kind].replace("−", "-").replace("·", "*").replace("2 (", "2 * (")
    return eval(formula, {"n": n, "M": size})


def test_bytes_and_hops_are_those_of_the_formulas(page):
    hops = "(k, w, n) => Book.data.collectives.hops[k][w][n]"
    for kind, way, n in CASES:
        sent, parts = page.evaluate(
            f"""([k, w, n]) => {{
              const hops = ({hops})(k, w, n), f = Book.formulas.collectives;
              return [f.sentParts(hops, n), f.partsInHops(hops)];
            }}""",
            [kind, way, n],
        )
        assert parts == parts_in_hops(kind, way, n), (kind, way, n)
        if way != "tree":
            assert max(sent) == pytest.approx(lesson_sends(kind, n, n)), (kind, n)
            assert kind == "broadcast" or len(set(sent)) == 1
        elif kind == "reduce-scatter":
            assert max(sent) < 2 * n or n == 2
        else:
            assert max(sent) == depth(n) * n


def test_seconds(chromium):
    draw = random.Random(1)
    cases = [
        (
            [draw.randint(1, 8) for _ in range(draw.randint(1, 14))], draw.randint(2, 8),
            draw.randint(1, 10**10), draw.uniform(0.001, 1), draw.uniform(0.1, 1000),
        )
        for _ in range(500)
    ]  # fmt: skip
    with browser.bare(chromium, "collectives") as page:
        found = browser.answers(page, "Book.formulas.collectives.seconds", cases)
    for (parts, n, size, latency, bandwidth), seconds in zip(cases, found, strict=True):
        expected = sum(latency / 1e3 + part * size / n / (bandwidth * 1e9) for part in parts)
        assert seconds == pytest.approx(expected, rel=1e-9)


# --- on the screen --------------------------------------------------------------------------------


def short(value, units):
    """Three digits and the unit that fits."""
    size, unit = next((u for u in reversed(units) if value >= u[0]), units[0])
    return f"{float(f'{value / size:.3g}'):g} {unit}"


def bytes_of(value):
    return short(value, [(1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB")])


def time_of(value):
    return short(value, [(1e-6, "µs"), (1e-3, "ms"), (1, "s")])


def assert_shown(widget, kind, way, n, size, latency, bandwidth):
    """The numbers of a state are those of the formulas."""
    parts = parts_in_hops(kind, way, n)
    total = sum(parts) * size / n
    seconds = len(parts) * latency / 1e3 + total / bandwidth / 1e9
    words = f"{len(parts)} × {time_of(latency / 1e3)} + {bytes_of(total)} / {bandwidth:g} GB/s"
    assert browser.number(widget, "time") == f"{words} = {time_of(seconds)}"
    assert widget.locator(".place").inner_text().endswith(f"/ {len(parts) + 1}")
    if way != "tree":
        sent = browser.number(widget, "sent")
        assert sent.endswith(f"= {bytes_of(lesson_sends(kind, n, size))}")


def test_each_control(page):
    widget, links = page.locator("#collectives"), numbers.links()
    base = {"size": 10**6, "latency": links["latency"], "bandwidth": links["gloo"]}
    assert_shown(widget, "all-reduce", "ring", 3, **base)
    assert "gloo" in browser.shapes(widget)["link"]["text"]
    page.select_option("#collectives-way", "tree")
    assert_shown(widget, "all-reduce", "tree", 3, **base)
    page.fill("#collectives-ranks", "7")
    assert_shown(widget, "all-reduce", "tree", 7, **base)
    for key in ("size", "latency", "bandwidth"):
        page.press(f"#collectives-{key}", "ArrowRight")
    base = {"size": 2 * 10**6, "latency": 0.5, "bandwidth": 1.0}
    assert_shown(widget, "all-reduce", "tree", 7, **base)
    assert widget.locator('[data-id="link"]').count() == 0, "no longer the link of a lesson"
    for kind, way in [("broadcast", "tree"), ("exchange", "ring"), ("all-to-all", "pairs")]:
        page.select_option("#collectives-kind", kind)
        assert page.locator("#collectives-way").is_visible() == (kind == "broadcast")
        assert_shown(widget, kind, way, 7, **base)
    assert browser.address(page).endswith(
        "#collectives?kind=all-to-all&way=tree&ranks=7&size=2000000&latency=0.5&bandwidth=1&step=0"
    )


def test_the_hops_on_the_screen(site, chromium):
    address = f"file://{site}/{PAGE}#collectives?kind=reduce-scatter&ranks=4&step=0"
    with browser.opened(chromium, address, "narrow") as (page, problems):
        widget = browser.ready(page, "#collectives")

        def texts(what):
            shapes = browser.shapes(widget)
            return [shapes[f"{what} {rank}"]["text"] for rank in range(4)]

        for hop in range(4):
            assert texts("sent") == [f"{hop}/4 M" if hop else "0"] * 4
            widget.locator(".on").press("Enter")
        assert [texts(f"cell {rank}")[rank] for rank in range(4)] == [
            "1111",
            "2222",
            "3333",
            "4444",
        ]
        assert "3 hops" in widget.locator(".caption").inner_text()
        assert browser.address(page).endswith("step=3")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert not problems, problems


@pytest.mark.parametrize("width", [760, 360])
def test_everything_has_its_place(page, width):
    links = numbers.links()
    measured = {"size": 10**6, "latency": links["latency"], "bandwidth": links["gloo"]}
    slow = {"size": 10**10, "latency": 1, "bandwidth": 0.1}
    for kind, way in WAYS:
        for n, link in ((2, slow), (3, measured), (8, slow)):
            state = {"kind": kind, "way": way, "ranks": n, **link}
            assert not browser.misplaced(page, "collectives", state, width)
