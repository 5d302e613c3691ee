"""Find the bug: copies of a step with one mistake in them, and how a find is judged.

A lab is a file in `labs/`:

    step: step6_data_parallel
    level: 2                         1 easy, 2, 3 hard
    file: data_parallel.py
    before: |                        lines of our step, as they stand there, once
    after: |                         the lines with the mistake
    run: --dp_size 2 …               flags of a run that has the mistake in it
    ranks: 2                         of that run, where no flag says it
    loss: same                       `same`: the first ten losses are within 2 % of ours;
                                     `differs`; or `none`: the run fails
    symptoms: >                      what a person would see, without where
    check: milestone 4               the check that fails: of a milestone, or of a file of tests, by
                                     name: test_layouts.py: splits_of_the_batch
    source: https://…                the public thread of a published program that had it; or none
    story: >                         who had it, what it cost, which check finds it on the first day
"""

import difflib
import hashlib
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lessons
import yaml

FOLDER = Path(__file__).parent / "labs"
NEAR = 3  # lines that a name of a place may be off


@dataclass(frozen=True)
class Lab:
    """One mistake, as data."""

    number: int
    name: str  # of its file: not shown to the learner
    step: str
    level: int
    file: str
    before: str
    after: str
    run: str
    loss: str
    symptoms: str
    check: str
    story: str
    source: str = ""
    ranks: int = 0  # of a run whose flags do not say it: steps 2 and 3

    @property
    def command(self):
        """How a learner starts the run that has the mistake, in the copy's folder."""
        from launch import ranks_of  # torch takes its time

        ranks = self.ranks or ranks_of(self.run)
        start = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
        return f"{start} train.py {self.run.strip()}"

    @property
    def ours(self):
        return lessons.ROOT / self.step

    def planted(self):
        """The text of the file with the mistake in it."""
        text = (self.ours / self.file).read_text()
        if text.count(self.before) != 1:
            raise lessons.LessonError(f"lab {self.number}: its lines stand in {self.file} not once")
        return text.replace(self.before, self.after)

    def open(self, folder):
        """Copy the step with the mistake in it to a new folder, complete or not at all."""
        part = folder.with_name(f".{folder.name}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.ours, part / self.step, ignore=shutil.ignore_patterns("*.md", "__py*"))
        (part / self.step / self.file).write_text(self.planted())
        part.rename(folder)

    def is_at(self, file, line):
        """Whether a line of a file, counted from 1, is where the mistake is."""
        text = self.planted()
        start = text[: text.index(self.after)].count("\n") + 1
        old, new = self.before.splitlines(), self.after.splitlines()
        blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        near = [n for tag, *_, low, high in blocks if tag != "equal" for n in range(low, high + 1)]
        return file == self.file and any(abs(line - start - n) <= NEAR for n in near)

    def pytest_flags(self, own):
        """The command line of the check that fails, for a copy of the step."""
        if found := re.fullmatch(r"milestone (\d+)", self.check):
            return [f"--step-dir={own}", f"--milestone={found[1]}", f"--from-milestone={found[1]}"]
        file, name = self.check.split(": ")
        return [f"--step-dir={own}", str(FOLDER.parent / file), "-k", name]


@cache
def labs():
    """All labs by number, from easy to hard."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        found.append({"name": path.stem, **yaml.safe_load(path.read_text())})
    found.sort(key=lambda lab: (lab["level"], hashlib.sha256(lab["name"].encode()).digest()))
    return {number: Lab(number, **fields) for number, fields in enumerate(found, 1)}
