"""A directory of checkpoints: whose it is, what may be deleted, what is damaged, who writes."""

import hashlib
import json
import random
import re
import shutil

import pytest
import workers_runs
from harness import assemble, assert_close
from launch import ranks_of
from test_checkpoint import names_in

pytestmark = pytest.mark.steps(9)
SHAPE = (
    "--num_hidden_layers 2 --hidden_size 32 --num_attention_heads 4 --num_key_value_heads 2 "
    "--intermediate_size 48 --seq_len 16 --dataset_name random --learning_rate 3e-3 "
    "--warmup_steps 2 --micro_batch_size 4 "
)


def steps(count):
    return f"--max_tokens {count * 64} "


def lives(worlds, step_dir, argv, function=workers_runs.life, *args):
    """What each rank's life came to, in a world of the size that the flags want."""
    return worlds(step_dir, ranks_of(argv)).run(function, argv, *args)


@pytest.fixture(scope="module")
def saved(step_dir, worlds, tmp_path_factory):
    """saved(flags): the directory of a run of six steps with checkpoints of 2, 4 and 6."""
    made = {}

    def get(flags=""):
        if flags not in made:
            run = tmp_path_factory.mktemp("saved") / "run"
            argv = SHAPE + steps(6) + flags + f" --checkpoint_dir {run} --save_every 2"
            made[flags] = run, lives(worlds, step_dir, argv)
            assert made[flags][1][0]["said"] is None
        return made[flags]

    return get


def copied(saved, tmp_path, flags="", name="run"):
    """A copy of such a run, its flags to go on to step 6, and what the ranks of the first did."""
    run, first = saved(flags)
    shutil.copytree(run, tmp_path / name, symlinks=True)
    argv = SHAPE + steps(6) + flags + f" --checkpoint_dir {tmp_path / name} --save_every 2 "
    return tmp_path / name, argv, first


def digest(path):
    """What must not change of a file, a link, or a directory with all that is in it."""
    found = hashlib.sha256(str(path.readlink() if path.is_symlink() else "").encode())
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found.update(f"{file} {file.read_bytes() if file.is_file() else ''}".encode())
    return found.hexdigest()


# --- only what the run wrote is its own -----------------------------------------------------------


def foreign_names(draw):
    """Names that look like a checkpoint's and are not."""
    number = draw.randrange(1, 99)
    after = draw.choice(["_good", "_old", ".bak", "-copy", " (1)", "~", "0", "x", ".tmp"])
    before = draw.choice(["old_", "best_", "x", "my.", "Step"])
    return {
        f"step_{number:08d}{after}",
        f"{before}step_{number:08d}",
        f"step_{number:0{draw.choice([1, 3, 7, 9, 12])}d}",
        f".step_{number:08d}",
        f".step_{number:08d}-{draw.choice(['0123abc', '0123abcg', '0123abcde', 'ABCD0123'])}",
    }


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))]
)
def test_what_others_put_there_stays(step_dir, worlds, saved, tmp_path, seed):
    run, argv, _ = copied(saved, tmp_path)
    draw, others = random.Random(seed), []
    for name in sorted(foreign_names(draw) | foreign_names(draw)):
        kind = draw.choice(["copy", "empty", "file", "link"])
        if kind == "copy":
            shutil.copytree(run / "step_00000002", run / name)
        elif kind == "empty":
            (run / name).mkdir()
        elif kind == "file":
            (run / name).write_text("notes")
        else:
            (run / name).symlink_to(run / "step_00000002")
        others.append(run / name)
    shutil.copytree(run / "step_00000004", run / "step_00000077")  # the name of another step
    others.append(run / "step_00000077")
    before = {path: digest(path) for path in others if not path.is_symlink()}
    argv = argv.replace(steps(6), steps(9)) + "--save_every 1 --keep_last 1 --resume auto"
    (found,) = lives(worlds, step_dir, argv)
    assert found["said"] is None and found["steps"] == [7, 8, 9]
    assert {path: digest(path) for path in before} == before
    assert all(path.is_symlink() or path.exists() for path in others)
    mine = {path.name for path in run.glob("step_????????")} - {"step_00000077"}
    assert mine - {path.name for path in others} == {"step_00000009"}


