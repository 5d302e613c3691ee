"""The milestones of step 4: each piece of tensor parallelism on its ranks, beside the whole."""

import pytest
import step4_layers
from same import SMALL, demand, same_step
from workers_messages import ledger_of

pytestmark = pytest.mark.usefixtures("worlds")


# --- 1. the sum at the end of a block -------------------------------------------------------------


@pytest.mark.milestone(4, 1)
@pytest.mark.parametrize("dim, length", [(0, 7), (1, 6)])
def test_a_slice_of_a_weight(step_dir, worlds, dim, length):
    ranks = worlds(step_dir, 3).run(step4_layers.a_part_of_a_weight, dim, timeout=20)
    found = f"with part(weight, {dim}, group) the ranks hold {ranks} of {length} along dim {dim}"
    demand(sum(ranks, []) == [*range(length)], f"{found}; each index belongs to one rank, in order")
    lengths = [len(indices) for indices in ranks]
    demand(max(lengths) - min(lengths) < 2, f"{found}; their lengths may differ by one")


@pytest.mark.milestone(4, 1)
def test_a_sum_over_its_input_is_told_to_autograd(step_dir, worlds):
    worlds(step_dir, 2).run(step4_layers.sum_over_its_input, timeout=20)


@pytest.mark.milestone(4, 1)
@pytest.mark.parametrize("size", [2, 3])
def test_a_layer_cut_by_input_features(step_dir, worlds, size):
    worlds(step_dir, size).run(step4_layers.row_parallel, False, timeout=20)


# --- 2. one sum for q, k and v --------------------------------------------------------------------


@pytest.mark.milestone(4, 2)
@pytest.mark.parametrize("size", [2, 3])
def test_layers_cut_by_output_features(step_dir, worlds, size):
    for traffic in worlds(step_dir, size).run(step4_layers.column_parallel, False, timeout=20):
        found = f"Two layers with one input send {traffic} backward. One all_reduce is enough: "
        demand(traffic == {"all_reduce": 1}, found + "add on each rank before you send")


def check_overlap(world, kind):
    for events in world.run(step4_layers.around_the_sum, kind, timeout=20):
        found = f"After the start of the {kind} backward does this: {', '.join(events)}. Start it "
        rule = "with async_op=True, compute the gradients of both weights, then wait for it"
        demand(events == ["product", "product", "wait"], found + rule)


@pytest.mark.milestone(4, 2)
def test_the_sum_travels_while_the_rank_computes(step_dir, worlds):
    check_overlap(worlds(step_dir, 2), "all_reduce")


# --- 3. the ends of the model ---------------------------------------------------------------------


@pytest.mark.milestone(4, 3)
@pytest.mark.parametrize("size", [2, 3])
def test_embedding_and_loss(step_dir, worlds, size):
    world = worlds(step_dir, size)
    world.run(step4_layers.embedding, False, timeout=20)
    for forward, backward in world.run(step4_layers.loss_of_parts, timeout=20):
        sent = sum(sent for _, sent in forward.values())
        enough = size * 3 * 12 * 8  # three numbers a token, in float64
        demand(sent <= enough, f"the loss sends {sent} bytes; two numbers a token are enough")
        demand(not backward, f"the loss sends {dict(backward)} backward; nothing is needed")


# --- 4. sequence parallelism ----------------------------------------------------------------------


@pytest.mark.milestone(4, 4)
@pytest.mark.parametrize("size", [2, 3])
def test_sequence_parallelism(step_dir, worlds, size):
    world = worlds(step_dir, size)
    world.run(step4_layers.norm, timeout=20)
    world.run(step4_layers.row_parallel, True, timeout=20)
    for traffic in world.run(step4_layers.column_parallel, True, timeout=20):
        found = f"Two layers with one input send {traffic} backward. x should be gathered once "
        rule = "more, and its gradient reduce-scattered once"
        demand(traffic == {"all_gather": 1, "reduce_scatter": 1}, found + rule)
    world.run(step4_layers.embedding, True, timeout=20)


@pytest.mark.milestone(4, 4)
def test_two_messages_travel_while_the_rank_computes(step_dir, worlds):
    check_overlap(worlds(step_dir, 2), "reduce_scatter")


# --- 5. the whole model ---------------------------------------------------------------------------


@pytest.mark.milestone(4, 5)
@pytest.mark.parametrize("tied", ["yes", "no"])
def test_every_matrix_is_cut(step_dir, worlds, tied):
    flags = f"--tp_size 2 --tie_word_embeddings {tied}"
    first, second = worlds(step_dir, 2).run(step4_layers.model_in_parts, flags, timeout=20)
    for name, (full, shape, counted) in first.items():
        is_norm, counted = len(full) == 1, [counted, second[name][2]]
        found = f"{name}: rank 0 has {[*shape]} of {[*full]}"
        tag = f"apply_tensor_parallel: counted of {name} is {counted}"
        if is_norm:
            demand(shape == full, f"{found}; a norm stays whole on each rank")
            demand(counted == [True, False], f"{tag}; one copy counts")
        else:
            demand(2 * shape.numel() == full.numel(), f"{found}; a matrix is cut: see PLAN")
            demand(all(counted), f"{tag}; each part is on one rank")


@pytest.mark.milestone(4, 5)
def test_the_norm_of_a_gradient_in_parts(step_dir, worlds):
    worlds(step_dir, 2).run(step4_layers.norm_of_parts, timeout=20)


@pytest.mark.milestone(4, 5)
def test_weights_become_real_once_they_are_cut(step_dir, worlds):
    worlds(step_dir, 2).run(step4_layers.memory_of_weights, timeout=20)


THREE = "--num_attention_heads 6 --num_key_value_heads 3 --hidden_size 24 "


@pytest.mark.milestone(4, 5)
@pytest.mark.parametrize(
    "flags, one",
    [
        ("--tp_size 2 ", ""),
        ("--tp_size 2 --sequence_parallel ", ""),
        ("--tp_size 3 --sequence_parallel ", THREE + "--seq_len 15 --tie_word_embeddings yes"),
    ],
)
def test_a_step_is_that_of_one_process(step_dir, train_on, flags, one):
    same_step(step_dir, train_on, int(flags.split()[1]), flags + one, one=one)


@pytest.mark.milestone(4, 5)
@pytest.mark.parametrize("flags", ["--tp_size 2 ", "--tp_size 2 --sequence_parallel "])
def test_a_step_sends_what_the_formula_says(step_dir, worlds, flags):
    more = ". Has apply_tensor_parallel replaced the project of attention and MLP by that for many?"
    counted, predicted = worlds(step_dir, 2).run(ledger_of, SMALL + flags, timeout=20)[0]
    for key, (calls, _) in predicted.items():
        found = counted.get(key, (0, 0))[0]
        said = f"{flags}: a step calls {key[1]} {found} times; the lesson's code does {calls} times"
        demand(found == calls, said + more * (found > calls))
