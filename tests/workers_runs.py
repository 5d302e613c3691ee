"""Functions that the tests of a run's life, its directory and its lock, run inside a `World`."""

import contextlib
import os
import pickle
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from harness import pieces


@contextlib.contextmanager
def notes_of(*modules):
    """The notes that some modules make meanwhile, a list."""
    found = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "note", found.append))
        yield found


def life(argv, until=None, hold=False, meanwhile=None):
    """Train as main does, up to a step or the end, saving as the flags say.

    Returns a dict: said, the UserError's text that ended it, None if none did; notes; steps that
    were trained; curve, (loss, gradient norm) of each; weights, in pieces. hold: with the lock.
    meanwhile: a function of this module, called with the state after each step.
    """
    import checkpoint
    import errors
    import lock
    import restart
    import run_directory
    import train

    result = {"said": None, "steps": [], "curve": [], "weights": None}
    directory = None
    run_directory.say_once.cache_clear()
    with notes_of(checkpoint, restart, run_directory, lock) as notes:
        with patch.object(run_directory, "say_once", notes.append):
            try:
                args = train.parse_args(argv.split())
                if hold and errors.RANK == 0:
                    args.lock = directory = lock.Lock(args.checkpoint_dir)
                    directory.take()
                state = train.setup(args)
                while state.step < (until or args.total_steps) and not state.stop:
                    metrics = train.train_step(state)
                    result["steps"].append(state.step)
                    result["curve"].append((metrics["loss"], metrics["grad_norm"]))
                    if meanwhile is not None:
                        globals()[meanwhile](state)
                    checkpoint.save_if_due(state)
                if state.not_saved:
                    raise state.not_saved
                result["weights"] = pieces(state.parameters, lambda p: p)
            except errors.UserError as error:
                result["said"] = str(error)
            finally:
                if directory is not None:
                    directory.release()
    return result | {"notes": notes}


def life_in(folder, argv):
    """`life` in a working directory."""
    import huggingface

    before = os.getcwd()
    os.chdir(folder)
    try:
        with notes_of(huggingface) as notes:
            result = life(argv)
        return result | {"notes": result["notes"] + notes}
    finally:
        os.chdir(before)


def lock_is_taken(state):
    """Another run has taken the lock, as after a minute in which this one stood still.

    And it is writing, in a directory of its own.
    """
    if state.step == 3 and state.args.lock is not None:
        path = state.args.lock.path
        path.write_text('{"host": "elsewhere", "process": 7}')
        path.with_name(".step_00000009-0123abcd").mkdir()
        path.with_name("RESUME").write_text("step_00000002\n")


def signals_itself(state):
    """Ask for a stop after the second step."""
    if state.step == 2:
        os.kill(os.getpid(), signal.SIGUSR1)


def forbidding(argv):
    """`life`, while nothing may be unpickled from a file."""

    def refuse(*_, **__):
        raise AssertionError("a file was unpickled")

    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
            stack.enter_context(patch.object(owner, name, refuse))
        return life(argv)


def undeletable(argv, name):
    """`life`, on a file system that does not let a checkpoint's files go."""
    rmtree = shutil.rmtree

    def refuse(path, *args, **kwargs):
        if name in Path(path).name:
            raise OSError(16, "Device or resource busy", str(path))
        return rmtree(path, *args, **kwargs)

    with patch.object(shutil, "rmtree", refuse):
        return life(argv)


def lacking(path, *keys):
    """Take flags out of what a checkpoint says, as if a program before them had written it."""
    import json

    import run_directory

    about = json.loads((Path(path) / "checkpoint.json").read_text())["about"]
    for key in keys:
        del about["flags"][key]
    run_directory.write_about(Path(path), about)


def taken(directory, silent=None, renewed_after=None, hold=0.0):
    """Take a lock as a run does: (what is said or None, notes, seconds).

    silent: seconds of silence to take for death. renewed_after: seconds after which the holder that
    is there gives a sign of life. hold: seconds to keep the lock.
    """
    import threading

    import errors
    import lock

    begun = time.monotonic()
    if renewed_after is not None:
        threading.Timer(renewed_after, os.utime, [Path(directory) / "LOCK"]).start()
    said, mine = None, lock.Lock(directory)
    with notes_of(lock) as notes, patch.object(lock, "SILENT", silent or lock.SILENT):
        try:
            mine.take()
            time.sleep(hold)
        except errors.UserError as error:
            said = str(error)
        seconds = time.monotonic() - begun
        mine.release()
    return said, notes, seconds


def holder_of_this_process(directory):
    """Leave a lock behind that names this process; what it says."""
    return leave_lock(directory, {})


