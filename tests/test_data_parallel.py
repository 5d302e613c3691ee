"""What the data-parallel engines promise beyond equal numbers."""

import numpy as np
import pytest
import workers_data
import workers_gpu
import workers_setup
import workers_sharding
import workers_steps
from harness import RankError, World
from launch import ranks_of
from layouts import ENGINES

pytestmark = pytest.mark.steps(6, 6)
SMALL = "--num_hidden_layers 4 --seq_len 16 --micro_batch_size 2 --dataset_name random "


@pytest.mark.parametrize("dp, micro_batches", [(2, 1), (2, 3), (3, 2), (6, 1)])
def test_the_ranks_read_the_sequences_of_one_process(step_dir, worlds, dp, micro_batches):
    tokens = np.arange(1000, dtype=np.uint16)
    size = dp * micro_batches
    argv = f"--seq_len 10 --micro_batch_size 2 --gradient_accumulation_steps {size}"
    ((whole, held_out),) = worlds(step_dir, 1).run(workers_data.local_batches_of, argv, tokens, 2)
    argv = f"--seq_len 10 --micro_batch_size 2 --gradient_accumulation_steps {micro_batches} "
    ranks = worlds(step_dir, dp).run(
        workers_data.local_batches_of, argv + f"--dp_size {dp}", tokens, 2
    )
    for index in (0, 1):  # inputs and targets
        read = [batch[index] for batches, _ in ranks for batch in batches]
        every = [batch[index] for batch in whole]
        assert sorted(map(str, np.concatenate(read))) == sorted(map(str, np.concatenate(every)))
    held = [tokens for _, batches in ranks for tokens in batches]
    assert sorted(map(str, np.concatenate(held))) == sorted(map(str, np.concatenate(held_out)))


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.slow) if e != "zero3" else e for e in ENGINES]
)
def test_the_held_out_loss_does_not_depend_on_the_layout(step_dir, worlds, engine):
    argv = "--dtype float64 --num_hidden_layers 2 --seq_len 16 --dataset_name random "
    (alone,) = worlds(step_dir, 1).run(
        workers_steps.trained_and_evaluated, argv + "--micro_batch_size 8"
    )
    argv += f"--micro_batch_size 4 --dp_size 2 --cp_size 2 --dp_engine {engine}"
    for losses in worlds(step_dir, 4).run(workers_steps.trained_and_evaluated, argv):
        assert losses == pytest.approx(alone, rel=1e-12)


@pytest.mark.sampled(6, 9)
@pytest.mark.steps(6)
@pytest.mark.parametrize("most", [300_000, 25 * 2**20])
def test_buckets_are_true_to_their_size(step_dir, worlds, most):
    buckets, others = worlds(step_dir, 2).run(workers_sharding.buckets_of, SMALL, most)
    assert buckets == others
    outside = [bucket for bucket in buckets if not any(".layers." in name for name, _ in bucket)]
    assert sorted(name for ((name, _),) in outside) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    layers = [[size for _, size in bucket] for bucket in buckets if bucket not in outside]
    assert len(layers) > 4 if most < 2**20 else len(layers) == 1
    for sizes, following in zip(layers, [*layers[1:], [most]], strict=True):
        assert sum(sizes) <= most or len(sizes) == 1
        assert sum(sizes) + following[0] > most, "it would fit into the bucket before"


@pytest.mark.steps(9)
def test_no_tag_of_a_parameter_hides_what_a_tensor_has(step_dir, worlds):
    """`chunk` is a method: where it was no tag, each parameter had another one of these."""
    argv = SMALL + "--pp_size 2 --tie_word_embeddings yes"
    assert worlds(step_dir, 2).run(workers_setup.tags_of_a_tensor, argv) == [[], []]


