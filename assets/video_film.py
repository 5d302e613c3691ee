"""A headless Chromium with the page of a film, assets/web/film.html, and what it shows."""

import base64
import contextlib
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "assets"))
sys.path.append(str(ROOT / "tests"))
import book  # noqa: E402
import book_numbers  # noqa: E402
import book_walk  # noqa: E402
import browser  # noqa: E402
import video_script  # noqa: E402


class Film:
    """One scene at a time, at any moment."""

    def __init__(self, page, problems, title):
        self.page, self.problems, self.title = page, problems, title
        self.devtools = page.context.new_cdp_session(page)

    def call(self, function, given):
        found = self.page.evaluate(f"given => Film.{function}(given)", given)
        assert not self.problems, self.problems
        return found

    def captions(self, scene):
        """What a widget says at each of its moments."""
        return self.call("captions", scene.content)

    def seconds(self, scene):
        """How long the code of an item should be looked at."""
        return self.call("seconds", scene.content)

    def show(self, shot):
        """Show a shot. The times, from its start on, at which its picture changes."""
        return self.call("show", shot.for_page())

    def picture(self, time):
        """The picture at a time of the shot that is shown, as PNG."""
        self.call("seek", time)
        how = {"format": "png", "optimizeForSpeed": True}
        return base64.b64decode(self.devtools.send("Page.captureScreenshot", how)["data"])


@contextlib.contextmanager
def filming(step, scenes, folder, size=(1920, 1080)):
    """A Film that can show these scenes of a step; its files lie in `folder`."""
    walk = book_walk.data_name(step / "README.md")
    for scene in scenes:
        if scene.kind == "item":
            scene.content["walk"] = walk
    stage(folder)
    title = video_script.title_of(step)
    with browser.browser() as found:
        browser.SIZES["film"] = size
        with browser.opened(found, f"file://{folder}/web/film.html", "film") as (page, problems):
            film = Film(page, problems, title)
            contents = [{"content": scene.content} for scene in scenes]
            needed = {name: book_numbers.DATA[name] for name in film.call("needs", contents)}
            book.write_data(folder / "web" / "data", needed)
            film.call("load", contents)
            chapters = list(dict.fromkeys(scene.chapter for scene in scenes))
            film.call("begin", {"step": title, "chapters": chapters})
            yield film


def stage(folder):
    """The files that the page needs: scripts, and pictures."""
    shutil.copytree(book.WEB, folder / "web")
    (folder / "assets").mkdir()
    for picture in (ROOT / "assets").glob("*.png"):
        shutil.copy(picture, folder / "assets")
