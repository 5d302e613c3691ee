"""Build the steps yourself, and be told what is next and what is wrong.

python tests/coach.py              where you are
python tests/coach.py 4            begin step 4 in my_steps/, or go on with it
python tests/coach.py 4 --once     look once, and don't wait for changes
python tests/coach.py 4 hint       a hint for what is next; each call says more
python tests/coach.py 4 diff       your lines beside ours, for what is next
python tests/coach.py 4 skip       take our lines for what is next
python tests/coach.py 8 picture    what your schedule (7, 8), ring (5) or zero3 (6) did, beside ours
python tests/coach.py 4 exercise   the exercises of the lesson
python tests/coach.py 4 exercise 2            begin one; then `check` or `answer` behind it
python tests/coach.py quiz 4       five questions, with other numbers each time
python tests/coach.py lab          the labs: copies of a step with one mistake in each
python tests/coach.py lab 7        open a lab, and see what is wrong with it
python tests/coach.py lab 7 check             is it mended?
python tests/coach.py lab 7 optimizer.py:52   is that the place?
python tests/coach.py lab 7 story             give up, or read who had it

While the coach waits it takes the same words from the keyboard: `hint`, `diff`, `skip`,
`picture`, `quit`.
Your files lie in my_steps/, and so does what the coach keeps, in my_steps/.coach/.
"""

import argparse
import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import hints
import lessons
import milestones
import pictures
import quiz
from coach_labs import Desk
from exercises import Exercises
from labs import labs
from rich.console import Console
from rich.markdown import Markdown
from student import Student

LONGEST = 150  # seconds that the checks of a milestone may take before they are ended
WORDS = ("hint", "diff", "skip", "picture")
CURVES = {  # flags of 8 sequences a step, for tests/convergence.py
    3: "--micro_batch_size 4 --gradient_accumulation_steps 2",
    4: "--tp_size 2 --micro_batch_size 8",
    5: "--cp_size 2 --micro_batch_size 8",
    6: "--dp_size 2 --dp_engine zero3 --micro_batch_size 4",
    7: "--pp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 4",
    8: "--pp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 4",
    9: "--tp_size 2 --dp_size 2 --dp_engine zero1 --micro_batch_size 4",
}
console = Console(highlight=False)


def say(text, style=None):
    console.print(text, style=style, markup=False)


def shown(path):
    """A path as one types it."""
    return os.path.relpath(path)


def show(markdown):
    console.print(Markdown(markdown))


# --- checks ---------------------------------------------------------------------------------------


def check(student, first, last):
    """Run the checks of some milestones: (None or what is wrong in words, seconds)."""
    flags = [f"--step-dir={student.own}", f"--milestone={last}", f"--from-milestone={first}"]
    return run_checks(flags, student.own)


