"""The silent loop of a lesson: the one motion that it is about, as a GIF for its README."""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "assets"))
sys.path.append(str(ROOT / "tests"))
import lessons  # noqa: E402
import video  # noqa: E402
from video_film import filming  # noqa: E402
from video_script import Scene  # noqa: E402

RATE, MOTION = 12.5, 5  # pictures a second, and so many from one moment to the next
WIDTH = 760  # pixels
END = 2.0  # seconds that the last moment is shown
LONGEST = 20.0


@dataclass
class Loop:
    """Moments of a widget, each shown for `hold` seconds."""

    widget: str
    options: dict = field(default_factory=dict)
    first: int = 0
    last: int | None = None  # default: the widget's last moment
    hold: float = 0.9


LOOPS = {
    1: Loop("training_step", hold=0.35),
    2: Loop("collectives", {"kind": "all-reduce", "ranks": "3"}, hold=1.6),
    3: Loop("windows", hold=2.4),
    4: Loop("tensor_parallel", {"ranks": "2"}, hold=1.2),
    5: Loop("ring", {"cp": "4"}, hold=1.2),
    6: Loop("zero", {"engine": "bucket", "ranks": "4", "micro": "1"}, hold=0.8),
    7: Loop("pipelines", {"above": "afab"}, hold=0.2),
    8: Loop("pipelines", {"above": "afab", "below": "1f1b"}, hold=0.2),
    9: Loop("mesh", {"tp": "2", "cp": "2", "dp": "2", "pp": "2", "rank": "5"}, hold=1.6),
}


def pictures(film, loop):
    """[(PNG, seconds)] of a loop."""
    moments = len(film.captions(loop_scene(loop)))
    last = moments - 1 if loop.last is None else loop.last
    shown = []
    for step in range(loop.first, last + 1):
        shown.append((film.picture(step), END if step == last else loop.hold))
        for place in range(1, MOTION) if step < last else ():
            # Book.picture moves in the last third of a moment.
            shown.append((film.picture(step + 2 / 3 + place / MOTION / 3), 1 / RATE))
    return shown


def loop_scene(loop):
    return Scene("widget", "Why", {"widget": loop.widget, "options": loop.options})


def make(step, output=None):
    """Write the loop of a step; default: assets/step5_loop.gif."""
    number = lessons.step_number(step)
    output = output or ROOT / "assets" / f"step{number}_loop.gif"
    scene = loop_scene(LOOPS[number])
    with tempfile.TemporaryDirectory() as folder, filming(step, [scene], Path(folder)) as film:
        height = film.call("loop", scene.content)
        film.page.set_viewport_size({"width": WIDTH, "height": height})
        shown = []
        for place, (picture, seconds) in enumerate(pictures(film, LOOPS[number])):
            path = Path(folder, f"{place:04}.png")
            path.write_bytes(picture)
            shown.append((path, seconds))
        encode(output, shown, folder)
    return output


def encode(output, shown, folder):
    """One palette for all, without dithering: what stands still takes no bytes."""
    length = sum(seconds for _, seconds in shown)
    if length > LONGEST:
        raise AssertionError(f"{output.name} takes {length:.1f} s, {LONGEST} are allowed")
    lines = [f"file '{path}'\nduration {seconds:.3f}" for path, seconds in shown]
    Path(folder, "list.txt").write_text("\n".join([*lines, f"file '{shown[-1][0]}'"]) + "\n")
    palette = "split[a][b];[a]palettegen=max_colors=64[p];[b][p]paletteuse=dither=none"
    command = ["ffmpeg", "-y", "-loglevel", "error", "-f", "concat", "-safe", "0", "-i", "list.txt"]
    command += ["-vf", f"{palette}:diff_mode=rectangle", "-vsync", "vfr", "-loop", "0"]
    video.ffmpeg([*command, "-t", f"{length:.3f}", output.resolve()], folder)
