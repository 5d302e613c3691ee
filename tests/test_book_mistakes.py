"""The widget of mistakes: curves of real runs, and what is said of them."""

import itertools
import json
import sys

import browser
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "assets"))
import mistakes  # noqa: E402

pytestmark = pytest.mark.browser
FILE = ROOT / "assets" / "mistakes.json"
KEPT = json.loads(FILE.read_text())
PAGE = "step3_dataloader/index.html"


def right(name):
    return KEPT["right"][KEPT["mistakes"][name]["more"]]


def test_the_file_has_each_mistake(chromium):
    assert FILE.stat().st_size < 60_000
    with browser.bare(chromium, "mistakes") as page:
        said = page.evaluate("Book.formulas.mistakes.names()")
    assert sorted(KEPT["mistakes"]) == sorted(mistakes.MISTAKES) == sorted(said)


@pytest.mark.parametrize("name", mistakes.MISTAKES)
def test_the_loss_looks_right_and_the_gradients_do_not(name):
    run = KEPT["mistakes"][name]
    assert max(run["right_apart"]) < 1e-10, "the right run in this layout"
    assert all(len(run[key]) == mistakes.STEPS for key in ("loss", "grad_norm", "apart"))
    last, due = run["loss"][-1], right(name)["loss"][-1]
    assert last == pytest.approx(due, rel=0.03) and last < run["loss"][0] - 1
    if name == "weights_in_bfloat16":
        assert run["apart"][0] == run["off"] == run["moved"] == 0 < right(name)["moved"]
    else:
        assert run["apart"][0] > 0.5 and run["off"] > 0


def test_what_the_captions_say_is_so():
    runs = KEPT["mistakes"]
    norms = ["input_layernorm", "post_attention_layernorm", "norm"]
    assert runs["norm_gradients_of_own_tokens"]["off_in"] == norms
    assert runs["ends_not_summed"]["off_in"] == ["embed_tokens"]
    assert not {"lm_head", "norm"} & {*runs["gradients_never_sent_home"]["off_in"]}
    assert runs["scale_gradients"]["loss"] == pytest.approx(right("scale_gradients")["loss"], 1e-4)
    assert runs["positions_from_zero"]["loss"][-1] < right("positions_from_zero")["loss"][-1]
    firsts = {
        name: (run["grad_norm"][0], right(name)["grad_norm"][0]) for name, run in runs.items()
    }
    assert firsts["scale_gradients"][0] == pytest.approx(2 * firsts["scale_gradients"][1], 1e-4)
    for name in ("norm_gradients_of_own_tokens", "positions_from_zero", "weights_in_bfloat16"):
        assert firsts[name][0] == pytest.approx(firsts[name][1], 1e-3)
    smaller = {name for name, (found, due) in firsts.items() if found < 0.9 * due}
    assert smaller == {
        "only_the_last_micro_batch_is_summed", "gradients_not_summed",
        "gradients_never_sent_home", "ends_not_summed",
    }  # fmt: skip


def test_the_command_trains_both_runs(tmp_path):
    """A factor of 2 on every gradient, in two steps."""
    step, ranks, flags, _ = mistakes.MISTAKES["scale_gradients"]
    one = mistakes.run("step3_dataloader", 1, "--micro_batch_size 4", 2, None, tmp_path, keep=True)
    right = mistakes.run(step, ranks, flags, 2, None, tmp_path)
    wrong = mistakes.run(step, ranks, flags, 2, "scale_gradients", tmp_path)
    assert (right["loss"], right["off"]) == (one["loss"], 0) and max(right["apart"]) < 1e-12
    assert wrong["apart"][0] == 1.0 and wrong["off"] == wrong["tensors"] == 39
    assert wrong["grad_norm"][0] == pytest.approx(2 * one["grad_norm"][0], 1e-3)


def shows(widget, name):
    run = KEPT["mistakes"][name]

    def pair(key, place):
        other, due = browser.number(widget, key).split(", right: ")
        own = run["right_apart"] if key == "apart" else right(name)[key]
        assert float(other) == pytest.approx(run[key][place], rel=2e-4, abs=1e-20)
        assert float(due) == pytest.approx(own[place], rel=0.05 if key == "apart" else 2e-4)

    pair("loss", -1)
    pair("grad_norm", 0)
    pair("apart", 0)
    assert browser.number(widget, "off") == f"{run['off']} of {run['tensors']}"
    assert widget.locator('[data-number="moved"]').count() == (run["ranks"] == 1)


def test_each_shape_has_its_place(site, chromium):
    states = [{"mistake": name} for name in mistakes.MISTAKES]
    with browser.opened(chromium, f"file://{site}/{PAGE}#mistakes?step=0") as (page, _):
        browser.ready(page, "#mistakes")
        assert browser.faults(page, "mistakes", states) == []
        for state, width in itertools.product(states, (760, 360)):
            assert browser.misplaced(page, "mistakes", state, width) == []


@pytest.mark.parametrize("size", browser.SIZES)
def test_the_page(site, chromium, size):
    names = list(mistakes.MISTAKES)
    with browser.opened(chromium, f"file://{site}/{PAGE}", size) as (page, problems):
        widget = browser.ready(page, "#mistakes")
        choice = page.locator("#mistakes-mistake")
        assert choice.input_value() == "norm_gradients_of_own_tokens"
        for name in names:
            choice.select_option(name)
            shows(widget, name)
            assert f"mistake={name}" in page.url
        choice.press("ArrowUp")
        shows(widget, choice.input_value())
        assert choice.input_value() != names[-1]
        said = set()
        for _ in range(4):
            said.add(widget.locator(".caption").inner_text())
            widget.get_by_label("one moment on").press("Enter")
        assert len(said) == 4 and "step=3" in page.url
        saved = page.url
        page.goto("about:blank")
        page.goto(saved)
        browser.ready(page, "#mistakes")
        assert widget.locator(".place").inner_text() == "4 / 4"
        assert page.evaluate("document.documentElement.scrollWidth") <= browser.SIZES[size][0]
        assert problems == []
