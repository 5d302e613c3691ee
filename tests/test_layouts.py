"""N5: loss, gradient norm, every gradient and every weight do not depend on the layout."""

import math

import breaks
import numpy as np
import pytest
import workers_gpu
import workers_steps
from conftest import step_number
from harness import RankError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from launch import launch, ranks_of
from layouts import AXES, ENGINES, SIZES, covering, factorisations, flags_of

# 16 heads and 8 kv heads so that later axes divide them; different sequences in every row.
SHAPE = (
    "--dtype float64 --num_hidden_layers 2 --hidden_size 64 --num_attention_heads 16 "
    "--num_key_value_heads 8 --intermediate_size 96 --seq_len 32 --learning_rate 3e-3 "
    "--warmup_steps 2 --dataset_name random "
)
WHOLE = SHAPE + "--micro_batch_size 8"


def split(count):
    return f"--micro_batch_size {8 // count} --gradient_accumulation_steps {count}"


@pytest.mark.steps(3, 3)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_splits_of_the_batch_over_ten_steps(step_dir, train_on, count):
    reference = train_on(step_dir, 1, WHOLE, 10)
    train_on(step_dir, 1, SHAPE + split(count), 10).assert_same_as(reference)


@pytest.mark.steps(3, 3)
@pytest.mark.parametrize(
    "mistake, seen_in",
    [
        ("halve_norm_gradients", "step 1"),
        ("scale_gradients", "step 1"),
        ("mean_of_micro_batches", "step 1"),
        ("last_micro_batch_only", "step 1"),
    ],
)
def test_a_planted_mistake_is_noticed(step_dir, train_on, mistake, seen_in):
    reference = train_on(step_dir, 1, WHOLE, 2)
    spoiled = train_on(step_dir, 1, SHAPE + split(4), 2, break_it=mistake)
    with pytest.raises(AssertionError, match=seen_in):
        spoiled.assert_same_as(reference)


@pytest.mark.steps(2, 3, only=True)
@pytest.mark.parametrize("size", [2, 3])
def test_replicas_train_like_one(step_dir, train_on, size):
    argv = "--dtype float64 --num_hidden_layers 2 --seq_len 32"
    reference = train_on(step_dir, 1, argv, 3)
    train_on(step_dir, size, argv, 3).assert_same_as(reference, tolerance=0)


@pytest.mark.steps(3, 3, only=True)
def test_a_replica_with_other_data_is_noticed(step_dir, train_on):
    argv = "--dtype float64 --num_hidden_layers 2 --seq_len 32"
    with pytest.raises(AssertionError, match="rank 1 holds another value"):
        train_on(step_dir, 2, argv, 1, break_it="other_data_on_a_replica")


@pytest.mark.steps(3, 3)
@pytest.mark.parametrize(
    "flags, said",
    [("--learning_rate 1e38", "loss nan, .* nan at step [2-9]"),
     ("--learning_rate 1e25 --num_hidden_layers 1", "loss [0-9.e+]+, gradient norm nan at step 2")],
)  # fmt: skip
def test_a_nan_stops_the_run_with_the_step_named(step_dir, train_on, flags, said):
    with pytest.raises(RankError, match=said):
        train_on(step_dir, 1, f"{flags} --warmup_steps 0 --seq_len 8", 9)


def axes_of(step_dir):
    """The axes that a step can split, and "schedule" where it has more than one."""
    return (*AXES, "schedule")[: step_number(step_dir) - 3]


def train_rows(step_dir, train_on, size, subtests):
    rows = [row for row in covering(axes_of(step_dir)) if math.prod(row[:4]) == size]
    if not rows:
        pytest.skip("no pipeline of so many ranks is listed")
    for row in rows:
        argv, whole = flags_of(row, layers=4, most=12)
        with subtests.test(argv.split("seq_len")[1]):
            assert ranks_of(argv) == size
            train_on(step_dir, size, argv, 2).assert_same_as(train_on(step_dir, 1, whole, 2))


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(4)
@pytest.mark.parametrize("size", [size for size in SIZES if size <= 4])
def test_all_layouts_train_the_same_model(step_dir, train_on, size, subtests):
    """Two updates; which options a layout is trained with is said in `layouts.py`."""
    train_rows(step_dir, train_on, size, subtests)


