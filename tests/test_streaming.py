"""`--streaming`: the sequences are those of the rule, on every layout and after every stop."""

import gzip
import hashlib
import json
import random

import numpy as np
import pytest
import workers_streaming
from harness import assert_close
from launch import launch, on_two, ranks_of
from test_checkpoint import SHAPE, assert_same_curve, batch, train

slow = pytest.mark.slow
SHARDS, SEQ = 64, 16


# --- the rule, in plain words ---------------------------------------------------------------------


def held_out(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 64 == 0


def tokens_of(texts):
    return b"".join(text.encode() + b"\0" for text in texts)


def documents_of(files, shard):
    """The documents of a shard; files: a list of lists of texts."""
    groups = min(SHARDS, len(files))
    own, every = shard // groups, len(range(shard % groups, SHARDS, groups))
    return [text for file in files[shard % groups :: groups] for text in file[own::every]]


def expected(files, count, apart=False):
    """The first sequences, [count, seq + 1]; apart: what is held out are other files."""
    rows = []
    for shard in range(SHARDS):
        texts = documents_of(files, shard)
        tokens = tokens_of([text for text in texts if apart or not held_out(text)])
        need = (count // SHARDS + 1) * SEQ + 1
        rows.append(np.frombuffer(tokens * (need // len(tokens) + 1), np.uint8))
    row = [(rows[p % SHARDS], p // SHARDS * SEQ) for p in range(count)]
    return np.stack([tokens[start : start + SEQ + 1] for tokens, start in row])


def held_out_of(files):
    """The tokens of all that is held out: of the first documents of the shards, the second, …"""
    shards = [documents_of(files, shard) for shard in range(SHARDS)]
    longest = max(map(len, shards))
    turns = [texts[turn] for turn in range(longest) for texts in shards if turn < len(texts)]
    return tokens_of([text for text in turns if held_out(text)])


def texts(count, seed=0):
    """Documents of 0 to 60 letters, each with a number of its own."""
    draw = random.Random(seed)
    return [
        f"{seed}.{n} " + "naïve 東 "[: draw.randrange(9)] * draw.randrange(8) for n in range(count)
    ]


FILES = [texts(count, seed) for seed, count in enumerate((700, 500, 650))]
MANY = [texts(12, seed) for seed in range(70)]


def lines(file):
    return "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in file).encode()


def write(folder, kind):
    """A data set on disk: (its flags, its files as lists of texts)."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    files = {"lines": FILES, "many": MANY, "parquet": FILES, "zst": FILES[:1], "gz": FILES[:1]}
    files = files.get(kind) or [[text] for text in texts(150)]
    for number, file in enumerate(files):
        path = folder / f"{number:03}"
        if kind == "parquet":
            table = pyarrow.table({"text": file, "n": range(len(file))})
            parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=170)
        elif kind == "gz":
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines(file)))
        elif kind == "zst":
            with pyarrow.CompressedOutputStream(f"{path}.jsonl.zst", "zstd") as stream:
                stream.write(lines(file))
        elif kind == "txt":
            path.with_suffix(".txt").write_text(file[0])
        else:
            path.with_suffix(".jsonl").write_bytes(lines(file))
    return f"--streaming --dataset_name {folder} --seq_len {SEQ} ", files


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """data(kind): what `write` says of a data set, written once."""
    made, folder = {}, tmp_path_factory.mktemp("streams")
    return lambda kind: made.get(kind) or made.setdefault(kind, write(folder / kind, kind))


# --- the sequences --------------------------------------------------------------------------------

KINDS = ["lines", "many", *(pytest.param(k, marks=slow) for k in ("parquet", "gz", "zst", "txt"))]


@pytest.mark.sampled(3, only=True)
@pytest.mark.steps(3)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sequences_are_those_of_the_rule(step_dir, worlds, data, kind):
    """Over more than an epoch; so no document that is held out was trained on."""
    flags, files = data(kind)
    ((found, apart, bytes_a_token),) = worlds(step_dir, 1).run(
        workers_streaming.row_of, flags, count := 64 * 60
    )
    assert np.array_equal(found, expected(files, count))
    due = held_out_of(files)
    assert len(apart) > SEQ and bytes(apart.astype(np.uint8)) == due[: len(apart)]
    assert bytes_a_token == pytest.approx(1 - due.count(b"\0") / len(due), rel=0.01)


@pytest.mark.sampled(3, only=True)
@pytest.mark.steps(3)
def test_a_split_for_validation_is_held_out_and_nothing_else(step_dir, worlds, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(lines(FILES[0]))
    (tmp_path / "validation.jsonl").write_bytes(lines(FILES[1]))
    flags = f"--streaming --dataset_name {tmp_path} --seq_len {SEQ}"
    ((found, apart, _),) = worlds(step_dir, 1).run(workers_streaming.row_of, flags, 640)
    assert np.array_equal(found, expected(FILES[:1], 640, apart=True))
    assert bytes(apart.astype(np.uint8)) == tokens_of(FILES[1])[: len(apart)]


@slow
@pytest.mark.steps(3, 3)
def test_what_datasets_streams(step_dir, worlds, tmp_path):
    """Two files behind a name on the hub; and a folder that `save_to_disk` wrote, in 64 parts."""
    import datasets

    paths = [str(tmp_path / f"{number}.jsonl") for number in (0, 1)]
    for path, file in zip(paths, FILES, strict=False):
        with open(path, "wb") as stream:
            stream.write(lines(file))
    flags = f"--streaming --dataset_name some/set --seq_len {SEQ}"
    world = worlds(step_dir, 1)
    ((found, _, _),) = world.run(workers_streaming.row_of, flags, count := 64 * 45, paths)
    assert np.array_equal(found, expected(FILES[:2], count))
    datasets.Dataset.from_dict({"text": FILES[0]}).save_to_disk(tmp_path / "saved")
    flags = f"--streaming --dataset_name {tmp_path / 'saved'} --seq_len {SEQ}"
    parts = [list(part) for part in np.array_split(FILES[0], 64)]
    ((found, _, _),) = world.run(workers_streaming.row_of, flags, 64 * 10)
    assert np.array_equal(found, expected(parts, 64 * 10))
    (rest, _) = world.run(workers_streaming.rows_gone_on, flags, 64 * 10, [300, 0])[0]
    assert np.array_equal(rest, found[300:])


@pytest.mark.sampled(3, only=True)
@pytest.mark.steps(3)
@pytest.mark.parametrize(
    "kind", ["parquet", *(pytest.param(k, marks=slow) for k in ("lines", "gz", "zst", "txt"))]
)
def test_a_shard_goes_on_from_any_place(step_dir, worlds, data, kind):
    """In the middle of a document, of a file, and in the second epoch."""
    flags, files = data(kind)
    count, starts = 64 * 50, [1, 63, 64, 777, 64 * 49 - 5]
    (rows,) = worlds(step_dir, 1).run(workers_streaming.rows_gone_on, flags, count, starts)
    due = expected(files, count)
    for start, row in zip(starts, rows, strict=True):
        assert np.array_equal(row, due[start:])


# --- on ranks -------------------------------------------------------------------------------------

SPLITS = [
    (2, "--dp_size 2 --micro_batch_size 4 --gradient_accumulation_steps 3", True),
    (3, "--dp_size 3 --micro_batch_size 2 --gradient_accumulation_steps 4", False),
    (4, "--dp_size 4 --micro_batch_size 1 --gradient_accumulation_steps 6", True),
    (4, "--dp_size 4 --micro_batch_size 6", False),
    (4, "--dp_size 2 --tp_size 2 --micro_batch_size 12", False),
    (4, "--dp_size 2 --cp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 6", True),
    (1, "--micro_batch_size 8 --gradient_accumulation_steps 3", True),
]


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(6)
@pytest.mark.parametrize(
    "ranks, split, apart",
    [pytest.param(*row, marks=() if row[0] == 3 else slow) for row in SPLITS],
)
def test_a_step_has_the_same_sequences_in_any_split(step_dir, worlds, data, ranks, split, apart):
    """24 of them, in order, also when it is read again. apart: each rank has shards of its own."""
    flags, files = data("lines")
    steps = [0, 1, 0, 1, 2, 3, 9]
    found = worlds(step_dir, ranks).run(workers_streaming.what_is_read, flags + split, steps)
    dp = int(split.split()[1]) if "dp_size" in split else 1
    if "cp_size" in split:  # a rank has a part of each sequence, the late one and the early one
        return
    of_dp = found[:: ranks // dp]
    for place, step in enumerate(steps):
        micro_batches = [windows[place] for windows, _, _ in of_dp]
        row = np.concatenate([part for parts in zip(*micro_batches, strict=True) for part in parts])
        assert np.array_equal(row, expected(files, 24 * 10)[24 * step : 24 * step + 24])
    if dp > 1 and ranks == dp:
        shards = [shard for _, own, _ in found for shard in own]
        assert (len(shards) == len(set(shards))) == apart


LAYOUTS = [
    "--dp_size 2 --tp_size 2 --dp_engine zero2",
    "--cp_size 2 --dp_size 2 --dp_engine zero3",
    "--pp_size 2 --dp_size 2",
    "--tp_size 2 --sequence_parallel --pp_size 2",
    "--dp_size 4 --dp_engine bucket",
]


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=slow if n else ()) for n, x in enumerate(LAYOUTS)]
)
def test_each_layout_trains_the_same_model(step_dir, train_on, data, layout):
    shape = SHAPE.replace("--dataset_name random", "") + data("lines")[0] + "--dtype float64 "
    one = train_on(step_dir, 1, shape + batch(""), 3)
    train_on(step_dir, ranks_of(layout), shape + batch(layout), 3).assert_same_as(one)


@pytest.mark.steps(3, 5)
@pytest.mark.sampled(only=True)
def test_two_ranks_train_the_same_model(step_dir, train_on, data):
    shape = SHAPE.replace("--dataset_name random", "") + data("lines")[0] + "--dtype float64 "
    one = train_on(step_dir, 1, shape, 2)
    two = shape + on_two(step_dir)
    train_on(step_dir, 2, two, 2).assert_same_as(one)


@slow
@pytest.mark.steps(9, 9)
def test_only_the_first_rank_needs_transformers(step_dir, worlds, data):
    flags = data("lines")[0] + "--dp_size 2"
    one, two = worlds(step_dir, 2).run(workers_streaming.without_transformers, flags)
    assert np.array_equal(one, two)


@pytest.mark.steps(6)
@pytest.mark.sampled(only=True)
def test_what_is_tokenised_more_than_once_is_said(step_dir, worlds, data):
    flags = data("lines")[0] + "--num_hidden_layers 1 --dp_size 2 --micro_batch_size "
    for size, words in ((6, "tokenised on 2 ranks"), (64, "on 2 ranks"), (32, None)):
        said, _ = worlds(step_dir, 2).run(workers_streaming.notes_of_setup, flags + str(size))
        notes = [line for line in said if "tokenised" in line]
        assert len(notes) == bool(words) and (not words or words in notes[0])


# --- checkpoints ----------------------------------------------------------------------------------


def shape_of(data):
    steps = f"--max_tokens {12 * 8 * SEQ} "  # 12 steps of 8 sequences
    return SHAPE.replace("--dataset_name random", "") + data("lines")[0] + steps


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layout",
    ["--dp_size 2 --dp_engine zero2"]
    + [pytest.param(x, marks=slow) for x in ("", *LAYOUTS[2:4], "--tp_size 2 --dp_size 2")],
)
def test_the_same_layout_goes_on_bit_for_bit(step_dir, worlds, tmp_path, data, layout):
    argv = shape_of(data) + batch(layout)
    numbers, weights = train(worlds, step_dir, argv)
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv, until=5)
    middle, _ = train(worlds, step_dir, argv + "--resume auto", until=10)
    resumed = argv + "--resume auto"
    for places, due in worlds(step_dir, ranks_of(layout)).run(
        workers_streaming.places_gone_on, resumed
    ):
        assert places == due, "or all is read from the beginning again"
    rest, final = train(worlds, step_dir, resumed)
    assert first + middle + rest == numbers
    assert_close(weights, final, "final weight", tolerance=0)


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "before, after",
    [
        pytest.param("--dp_size 2", "--pp_size 2", marks=slow),
        pytest.param("", "--dp_size 4 --dp_engine zero3", marks=slow),
        pytest.param("--dp_size 4", "--dp_size 2 --tp_size 2", marks=slow),
        pytest.param("--cp_size 2 --dp_size 2", "", marks=slow),
    ],
)
def test_a_run_goes_on_on_another_layout(step_dir, worlds, tmp_path, data, before, after):
    shape = shape_of(data) + "--dtype float64 "
    numbers, weights = train(worlds, step_dir, shape + batch(""))
    argv = shape + f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv + batch(before), until=7)
    rest, final = train(worlds, step_dir, argv + batch(after) + "--resume auto")
    assert_same_curve(numbers, first + rest)
    assert_close(weights, final, "final weight")


@slow
@pytest.mark.steps(9)
def test_other_files_begin_anew(step_dir, worlds, tmp_path, data):
    """And with another of `--streaming` the run is another one."""
    flags, files = write(tmp_path / "data", "lines")
    shape = shape_of(lambda _: (flags, files)) + batch("")
    argv = shape + f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    train(worlds, step_dir, argv, until=3)
    with pytest.raises(Exception, match="saved with --streaming True, not False"):
        train(worlds, step_dir, argv.replace("--streaming", "") + "--resume auto")
    with open(tmp_path / "data" / "000.jsonl", "ab") as file:
        file.write(lines(["one more"]))
    said = worlds(step_dir, 1).run(workers_streaming.notes_of_setup, argv + "--resume auto")[0]
    assert any("not those it was trained on" in line for line in said)


# --- what goes wrong, and the end -----------------------------------------------------------------


def breaks_late(folder):
    """Flags of a run on a file with a line that is wrong, and is read when the model trains."""
    good, bad = lines(texts(900)), b'{"text": 7}\n'
    (folder / "a.jsonl").write_bytes(good + bad + good)
    flags = f"--streaming --dataset_name {folder} --seq_len 16 --num_hidden_layers 2 "
    return flags + "--eval_tokens 16 --micro_batch_size 64"


@pytest.mark.steps(3, 6)
@pytest.mark.sampled(only=True)
def test_an_error_of_the_thread_is_one_line(step_dir, worlds, tmp_path):
    argv = breaks_late(tmp_path) + on_two(step_dir)
    for said, step in worlds(step_dir, ranks_of(argv)).run(
        workers_streaming.refusal_of_training, argv, 60
    ):
        assert said and said.startswith("--text_column text: ") and "\n" not in said
        assert "a.jsonl, line 901: no text there but int64" in said and step > 3


@slow
@pytest.mark.steps(9)
@pytest.mark.parametrize("layout", ["--pp_size 2", "--dp_size 2", "--tp_size 2"])
def test_an_error_of_the_thread_ends_all_ranks(step_dir, tmp_path, layout):
    result = launch(step_dir, f"{breaks_late(tmp_path)} {layout}", timeout=120)
    said = "".join(result.errors).splitlines()
    assert result.code != 0 and len(result.metrics) > 3
    assert len(said) == 1 and said[0].startswith("error: --text_column text: "), said
    assert "a.jsonl, line 901" in said[0]


@pytest.mark.steps(3)
@pytest.mark.sampled(only=True)
def test_the_thread_ends_with_its_batches(step_dir, worlds, data):
    argv = data("lines")[0] + "--num_hidden_layers 1"
    during, after, seconds = worlds(step_dir, 1).run(workers_streaming.waited, argv, 2)[0]
    assert (during, after) == (1, 0) and seconds > 0


@slow
@pytest.mark.steps(9)
def test_a_run_comes_to_its_end(step_dir):
    flags = "--streaming --max_tokens 4096 --num_hidden_layers 2"
    result = launch(step_dir, flags + on_two(step_dir), timeout=120)
    assert result.code == 0 and "held-out loss" in result.out
    assert result.metrics[-1]["tokens"] == 4096 and not "".join(result.errors).strip()
