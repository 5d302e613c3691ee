"""What tensor parallelism promises beyond equal numbers."""

import numpy as np
import pytest
import workers_memory
import workers_messages
import workers_setup

pytestmark = pytest.mark.steps(4, 4)
SMALL = "--num_hidden_layers 1 --seq_len 32 --micro_batch_size 2 --dataset_name random "


@pytest.mark.parametrize("size, symbols", [(2, [128, 129]), (4, [64, 64, 64, 65])])
def test_a_vocabulary_is_dealt_out_without_padding(step_dir, worlds, size, symbols):
    argv = SMALL + f"--vocab_size 257 --tp_size {size}"
    found = worlds(step_dir, size).run(workers_setup.shapes_of, argv)
    assert [shapes["lm_head.weight"][0] for shapes in found] == symbols
    assert [shapes["model.embed_tokens.weight"][0] for shapes in found] == symbols


@pytest.mark.parametrize("flags", ["", "--sequence_parallel"])
def test_no_rank_ever_holds_all_logits(step_dir, worlds, flags):
    argv = SMALL + "--vocab_size 4096 --hidden_size 16 --tp_size 2 " + flags
    for shape in worlds(step_dir, 2).run(workers_memory.largest_tensor, argv):
        assert np.prod(shape) == 2 * 32 * 2048, shape


@pytest.mark.parametrize("flags", ["", "--sequence_parallel"])
def test_sums_of_the_backward_pass_overlap_with_products(step_dir, worlds, flags):
    """Between the start of each sum and the wait for it, the weights' gradients are computed."""
    events = worlds(step_dir, 2).run(
        workers_messages.order_of_events, SMALL + "--tp_size 2 " + flags
    )[0]
    kind = "reduce_scatter" if flags else "all_reduce"
    begun = [i for i, event in enumerate(events) if event == f"{kind} begins"]
    products = []
    for start in begun:
        end = events.index(f"{kind} is waited for", start)
        assert set(events[start + 1 : end]) == {"product"}
        products.append(end - start - 1)
    assert products == [1, 2, 3]  # the head; gate and up; q, k and v
    if flags:  # and x is gathered again during the products before
        assert events.count("all_gather begins") == 3
        for start, event in enumerate(events):
            if event == "all_gather begins":
                assert events[start + 1] == "product"


def test_sequence_parallelism_keeps_less(step_dir, worlds):
    argv = "--num_hidden_layers 4 --seq_len 128 --dataset_name random --tp_size 4 "
    plain = worlds(step_dir, 4).run(workers_memory.saved_bytes, argv)[0]
    split = worlds(step_dir, 4).run(workers_memory.saved_bytes, argv + "--sequence_parallel")[0]
    # In a layer the inputs of both norms, what both norms return and what they keep of it: here
    # five activations of the whole width, of which three quarters go.
    whole = 4 * 128 * 128 * 4
    assert plain - split > 4 * 3 * whole * 3 / 4


def test_a_group_of_one_leaves_the_model_alone(step_dir, worlds):
    (names,) = worlds(step_dir, 1).run(workers_setup.module_kinds, SMALL)
    assert "ColumnParallelLinear" not in names and "Linear" in names


WRONG = {
    "--tp_size 3": ("--tp_size 3", "--num_attention_heads 8", "divisor"),
    "--tp_size 8": ("--tp_size 8", "--num_key_value_heads 4", "divisor"),
    "--tp_size 2 --intermediate_size 385": ("--tp_size 2", "--intermediate_size 385"),
    "--tp_size 4 --vocab_size 3": ("--tp_size 4", "--vocab_size 3"),
    "--tp_size 4 --sequence_parallel --seq_len 126": ("--sequence_parallel", "--seq_len 126"),
    "--tp_size 0": ("--tp_size", "'0'", "1 or more"),
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_calls_of_tensor_parallelism(step_dir, worlds, flags):
    size = int(flags.split()[1]) or 1
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, flags, size)
    assert all(word in said for word in WRONG[flags]), said


@pytest.mark.parametrize("flags, started", [("", 2), ("--tp_size 2", 1), ("--tp_size 4", 2)])
def test_a_world_of_another_size_than_the_layout(step_dir, worlds, flags, started):
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, flags, started)
    assert f"but {started} started" in said and "--nproc_per_node" in said
