"""What surrounds a run: variables of the launcher, ports, compilers, homes, files of metrics."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import workers_runs
from conftest import step_number
from harness import World
from launch import launch
from test_errors import assert_one_line

NOBODY = [Path(__file__).with_name("nobody.py")]
TINY = "--num_hidden_layers 1 --seq_len 16 --max_tokens 128 "


def tiny(step_dir):
    return TINY + ("--dataset_name random " if step_number(step_dir) > 2 else "")


@pytest.mark.sampled
@pytest.mark.steps(2)
def test_variables_of_a_launcher_that_are_there_in_part(step_dir, worlds, subtests):
    whole = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for missing in (["WORLD_SIZE"], ["MASTER_ADDR"], ["MASTER_PORT", "WORLD_SIZE"]):
        with subtests.test(missing[0]):
            environment = {name: None if name in missing else whole[name] for name in whole}
            (said,) = worlds(step_dir, 1).run(workers_runs.refused_with, "", environment)
            assert "RANK is set, but not " in said and "torchrun" in said
            assert all(name in said for name in missing) and "\n" not in said


@pytest.mark.sampled(2, only=True)
@pytest.mark.steps(2)
@pytest.mark.parametrize(
    "wrong", [{"RANK": "x"}, {"WORLD_SIZE": "two"}, {"RANK": "1"}, {"LOCAL_WORLD_SIZE": ""}]
)
def test_variables_of_a_launcher_that_are_no_numbers(step_dir, worlds, wrong):
    whole = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with World(step_dir, 1) as world:
        (said,) = world.run(workers_runs.refused_with, "", {**whole, **wrong})
    assert "no rank of a world" in said or "RANK is set, but not" in said


@pytest.mark.sampled(2, only=True)
@pytest.mark.steps(2)
def test_a_port_in_use(step_dir):
    with socket.create_server(("", 0)) as used:
        port = str(used.getsockname()[1])
        result = launch(
            step_dir, tiny(step_dir), RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost",
            MASTER_PORT=port,
        )  # fmt: skip
    assert_one_line(result, (f"MASTER_PORT {port}", "in use", "another port"), 30)


@pytest.mark.sampled
def test_no_compiler(step_dir, worlds):
    run = worlds(step_dir, 1).run
    (said,) = run(workers_runs.refused_with, "--compile", {"CXX": "nonesuch"})
    assert said.startswith("--compile: no compiler nonesuch") and "CXX" in said
    (said,) = run(workers_runs.refused_with, "--compile", {"PATH": "/nowhere"})
    assert said.startswith("--compile: no compiler ")
    (said,) = run(workers_runs.refused_with, "--compile aot_eager", {"CXX": "nonesuch"})
    assert said is None  # it writes no C++


@pytest.mark.sampled(1, only=True)
def test_a_user_without_a_home_needs_none_without_a_data_set(step_dir):
    result = launch(step_dir, tiny(step_dir), through=NOBODY, XDG_CACHE_HOME="")
    assert result.code == 0 and result.errors == [""]


@pytest.mark.sampled(1, only=True)
@pytest.mark.parametrize("name", ["x" * 300, "a\nb"])
def test_names_that_no_file_can_have_are_one_line(step_dir, name):
    command = [sys.executable, str(step_dir / "train.py"), "--model_name", f"/{name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.sampled(9, only=True)
def test_training_goes_on_where_nobody_reads_what_it_says(step_dir, tmp_path):
    argv = tiny(step_dir).replace("128", "1280") + f"--metrics_file {tmp_path / 'm.jsonl'}"
    command = [sys.executable, str(step_dir / "train.py"), *argv.split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr.startswith("note: standard output: No space left")
    assert (tmp_path / "m.jsonl").read_bytes().count(b"\n") == 20
    shell = " ".join(command) + " >&-"
    done = subprocess.run(shell, shell=True, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        said = running.stderr.read()
    assert running.returncode == 0 and said == b""
    assert (tmp_path / "m.jsonl").read_bytes().count(b"\n") == 20


# --- files of metrics -----------------------------------------------------------------------------


def metrics_written(worlds, step_dir, path, flags=""):
    (said,) = worlds(step_dir, 1).run(
        workers_runs.metrics_written, f"{tiny(step_dir)} --metrics_file {path} {flags}"
    )
    return said


@pytest.mark.sampled
def test_a_command_may_be_repeated_and_no_other_file_is_emptied(step_dir, worlds, tmp_path):
    path = tmp_path / "v1.0"
    assert metrics_written(worlds, step_dir, path) is None
    lines = path.read_bytes()
    assert len(lines.splitlines()) == 2
    assert metrics_written(worlds, step_dir, path) is None  # the same again
    assert path.read_bytes() == lines
    said = metrics_written(worlds, step_dir, path, "--learning_rate 0.1")
    assert said.startswith(f"--metrics_file {path}") and "other flags" in said
    assert metrics_written(worlds, step_dir, tmp_path / "v1.1", "--learning_rate 0.1") is None
    for name, rate in (("v1.0", 3e-4), ("v1.1", 0.1)):
        of = json.loads((tmp_path / f"{name}.config.json").read_text())
        assert of["learning_rate"] == rate and of["metrics_file"] == str(tmp_path / name)
    for rate in ("0.2", "0.3"):  # nothing is lost with an empty file, of whatever run
        (tmp_path / "empty").write_bytes(b"")
        said = metrics_written(worlds, step_dir, tmp_path / "empty", f"--learning_rate {rate}")
        assert said is None
    (tmp_path / "mine.config.json").write_text('{"mine": 1}')
    assert "name another file" in metrics_written(worlds, step_dir, tmp_path / "mine")
    assert (tmp_path / "mine.config.json").read_text() == '{"mine": 1}'
    draw, before = random.Random(0), {}
    for trial in range(10):
        content = draw.choice([
            b"notes", b"notes\n", b"\n", b"[]\n", b'{"a": 1}\n', lines + b"notes\n", b"\xff\xfe",
            b'{"step": 1}\n', lines, bytes(draw.randrange(256) for _ in range(99)),
        ])  # fmt: skip
        before[tmp_path / f"{trial}.txt"] = content
        (tmp_path / f"{trial}.txt").write_bytes(content)
        said = metrics_written(worlds, step_dir, tmp_path / f"{trial}.txt")
        assert said.startswith("--metrics_file ") and "name another file" in said
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.steps(9)
def test_a_run_that_goes_on_keeps_only_lines_of_its_own(step_dir, worlds, tmp_path):
    flags = tiny(step_dir).replace("--max_tokens 128 ", "")
    for name, rate in (("a", 3e-4), ("b", 0.1)):
        argv = flags + f"--max_tokens 128 --learning_rate {rate} --checkpoint_dir {tmp_path / name}"
        (found,) = worlds(step_dir, 1).run(workers_runs.life, argv)
        assert found["said"] is None
    path = tmp_path / "m"
    assert metrics_written(worlds, step_dir, path, "--learning_rate 0.1 --seed 7") is None
    said = metrics_written(worlds, step_dir, path, f"--max_tokens 192 --resume {tmp_path / 'a'}")
    assert "other flags" in said and len(path.read_bytes().splitlines()) == 2


@pytest.mark.sampled(1, only=True)
@pytest.mark.steps(1, 8, only=True)
def test_lines_of_which_only_a_part_was_written(step_dir, worlds, tmp_path):
    (found,) = worlds(step_dir, 1).run(workers_runs.written_in_parts, str(tmp_path / "m"))
    assert found == b"".join(b'{"step": %d}\n' % step for step in range(1, 6))


@pytest.mark.sampled
def test_a_device_is_no_file_to_keep(step_dir, worlds):
    assert metrics_written(worlds, step_dir, "/dev/null") is None
    assert not os.path.exists("/dev/null.config.json")
