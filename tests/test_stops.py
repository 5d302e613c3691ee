"""Signals: where there is a place to save to, a run saves and says so; elsewhere it is one line."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import step_number
from launch import launch, on_two
from test_trainer import BREAKS, SHARED, TRAIN, curve, trained

ENDLESS = "--num_hidden_layers 2 --seq_len 16 --max_tokens 100000000 "
FLAGS = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "60")


@contextlib.contextmanager
def job(step_dir, argv, ranks, logs, *flags, through=()):
    """A running torchrun, in a process group of its own as a terminal makes one.

    Each rank's standard error goes to a file below logs.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += [str(ranks), "--log-dir", str(logs), "--redirects", "3", *flags]
    command += [*map(str, through), str(step_dir / "train.py"), *argv.split()]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as running:
        try:
            yield running
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def ranks_of(running):
    """The processes that a launcher started, without loaders of data."""
    found = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def said_in(logs, name="stderr.log"):
    """What each rank wrote, by its number."""
    found = {path.parent.name: path.read_text() for path in logs.glob(f"*/*/*/{name}")}
    return [found[rank] for rank in sorted(found)]


def wait_for(metrics, running, lines=1):
    while not (metrics.exists() and metrics.read_text().count("\n") >= lines):
        assert running.poll() is None
        time.sleep(0.02)


@pytest.mark.sampled(1, only=True)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_without_a_place_to_save_to_a_signal_is_one_line(step_dir, tmp_path, number):
    """At moments drawn from the whole of a run, its imports included."""
    metrics = tmp_path / "metrics.jsonl"
    draw = random.Random(f"{step_dir.name} {number}")
    for moment in (draw.uniform(0.4, 2.5), "training"):
        command = [sys.executable, str(step_dir / "train.py"), *ENDLESS.split()]
        command += ["--metrics_file", str(metrics)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as running:
            if moment == "training":
                wait_for(metrics, running)
                time.sleep(draw.uniform(0, 0.3))
            else:
                time.sleep(moment)
            running.send_signal(number)
            said = running.communicate(timeout=20)[1]
        assert said == f"error: stopped by {number.name}\n", moment
        assert running.returncode == 128 + number
        assert not metrics.exists() or metrics.read_text().endswith("\n") or moment != "training"
        metrics.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.steps(2)
def test_ctrl_c_on_several_ranks_is_one_line(step_dir, tmp_path):
    """A terminal sends it to the launcher and to all ranks."""
    metrics, draw = tmp_path / "metrics.jsonl", random.Random(step_dir.name)
    for trial in range(2):
        argv = ENDLESS + f"--metrics_file {metrics}" + on_two(step_dir)
        logs = tmp_path / f"{trial}"
        with job(step_dir, argv, 2, logs) as running:
            wait_for(metrics, running)
            time.sleep(draw.uniform(0, 0.2))
            os.killpg(running.pid, signal.SIGINT)
            assert running.wait(timeout=60) != 0
        assert said_in(logs) == ["error: stopped by SIGINT\n", ""]
        metrics.unlink()


CASES = {
    "Ctrl-C": (signal.SIGINT, "the terminal", FLAGS),
    "Ctrl-C, torchrun as it is": (signal.SIGINT, "the terminal", ()),
    "SIGUSR1 to a rank": (signal.SIGUSR1, "a rank", ()),
    "SIGUSR1 to the launcher": (signal.SIGUSR1, "the launcher", FLAGS),
    "SIGTERM to the launcher": (signal.SIGTERM, "the launcher", ()),
    "SIGTERM to a rank": (signal.SIGTERM, "a rank", ()),
}
DEFAULT = ["SIGUSR1 to a rank"]


@pytest.fixture(scope="module")
def uninterrupted(step_dir, worlds):
    return trained(worlds, step_dir, TRAIN + SHARED)


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "case",
    [case if case in DEFAULT else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_signal_saves_and_says_so(step_dir, tmp_path, uninterrupted, case):
    number, to, flags = CASES[case]
    run, metrics, logs = tmp_path / "run", tmp_path / "metrics.jsonl", tmp_path / "logs"
    argv = TRAIN + SHARED + f"--checkpoint_dir {run} --metrics_file {metrics} --num_workers 2 "
    # Steps so slow that the signal comes before the end.
    with job(step_dir, argv, 2, logs, *flags, through=(BREAKS, "slow_steps")) as running:
        wait_for(metrics, running, 2)
        if to == "the terminal":
            os.killpg(running.pid, number)
        else:
            os.kill(running.pid if to == "the launcher" else ranks_of(running)[-1], number)
        code = running.wait(timeout=60)
    assert (code == 0) == (to == "a rank")  # torchrun's own code is its business
    assert said_in(logs) == ["", ""]
    out = said_in(logs, "stdout.log")[0]
    assert re.search(rf"stopped by {number.name} after step \d+: go on with --resume auto", out)
    stopped = (run / "RESUME").read_text().strip()
    assert (run / stopped).is_dir() and not (run / "LOCK").exists()
    assert 2 <= len(curve(metrics)) < 12
    result = launch(step_dir, argv + "--resume auto")
    assert result.code == 0, result.errors
    assert curve(metrics) == uninterrupted
    assert not (run / "RESUME").exists()


@pytest.mark.steps(9)
def test_two_runs_in_one_directory_do_not_mix(step_dir, tmp_path):
    """They start together: one trains to its end, the other one is told who is there."""
    run = tmp_path / "run"
    argv = TRAIN + f"--checkpoint_dir {run} --save_every 1 --resume auto --seed "
    command = [sys.executable, str(step_dir / "train.py")]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([*command, *f"{argv}{seed}".split()], **pipes) for seed in (1, 2)]
    ended = [(one.communicate(timeout=120)[1], one.returncode) for one in runs]
    assert sorted(code for _, code in ended) == [0, 2], ended
    (said,) = [said for said, code in ended if code]
    assert said.count("\n") == 1 and "writes there" in said or "saved with --seed" in said
    assert step_number(step_dir) >= 9 and len(list(run.glob("step_*"))) == 3
