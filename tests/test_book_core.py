"""What all widgets of the book share: options, play and pause, keys, the address, pictures."""

import shutil

import browser
import pytest

pytestmark = pytest.mark.browser

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>toys</title>
<link rel="stylesheet" href="book.css">
<script src="core.js"></script><script src="pictures.js"></script></head><body>
<a href="#toy?size=4&amp;step=2">a link</a>
<div id="toy" data-widget="toy" data-options='{"size": 3}'></div>
<div style="height: 3000px"></div>
<a href="#other?size=5&amp;step=1">one more</a><div id="other" data-widget="toy"></div>
<div style="height: 3000px"></div><div id="lost" data-widget="lost"></div></body></html>"""

# A square moves 100 units at each moment; three others stand still, and one can choose them.
TOY = """Book.define("toy", {
  title: "A toy", data: ["toy"],
  options: {
    kind: { label: "kind", choices: [10, 20], names: { 10: "ten", 20: "twenty" }, value: 10 },
    size: { label: "size", min: 1, max: 6, value: 2 },
    link: { label: "link", values: [0.5, 4, 300], value: 4, when: ({ kind }) => kind === 10 },
    place: { label: "place", min: 0, max: ({ size }) => size - 1, value: 0 },
  },
  settle(state, changed) { state.place = changed === "kind" ? 0 : Math.min(state.place, state.size - 1); },
  seconds: () => 1,
  scene: (state, width) => ({
    height: 100, steps: 4,
    tables: [{ head: ["a"], rows: [["b".repeat(500)]], title: "wide" }],
    at: (step) => ({
      caption: `Moment ${step}.`,
      numbers: [{ name: "state", label: "state", text: JSON.stringify(state) }, { name: "width", label: "width", text: width }],
      shapes: [
        { id: "moves", kind: "rect", x: 100 * step, y: 0, w: 40, h: 40, fill: "accent", text: step },
        ...[0, 1, 2].map((i) => ({ id: `choice ${i}`, kind: "rect", x: 60 * i, y: 50, w: 50, h: 40, fill: i === state.place ? "ink" : "quiet",
          text: i, choose: { place: i }, label: `place ${i}`, tab: i === state.place, pressed: i === state.place })),
      ],
    }),
  }),
});"""  # noqa: E501


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The address of a page with two toys, and a widget that is not there."""
    folder = tmp_path_factory.mktemp("toys") / "web"
    shutil.copytree(browser.ROOT / "assets" / "web", folder)
    (folder / "toys.html").write_text(PAGE)
    (folder / "toy.js").write_text(TOY)
    (folder / "data").mkdir()
    (folder / "data" / "toy.js").write_text('Book.data["toy"] = 1;')
    return f"file://{folder}/toys.html"


class Toy:
    """A toy on an open page, and the hands of a reader."""

    def __init__(self, page, name="toy"):
        self.page, self.name, self.root = page, name, browser.ready(page, f"#{name}")

    def press(self, key, at=None):
        (self.root.locator(at) if at else self.page.locator(":focus")).press(key)

    def click(self, name):
        self.root.get_by_role("button", name=name, exact=True).click()

    def control(self, name):
        return self.root.locator(f"#{self.name}-{name}")

    def moment(self):
        """Where it stands: in words, on the slider, in the caption."""
        place = self.root.locator(".place").inner_text()
        slider = self.root.locator(".time").input_value()
        caption = self.root.locator(".caption").inner_text()
        assert place == f"{int(slider) + 1} / 4" and caption == f"Moment {slider}."
        return int(slider)

    def state(self):
        return eval(browser.number(self.root, "state"))

    def x(self):
        return float(self.root.locator('[data-id="moves"] rect').get_attribute("x"))

    def said(self):
        return browser.address(self.page).removeprefix("#")

    def focus(self):
        return self.page.evaluate("document.activeElement.dataset.id")


@pytest.fixture
def toy(chromium, toys):
    with browser.opened(chromium, toys) as (page, problems):
        page.clock.install()
        page.clock.pause_at(page.evaluate("Date.now()") + 1)
        yield Toy(page)
        assert not problems, problems


def test_play_reaches_the_end_and_begins_again(toy):
    toy.click("play")
    toy.page.clock.run_for(900)
    assert toy.moment() == 0 and 0 < toy.x() < 100  # the last third of a moment is the movement
    toy.page.clock.run_for(1200)
    assert toy.moment() == 2
    toy.page.clock.run_for(1000)
    assert toy.moment() == 3 and toy.x() == 300
    toy.page.clock.run_for(5000)
    assert toy.moment() == 3 and toy.said().endswith("step=3")
    toy.click("play")
    toy.page.clock.run_for(100)
    assert toy.moment() == 0


