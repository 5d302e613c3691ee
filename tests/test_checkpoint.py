"""Checkpoints: complete or absent, the same run on any layout, one line for a damaged one."""

import json

import numpy as np
import pytest
import workers_setup
import workers_trainer
from harness import assemble, assert_close
from launch import ranks_of, sequences_of
from layouts import ENGINES

pytestmark = pytest.mark.steps(9)
SHAPE = (
    "--num_hidden_layers 4 --hidden_size 64 --num_attention_heads 8 --num_key_value_heads 4 "
    "--intermediate_size 96 --vocab_size 257 --seq_len 32 --dataset_name random "
    "--learning_rate 3e-3 --warmup_steps 2 "
)
STEPS = f"--max_tokens {4 * 8 * 32} "  # four of 8 sequences


def batch(layout, micro_batches=2):
    """Flags for 8 sequences a step."""
    dp = sequences_of(layout + " --micro_batch_size 1")
    size = 8 // dp // micro_batches
    return f"{layout} --micro_batch_size {size} --gradient_accumulation_steps {micro_batches} "


def train(worlds, step_dir, argv, until=None):
    """(numbers, full weights) of a run in a world of the size that it wants."""
    ranks = worlds(step_dir, ranks_of(argv)).run(workers_trainer.train_and_save, argv, until)
    numbers = ranks[0][0]
    assert all(other == numbers for other, _ in ranks)
    return numbers, assemble([held for _, held in ranks])


def names_in(directory):
    """What a reader sees in a directory."""
    return sorted(path.name for path in directory.iterdir() if path.name[0] != ".")


def assert_same_curve(reference, numbers, tolerance=1e-10):
    arrays = (dict(enumerate(np.array(run).T)) for run in (reference, numbers))
    assert_close(*arrays, "curve", tolerance)


@pytest.mark.parametrize("shape", [(7,), (4, 3), (3, 5), (1, 4), (4, 1)])
def test_rectangles_are_what_a_rank_holds(step_dir, worlds, shape):
    ((count, wrong),) = worlds(step_dir, 1).run(workers_trainer.wrong_rectangles, shape)
    assert count > 10 and not wrong


ROUTES = [
    ("", "--tp_size 2 --dp_size 2 --dp_engine zero1"),
    ("--tp_size 2 --dp_size 2 --dp_engine zero3", "--pp_size 4"),
    ("--tp_size 2 --sequence_parallel --pp_size 2", "--cp_size 2 --dp_size 2 --dp_engine zero2"),
    ("--cp_size 4 --dp_engine zero1", ""),
    ("--pp_size 2 --dp_size 2 --dp_engine zero3 --pp_engine afab", "--tp_size 4"),
    ("--dp_size 4 --dp_engine zero3", "--dp_size 2 --dp_engine zero3"),
]


TIED = [route for route in ROUTES if "pp_size" in "".join(route)]


@pytest.mark.parametrize(
    "tied, routes",
    [("no", ROUTES), ("yes", TIED[:1]), pytest.param("yes", TIED[1:], marks=pytest.mark.slow)],
)
def test_a_run_goes_on_on_another_layout(step_dir, worlds, tmp_path, subtests, tied, routes):
    shape = SHAPE + STEPS + f"--dtype float64 --tie_word_embeddings {tied} "
    numbers, weights = train(worlds, step_dir, shape + batch(""))
    for place, (before, after) in enumerate(routes):
        with subtests.test(f"{before} -> {after}"):
            argv = shape + f"--checkpoint_dir {tmp_path / str(place)} --save_every 2 "
            first, _ = train(worlds, step_dir, argv + batch(before), until=2)
            rest, final = train(worlds, step_dir, argv + batch(after) + "--resume auto")
            assert [n[0] for n in rest] == [3, 4]
            assert_same_curve(numbers, first + rest)
            assert_close(weights, final, "final weight")


