"""The widget of tensor parallelism: its numbers are those of the matrix products, its bytes those
of the formula, and two ranks have what the lesson's "By hand" prints."""

import re
import sys

import browser
import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "assets"))
import numbers_tensor_parallel as numbers  # noqa: E402
import recorded  # noqa: E402

pytestmark = pytest.mark.browser

PAGE = "step4_tensor_parallel/index.html"
EVERY = [(ranks, cut) for ranks in (1, 2, 3, 4) for cut in ("no", "yes")[:ranks]]


@pytest.fixture(scope="module")
def blocks():
    return numbers.blocks()


@pytest.fixture(scope="module")
def page(site, chromium):
    with browser.opened(chromium, f"file://{site}/{PAGE}#tensor_parallel?ranks=2") as found:
        page, problems = found
        browser.ready(page, "#tensor_parallel")
        yield page
        assert not problems


@pytest.fixture(scope="module")
def moments(page):
    """{(ranks, sequence parallelism): what is shown at each moment}."""
    states = [[{"ranks": str(ranks), "sequence": cut}] for ranks, cut in EVERY]
    scene = "Book.widgets.tensor_parallel.scene(state, 760)"
    every = f"((state) => Array.from({{ length: 11 }}, (_, step) => {scene}.at(step)))"
    return dict(zip(EVERY, browser.answers(page, every, states), strict=True))


def shown(moment, what):
    """The numbers of a name on the screen: {(rank, row, column): number}."""
    shapes = moment["shapes"]
    cells = [(re.fullmatch(rf"{what}-(\d)-(\d)-(\d)", shape["id"]), shape) for shape in shapes]
    return {tuple(map(int, name.groups())): shape["text"] for name, shape in cells if name}


@pytest.mark.parametrize("ranks, cut", EVERY)
def test_numbers_are_those_of_matrix_products(moments, ranks, cut):
    features = numbers.FEATURES[ranks]
    x, w1, w2, grad_z = map(np.array, numbers.tensors(features))
    y, grad_y = x @ w1.T, grad_z @ w2
    each = np.arange(features).reshape(ranks, -1)  # the features of each rank, and its tokens
    everyone = np.broadcast_to(np.arange(features), (ranks, features)) if cut == "no" else each
    due = {
        (1, "all x"): [x] * ranks,
        (2, "y"): [y[:, own] for own in each],
        (3, "share of z"): [y[:, own] @ w2[:, own].T for own in each],
        (4, "z"): [(y @ w2.T)[tokens] for tokens in everyone],
        (5, "grad z"): [grad_z[tokens] for tokens in everyone],
        (6, "all grad z"): [grad_z] * ranks,
        (7, "grad y"): [grad_y[:, own] for own in each],
        (8, "share of grad x"): [grad_y[:, own] @ w1[own] for own in each],
        (9, "grad x"): [(grad_y @ w1)[tokens] for tokens in everyone],
        (10, "grad w1"): [grad_y[:, own].T @ x for own in each],
        (10, "grad w2"): [grad_z.T @ y[:, own] for own in each],
    }
    for (step, what), tensors in due.items():
        numbers_due = {
            (rank, i, j): value
            for rank, tensor in enumerate(tensors)
            for (i, j), value in np.ndenumerate(tensor)
        }
        assert shown(moments[ranks, cut][step], what) == numbers_due, what


def test_two_ranks_are_those_of_by_hand(blocks):
    text = (ROOT / "step4_tensor_parallel" / "README.md").read_text()
    for r, rank in enumerate(blocks[2]["no"]["ranks"]):
        share_z, share_x = (message["took"][0] for message in rank["messages"])
        line = re.search(rf"^rank {r}   y (.*)   z (.*)   grad y (.*)   grad x (.*)$", text, re.M)
        printed = [[float(n) for n in re.findall(r"[\d.]+", part)] for part in line.groups()]
        assert printed == [rank["y"][0], share_z, rank["grad y"][0], share_x]


