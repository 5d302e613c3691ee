"""The widget of the planner: its formulas are plan.py's, and its screen shows them."""

import contextlib
import io
import math
import random
import sys
from urllib.parse import parse_qsl

import browser
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "assets"))
import numbers_planner  # noqa: E402
from numbers_zero import ENGINES  # noqa: E402

pytestmark = pytest.mark.browser
CHOICES = {  # of the lists, and what is chosen in a test
    "dp_engine": "zero2",
    "sequence_parallel": "no",
    "activation_checkpointing": "no",
    "model_name": "llama-3.2-1b",
    "gpu": "A100, 80 GB",
}
FLAGS = ("tp_size", "cp_size", "dp_size", "pp_size", "dp_engine", "sequence_parallel",
         "activation_checkpointing", "seq_len", "micro_batch_size",
         "gradient_accumulation_steps")  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def layers_dealt_once():
    """`deal_layers` for each model and number of stages only once: plan.py asks for every stage."""
    plan = numbers_planner.load("plan")
    deal, dealt = plan.deal_layers, {}

    def once(config, stages):
        key = str(config), stages
        if key not in dealt:
            dealt[key] = deal(config, stages)
        return dealt[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "deal_layers", once)
        yield


def layout(state):
    """The flags of a state of the widget, with yes and no as true and false."""
    return {name: {"yes": True, "no": False}.get(state[name], state[name]) for name in FLAGS}


