"""One run writes into a directory: the lock, its holders, dead and alive, here and elsewhere."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import workers_runs
from test_checkpoint import names_in
from test_run_directory import SHAPE, lives, steps

pytestmark = pytest.mark.steps(9)


ASK = """
import os, random, sys, time
from pathlib import Path

step_dir, directory, count = sys.argv[1:]
sys.path.insert(0, step_dir)
import errors, lock

gone = lock.is_gone  # which takes its time here: others look and write meanwhile
lock.is_gone = lambda holder: time.sleep(random.uniform(0, 0.5)) or gone(holder)
mine = lock.Lock(directory)
Path(f"{directory}.{os.getpid()}.ready").touch()
while len(list(Path(directory).parent.glob("*.ready"))) < int(count):
    time.sleep(0.01)
try:
    mine.take()
except errors.UserError as error:
    sys.exit(str(error))
time.sleep(2)
try:
    mine.check()
except errors.UserError:
    sys.exit(2)  # another one has it, too
mine.release()
"""


def test_those_that_ask_at_once_are_told_apart(step_dir, worlds, tmp_path):
    """One of four gets the lock of a dead holder, and no other one takes it away."""
    directory = tmp_path / "run"
    directory.mkdir()
    worlds(step_dir, 1).run(workers_runs.leave_lock, directory, {"started": "1"})
    command = [sys.executable, "-c", ASK, step_dir, directory, "4"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    assert sorted(code for _, code in ended) == [0, 1, 1, 1], ended
    for said, code in ended:
        assert code == 0 or re.search(r"process \d+ on .* writes there", said), said
    assert not list(directory.iterdir())


def test_a_second_run_gets_one_line(step_dir, worlds, tmp_path):
    argv = SHAPE + steps(2) + f"--checkpoint_dir {tmp_path} "
    held = worlds(step_dir, 2).run(workers_runs.holder_of_this_process, tmp_path)
    (found,) = lives(worlds, step_dir, argv + "--resume auto", workers_runs.life, None, True)
    process = int(re.search(r"process (\d+) on \S+ writes there", found["said"])[1])
    assert process in [own["process"] for own in held]


def test_the_lock_of_a_dead_holder_is_taken_at_once(step_dir, worlds, tmp_path, subtests):
    run = worlds(step_dir, 1).run
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    began = Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[19]
    time.sleep(1)  # it has ended, and nobody asked how
    for case, changes in (
        ("ended", {"process": dead.pid}),
        ("ended, not waited for", {"process": zombie.pid, "started": began}),
        ("its number is another's", {"started": "1"}),
    ):
        with subtests.test(case):
            run(workers_runs.leave_lock, tmp_path, changes)
            ((said, notes, seconds),) = run(workers_runs.taken, tmp_path)
            assert said is None and not notes and seconds < 5
            assert not (tmp_path / "LOCK").exists()
    zombie.wait()


def test_the_lock_of_another_host(step_dir, worlds, tmp_path, subtests):
    run = worlds(step_dir, 1).run
    for case, changes in (
        ("another host", {"host": "elsewhere 1"}),
        ("another container", {"processes": "pid:[1]"}),
        ("cut off", b"{"),
        ("no text", b"\xff"),
        ("an empty host", b'{"host": ""}'),
    ):
        with subtests.test(case):
            run(workers_runs.leave_lock, tmp_path, changes)
            ((said, notes, seconds),) = run(workers_runs.taken, tmp_path, 0.5)
            assert said is None and len(notes) == 1 and "waiting" in notes[0] and seconds > 0.5
            run(workers_runs.leave_lock, tmp_path, changes)
            ((said, notes, seconds),) = run(workers_runs.taken, tmp_path, 20.0, 1.0)
            assert "writes there" in said and seconds < 10


def test_a_run_that_lost_its_lock_writes_no_more(step_dir, worlds, tmp_path):
    run = tmp_path / "run"
    for layout in ("", "--dp_size 2 --micro_batch_size 2"):
        shutil.rmtree(run, ignore_errors=True)
        argv = SHAPE + steps(6) + layout + f" --checkpoint_dir {run} --save_every 2"
        ranks = lives(worlds, step_dir, argv, workers_runs.life, None, True, "lock_is_taken")
        for found in ranks:
            assert found["steps"] == [1, 2, 3, 4] and "process 7 on elsewhere" in found["said"]
        assert names_in(run) == ["LOCK", "RESUME", "step_00000002"]  # all of it the other run's
        assert [path.name for path in run.glob(".step_*")] == [".step_00000009-0123abcd"]


def test_a_run_that_ended_meanwhile_is_noticed(step_dir, worlds, tmp_path):
    argv = SHAPE + f"--checkpoint_dir {tmp_path}"
    (said,) = worlds(step_dir, 1).run(workers_runs.begun_after, argv, "step_00000002")
    assert "another run has just written there" in said and names_in(tmp_path) == ["step_00000002"]


def test_the_holder_renews_its_lock(step_dir, worlds, tmp_path):
    ((first, second),) = worlds(step_dir, 1).run(workers_runs.renewed, tmp_path)
    assert second > first
