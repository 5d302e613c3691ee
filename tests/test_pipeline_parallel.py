"""What pipelines promise beyond equal numbers."""

import itertools
import json

import pytest
import workers_data
import workers_pipeline
import workers_setup
import workers_steps
from conftest import step_number
from launch import ranks_of, sequences_of
from layouts import ENGINES

pytestmark = pytest.mark.steps(7)
SMALL = "--num_hidden_layers 4 --seq_len 16 --micro_batch_size 2 --dataset_name random "


def engines(step_dir):
    """Flags of the schedules that a step has."""
    return [""] if step_number(step_dir) == 7 else ["--pp_engine afab", "--pp_engine 1f1b"]


@pytest.mark.sampled
@pytest.mark.parametrize("stages, micro_batches", [(2, 4), (4, 3), (3, 1)])
def test_a_pipeline_is_bitwise_the_run_without_one(
    step_dir, train_on, stages, micro_batches, subtests
):
    argv = SMALL + f"--gradient_accumulation_steps {micro_batches} --learning_rate 3e-3 "
    for engine in engines(step_dir):
        with subtests.test(engine):
            run = train_on(step_dir, stages, argv + f"--pp_size {stages} {engine}", 3)
            run.assert_same_as(train_on(step_dir, 1, argv, 3), tolerance=0)


@pytest.mark.steps(7, 8)
@pytest.mark.sampled(8, only=True)
def test_layers_are_dealt_out_evenly(step_dir, worlds):
    for layers, stages, expected in ((8, 2, [4, 4]), (7, 3, [2, 2, 3]), (4, 4, [1, 1, 1, 1])):
        argv = f"--num_hidden_layers {layers} --dataset_name random"
        ((dealt, _),) = worlds(step_dir, 1).run(workers_pipeline.dealt_layers, argv, stages)
        assert [len(part) for part in dealt] == expected
        assert sum(dealt, []) == list(range(layers))


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layers, stages, vocab, expected",
    [
        (8, 2, 256, [4, 4]),
        (7, 3, 256, [2, 3, 2]),
        (4, 4, 256, [1, 1, 1, 1]),
        (9, 3, 3000, [2, 4, 3]),  # a table of 3000 x 128 is nearly two layers
        (3, 3, 100_000, [1, 1, 1]),
    ],
)
def test_layers_are_dealt_out_by_cost(step_dir, worlds, layers, stages, vocab, expected):
    argv = f"--num_hidden_layers {layers} --vocab_size {vocab} --dataset_name random"
    ((dealt, largest),) = worlds(step_dir, 1).run(workers_pipeline.dealt_layers, argv, stages)
    assert [len(part) for part in dealt] == expected
    assert sum(dealt, []) == list(range(layers))
    # No other way to cut has a smaller largest cost.
    assert largest[tuple(expected)] == min(largest.values())


def order(stages, rank, count, engine):
    """Forward and backward passes of a stage, by the definition of its schedule."""
    ahead = count if engine.endswith("afab") or not engine else min(stages - 1 - rank, count)
    events = ["f"] * ahead
    events += ["f", "b"] * (count - ahead)
    return events + ["b"] * (count - events.count("b"))


@pytest.mark.sampled(8, only=True)
@pytest.mark.parametrize("stages, count", [(2, 1), (2, 4), (3, 2), (4, 6)])
def test_schedules_and_what_they_keep_alive(step_dir, worlds, stages, count, subtests):
    for engine in engines(step_dir):
        with subtests.test(engine):
            argv = SMALL + f"--pp_size {stages} --gradient_accumulation_steps {count} {engine}"
            results = worlds(step_dir, stages).run(workers_pipeline.schedule_of, argv)
            for rank, (events, alive, together) in enumerate(results):
                assert events == order(stages, rank, count, engine)
                one_f_one_b = engine.endswith("1f1b")
                assert alive == (min(stages - rank, count) if one_f_one_b else count)
                if one_f_one_b:  # each steady pass but the last waits for one in return
                    steady = count - min(stages - 1 - rank, count)
                    ways = (rank < stages - 1) * steady + (rank > 0) * max(0, steady - 1)
                    assert together == ways


@pytest.mark.sampled(7, only=True)
def test_an_output_that_was_sent_is_let_go(step_dir, worlds):
    """However many micro-batches are alive, backward needs no more than the way to it."""
    argv = SMALL + "--pp_size 2 --gradient_accumulation_steps 4"
    assert worlds(step_dir, 2).run(workers_pipeline.outputs_alive, argv) == [0, 0]


