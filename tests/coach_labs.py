"""The coach's side of `coach.py lab`: open a lab, judge what the learner names or mends."""

import json
import os
import re
import time

import labs
import lessons
import milestones
import student

ALL_MILESTONES = 600  # seconds that their checks may take together
LEVELS = {1: "easy", 2: "medium", 3: "hard"}


class Desk:
    """The labs that a learner has opened: `my_steps/labs/N/`, and `.coach/labs.json` beside it."""

    def __init__(self, say, run_checks):
        self.say, self.run_checks = say, run_checks
        self.record = student.HOME / ".coach" / "labs.json"
        self.read()

    def read(self):
        self.states = json.loads(self.record.read_text()) if self.record.exists() else {}

    def keep(self, lab, **news):
        self.read()  # another call may have written meanwhile: a check takes minutes
        self.states.setdefault(lab.name, {}).update(news)
        self.record.parent.mkdir(parents=True, exist_ok=True)
        part = self.record.with_suffix(".part")
        part.write_text(json.dumps(self.states, indent=1))
        part.replace(self.record)

    def state(self, lab):
        known = self.states.get(lab.name, {})
        order = ("mended", "found", "opened")
        return next((word for word in order if word in known), "new")

    def folder(self, lab):
        return student.HOME / "labs" / str(lab.number) / lab.step

    def overview(self):
        for lab in labs.labs().values():
            level = LEVELS[lab.level]
            self.say(f"{lab.number:3}  {level:7} {lab.step:24} {self.state(lab)}")
        self.say("Open one with `python tests/coach.py lab N`.")

    def obey(self, lab, word):
        """word: None to open, `check`, `story`, or a place, FILE:LINE."""
        if word is None or not self.folder(lab).exists():
            self.open(lab)
        elif word == "check":
            self.judge(lab)
        elif word == "story":
            self.tell(lab)
        elif found := re.fullmatch(r"([\w./]+\.py):(\d+)", word):
            self.judge_place(lab, found[1].split("/")[-1], int(found[2]))
        else:
            raise lessons.LessonError(f"lab: {word}: it is none of check, story and FILE:LINE")

    def open(self, lab):
        if not self.folder(lab).exists():
            self.folder(lab).parent.parent.mkdir(parents=True, exist_ok=True)
            lab.open(self.folder(lab).parent)
            self.keep(lab, opened=round(time.time()))
        place = os.path.relpath(self.folder(lab))
        self.say(f"Lab {lab.number} ({LEVELS[lab.level]}) lies in {place}. What one sees:\n")
        self.say(lab.symptoms.strip())
        self.say(f"\nA run with it in: {lab.command}")
        self.say(
            f"Name the place, `coach.py lab {lab.number} FILE.py:LINE`, "
            f"or mend it and type `coach.py lab {lab.number} check`."
        )

    def judge_place(self, lab, file, line):
        if lab.is_at(file, line):
            self.keep(lab, found=round(time.time()))
            self.say("That is the place.")
            self.tell(lab)
        else:
            path = self.folder(lab) / file
            if not path.exists() or not 1 <= line <= len(path.read_text().splitlines()):
                raise lessons.LessonError(f"lab: {file} with a line {line} is not in this lab")
            near = "another line of this file" if file == lab.file else "in another file"
            self.say(f"Not there. It is {near}.")

    def judge(self, lab):
        """The check that the mistake fails passes now, and no milestone of the step fails."""
        own = self.folder(lab)
        for path in sorted(own.glob("*.py")):
            if why := milestones.syntax_error(path):
                return self.say(f"{why}. Mend that first.")
        if (own / lab.file).read_text() == lab.planted():
            return self.say("Not mended: the file with the mistake is as it was.")
        wrong, seconds = self.run_checks(lab.pytest_flags(own), own)
        if wrong:  # its words would name the place
            return self.say(
                f"Not mended yet: the check that it fails still fails ({seconds:.0f} s)."
            )
        last = max(milestones.titles(own))
        flags = [f"--step-dir={own}", f"--milestone={last}"]
        wrong, more = self.run_checks(flags, own, ALL_MILESTONES)
        if wrong:
            return self.say(
                f"The mistake is gone, but something else broke ({more:.0f} s):\n{wrong}"
            )
        self.keep(lab, mended=round(time.time()))
        self.say(f"Mended: every check of the step passes ({seconds + more:.0f} s).")
        return self.tell(lab)

    def tell(self, lab):
        self.say(f"\n{lab.story.strip()}")
        self.say(f"The check that finds it: {lab.check}." + f" {lab.source}" * bool(lab.source))
