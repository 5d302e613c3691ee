"""What surrounds a run: variables of the launcher, ports, compilers, homes, files of metrics."""

import json
import os
import random
import socket
from pathlib import Path

import pytest
import run_workers
from conftest import step_number
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
            (said,) = worlds(step_dir, 1).run(run_workers.refused_with, "", environment)
            assert "RANK is set, but not " in said and "torchrun" in said
            assert all(name in said for name in missing) and "\n" not in said


@pytest.mark.sampled
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
    (said,) = run(run_workers.refused_with, "--compile", {"CXX": "nonesuch"})
    assert said.startswith("--compile: no compiler nonesuch") and "CXX" in said
    (said,) = run(run_workers.refused_with, "--compile", {"PATH": "/nowhere"})
    assert said.startswith("--compile: no compiler ")
    (said,) = run(run_workers.refused_with, "--compile aot_eager", {"CXX": "nonesuch"})
    assert said is None  # it writes no C++


@pytest.mark.sampled(3, 9, only=True)
@pytest.mark.steps(3)
def test_a_user_without_a_home(step_dir, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 1000)
    argv = TINY + f"--dataset_name {tmp_path / 'a.txt'}"
    cache = tmp_path / "cache"
    result = launch(step_dir, argv, through=NOBODY, XDG_CACHE_HOME=str(cache))
    assert result.code == 0 and result.errors == [""] and cache.is_dir()
    result = launch(step_dir, argv, through=NOBODY, XDG_CACHE_HOME="")
    assert_one_line(result, ("XDG_CACHE_HOME",), 30)


@pytest.mark.sampled(1, only=True)
def test_a_user_without_a_home_needs_none_without_a_data_set(step_dir):
    result = launch(step_dir, tiny(step_dir), through=NOBODY, XDG_CACHE_HOME="")
    assert result.code == 0 and result.errors == [""]


# --- files of metrics -----------------------------------------------------------------------------


def metrics_written(worlds, step_dir, path, flags=""):
    (said,) = worlds(step_dir, 1).run(
        run_workers.metrics_written, f"{tiny(step_dir)} --metrics_file {path} {flags}"
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
    (tmp_path / "empty").touch()
    assert metrics_written(worlds, step_dir, tmp_path / "empty") is None
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


@pytest.mark.sampled
def test_a_device_is_no_file_to_keep(step_dir, worlds):
    assert metrics_written(worlds, step_dir, "/dev/null") is None
    assert not os.path.exists("/dev/null.config.json")
