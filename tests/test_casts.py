"""What step 9 does about memory: one cast of a weight for all, and cheap things computed again."""

import pytest
import workers_memory
import workers_pipeline
import workers_setup
from launch import ranks_of

pytestmark = pytest.mark.steps(9)
SMALL = "--num_hidden_layers 4 --seq_len 16 --micro_batch_size 2 --dataset_name random "
ONE = "--seq_len 64 --dtype bfloat16 --compile aot_eager --dataset_name random "


@pytest.mark.parametrize(
    "flags",
    ["", "--tp_size 2 --sequence_parallel", "--tie_word_embeddings yes",
     pytest.param("--compile aot_eager", marks=pytest.mark.slow),
     "--dp_size 2 --dp_engine zero1", "--dp_size 2 --dp_engine zero3 --tie_word_embeddings yes",
     "--pp_engine interleaved --gradient_accumulation_steps 4"],
)  # fmt: skip
def test_a_shared_cast_changes_no_number(step_dir, train_on, flags):
    argv = SMALL + f"--pp_size 2 --dtype bfloat16 --gradient_accumulation_steps 3 {flags}"
    run, ranks = train_on(step_dir, ranks_of(argv), argv, 3), ranks_of(argv)
    alone = train_on(step_dir, ranks, argv, 3, break_it="casts_by_each_micro_batch")
    run.assert_same_as(alone, tolerance=0)


@pytest.mark.parametrize("flags", ["", "--tp_size 2", "--compile aot_eager"])
def test_a_gradient_through_a_shared_cast_does_not_wait(step_dir, worlds, flags):
    """Or those of all matrices come last, and nothing is left to hide their sum over dp behind."""
    argv = SMALL + f"--pp_size 2 --dtype bfloat16 --gradient_accumulation_steps 2 {flags}"
    for layers in worlds(step_dir, ranks_of(argv)).run(workers_pipeline.order_of_gradients, argv):
        assert len(layers) == 2 * 9
        assert layers == sorted(layers, reverse=True)


def assert_casts_are_kept_once(step_dir, worlds, flags, bytes_each):
    """What autograd keeps under AFAB grows with their number m by what each has of its own: it is
    casts + m x, and so casts = 3 (casts + 2 x) - 2 (casts + 3 x)."""
    argv = SMALL + f"--pp_size 2 --dtype bfloat16 {flags} --gradient_accumulation_steps "
    world = worlds(step_dir, ranks_of(argv))
    two, three = (
        world.run(workers_memory.bytes_kept_of_a_step, f"{argv}{m} --pp_engine afab")
        for m in (2, 3)
    )
    for (of_two, matrices), (of_three, _) in zip(two, three, strict=True):
        assert matrices > 0
        assert 3 * of_two - 2 * of_three == bytes_each * matrices


@pytest.mark.parametrize(
    "flags, bytes_each",
    [
        ("", 2),
        ("--tp_size 2", 2),
        pytest.param("--compile aot_eager", 2, marks=pytest.mark.slow),
        pytest.param("--compile aot_eager --recompute_elementwise", 0, marks=pytest.mark.slow),
        ("--activation_checkpointing", 0),
        ("--dtype float32", 0),
    ],
)
def test_micro_batches_keep_one_cast_of_a_weight(step_dir, worlds, flags, bytes_each):
    assert_casts_are_kept_once(step_dir, worlds, flags, bytes_each)


def test_without_a_compiler_nobody_recomputes(step_dir, worlds):
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, "--recompute_elementwise", 1)
    assert "--recompute_elementwise" in said and "add --compile" in said


@pytest.mark.slow
def test_the_same_numbers_when_recomputed_by_the_compiler(step_dir, train_on):
    argv = SMALL + "--dtype float64 --gradient_accumulation_steps 2 "
    reference = train_on(step_dir, 1, argv, 3)
    again = train_on(step_dir, 1, argv + "--compile aot_eager --recompute_elementwise", 3)
    again.assert_same_as(reference)


@pytest.mark.slow
def test_bytes_that_a_compiled_layer_keeps(step_dir, worlds):
    run, argv = worlds(step_dir, 1).run, ONE
    h, kv, f, heads, tokens = 128, 64, 384, 8, 4 * 64
    # x, q, attention, its projection; k, v; gate, up; the log-sum-exp, and r of two norms
    needed = tokens * (2 * (4 * h + 2 * kv + 2 * f) + 4 * (heads + 2))
    # two norms, the product of gate and up, the weights
    elementwise = tokens * 2 * (2 * h + f) + 2 * (2 * h * h + 2 * kv * h + 3 * f * h)
    for flag, expected in {"--recompute_elementwise ": needed, "": needed + elementwise}.items():
        (two,), (six,) = (
            run(workers_memory.saved_bytes, f"{argv}{flag}--num_hidden_layers {layers}")
            for layers in (2, 6)
        )
        assert six - two == 4 * expected, flag