@pytest.mark.slow
@pytest.mark.steps(4)
@pytest.mark.parametrize("size", [size for size in SIZES if size > 4])
def test_all_layouts_of_more_ranks(step_dir, train_on, size, subtests):
    train_rows(step_dir, train_on, size, subtests)


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(4)
@settings(
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],  # a smaller example would take minutes to find
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_shapes_and_layouts_that_nobody_listed(step_dir, train_on, data):
    def whole(low, high):
        return data.draw(st.integers(low, high))

    def one_of(*values):
        return data.draw(st.sampled_from(values))

    # Four tokens and 31 symbols at least: attention over equal tokens has no gradient but rounding.
    axes = axes_of(step_dir)
    layouts = [sizes for size in (2, 3, 4) for sizes in factorisations(size, axes)]
    tp, cp, dp, pp = one_of(*layouts)
    kv_heads = tp * whole(1, 2)
    heads = kv_heads * whole(1, 3)
    sequence_parallel = tp > 1 and one_of(False, True)
    chunk = whole(2, 5) * (tp if sequence_parallel else 1)
    micro_batches, micro_batch_size = whole(1, 3), whole(1, 2)
    shape = (
        "--dtype float64 --dataset_name random --learning_rate 3e-3 --warmup_steps 2 "
        f"--num_hidden_layers {pp + whole(0, 2)} --num_key_value_heads {kv_heads} "
        f"--num_attention_heads {heads} --hidden_size {heads * 2 * whole(1, 4)} "
        f"--intermediate_size {tp * whole(1, 9)} --vocab_size {whole(31, 99)} "
        f"--seq_len {2 * cp * chunk} --tie_word_embeddings {one_of('yes', 'no')} "
    )
    layout = (
        f"--tp_size {tp} --micro_batch_size {micro_batch_size} "
        f"--gradient_accumulation_steps {micro_batches} "
        + (f"--cp_size {cp} " if "cp" in axes else "")
        + (f"--pp_size {pp} " if "pp" in axes else "")
        + ("--sequence_parallel " if sequence_parallel else "")
        + one_of("", "--activation_checkpointing ")
    )
    if "dp" in axes:
        layout += f"--dp_size {dp} --dp_engine {one_of(*ENGINES)}"
    reference = f"{shape}--micro_batch_size {micro_batch_size * micro_batches * dp}"
    train_on(step_dir, tp * cp * dp * pp, shape + layout, 2).assert_same_as(
        train_on(step_dir, 1, reference, 2)
    )


@pytest.mark.slow
@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layout",
    ["--tp_size 2 --cp_size 2", "--tp_size 2 --pp_size 2 --sequence_parallel",
     "--cp_size 2 --dp_size 2 --dp_engine zero3", "--pp_size 2 --dp_size 2 --dp_engine zero1"],
)  # fmt: skip
def test_compiled_layers_along_two_axes(step_dir, train_on, layout):
    """What is compiled is slow to start, so the lists above have it on two ranks only."""
    size = 2 if "--dp_size" in layout else 4
    argv = f"{SHAPE} --gradient_accumulation_steps 2 --micro_batch_size {size} {layout}"
    run = train_on(step_dir, 4, argv + " --compile aot_eager", 2)
    run.assert_same_as(train_on(step_dir, 1, WHOLE, 2))


LAYOUTS_OF = {
    4: ["--tp_size 2 --sequence_parallel"],
    5: ["--cp_size 2", "--tp_size 2 --cp_size 2"],
    6: ["--dp_size 2 --dp_engine zero1", "--dp_size 2 --dp_engine zero3"],
    7: ["--pp_size 2 --dp_size 2"],
    8: ["--pp_size 2 --dp_size 2"],
    9: ["--pp_size 2 --dp_size 2 --pp_engine interleaved --num_hidden_layers 4",
        "--tp_size 2 --sequence_parallel", "--pp_size 2 --dp_size 2 --dp_engine zero2"],
}  # fmt: skip


