"""The milestones of step 6: the engines of data parallelism on two and three ranks, beside one.

What runs on the ranks is in step6_engines.py and step6_zero.py.
"""

import pytest
import step6_engines
import step6_zero
from same import same_step

pytestmark = pytest.mark.usefixtures("worlds")


# --- 1. other sequences for each rank -------------------------------------------------------------


@pytest.mark.milestone(6, 1)
@pytest.mark.parametrize("size, micro_batches", [(2, 2), (3, 1)])
def test_each_rank_reads_its_own_sequences(step_dir, worlds, size, micro_batches):
    world = worlds(step_dir, size)
    whole = world.run(step6_engines.sequences, size * micro_batches, True)[0]
    ranks = world.run(step6_engines.sequences, micro_batches, False)
    for part, what in enumerate(["of two steps", "held out"]):
        found = sorted(first for rank in ranks for first in rank[part])
        due = sorted(whole[part])
        assert found == due, (
            f"the ranks together read {len(found)} sequences {what}, {len(set(found))} different "
            f"ones; one process reads {len(due)}, {len(set(due))} different ones. Each rank takes "
            "every n-th micro-batch, beginning with its own rank; a step is n times as large"
        )


# --- 2. add up the gradients ----------------------------------------------------------------------


@pytest.mark.milestone(6, 2)
@pytest.mark.parametrize("size", [2, 3])
def test_naive(step_dir, worlds, size):
    worlds(step_dir, size).run(step6_engines.naive)


# --- 3. many gradients in one message -------------------------------------------------------------