def test_any_engine_goes_on_with_any_other(step_dir, worlds, tmp_path, subtests):
    shape = SHAPE + STEPS + "--dtype float64 --num_hidden_layers 2 "
    numbers, weights = train(worlds, step_dir, shape + batch(""))
    for one in ENGINES:
        path = tmp_path / one
        argv = shape + batch("--dp_size 2")
        train(
            worlds, step_dir, argv + f"--dp_engine {one} --checkpoint_dir {path} --save_every 2", 2
        )
        for other in ENGINES:
            with subtests.test(f"{one} -> {other}"):
                resume = f"--dp_engine {other} --resume {path / 'step_00000002'}"
                rest, final = train(worlds, step_dir, argv + resume)
                assert_same_curve(numbers[2:], rest)
                assert_close(weights, final, "final weight")


@pytest.mark.parametrize(
    "layout",
    ["", "--dp_size 2 --dp_engine zero2", "--tp_size 2 --cp_size 2", "--pp_size 2 --dp_size 2"]
    + [f"--tp_size 2 --dp_size 2 --dp_engine {engine}" for engine in ("zero1", "zero3")],
)
def test_the_same_layout_goes_on_bit_for_bit(step_dir, worlds, tmp_path, layout):
    """N6, in float32, through the files."""
    argv = SHAPE + STEPS + batch(layout)
    numbers, weights = train(worlds, step_dir, argv)
    argv += f"--checkpoint_dir {tmp_path / 'run'} --save_every 1 "
    first, _ = train(worlds, step_dir, argv, until=2)
    rest, final = train(worlds, step_dir, argv + "--resume auto")
    assert first + rest == numbers
    assert_close(weights, final, "final weight", tolerance=0)


def test_the_last_ones_are_kept(step_dir, worlds, tmp_path):
    run = tmp_path / "run"
    left = run / ".step_00000001-0123abcd"  # by a run that was killed inside a save
    left.mkdir(parents=True)
    (left / "00000_0000.safetensors").write_text("half")
    argv = SHAPE + STEPS + batch("--dp_size 2")
    argv += f"--checkpoint_dir {run} --save_every 1 --keep_last 2"
    train(worlds, step_dir, argv)
    assert names_in(run) == ["step_00000003", "step_00000004"]
    about = json.loads((run / "step_00000004" / "checkpoint.json").read_text())["about"]
    assert about["step"] == 4 and about["flags"]["dp_size"] == 2
    files = [f"0000{rank}_0000.safetensors" for rank in (0, 1)]
    assert about["files"].keys() == {*files}
    assert names_in(run / "step_00000004") == [*files, "checkpoint.json"]
    sizes = [about["files"][file]["bytes"] for file in files]
    assert max(sizes) < 1.2 * min(sizes), "one rank writes more than its share"


def test_one_every_so_many_steps_is_kept(step_dir, worlds, tmp_path):
    run = tmp_path / "run"
    argv = SHAPE + f"--max_tokens {7 * 8 * 32} " + batch("")
    argv += f"--checkpoint_dir {run} --save_every 1 --keep_last 1 --keep_every 3"
    train(worlds, step_dir, argv)
    assert names_in(run) == [f"step_{step:08d}" for step in (3, 6, 7)]


