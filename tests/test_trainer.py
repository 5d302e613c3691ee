"""The last step as a trainer: killed, stopped, moved to another layout, on two hosts."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import workers_setup
import workers_trainer
from launch import launch, ranks_of
from test_checkpoint import names_in

pytestmark = pytest.mark.steps(9)
BREAKS = Path(__file__).with_name("breaks.py")
SAME = ("step", "loss", "grad_norm", "learning_rate", "tokens")
SMALL = "--num_hidden_layers 4 --seq_len 16 --dataset_name random "
TRAIN = SMALL + "--gradient_accumulation_steps 2 --micro_batch_size 2 --max_tokens 1536 "
SHARED = "--dp_size 2 --dp_engine zero1 "  # 12 steps of 8 sequences


def curve(path):
    """What must not change of a metrics file, a row a step."""
    lines = map(json.loads, Path(path).read_text().splitlines())
    return [[line[key] for key in SAME] for line in lines]


def trained(worlds, step_dir, argv):
    """The curve of a run in a world."""
    ranks = worlds(step_dir, ranks_of(argv)).run(workers_trainer.train_and_save, argv)
    return ranks[0][0]


@pytest.fixture(scope="module")
def uninterrupted(step_dir, worlds):
    """The curve of a run that nothing happens to."""
    return trained(worlds, step_dir, TRAIN + SHARED)


def assert_whole(run):
    """Each checkpoint that can be seen has all its files, of the size they were written in."""
    for path in run.glob("step_*"):
        files = json.loads((path / "checkpoint.json").read_text())["about"]["files"]
        assert {name: (path / name).stat().st_size for name in files} == {
            name: about["bytes"] for name, about in files.items()
        }


def kill_and_go_on(step_dir, tmp_path, reference, how, death):
    run, metrics = tmp_path / "run", tmp_path / "metrics.jsonl"
    argv = TRAIN + SHARED + f"--checkpoint_dir {run} --save_every 2 --keep_last 2 "
    argv += f"--metrics_file {metrics} "
    result = launch(step_dir, argv, through=(BREAKS, how), DEATH=death)
    assert result.code != 0 and result.seconds < 60
    assert_whole(run)
    result = launch(step_dir, argv + "--resume auto")
    assert result.code == 0, result.errors
    assert curve(metrics) == reference
    assert names_in(run) == ["config.json", "step_00000010", "step_00000012"]
    assert not list(run.glob(".step_*"))


# A rank of two, a save of six, a place; only the first rank completes a save.
IN_A_SAVE = [
    "1 2 writing",
    *("0 1 beginning", "1 1 planning", "0 3 writing", "1 5 planning", "0 2 gathering"),
    *("0 2 about", "0 3 renaming", "0 4 deleting", "1 6 writing", "0 6 about", "0 5 planning"),
]
MOMENT = random.Random(0)
IN_A_STEP = [
    f"{rank} {step} {seconds:.3f}"
    for step, rank, seconds in zip(
        [7, 1, 3, 4, 6, 9, 10, 12], [1, 0, 1, 0] * 2,
        [MOMENT.uniform(0, 0.06) for _ in range(8)], strict=True,
    )
]  # fmt: skip


@pytest.mark.parametrize(
    "death", [IN_A_SAVE[0], *(pytest.param(case, marks=pytest.mark.slow) for case in IN_A_SAVE[1:])]
)
def test_killed_in_a_save(step_dir, tmp_path, uninterrupted, death):
    kill_and_go_on(step_dir, tmp_path, uninterrupted, "die_in_a_save", death)


@pytest.mark.slow
@pytest.mark.parametrize("death", IN_A_STEP)
def test_killed_in_a_step(step_dir, tmp_path, uninterrupted, death):
    kill_and_go_on(step_dir, tmp_path, uninterrupted, "die_in_a_step", death)


@contextlib.contextmanager
def job(step_dir, argv, ranks, *flags):
    """A running torchrun, with one thread a rank even where it starts only one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += [*flags, str(step_dir / "train.py"), *argv.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, **pipes) as running:
        try:
            yield running
        finally:
            running.kill()


@pytest.mark.slow
@pytest.mark.parametrize("per_host", [1, 4])
def test_two_hosts_train_like_one(step_dir, worlds, tmp_path, per_host):
    layout = {1: "--tp_size 2 ", 4: "--tp_size 2 --dp_size 2 --pp_size 2 "}[per_host]
    argv = TRAIN + layout
    one, two = trained(worlds, step_dir, argv), tmp_path / "two.jsonl"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    flags += ["--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"]
    argv += f"--metrics_file {two}"
    with job(step_dir, argv, per_host, *flags) as a, job(step_dir, argv, per_host, *flags) as b:
        for running in (a, b):
            said, _ = running.communicate(timeout=120)
            assert running.returncode == 0, said.decode()
    assert curve(two) == one
    assert len(one) >= 12