def assert_same_bits(worlds, step_dir, flags):
    """N6, in float32: the same command again, and one that was stopped and rebuilt at step 2."""
    argv = "--num_hidden_layers 2 --seq_len 32 --gradient_accumulation_steps 2 "
    argv += f"--micro_batch_size 2 --dataset_name random {flags}"
    world = worlds(step_dir, ranks_of(flags))
    whole = world.run(workers_steps.segment, argv, 4, False)
    first = world.run(workers_steps.segment, argv, 2, False)
    rest = world.run(workers_steps.segment, argv, 4, True)
    for one, begun, resumed in zip(whole, first, rest, strict=True):
        assert len(one) == 4 and one == begun + resumed


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(4)
def test_a_layout_gives_the_same_bits_twice_and_when_resumed(step_dir, worlds, subtests):
    for flags in LAYOUTS_OF[step_number(step_dir)]:
        with subtests.test(flags):
            assert_same_bits(worlds, step_dir, flags)


@pytest.mark.slow
@pytest.mark.steps(6, 6)
@pytest.mark.parametrize(
    "flags",
    ["--tp_size 2 --cp_size 2 --dp_size 2", *(f"--dp_size 2 --dp_engine {x}" for x in ENGINES)],
)
def test_an_engine_gives_the_same_bits_twice_and_when_resumed(step_dir, worlds, flags):
    assert_same_bits(worlds, step_dir, flags)


def one_of_each(cases):
    """The cases of a mistake after its first one are slow."""
    names = [name for name, *_ in cases]
    return [
        pytest.param(*case, marks=pytest.mark.slow) if case[0] in names[:place] else case
        for place, case in enumerate(cases)
    ]


# 4 sequences in 2 micro-batches on every dp rank.
MISTAKES_4 = [
    ("no_sum_forward", "--tp_size 2", "another value"),
    ("no_sum_backward", "--tp_size 2", "another value"),
    ("first_slice_everywhere", "--tp_size 2", "initial weight"),
    ("weights_drawn_by_each_rank", "--tp_size 2", "initial weight"),
    ("norm_gradients_of_own_tokens", "--tp_size 2 --sequence_parallel", "another value"),
    ("replicas_counted_twice", "--tp_size 2", "grad_norm of step 1"),
    ("symbols_of_others_found_here", "--tp_size 2", "loss of step 1"),
]
MISTAKES_5 = [
    ("chunks_in_a_row", "--cp_size 2", "loss of step 1"),
    ("positions_from_zero", "--cp_size 2", "loss of step 1"),
    ("late_chunk_for_early", "--cp_size 2", "loss of step 1"),
    ("blocks_added_up", "--cp_size 2", "loss of step 1"),
    ("gradients_never_sent_home", "--cp_size 2", "gradient of .*[kv]_proj|grad_norm of step 1"),
    ("gradients_not_summed", "--cp_size 2", "another value"),
]
MISTAKES_6 = [
    ("gradients_not_summed", "--cp_size 2 --dp_engine naive", "another value"),
    ("gradients_not_summed", "--dp_size 2 --dp_engine naive", "another value"),
    *(("mean_over_ranks", f"--dp_size 2 --dp_engine {e}", "grad_norm of step 1") for e in ENGINES),
    ("same_data_on_every_rank", "--dp_size 2", "loss of step 1"),
    ("only_the_last_micro_batch_is_summed", "--dp_size 2 --dp_engine bucket", "another value"),
    ("every_backward_is_the_last", "--dp_size 2 --dp_engine bucket", "grad_norm of step 1"),
    *(("hooks_vanish", f"--dp_size 2 --dp_engine {engine}", "another value|grad_norm of step 1")
      for engine in ENGINES[1:]),
    *(("update_not_shared", f"--dp_size 2 --dp_engine {engine}", "loss of step 2")
      for engine in ENGINES[2:4]),
    ("weights_not_gathered_anew", "--dp_size 2 --dp_engine zero3", "loss of step 2"),
    ("tables_among_others", "--tp_size 2 --dp_size 4 --vocab_size 97", "another value"),
]  # fmt: skip


