"""Where a rank stands: short tracebacks of errors, and ranks that wait for each other.

A rank that waits uses next to no processor time (gloo's own threads use less than 0.01 s a second),
and one that computes uses more, even on a busy machine. So when no rank of a world has used any
for some seconds, and each of them waits in a call that needs other ranks, nothing will happen any
more. A rank that sleeps, or waits for a file or a child process, is not in such a call.
"""

import contextlib
import linecache
import os
import re
import signal
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from tensor_names import and_join, listed

TESTS = str(Path(__file__).parent)
SIGNAL = signal.SIGUSR2  # the steps use SIGUSR1 themselves
LOOK = 1.0  # seconds between two looks at ranks that have not answered
BUSY = 0.03  # seconds of processor time between two looks: with less a rank waits
FRAME = r'File "(.*)", line (\d+) in (.*)'
HIDDEN = ("/tests/harness.py", "/multiprocessing/", "/torch/nn/modules/module.py")


class Frame(NamedTuple):
    file: str
    line: int
    function: str

    @property
    def code(self):
        return linecache.getline(self.file, self.line).strip()

    def __str__(self):
        name = f"{Path(self.file).parent.name}/{Path(self.file).name}"
        return f"{name}, line {self.line}, in {self.function}: {self.code}"


# --- errors ---------------------------------------------------------------------------------------


def one_line(error):
    """The exception in one line."""
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    return text.splitlines()[0]


def short_traceback(error):
    """The traceback of an exception without the frames of what started the rank."""
    whole = traceback.TracebackException.from_exception(error)
    chain = [whole]
    for one in chain:  # and of the exceptions that led to it
        own = [f for f in one.stack if not any(h in f.filename for h in HIDDEN)]
        one.stack[:] = own or one.stack
        chain += [other for other in (one.__cause__, one.__context__) if other is not None]
    return "".join(whole.format())


SIGNALS = {
    "SIGKILL": "Somebody killed it, perhaps the system because memory was short.",
    "SIGSEGV": "It used memory that is not its own.",
    "SIGABRT": "gloo does this when the ranks' calls do not fit together: one rank makes another "
    "call, or one with a tensor of another size. Compare the calls of all ranks of the group, "
    "their order, and the shapes of what they send.",
}


def how_it_ended(process, file, step_dir):
    """Words for a process that is gone: its code or signal, and where it was.

    file: into it the process wrote its stack, if it still could.
    """
    process.join(5)
    code = process.exitcode
    name = signal.Signals(-code).name if code is not None and code < 0 else None
    text = f"killed by {name}" if name else f"with code {code}"
    if frames := frames_in(Path(file).read_text()):
        text += f"\noutermost call first:{shortened(frames, step_dir)}"
    return text + listed([SIGNALS[name]] if name in SIGNALS else [])


# --- ranks that wait ------------------------------------------------------------------------------


