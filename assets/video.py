"""Make the video of a step: its lesson, told over pictures that move, from the code that is here.

    python assets/video.py 5                 writes step5.mp4, and step5.vtt, its captions
    python assets/video.py 5 --scenes 3      three scenes of it only
    python assets/video.py 5 --no-voice      with silence for the voice
    python assets/video.py 5 --loop          writes assets/step5_loop.gif: the lesson's motion

Needs `pip install ".[video]"`, Chromium and ffmpeg. VIDEO.md says how it is made.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "assets"))
sys.path.append(str(ROOT / "tests"))
import lessons  # noqa: E402
import video_script  # noqa: E402
import video_speech as speech  # noqa: E402
import video_voice as voices  # noqa: E402

RATE = 25  # pictures a second
LEAD, GAP, TAIL = 0.6, 0.35, 0.7  # seconds before, between and after the sentences of a scene
LOOK = 6  # seconds at most that code is shown in silence after the words
WIDGET_WORDS = 110  # a widget tells so many words; the rest of its moments pass in silence
SILENT_MOMENT = 0.8  # seconds


@dataclass
class Shot:
    """A scene with its times, in seconds; `begin` is counted from the start of the video."""

    scene: video_script.Scene
    begin: float
    duration: float
    cues: list  # (begin, end, sentence, samples), counted from the start of the video
    begins: list = field(default_factory=list)  # of its sentences or moments, from its own start

    def for_page(self):
        scene = self.scene
        return {
            "kind": scene.kind, "chapter": scene.chapter, "content": scene.content,
            "duration": self.duration, "begins": self.begins,
        }  # fmt: skip


# --- when what is said ----------------------------------------------------------------------------


def timed(scenes, film, speak):
    """The shots of a video: every sentence is as long as its voice."""
    told = [parts_of(scene, film) for scene in scenes]
    voice = iter(speak([sentence.spoken for parts in told for part in parts for sentence in part]))
    shots, begin = [], 0.0
    for scene, parts in zip(scenes, told, strict=True):
        shots.append(shot(scene, begin, parts, voice, film))
        begin += shots[-1].duration
    return shots


def parts_of(scene, film):
    """What is said in a scene, part by part: of a widget, what it says at each of its moments."""
    if scene.kind != "widget":
        return [[sentence] for sentence in scene.said]
    parts, words, last = [], 0, None
    for caption in film.captions(scene):
        new = speech.sentences(caption) if caption != last and words < WIDGET_WORDS else []
        words += len(caption.split()) if new else 0
        parts.append(new)
        last = caption
    return parts


def shot(scene, begin, parts, voice, film):
    now, begins, cues = begin + LEAD, [], []
    for part in parts:
        begins.append(round(now - begin, 3))
        for sentence in part:
            samples = next(voice)
            cues.append((now, now + len(samples) / voices.RATE, sentence, samples))
            now = cues[-1][1] + GAP
        now += 0 if part else SILENT_MOMENT
    length = now - begin - (GAP if cues else 0) + TAIL
    if scene.kind == "item":
        length = max(length, min(film.seconds(scene), length + LOOK))
    return Shot(scene, begin, round(length * RATE) / RATE, cues, begins)


# --- the film -------------------------------------------------------------------------------------


def frames(shots, film, folder):
    """Draw each picture once. [(path, seconds that it is shown)]"""
    shown, drawn = [], {}
    for number, one in enumerate(shots):
        changes = sorted({round(change * RATE) for change in film.show(one)})
        end = round(one.duration * RATE)
        changes = [change for change in changes if change < end] + [end]
        for tick, following in zip(changes, changes[1:], strict=False):
            picture = film.picture(tick / RATE)
            path = drawn.setdefault(picture, folder / f"{len(drawn):05}.png")
            if not path.exists():
                path.write_bytes(picture)
            shown.append((path, (following - tick) / RATE))
        told(f"scene {number + 1} of {len(shots)}, {len(shown)} pictures")
    return shown


def captions(shots):
    """The text of a WebVTT file."""
    lines = ["WEBVTT", ""]
    for begin, end, sentence, _ in (cue for one in shots for cue in one.cues):
        lines += [f"{clock(begin)} --> {clock(end)}", sentence.written.replace("-->", "→"), ""]
    return "\n".join(lines)


def clock(seconds):
    minutes, rest = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}.{rest % 1000:03}"


def chapters(shots, title):
    """ffmpeg's metadata: the title, and where each chapter begins and ends."""
    lines, found = [";FFMETADATA1", f"title={escaped(title)}"], []
    for one in shots:
        if not found or found[-1][0] != one.scene.chapter:
            found.append([one.scene.chapter, one.begin, 0])
        found[-1][2] = one.begin + one.duration
    for name, begin, end in found:
        times = f"START={round(begin * 1000)}", f"END={round(end * 1000)}"
        lines += ["[CHAPTER]", "TIMEBASE=1/1000", *times, f"title={escaped(name)}"]
    return "\n".join(lines) + "\n"