@pytest.mark.slow
@pytest.mark.sampled(8, only=True)
@pytest.mark.parametrize(
    "stages, count",
    [(2, 4), *(pytest.param(4, m, marks=pytest.mark.slow) for m in (4, 8, 16))],
)
def test_the_bubble_is_the_formulas(step_dir, worlds, stages, count, subtests):
    """With stages that sleep, as two cores can't compute on four of them at once."""
    for engine in engines(step_dir):
        with subtests.test(engine):
            argv = SMALL + f"--pp_size {stages} --gradient_accumulation_steps {count} {engine}"
            share = max(worlds(step_dir, stages).run(workers_pipeline.bubble, argv, 0.2))
            expected = (stages - 1) / (count + stages - 1)
            assert share == pytest.approx(expected, rel=0.1)


@pytest.mark.sampled(8, 9, only=True)
@pytest.mark.parametrize("count", [1, 4])
def test_steps_share_one_loader(step_dir, worlds, count, subtests):
    """A schedule reads the micro-batches of a step to their end; else the next one begins anew."""
    for engine in engines(step_dir):
        with subtests.test(engine):
            argv = SMALL + f"--pp_size 2 --gradient_accumulation_steps {count} {engine}"
            for events in worlds(step_dir, 2).run(workers_data.loads_and_passes, argv, 2):
                assert events.count("new loader") == 1
                assert events.count("load") == 2 * count + 1


def test_a_timeline_is_a_trace(step_dir, worlds, tmp_path):
    path = tmp_path / "timeline.json"
    argv = SMALL + f"--pp_size 2 --gradient_accumulation_steps 3 --timeline {path}"
    worlds(step_dir, 2).run(workers_pipeline.timeline_of, argv, 2)
    events = json.loads(path.read_text())["traceEvents"]
    for rank in (0, 1):
        mine = [event for event in events if event["tid"] == rank]
        names = [event["name"] for event in mine]
        assert names.count("forward") == names.count("backward") == 6
        assert "wait" in names
        ends = [event["ts"] + event["dur"] for event in mine]
        for end, later in zip(ends, mine[1:], strict=False):
            assert later["ts"] >= end  # one thing at a time


@pytest.mark.sampled
def test_fewer_layers_than_stages(step_dir, worlds):
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, "--pp_size 4 --num_hidden_layers 3", 4)
    assert "--pp_size 4" in said and "--num_hidden_layers 3" in said


@pytest.mark.sampled
def test_a_timeline_that_cannot_be_written(step_dir, worlds):
    argv = "--pp_size 2 --timeline /no/such/place.json"
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, argv, 2)
    assert "--timeline '/no/such/place.json'" in said and "\n" not in said


@pytest.mark.sampled(9, only=True)
@pytest.mark.parametrize("engine", ["zero1", "zero3", "zero1 --pp_engine interleaved"])
def test_the_held_out_loss_of_a_pipeline(step_dir, worlds, engine):
    if "interleaved" in engine and step_number(step_dir) < 9:
        pytest.skip("this schedule comes in step 9")
    argv = "--dtype float64 --num_hidden_layers 4 --seq_len 16 --dataset_name random "
    (alone,) = worlds(step_dir, 1).run(
        workers_steps.trained_and_evaluated, argv + "--micro_batch_size 8"
    )
    argv += "--micro_batch_size 2 --gradient_accumulation_steps 2 --dp_size 2 --pp_size 2 "
    for losses in worlds(step_dir, 4).run(
        workers_steps.trained_and_evaluated, argv + f"--dp_engine {engine}"
    ):
        assert losses == pytest.approx(alone, rel=1e-12)


SEVEN = (
    "--dtype float64 --num_hidden_layers 7 --seq_len 16 --dataset_name random --vocab_size 257 "
    "--learning_rate 3e-3 --warmup_steps 2 "
)


@pytest.mark.slow
@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(7)
@pytest.mark.parametrize(
    "layout",
    [*(f"--pp_size 3 --gradient_accumulation_steps {count}" for count in (8, 2, 1)),
     *(f"--pp_size 2 --dp_size 2 --dp_engine {engine} --gradient_accumulation_steps 4"
       for engine in ENGINES)],
)  # fmt: skip
@pytest.mark.parametrize("tied", ["yes", pytest.param("no", marks=pytest.mark.slow)])
def test_seven_layers_on_two_and_three_stages(step_dir, train_on, subtests, layout, tied):
    """With more micro-batches than stages, fewer, and one; with every data-parallel engine."""
    same = SEVEN + f"--tie_word_embeddings {tied} "
    size = 8 // sequences_of(layout + " --micro_batch_size 1")
    for engine in engines(step_dir):
        with subtests.test(engine):
            argv = same + f"{layout} --micro_batch_size {size} {engine}"
            run = train_on(step_dir, ranks_of(argv), argv, 2)
            run.assert_same_as(train_on(step_dir, 1, same + "--micro_batch_size 8", 2))


