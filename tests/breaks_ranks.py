"""No mistakes: ranks that are late or slow, and ranks that die."""

import functools
import os
import shutil
import signal
import threading
import time


def before(owner, name, act):
    """Do something each time a function is called, before it runs."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def late_first_rank(train):
    """No mistake, but bad luck: the rank that reports errors is two seconds late."""
    if os.environ.get("RANK", "0") == "0":
        time.sleep(2)


def slow_steps(train):
    """No mistake, but time to send a signal in: each step takes a quarter of a second longer."""
    before(train, "train_step", lambda: time.sleep(0.25))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_save(train):
    """The rank, the save (from 1) and the place in it that DEATH names, as in "1 2 writing"."""
    import pathlib

    import checkpoint
    import resharding
    import run_directory

    rank, count, place = os.environ["DEATH"].split()
    if rank != os.environ.get("RANK", "0"):
        return
    saves = []

    def die_if_it_is_time():
        if len(saves) == int(count):
            die()

    owner, name = {
        "beginning": (checkpoint, "save"),
        "planning": (checkpoint, "write_tensors"),
        "writing": (resharding, "write_file"),
        "gathering": (resharding, "header_of"),
        "about": (run_directory, "write_about"),
        "renaming": (pathlib.Path, "rename"),
        "deleting": (shutil, "rmtree"),
    }[place]
    before(owner, name, die_if_it_is_time)
    before(checkpoint, "save", lambda: saves.append(1))


def die_in_a_step(train):
    """The rank, the step and the seconds after the step's begin that DEATH names: "1 5 0.02"."""
    rank, step, seconds = os.environ["DEATH"].split()
    if rank == os.environ.get("RANK", "0"):
        steps = iter(range(1, 1000))
        before(
            train,
            "train_step",
            lambda: (
                threading.Timer(float(seconds), die).start() if next(steps) == int(step) else None
            ),
        )