@pytest.mark.parametrize("engine", ["bucket", "zero1", "zero2", "zero3"])
def test_reductions_begin_while_backward_goes_on(step_dir, worlds, engine):
    argv = SMALL + f"--dp_size 2 --dp_engine {engine} --gradient_accumulation_steps 2"
    for missing in worlds(step_dir, 2).run(workers_sharding.reductions_during_backward, argv):
        passes = 1 if engine in ("bucket", "zero1") else 2  # the last micro-batch's, or each one's
        assert missing.count(0) == passes, missing
        assert len(missing) >= 5 * passes


@pytest.mark.parametrize(
    "flags", ["", "--tie_word_embeddings yes", "--tp_size 2 --sequence_parallel"]
)
def test_zero3_gathers_in_bfloat16_the_numbers_that_a_layer_would_cast(step_dir, train_on, flags):
    argv = SMALL + "--dtype bfloat16 --gradient_accumulation_steps 2 --dp_size 2 --dp_engine "
    whole, sharded = (
        train_on(step_dir, ranks_of(f"{argv} {flags}"), f"{argv} {engine} {flags}", 1)
        for engine in ("zero2", "zero3")
    )
    assert whole.metrics[0]["loss"] == sharded.metrics[0]["loss"]
    for name, gradient in whole.gradients[0].items():
        assert np.array_equal(gradient, sharded.gradients[0][name]), name


def test_the_next_layer_is_gathered_ahead(step_dir, worlds):
    argv = SMALL + "--dp_size 2 --dp_engine zero3"
    for gathered in worlds(step_dir, 2).run(workers_sharding.gathers_of_a_step, argv):
        # (what is gathered, the layer whose turn it is): forward 0 … 3, backward 3 … 0. Outside are
        # the norms, the head and, when it is used, the embedding.
        assert gathered == [
            ("outside", None), ("outside", None), (0, None), ("outside", None),
            (1, 0), (2, 1), (3, 2), (2, 3), (1, 2), (0, 1),
        ]  # fmt: skip


@pytest.mark.parametrize("tied", ["no", "yes"])
def test_an_embedding_is_whole_only_while_it_is_used(step_dir, worlds, tied):
    """Of zero3, untied: its backward pass needs no weights. A tied one is the head, too."""
    argv = SMALL + f"--dp_size 2 --dp_engine zero3 --tie_word_embeddings {tied}"
    for size in worlds(step_dir, 2).run(workers_sharding.bytes_of_the_embedding_at_the_loss, argv):
        assert size == (0 if tied == "no" else 256 * 128 * 4)


@pytest.mark.parametrize("dp", [2, 4])
def test_owned_bytes_are_those_of_the_zero_paper(step_dir, worlds, dp):
    """ZeRO (arXiv:1910.02054), section 5; in float32 weights and gradients 4 N, Adam 8 N.

    zero1 lets go of the whole gradients as they are summed: after a step a shard of them is left.
    In backward a bucket is filling up, and one is being sent, with what is received of it.
    """
    argv = SMALL + f"--gradient_accumulation_steps 2 --dp_size {dp} --dp_engine "
    for engine in ENGINES:
        zero = int(engine[-1]) if "zero" in engine else 0
        for found in worlds(step_dir, dp).run(workers_sharding.owned_bytes, argv + engine, 300_000):
            whole = 4 * found["parameters"]
            shares = {
                "weights": 1 / dp if zero > 2 else 1,
                "gradients": 1 / dp if zero > 0 else 1,
                "moments": 2 / dp if zero > 0 else 2,
            }
            for kind, share in shares.items():
                words = f"bytes of {kind} with {engine}: {found[kind]}, not {share * whole}"
                assert found[kind] == pytest.approx(share * whole, rel=2e-3), words
            most = whole * ((zero < 2) + (zero > 0) / dp)
            passing = 3 * (300_000 if zero < 3 else whole / 4) if zero else 0  # 4 layers
            words = f"most bytes of gradients with {engine}, at most {most} and {passing} passing"
            assert 0.998 * most <= found["most gradients"] <= 1.002 * most + passing, words


