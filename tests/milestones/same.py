"""What the checks of milestones compare, in words for the one who has just written the code."""

SMALL = (
    "--seed 3 --dtype float64 --num_hidden_layers 2 --hidden_size 32 --num_attention_heads 4 "
    "--num_key_value_heads 2 --intermediate_size 48 --seq_len 16 --micro_batch_size 2 "
    "--learning_rate 3e-3 --warmup_steps 2 --max_tokens 4096 --dataset_name random "
)


def same(found, expected, what, meaning, tolerance=1e-12):
    """Demand that two tensors are equal; `meaning` says in words what the value should be."""
    assert found is not None, f"{what} is None; it should be {meaning}"
    assert found.shape == expected.shape, (
        f"{what} has the shape {list(found.shape)}; it should be {meaning}, {list(expected.shape)}"
    )
    apart = (found.detach().double() - expected.detach().double()).abs().max().item()
    size = expected.detach().abs().max().item()
    ratio = (found.detach().double().norm() / expected.detach().double().norm()).item()
    assert apart <= tolerance * size, (
        f"{what} is off by {apart:.3g}, and {ratio:.4g} times as large as it should be; it should "
        f"be {meaning}"
    )


def same_step(step_dir, train_on, size, flags, steps=2, one=""):
    """Demand that a layout trains as one process does: weights, losses, norms and gradients.

    one: the flags of the one process, which takes the same batch.
    """
    reference = train_on(step_dir, 1, SMALL + one, steps)
    train_on(step_dir, size, SMALL + flags, steps).assert_same_as(reference)
