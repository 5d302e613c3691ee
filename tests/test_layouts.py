"""N5: loss, gradient norm, every gradient and every weight do not depend on the layout."""

import pytest
from harness import RankError

# 16 heads and 8 kv heads so that later axes divide them; different sequences in every row.
SHAPE = (
    "--dtype float64 --num_hidden_layers 2 --hidden_size 64 --num_attention_heads 16 "
    "--num_key_value_heads 8 --intermediate_size 96 --seq_len 32 --learning_rate 3e-3 "
    "--warmup_steps 2 --dataset_name random "
)
WHOLE = SHAPE + "--micro_batch_size 8"


def split(count):
    return f"--micro_batch_size {8 // count} --gradient_accumulation_steps {count}"


@pytest.mark.steps(3)
@pytest.mark.parametrize("count", [2, 4, 8])
def test_splits_of_the_batch_over_ten_steps(step_dir, train_on, count):
    reference = train_on(step_dir, 1, WHOLE, 10)
    train_on(step_dir, 1, SHAPE + split(count), 10).assert_same_as(reference)


@pytest.mark.steps(3)
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


@pytest.mark.steps(2, 3)
@pytest.mark.parametrize("size", [2, 3])
def test_replicas_train_like_one(step_dir, train_on, size):
    argv = "--dtype float64 --num_hidden_layers 2 --seq_len 32"
    reference = train_on(step_dir, 1, argv, 3)
    train_on(step_dir, size, argv, 3).assert_same_as(reference, tolerance=0)


@pytest.mark.steps(3, 3)
def test_a_replica_with_other_data_is_noticed(step_dir, train_on):
    argv = "--dtype float64 --num_hidden_layers 2 --seq_len 32"
    with pytest.raises(AssertionError, match="rank 1 holds another value"):
        train_on(step_dir, 2, argv, 1, break_it="other_data_on_a_replica")


@pytest.mark.steps(3, 3)
def test_a_nan_stops_the_run_with_the_step_named(step_dir, train_on):
    with pytest.raises(RankError, match="nan at step [2-9]"):
        train_on(step_dir, 1, "--learning_rate 1e38 --warmup_steps 0 --seq_len 8", 9)
