"""The widget of ZeRO: what it shows of a step is what the engines of step 6 do."""

import json
import re
from urllib.parse import parse_qsl

import browser
import pytest

pytestmark = pytest.mark.browser
ENGINES = ("naive", "bucket", "zero1", "zero2", "zero3")
LAYERS = [1, 2, 3, 4]  # their places among the rows
PAGE = "step6_data_parallel/ZERO.html"


@pytest.fixture(scope="module")
def data(site):
    """What Python has written for the widget."""
    text = (site / "web" / "data" / "zero.js").read_text()
    return json.loads(re.fullmatch(r'Book\.data\["zero"\] = (.+);\n', text)[1])


def kept(point):
    """Bytes of a point of the curve: of weights, gradients and moments."""
    return sum(point[1:])


def test_the_ledger_has_what_the_formulas_say(data):
    n = data["bytes"]
    assert len(data["runs"]) == len(ENGINES) * 2 * 2
    for key, run in data["runs"].items():
        engine, ranks, micro = key.split()
        assert run["counted"] == run["predicted"]
        assert run["moments"][-1]["sent"] == {k: row[:2] for k, row in run["counted"].items()}
        # By hand: the loss, 8 bytes; weights and gradients have n bytes; of zero3's weights some
        # come twice for each micro-batch.
        scattered = {"zero1": n, "zero2": n * int(micro), "zero3": n * int(micro)}.get(engine)
        sums = (
            {"all_reduce": n + 8}
            if scattered is None
            else {"all_reduce": 8, "reduce_scatter": scattered}
        )
        found = {kind: size for kind, (_, size, _) in run["counted"].items()}
        gathered = found.pop("all_gather", 0)
        assert found == sums
        assert gathered == n * (engine in ("zero1", "zero2")) or engine == "zero3"
        assert engine != "zero3" or n * int(micro) < gathered < 2 * n * int(micro)
        share = 1 - 1 / int(ranks)
        for kind, (_, size, sent) in run["counted"].items():
            assert sent == size * share * (2 if kind == "all_reduce" else 1)


def test_a_rank_keeps_what_the_lesson_says(data):
    """Step 6's COSTS.md; n / ranks is a shard of 4 bytes a weight."""
    n = data["bytes"]
    for key, run in data["runs"].items():
        engine, ranks, micro = key.split()
        shard, most = n / int(ranks), max(map(kept, run["curve"]))
        after = {"zero3": 4 * shard, "zero2": n + 3 * shard, "zero1": n + 3 * shard}.get(
            engine, 4 * n
        )
        assert kept(run["curve"][-1]) == after
        if micro == "2":  # with one, zero1 hands its gradients over as they come
            due = {"zero1": 2 * n + 3 * shard, "zero2": after, "zero3": after}.get(engine, after)
            # In passing: what is received of a layer; in zero2 and 3 a layer's gradients that are
            # computed, and one's that are sent; in zero3 two whole layers of weights.
            layers = {"zero1": 0, "zero2": 2, "zero3": 4}.get(engine)
            passing = 0 if layers is None else (layers + 1 / int(ranks)) * n / len(LAYERS)
            assert due <= most <= due + passing, key


def test_when_the_engines_talk(data):
    for key, run in data["runs"].items():
        engine, _, micro = key.split()
        moments = run["moments"]
        passes = [
            (m["what"], m["row"], m["micro"])
            for m in moments
            if m["what"] in ("forward", "backward")
        ]
        rows = ["embedding", "layer 0", "layer 1", "layer 2", "layer 3", "head"]
        assert passes == [
            (what, row, i)
            for i in range(int(micro))
            for what, order in (("forward", rows), ("backward", rows[::-1]))
            for row in order
        ]
        talks = [m["micro"] for m in moments if "l" in m["own"]]
        if engine == "naive":
            assert not talks
        elif engine in ("bucket", "zero1"):  # in the last backward pass only
            assert set(talks) == {int(micro) - 1}
        else:
            assert set(talks) == set(range(int(micro)))
        whole = [[row for row in LAYERS if m["weights"][row] in "wc"] for m in moments]
        if engine != "zero3":
            assert all(m["weights"] in ("w" * 7, "o" * 7) for m in moments)
            continue
        for m, here in zip(moments, whole, strict=True):
            computes = data["rows"].index(m["row"]) if m["row"] else None
            ahead = {"forward": 1, "backward": -1}.get(m["what"])
            if computes in LAYERS:
                assert m["weights"][computes] == "w"
                assert set(here) == {computes, computes + ahead} & set(LAYERS)
            if m["row"] == "head":
                assert here == [4], "the last layer stays"


