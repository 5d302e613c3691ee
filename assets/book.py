"""Build the web book: every lesson as a page, with walks that play and pictures that move.

    python assets/book.py                 writes site/, a folder that opens from disk
    python assets/book.py --serve         and shows it at http://127.0.0.1:8000

Needs `pip install ".[book]"`. The pages are the repository's own Markdown files; BOOK.md says how.
"""

import argparse
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "assets"))
import book_glossary  # noqa: E402
import book_numbers  # noqa: E402
import book_pages  # noqa: E402
from lessons import LessonError  # noqa: E402

WEB = ROOT / "assets" / "web"
STAGE = ROOT / "build" / "book"


def build(site, stage=STAGE):
    """Write the whole book into the folder `site`; what the generator reads, into `stage`."""
    shutil.rmtree(stage, ignore_errors=True)
    book_pages.write(stage)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"],
        cwd=stage, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "assets"), "NO_COLOR": "1"},
    )  # fmt: skip
    if done.returncode:
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        raise LessonError(f"zensical could not build the book: {said}")
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(stage / "site", site)
    film = shutil.ignore_patterns("film.*")  # the videos' own page
    shutil.copytree(WEB, site / "web", dirs_exist_ok=True, ignore=film)
    write_data(site / "web" / "data", {**book_numbers.DATA, "glossary": book_glossary.entries})
    book_pages.finish(site)


def write_data(folder, data):
    """The numbers that the widgets draw, a script for each, as no page can fetch from disk."""
    folder.mkdir(exist_ok=True)
    for name, compute in data.items():
        numbers = json.dumps(compute(), separators=(",", ":"), ensure_ascii=False)
        (folder / f"{name}.js").write_text(f'Book.data["{name}"] = {numbers};\n')


def serve(site, port):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"the book is at http://127.0.0.1:{server.server_port}; Ctrl-C ends this")
        server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description="Build the web book; see the file.")
    parser.add_argument("--output", type=Path, default=ROOT / "site", help="default: site/")
    parser.add_argument("--serve", action="store_true", help="show it in the browser")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    begun = time.monotonic()
    build(args.output)
    files = [path for path in args.output.rglob("*") if path.is_file()]
    size, pages = sum(path.stat().st_size for path in files), len([*args.output.rglob("*.html")])
    print(f"{args.output}: {pages} pages, {size / 1e6:.1f} MB, {time.monotonic() - begun:.0f} s")
    if args.serve:
        serve(args.output, args.port)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except LessonError as error:
        sys.exit(f"error: {error}")