def notice(step_dir, train_on, mistake, flags, seen_in):
    argv = SHAPE + flags + " --gradient_accumulation_steps 2 --micro_batch_size "
    whole = SHAPE + "--micro_batch_size 8"
    size = ranks_of(flags)
    argv += str(2 if "--dp_size" in flags else 4)
    with pytest.raises(AssertionError, match=seen_in):
        spoiled = train_on(step_dir, size, argv, 2, break_it=mistake)
        spoiled.assert_same_as(train_on(step_dir, 1, whole, 2))


@pytest.mark.steps(4, 4)
@pytest.mark.parametrize("mistake, flags, seen_in", one_of_each(MISTAKES_4))
def test_a_mistake_of_tensor_parallelism_is_noticed(step_dir, train_on, mistake, flags, seen_in):
    notice(step_dir, train_on, mistake, flags, seen_in)


@pytest.mark.steps(5, 5)
@pytest.mark.parametrize("mistake, flags, seen_in", one_of_each(MISTAKES_5))
def test_a_mistake_of_context_parallelism_is_noticed(step_dir, train_on, mistake, flags, seen_in):
    notice(step_dir, train_on, mistake, flags, seen_in)


@pytest.mark.steps(6, 6)
@pytest.mark.parametrize("mistake, flags, seen_in", one_of_each(MISTAKES_6))
def test_a_mistake_of_data_parallelism_is_noticed(step_dir, train_on, mistake, flags, seen_in):
    notice(step_dir, train_on, mistake, flags, seen_in)


@pytest.mark.steps(6, 6)
@pytest.mark.parametrize("engine", ENGINES[1:4])
def test_many_buckets_give_the_same_numbers(step_dir, train_on, engine):
    argv = SHAPE + "--micro_batch_size 2 --gradient_accumulation_steps 2 --dp_size 2 "
    reference = train_on(step_dir, 1, SHAPE + "--micro_batch_size 8", 2)
    run = train_on(step_dir, 2, argv + f"--dp_engine {engine}", 2, break_it="small_buckets")
    run.assert_same_as(reference)


MISTAKES_7 = [
    ("mean_of_micro_batches", "--pp_size 2", "loss of step 1"),
    ("stages_start_at_layer_zero", "--pp_size 2", "initial weight"),
    ("ends_not_summed", "--pp_size 3 --tie_word_embeddings yes", "another value"),
    ("norm_of_the_own_stage", "--pp_size 2", "grad_norm of step 1"),
    ("every_backward_is_the_last", "--pp_size 2 --dp_size 2", "grad_norm of step 1|another value"),
]


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(7)
@pytest.mark.parametrize("mistake, flags, seen_in", one_of_each(MISTAKES_7))
def test_a_mistake_of_pipelines_is_noticed(step_dir, train_on, mistake, flags, seen_in):
    flags += " --num_hidden_layers 4 --gradient_accumulation_steps 2 --micro_batch_size "
    flags += str(2 if "--dp_size" in flags else 4)
    tied = "--tie_word_embeddings yes" if "tie" in flags else ""
    whole = SHAPE + f"--num_hidden_layers 4 --micro_batch_size 8 {tied}"
    with pytest.raises(AssertionError, match=seen_in):
        spoiled = train_on(step_dir, ranks_of(flags), SHAPE + flags, 2, break_it=mistake)
        spoiled.assert_same_as(train_on(step_dir, 1, whole, 2))


FAST = [
    ("layers_fetched_when_needed", "--dp_size 2 --dp_engine zero3 --micro_batch_size 2"),
    ("sends_waited_for", "--pp_size 2 --pp_engine afab --micro_batch_size 4"),
    ("messages_waited_for", "--tp_size 2 --sequence_parallel --micro_batch_size 4"),
    ("messages_waited_for", "--cp_size 2 --dp_engine zero1 --micro_batch_size 4"),
    *((n, "--micro_batch_size 4") for n in ("adamw_not_fused", "norm_of_copies")),
    ("batches_loaded_when_needed", "--micro_batch_size 4"),
]
COMPILED = ("only_layers_compiled", "--cp_size 2"), ("all_layers_in_one_graph", "")


