"""The pages of the book in a browser: quiet, ready, readable on any width, by keyboard alone."""

import functools
import http.server
import threading

import browser
import pytest

pytestmark = pytest.mark.browser

LESSON = "step4_tensor_parallel/index.html"
CHANGES = "step4_tensor_parallel/changes.html"
SOURCE = "step4_tensor_parallel/files/tensor_parallel.py.html"
KINDS = ["index.html", LESSON, CHANGES, SOURCE, "step4_tensor_parallel/files.html",
         "step3_dataloader/COSTS.html"]  # fmt: skip

OPEN = "[...document.querySelectorAll('details')].slice(0, 20).forEach((d) => { d.open = true; })"


@pytest.fixture(scope="module")
def server(site):
    """The address of the book on a server of its own."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture
def shown(site, chromium):
    """shown(page, size, scheme): a page from disk, which must not complain."""
    open_now = []

    def show(page, size="wide", scheme="light", base=f"file://{site}", **more):
        manager = browser.opened(chromium, f"{base}/{page}", size, scheme, **more)
        found, problems = manager.__enter__()
        open_now.append((manager, problems))
        return found

    yield show
    for manager, problems in open_now:
        manager.__exit__(None, None, None)
        assert not problems


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_pages_are_quiet_ready_and_no_wider_than_the_screen(site, shown, every):
    """Every eighth page; all of them with `-m slow`."""
    page = shown("index.html")
    work = worker(page)
    pages = sorted(site.rglob("*.html"))[::every]
    sizes = [dict(zip(("width", "height"), size, strict=True)) for size in browser.SIZES.values()]
    for i, path in enumerate(pages):
        page.emulate_media(color_scheme=("light", "dark")[i % 2])
        page.set_viewport_size(sizes[0] if path.parent.name != "files" else sizes[i // 2 % 2])
        begun = work()
        page.goto(f"file://{path}")
        # Others may have the cores meanwhile; then the work of the page's process counts.
        assert milliseconds(page) <= 1000 or work() - begun <= 1, path
        assert page.locator("h1").count() == 1, path
        assert_fits(page, path)
        if path.parent.name != "files":
            page.set_viewport_size(sizes[1])
            if path.name != "changes.html":
                page.evaluate(OPEN)
            assert_fits(page, path)


def worker(page):
    """work(): the seconds that the processes of a page have computed so far."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")

    def work():
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "ProcessTime")

    return work


def assert_fits(page, path):
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1], path