def formula_of_a_layer():
    """What step 4's formula says of one decoder layer, two such blocks: {kind: [calls, bytes]}."""
    from types import SimpleNamespace

    from traffic_tensor import tensor_parallel_traffic

    model = SimpleNamespace(layers=[None], embed_tokens=None)
    found = {}
    for ranks, cut in EVERY:
        args = SimpleNamespace(
            tp_size=ranks, gradient_accumulation_steps=1, micro_batch_size=1,
            seq_len=numbers.FEATURES[ranks], dtype="float32", weights_dtype="float32",
            activation_checkpointing=False, sequence_parallel=cut == "yes",
            config=SimpleNamespace(hidden_size=2),
        )  # fmt: skip
        rows = tensor_parallel_traffic(args, SimpleNamespace(model=model, lm_head=None))
        norms = [row for row in rows if cut == "yes" and row[1] == "all_reduce"]
        found[ranks, cut] = {
            row[1]: [row[2], row[2] * row[3]] for row in rows if row[2] and row not in norms
        }
    return found


def test_bytes_are_those_of_the_formula(moments, blocks):
    (formula,) = recorded.record("step4_tensor_parallel", 1, formula_of_a_layer)
    for (ranks, cut), due in formula.items():
        for rank in blocks[ranks][cut]["ranks"]:
            counted = {}
            for message in rank["messages"]:
                calls, size = counted.get(message["kind"], (0, 0))
                counted[message["kind"]] = [calls + 1, size + message["bytes"]]
            assert {kind: [2 * n for n in both] for kind, both in counted.items()} == due
        figures = moments[ranks, cut][10]["numbers"]
        figures = {number["name"]: number["text"] for number in figures}
        whole = sum(size for _, size in due.values()) // 2
        assert figures["bytes"] == whole
        # An all-reduce sends twice what each of its halves sends.
        assert figures["sent"] == whole * (2 if cut == "no" else 1) * (ranks - 1) // ranks
        assert figures["off"] == blocks[ranks][cut]["off"] == 0


def test_pictures_fit(page):
    states = [{"ranks": str(ranks), "sequence": cut} for ranks, cut in EVERY]
    assert browser.faults(page, "tensor_parallel", states) == []


def test_controls(page):
    page.goto(f"{page.url.split('#')[0]}?controls#tensor_parallel?ranks=2&sequence=no&step=4")
    widget = browser.ready(page, "#tensor_parallel")
    caption = widget.locator(".caption")
    assert caption.inner_text().endswith("25 + 66 = 91.")
    assert browser.number(widget, "calls") == "1 all-reduce"
    cell = widget.locator('[data-id="z-1-0-1"]')
    assert cell.text_content() == "123"

    widget.get_by_label("sequence parallelism").select_option("yes")
    assert "sequence=yes" in browser.address(page)
    assert browser.number(widget, "calls") == "1 all-gather, 1 reduce-scatter"
    assert cell.text_content() == "108"  # of the second token, the only one that rank 1 has now
    widget.get_by_label("ranks (tp)").select_option("4")
    assert caption.inner_text().endswith("25 + 66 + 4 + 12 = 107.")
    widget.get_by_label("one moment on").press("Enter")
    assert browser.address(page).endswith("step=5")
    widget.get_by_label("one moment back").press("ArrowLeft")
    assert browser.address(page).endswith("step=4")
    widget.get_by_label("moment", exact=True).press("End")
    assert browser.number(widget, "bytes") == "160"
    widget.get_by_label("ranks (tp)").press("Home")  # one rank has no sequence parallelism
    assert "ranks=1" in browser.address(page) and "sequence=no" in browser.address(page)
    assert browser.number(widget, "calls") == "none"


def test_narrow(site, chromium):
    address = f"file://{site}/{PAGE}#tensor_parallel?ranks=4&sequence=yes&step=9"
    with browser.opened(chromium, address, "narrow") as (page, problems):
        browser.assert_narrow(page, browser.ready(page, "#tensor_parallel"))
        assert not problems