INTERLEAVED = "--pp_engine interleaved "


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layers, stages, chunks, count", [(4, 2, 2, 4), (8, 2, 4, 2), (7, 3, 2, 6), (8, 4, 2, 4)]
)
def test_interleaved_is_bitwise_the_run_without_one(
    step_dir, train_on, layers, stages, chunks, count
):
    argv = SMALL + f"--gradient_accumulation_steps {count} --learning_rate 3e-3 "
    argv += f"--num_hidden_layers {layers} "
    flags = INTERLEAVED + f"--pp_size {stages} --pp_chunks {chunks}"
    train_on(step_dir, stages, argv + flags, 3).assert_same_as(
        train_on(step_dir, 1, argv, 3), tolerance=0
    )


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "flags",
    [
        *(f"--dp_size 2 --dp_engine {engine}" for engine in ("naive", "bucket", "zero1", "zero2")),
        "--tp_size 2 --sequence_parallel --tie_word_embeddings yes",
        "--cp_size 2 --activation_checkpointing",
        pytest.param("--cp_size 2 --compile aot_eager", marks=pytest.mark.slow),
        "--pp_chunks 3 --tie_word_embeddings yes",
    ],
)
def test_interleaved_beside_other_axes(step_dir, train_on, flags):
    argv = SEVEN + INTERLEAVED + f"--pp_size 2 --gradient_accumulation_steps 4 {flags} "
    size = 1 if "dp_size" in flags else 2
    tied = "--tie_word_embeddings yes " if "tie_" in flags else ""
    run = train_on(step_dir, ranks_of(argv), argv + f"--micro_batch_size {size}", 2)
    run.assert_same_as(train_on(step_dir, 1, SEVEN + tied + "--micro_batch_size 8", 2))


@pytest.mark.steps(9)
def test_the_plan_of_interleaved_loses_no_tick(step_dir, worlds):
    """2 v m passes a rank, and 2 (p - 1) ticks to fill and to drain: no schedule has fewer."""
    cases = [(p, v, p * k) for p in (2, 3, 4) for v in (2, 3) for k in (1, 2, 4)]
    (plans,) = worlds(step_dir, 1).run(workers_pipeline.interleaved_plans, cases)
    for (ranks, chunks, count), ticks in zip(cases, plans, strict=True):
        assert len(ticks) == 2 * chunks * count + 2 * (ranks - 1)
        done = {}
        for number, tick in enumerate(ticks):
            for rank, one in enumerate(tick):
                if one is not None:
                    kind, stage, micro_batch = one
                    assert stage % ranks == rank
                    before = [("forward", stage - 1), ("backward", stage + 1)][kind == "backward"]
                    if before[1] == ranks * chunks:
                        before = "forward", stage
                    if before[1] >= 0:
                        assert done[(*before, micro_batch)] < number
                    done[kind, stage, micro_batch] = number
        assert len(done) == 2 * ranks * chunks * count
        for rank in range(ranks):
            ways = [1 if tick[rank][0] == "forward" else -1 for tick in ticks if tick[rank]]
            ahead = (chunks - 1) * ranks + 2 * (ranks - rank - 1)
            assert max(itertools.accumulate(ways)) == min(ahead + 1, chunks * count)


@pytest.mark.slow
@pytest.mark.steps(9)
@pytest.mark.parametrize("stages, chunks, count", [(2, 2, 4), (4, 2, 4), (4, 2, 8), (4, 2, 16)])
def test_the_bubble_of_interleaved(step_dir, worlds, stages, chunks, count):
    argv = SMALL + f"--num_hidden_layers 8 --gradient_accumulation_steps {count} {INTERLEAVED}"
    argv += f"--pp_size {stages} --pp_chunks {chunks}"
    share = max(worlds(step_dir, stages).run(workers_pipeline.bubble, argv, 0.5))
    expected = (stages - 1) / (chunks * count + stages - 1)
    assert share == pytest.approx(expected, rel=0.1)


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "flags, named",
    [
        ("--num_hidden_layers 3", "--num_hidden_layers 3"),
        ("--pp_chunks 1", "--pp_engine 1f1b"),
        ("--gradient_accumulation_steps 3", "--gradient_accumulation_steps 3"),
        ("--dp_size 2 --dp_engine zero3", "zero1 or zero2"),
    ],
)
def test_what_cannot_be_interleaved(step_dir, worlds, flags, named):
    argv = f"--pp_size 2 --gradient_accumulation_steps 2 {INTERLEAVED} {flags}"
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, argv, ranks_of(argv))
    assert named in said and "\n" not in said