def test_a_checkpoint_of_another_run_is_not_deleted(step_dir, worlds, saved, tmp_path):
    run, argv, _ = copied(saved, tmp_path)
    (run / ".run_id").unlink()  # as in a directory into which the three were copied
    argv = argv.replace(steps(6), steps(8)) + "--save_every 1 --keep_last 1 --resume auto"
    (found,) = lives(worlds, step_dir, argv)
    assert found["said"] is None and found["steps"] == [7, 8]
    assert names_in(run) == [f"step_0000000{step}" for step in (2, 4, 6, 8)]


def test_a_run_from_elsewhere_does_not_go_into_a_directory_in_use(
    step_dir, worlds, saved, tmp_path
):
    run, argv, _ = copied(saved, tmp_path)
    shutil.copytree(run, tmp_path / "other")
    argv = argv.replace(steps(6), steps(8)) + f"--keep_last 1 --resume {tmp_path / 'other'}"
    (found,) = lives(worlds, step_dir, argv)
    assert "a run is there already, up to step_00000006" in found["said"]
    (found,) = lives(worlds, step_dir, argv.replace(f"{tmp_path / 'other'}", f"{run}"))
    assert found["said"] is None and found["steps"] == [7, 8]  # its own newest


def test_files_of_others_are_not_written_over(step_dir, worlds, tmp_path):
    argv = SHAPE + steps(2) + f"--checkpoint_dir {tmp_path}"
    (tmp_path / "RESUME").write_text("my resume")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (found,) = lives(worlds, step_dir, argv)
    assert "its config.json is not of a run" in found["said"]
    (tmp_path / "config.json").unlink()
    (found,) = lives(worlds, step_dir, argv)
    assert found["said"] is None and (tmp_path / "RESUME").read_text() == "my resume"


@pytest.mark.parametrize("content", [b"", b"\xff", b"0123"])
def test_a_run_id_that_is_not_whole_is_made_anew(step_dir, worlds, tmp_path, content):
    argv = SHAPE + steps(2) + f"--checkpoint_dir {tmp_path}"
    (tmp_path / ".run_id").write_bytes(content)
    (found,) = lives(worlds, step_dir, argv)
    assert found["said"] is None
    assert re.fullmatch(r"[0-9a-f]{16}\n", (tmp_path / ".run_id").read_text())


def test_a_link_is_followed_and_when_old_unlinked(step_dir, worlds, saved, tmp_path):
    run, argv, _ = copied(saved, tmp_path)
    archive = tmp_path / "archive"
    archive.mkdir()
    for step in (2, 4, 6):
        (run / f"step_0000000{step}").rename(archive / f"{step}")
        (run / f"step_0000000{step}").symlink_to(archive / f"{step}")
    before = digest(archive)
    argv = argv.replace(steps(6), steps(8)) + "--save_every 1 --keep_last 1 --resume auto"
    (found,) = lives(worlds, step_dir, argv)
    assert found["said"] is None and found["steps"] == [7, 8]
    assert names_in(run) == ["step_00000008"] and digest(archive) == before


def test_what_cannot_be_deleted_stays_and_training_goes_on(step_dir, worlds, saved, tmp_path):
    run, argv, _ = copied(saved, tmp_path)
    argv = argv.replace(steps(6), steps(9)) + "--save_every 1 --keep_last 1 --resume auto"
    (found,) = lives(worlds, step_dir, argv, workers_runs.undeletable, "step_00000002")
    assert found["said"] is None and found["steps"] == [7, 8, 9]
    assert any("can't be deleted (Device or resource busy)" in note for note in found["notes"])
    assert not any("is not saved" in note for note in found["notes"])
    assert names_in(run) == ["step_00000009"]
    (found,) = lives(worlds, step_dir, argv.replace(steps(9), steps(10)))  # it can be now
    assert found["said"] is None and not list(run.glob(".step_*"))