def milliseconds(page):
    """From the click to the page that is there."""
    page.wait_for_function("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
    return page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")


@pytest.mark.parametrize("path", KINDS)
def test_nothing_keeps_anybody_from_reading(shown, path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for size, scheme in (("wide", "light"), ("narrow", "dark")):
        page = shown(path, size, scheme)
        page.evaluate(OPEN)
        found = axe.run(page, options={"preload": False, "resultTypes": ["violations"]})
        grave = [
            (fault["id"], node["target"], node["html"][:200])
            for fault in found.response["violations"]
            for node in fault["nodes"]
            if fault["impact"] in ("serious", "critical")
        ]
        assert not grave, (size, scheme, grave)


# --- by keyboard alone ----------------------------------------------------------------------------


def tab_to(page, words, most=60):
    """Press Tab until the focus is on something with these words."""
    for _ in range(most):
        page.keyboard.press("Tab")
        said = page.evaluate(
            "document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText"
        )
        if words in (said or "").replace("\n", " "):
            return
    raise AssertionError(f"Tab does not reach {words}")


def test_from_page_to_page_by_keyboard(shown):
    page = shown("index.html")
    tab_to(page, "Step 4: tensor parallelism")
    page.keyboard.press("Enter")
    page.wait_for_url("**/step4_tensor_parallel/index.html")
    tab_to(page, "Changes")
    page.keyboard.press("Enter")
    page.wait_for_url("**/changes.html")
    code = page.locator("#readme-2 .hunk").first
    assert not code.is_visible()
    tab_to(page, "2. Shares become a sum")
    page.keyboard.press("Enter")
    code.wait_for(state="visible")
    tab_to(page, "Next: Files", most=300)
    page.keyboard.press("Enter")
    page.wait_for_url("**/files.html")


def test_the_lists_of_a_narrow_page_by_keyboard(shown):
    page = shown(LESSON, "narrow")
    link = page.locator(".md-nav--primary a", has_text="Glossary")
    assert not link.is_visible()
    tab_to(page, "list of pages", most=5)
    page.keyboard.press("Enter")
    link.wait_for(state="visible")
    page.keyboard.press("Enter")
    link.wait_for(state="hidden")
    tab_to(page, "contents of this page", most=20)
    page.keyboard.press(" ")
    page.locator("[data-md-component=toc] a", has_text="By hand").wait_for(state="visible")


@pytest.mark.parametrize("place", ["disk", "server"])
def test_a_word_is_found(site, server, shown, place):
    page = shown(LESSON, base=server if place == "server" else f"file://{site}")
    for _ in range(20):  # the theme hears keys a moment after the page is there
        page.keyboard.press("Control+k")
        page.wait_for_timeout(100)
        if page.get_by_placeholder("Search").is_visible():
            break
    page.keyboard.type("deadlock")
    page.locator("a[href*='GLOSSARY.html?h=deadlock#deadlock']").wait_for()
    page.keyboard.press("Enter")
    page.wait_for_url("**/GLOSSARY.html?h=deadlock#deadlock")
    assert page.locator("iframe").count() == 0  # a page that is only read has no search


def test_a_term_shows_its_card(shown):
    page = shown("index.html")
    card = page.locator("#glossary-card")
    tab_to(page, "collective", most=120)
    card.wait_for(state="visible")
    assert card.locator("strong").inner_text() == "collective"
    assert "all ranks of a group" in card.inner_text()
    focus = "document.activeElement.getAttribute('aria-describedby')"
    assert page.evaluate(focus) == "glossary-card"
    page.keyboard.press("Escape")
    assert not card.is_visible() and page.evaluate(focus) is None
    page.locator("article a", has_text="deadlock").hover()
    card.wait_for(state="visible")
    assert card.locator("strong").inner_text() == "deadlock"
    card.hover()  # one can go there to select its text
    page.wait_for_timeout(400)
    assert card.is_visible()
    page.mouse.move(5, 5)
    card.wait_for(state="hidden")


def test_a_term_in_the_walk_player_shows_its_card(shown):
    page = shown("step5_context_parallel/index.html#walk?item=3")
    page.locator("#walk a", has_text="kernel").first.hover()
    page.locator("#glossary-card").wait_for(state="visible")
    assert page.locator("#glossary-card strong").inner_text() == "kernel"


def test_a_card_stays_on_a_narrow_screen(shown):
    page = shown("GLOSSARY.html", "narrow", "dark")
    page.locator("article a", has_text="reduce-scatter").first.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    card = page.locator("#glossary-card")
    card.wait_for(state="visible")
    box = card.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


# --- code -----------------------------------------------------------------------------------------


def lit(page):
    return page.evaluate("[...document.querySelectorAll('.lit')].map((line) => line.id)")


def test_a_link_to_lines_lights_them(shown):
    page = shown(LESSON)
    link = page.locator("a[href*='tensor_parallel.py.html#L']").first
    first, last = link.get_attribute("href").split("#L")[1].split("-L")
    link.click()
    page.wait_for_url(f"**/files/tensor_parallel.py.html#L{first}-L{last}")
    assert lit(page) == [f"L{n}" for n in range(int(first), int(last) + 1)]
    assert page.locator(f"#L{first}").bounding_box()["y"] < 800
    page.locator("#L7").click(position={"x": 10, "y": 5})
    assert lit(page) == ["L7"] and page.url.endswith("#L7")
    page.locator("#L9").click(position={"x": 10, "y": 5}, modifiers=["Shift"])
    assert lit(page) == ["L7", "L8", "L9"] and page.url.endswith("#L7-L9")
    page.locator("#L12").click(position={"x": 300, "y": 5})  # in the code, as one selects it
    assert page.url.endswith("#L7-L9")


def test_the_address_of_an_item_opens_its_changes(shown):
    page = shown(f"{CHANGES}#readme-3")
    assert page.locator("details[open]").count() == 1
    assert page.locator("#readme-3 .hunk").is_visible()
    page.get_by_role("button", name="Open all").click()
    assert page.locator("details.change:not([open])").count() == 0
    page.get_by_role("button", name="Close all").click()
    assert page.locator("details.change[open]").count() == 0


def test_before_and_after_stand_side_by_side_or_one_below_the_other(shown):
    page = shown(f"{CHANGES}#train.py")
    hunk = page.locator("[id='train.py'] .hunk.both").first
    before, after = hunk.locator(".a.changed").first, hunk.locator(".b.changed").first
    left, right = before.bounding_box(), after.bounding_box()
    assert left["x"] + left["width"] <= right["x"] + 1
    page.set_viewport_size({"width": 390, "height": 844})
    last = hunk.locator(".a:not(.none)").last.bounding_box()
    first = hunk.locator(".b:not(.none)").first.bounding_box()
    assert last["y"] + last["height"] <= first["y"] and last["x"] == first["x"]


# --- paper, and no scripts ------------------------------------------------------------------------


def test_paper_has_no_navigation_and_nothing_folded(shown):
    page = shown("step2_process_group/index.html", scheme="dark")
    scheme = "document.body.dataset.mdColorScheme"
    assert page.evaluate(scheme) == "slate" and page.locator(".still").first.is_hidden()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(scheme) == "default"
    assert page.locator("details:not([open])").count() == 0
    for away in (".md-header", ".md-sidebar--primary", ".widget", ".md-footer"):
        assert page.locator(away).first.is_hidden(), away
    assert page.locator(".still").first.is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(scheme) == "slate"


def test_without_scripts_there_are_pictures(shown):
    page = shown("step2_process_group/index.html", java_script_enabled=False)
    assert page.locator(".still").first.is_visible()
    assert page.locator("h2", has_text="The code").is_visible()
