"""A headless Chromium for the tests of the book, and screenshots of its pages.

    python tests/browser.py site step5_context_parallel/index.html --selector "#ring" --to shots

writes a picture of a page, or of a part of it, in light and dark, 1280 and 390 pixels wide.
"""

import argparse
import contextlib
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


def chromium():
    """The path of the system's Chromium."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    for path in map(shutil.which, filter(None, names)):
        if path:
            return path
    raise FileNotFoundError(
        "no Chromium: install it (apt install chromium), or name it: CHROMIUM=…"
    )


@contextlib.contextmanager
def browser():
    """A browser that is closed at the end."""
    from playwright.sync_api import sync_playwright  # so that tests are found without it

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


class Problems(list):
    """What a page complains of in its console, and each request that leaves the machine."""

    def watch(self, page):
        page.on("console", lambda m: m.type in ("error", "warning") and self.append(m.text))
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("requestfailed", self.failed)
        page.on("request", lambda request: self.judge(request.url))

    def failed(self, request):
        if request.failure != "net::ERR_ABORTED":  # a page that one leaves stops to load
            self.append(f"failed: {request.url}")

    def judge(self, url):
        if not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1")):
            self.append(f"left the machine: {url}")


@contextlib.contextmanager
def opened(found, address, size="wide", scheme="light", **more):
    """A page at an address, as (page, its problems)."""
    width, height = SIZES[size]
    context = found.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, **more
    )
    page, problems = context.new_page(), Problems()
    problems.watch(page)
    page.goto(address)
    try:
        yield page, problems
    finally:
        context.close()


@contextlib.contextmanager
def bare(found, *names):
    """An empty page with core.js and the scripts of some widgets: for their formulas."""
    with opened(found, "about:blank") as (page, problems):
        for name in ("core", *names):
            page.add_script_tag(path=ROOT / "assets" / "web" / f"{name}.js")
        yield page
        assert not problems, problems


def answers(page, function, inputs):
    """What a function like `Book.formulas.ring.work` gives for each list of arguments."""
    return page.evaluate(f"inputs => inputs.map((given) => {function}(...given))", inputs)


def number(widget, name):
    """The text of a number that a widget shows."""
    return widget.locator(f'[data-number="{name}"]').inner_text()


def address(page):
    """What stands in a page's address from the # on, as the page itself has it."""
    return page.evaluate("location.hash")  # page.url comes later where a machine is busy


def shapes(widget):
    """What a widget's picture shows: {id of a shape: {"text": its lines in one, "fill": …}}."""
    read = """(root) => Object.fromEntries([...root.querySelectorAll("[data-id]")].map((node) => [
      node.dataset.id,
      {text: [...node.querySelectorAll("tspan")].map((line) => line.textContent).join(" "),
       fill: node.firstChild.getAttribute("fill")?.replace(/var\\(--(.*)\\)/, "$1")}]))"""
    return widget.evaluate(read)


def faults(page, name, states):
    """What is wrong in the pictures of a widget: ids twice, small text, shapes outside."""
    return page.evaluate(FAULTS, [name, states])


FAULTS = """([name, states]) => {
  const found = [];
  for (const state of states) for (const width of [760, 360]) {
    const scene = Book.widgets[name].scene(state, width), least = width === 760 ? 12 : 11;
    for (let step = 0; step < scene.steps; step++) {
      const ids = new Set();
      for (const { id, text, size = 13, x = 0, y = 0, w = 0, h = 0 } of scene.at(step).shapes) {
        const where = JSON.stringify({ state, width, step, id });
        if (ids.has(id)) found.push(`twice: ${where}`);
        ids.add(id);
        if (text !== undefined && size < least) found.push(`text of ${size}: ${where}`);
        const outside = x < 0 || y < 0 || x + w > width || y + h > scene.height;
        if (outside) found.push(`outside: ${where}`);
      }
    }
  }
  return found;
}"""


def assert_narrow(page, widget):
    """Demand that a widget has its narrow picture, and that no part of the page is cut."""
    assert widget.locator("svg.picture").get_attribute("viewBox").startswith("0 0 360 ")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def ready(page, selector):
    """Bring a widget into view and wait until it is there."""
    page.locator(selector).scroll_into_view_if_needed()
    page.wait_for_selector(f"{selector}[data-ready]", timeout=10_000)
    return page.locator(selector)


MISPLACED = """([name, state, width]) => {
  const picture = Book.picture(name, state, width), found = new Set();
  picture.node.style.cssText = `position: absolute; top: 0; left: 0; width: ${width}px`;
  document.body.append(picture.node);
  const common = (a, b, side, length) =>
    Math.min(a[side] + a[length], b[side] + b[length]) - Math.max(a[side], b[side]);
  for (let step = 0; step < picture.scene.steps; step++) {
    picture.seek(step);
    const texts = [];
    for (const node of picture.node.querySelectorAll("[data-id]")) {
      const box = node.getBBox(), text = node.querySelector("text"), { id } = node.dataset;
      const rect = node.querySelector("rect"), said = (what) => found.add(`${id} ${what}`);
      const right = box.x + box.width, bottom = box.y + box.height;
      if (box.x < -1 || box.y < -1 || right > width + 1 || bottom > picture.scene.height + 1)
        said("is beyond the picture");
      if (!text) continue;
      if (text.getAttribute("font-size") < (width > 500 ? 12 : 11)) said("is too small");
      if (rect && text.getBBox().width > rect.getBBox().width) said("is wider than its box");
      if (!rect) {
        for (const [other, there] of texts)
          if (common(box, there, "x", "width") > 1 && common(box, there, "y", "height") > 3)
            said(`lies on ${other}`);
        texts.push([id, box]);
      }
    }
  }
  picture.node.remove();
  return [...found];
}"""


def misplaced(page, widget, state, width):
    """What is wrong with the place or size of a widget's shapes, at any moment, in words."""
    return page.evaluate(MISPLACED, [widget, state, width])


def main():
    parser = argparse.ArgumentParser(description="Screenshots of the book; see the file.")
    parser.add_argument("site", type=Path)
    parser.add_argument(
        "page", help="path inside of the site, with #widget?option=value or without"
    )
    parser.add_argument("--selector", help="a part of the page, like #ring; default: all of it")
    parser.add_argument("--to", type=Path, default=Path("shots"))
    args = parser.parse_args()
    args.to.mkdir(exist_ok=True)
    with browser() as found:
        for size in SIZES:
            for scheme in ("light", "dark"):
                address = f"file://{args.site.resolve()}/{args.page}"
                with opened(found, address, size, scheme) as (page, problems):
                    name = args.page.split("#")[0].replace("/", "_").removesuffix(".html")
                    part = (args.selector or "").strip("#.")
                    path = args.to / f"{name}{part and '_' + part}_{size}_{scheme}.png"
                    if args.selector:
                        if page.locator(f"{args.selector}[data-widget]").count():
                            ready(page, args.selector)
                        page.wait_for_timeout(200)
                        page.locator(args.selector).screenshot(path=path)
                    else:
                        page.screenshot(path=path, full_page=True)
                    print(path, *problems, sep="\n  ")


if __name__ == "__main__":
    main()
