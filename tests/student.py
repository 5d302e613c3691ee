"""A reader's own steps: where they are, what is written, what comes next.

All of it lies in `my_steps/`: the steps themselves, and `.coach/` beside them with what was laid at
the beginning of each step, what was taken from us since, and how far the reader has come.
"""

import contextlib
import json
import os
import re
import shutil
import time

import lessons
import milestones
import stubs

HOME = lessons.ROOT / "my_steps"
FRONT_PAGE = lessons.ROOT / "README.md"


class Student:
    """One step of a reader.

    own: their folder of it. ours: our folder of it.
    """

    def __init__(self, number):
        self.number, self.home = number, HOME
        self.ours = lessons.step_of(number)
        self.own = self.home / self.ours.name
        self.aside = self.home / ".coach" / self.ours.name
        self.about = {"reached": {}, "hints": {}, "skipped": []}
        if (self.aside / "progress.json").exists():
            self.about |= json.loads((self.aside / "progress.json").read_text())

    def keep(self):
        """Write how far the reader is, aside and then renamed: an interruption loses nothing."""
        self.aside.mkdir(parents=True, exist_ok=True)
        part = self.aside / f"progress.{os.getpid()}"
        part.write_text(json.dumps(self.about, indent=1))
        part.replace(self.aside / "progress.json")

    # --- the beginning ----------------------------------------------------------------------------

    @property
    def is_open(self):
        return self.own.is_dir()

    def open(self, start):
        """Lay the step: all of it, or none. start: the folder of the step before."""
        part = self.home / f".{self.ours.name}.{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        stubs.lay(self.ours, start, part)
        shutil.rmtree(self.aside / "laid", ignore_errors=True)  # the copies in `before` stay
        shutil.copytree(part, self.aside / "laid")
        self.about = {"reached": {}, "hints": {}, "skipped": [], "begun": time.time()}
        self.keep()
        part.rename(self.own)

    # --- what comes next --------------------------------------------------------------------------

    def lack(self, item):
        """A sentence about what an item still needs; None where it is written."""
        for piece in item.pieces:
            if sentence := milestones.lack_of(self.own, self.ours, piece):
                return sentence
            if self.is_as_laid(piece):
                return f"`{piece.name}` in `{piece.file}` is as it was: change it."
        for file in {piece.file for piece in item.pieces}:
            if (item.page, item.number) in stubs.left_in((self.own / file).read_text()):
                return f"`{file}` still has the stub of this item."
        return None

    def is_as_laid(self, piece):
        """Whether a definition that the step changes is still that of the step before."""
        past = lessons.before(self.ours)
        path = self.ours / piece.file
        if past is None or not (past / piece.file).exists() or lessons.is_no_lesson(path):
            return False
        if piece.name in ("docstring", "imports"):  # nothing depends on their words
            return False
        laid = milestones.text_of(self.aside / "laid" / piece.file, piece.name)
        return laid is not None and laid == milestones.text_of(self.own / piece.file, piece.name)

    def broken(self):
        """A sentence about a file that is gone, or that Python can't read; None for none."""
        for path in sorted((self.aside / "laid").glob("*.py")):
            if not (self.own / path.name).exists():
                return f"{path.name} is gone. As it was laid at first: {os.path.relpath(path)}"
        for path in sorted(self.own.glob("*.py")):
            if why := milestones.syntax_error(path):
                return f"{why}. Python can't read the file."
        return None

    def is_whole(self):
        """Whether all is there that was once done; no check runs."""
        return not self.broken() and self.next_item()[0] is None

    def next_item(self):
        """The first item that is not written, with a sentence about it: (item, sentence)."""
        lessons.source.cache_clear()
        lessons.definitions.cache_clear()
        for item in lessons.walk(self.ours):
            if sentence := self.lack(item):
                return item, sentence
        if self.waits_for() and all(map(self.is_reached, range(1, self.waits_for()))):
            self.lay_later()
            return self.next_item()
        return None, ""

    def waits_for(self):
        """The first milestone of further pages that is not laid as stubs yet; 0 for none."""
        laid = self.about.get("laid_up_to", 0)
        return next((m for m in stubs.later_milestones(self.ours) if m > laid), 0)

    def lay_later(self):
        """All before a milestone of a further page is done: now what it is about becomes stubs."""
        milestone = self.waits_for()
        for file in stubs.later(self.ours):
            mine = self.own / file
            text = stubs.stubbed_for(milestone, self.ours, file, mine.read_text())
            if text != mine.read_text():
                self.back_up(file)
                mine.write_text(text)
        self.about["laid_up_to"] = milestone
        self.keep()

    def written(self):
        """The number of the last milestone all of whose items are written; 0 for none."""
        item, _ = self.next_item()
        if item:
            return item.milestone - 1
        return self.waits_for() - 1 if self.waits_for() else max(milestones.titles(self.own))

    # --- how far ------------------------------------------------------------------------------

    def is_reached(self, milestone):
        return str(milestone) in self.about["reached"]

    def reached(self, milestone, seconds):
        self.about["reached"][str(milestone)] = round(seconds, 1)
        self.about.pop("failed", None)
        self.keep()

    def failed(self, milestone, told):
        self.about["failed"] = milestone, told
        self.keep()

    def wrong_item(self):
        """The item that the message names of the milestone that failed, or of one before it.

        If it names none: the first item of that milestone.
        """
        milestone, told = self.about.get("failed", (0, ""))
        items = [item for item in lessons.walk(self.ours) if item.milestone == milestone]
        past = [item for item in lessons.walk(self.ours) if item.milestone < milestone]
        ways = (whole_name, items), (unmistakable, past), (last_part, items)
        for name_in, among in ways:
            for item in among:
                names = filter(None, (name_in(piece.name) for piece in item.pieces))
                if any(re.search(rf"\b{re.escape(name)}\b", told) for name in names):
                    return item
        return items[0] if items else None

    def is_ours(self, item):
        """Whether an item of the reader's version has our lines, all of them."""
        pieces = [p for p in item.pieces if p.name not in ("docstring", "imports")]
        own, ours = (
            [milestones.text_of(folder / p.file, p.name) for p in pieces]
            for folder in (self.own, self.ours)
        )
        return own == ours

    def forget(self):
        """All milestones are to be checked again."""
        self.about["reached"] = {}
        self.keep()

    def done(self):
        self.about["done"] = time.time()
        self.keep()

    @property
    def is_done(self):
        return "done" in self.about

    def count(self):
        """How many milestones are reached."""
        return len(self.about["reached"])

    def minutes(self, milestone):
        """An estimate: the step's hours on the front page, dealt out by lines of code."""
        row = re.search(
            rf"\]\({self.ours.name}/README.md\).*\| (\d+) \+ \d+ \|", FRONT_PAGE.read_text()
        )
        lines = {}
        for item in lessons.walk(self.ours):
            count = sum(len(piece.lines) for piece in item.pieces)
            lines[item.milestone] = lines.get(item.milestone, 0) + count
        return 60 * int(row[1]) * lines[milestone] / sum(lines.values())

    def next_hint(self, item):
        """The level of the next hint for an item, 1 to 3."""
        key = f"{item.page} {item.number}"
        self.about["hints"][key] = min(3, self.about["hints"].get(key, 0) + 1)
        self.keep()
        return self.about["hints"][key]

    def stamp(self):
        """Changes when a file of the step does."""
        found = []
        for path in sorted(self.own.glob("*.py")):
            with contextlib.suppress(FileNotFoundError):  # an editor may write it anew
                found.append((path.name, path.stat().st_mtime_ns))
        return found

    # --- ours instead -----------------------------------------------------------------------------

    def back_up(self, file):
        """Keep a copy of a reader's file before we write to it."""
        if (self.own / file).exists():
            folder = self.aside / "before"
            folder.mkdir(parents=True, exist_ok=True)
            copies = len(list(folder.glob(f"{file}.*")))
            shutil.copy(self.own / file, folder / f"{file}.{copies + 1}")

    def take(self, item):
        """Put our lines of an item into the reader's files; or raise LessonError.

        What is there before is kept as a copy.
        """
        for path in {self.own / piece.file for piece in item.pieces}:
            if path.exists() and (why := milestones.syntax_error(path)):
                raise lessons.LessonError(f"{why}. Mend that first, or delete the file.")
        for file in dict.fromkeys(piece.file for piece in item.pieces):
            self.back_up(file)
            path = self.own / file
            ours = (self.ours / file).read_text()
            text = stubs.with_imports(path.read_text() if path.exists() else "", ours)
            for piece in (piece for piece in item.pieces if piece.file == file):
                text = replaced(text, ours, piece.name)
            path.write_text(text)
        self.about["skipped"].append([item.page, item.number])
        self.keep()