@pytest.mark.steps(9, 9)
@pytest.mark.parametrize("without, flags", FAST + [pytest.param(
    name, f"{flags} --compile aot_eager --micro_batch_size 4", marks=pytest.mark.slow
) for name, flags in COMPILED])  # fmt: skip
def test_what_makes_a_step_fast_changes_no_number(step_dir, train_on, without, flags):
    argv = SHAPE + f"--gradient_accumulation_steps 2 {flags}"
    fast = train_on(step_dir, ranks_of(flags), argv, 2)
    train_on(step_dir, ranks_of(flags), argv, 2, break_it=without).assert_same_as(fast)


READ_ONCE = {
    1: [""],
    5: ["--tp_size 2 --cp_size 2 --sequence_parallel"],
    6: ["--dp_size 2 --dp_engine zero1", "--dp_size 2 --dp_engine zero3 --micro_batch_size 2"],
    7: ["--dp_size 2 --dp_engine zero2 --pp_size 2"],
    9: ["--pp_size 2 --pp_engine interleaved"],
}


@pytest.mark.sampled(9, only=True)
def test_the_host_reads_the_device_once_a_step(step_dir, worlds, subtests):
    argv = "--num_hidden_layers 4 --seq_len 32 "
    if step_number(step_dir) > 2:
        argv += "--gradient_accumulation_steps 4 --dataset_name random "
    for first, layouts in READ_ONCE.items():
        for flags in layouts if first <= step_number(step_dir) else ():
            with subtests.test(flags):
                world = worlds(step_dir, ranks_of(flags))
                for reads in world.run(workers_gpu.reads_of_a_step, argv + flags):
                    assert reads == ["tolist"]


CURVES = {  # by the step that brings the axis
    3: "--micro_batch_size 8",
    4: "--tp_size 2 --sequence_parallel --micro_batch_size 8",
    5: "--cp_size 2 --micro_batch_size 8",
    6: "--dp_size 2 --dp_engine zero3 --micro_batch_size 4",
    7: "--pp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 4",
}


def assert_bfloat16_trains_like_float32(step_dir, subtests, device, most_ranks=2):
    """Losses and gradient norms of 64 updates, a run for each axis.

    The learning rate is so small that weights which are bfloat16 themselves would move too little.
    """
    argv = f"--device {device} --num_hidden_layers 2 --seq_len 32 --max_tokens 16384 "

    def curve(flags, through=()):  # [64, 2]
        result = launch(step_dir, argv + flags, through=through)
        assert result.code == 0, result.errors
        return np.array([(step["loss"], step["grad_norm"]) for step in result.metrics])

    def differences(flags, through=()):  # of the losses; of the norms, as a share
        found = np.abs(curve(flags + " --dtype bfloat16", through) - exact)
        return found[:, 0].max(), (found[:, 1] / exact[:, 1]).max()

    exact = curve(CURVES[3] + " --dtype float32")
    assert exact[-1, 0] < exact[0, 0] - 1
    for first, flags in CURVES.items():
        if first <= step_number(step_dir) and ranks_of(flags) <= most_ranks:
            with subtests.test(flags):
                loss, norm = differences(flags)
                assert loss < 5e-3 and norm < 3e-2, f"off: loss {loss}, grad_norm {norm} (share)"
    loss, _ = differences(CURVES[3], (breaks.__file__, "weights_in_bfloat16"))
    assert loss > 2e-2, f"rounded weights should be noticed, but the loss is off by {loss}"


@pytest.mark.slow
@pytest.mark.steps(3)
def test_bfloat16_trains_like_float32(step_dir, subtests):
    assert_bfloat16_trains_like_float32(step_dir, subtests, "cpu")
