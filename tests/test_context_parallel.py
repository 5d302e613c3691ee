"""What context parallelism promises beyond equal numbers."""

import numpy as np
import pytest
import workers_context
import workers_data
import workers_memory
import workers_messages
import workers_setup
from launch import ranks_of

pytestmark = pytest.mark.steps(5, 5)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_every_pair_is_attended_once_and_all_ranks_do_the_same(step_dir, worlds, cp):
    seq = 4 * cp
    (found,) = worlds(step_dir, 1).run(workers_context.attended_pairs, seq, cp)
    assert sum(found) == pytest.approx(np.tril(np.ones((seq, seq))))
    work = [int(mask.sum()) for mask in found]
    assert len(set(work)) == 1


@pytest.mark.parametrize(
    "dtype, bound", [("float64", 1e-14), ("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)]
)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("kernel", [None, "Plain"])
def test_merged_blocks_are_the_whole_softmax(
    step_dir, worlds, dtype, bound, heads, kv_heads, kernel
):
    world = worlds(step_dir, 1)
    args = dtype, heads, kv_heads, 24, "cpu", kernel
    ((errors, kernels),) = world.run(workers_context.blocks_error, *args)
    assert max(errors.values()) < bound, errors
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert ({fused, fused + "_backward"} <= kernels) == (kernel is None)


@pytest.mark.parametrize("queries, keys", [(32, 32), (16, 32), (32, 16), (2, 2)])
def test_the_plain_kernel_holds_a_chunk_by_a_chunk(step_dir, worlds, queries, keys):
    chunk = 16 if queries > 2 else 1
    ((rows, covered),) = worlds(step_dir, 1).run(workers_context.plain_rows, queries, keys)
    assert covered == list(range(queries))
    assert rows * keys <= max(chunk * chunk, keys)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_no_rank_builds_the_matrix_of_scores(step_dir, worlds, dtype):
    argv = "--num_hidden_layers 1 --seq_len 1024 --micro_batch_size 1 --hidden_size 32 "
    argv += "--intermediate_size 32 --num_attention_heads 2 --num_key_value_heads 1 "
    argv += f"--vocab_size 64 --dataset_name random --cp_size 2 --dtype {dtype}"
    for shape in worlds(step_dir, 2).run(workers_memory.largest_tensor, argv):
        assert np.prod(shape) <= 1024 * 64, shape  # [seq, vocab]; the scores are 8 times that


def test_blocks_travel_while_others_are_computed(step_dir, worlds):
    argv = "--num_hidden_layers 1 --seq_len 24 --dataset_name random --cp_size 3"
    for events in worlds(step_dir, 3).run(workers_messages.order_of_events, argv):
        ring = [event for event in events if event.startswith(("exchange", "block"))]
        begins, waits, block = "exchange begins", "exchange is waited for", "block"
        forward = 2 * [begins, block, waits, waits] + [block]  # a send and a receive each
        assert ring[: len(forward)] == forward
        # Backward begins with the block that came last, and ends with the own one. Gradients of
        # another rank's keys and values leave after their block, and those that come home meanwhile
        # are waited for after the next one.
        assert ring[len(forward) :] == [
            begins, block, begins, waits, waits,
            block, begins, waits, waits,
            block, waits, waits,
        ]  # fmt: skip


def test_a_rank_reads_its_part_of_each_sequence(step_dir, worlds):
    tokens = np.arange(1000, dtype=np.uint16)
    argv = "--seq_len 12 --micro_batch_size 4"
    ((whole, _),) = worlds(step_dir, 1).run(workers_data.local_batches_of, argv, tokens, 3)
    parts = worlds(step_dir, 3).run(workers_data.local_batches_of, argv + " --cp_size 3", tokens, 3)
    chunks = [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    for ((inputs, targets, positions),), chunk in zip(
        (part for part, _ in parts), chunks, strict=True
    ):
        assert positions.tolist() == chunk
        assert np.array_equal(inputs, whole[0][0][:, chunk])
        assert np.array_equal(targets, whole[0][1][:, chunk])


WRONG = {
    "--cp_size 2 --seq_len 130": ("--cp_size 2", "--seq_len 130", "multiple of 4"),
    "--cp_size 3 --seq_len 128": ("--cp_size 3", "--seq_len 128", "multiple of 6"),
    "--cp_size 2 --tp_size 4 --sequence_parallel --seq_len 12": (
        "--sequence_parallel", "--seq_len 12", "--cp_size 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_calls_of_context_parallelism(step_dir, worlds, flags):
    size = ranks_of(flags)
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, flags, size)
    assert all(word in said for word in WRONG[flags]), said