# --- damage ---------------------------------------------------------------------------------------

LAYOUTS = ["", "--tp_size 2 --dp_size 2 --dp_engine zero3 --micro_batch_size 2"]


def flip(path, draw):
    """Change a bit somewhere in one of a checkpoint's files; which."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = draw.choice(files)
    content = bytearray(file.read_bytes())
    # Beginnings hold lengths and headers: they are hit as often as all the rest.
    place = draw.randrange(min(len(content), draw.choice([8, 1024, len(content)])))
    content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"{file.name} at {place}"


MANY = [(LAYOUTS[0], 200), (LAYOUTS[1], 40)]


@pytest.mark.parametrize(
    "flags, trials",
    [(LAYOUTS[0], 16), (LAYOUTS[1], 4)] + [pytest.param(*m, marks=pytest.mark.slow) for m in MANY],
)
def test_a_flipped_bit_is_noticed(step_dir, worlds, saved, tmp_path, subtests, flags, trials):
    """Under --resume DIR it is one line; under --resume auto an older one is gone on with."""
    draw = random.Random(0)
    weights = assemble([rank["weights"] for rank in saved(flags)[1]])
    for trial in range(trials):
        run, argv, first = copied(saved, tmp_path, flags, f"{trial}")
        where = flip(run / "step_00000006", draw)
        with subtests.test(where):
            found = lives(worlds, step_dir, argv + f"--resume {run / 'step_00000006'}")
            for rank in found:
                assert rank["said"].startswith(f"--resume {run / 'step_00000006'}"), where
                assert "damaged, name another" in rank["said"] and "\n" not in rank["said"]
            found = lives(worlds, step_dir, argv + "--resume auto")
            assert all(rank["said"] is None and rank["steps"] == [5, 6] for rank in found), where
            assert [rank["curve"] for rank in found] == [rank["curve"][4:] for rank in first]
            assert any("step_00000006" in note and "older" in note for note in found[0]["notes"])
            assert_close(weights, assemble([rank["weights"] for rank in found]), "weight", 0)
            whole = {"step_00000002", "step_00000004", "step_00000006"}
            assert set(names_in(run)) == whole | {"step_00000006.damaged1"}
        shutil.rmtree(run)


def test_a_header_with_another_dtype_is_noticed(step_dir, worlds, saved, tmp_path):
    """The tensors' own bytes, and so their checksums, are as they were."""
    run, argv, _ = copied(saved, tmp_path)
    file = run / "step_00000006" / "00000_0000.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
    (found,) = lives(worlds, step_dir, argv + f"--resume {run / 'step_00000006'}")
    assert "its header is not as it was written" in found["said"]


