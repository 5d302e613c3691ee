"""Take the pictures of the book that the front page and the lessons show.

    python assets/book.py && python assets/book_shots.py

writes assets/book_….png and assets/…_widget.png from site/, light or dark, with 64 colours.
"""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
import browser  # noqa: E402

# file: page and what is chosen on it, the part of the page, its colours
SHOTS = {
    "book_walk": ("step5_context_parallel/index.html#walk?item=7&fill=yes", None, "light"),
    "book_changes": ("step5_context_parallel/changes.html", None, "light"),
    "book_collectives": (
        "step2_process_group/index.html#collectives?kind=all-reduce&ranks=4&step=4",
        "#collectives",
        "dark",
    ),
    "planner_widget": ("step9_4d/index.html#planner?step=0", "#planner", "light"),
    "mistakes_widget": (
        "step3_dataloader/index.html#mistakes?mistake=norm_gradients_of_own_tokens",
        "#mistakes",
        "light",
    ),
}


def take(found, site, address, part, scheme):
    """A picture of a part of a page; of what one sees of it, where no part is named."""
    with browser.opened(found, f"file://{site}/{address}", scheme=scheme) as (page, problems):
        if "#" in address:
            widget = address.split("#")[1].split("?")[0]
            page.wait_for_selector(f"#{widget}[data-ready]")
        else:
            change = page.locator("details", has_text="Its tokens and targets").first
            change.locator("summary").click()
            change.scroll_into_view_if_needed()
        page.wait_for_timeout(500)  # what moves is there
        shot = page.locator(part).screenshot() if part else page.screenshot()
        assert not problems, problems
    return Image.open(io.BytesIO(shot)).convert("RGB").quantize(64)


def main():
    parser = argparse.ArgumentParser(description="Pictures of the book; see the file.")
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("names", nargs="*", default=list(SHOTS), help=", ".join(SHOTS))
    args = parser.parse_args()
    with browser.browser() as found:
        for name in args.names:
            path = ROOT / "assets" / f"{name}.png"
            take(found, args.site.resolve(), *SHOTS[name]).save(path, optimize=True)
            print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
