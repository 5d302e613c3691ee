"""The exercises of the lessons, for the coach: each in a place of its own, with a check.

Most exercises change a line of a step. The coach lays a copy of the step, and its check says which
milestone notices what the reader changed. A few ask for code of the reader's own. These have a stub
in `exercise_stubs/`, named by step, page and the number on the page, and a check in
`exercise_checks.py`.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import lessons
import milestones
import student

STUBS = Path(__file__).parent / "exercise_stubs"
CHECKS = Path(__file__).parent / "exercise_checks.py"
LONGEST = 60  # seconds that the check of a reader's own code may take


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson. number: in its step; on_page: on its page."""

    step: Path
    page: str
    number: int
    on_page: int
    title: str
    text: str
    answer: str

    @property
    def stub(self):
        """The file of an exercise that asks for code of one's own; None for the others."""
        path = STUBS / f"{self.step.name}_{Path(self.page).stem}_{self.on_page}.py"
        return path if path.exists() else None

    @property
    def place(self):
        """Where the reader works on it: a copy of the step, or a file."""
        folder = student.HOME / "exercises" / f"{lessons.step_number(self.step)}.{self.number}"
        file = re.sub(r"\W+", "_", self.title.lower()) + ".py"
        return folder / (file if self.stub else self.step.name)

    def open(self):
        """Lay the copy or the stub, complete or not at all; what is there stays."""
        if self.place.exists():
            return
        part = self.place.parent.with_name(f".{self.place.parent.name}")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if self.stub:
            shutil.copy(self.stub, part / self.place.name)
        else:
            without = shutil.ignore_patterns("*.md", "__pycache__")
            shutil.copytree(self.step, part / self.place.name, ignore=without)
        self.place.parent.mkdir(exist_ok=True)
        (part / self.place.name).rename(self.place)
        part.rmdir()


def exercises(number):
    """All exercises of a step, in the order of its pages."""
    step = lessons.step_of(number)
    found = []
    for page in lessons.pages(step):
        part = re.search(r"^## Check yourself\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)
        for at in re.finditer(
            r"^(\d+)\. (\*(.+?)\.?\*.*?)<details>.*?</summary>\n(.*?)</details>",
            part[1] if part else "", re.M | re.S,
        ):  # fmt: skip
            what = [text.strip() for text in (at[3], at[2], at[4])]
            found.append(Exercise(step, page.name, len(found) + 1, int(at[1]), *what))
    return found


def changed(exercise):
    """What differs from our step: {(file, name of a definition)}."""
    found = set()
    for path in sorted(exercise.place.glob("*.py")):
        ours = exercise.step / path.name
        mine, theirs = path.read_text(), ours.read_text() if ours.exists() else ""
        if mine == theirs:
            continue
        names = lessons.definitions_in(mine)
        differing = {n for n in names if milestones.text_of(path, n) != milestones.text_of(ours, n)}
        inner = {n for n in differing if not any(d.startswith(f"{n}.") for d in differing)}
        found |= {(path.name, name) for name in inner or {"its first lines"}}
    return found


def milestones_for(exercise, changes):
    """All milestones, those first that write what was changed."""
    walk = lessons.walk(exercise.step)
    near = [item.milestone for item in walk if {(p.file, p.name) for p in item.pieces} & changes]
    return list(dict.fromkeys([*near, *sorted(milestones.titles(exercise.step))]))


class Exercises:
    """The coach's side: `coach.py N exercise …`."""

    def __init__(self, number, say, show, run_checks):
        self.number, self.all = number, exercises(number)
        self.say, self.show, self.run_checks = say, show, run_checks

    def overview(self):
        for one in self.all:
            state = "opened" if one.place.exists() else "new"
            self.say(f"{one.number:3}  {one.page:18} {one.title:34} {state}")
        self.say(f"Open one with `python tests/coach.py {self.number} exercise 1`.")

    def obey(self, number, word):
        """word: None to open an exercise, `check` or `answer`."""
        if number is None:
            return self.overview()
        if not number.isdecimal() or not 1 <= int(number) <= len(self.all):
            raise lessons.LessonError(f"exercise {number}: this step has 1 to {len(self.all)}")
        one = self.all[int(number) - 1]
        one.open()
        if word is None:
            return self.task(one)
        if word == "answer":
            return self.show(one.answer)
        if word != "check":
            raise lessons.LessonError(f"exercise: {word}: it is neither check nor answer")
        return self.check_code(one) if one.stub else self.check_change(one)

    def task(self, one):
        self.show(one.text)
        what = "Write it in" if one.stub else "A copy of the step for it is"
        self.say(f"{what} {os.path.relpath(one.place)}. Then:")
        self.say(f"python tests/coach.py {self.number} exercise {one.number} check    or: answer")

    def check_code(self, one):
        """Run the check of a reader's own code in a process of its own."""
        command = [sys.executable, CHECKS, one.stub.stem, one.place]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return self.say(f"It took more than {LONGEST} s: is there an endless loop?")
        if ran.returncode:
            lines = ran.stderr.strip().splitlines() or ["it ended without a word"]
            return self.say("Not yet: " + lines[-1].removeprefix("AssertionError: "))
        self.say("That is right. The lesson's answer:")
        return self.show(one.answer)

    def check_change(self, one):
        """Say what a reader changed, and which milestone notices it."""
        changes = changed(one)
        if not changes:
            return self.say(f"Nothing is changed yet in {os.path.relpath(one.place)}.")
        self.say("Changed: " + ", ".join(f"{name} in {file}" for file, name in sorted(changes)))
        for milestone in milestones_for(one, changes):
            flags = [f"--milestone={milestone}", f"--from-milestone={milestone}"]
            wrong, seconds = self.run_checks([f"--step-dir={one.place}", *flags], one.place)
            if wrong:
                self.say(f"Milestone {milestone} notices it ({seconds:.0f} s):\n{wrong}")
                break
        else:
            self.say("No milestone notices it.")
        return self.say("Compare your prediction with `answer`.")