@pytest.mark.parametrize("how", ["truncated", "deleted", "emptied"])
def test_a_file_that_is_not_whole_is_noticed(step_dir, worlds, saved, tmp_path, subtests, how):
    for name in names_in(saved()[0] / "step_00000006"):
        run, argv, _ = copied(saved, tmp_path, name=name)
        file = run / "step_00000006" / name
        content = file.read_bytes()
        if how == "deleted":
            file.unlink()
        else:
            file.write_bytes(content[: len(content) // 2] if how == "truncated" else b"{}")
        with subtests.test(name):
            (found,) = lives(worlds, step_dir, argv + f"--resume {run / 'step_00000006'}")
            assert "step_00000006: " in found["said"] and "name " in found["said"]
            (found,) = lives(worlds, step_dir, argv + "--resume auto")
            assert found["said"] is None and found["steps"] == [5, 6]


def test_where_all_are_damaged_nothing_begins_anew(step_dir, worlds, saved, tmp_path):
    run, argv, _ = copied(saved, tmp_path)
    for path in run.glob("step_*"):
        (path / "00000_0000.safetensors").write_bytes(b"")
    (found,) = lives(worlds, step_dir, argv + "--resume auto")
    assert "none here is sound" in found["said"] and found["steps"] == []


def test_one_of_an_older_format_says_so_and_runs_nothing(step_dir, worlds, saved, tmp_path):
    """`torch.distributed.checkpoint` unpickled a file named .metadata."""
    run, argv, _ = copied(saved, tmp_path)
    old = tmp_path / "old" / "step_00000002"
    old.mkdir(parents=True)
    (old / "checkpoint.json").write_text(json.dumps({"step": 2, "files": {}}))
    (old / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + f"{old}/ran".encode() + b"'\ntR.")
    (found,) = lives(worlds, step_dir, argv + f"--resume {old}")
    assert "an older format" in found["said"] and not (old / "ran").exists()


def test_nothing_is_unpickled(step_dir, worlds, saved, tmp_path):
    run, argv, _ = copied(saved, tmp_path)
    (found,) = lives(
        worlds,
        step_dir,
        argv.replace(steps(6), steps(7)) + "--resume auto",
        workers_runs.forbidding,
    )
    assert found["said"] is None and found["steps"] == [7]
    for file in step_dir.glob("*.py"):
        code = file.read_text()
        assert not re.search(r"import pickle|from pickle|torch\.load\(|torch\.save\(", code), file


def test_an_older_checkpoint_lacks_flags_that_came_later(step_dir, worlds, saved, tmp_path):
    run, argv, _ = copied(saved, tmp_path)
    worlds(step_dir, 1).run(
        workers_runs.lacking, run / "step_00000006", "weight_decay", "pp_chunks", "dp_size"
    )
    (found,) = lives(worlds, step_dir, argv.replace(steps(6), steps(7)) + "--resume auto")
    assert found["said"] is None and found["steps"] == [7]


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("flags", LAYOUTS + ["--pp_size 2 --micro_batch_size 2"])
def test_ruined_weights_are_not_saved(step_dir, worlds, tmp_path, flags):
    """An update made them so: the step's own loss and gradients are fine."""
    run = tmp_path / "run"
    argv = SHAPE + steps(6) + flags + f" --checkpoint_dir {run} --save_every 1"
    for found in lives(worlds, step_dir, argv, workers_runs.ruined):
        assert "not finite after step 3" in found["said"] and "--learning_rate" in found["said"]
        assert f"the last good checkpoint is {run / 'step_00000002'}" in found["said"]
    assert names_in(run) == ["step_00000001", "step_00000002"]
    assert not list(run.glob(".step_*"))


# --- the data -------------------------------------------------------------------------------------


def test_other_data_is_named(step_dir, worlds, tmp_path, subtests):
    text = "".join(f"line {number}\n" for number in range(2000))
    for case, change, noted in (
        ("same", lambda file: None, False),
        ("moved", lambda file: file.rename(file.with_name("other.txt")), False),
        ("longer", lambda file: file.write_text(text + "one more\n"), True),
        ("cut", lambda file: file.write_text(text[:-500]), True),
    ):
        file = tmp_path / case / "a.txt"
        file.parent.mkdir()
        file.write_text(text)
        argv = SHAPE.replace("random", str(file)) + f"--checkpoint_dir {tmp_path / case / 'run'} "
        with subtests.test(case):
            (found,) = lives(worlds, step_dir, argv + steps(2))
            assert found["said"] is None
            change(file)
            if case == "moved":
                argv = argv.replace("a.txt", "other.txt")
            (found,) = lives(worlds, step_dir, argv + steps(3) + "--resume auto")
            assert found["said"] is None and found["steps"] == [3]
            assert any("data are not those" in note for note in found["notes"]) == noted
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "other": text[::-1]}) + "\n"))
    argv = SHAPE.replace("random", str(rows)) + f"--checkpoint_dir {tmp_path / 'rows'} "
    lives(worlds, step_dir, argv + steps(2))
    (found,) = lives(worlds, step_dir, argv + steps(3) + "--resume auto --text_column other")
    assert any("data are not those" in note for note in found["notes"])
