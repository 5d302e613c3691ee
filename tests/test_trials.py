"""A run's life at random: killed, stopped, out of room, in combination, and gone on with."""

import contextlib
import os
import random
import signal
import time

import pytest
import workers_runs
from full_disk import disk, fill
from test_checkpoint import names_in
from test_run_directory import SHAPE, steps
from test_stops import FLAGS, job, ranks_of, said_in
from test_trainer import BREAKS, curve, trained

pytestmark = [pytest.mark.steps(9), pytest.mark.slow]
LAYOUTS = [
    "--dp_size 2 --dp_engine zero1 --micro_batch_size 4 ",
    "--tp_size 2 --micro_batch_size 8 ",
    "--pp_size 2 --micro_batch_size 4 --gradient_accumulation_steps 2 ",
]
TRAIN = SHAPE.replace("--micro_batch_size 4 ", "") + steps(24)  # 12 of 8 sequences


@pytest.fixture(scope="module")
def uninterrupted(step_dir, worlds):
    return {layout: trained(worlds, step_dir, TRAIN + layout) for layout in LAYOUTS}


def happen(event, draw, running, run):
    """Do to a running job what befalls it, at a random moment of its steps or its saves."""
    deadline = time.monotonic() + 60
    moment = draw.choice(["a step", "a save"])
    while running.poll() is None and time.monotonic() < deadline:
        if moment == "a save" and any(run.glob(".step_*")) or moment == "a step" and run.exists():
            break
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.02 if moment == "a save" else 6))
    ranks = ranks_of(running)
    if running.poll() is not None or not ranks:
        return
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        if event == "kill a rank":
            os.kill(draw.choice(ranks), signal.SIGKILL)
        elif event == "kill all":
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
        elif event == "stop":
            number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
            who = draw.choice(["terminal", "launcher", "rank"])
            if who == "terminal":
                os.killpg(running.pid, number)
            else:
                os.kill(running.pid if who == "launcher" else draw.choice(ranks), number)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_nothing_is_lost(step_dir, worlds, uninterrupted, tmp_path, seed):
    draw = random.Random(seed)
    layout, metrics = draw.choice(LAYOUTS), tmp_path / "metrics.jsonl"
    with disk(tmp_path / "disk", 4096) as small:
        run = small / "run"
        argv = TRAIN + layout + f"--checkpoint_dir {run} --save_every 2 --keep_last 2 "
        argv += f"--metrics_file {metrics} --resume auto"
        for attempt in range(2):
            event = draw.choice(["kill a rank", "kill all", "stop", "stop"])
            room = draw.choice([None, draw.randrange(4096, 1 << 20)])
            filling = fill(small, room) if room else None
            logs = tmp_path / f"{attempt}"
            with job(step_dir, argv, 2, logs, *FLAGS, through=(BREAKS, "slow_steps")) as running:
                happen(event, draw, running, run)
                assert running.wait(timeout=100) is not None
            if filling:
                filling.unlink()
            lines = "".join(said_in(logs)).splitlines()
            assert len(lines) <= 1 and all(line.startswith("error: ") for line in lines), event
            (newest,) = worlds(step_dir, 1).run(workers_runs.newest_whole, str(run))
            assert newest is None or f"step_{newest:08d}" in names_in(run), event
        logs = tmp_path / "last"
        with job(step_dir, argv, 2, logs) as running:
            assert running.wait(timeout=100) == 0, said_in(logs)
        assert said_in(logs) == ["", ""]
        assert curve(metrics) == uninterrupted[layout]
        before = {"step_00000010", "step_00000011"} & {*names_in(run)}  # 11: asked to stop there
        assert len(before) == 1
        assert names_in(run) == ["config.json", *before, "step_00000012"]
        assert sorted(path.name for path in run.glob(".*")) == [".run_id"]
