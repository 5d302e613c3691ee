"""The milestones of step 6: the engines of data parallelism on two and three ranks, beside one.

What runs on the ranks is in step6_engines.py and step6_zero.py.
"""

import pytest
import step6_engines
import step6_zero
from same import same_training

pytestmark = pytest.mark.usefixtures("worlds")


# --- 1. other sequences for each rank -------------------------------------------------------------


@pytest.mark.milestone(6, 1)
@pytest.mark.parametrize("size, micro_batches", [(2, 2), (3, 1)])
def test_each_rank_reads_its_own_sequences(step_dir, worlds, size, micro_batches):
    world = worlds(step_dir, size)
    whole = world.run(step6_engines.sequences, size * micro_batches, True)[0]
    ranks = world.run(step6_engines.sequences, micro_batches, False)
    for part, what in enumerate(["of a step", "of two steps", "held out"]):
        found = sorted(first for rank in ranks for first in rank[part])
        due, words = sorted(whole[part]), ", each rank every n-th, beginning with its own rank"
        words = f"Batches.load deals out the micro-batches of a step{words}"
        if part == 1:
            words = "the batch_size of Batches.__init__ counts the sequences of all ranks"
        assert found == due, (
            f"the ranks together read {len(found)} sequences {what}, {len(set(found))} different "
            f"ones; one process reads {len(due)}, {len(set(due))} different ones: {words}"
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
    found = worlds(step_dir, size).run(step6_engines.shards_of_a_bucket)
    assert found == [(share * size, *mine) for mine in due], (
        f"Bucket.__init__, 8 numbers on {size} ranks: (length, beginning and end of `mine`) of the "
        f"ranks is {found}; the shards should be {due}, equally long, and rounded up"
    )
    worlds(step_dir, size).run(step6_engines.a_bucket)


@pytest.mark.milestone(6, 3)
def test_parameters_are_cut_by_size(step_dir, worlds):
    (found,) = worlds(step_dir, 1).run(step6_engines.cuts)
    assert found == [[3, 2, 1], [9], [4, 2]], (
        f"cut_by_size cuts 3, 2, 1, 9, 4, 2 by at most 6 into {found}; neighbours stay together "
        "while they fit, and a larger one is alone"
    )


# --- 4. send while the backward pass goes on ------------------------------------------------------


@pytest.mark.milestone(6, 4)
def test_buckets_are_sent_in_the_last_backward_pass(step_dir, worlds):
    worlds(step_dir, 1).run(step6_engines.hooks_and_buckets)
    worlds(step_dir, 2).run(step6_engines.bucket_messages)


@pytest.mark.milestone(6, 4)
@pytest.mark.parametrize("size", [2, 3])
def test_buckets_are_summed(step_dir, worlds, size):
    worlds(step_dir, size).run(step6_engines.bucketed)


# --- 5. the training step -------------------------------------------------------------------------

FOUR = "--gradient_accumulation_steps 4 "


@pytest.mark.milestone(6, 5)
def test_the_engine_of_a_name(step_dir, worlds):
    for size, name, due in (
        (2, "naive", "Naive"),
        (2, "bucket", "Bucketed"),
        (1, "bucket", "Naive"),
    ):
        found = worlds(step_dir, size).run(step6_engines.engine_of, name, size)
        assert found == [due] * size, (
            f"data_parallel: --dp_engine {name} on {size} ranks gives {found}; it should be {due} "
            "on each"
        )


@pytest.mark.milestone(6, 5)
def test_a_step_calls_the_engine(step_dir, worlds):
    ((last, calls),) = worlds(step_dir, 1).run(step6_engines.calls_of_a_step)
    assert last == [False, False, True], (
        f"mean_loss: engine.last_backward was {last} in the three backward passes of a step; it "
        "should be true in the last one, and set before it begins"
    )
    due = ["zero_grad", "finish_gradients", "gradient_norm", "optimizer.step", "finish_update"]
    assert calls == due, (
        f"a step calls {', '.join(calls)}; it should call {', '.join(due)}: finish_gradients in "
        "forward_backward, the others in train_step"
    )


@pytest.mark.milestone(6, 5)
@pytest.mark.parametrize("engine", ["naive", "bucket"])
def test_a_step_is_that_of_one_process(step_dir, train_on, engine):
    flags = f"--dp_size 2 --gradient_accumulation_steps 2 --dp_engine {engine}"
    hint = {"the loss of step": "Does mean_loss sum over engine.group?", "": "Look at train.py."}
    same_training(hint, step_dir, train_on, 2, flags, one=FOUR)


@pytest.mark.milestone(6, 5)
def test_ranks_along_cp_are_summed_too(step_dir, train_on):
    hint = (
        'In setup the engine gets mesh.group("dp", "cp"), as ranks along cp read other tokens, and '
        'Batches gets mesh.group("dp"), as they read the same sequences'
    )
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
        f"{most} bytes of gradients are on their way, `most_bytes` is {allowed}: Zero1.reduce "
        "waits for the oldest ones before it sends"
    )


@pytest.mark.milestone(6, 7)
def test_a_step_with_zero1(step_dir, train_on):
    flags = "--dp_size 2 --dp_engine zero1 --gradient_accumulation_steps 2"
    hint = {
        "grad_norm of step": "Are the squares of all shards in the norm? Zero1.axes says along "
        "which axes the ranks have other shards, and train_step adds them to the group",
        "": "Are the updated shards gathered?",
    }
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
        world.run(step6_zero.whole_layers, flags)


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
