"""Reports for which a run must ask: where its time and memory go, and where a NaN begins."""

import contextlib
import functools
import importlib.util
import os
import re
import warnings
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from errors import UserError, check_folder, note

RANK = os.environ.get("RANK", "0")  # from step 2 on there are several processes
named = False  # whether this run records a trace, so that `span` gives names


def check_reports(args):
    """Raise UserError unless the reports that are asked for can be made.

    Sets `args.trace`, a Trace or None.
    """
    global named
    named, args.trace = args.profile is not None, None
    if args.use_tensorboard is not None:
        flag = f"--use_tensorboard {args.use_tensorboard}"
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(f"{flag}: the package is not there; pip install tensorboard")
        check_folder("--use_tensorboard", args.use_tensorboard)
    if args.profile is not None:
        steps = re.fullmatch("([0-9]+):([0-9]+)", args.profile)
        first, last = map(int, steps.groups()) if steps else (0, 0)
        if not 1 <= first <= last <= args.total_steps:
            rule = f"give the first and the last step, as in 2:3, from 1 to {args.total_steps}"
            raise UserError(f"--profile {args.profile}: {rule}")
        check_folder("--profile_dir", args.profile_dir)
        args.trace = Trace(first, last, args.profile_dir)
    if args.memory_snapshot is not None:
        if args.device != "cuda":
            what = f"--memory_snapshot {args.memory_snapshot} with --device {args.device}"
            raise UserError(f"{what}: only CUDA keeps such a history; leave the flag out")
        check_folder("--memory_snapshot", args.memory_snapshot)
    if args.detect_anomaly and args.compile:
        raise UserError(
            "--detect_anomaly with --compile: a compiled layer is one operation, so no line of it "
            "could be named; leave --compile out"
        )


def span(name):
    """A context that gives its name, in a trace, to what is done in it.

    Without --profile it does nothing. Nor does it in a compiled graph, which has no such names. It
    is the same in all steps of a run: `--compile` would compile again where it changed.
    """
    if named and not torch.compiler.is_compiling():
        return record_function(name)
    return contextlib.nullcontext()


class Trace:
    """What this rank does from one step to another, with times, as a file for Perfetto."""

    def __init__(self, first, last, folder):
        self.first, self.last = first, last
        self.path = Path(folder) / f"rank{RANK}.json"
        self.profiler = None  # while it runs
        self.written = False

    @contextlib.contextmanager
    def step(self, number):
        """Record what is done inside, if it is one of the steps; after the last write the file."""
        if not self.first <= number <= self.last:
            yield
            return
        if self.profiler is None:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # errors only
            self.profiler = profile(record_shapes=True, acc_events=True)
            self.profiler.start()
        with record_function(f"ProfilerStep#{number}"):  # tools know a step by this name
            yield
        if number == self.last:
            self.write()

    def write(self):
        """End the recording and write the file."""
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.path))
        self.profiler, self.written = None, True
        # No error comes from there where the disk is full.
        if not self.path.is_file() or not self.path.read_bytes().rstrip().endswith(b"}"):
            note(f"--profile_dir: no room for {self.path}; the trace is lost")

    def close(self):
        """At the end of a run, which may come early, or may have begun after the last step."""
        if self.profiler is not None:
            self.write()
        elif not self.written:
            note(f"--profile {self.first}:{self.last}: none of these steps was run; no trace")


def watched(train_step):
    """Record the steps that --profile names; with --detect_anomaly look for NaNs in each."""

    @functools.wraps(train_step)
    def wrapped(state):
        args, nothing = state.args, contextlib.nullcontext()
        trace = args.trace.step(state.step + 1) if args.trace else nothing
        search = NaNs(state).search() if args.detect_anomaly else nothing
        with trace, search:
            return train_step(state)

    return wrapped


def record_memory(args):
    """Keep the last allocations on CUDA from here on, and where each was made, if that is asked."""
    if args.memory_snapshot is not None:
        torch.cuda.init()
        # Private, as is what writes the file, but PyTorch's manual tells to call them: there is no
        # public way.
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=100_000)


def reported(main):
    """Write what main(args) has recorded, however it ends: a trace, a history of memory."""

    @functools.wraps(main)
    def wrapped(args):
        try:
            main(args)
        finally:
            if args.trace is not None:
                args.trace.close()
            if args.memory_snapshot is not None and torch.cuda.is_initialized():
                path = Path(args.memory_snapshot) / f"rank{RANK}.pickle"
                try:
                    torch.cuda.memory._dump_snapshot(str(path))
                except OSError as error:
                    note(f"--memory_snapshot: {path}: {error.strerror}; it is lost")

    return wrapped


class NaNs:
    """Looks for the first number of a step that is not finite, and says where it is made."""

    def __init__(self, state):
        self.flag = f"--detect_anomaly: step {state.step + 1}"
        self.part = "the loss"  # the last part whose backward pass has begun
        inner = state.model.model
        self.parts = {"model.embed_tokens": inner.embed_tokens}
        for layer in inner.layers:  # a stage of a pipeline has some; their weights know which
            name = next(layer.parameters()).global_name
            self.parts[".".join(name.split(".")[:3])] = layer
        self.parts |= {"model.norm": inner.norm, "lm_head": state.model.lm_head}

    @contextlib.contextmanager
    def search(self):
        """Raise UserError where a NaN appears in what is done inside."""
        handles = [
            part.register_forward_hook(functools.partial(self.after_forward, name))
            for name, part in self.parts.items()
            if not isinstance(part, torch.nn.Identity)  # what a stage lacks
        ]
        try:
            # torch warns of the place in the forward pass, and raises an error in the backward pass
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                with torch.autograd.set_detect_anomaly(True):
                    yield
        except RuntimeError as error:
            found = re.match("Function '(.*)' returned nan", str(error))
            if not found:
                raise
            text = "".join(str(warning.message) for warning in warned)
            raise UserError(
                f"{self.flag}: {found[1]} returns nan in the backward pass of {self.part}"
                f"{line_of(text)}"
            ) from None
        finally:
            for handle in handles:
                handle.remove()

    def after_forward(self, name, part, inputs, output):
        if not output.isfinite().all():
            raise UserError(f"{self.flag}: the output of {name} is not finite")
        output.register_hook(lambda grad: setattr(self, "part", name))


def line_of(text):
    """The last line of our own code in a traceback: where, and what stands there."""
    here = re.escape(str(Path(__file__).parent))
    found = re.findall(rf'File "{here}/(.*)", line (\d+), in .*\n +(.*)', text)
    return ", made in {} line {}: {}".format(*found[-1]) if found else ""