def test_controls_and_what_the_screen_shows(site, chromium, data):
    address = f"file://{site}/{PAGE}#zero?engine=zero2&ranks=2&micro=2&step=9"
    with browser.opened(chromium, address) as (page, problems):
        zero = browser.ready(page, "#zero")

        def shows(engine, ranks, micro, step):
            run = data["runs"][f"{engine} {ranks} {micro}"]
            moment = run["moments"][step]
            seen = [point for point in run["curve"] if point[0] <= step]
            assert browser.number(zero, "kept") == f"{kept(seen[-1]):,}"
            most = 4 * max(map(kept, seen)) / data["bytes"]
            assert browser.number(zero, "most") == f"{most:.2f} N"
            kinds = [kind for kind, row in run["predicted"].items() if row[1] > 8]
            for kind in kinds:
                assert browser.number(zero, kind) == f"{moment['sent'].get(kind, [0, 0])[1]:,}"
            assert zero.locator(".place").inner_text() == f"{step + 1} / {len(run['moments'])}"

        shows("zero2", 2, 2, 9)
        for name, value in (("engine", "zero3"), ("ranks", "4"), ("micro", "1")):
            zero.locator(f"#zero-{name}").select_option(value)
        shows("zero3", 4, 1, 9)
        for _ in range(2):
            zero.get_by_label("one moment on").click()
        shows("zero3", 4, 1, 11)
        zero.get_by_label("one moment back").click()
        zero.get_by_label("one moment back").press("ArrowLeft")
        shows("zero3", 4, 1, 9)
        written = dict(parse_qsl(page.url.split("?")[1]))
        assert written == {"engine": "zero3", "ranks": "4", "micro": "1", "step": "9"}
        zero.get_by_label("moment", exact=True).press("End")
        shows("zero3", 4, 1, 14)
        zero.locator(".speed").select_option("4")
        zero.locator("button.play").press("Enter")  # from the beginning
        page.wait_for_function("document.querySelector('#zero .place').value[0] === '3'")
        zero.locator("button.play").press("Space")
        rows = (
            zero.locator("table")
            .first.locator("tbody tr")
            .evaluate_all(
                "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
            )
        )
        for (kind, *cells), name in zip(
            rows, ("all_reduce", "reduce_scatter", "all_gather"), strict=True
        ):
            seen, due = (
                data["runs"]["zero3 4 1"][which][name] for which in ("counted", "predicted")
            )
            assert kind.startswith(name.replace("_", "-"))
            assert cells == [
                f"{number:,.0f}" for number in (seen[0], due[0], seen[1], due[1], seen[2])
            ]
    assert not problems


CHECK = """() => {
  const faults = [], { scene } = Book.widgets.zero;
  const runs = Object.keys(Book.data.zero.runs).filter((key) => key.endsWith("2"));
  for (const key of runs) for (const width of [760, 360]) {
    const [engine, ranks, micro] = key.split(" "), found = scene({ engine, ranks, micro }, width);
    for (let step = 0; step < found.steps; step++) {
      const { shapes, caption } = found.at(step), text = JSON.stringify(shapes);
      const say = (what) => faults.push(`${key} ${width} ${step}: ${what}`);
      if (new Set(shapes.map(({ id }) => id)).size < shapes.length) say("an id twice");
      if (JSON.stringify(found.at(step).shapes) !== text) say("not the same twice");
      if (!caption || /undefined|NaN/.test(text + caption)) say(caption);
      for (const { kind, size, x, y, w, h, id } of shapes) {
        if (kind === "text" && size < (width > 500 ? 12 : 11)) say(`${id} is small`);
        const inside = x >= 0 && x + w <= width + 0.01 && y + h <= found.height;
        if (kind === "rect" && !inside) say(`${id} is outside`);
      }
    }
  }
  return faults;
}"""


def test_every_picture_is_in_order_and_nothing_is_cut(site, chromium):
    with browser.opened(chromium, f"file://{site}/{PAGE}#zero?ranks=4", "narrow") as (
        page,
        problems,
    ):
        browser.ready(page, "#zero")
        assert page.evaluate(CHECK) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not problems
