"""Steps as a reader launches them: the same numbers twice, what they write, what they learn."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from conftest import step_number
from launch import launch, on_two

SHORT = "--num_hidden_layers 2 --seq_len 64 --max_tokens 2560 "
FIELDS = {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second",
          "tokens_per_second_per_device", "mfu", "memory_gb"}  # fmt: skip
SAME = ("step", "loss", "grad_norm", "learning_rate", "tokens")


@pytest.mark.sampled(9, only=True)
@pytest.mark.parametrize(
    "flags",
    ["", pytest.param("--dtype bfloat16 --activation_checkpointing", marks=pytest.mark.slow)],
)
def test_a_copy_elsewhere_gives_the_same_bits_and_reports_all(step_dir, tmp_path, flags):
    """N6, with as many threads as there are cores; a step stands alone, as a world of one."""
    copy = shutil.copytree(step_dir, tmp_path / step_dir.name)
    metrics = tmp_path / "metrics.jsonl"
    result = launch(copy, SHORT + flags + f" --metrics_file {metrics}")
    assert result.code == 0, result.errors
    assert result.errors == [""]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line in lines:
        assert set(line) == FIELDS
        assert line["tokens"] == line["step"] * 256
        assert line["mfu"] is None
        assert 0.1 < line["memory_gb"] < 4
        assert line["tokens_per_second"] > 0
    assert f"step    10 | loss {lines[-1]['loss']:7.4f}" in result.out
    again = launch(step_dir, SHORT + flags).metrics
    assert [[m[key] for key in SAME] for m in again] == [[m[key] for key in SAME] for m in lines]


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(2)
def test_one_rank_speaks_and_the_ledger_agrees_with_the_formula(step_dir):
    result = launch(step_dir, SHORT + "--comm_ledger" + on_two(step_dir), ranks=2)
    assert result.code == 0, result.errors
    assert result.errors == ["", ""]
    assert result.metrics[-1]["tokens"] == 2560
    assert result.metrics[-1]["tokens_per_second_per_device"] == pytest.approx(
        result.metrics[-1]["tokens_per_second"] / 2
    )
    lines = result.out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("axis "))
    end = next(i for i, line in enumerate(lines) if line.startswith("step "))
    rows = [line.split() for line in lines[begin + 1 : end]]
    assert ["world", "all_reduce", "1"] in [row[:3] for row in rows]
    for _, _, calls, size, calls_due, size_due in rows:
        assert (calls, size) == (calls_due, size_due)


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(2)
def test_a_killed_rank_ends_the_job(step_dir, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    command += ["2", str(step_dir / "train.py"), "--num_hidden_layers", "2", "--seq_len", "16"]
    command += ["--max_tokens", "100000000", *on_two(step_dir).split()]
    metrics = tmp_path / "metrics.jsonl"
    with subprocess.Popen(
        [*command, "--metrics_file", str(metrics)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as job:
        while not (metrics.exists() and metrics.read_text()):
            assert job.poll() is None
            time.sleep(0.2)
        found = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        assert job.wait(timeout=60) != 0


@pytest.mark.slow
@pytest.mark.steps(1, 1)
def test_weights_and_biases_offline(step_dir, tmp_path):
    flags = SHORT + "--use_wandb --run_name my-run"
    result = launch(step_dir, flags, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert result.code == 0, result.errors
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = log.read_bytes()
    for word in ("my-run", "four-d-from-scratch", "grad_norm", "micro_batch_size"):
        assert word.encode() in written


@pytest.mark.sampled(1, only=True)
def test_the_loss_falls(step_dir):
    """The short version of the two tests below."""
    flags = "--num_hidden_layers 2 --max_tokens 30720 --learning_rate 3e-3"
    losses = [m["loss"] for m in launch(step_dir, flags).metrics]
    assert losses[0] > 5.4
    assert losses[-1] < 3.2


@pytest.mark.slow
@pytest.mark.steps(1, 1)
def test_step_one_learns_its_own_model_by_heart_within_a_minute(step_dir):
    if step_number(step_dir) > 2:
        pytest.skip("this step reads another data set")
    result = launch(step_dir, "")
    assert result.metrics[-1]["loss"] < 0.05
    assert result.seconds < 60


@pytest.mark.slow
@pytest.mark.steps(3, 3)
def test_the_default_run_learns_real_text(step_dir):
    launch(step_dir, "--max_tokens 1")  # tokenises
    result = launch(step_dir, "")
    assert result.seconds < 120
    losses = [m["loss"] for m in result.metrics]
    hundreds = [sum(losses[i : i + 100]) / 100 for i in range(0, len(losses) - 99, 100)]
    assert hundreds[-1] < 2.5
    assert all(later < earlier for earlier, later in pairwise(hundreds)), hundreds
    held_out = float(result.out.split("held-out loss ")[1].split()[0])
    assert held_out < 2.5


@pytest.mark.slow
@pytest.mark.steps(3, 3)
def test_the_first_step_comes_soon(step_dir, tmp_path):
    cold = {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    for limit in (60, 15):  # seconds, without and with the tokens in the cache
        metrics = tmp_path / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        begun = time.monotonic()
        with subprocess.Popen(
            [sys.executable, str(step_dir / "train.py"), "--metrics_file", str(metrics)],
            stdout=subprocess.DEVNULL,
            env={**os.environ, **cold},
        ) as job:
            while not (metrics.exists() and metrics.read_text()):
                assert job.poll() is None
                time.sleep(0.1)
            seconds = time.monotonic() - begun
            job.kill()
        print(f"first step after {seconds:.1f} s")
        assert seconds < limit
