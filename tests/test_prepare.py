"""prepare.py: a folder that trains, the same after a stop, complete or absent."""

import base64
import json

import numpy as np
import pytest
import workers_prepare as workers
from harness import World
from hypothesis import given, settings
from hypothesis import strategies as st

TEXT = "To be, or not to be:\n\tthat is the question — 問題.  \r\n" * 300
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A World of one process for each step, with a cache of its own."""
    folder, made = tmp_path_factory.mktemp("cache"), {}

    def get(step_dir):
        if step_dir not in made:
            made[step_dir] = World(step_dir, 1, XDG_CACHE_HOME=str(folder))
        return made[step_dir]

    yield get
    for one in made.values():
        one.close()


@pytest.fixture
def raw(tmp_path):
    """A folder with three documents of different length."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for number, part in enumerate((TEXT, "", TEXT[:5000] * 2)):
        (folder / f"{number}.txt").write_text(part)
    return folder


def run(world, argv, shard_bytes=2**28, stop_after=None):
    return world.run(workers.prepare, argv, shard_bytes, stop_after)[0]


@slow
@pytest.mark.steps(3, 3)
def test_bytes_are_those_of_the_raw_text_and_bpe_gives_texts_back(world, step_dir, raw, tmp_path):
    one = world(step_dir)
    error, _ = run(
        one, ["--input_dir", raw, "--output_dir", tmp_path / "b", "--tokenizer_type", "bytes"]
    )
    assert error is None
    texts, vocab_size, parts = one.run(workers.loaded, tmp_path / "b")[0]
    own, _, _ = one.run(workers.loaded, raw)[0]
    assert (texts[0][0] == own[0][0]).all() and texts[0][1] is None and vocab_size == 256
    assert (
        texts[0][2]["bytes"]
        == own[0][2]["bytes"]
        == {"tokens": len((TEXT + TEXT[:5000] * 2).encode())}
    )
    made = ["--output_dir", tmp_path / "p", "--tokenizer_type", "bpe", "--vocab_size", 280]
    error, said = run(one, ["--input_dir", raw, *made])
    assert error is None and "3 documents" in said
    about = workers.metadata(tmp_path / "p")
    assert about["vocab_size"] == 280 and about["documents"] == 3
    assert one.run(workers.loaded, tmp_path / "p")[0][1] == 280

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
    def round_trips(texts):
        for folder in ("p", "b"):
            found = one.run(workers.round_trips, tmp_path / folder, [*texts, "<|endoftext|>\r\n "])[
                0
            ]
            assert [text for text, _ in found] == [*texts, "<|endoftext|>\r\n "]
            assert not any(ended for _, ended in found)

    round_trips()


SMALL = {"shard_bytes": 2**12}
MANY = "".join(f"{a} x {b} = {a * b}\n" for a in range(40) for b in range(40))