def processor_seconds(pid):
    """Processor time that a process has used so far; None where that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_stacks(ranks):
    """{rank: frames, the innermost first} of those that answer; ranks: {rank: (pid, file)}.

    On a signal a rank writes its main thread's Python stack into its file.
    """
    for pid, file in ranks.values():
        os.truncate(file, 0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGNAL)
    deadline, texts = time.monotonic() + 2, {}
    while time.monotonic() < deadline:
        time.sleep(0.1)
        before, texts = texts, {rank: Path(file).read_text() for rank, (_, file) in ranks.items()}
        if all(texts.values()) and texts == before:  # nobody is still writing
            break
    found = {rank: frames_in(text) for rank, text in texts.items()}
    return {rank: frames for rank, frames in found.items() if frames}


def frames_in(text):
    """The frames of the main thread, in which `serve` is, of what `faulthandler` wrote."""
    threads = [
        [Frame(file, int(line), name) for file, line, name in re.findall(FRAME, thread)]
        for thread in re.split(r"^(?:Current t|T)hread ", text, flags=re.MULTILINE)
    ]
    return max(
        threads, key=lambda frames: (any(f.function == "serve" for f in frames), len(frames))
    )


def is_own(frame, step_dir):
    """Whether a frame is in the step or in the tests, not in what starts the ranks."""
    if frame.file == f"{TESTS}/harness.py":
        return False
    return Path(frame.file).is_relative_to(step_dir) or Path(frame.file).is_relative_to(TESTS)


def needs_others(frames, step_dir):
    """Whether a rank is in a call that ends only when other ranks do something."""
    inner = frames[0]
    if "/torch/distributed/" in inner.file:
        return "/checkpoint/" not in inner.file  # that waits for a disk
    return is_own(inner, step_dir) and ".wait()" in inner.code


def call_of(frames, step_dir):
    """(the call that a rank is in, the frame that called it); the latter None for its last wait."""
    own = [frame for frame in frames if is_own(frame, step_dir)]
    if not own:
        return "the end of its work", None
    place = own[0]
    if Path(place.file).name == "process_group.py":
        callers = [f for f in own if Path(f.file).name != "process_group.py"]
        return f"pg.{place.function}", callers[0] if callers else place
    if "/torch/distributed/" in frames[0].file:
        inside = [f.function for f in frames[: frames.index(place)] if f.function != "wrapper"]
        return f"torch.distributed.{inside[-1]}", place
    return place.code if needs_others(frames, step_dir) else None, place


def standing(rank, frames, step_dir):
    """One sentence: what a rank waits in, or where it is."""
    call, place = call_of(frames, step_dir)
    if place is None:
        return f"rank {rank} has done its work and waits for the others to end theirs"
    where = f"{place.function} ({Path(place.file).name}, line {place.line})"
    if call is None:
        return f"rank {rank} is in {where}: {place.code}"
    if call == place.code:
        return f"rank {rank} waits in {where} for a message: {call}"
    return f"rank {rank} waits in {call}, called by {where}: {place.code}"


def shortened(frames, step_dir):
    """The frames of a stack that the reader wrote, the outermost first, and the innermost one."""
    shown = [frame for index, frame in enumerate(frames) if not index or is_own(frame, step_dir)]
    return "".join(f"\n    {frame}" for frame in reversed(shown))


def some_ranks(ranks):
    """ "rank 0" or "ranks 0 and 1"."""
    return f"rank{'s' * (len(ranks) > 1)} {and_join(ranks)}"


def stacks_in_words(stacks, silent, step_dir):
    """Text: a sentence for each rank, then their stacks. silent: ranks that gave no stack."""
    lines = [standing(rank, frames, step_dir) for rank, frames in stacks.items()]
    lines += [f"rank {rank} does not answer: it is not in Python code" for rank in silent]
    stacks = [
        f"\nrank {r}, outermost call first:{shortened(f, step_dir)}" for r, f in stacks.items()
    ]
    return "\n".join(lines), "".join(stacks)


def causes_of_deadlock(stacks, finished, step_dir):
    """Sentences: what it usually means that ranks wait for each other in these calls."""
    calls = {rank: call_of(frames, step_dir) for rank, frames in stacks.items()}
    ended = sorted([*finished, *(rank for rank, (_, place) in calls.items() if place is None)])
    waiting = {rank: call for rank, call in calls.items() if call[1] is not None}
    if ended and waiting:
        return [
            f"{some_ranks(ended)} ended all work, and {some_ranks(waiting)} still wait: one side "
            "makes a call that the other one leaves out. Look for an `if` or a loop around this "
            "call that is not the same on all ranks."
        ]
    names = {call for call, _ in waiting.values()}
    if all(re.search(r"recv|send|exchange|\.wait\(", name) for name in names):
        return [
            "A message that a rank waits for is never sent, or only after the sender has received "
            "one itself. Post a send and a receive that need each other together (`pg.exchange`), "
            "and check the partner: what a rank sends to its next one, that one must receive from "
            "its previous one, in the same order and number."
        ]
    if all(name.endswith("group") for name in names):  # pg.group, torch.distributed.new_group
        return ["All ranks must ask for the same groups in the same order (`mesh.group`)."]
    if len(names) > 1:
        return [
            "The ranks are in different calls. All ranks of a group must make the same calls in "
            "the same order: look for a call that one rank makes and another one leaves out, or "
            "that stands in another place."
        ]
    return [
        "All ranks wait in the same kind of call, and still not for each other: one of them made "
        "a call before that the others left out, or they name different groups."
    ]


class Watch:
    """Looks now and then at ranks that have not answered: do they only wait for each other?

    world: has processes, stack_files and step_dir. idle: seconds without processor time after which
    that is asked.
    """

    def __init__(self, world, idle):
        self.world, self.idle = world, idle
        self.used, self.quiet, self.before = None, 0, None

    def is_quiet(self):
        """Whether no rank has used processor time in the looks of the last `idle` seconds."""
        before = self.used
        self.used = [processor_seconds(process.pid) for process in self.world.processes]
        if before is None or None in self.used:
            return False
        busy = any(now - then > BUSY for now, then in zip(self.used, before, strict=True))
        self.quiet = 0 if busy else self.quiet + LOOK
        return self.quiet >= self.idle

    def stacks(self, waiting):
        """The stacks of some ranks, and the ranks that gave none."""
        pairs = zip(self.world.processes, self.world.stack_files, strict=True)
        ranks = {r: (p.pid, file) for r, (p, file) in enumerate(pairs) if r in waiting}
        found = read_stacks(ranks)
        return found, sorted(ranks.keys() - found.keys())

    def deadlock(self, waiting):
        """The text of a deadlock among the ranks that have not answered, None if there is none.

        Found when each rank is in a call that needs others, in the same place at two looks.
        """
        if not self.is_quiet():
            self.before = None
            return None
        stacks, silent = self.stacks(waiting)
        before, self.before = self.before, stacks
        step_dir = self.world.step_dir
        if (
            silent
            or before != stacks
            or not all(needs_others(f, step_dir) for f in stacks.values())
        ):
            return None
        finished = sorted(set(range(self.world.size)) - set(waiting))
        said, shown = stacks_in_words(stacks, silent, step_dir)
        return (
            f"deadlock: {some_ranks(stacks)} of {self.world.size} wait for each other, and none "
            f"has computed anything for {self.quiet:.0f} s\n{said}"
            f"{listed(causes_of_deadlock(stacks, finished, step_dir))}\n{shown}"
        )

    def standing(self, waiting):
        """Where the ranks are that took too long."""
        said, shown = stacks_in_words(*self.stacks(waiting), self.world.step_dir)
        return f"{said}\n{shown}"
