"""The cache of tokens: whole or not there, on a full disk, without a home, after a kill."""

import hashlib
import os
import random
import subprocess

import numpy as np
import pytest
import workers_texts
from harness import World
from test_texts import jsonl, loading  # noqa: F401  a fixture, `load`

pytestmark = pytest.mark.steps(3, 3)


def spoil(how, folder):
    if how == "tokens gone":
        (folder / "tokens.npy").unlink()
    elif how == "held-out tokens cut":
        os.truncate(folder / "held_out.npy", 129)
    elif how == "tokens empty":
        (folder / "tokens.npy").write_bytes(b"")
    elif how == "about empty":
        (folder / "about.json").write_text("")
    elif how == "about a list":
        (folder / "about.json").write_text("[]")
    elif how == "no notes":
        about = (folder / "about.json").read_text()
        (folder / "about.json").write_text(about.replace('"notes"', '"notez"'))
    else:
        name, place = {
            "tokens of zeros": ("tokens.npy", 128),
            "a bit of the header": ("tokens.npy", 8),
            "a bit of the held-out tokens": ("held_out.npy", 130),
        }[how]
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1 << 6
        if how == "tokens of zeros":
            content[place:] = bytes(len(content) - place)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "how",
    ["tokens gone", "held-out tokens cut", "tokens empty", "about empty", "about a list"]
    + ["tokens of zeros", "a bit of the header", "a bit of the held-out tokens", "no notes"],
)
def test_what_is_not_whole_in_the_cache_is_made_anew(step_dir, load, tmp_path, how):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("some text")
    (tmp_path / "texts" / "val.txt").write_text("other")
    cache = tmp_path / "cache"
    (first,) = load(step_dir, tmp_path / "texts", cache=cache)
    (folder,) = (cache / "four-d-from-scratch").iterdir()
    spoil(how, folder)
    assert load(step_dir, tmp_path / "texts", cache=cache) == [first]
    assert [*(cache / "four-d-from-scratch").iterdir()] == [folder]


def test_the_identity_of_what_was_tokenised_is_its_content(step_dir, load, tmp_path):
    for name in ("one", "other", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_bytes(jsonl("some", "text"))
        (tmp_path / name / "dev.jsonl").write_bytes(jsonl("held" + " out" * (name == "third")))
    (tmp_path / "plain.txt").write_text("some text")
    *same, third, plain = (
        result["about"]
        for result in load(
            step_dir, *(tmp_path / n for n in ("one", "other", "third", "plain.txt"))
        )
    )
    ids = np.frombuffer(b"some\0text\0held\0", np.uint8).astype("<u2")
    for about in same:
        assert about["sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()
        assert (about["tokens"], about["held_out"]) == (10, 5)
    assert third["sha256"] != about["sha256"]
    assert (plain["tokens"], plain["held_out"]) == (10, None)


def test_what_a_killed_run_left_is_removed_and_nothing_else(step_dir, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    argv = ["--dataset_name", str(tmp_path / "a.txt")]
    with World(step_dir, 1) as world:
        ((before, during, after, end, error),) = world.run(
            workers_texts.leftovers, str(tmp_path), argv
        )
    assert error is None
    assert len(before) == len(during) == 2 and "aside-mine" in before and before != during
    assert len(after) == 3 and set(during) < set(after), "what is being written stays"
    assert len(end) == 3 and "aside-mine" in end and not set(during) < set(end)


def mounted(folder, kilobytes):
    """A file system of some size at a folder; the test is skipped where that can't be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")


def test_a_full_disk_is_one_line_and_leaves_what_was_whole(step_dir, load, tmp_path):
    chance = random.Random(9)
    (tmp_path / "small.txt").write_text("small")
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "train.txt").write_text("large " * 10_000)  # 120 kB of tokens
    (tmp_path / "large" / "val.txt").write_text("large " * 10_000)
    for index in range(4):
        disk = tmp_path / f"disk{index}"
        mounted(disk, 4 * chance.randrange(5, 59))
        try:
            (small,) = load(step_dir, tmp_path / "small.txt", cache=disk)
            before = sorted(disk.rglob("*"))
            flags = ("--num_proc", "2") * (index == 0)
            (large,) = load(step_dir, tmp_path / "large", cache=disk, flags=flags)
            assert str(disk) in large["error"] and "XDG_CACHE_HOME" in large["error"]
            assert "No space left" in large["error"] and "\n" not in large["error"]
            assert sorted(disk.rglob("*")) == before
            assert load(step_dir, tmp_path / "small.txt", cache=disk) == [small]
            subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
            (large,) = load(step_dir, tmp_path / "large", cache=disk)
            assert large["error"] is None and large["tokens"] == b"large " * 10_000 + b"\0"
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_folder_for_temporary_files_may_be_full(step_dir, load, tmp_path):
    """Nothing is written there, as the library does that was used for this."""
    import datasets

    rows = {
        split: datasets.Dataset.from_dict({"text": [split] * 5000}) for split in ("train", "dev")
    }
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.jsonl").write_bytes(jsonl("text") * 5000)
    mounted(tmp_path / "disk", 64)
    try:
        subprocess.run(["dd", "if=/dev/zero", f"of={tmp_path}/disk/file"], capture_output=True)
        names = tmp_path / "saved", tmp_path / "a.jsonl"
        for flags in ([], ["--num_proc", "2"]):
            cache = tmp_path / f"cache{len(flags)}"
            found = load(step_dir, *names, flags=flags, cache=cache, tmp=tmp_path / "disk")
            assert [result["error"] for result in found] == [None, None]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_a_user_without_a_home(step_dir, tmp_path):
    if os.geteuid():
        pytest.skip("only root can become a user whom nobody knows")
    (tmp_path / "cache").mkdir()
    (tmp_path / "a.txt").write_text("some text")
    for folder in (tmp_path / "cache", *tmp_path.parents[:3], tmp_path):
        folder.chmod(0o777)
    argv = ["--dataset_name", str(tmp_path / "a.txt")]
    with World(step_dir, 1) as world:
        (answer,) = world.run(workers_texts.without_home, [argv], str(tmp_path / "cache"))
    assert isinstance(answer, list), answer
    ((without, given),), here = answer
    assert "\n" not in without["error"] and "XDG_CACHE_HOME" in without["error"]
    assert given["error"] is None and here == ["four-d-from-scratch"]
    assert given["libraries"].startswith(str(tmp_path / "cache")), "or they make a folder ~"


def test_tokenising_processes_end_with_the_one_that_started_them(step_dir, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 200_000)
    argv = ["--dataset_name", str(tmp_path / "a.txt"), "--num_proc", "2"]
    with World(step_dir, 1) as world:
        assert world.run(workers_texts.orphans, argv, str(tmp_path)) == [(2, 0)]