@pytest.fixture(scope="module")
def saved(step_dir, worlds, tmp_path_factory):
    """(directory, flags) of a run of one process with checkpoints of steps 2 and 4."""
    run = tmp_path_factory.mktemp("saved") / "run"
    argv = SHAPE + STEPS + batch("") + f"--checkpoint_dir {run} --save_every 2 "
    worlds(step_dir, 1).run(workers_trainer.train_and_save, argv)
    return run, argv


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--seed 7 --resume auto", ("--seed 42", "not 7")),
        ("--seq_len 16 --resume auto", ("--seq_len 32", "not 16")),
        ("--micro_batch_size 8 --resume auto", ("global batch", "--dp_size", " 8, not 16")),
        ("--num_hidden_layers 3 --resume auto", ("num_hidden_layers 4", "not 3")),
        ("--tie_word_embeddings yes --resume auto", ("tie_word_embeddings False", "not True")),
        ("--tokenizer_name other --resume auto", ("--tokenizer_name bytes", "not other")),
        ("--resume {run}/step_00000002", ("up to step_00000004", "--resume auto")),
        ("", ("--checkpoint_dir", "a run is there already", "--resume auto")),
        ("--resume /no/such/place", ("--resume /no/such/place", "no checkpoint")),
    ],
)
def test_a_run_that_is_another_one_is_refused(step_dir, worlds, saved, flags, words):
    run, argv = saved
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, argv + flags.format(run=run), 1)
    assert all(word in said for word in words), said
    assert "\n" not in said


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--save_every 2", ("--save_every", "--checkpoint_dir")),
        ("--resume auto", ("--resume auto", "--checkpoint_dir")),
        ("--keep_every 2", ("--keep_every", "--checkpoint_dir")),
        ("--checkpoint_dir /dev/null/run", ("--checkpoint_dir /dev/null/run", "name a directory")),
        ("--checkpoint_dir /dev/null", ("--checkpoint_dir /dev/null: File", "name a directory")),
    ],
)
def test_a_place_is_needed(step_dir, worlds, flags, words):
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, flags, 1)
    assert all(word in said for word in words), said


def test_hosts_that_share_no_directory(step_dir, worlds, tmp_path):
    argv = SHAPE + STEPS + batch("--dp_size 2")
    for said in worlds(step_dir, 2).run(workers_trainer.saved_apart, argv, tmp_path):
        assert said and "all hosts share" in said
    assert not list(tmp_path.glob("*/step_*"))


def test_a_disk_that_refuses_is_one_line(step_dir, worlds, tmp_path):
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        (tmp_path / rank / "RESUME").mkdir()  # a directory where a file should be
    argv = SHAPE + STEPS + batch("--dp_size 2")
    for said in worlds(step_dir, 2).run(workers_trainer.saved_apart, argv, tmp_path):
        assert said and said.startswith("--checkpoint_dir ") and "\n" not in said


def test_a_signal_in_the_last_step_leaves_nothing_to_resume(step_dir, worlds, tmp_path):
    argv = SHAPE + STEPS + batch("--dp_size 2") + f"--checkpoint_dir {tmp_path / 'run'}"
    for step, _, stop in worlds(step_dir, 2).run(workers_trainer.asked_to_stop, argv, 1, 4):
        assert step == 4 and not stop
    assert names_in(tmp_path / "run") == ["step_00000004"]


def test_auto_begins_anew_where_there_is_none(step_dir, worlds, tmp_path):
    argv = SHAPE + STEPS + batch("") + f"--checkpoint_dir {tmp_path} --resume auto "
    numbers, _ = train(worlds, step_dir, argv)
    assert [n[0] for n in numbers] == [1, 2, 3, 4]
    again, _ = train(worlds, step_dir, argv)  # at its end already
    assert again == []


@pytest.mark.parametrize("layout", ["--tp_size 2", "--dp_size 2", "--pp_size 2"])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(step_dir, worlds, tmp_path, layout):
    argv = SHAPE + STEPS + batch(layout) + f"--checkpoint_dir {tmp_path} "
    for asked in (0, 1):
        path = tmp_path / str(asked)
        flags = argv.replace(str(tmp_path), str(path))
        found = worlds(step_dir, 2).run(workers_trainer.asked_to_stop, flags, asked, 2)
        assert found == [(2, rank == asked, True) for rank in (0, 1)]
        assert (path / "RESUME").read_text() == "step_00000002\n"
        rest, _ = train(worlds, step_dir, flags + "--resume auto")
        assert [n[0] for n in rest] == [3, 4]
        assert not (path / "RESUME").exists()
