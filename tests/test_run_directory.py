"""A directory of checkpoints: whose it is, what may be deleted, what is damaged, who writes."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import run_workers
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


def lives(worlds, step_dir, argv, function=run_workers.life, *args):
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


@pytest.mark.parametrize("seed", range(3))
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
    (found,) = lives(worlds, step_dir, argv, run_workers.undeletable, "step_00000002")
    assert found["said"] is None and found["steps"] == [7, 8, 9]
    assert any("can't be deleted (Device or resource busy)" in note for note in found["notes"])
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
    # Beginnings hold headers: they are hit as often as all the rest.
    place = draw.randrange(min(len(content), draw.choice([64, 1024, len(content)])))
    content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return f"{file.name} at {place}"


@pytest.mark.parametrize("flags, trials", [(LAYOUTS[0], 24), (LAYOUTS[1], 6)])
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
        worlds, step_dir, argv.replace(steps(6), steps(7)) + "--resume auto", run_workers.forbidding
    )
    assert found["said"] is None and found["steps"] == [7]
    for file in step_dir.glob("*.py"):
        code = file.read_text()
        assert not re.search(r"import pickle|from pickle|torch\.load\(|torch\.save\(", code), file


def test_an_older_checkpoint_lacks_flags_that_came_later(step_dir, worlds, saved, tmp_path):
    run, argv, _ = copied(saved, tmp_path)
    worlds(step_dir, 1).run(
        run_workers.lacking, run / "step_00000006", "weight_decay", "pp_chunks", "dp_size"
    )
    (found,) = lives(worlds, step_dir, argv.replace(steps(6), steps(7)) + "--resume auto")
    assert found["said"] is None and found["steps"] == [7]


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("flags", LAYOUTS + ["--pp_size 2 --micro_batch_size 2"])
def test_ruined_weights_are_not_saved(step_dir, worlds, tmp_path, flags):
    """An update made them so: the step's own loss and gradients are fine."""
    run = tmp_path / "run"
    argv = SHAPE + steps(6) + flags + f" --checkpoint_dir {run} --save_every 1"
    for found in lives(worlds, step_dir, argv, run_workers.ruined):
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


# --- the lock -------------------------------------------------------------------------------------


def test_two_at_once_are_told_apart(step_dir, tmp_path):
    """Ten processes ask for one directory at the same time: one of them gets it."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import lock, errors\n"
        "mine = lock.Lock(sys.argv[2])\n"
        "time.sleep(max(0, float(sys.argv[3]) - time.time()))\n"
        "try:\n    mine.take()\nexcept errors.UserError as error:\n    sys.exit(str(error))\n"
        "time.sleep(3); mine.check(); mine.release()"
    )
    command = [sys.executable, "-c", code, step_dir, tmp_path, str(time.time() + 2)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(10)]
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    assert sorted(code for _, code in ended) == [0] + [1] * 9, ended
    for said, code in ended:
        assert code == 0 or re.search(r"process \d+ on .* writes there", said), said
    assert not list(tmp_path.iterdir())


def test_a_second_run_gets_one_line(step_dir, worlds, saved, tmp_path):
    run, argv, _ = copied(saved, tmp_path)
    held = worlds(step_dir, 2).run(run_workers.holder_of_this_process, run)
    (found,) = lives(worlds, step_dir, argv + "--resume auto", run_workers.life, None, True)
    process = int(re.search(r"process (\d+) on \S+ writes there", found["said"])[1])
    assert process in [own["process"] for own in held]


def test_the_lock_of_a_dead_holder_is_taken_at_once(step_dir, worlds, tmp_path, subtests):
    run = worlds(step_dir, 1).run
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    time.sleep(1)  # it has ended, and nobody asked how
    for case, changes in (
        ("ended", {"process": dead.pid}),
        ("ended, not waited for", {"process": zombie.pid}),
        ("its number is another's", {"started": "1"}),
    ):
        with subtests.test(case):
            run(run_workers.leave_lock, tmp_path, changes)
            ((said, notes, seconds),) = run(run_workers.taken, tmp_path)
            assert said is None and not notes and seconds < 5
            assert not (tmp_path / "LOCK").exists()
    zombie.wait()


def test_the_lock_of_another_host(step_dir, worlds, tmp_path, subtests):
    run = worlds(step_dir, 1).run
    for case, changes in (
        ("another host", {"host": "elsewhere 1"}),
        ("another container", {"processes": "pid:[1]"}),
        ("unreadable", None),
    ):
        with subtests.test(case):
            run(run_workers.leave_lock, tmp_path, changes)
            ((said, notes, seconds),) = run(run_workers.taken, tmp_path, 0.5)
            assert said is None and len(notes) == 1 and "waiting" in notes[0] and seconds > 0.5
            run(run_workers.leave_lock, tmp_path, changes)
            ((said, notes, seconds),) = run(run_workers.taken, tmp_path, 20.0, 1.0)
            assert "writes there" in said and seconds < 10


def test_a_run_that_lost_its_lock_writes_no_more(step_dir, worlds, tmp_path):
    run = tmp_path / "run"
    for layout in ("", "--dp_size 2 --micro_batch_size 2"):
        shutil.rmtree(run, ignore_errors=True)
        argv = SHAPE + steps(6) + layout + f" --checkpoint_dir {run} --save_every 2"
        ranks = lives(worlds, step_dir, argv, run_workers.life, None, True, "lock_is_taken")
        for found in ranks:
            assert found["steps"] == [1, 2, 3, 4] and "process 7 on elsewhere" in found["said"]
        assert names_in(run) == ["LOCK", "step_00000002"] and not list(run.glob(".step_*"))


def test_a_run_that_ended_meanwhile_is_noticed(step_dir, worlds, tmp_path):
    argv = SHAPE + f"--checkpoint_dir {tmp_path}"
    (said,) = worlds(step_dir, 1).run(run_workers.begun_after, argv, "step_00000002")
    assert "another run has just written there" in said and names_in(tmp_path) == ["step_00000002"]


def test_the_holder_renews_its_lock(step_dir, worlds, tmp_path):
    ((first, second),) = worlds(step_dir, 1).run(run_workers.renewed, tmp_path)
    assert second > first