def test_one_run_on_three_layouts_then_exported_then_read_aloud(step_dir, worlds, tmp_path):
    """Saved on tp 2 x dp 2, resumed on pp 4, then on cp 2 x dp 2 with zero3; one loss curve."""
    out = tmp_path / "hf"
    argv = SMALL + "--dtype float64 --learning_rate 3e-3 --warmup_steps 2 --max_tokens 768 "
    whole = trained(worlds, step_dir, argv + "--micro_batch_size 8")
    argv += f"--checkpoint_dir {tmp_path / 'run'} --resume auto --save_every 2 "
    ours = []
    for steps, layout in (
        (2, "--tp_size 2 --dp_size 2 --micro_batch_size 4"),
        (4, "--pp_size 4 --micro_batch_size 2 --gradient_accumulation_steps 4"),
        (6, f"--cp_size 2 --dp_size 2 --dp_engine zero3 --micro_batch_size 4 --save_hf {out}"),
    ):
        ranks = worlds(step_dir, 4).run(workers_trainer.train_and_save, argv + layout, steps)
        ours += ranks[0][0]
        assert len(ours) == steps
    assert np.abs(np.array(ours) / whole - 1).max() < 1e-10
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (kind.from_pretrained(out) for kind in (AutoTokenizer, AutoModelForCausalLM))
    prompt = tokenizer("def(", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    flags = f"--load_hf {out} --prompt def( --max_new_tokens 12 --temperature 0 --dtype float64"
    said = launch(step_dir, flags, script="generate.py")
    assert said.code == 0, said.errors
    assert said.out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    assert len(said.out) > 10


def test_a_file_of_flags(step_dir, worlds, tmp_path):
    file = tmp_path / "config.json"
    values = {"tp_size": 1, "sequence_parallel": True, "learning_rate": 1e-3, "compile": None,
              "activation_checkpointing": False, "max_grad_norm": float("inf")}  # fmt: skip
    file.write_text(json.dumps(values))
    run = worlds(step_dir, 1).run
    ((flags, _),) = run(workers_trainer.parsed, f"--config {file} --seq_len 64")
    ((given, _),) = run(
        workers_trainer.parsed,
        "--sequence_parallel --learning_rate 1e-3 --max_grad_norm inf --seq_len 64",
    )
    assert flags == given and flags["seq_len"] == 64
    ((flags, _),) = run(workers_trainer.parsed, f"--learning_rate 5e-4 --config {file}")
    assert flags["learning_rate"] == 5e-4 and flags["sequence_parallel"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "Expecting"),
        ("[1]", "not an object"),
        ('{"tp": 2}', "--tp=2"),
        ('{"config": "other.json"}', "can't name another one"),
        ('{"seq_len": 1.5}', "'1.5' is not a whole number"),
        ('{"seq_len": 0}', "'0' is not a whole number of 1 or more"),
        ('{"dtype": "int8"}', "invalid choice: 'int8'"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_of_flags(step_dir, worlds, tmp_path, content, words):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, f"--config {file}", 1)
    assert said.startswith(f"--config {file}: ") and words in said and "\n" not in said


def test_what_a_run_leaves_starts_it_again(step_dir, worlds, tmp_path):
    run, metrics = tmp_path / "run", tmp_path / "metrics.jsonl"
    argv = SMALL + "--tie_word_embeddings yes --max_tokens 640 --eval_every 4 "
    argv += "--seed 0 --warmup_steps 0 --weight_decay 0 "  # a file keeps them, though 0 == False
    argv += f"--checkpoint_dir {run} --metrics_file {metrics} --save_every 9"
    result = launch(step_dir, argv)
    assert result.code == 0, result.errors
    (run / "step_notes.txt").touch()  # is taken for no checkpoint
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    held_out = {line["step"]: line["held_out"] for line in lines if "held_out" in line}
    assert list(held_out) == [4, 8]
    assert f"held-out loss {held_out[8]:.4f}" in result.out
    written = run / "config.json"
    assert written.read_text() == (tmp_path / "metrics.jsonl.config.json").read_text()
    argv = f"--config {written} --checkpoint_dir {tmp_path / 'again'} "
    argv += f"--metrics_file {tmp_path / 'again.jsonl'}"
    assert trained(worlds, step_dir, argv) == curve(metrics)
    assert trained(worlds, step_dir, f"--config {written} --resume auto") == []  # all is done


def test_a_file_of_flags_that_cannot_be_written_is_one_line(step_dir, tmp_path):
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    argv = SMALL + f"--max_tokens 64 --checkpoint_dir {tmp_path / 'run'}"
    (said,) = launch(step_dir, argv).errors[0].splitlines()
    assert said.startswith(f"error: --checkpoint_dir {tmp_path / 'run'}: its config.json is not")


def test_lines_of_steps_that_are_trained_again_are_dropped(step_dir, worlds, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)] + ['{"step": 2, "lo']
    for step, kept in ((2, lines[:2]), (3, lines[:3]), (7, lines[:3]), (0, [])):
        path.unlink(missing_ok=True)
        (found,) = worlds(step_dir, 1).run(
            workers_trainer.lines_kept, f"--metrics_file {path}", "".join(lines), step
        )
        assert found == "".join(kept)
