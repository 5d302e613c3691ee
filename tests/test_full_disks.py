"""No room: one line says where; what was whole stays, what was begun goes, training goes on."""

import json
import random

import pytest
import workers_runs
from full_disk import disk, fill
from launch import launch
from test_checkpoint import names_in
from test_run_directory import SHAPE, lives, steps

pytestmark = pytest.mark.steps(9)
CHECKPOINT = 320  # kilobytes, about, of SHAPE


@pytest.mark.parametrize("flags", ["", "--dp_size 2 --dp_engine zero2 --micro_batch_size 2"])
def test_checkpoints_on_a_full_disk(step_dir, worlds, tmp_path, subtests, flags):
    """Sizes are drawn: some hold no checkpoint, some one or two, some all that is kept."""
    draw = random.Random(flags)
    for trial in range(5):
        with (
            disk(tmp_path / f"{trial}", draw.randrange(100, 4 * CHECKPOINT)) as small,
            subtests.test(f"{trial}"),
        ):
            run = small / "run"
            argv = (
                SHAPE + steps(6) + flags + f" --checkpoint_dir {run} --save_every 2 --keep_last 1 "
            )
            found = lives(worlds, step_dir, argv)
            assert all(rank["steps"] == [1, 2, 3, 4, 5, 6] for rank in found)  # it went on
            assert not list(run.glob(".step_*")), "a part is left"
            failed = [note for note in found[0]["notes"] if "No space left on device" in note]
            said = {rank["said"] for rank in found}
            assert len(said) == 1
            (said,) = said
            if said is not None:  # the last one failed
                assert said.startswith(f"--checkpoint_dir {run}: No space left on device")
                assert "\n" not in said and "make room" in said and failed
            whole = names_in(run)
            assert whole == ["step_00000006"] or said is not None
            if whole:  # what is there goes on, where there is room
                last = int(whole[-1][-1])
                elsewhere = argv.replace(str(run), str(tmp_path / f"elsewhere{trial}"))
                found = lives(worlds, step_dir, elsewhere + f"--resume {run / whole[-1]}")
                assert all(rank["said"] is None for rank in found)
                assert found[0]["steps"] == list(range(last + 1, 7))


def test_a_disk_that_is_full_for_a_while(step_dir, worlds, tmp_path):
    with disk(tmp_path / "disk", 4 * CHECKPOINT) as small:
        filling = fill(small, leave=8192)
        argv = SHAPE + steps(6) + f" --checkpoint_dir {small / 'run'} --save_every 2"
        worlds(step_dir, 1).run(workers_runs.room_after, str(filling), 3)
        (found,) = lives(worlds, step_dir, argv, workers_runs.life, None, False, "make_room")
        assert found["said"] is None and found["steps"] == [1, 2, 3, 4, 5, 6]
        assert sum("step 2 is not saved" in note for note in found["notes"]) == 1
        assert names_in(small / "run") == ["step_00000004", "step_00000006"]


@pytest.mark.slow
def test_the_trained_model_is_still_exported(step_dir, tmp_path):
    """The last checkpoint finds no room, but another disk has some for --save_hf."""
    with disk(tmp_path / "disk", 100) as small:
        argv = SHAPE + steps(2) + f"--checkpoint_dir {small / 'run'} --save_hf {tmp_path / 'hf'}"
        result = launch(step_dir, argv)
        (said,) = result.errors[0].splitlines()
        assert result.code == 2 and said.startswith(f"error: --checkpoint_dir {small / 'run'}: No")
        assert (tmp_path / "hf" / "model.safetensors").exists() and len(result.metrics) == 2
        assert names_in(small / "run") == ["config.json"]


@pytest.mark.steps(1)
@pytest.mark.sampled(9, only=True)
def test_metrics_on_a_full_disk(step_dir, tmp_path):
    """Training goes on; what is there are whole lines, and the last bytes of room are used."""
    draw = random.Random(step_dir.name)
    with disk(tmp_path / "disk", 64) as small:
        filling = fill(small, leave=4096 * draw.randrange(2, 4))  # the flags take one of them
        path = small / "metrics.jsonl"
        argv = f"--num_hidden_layers 1 --seq_len 16 --max_tokens 2560 --metrics_file {path}"
        result = launch(step_dir, argv)
        filling.unlink()
        (said,) = result.errors[0].splitlines()
        assert result.code == 2 and said.startswith(f"error: --metrics_file {path}: No space left")
        assert "step    40 |" in result.out and result.out.count("training goes on") == 1
        lines = path.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, len(lines)))
        assert 1 < len(lines) < 40


@pytest.mark.steps(1)
@pytest.mark.sampled(9, only=True)
def test_flags_that_find_no_room_leave_the_old_ones(step_dir, tmp_path):
    """The same command may be given again once there is room."""
    with disk(tmp_path / "disk", 64) as small:
        path = small / "metrics.jsonl"
        argv = f"--num_hidden_layers 1 --seq_len 16 --max_tokens 128 --metrics_file {path}"
        assert launch(step_dir, argv).code == 0
        before = {file.name: file.read_bytes() for file in small.iterdir()}
        filling = fill(small, leave=0)
        (said,) = launch(step_dir, argv).errors[0].splitlines()
        assert said.startswith(f"error: --metrics_file {path}: No space left on device")
        filling.unlink()
        assert {name: (small / name).read_bytes() for name in before} == before
        assert launch(step_dir, argv).code == 0


@pytest.mark.slow
@pytest.mark.steps(1, 1)
def test_a_compiler_on_a_full_disk(step_dir, tmp_path):
    with disk(tmp_path / "disk", 64) as small:
        fill(small, leave=4096)
        result = launch(step_dir, "--num_hidden_layers 1 --compile", TMPDIR=str(small))
        (said,) = result.errors[0].splitlines()
        assert said.startswith("error: No space left on device (") and str(small) in said


@pytest.mark.slow
@pytest.mark.steps(7)
def test_a_timeline_on_a_full_disk(step_dir, tmp_path):
    with disk(tmp_path / "disk", 16) as small:
        path = small / "trace.json"
        argv = "--num_hidden_layers 2 --seq_len 16 --max_tokens 4096 --pp_size 2 "
        result = launch(step_dir, argv + f"--dataset_name random --timeline {path}")
        assert result.code != 0 and result.errors[1] == ""
        (said,) = result.errors[0].splitlines()
        assert said.startswith(f"error: --timeline {path}: No space left") and not path.exists()


def test_a_lock_on_a_full_disk(step_dir, worlds, tmp_path):
    with disk(tmp_path / "disk", 64) as small:
        fill(small)
        ((said, _, _),) = worlds(step_dir, 1).run(workers_runs.taken, small)
        assert said.startswith(f"{small / 'LOCK'}: No space left") and "\n" not in said
        assert names_in(small) == ["filling"]