def test_a_pause_stops_at_a_whole_moment(toy):
    toy.click("play")
    toy.page.clock.run_for(1900)
    toy.click("pause")
    assert toy.moment() == 2 and toy.x() == 200
    toy.page.clock.run_for(2000)
    assert toy.moment() == 2 and toy.said().endswith("step=2")


def test_a_step_a_slider_and_a_speed(toy):
    toy.click("one moment on")
    assert toy.moment() == 1 and toy.said() == "toy?kind=10&size=3&link=4&place=0&step=1"
    toy.click("one moment back")
    toy.click("one moment back")
    assert toy.moment() == 0
    toy.root.locator(".time").fill("3")
    assert toy.moment() == 3 and toy.said().endswith("step=3")
    toy.click("one moment on")
    assert toy.moment() == 3
    toy.root.locator(".speed").select_option("4")
    toy.click("play")
    toy.page.clock.run_for(600)
    assert toy.moment() == 2


def test_keys_play_and_step(toy):
    toy.press("ArrowRight", at=".play")
    toy.press("ArrowRight")
    assert toy.moment() == 2 and toy.said().endswith("step=2")
    toy.press("ArrowLeft")
    assert toy.moment() == 1
    toy.press(" ", at=".time")
    toy.page.clock.run_for(1100)
    toy.press(" ")
    assert toy.moment() == 2, "space plays, on a slider too, and stops"
    toy.press("ArrowRight", at=".scroll")
    assert toy.moment() == 2, "a table that can be scrolled needs its arrows"
    toy.press("End", at=".time")
    assert toy.moment() == 3


def test_a_choice_by_keys_keeps_the_focus(toy):
    choice = '[data-id="choice 0"]'
    assert toy.root.locator(".choice[tabindex='0']").count() == 1, "one of them for the tab key"
    toy.press("ArrowRight", at=choice)
    toy.press("ArrowRight")
    assert toy.focus() == "choice 2" and toy.moment() == 0
    toy.press("ArrowRight")
    toy.press("ArrowLeft")
    toy.press("Enter")
    assert toy.state()["place"] == 2 and toy.focus() == "choice 2"
    toy.press("ArrowUp")
    toy.press(" ")
    assert toy.state()["place"] == 1 and toy.focus() == "choice 1"
    assert toy.root.locator("[aria-pressed=true]").get_attribute("aria-label") == "place 1"


def test_a_click_while_it_plays_is_not_lost(toy):
    toy.click("play")
    box = toy.root.locator('[data-id="choice 2"]').bounding_box()
    toy.page.mouse.move(box["x"] + 5, box["y"] + 5)
    toy.page.mouse.down()
    toy.page.clock.run_for(800)
    toy.page.mouse.up()
    assert toy.state()["place"] == 2


def test_each_control_changes_the_state_and_the_address(toy):
    assert toy.state() == {"kind": 10, "size": 3, "link": 4, "place": 0}
    toy.control("place").fill("2")
    assert toy.state()["place"] == 2
    toy.control("kind").select_option("twenty")
    assert toy.state()["kind"] == 20, "a number stays a number"
    assert toy.state()["place"] == 0, "settle knows what has changed"
    assert not toy.control("link").is_visible(), "it means nothing for this kind"
    toy.control("kind").select_option("ten")
    link = toy.control("link")
    link.press("ArrowRight")
    assert toy.state()["link"] == 300 and link.get_attribute("aria-valuetext") == "300"
    toy.control("size").fill("2")
    assert toy.control("place").get_attribute("max") == "1"
    assert toy.said() == "toy?kind=10&size=2&link=300&place=0&step=0"