def planned(state):
    """All stages by Python's formulas, or the text of the error."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = numbers_planner.arguments(state["model_name"], **layout(state))
    except SystemExit:
        return said.getvalue().splitlines()[-1].split("error: ")[1]
    gpu = numbers_planner.gpu(state["gpu"])
    found = []
    for place in range(args.pp_size):
        stage = numbers_planner.load("plan").Stage(args, place)
        found.append(
            {
                "layers": stage.layers,
                "weights": stage.weights,
                "memory": stage.memory(),
                "traffic": [list(row) for row in stage.traffic()],
                "flops": stage.flops(),
                "seconds": numbers_planner.seconds(args, stage, gpu),
            }
        )
    return found


def same(found, due):
    """Exact in integers that a double holds, else to 1e-9."""
    if isinstance(due, dict):
        return found.keys() == due.keys() and all(same(found[key], due[key]) for key in due)
    if isinstance(due, list):
        return len(found) == len(due) and all(map(same, found, due))
    if isinstance(due, float) or isinstance(due, int) and due > 2**53:
        return found == pytest.approx(due, rel=1e-9)
    return found == due


def gigabytes(stage):
    return f"{sum(stage['memory'].values()) / 1e9:.2f}"


def state_of(planner):
    """What the controls say; the address, once it says something, says the same."""
    state = {name: planner.locator(f"#planner-{name}").input_value() for name in CHOICES}
    for name in FLAGS:
        if name not in CHOICES:
            output = planner.locator(f"output[for=planner-{name}]").inner_text()
            state[name] = int(output.replace(",", ""))
    return state


def test_formulas_are_those_of_python(chromium):
    """500 layouts that run, and as they come those that do not, whose errors are the same."""
    draw, models = random.Random(1), list(numbers_planner.numbers()["models"].items())
    inputs, due = [], []
    while sum(not isinstance(one, str) for one in due) < 500:
        name, shape = models[len(due) % len(models)]
        sizes = (1, 2, 3, 4, 5, 8, 9, 16, 32)
        tps = [size for size in sizes if shape["num_key_value_heads"] % size == 0]
        state = {
            "model_name": name,
            "tp_size": draw.choice(tps if draw.random() < 0.95 else sizes),
            "cp_size": draw.choice((1, 1, 2, 3, 4, 5, 8)),
            "dp_size": draw.choice((1, 2, 3, 4, 8, 64)),
            "pp_size": draw.choice((1, 1, 2, 3, 5, 8, 16)),
            "dp_engine": ENGINES[len(due) // len(models) % len(ENGINES)],
            "sequence_parallel": draw.random() < 0.5,
            "activation_checkpointing": draw.random() < 0.5,
            "seq_len": draw.choice((96, 768, 1536, 6144, 49152, 49152 * 5)),
            "micro_batch_size": draw.choice((1, 2, 3, 32)),
            "gradient_accumulation_steps": draw.choice((1, 2, 7, 64)),
            "gpu": draw.choice(list(numbers_planner.GPUS)),
        }
        inputs.append([shape, state, numbers_planner.gpu(state["gpu"]), numbers_planner.HOST])
        due.append(planned(state))
    formulas = "Book.formulas.planner"
    either = f"((...all) => {formulas}.problem(...all) ?? {formulas}.stages(...all))"
    with browser.bare(chromium, "planner") as page:
        found = browser.answers(page, either, inputs)
    for given, one, right in zip(inputs, found, due, strict=True):
        assert same(one, right), given
    runs = [
        state for (_, state, *_), one in zip(inputs, due, strict=True) if not isinstance(one, str)
    ]
    pairs = {(state["model_name"], state["dp_engine"]) for state in runs}
    assert len(pairs) == len(models) * len(ENGINES)
    errors = {one.split(": ")[0].split("--")[-1].split()[0] for one in due if isinstance(one, str)}
    assert {"num_attention_heads", "seq_len", "num_hidden_layers"} <= errors


def test_every_control_and_what_the_screen_shows(site, chromium):
    address = f"file://{site}/step9_4d/index.html#planner?pp_size=2&seq_len=4096"
    with browser.opened(chromium, address) as (page, problems):
        planner = browser.ready(page, "#planner")
        assert state_of(planner)["pp_size"] == 2 and state_of(planner)["seq_len"] == 4096
        for name in (*FLAGS, "model_name", "gpu"):
            control, before = planner.locator(f"#planner-{name}"), state_of(planner)
            if name in CHOICES:
                control.select_option(CHOICES[name])
            else:
                control.focus()
                for _ in range(1 + (name == "tp_size")):  # no model here has 3 kv heads
                    page.keyboard.press("ArrowRight")
            state = state_of(planner)
            assert {key for key in state if state[key] != before[key]} == {name}
            written = dict(parse_qsl(page.url.split("?")[1]))
            assert written == {key: str(value) for key, value in state.items()} | {"step": "0"}
            stages = planned(state)
            assert browser.number(planner, "needs") == max(map(gigabytes, stages), key=float), name
        most = max(stages, key=lambda one: sum(one["memory"].values()))
        ranks = math.prod(state[name] for name in FLAGS[:4])
        sequences = math.prod(state[name] for name in ("dp_size", *FLAGS[-2:]))
        numbers = {
            "gpus": f"{ranks:,}",
            "tokens": f"{sequences * state['seq_len']:,}",
            "weights": f"{most['weights']:,}",
            "layers": " ".join(str(one["layers"]) for one in stages),
        }
        assert {name: browser.number(planner, name) for name in numbers} == numbers
        last = planner.locator("tbody tr td:last-child").all_inner_texts()
        assert last == list(map(gigabytes, stages))
        slowest = max(most["seconds"], key=most["seconds"].get)
        bold = planner.locator("svg [data-id^='row '] text[font-weight='700']")
        assert bold.all_text_contents() == [{"dp_cp": "dp × cp"}.get(slowest, slowest)]
    assert not problems


def test_a_layout_that_cannot_run(site, chromium):
    """The line of the error is that of the program; on a narrow page nothing is cut."""
    address = f"file://{site}/step9_4d/index.html#planner?tp_size=3"
    with browser.opened(chromium, address, "narrow") as (page, problems):
        planner = browser.ready(page, "#planner")
        lines = planner.locator("svg [data-id^=error]").all_text_contents()
        assert " ".join(lines) == f"error: {planned(state_of(planner))}"
        assert planner.locator("svg [data-id=verdict]").text_content() == "This layout cannot run"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not problems