@pytest.fixture
def many(tmp_path):
    """A .jsonl of many documents, some of them empty, and a text that is named for validation."""
    folder = tmp_path / "many"
    folder.mkdir()
    rows = [MANY[start : start + 300] * (start % 7 > 0) for start in range(0, len(MANY), 300)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(lines)
    (folder / "valid.jsonl").write_text(lines[: len(lines) // 20].rpartition("\n")[0])
    return folder


def contents(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@slow
@pytest.mark.steps(3, 3)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_stopped_one_goes_on_to_the_same_files(world, step_dir, many, tmp_path, cut):
    one = world(step_dir)
    made = ["--input_dir", many, "--tokenizer_type", "bpe", "--vocab_size", 300, "--output_dir"]
    assert run(one, [*made, tmp_path / "whole"], **SMALL)[0] is None
    error, _ = run(one, [*made, tmp_path / "cut"], **SMALL, stop_after=cut)
    assert error == "stopped" and not (tmp_path / "cut").exists()
    aside = tmp_path / ".cut.unfinished"
    there = {path: path.stat().st_mtime_ns for path in aside.rglob("*.npy")}
    assert len(there) == cut
    error, said = run(one, [*made, tmp_path / "cut", "--num_proc", 2], **SMALL)
    assert error is None and "going on with" in said and not aside.exists()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    name = next(iter(workers.metadata(tmp_path / "cut")["prepared"]))
    for path, changed in there.items():
        assert (tmp_path / "cut" / name / path.name).stat().st_mtime_ns == changed


@slow
@pytest.mark.steps(3, 3)
def test_another_command_begins_anew(world, step_dir, many, tmp_path):
    one = world(step_dir)
    made = ["--input_dir", many, "--output_dir", tmp_path / "out", "--tokenizer_type"]
    assert run(one, [*made, "bpe", "--vocab_size", 300], **SMALL, stop_after=2)[0] == "stopped"
    error, said = run(one, [*made, "bytes"], **SMALL)
    assert error is None and "going on" not in said
    assert workers.metadata(tmp_path / "out")["vocab_size"] == 256
    assert not (tmp_path / ".out.unfinished").exists()
    (tmp_path / ".other.unfinished").mkdir()
    (tmp_path / ".other.unfinished" / "mine.txt").write_text("not to be deleted")
    error, _ = run(one, [*made[:3], tmp_path / "other", *made[4:], "bytes"])
    assert "has other files" in error and (tmp_path / ".other.unfinished" / "mine.txt").exists()
    error, _ = run(one, [*made, "bytes"])
    assert "it is there already" in error


@slow
@pytest.mark.steps(3, 3)
def test_shards_are_one_array_and_every_byte_is_checked(world, step_dir, many, tmp_path):
    one = world(step_dir)
    out = tmp_path / "out"
    made = ["--input_dir", many, "--output_dir", out, "--tokenizer_type", "bytes"]
    assert run(one, made, **SMALL)[0] is None
    folder = out / next(iter(workers.metadata(out)["prepared"]))
    texts, _, _ = one.run(workers.loaded, out)[0]
    plain, _, _ = one.run(workers.loaded, many)[0]
    for mine, other in zip(texts[0][:2], plain[0][:2], strict=True):
        assert (mine == other).all()
    assert texts[0][2]["bytes"] == plain[0][2]["bytes"]
    ends = np.cumsum([len(np.load(file)) for file in sorted(folder.glob("tokens_*.npy"))])
    assert len(ends) > 3
    cuts = [(0, 5), (0, ends[-1]), (ends[0] - 1, ends[0] + 1), (ends[0], ends[0] + 9)]
    cuts += [(ends[0] - 3, ends[2] + 3), (ends[-1] - 2, ends[-1]), (ends[1], ends[2])]
    for mine, other in one.run(workers.slices_of_shards, folder, cuts)[0]:
        assert (mine == other).all() and len(mine) == len(other)
    file = sorted(folder.glob("*.npy"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert f"{file.name} is not as prepare.py wrote it" in one.run(workers.loaded, out)[0]
    file.unlink()
    assert f"{file.name} is not as prepare.py wrote it" in one.run(workers.loaded, out)[0]


@slow
@pytest.mark.steps(3, 3)
def test_a_prepared_mix_has_its_shares_and_one_tokenizer(world, step_dir, raw, many, tmp_path):
    one, out = world(step_dir), tmp_path / "out"
    mix = f"{raw}:0.75,{many}:0.25"
    made = ["--input_dir", mix, "--output_dir", out, "--tokenizer_type", "bpe", "--vocab_size", 280]
    assert run(one, made)[0] is None
    _, vocab_size, parts = one.run(workers.loaded, out)[0]
    assert vocab_size == 280 and [*parts.values()] == [3, 1]
    assert [name.rpartition("/")[2] for name in parts] == ["0_raw", "1_many"]
    _, _, parts = one.run(workers.loaded, f"{out}:0.5,{raw}:0.5")[0]
    assert [*parts.values()] == [3, 1, 4]
    error = one.run(workers.loaded, out, "--tokenizer_name", "bytes")[0]
    assert "leave --tokenizer_name bytes out" in error
    made = ["--input_dir", raw, "--output_dir", tmp_path / "b", "--tokenizer_type", "bytes"]
    assert run(one, made)[0] is None
    error = one.run(workers.loaded, f"{out}:0.5,{tmp_path / 'b'}:0.5")[0]
    assert "different tokenizers" in error
    again = [
        "--input_dir",
        raw,
        "--output_dir",
        tmp_path / "c",
        "--tokenizer_name",
        out / "tokenizer",
    ]
    assert run(one, again)[0] is None
    assert workers.metadata(tmp_path / "c")["tokenizer"] == workers.metadata(out)["tokenizer"]


@slow
@pytest.mark.steps(3, 3)
def test_a_file_of_tiktoken_gives_what_tiktoken_gives(world, step_dir, raw, tmp_path):
    pytest.importorskip("tiktoken")
    symbols = [bytes([byte]) for byte in range(256)]
    symbols += [
        b" t",
        b"he",
        b" the",
        b"st",
        b"quest",
        b"ion",
        b"qu",
        b"es",
        b"\r\n",
        b" b",
        b" be",
    ]
    ranks = "".join(f"{base64.b64encode(s).decode()} {n}\n" for n, s in enumerate(symbols))
    (tmp_path / "own.tiktoken").write_text(ranks)
    one = world(step_dir)
    made = ["--input_dir", raw, "--output_dir", tmp_path / "out", "--tokenizer_type", "tiktoken"]
    error, _ = run(one, [*made, "--tokenizer_name", tmp_path / "own.tiktoken"])
    assert error is None
    ours, theirs = one.run(workers.as_tiktoken_has_them, tmp_path / "out", [TEXT, MANY, ""])[0]
    assert ours == theirs and max(ours[0]) > 255
    error, _ = run(one, [*made[:3], tmp_path / "x", *made[4:], "--tokenizer_name", "no_such"])
    assert "--tokenizer_name no_such" in error and "\n" not in error


@slow
@pytest.mark.steps(3, 3)
def test_wordpiece_has_words(world, step_dir, raw, tmp_path):
    made = ["--input_dir", raw, "--output_dir", tmp_path / "out", "--tokenizer_type", "wordpiece"]
    error, said = run(world(step_dir), [*made, "--vocab_size", 100])
    assert error is None and "not more than" in said
    assert workers.metadata(tmp_path / "out")["bytes_per_token"] > 1.5


@slow
@pytest.mark.steps(3, 3)
def test_a_removal_that_was_killed_is_not_gone_on_with(world, step_dir, many, tmp_path):
    """The second command is killed while it removes what the first one has left."""
    one, aside = world(step_dir), tmp_path / ".out.unfinished"
    made = ["--input_dir", many, "--output_dir", tmp_path / "out", "--tokenizer_type"]
    first = [*made, "bpe", "--vocab_size", 300]
    assert run(one, [*made[:3], tmp_path / "whole", *first[4:]], **SMALL)[0] is None
    assert run(one, first, **SMALL, stop_after=2)[0] == "stopped"
    assert one.run(workers.removed_until, [*made, "bytes"], "tokenizer")[0] == "killed"
    assert (aside / "plan.json").exists() and (aside / "tokenizer").exists()
    error, said = run(one, first, **SMALL)
    assert error is None and "going on" not in said
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@slow
@pytest.mark.steps(3, 3)
def test_a_folder_that_lacks_something_is_an_error_and_one_text_of_it_a_name(
    world, step_dir, raw, tmp_path
):
    one, out = world(step_dir), tmp_path / "out"
    made = ["--output_dir", out, "--tokenizer_type", "bpe", "--vocab_size", 280]
    assert run(one, ["--input_dir", raw, *made])[0] is None
    _, vocab_size, parts = one.run(workers.loaded, out / "0_raw")[0]
    assert vocab_size == 280 and parts == {f"{out}/0_raw": 1}
    for other in (f"{out}/", f"{out}/0_raw"):
        assert "in the mix twice" in one.run(workers.loaded, f"{out}:0.5,{other}:0.5")[0]
    for name in ("tokenizer/tokenizer.json", "0_raw/about.json", "0_raw/tokens_00000.npy"):
        there = (out / name).read_bytes()
        for content in (there[:-9], None):
            (out / name).unlink()
            if content is not None:
                (out / name).write_bytes(content)
            error = one.run(workers.loaded, out)[0]
            assert f"{name.removeprefix('0_raw/')} is not as prepare.py wrote it" in error
            (out / name).write_bytes(there)
    raw.with_name("mine").mkdir()
    (raw.with_name("mine") / "a.txt").write_text(TEXT)
    for foreign in ('{"prepared": "2024"}', '["prepared"]', '"prepared"', "[" * 30000):
        (raw.with_name("mine") / "metadata.json").write_text(foreign)
        error = one.run(workers.loaded, raw.with_name("mine"))[0]
        assert "together; name one kind" in error  # texts and JSON: no prepared folder


WRONG = {
    "--input_dir nowhere/at/all --tokenizer_type bpe": ("--input_dir", "no such file"),
    "--input_dir RAW": ("--tokenizer_type", "choose one of"),
    "--input_dir RAW --tokenizer_type bytes --vocab_size 300": ("--vocab_size", "leave it out"),
    "--input_dir RAW --tokenizer_type bpe --vocab_size 200": ("--vocab_size 200", "257"),
    "--input_dir RAW --tokenizer_type bpe --tokenizer_name bytes": ("--tokenizer_name", "one out"),
    "--input_dir RAW --tokenizer_type wordpiece --vocab_size 9": ("--vocab_size 9", "letters"),
    "--input_dir RAW:0.5,b --tokenizer_type bpe": ("--input_dir", "weight"),
    "--input_dir random --tokenizer_type bpe": ("--input_dir random", "no text"),
    "--input_dir RAW --tokenizer_type bpe --text_columns x": ("--text_columns", "--help"),
}


@slow
@pytest.mark.steps(3, 3)
@pytest.mark.parametrize("argv", WRONG)
def test_a_wrong_call_is_one_line(world, step_dir, raw, tmp_path, argv):
    flags = argv.replace("RAW", str(raw)).split()
    error, _ = run(world(step_dir), [*flags, "--output_dir", tmp_path / "out"])
    assert all(word in error for word in WRONG[argv]) and "\n" not in error
    assert not (tmp_path / "out").exists()