def test_a_slider_being_dragged_leaves_the_address_alone_for_a_while(toy):
    drag = (
        "(input) => { input.value = 5; input.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    toy.control("size").evaluate(drag)
    assert toy.state()["size"] == 5 and toy.said() == ""
    toy.page.clock.run_for(400)
    assert "size=5" in toy.said()


def test_options_take_only_what_they_can(chromium):
    options = """{kind: {choices: [10, 20], value: 10}, size: {min: 1, max: 6, value: 2},
        half: {min: 0, max: 1, step: 0.1, value: 0.5}, link: {values: [0.5, 4, 300], value: 4},
        place: {min: 0, max: ({size}) => size - 1, value: 0}}"""
    cases = [
        ({"kind": "20", "size": "2.6", "half": "0.33", "link": "100", "place": "9"},
         {"kind": 20, "size": 3, "half": 0.3, "link": 4, "place": 2}),
        ({"kind": "15", "size": "many", "half": "", "link": "1e9", "place": "-3"},
         {"kind": 10, "size": 2, "half": 0.5, "link": 300, "place": 0}),
        ({"size": "1e9", "half": "Infinity"},
         {"kind": 10, "size": 6, "half": 0.5, "link": 4, "place": 0}),
    ]  # fmt: skip
    with browser.bare(chromium) as page:
        for given, expected in cases:
            assert page.evaluate(f"given => Book.begin({options}, given)", given) == expected


def test_shapes_between_two_moments(chromium):
    with browser.bare(chromium, "pictures") as page:
        between = "([a, b, share]) => Book.between(a, b, share)"
        from_, to = (
            {"id": "a", "x": 0, "text": 1},
            {"id": "a", "x": 10, "text": 2, "opacity": 0.5},
        )
        (half,) = page.evaluate(between, [[from_], [to], 0.4])
        assert half["text"] == 1 and half["x"] == pytest.approx(3.2)
        assert half["opacity"] == pytest.approx(1 - 0.5 * 0.32)
        late = [[from_], [{**to, "turns": 1}, {"id": "new", "turns": 1}], 0.9]
        moved, new = page.evaluate(between, late)
        assert moved["text"] == 1 and new["opacity"] == 0
        gone, coming = [{"id": "gone"}], [{"id": "coming"}]
        shapes = page.evaluate(between, [gone, coming, 0.4])
        assert {s["id"]: round(s["opacity"], 2) for s in shapes} == {"coming": 0.32, "gone": 0.68}
        assert page.evaluate(between, [[from_], [to], 1]) == [to]


def test_who_wants_no_motion_sees_moments(chromium, toys):
    with browser.opened(chromium, toys, reduced_motion="reduce") as (page, _):
        page.clock.install()
        page.clock.pause_at(page.evaluate("Date.now()") + 1)
        toy = Toy(page)
        toy.click("play")
        page.clock.run_for(900)
        assert toy.x() == 0
        page.clock.run_for(400)
        assert toy.x() == 100
        page.clock.run_for(3000)
        assert toy.moment() == 3


@pytest.mark.parametrize(
    "said, place, step",
    [("size=6&place=4&step=2", 4, 2), ("step=99", 0, 3), ("place=7&step=no", 2, 0)],
)
def test_the_address_says_how_it_begins(chromium, toys, said, place, step):
    with browser.opened(chromium, f"{toys}#toy?{said}") as (page, problems):
        toy = Toy(page)
        assert toy.state()["place"] == place and toy.moment() == step
        assert toy.said() == f"toy?{said}", "nobody has touched it"
        assert not problems


def test_a_link_leads_to_a_state(toy):
    toy.page.get_by_role("link", name="a link").click()
    toy.page.wait_for_function("document.querySelector('#toy .place').value === '3 / 4'")
    assert toy.state()["size"] == 4
    toy.page.get_by_role("link", name="one more").click()
    other = Toy(toy.page, "other")
    toy.page.wait_for_function("document.querySelector('#other .place').value === '2 / 4'")
    assert other.state()["size"] == 5 and toy.state()["size"] == 4


def test_two_widgets_on_a_page_do_not_mix(toy):
    other = Toy(toy.page, "other")
    assert other.state()["size"] == 2
    other.click("one moment on")
    assert other.said() == "other?kind=10&size=2&link=4&place=0&step=1"
    toy.control("size").fill("6")
    assert toy.said() == "toy?kind=10&size=6&link=4&place=0&step=0"
    assert other.state()["size"] == 2 and (other.moment(), toy.moment()) == (1, 0)


def test_a_picture_follows_the_width(toy):
    assert browser.number(toy.root, "width") == "760"
    toy.page.set_viewport_size({"width": 390, "height": 800})
    toy.page.wait_for_function("document.querySelector('[data-number=width]').innerText === '360'")
    assert toy.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_is_not_there_is_said(chromium, toys):
    with browser.opened(chromium, f"{toys}#lost?a=1") as (page, problems):
        page.wait_for_selector("#lost .failed")
        assert "lost.js" in page.locator("#lost").inner_text()
        assert any("lost.js" in problem for problem in problems)