def run_checks(flags, own, longest=None):
    """Run pytest on a reader's step: (None or what is wrong in words, seconds).

    longest: seconds after which it is ended; by default LONGEST, for one milestone.
    """
    longest = longest or LONGEST
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--color=no", *flags]
    command += ["-p", "no:cacheprovider"]
    begun = time.monotonic()
    # A session of its own: whatever its tests have started ends with it.
    with subprocess.Popen(
        command, cwd=lessons.ROOT, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as running:  # fmt: skip
        try:
            said, _ = running.communicate(timeout=longest)
        except subprocess.TimeoutExpired:
            said = f"E   the checks took more than {longest} s: is there an endless loop?"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    seconds = time.monotonic() - begun
    return (None if running.returncode == 0 else in_words(said, own)), seconds


def in_words(said, own):
    """What the checks found, out of what pytest printed."""
    errors = re.findall(r"^E +(.+)$", said, re.MULTILINE)
    errors = errors or re.findall(r"^_+ test_.* _+\n(.+)$", said, re.MULTILINE)  # without a trace
    errors = errors or said.strip().splitlines()[-8:]
    found = re.sub(r"^[\w.]*Error: (rank \d+ of \d+ failed: )?(AssertionError: )?", "", errors[0])
    # Others fail because one died, and may be heard first.
    dead = re.findall(r"^E +(?:\S+: )?(rank \d+ (?:of \d+ )?died.*)$", said, re.MULTILINE)
    found = dead[0] if dead else found
    where = re.findall(r"^E +File \"(.+?)\", line (\d+), in (\w+)\nE +(.+)$", said, re.MULTILINE)
    own = [f"{os.path.basename(f)}, line {n}, in {whole_name(f, int(n), name)}: {line}"
           for f, n, name, line in where if Path(f).parent == own]  # fmt: skip
    standing = re.findall(r"^E +(rank \d+ (?:is|waits) in .+)$", said, re.MULTILINE)
    if standing:
        standing.append("That is an endless loop, or a message for which no other rank has a call.")
    news = re.findall(r"^(Milestone .*)$", said, re.MULTILINE)
    return "\n".join([found, *standing, *own[-1:], *news[-1:]])


def whole_name(file, line, name):
    """`Class.method` where a line of a file is in a method, else the name."""
    try:
        found = lessons.definitions_in(Path(file).read_text())
    except SyntaxError:
        return name
    return next((n for n, at in found.items() if line in at and n.split(".")[-1] == name), name)


# --- one look -------------------------------------------------------------------------------------


def look(student):
    """Check what is written, then show what is next; True when the step is done."""
    if broken := student.broken():
        say(broken, "bold red")
        return False
    written = student.written()
    first = next((m for m in range(1, written + 1) if not student.is_reached(m)), None)
    for milestone in range(first or 1, written + 1) if first else ():
        title = milestones.titles(student.own)[milestone][0]
        with console.status(f"checking milestone {milestone}, {title} …"):
            wrong, seconds = check(student, milestone, milestone)
        if wrong:
            say(f"Milestone {milestone}, {title}: not yet ({seconds:.0f} s)", "bold red")
            return tell(student, milestone, wrong)
        student.reached(milestone, seconds)
        say(f"Milestone {milestone}, {title}: reached ({seconds:.0f} s)", "bold green")
    item, lack = student.next_item()
    if item is None:
        return finish(student)
    show_item(student, item, lack)
    return False


def tell(student, milestone, wrong):
    """Say what is wrong, and of which item it is where that is one of an earlier milestone."""
    student.failed(milestone, wrong)
    say(wrong)
    item = student.wrong_item()
    if item and item.milestone < milestone:
        say(f"What it names is item {item.number} of {item.page}, {item.title}.")
    return False


def show_item(student, item, lack):
    title = f"{item.page} item {item.number}, milestone {item.milestone}: {item.title}"
    console.rule(title, align="left")
    show(first_paragraph(item.explanation))
    show(hints.task(item, student.ours))
    say(lack)
    words = [w for w in WORDS if w != "picture" or student.number in pictures.PICTURES]
    say(f"Write it and save. Or: {', '.join(words)}, quit.", "dim")


def first_paragraph(text):
    """The first paragraph, and what it announces with a colon."""
    parts = text.split("\n\n")
    return "\n\n".join(parts[: 2 if parts[0].endswith(":") else 1])


def finish(student):
    """The end of a step: all checks once more, its curve beside one process; True if they hold."""
    last = max(milestones.titles(student.own))
    say(f"All {last} milestones are reached. Once more from the first one, in your last version:")
    for milestone in range(1, last + 1):
        with console.status(f"checking milestone {milestone} of {last} …"):
            wrong, _ = check(student, milestone, milestone)
        if wrong:
            student.forget()
            return tell(student, milestone, wrong)
    say("They hold.", "bold green")
    if run := CURVES.get(student.number):
        say(f"Does it train as one process does? 20 steps in float64 with {run}:")
        command = [sys.executable, "tests/convergence.py", f"{shown_from_root(student.own)} {run}"]
        if subprocess.run(command, cwd=lessons.ROOT).returncode:
            say("Not yet: the table says where the curves part.", "bold red")
            return False
    student.done()
    walk = lessons.walk(student.ours)
    same = sum(map(student.is_ours, walk))
    say(f"Step {student.number} is yours: {len(walk)} items are done.", "bold green")
    say(f"{len(walk) - same} of them you wrote in your own way; {same} are ours, word for word.")
    say(f"The whole step's tests: python -m pytest --step-dir={shown(student.own)}")
    return True


def shown_from_root(path):
    return os.path.relpath(path, lessons.ROOT)


# --- words ----------------------------------------------------------------------------------------


def obey(student, word):
    """Do what the reader asks for the item that is next, or that is wrong."""
    item = student.wrong_item() or student.next_item()[0]
    if word == "picture":
        pictures.picture(student.number, student.own, student.aside / "picture.png", say)
    elif item is None:
        say("Nothing is left to write in this step.")
    elif word == "hint":
        level = student.next_hint(item)
        say(f"Hint {level}, {hints.HINTS[level - 1]}:", "bold")
        show(hints.hint(item, student.ours, level))
    elif word == "skip":
        student.take(item)
        before = shown(student.aside / "before")
        say(f"Item {item.number} is ours now. Your files as they were are in {before}.")
    elif word == "diff":
        for file in dict.fromkeys(piece.file for piece in item.pieces):
            command = ["git", "--no-pager", "diff", "--no-index"]
            subprocess.run([*command, student.ours / file, student.own / file], cwd=lessons.ROOT)


def follow(student):
    """Look after each change of a file, until all is written or the reader quits."""
    while not look(student):
        word = wait(student)
        while word is not None:
            if word in ("quit", "q", "exit"):
                return
            if word in WORDS:
                try:
                    obey(student, word)
                except lessons.LessonError as error:
                    say(f"{error}")
            if word == "skip":
                break
            if word not in WORDS:
                say(f"I know {', '.join(WORDS)} and quit.")
            word = wait(student)


def wait(student):
    """Wait for a file to change (None), or for a word from the keyboard."""
    before = student.stamp()
    listening = sys.stdin is not None and not sys.stdin.closed
    while student.stamp() == before:
        ready = select.select([sys.stdin], [], [], 0.5)[0] if listening else time.sleep(0.5)
        if ready:
            line = sys.stdin.readline()
            if not line:
                listening = False
            elif line.strip():
                return line.strip().lower()
    time.sleep(0.2)  # an editor may write several files
    return None


# --- where one is ---------------------------------------------------------------------------------


def overview():
    """Which steps are done, what is next, and how long it takes by the front page's estimate."""
    for step in lessons.steps():
        student = Student(lessons.step_number(step))
        titles = milestones.titles(step)
        state = "not begun"
        if student.is_open:
            state = f"{student.count()} of {len(titles)} milestones"
            if student.is_done:
                state = "done" if student.is_whole() else "done, now broken"
        say(f"{student.number}  {step.name:24} {state:18} {spent(student, titles)}")
    say("Begin or go on with `python tests/coach.py N`.", "dim")


def spent(student, titles):
    """What is left of a step, in words."""
    left = [m for m in titles if not student.is_reached(m)]
    minutes = sum(student.minutes(m) for m in left)
    if student.is_done or not left:
        return ""
    hours = f"about {minutes / 60:.1f} hours" if minutes >= 90 else f"about {minutes:.0f} minutes"
    return f"{hours} left" + f"; next: {titles[left[0]][0]}" * student.is_open


def begin(student):
    """Open a step: from the reader's own step before, if all of that is reached."""
    start = None
    if student.number > 1:
        mine = Student(student.number - 1)
        done = mine.is_open and mine.is_done
        start = mine.own if done else mine.ours
        whose = "your own" if done else "our"
        say(f"Step {student.number} begins with {whose} step {student.number - 1}.")
    student.open(start)
    say(f"It lies in {shown(student.own)}.")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", help="the number of a step, `quiz` or `lab`")
    parser.add_argument("words", nargs="*", help="see above")
    parser.add_argument("--once", action="store_true", help="look once, and don't wait for changes")
    return parser.parse_intermixed_args()  # so `4 --once hint` is as good as `4 hint --once`


def main(args):
    words = [*args.words, None, None]
    if args.what is None:
        return overview()
    if args.what == "lab":
        return lab(*words[:2])
    if args.what == "quiz":
        return quiz.hold(number_of(words[0] or "", "a step"), say)
    step = Student(number_of(args.what, "a step"))
    if words[0] == "exercise":
        return Exercises(step.number, say, show, run_checks).obey(*words[1:3])
    if words[0] not in (None, *WORDS):
        raise lessons.LessonError(f"{words[0]}: the words are {', '.join(WORDS)}, exercise")
    if not step.is_open:
        begin(step)
    if words[0]:
        obey(step, words[0])
    elif args.once:
        look(step)
    else:
        follow(step)


def number_of(text, what):
    if not text.isdecimal():
        raise lessons.LessonError(f"{text}: name {what} by its number; or say `lab` or `quiz`")
    return int(text)


def lab(number, word):
    desk = Desk(say, run_checks)
    if number is None:
        return desk.overview()
    chosen = labs().get(number_of(number, "a lab"))
    if chosen is None:
        raise lessons.LessonError(f"lab {number}: the labs are 1 to {len(labs())}")
    return desk.obey(chosen, word)


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except lessons.LessonError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        command = " ".join(["python tests/coach.py", *map(str, sys.argv[1:])])
        sys.exit(f"\nYour files are as you left them. Go on with: {command}")