def escaped(text):
    return "".join(f"\\{letter}" if letter in "=;#\\\n" else letter for letter in text)


def encode(output, shots, shown, title, folder):
    """Put pictures, voice, captions and chapters into one file."""
    Path(folder, "list.txt").write_text(listed(shown))
    Path(folder, "chapters.txt").write_text(chapters(shots, title))
    output.with_suffix(".vtt").write_text(captions(shots))
    length = shots[-1].begin + shots[-1].duration
    cues = [(cue[0], cue[3]) for one in shots for cue in one.cues]
    voices.write(Path(folder, "voice.wav"), length, cues)
    command = [
        "ffmpeg", "-y", "-loglevel", "error",
        "-f", "concat", "-safe", "0", "-i", "list.txt", "-i", "voice.wav",
        "-i", output.with_suffix(".vtt").resolve(), "-f", "ffmetadata", "-i", "chapters.txt",
        "-map", "0:v", "-map", "1:a", "-map", "2:s", "-map_metadata", "3", "-map_chapters", "3",
        "-vsync", "vfr", "-t", f"{length + 1 / RATE:.3f}",  # with the last picture, which ends it
        "-c:v", "libx264", "-preset", "veryfast", "-crf", "21", "-tune", "animation",
        "-g", "30", "-pix_fmt", "yuv420p", "-c:a", "aac", "-b:a", "96k",
        "-c:s", "mov_text", "-metadata:s:s:0", "language=eng", "-metadata:s:a:0", "language=eng",
        "-movflags", "+faststart", output.resolve(),
    ]  # fmt: skip
    ffmpeg(command, folder)


def listed(shown):
    """ffmpeg's list of pictures. Some players want one every second, though it be the same."""
    lines = []
    for path, seconds in shown:
        while seconds > 0:
            lines += [f"file '{path}'", f"duration {min(1, seconds):.6f}"]
            seconds = round(seconds - 1, 6)
    return "\n".join([*lines, f"file '{shown[-1][0]}'"]) + "\n"


def ffmpeg(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise voices.Missing(f"ffmpeg could not write the video: {done.stderr.strip()[-300:]}")


def told(text):
    """A line that the next one replaces, for somebody who waits."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


# --- commands -------------------------------------------------------------------------------------


def chosen(scenes, count):
    """`count` scenes, spread evenly over all: the first, the last, and some between."""
    if count is None or count >= len(scenes):
        return scenes
    places = [round(i * (len(scenes) - 1) / max(1, count - 1)) for i in range(count)]
    return [scenes[place] for place in places]


def make(step, output, count=None, speak=voices.speak):
    """Write the video of a step, and its captions. Returns the shots and the shown pictures."""
    from video_film import filming

    scenes = chosen(video_script.script(step), count)
    with tempfile.TemporaryDirectory() as folder, filming(step, scenes, Path(folder)) as film:
        shots = timed(scenes, film, speak)
        shown = frames(shots, film, Path(folder))
        encode(output, shots, shown, film.title, folder)
    return shots, shown


def check_tools(voice):
    """Say what is missing before the work begins."""
    if shutil.which("ffmpeg") is None:
        raise voices.Missing("no ffmpeg: install it (apt install ffmpeg)")
    for package in ("playwright", "markdown", "pygments"):
        if voices.importlib.util.find_spec(package) is None:
            raise voices.Missing(f'no {package}: pip install ".[video]"')
    import browser

    try:
        browser.chromium()
    except FileNotFoundError as problem:
        raise voices.Missing(problem) from None
    if voice:
        voices.voice()


def main():
    parser = argparse.ArgumentParser(description="Make the video of a step; see the file.")
    parser.add_argument("step", type=int)
    parser.add_argument("--output", type=Path, help="default: step5.mp4, here")
    parser.add_argument("--scenes", type=int, help="so many scenes only")
    parser.add_argument("--no-voice", action="store_true", help="silence, as long as the voice")
    parser.add_argument("--loop", action="store_true", help="assets/step5_loop.gif instead")
    args = parser.parse_args()
    begun = time.monotonic()
    try:
        step = lessons.step_of(args.step)
        check_tools(voice=not (args.no_voice or args.loop))
        if args.loop:
            import video_loop

            output = video_loop.make(step, args.output)
        else:
            output = args.output or Path(f"step{args.step}.mp4")
            output.parent.mkdir(parents=True, exist_ok=True)
            make(step, output, args.scenes, voices.silence if args.no_voice else voices.speak)
    except (voices.Missing, lessons.LessonError) as problem:
        sys.exit(f"error: {problem}")
    told("")
    size = output.stat().st_size / 1e6
    print(f"{output}: {size:.1f} MB, made in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