@pytest.mark.milestone(6, 3)
@pytest.mark.parametrize("size", [2, 3])
def test_a_bucket(step_dir, worlds, size):
    share = -(-8 // size)
    due = [(rank * share, (rank + 1) * share) for rank in range(size)]
    found = worlds(step_dir, size).run(step6_engines.a_bucket)
    assert found == due, f"Bucket.mine of the ranks is {found}; it should be {due}, equal shards"


@pytest.mark.milestone(6, 3)
def test_parameters_are_cut_by_size(step_dir, worlds):
    (found,) = worlds(step_dir, 1).run(step6_engines.cuts)
    assert found == [[3, 2, 1], [9], [4]], (
        f"cut_by_size cuts 3, 2, 1, 9, 4 by at most 6 into {found}; neighbours stay together while "
        "they fit, and a larger one is alone"
    )


# --- 4. send while the backward pass goes on ------------------------------------------------------


@pytest.mark.milestone(6, 4)
@pytest.mark.parametrize("size", [2, 3])
def test_buckets_are_summed(step_dir, worlds, size):
    worlds(step_dir, size).run(step6_engines.bucketed)


@pytest.mark.milestone(6, 4)
def test_buckets_are_sent_in_the_last_backward_pass(step_dir, worlds):
    worlds(step_dir, 2).run(step6_engines.bucket_messages)


# --- 5. the training step -------------------------------------------------------------------------

FOUR = "--gradient_accumulation_steps 4 "


def same_training(hint, *args, **options):
    """`same_step`, with a sentence about what it usually means where it fails."""
    try:
        same_step(*args, **options)
    except AssertionError as error:
        raise AssertionError(f"{error}. {hint}") from None


@pytest.mark.milestone(6, 5)
def test_the_engine_of_a_name(step_dir, worlds):
    for size, name, due in (
        (2, "naive", "Naive"),
        (2, "bucket", "Bucketed"),
        (1, "bucket", "Naive"),
    ):
        found = worlds(step_dir, size).run(step6_engines.engine_of, name, size)
        assert found == [due] * size, (
            f"--dp_engine {name} on {size} ranks gives {found}; it should be {due} on each"
        )


@pytest.mark.milestone(6, 5)
@pytest.mark.parametrize("engine", ["naive", "bucket"])
def test_a_step_is_that_of_one_process(step_dir, train_on, engine):
    flags = f"--dp_size 2 --gradient_accumulation_steps 2 --dp_engine {engine}"
    hint = "Does mean_loss set last_backward, and does forward_backward call finish_gradients?"
    same_training(hint, step_dir, train_on, 2, flags, one=FOUR)


@pytest.mark.milestone(6, 5)
def test_ranks_along_cp_are_summed_too(step_dir, train_on):
    hint = 'Has the engine mesh.group("dp", "cp")? Ranks along cp read other tokens, too.'
    same_training(hint, step_dir, train_on, 2, "--cp_size 2 " + FOUR, one=FOUR)


# --- 6. shards of a vector (from here on: ZERO.md) ------------------------------------------------


@pytest.mark.milestone(6, 6)
@pytest.mark.parametrize("size", [2, 3])
def test_shards_of_a_vector(step_dir, worlds, size):
    due = {
        2: [[("matrix", 0, 4)], [("matrix", 4, 6), ("vector", 0, 2)]],
        3: [[("matrix", 0, 3)], [("matrix", 3, 6)], [("vector", 0, 2)]],
    }
    found = worlds(step_dir, size).run(step6_zero.shards)
    assert found == due[size], f"the pieces of the ranks are {found}; they should be {due[size]}"


# --- 7. zero1: update a shard ---------------------------------------------------------------------


@pytest.mark.milestone(6, 7)
@pytest.mark.parametrize("size", [2, 3])
def test_zero1(step_dir, worlds, size):
    worlds(step_dir, size).run(step6_zero.sharded, "Zero1", {})


@pytest.mark.milestone(6, 7)
def test_gradients_on_their_way_are_bounded(step_dir, worlds):
    most, allowed = worlds(step_dir, 2).run(step6_zero.little_on_its_way)[0]
    assert most <= allowed, (
        f"{most} bytes of gradients are on their way, `most_bytes` is {allowed}: `reduce` waits "
        "for the oldest ones before it sends"
    )


@pytest.mark.milestone(6, 7)
def test_a_step_with_zero1(step_dir, train_on):
    flags = "--dp_size 2 --dp_engine zero1 --gradient_accumulation_steps 2"
    hint = "Are the squares of all shards in the norm (axes)? Are the updated shards gathered?"
    same_training(hint, step_dir, train_on, 2, flags, one=FOUR)


# --- 8. zero2: keep a shard of the gradients ------------------------------------------------------


@pytest.mark.milestone(6, 8)
def test_zero2(step_dir, worlds):
    worlds(step_dir, 2).run(step6_zero.no_whole_gradients)
    worlds(step_dir, 2).run(step6_zero.sharded, "Zero2", {})


@pytest.mark.milestone(6, 8)
def test_a_step_with_zero2(step_dir, train_on):
    flags = "--dp_size 2 --dp_engine zero2 --gradient_accumulation_steps 2"
    hint = "Is each micro-batch's gradient added to the shard's sum?"
    same_training(hint, step_dir, train_on, 2, flags, one=FOUR)


# --- 9. zero3: weights that come and go -----------------------------------------------------------


@pytest.mark.milestone(6, 9)
@pytest.mark.parametrize("size", [2, 3])
def test_weights_come_and_go(step_dir, worlds, size):
    worlds(step_dir, size).run(step6_zero.fetch_and_drop)


# --- 10. zero3: a layer is whole while it computes ------------------------------------------------


@pytest.mark.milestone(6, 10)
def test_a_layer_and_the_next_are_whole(step_dir, worlds):
    world = worlds(step_dir, 2)
    for flags in ({}, {"checkpointing": True}, {"dtype": "bfloat16"}):
        forward, again, left, embedding, same_dtype, gathers = world.run(
            step6_zero.whole_layers, flags
        )[0]
        due = [[0, 1], [1, 2], [2, 3], [3, 4], [4]]
        assert forward == due, (
            f"in the second forward pass the whole layers are {forward}; they should be {due}"
        )
        due = [[3, 4], [2, 3], [1, 2], [0, 1], [0]] if flags.get("checkpointing") else []
        assert again == due, f"recomputed, the whole layers are {again}; they should be {due}"
        assert not left, f"after the backward pass the layers {left} are still whole"
        assert not embedding, "the embedding is still whole when the first layer computes"
        cast = flags.get("dtype") == "bfloat16"
        assert all(equal != cast for equal in same_dtype), (
            "layers are gathered in the dtype of the computation; their shards stay float32"
        )
        assert gathers == 12, (
            f"{gathers} all-gathers; 12 would do: 5 layers, norms, embedding and head forward, 4 "
            "layers backward. The last layer stays, the embedding is not needed again"
        )


@pytest.mark.milestone(6, 10)
@pytest.mark.parametrize("size, flags", [(3, {}), (2, {"tied": True})])
def test_zero3(step_dir, worlds, size, flags):
    worlds(step_dir, size).run(step6_zero.sharded, "Zero3", flags)


@pytest.mark.milestone(6, 10)
@pytest.mark.parametrize("flags", ["", "--activation_checkpointing --tie_word_embeddings yes"])
def test_a_step_with_zero3(step_dir, train_on, flags):
    more = f"--dp_size 2 --dp_engine zero3 --gradient_accumulation_steps 2 {flags}"
    hint = "Is each layer fetched before it computes, in both passes, and again after the update?"
    same_training(hint, step_dir, train_on, 2, more, one=FOUR + flags)
