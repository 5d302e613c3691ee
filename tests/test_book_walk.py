"""The walk player: its code at each moment, its controls, the address, speech."""

import contextlib
import json
import re
import sys

import browser
import lessons
import pytest
import test_book_walk_data as by_python
from conftest import ROOT

sys.path.append(str(ROOT / "assets"))
import book_walk  # noqa: E402

pytestmark = pytest.mark.browser
RING = "step5_context_parallel/index.html"
CLOCK = """
  let now = 0, next = [], number = 0;
  performance.now = () => now;
  window.requestAnimationFrame = (call) => { next.push([++number, call]); return number; };
  window.cancelAnimationFrame = (gone) => { next = next.filter(([known]) => known !== gone); };
  window.pass = (seconds) => {
    for (const end = now + 1000 * seconds; now < end;) {
      now += 100;
      const due = next;
      next = [];
      due.forEach(([, call]) => call(now));
    }
  };
"""
VOICE = """
  window.spoken = [];
  window.SpeechSynthesisUtterance = class { constructor(text) { this.text = text; } };
  Object.defineProperty(window, "speechSynthesis", { value: {
    getVoices: () => VOICES, speak: (words) => spoken.push(words), cancel() {},
    addEventListener() {},
  } });
"""


@pytest.fixture
def player(site, chromium):
    """player(page of the site, …): (page, walk) in a browser that complains of nothing."""
    with contextlib.ExitStack() as stack:
        complaints = []

        def make(path, size="wide", script="", **more):
            opened = browser.opened(chromium, "about:blank", size, **more)
            page, problems = stack.enter_context(opened)
            complaints.append(problems)
            if script:
                page.add_init_script(script)
            page.goto(f"file://{site}/{path}")
            return page, browser.ready(page, "#walk")

        yield make
    assert not any(complaints), complaints


@pytest.fixture
def view(site, chromium):
    """The view alone, as a film has it, with the checks of walk_checks.js."""
    with browser.bare(chromium, "walk") as page:
        for name in ("walk_5_README", "walk_6_ZERO", "walk_9_README"):
            page.add_script_tag(path=site / "web" / "data" / f"{name}.js")
        page.add_style_tag(path=ROOT / "assets" / "web" / "walk.css")
        page.add_script_tag(path=ROOT / "tests" / "walk_checks.js")
        yield page


def shown(walk):
    """The lines of code on the screen."""
    return [text.removesuffix("\n") for text in walk.locator(".row").all_text_contents()]


def address(page):
    return page.evaluate("location.hash")


def title(walk):
    return walk.locator(".walk-title").inner_text()


# --- the code at each moment ----------------------------------------------------------------------


def test_all_data_make_the_files(site):
    """With colours, as the book has them: without, test_book_walk_data.py compares them."""
    for page in book_walk.pages():
        script = site / "web" / "data" / f"{book_walk.data_name(page)}.js"
        assert script.stat().st_size <= 250_000
        with_marks = json.loads(script.read_text().partition(" = ")[2].removesuffix(";\n"))
        expected = by_python.states(by_python.data(page))[-1]
        for file, lines in by_python.states(with_marks)[-1].items():
            assert [*map(book_walk.plain, lines)] == expected[file]


@pytest.mark.parametrize("name", ["walk_5_README", "walk_6_ZERO"])
def test_edits_in_javascript_are_those_in_python(view, name):
    page = next(page for page in book_walk.pages() if book_walk.data_name(page) == name)
    expected = by_python.states(by_python.data(page))
    assert view.evaluate("name => checks.states(name)", name) == expected
    at_rest = view.evaluate("name => checks.atRest(name)", name)
    for (file, lines), files in zip(at_rest, expected, strict=True):
        assert lines == files[file]
    if name == "walk_5_README":
        for file, lines in expected[-1].items():
            assert by_python.joined(lines) == (lessons.step_of(5) / file).read_text()


def test_a_picture_depends_on_its_time_alone(view):
    """In another order the pictures are the same, and between two changes nothing moves."""
    wrong, pictures = view.evaluate("checks.wrongPictures('walk_5_README', [9, 13])")
    assert wrong == [] and pictures > 40