@pytest.mark.parametrize("flags", ["", "--activation_checkpointing"])
def test_zero3_is_pytorchs_fully_shard(step_dir, train_on, flags):
    """Losses, norms, gradients and weights, in float64."""
    argv = "--dtype float64 --num_hidden_layers 3 --seq_len 32 --learning_rate 3e-3 "
    argv += f"--warmup_steps 2 --gradient_accumulation_steps 2 --dp_size 2 {flags} "
    ours = train_on(step_dir, 2, argv + "--dp_engine zero3", 4)
    theirs = train_on(step_dir, 2, argv, 4, break_it="fully_sharded")
    ours.assert_same_as(theirs)


def test_kernel_times_of_several_runs(step_dir):
    """A table with every rank of every run; the second one finds the processes in touch."""
    argv = f"--top 1 {step_dir} {SMALL} --device cpu --dp_size 2 --max_tokens 200 "
    argv += "-- -- --dp_engine zero3"
    kernels = [{"name": "nccl_all", "ts": 0, "dur": 1e4}, {"name": "gemm", "ts": 5e3, "dur": 2e4}]
    with World(step_dir, 2) as world:  # of its own: a later one would find `pg` changed
        said, nothing = world.run(workers_gpu.printed_kernel_times, argv, kernels)
    assert not nothing
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| `")]
    names = ["", "--dp_engine zero3"]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in names for _ in range(2)]
    assert [row[3] for row in rows] == ["0", "1", "0", "1"]
    assert {tuple(row[4:7]) for row in rows} == {("25.0", "10.0", "0.0")}
    assert said.count("20.00 ms      1 x  gemm") == 2


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layout",
    [
        "--tp_size 2 --dp_size 2 --dp_engine zero1 --sequence_parallel",
        pytest.param("--cp_size 3 --dp_engine zero3 --compile aot_eager", marks=pytest.mark.slow),
        "--pp_size 2 --dp_size 2 --dp_engine zero3",
        pytest.param("--pp_size 2 --pp_engine interleaved", marks=pytest.mark.slow),
    ],
)
def test_a_rank_alone_holds_what_it_holds_among_others(step_dir, worlds, layout):
    argv = f"{SMALL} --gradient_accumulation_steps 4 {layout}"
    argv += " --seq_len 24" if "cp" in layout else ""
    among = worlds(step_dir, ranks_of(layout)).run(workers_sharding.owned_bytes, argv)
    for rank, held in enumerate(among):
        (alone,) = worlds(step_dir, 1).run(
            workers_sharding.owned_bytes_alone, argv, rank, len(among)
        )
        assert alone == held


def test_kernel_times_of_one_rank(step_dir):
    argv = f"--rank 2 {step_dir} {SMALL} --device cpu --max_tokens 400 -- --dp_size 4 -- "
    argv += "--dp_size 3"
    kernels = [{"name": "gemm", "ts": 0, "dur": 2e4}]
    with World(step_dir, 1) as world:
        (said,) = world.run(workers_gpu.printed_kernel_times, argv, kernels)
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `--dp_size 4`", "| `--dp_size 3`"]
    assert [row[3] for row in rows] == ["2", "2"]
    with World(step_dir, 1) as world, pytest.raises(RankError, match="error: --rank 2: .* 2 ranks"):
        world.run(workers_gpu.printed_kernel_times, argv.replace("_size 3", "_size 2"), kernels)


def test_wrong_calls_of_data_parallelism(step_dir, worlds):
    world = worlds(step_dir, 1)
    (said,) = world.run(workers_setup.refusal, "--dp_engine zero4", 1)
    assert "--dp_engine" in said and "zero3" in said
    (said,) = world.run(workers_setup.refusal, "--dp_size 3", 2)
    assert "dp_size 3" in said and "but 2 started" in said