def replaced(mine, ours, name):
    """A text with one definition of ours in place of its own, or after the one before it."""
    theirs, own = ranges(ours), ranges(mine)
    lines, new = mine.splitlines(), ours.splitlines()
    taken = new[theirs[name].start - 1 : theirs[name].stop - 1]
    if name in own:
        lines[own[name].start - 1 : own[name].stop - 1] = taken
        return "\n".join(lines) + "\n"
    names = [n for n in own if n in theirs and ("." in n or "." not in name)]
    before = [n for n in theirs if n in names and theirs[n].stop <= theirs[name].start]
    place = own[before[-1]].stop - 1 if before else 0
    gap = [""] * (1 if "." in name else 2)
    lines[place:place] = [*gap, *taken] if place else [*taken, *gap]
    return "\n".join(lines) + "\n"


def whole_name(name):
    """`Ring` of the piece `Ring.head`."""
    return name.removesuffix(".head")


def unmistakable(name):
    """A name that is no word of a sentence, or None: `all_reduce` and `Ring`, but not `part`."""
    return whole_name(name) if re.search("[A-Z_]", name) else None


def last_part(name):
    """`forward` of `Ring.forward`."""
    return name.split(".")[-1]


def ranges(text):
    """{name: range of lines} of a text, in its order."""
    found = lessons.definitions_in(text)
    return dict(sorted(found.items(), key=lambda entry: entry[1].start))