def test_lines_are_typed_struck_and_gone(view):
    """Item 14 of step 5 strikes lines, types others for them, and ends with the step's file."""
    pictures = view.evaluate("checks.pictures('walk_5_README', 13)")
    assert [*dict.fromkeys(picture["shot"] for picture in pictures)] == [
        "context_parallel.py sum_gradients",
        "train.py mean_loss, forward_backward",
    ]
    train = [picture for picture in pictures if picture["shot"].startswith("train.py")]
    struck = train[0]["struck"]
    assert struck and not train[-1]["struck"]
    before, after = ((lessons.step_of(n) / "train.py").read_text() for n in (4, 5))
    assert all(line in before and f" {line}\n" not in after for line in struck)
    assert train[-1]["lines"] == after.splitlines()
    assert {picture["typed"] for picture in train} == {0, 1}
    parts = {line for picture in train for line in picture["lines"]}
    parts -= {*before.splitlines(), *after.splitlines()}  # of lines: few are typed word by word
    assert any(line.startswith(part) for part in parts for line in after.splitlines())


def test_each_deletion_is_seen(view):
    """Item 10 of step 9 deletes two lines with nothing in their place, before it types others."""
    lines = [picture["lines"] for picture in view.evaluate("checks.pictures('walk_9_README', 9)")]
    assert any(len(a) - len(b) == 2 for a, b in zip(lines[:-1], lines[1:], strict=True))


def test_a_long_explanation_moves_on_with_its_code(view):
    assert view.evaluate("checks.ways('walk_5_README', 2, 240)") == [0, 1, 0]


def test_the_lit_lines_are_in_view(view):
    assert view.evaluate("checks.hidden('walk_5_README')") == []


# --- the player on a page -------------------------------------------------------------------------


def test_controls_by_mouse(player):
    page, walk = player(RING)
    assert title(walk).startswith("1. ") and address(page) == ""
    assert walk.locator(".place").inner_text() == "1 / 14"
    assert not walk.get_by_role("button", name="Speak").is_visible()  # no voice is here
    walk.get_by_label("one moment on").click()
    assert title(walk) == "2. Its gradients" and address(page) == "#walk?item=2"
    walk.get_by_label("one moment back").click()
    walk.get_by_label("one moment back").click()
    assert title(walk) == "Before the first item" and address(page) == "#walk?item=0"
    walk.get_by_label("moment", exact=True).fill("6")
    assert title(walk) == "6. Its tokens and targets"
    walk.get_by_label("speed").select_option("2")
    assert address(page) == "#walk?item=6&speed=2"
    walk.get_by_role("button", name="Items").click()
    walk.get_by_role("button", name="14. Sum over the sequence").click()
    assert not walk.get_by_role("button", name="14. Sum").is_visible()
    assert address(page) == "#walk?item=14&speed=2"
    tabs = walk.locator(".walk-tab")
    assert tabs.all_inner_texts()[-1] == "train.pychanged"
    assert walk.locator(".walk-tab[aria-current=true]").inner_text().startswith("context_parallel")
    walk.locator(".walk-shot").nth(1).click()
    assert walk.locator(".walk-tab[aria-current=true]").inner_text().startswith("train.py")
    assert shown(walk) == (lessons.step_of(5) / "train.py").read_text().splitlines()
    assert walk.locator(".row.lit").first.is_visible()
    tabs.first.click()
    assert shown(walk) == (lessons.step_of(5) / "attention_blocks.py").read_text().splitlines()
    walk.get_by_role("link", name="Its place in the lesson").click()
    assert address(page) == "#14-sum-over-the-sequence"


def test_playing_types_and_goes_on(player):
    page, walk = player(RING, script=CLOCK)
    walk.get_by_label("play", exact=True).last.click()
    page.evaluate("pass(1.5)")
    assert address(page) == "#walk?item=1&play=yes"
    few = len(shown(walk))
    page.evaluate("pass(2)")
    assert len(shown(walk)) > few
    walk.get_by_label("pause").click()
    typed = shown(walk)
    page.evaluate("pass(2)")
    assert shown(walk) == typed and address(page) == "#walk?item=1"  # it waits where it was
    walk.get_by_label("speed").select_option("4")
    walk.get_by_label("play", exact=True).last.click()
    for _ in range(20):
        page.evaluate("pass(1)")
        if title(walk).startswith("2. "):
            break
    assert address(page) == "#walk?item=2&speed=4&play=yes"
    page.evaluate("location.hash = '#walk?item=14&play=yes'")
    for _ in range(20):
        page.evaluate("pass(1)")
        if address(page) == "#walk?item=14&speed=4":
            break
    assert walk.locator(".place").inner_text() == "14 / 14"