def leave_lock(directory, changes):
    """Leave a lock that names this process but for some changes, or one that is given as bytes."""
    import json

    import lock

    mine = lock.Lock(directory)
    whole = json.dumps({**mine.own, **({} if isinstance(changes, bytes) else changes)}).encode()
    mine.path.write_bytes(changes if isinstance(changes, bytes) else whole)
    return mine.own


def renewed(directory):
    """Whether a lock's time moves while it is held: what is said, and both times."""
    import lock

    with patch.object(lock, "RENEWED", 0.2):
        mine = lock.Lock(directory)
        mine.take()
        first = lock.read(mine.path)[1]
        time.sleep(1)
        second = lock.read(mine.path)[1]
        mine.check()
        mine.release()
    return first, second


def begun_after(argv, name):
    """What a run is told that looked into its directory before another one ended there."""
    import errors
    import lock
    import train

    args = train.parse_args(argv.split())
    (Path(args.checkpoint_dir) / name).mkdir()
    try:
        lock.alone(lambda args: None)(args)
    except errors.UserError as error:
        return str(error)


def ruined(argv):
    """`life`, with the third update making one weight infinite on the last rank only."""
    import train

    train_step = train.train_step

    def spoiling(state):
        metrics = train_step(state)
        if state.step == 3 and state.mesh.rank == state.mesh.world.size - 1:
            with torch.no_grad():
                state.parameters[-1].view(-1)[-1] = torch.inf
        return metrics

    with patch.object(train, "train_step", spoiling):
        return life(argv)


def part_read(directory, key):
    """A stored tensor of a checkpoint, as numbers."""
    from safetensors import safe_open

    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, "np") as file:
            if key in file.keys():
                return np.array(file.get_tensor(key))
    raise KeyError(key)


@contextlib.contextmanager
def environment(variables):
    """Variables of the environment meanwhile; None takes one out."""
    with patch.dict("os.environ", {k: v for k, v in variables.items() if v is not None}):
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
        yield


def refused_with(argv, variables):
    """What parse_args says of a call in another environment; None if it takes it."""
    import errors
    import train

    with environment(variables):
        try:
            train.parse_args(argv.split())
        except errors.UserError as error:
            return str(error)


def metrics_written(argv):
    """Write two lines of metrics as a run of these flags does; what is said if that can't be."""
    import inspect

    import errors
    import metrics
    import train

    line = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1.0, "memory_gb": 1.0}
    try:
        args = train.parse_args(argv.split())
        count = len(inspect.signature(metrics.Metrics).parameters)
        reports = metrics.Metrics(*[args, torch.device("cpu"), 1.0, 1][:count])
        reports.open(*[0][: len(inspect.signature(reports.open).parameters)])
        with patch("time.perf_counter", iter(range(1, 99)).__next__):
            reports.clock = 0
            for step in (1, 2):
                reports.log({"step": step, "tokens": step, **line})
        reports.close()
    except errors.UserError as error:
        return str(error)


def room_after(path, step):
    """For `make_room`: which file to delete, after which step."""
    global ROOM
    ROOM = path, step


def make_room(state):
    """Delete what fills a disk."""
    path, step = ROOM
    if state.step == step:
        os.unlink(path)


def newest_whole(directory):
    """The step of the newest sound checkpoint, all of whose numbers were read; None without one."""
    import errors
    import resharding
    import run_directory

    try:
        path, about = run_directory.newest_sound("--resume", run_directory.checkpoints(directory))
    except errors.UserError as error:
        raise AssertionError("no checkpoint is whole") from error
    if path is None:
        return None
    tensors = resharding.Tensors()
    for name, file in about["files"].items():
        with resharding.safe_open(path / name, "pt") as stored:
            for key in file["parts"]:
                name, place = resharding.place_of(key)
                tensors.setdefault(name, {})[place] = torch.empty_like(stored.get_tensor(key))
    resharding.read_tensors(tensors, path, about["files"])
    assert resharding.all_finite(tensors)
    return about["step"]


def written_in_parts(path):
    """What a file of metrics holds whose disk takes a few bytes at a time, and at times none."""
    import metrics_file

    class Disk:
        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls % 3 == 2:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:7])

        def close(self):
            self.file.close()

    found = metrics_file.MetricsFile(path, {})
    found.file = Disk(found.file)
    for step in range(1, 6):
        found.write({"step": step})
    found.file = found.file.file  # there is room again
    found.file.write(found.waiting)
    found.waiting = b""
    found.close()
    return Path(path).read_bytes()