def test_keyboard_alone(player):
    page, walk = player(f"{RING}#walk?item=3")
    walk.locator(".walk-pane").focus()
    page.keyboard.press("ArrowRight")
    assert title(walk) == "4. Merging"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert title(walk) == "2. Its gradients"
    page.keyboard.press(" ")
    assert walk.get_by_label("pause").is_visible()
    page.keyboard.press(" ")
    page.keyboard.press("f")
    assert re.fullmatch(r"#walk\?item=[23]&fill=yes", address(page))
    box = walk.bounding_box()
    assert (box["x"], box["y"], box["width"], box["height"]) == (0, 0, 1280, 900)
    here = "[...document.querySelectorAll('body, #walk *')].includes(document.activeElement)"
    reached = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(here))
    assert reached == {True}  # what lies behind is out of reach
    page.keyboard.press("Escape")
    assert "fill" not in address(page)
    walk.get_by_role("button", name="Items").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").startswith("1. ")
    page.keyboard.press("Escape")
    assert not walk.get_by_role("button", name="1. Attention").is_visible()


def test_the_address_says_where_one_is(player):
    page, walk = player(f"{RING}#walk?item=10&speed=1.5&fill=yes")
    assert title(walk) == "10. Forward"
    assert walk.get_by_label("speed").input_value() == "1.5"
    assert walk.get_by_role("button", name="Leave").is_visible()
    page.keyboard.press("Escape")
    page.locator("h4", has_text="4. Merging").get_by_role("link", name="play").click()
    page.wait_for_function("document.querySelector('.walk-title').textContent.startsWith('4. ')")
    assert walk.get_by_label("pause").is_visible() and "play=yes" in address(page)
    page.evaluate("location.hash = '#walk?item=99'")
    page.wait_for_function("document.querySelector('#walk .place').value === '14 / 14'")
    page.evaluate("location.hash = '#walk?item=many&speed=0'")
    page.wait_for_function("document.querySelector('#walk .place').value === '0 / 14'")


def test_a_link_makes_the_player_that_is_out_of_view(site, chromium):
    with browser.opened(chromium, f"file://{site}/{RING}") as (page, problems):
        assert not page.locator("#walk[data-ready]").count()  # nothing is loaded so far
        assert "walk_5_README.js" not in page.content()
        page.evaluate("location.hash = '#walk?item=5'")
        page.wait_for_selector("#walk[data-ready]")
        assert page.locator(".walk-title").inner_text() == "5. The positions of a rank"
        assert page.locator("#walk .walk-pane").is_visible() and not problems


def test_speech(player):
    voices = "[{ localService: false, lang: 'en-US' }, { localService: true, lang: 'en-GB' }]"
    page, walk = player(f"{RING}#walk?item=4", script=CLOCK + VOICE.replace("VOICES", voices))
    spoken = "spoken.splice(0).map((words) => words.text)"
    walk.get_by_label("play", exact=True).last.click()
    assert page.evaluate(spoken) == []  # off, until the reader turns it on
    walk.get_by_role("button", name="Speak").click()
    assert page.evaluate("spoken[0].voice.localService")
    assert page.evaluate(spoken)[0] == "The positions of a rank."
    walk.get_by_label("pause").click()
    page.evaluate("location.hash = '#walk?item=7&play=yes'")
    page.evaluate("pass(60)")
    words = page.evaluate("window.said = spoken.splice(0), said.map((words) => words.text)")
    in_words = "In the middle of the first figure, rank 1 has the queries of chunks 1 and 6:"
    assert words == ["Who attends to what.", in_words]  # without the table
    assert title(walk).startswith("7. ")  # the item waits for its voice
    page.evaluate("said.forEach((words) => words.onend())")
    page.evaluate("pass(3)")
    assert title(walk).startswith("8. ") and page.evaluate(spoken)[0] == "Blocks on their way."


def test_narrow(player):
    remote = VOICE.replace("VOICES", "[{ localService: false, lang: 'en-US' }]")
    page, walk = player("step9_4d/CHECKPOINTS.html", "narrow", script=remote)
    assert not walk.get_by_role("button", name="Speak").is_visible()  # no voice is the machine's
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    walk.get_by_role("button", name="Fill window").click()
    assert walk.locator(".walk-title").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_accessible(player):
    from axe_playwright_python.sync_playwright import Axe

    page, walk = player(f"{RING}#walk?item=14&fill=yes")
    walk.get_by_role("button", name="Items").click()
    for scheme, rules in (("default", {}), ("slate", {"runOnly": ["color-contrast"]})):
        page.evaluate("scheme => { document.body.dataset.mdColorScheme = scheme; }", scheme)
        page.evaluate("document.getAnimations().forEach((one) => one.finish())")
        how = {"preload": False, "resultTypes": ["violations"], **rules}
        found = Axe().run(page, context="#walk", options=how).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == [], scheme
