"""What the checks of milestones compare, in words for the one who has just written the code."""

import re

SMALL = (
    "--seed 3 --dtype float64 --num_hidden_layers 2 --hidden_size 32 --num_attention_heads 4 "
    "--num_key_value_heads 2 --intermediate_size 48 --seq_len 16 --micro_batch_size 2 "
    "--learning_rate 3e-3 --warmup_steps 2 --max_tokens 4096 --dataset_name random "
)


def demand(good, sentence):
    """Fail with a sentence, and nothing else, unless something is good."""
    import pytest

    if not good:
        pytest.fail(sentence, pytrace=False)


def in_one_line(error, hint):
    """The text of an error with a hint in its first line, which is what a reader is shown.

    hint: a text, or several by a text that this line has, of which the first one holds. Of ranks
    that wait for each other the line says where each of them waits.
    """
    first, *rest = str(error).splitlines()
    if isinstance(hint, dict):
        hint = next((words for text, words in hint.items() if text in first), "")
    if re.match(r"deadlock|ranks .* took over", first):
        first = ". ".join([first, *(line for line in rest if re.match(r"rank \d+ \w+ ", line))])
    return "\n".join([f"{first}. {hint}", *rest])


def same(found, expected, what, meaning, tolerance=1e-12):
    """Demand that two tensors are equal; `meaning` says in words what the value should be."""
    assert found is not None, f"{what} is None; it should be {meaning}"
    assert found.shape == expected.shape, (
        f"{what} has the shape {list(found.shape)}; it should be {meaning}, {list(expected.shape)}"
    )
    if wrong := difference(found, expected, tolerance):
        raise AssertionError(f"{what} {wrong}; it should be {meaning}")


def difference(found, expected, tolerance=1e-10):
    """What is wrong with a number, tensor or array, in words; None where it is right."""
    import torch

    found, expected = (torch.as_tensor(x).detach().double().flatten() for x in (found, expected))
    size = expected.abs().max().item()
    apart = (found - expected).abs().max().item()
    if apart <= (tolerance * size or 1e-14):
        return None
    if not found.isfinite().all():
        return "is not finite"
    factor = (found @ expected / (expected @ expected)).item() if size else 0
    same_factor = (found - factor * expected).abs().max().item() <= 1e-8 * abs(factor) * size
    if same_factor and abs(factor - 1) > 1e-3:
        value = f" ({found.item():.7g}, not {size:.7g})" if len(found) == 1 else ""
        return f"is {factor:.4g} times what it should be{value}"
    return f"is off by up to {apart:.2g}, where the largest right value is {size:.2g}"


WEIGHTS_DIFFER = (
    "ranks that hold the same weight should hold the same numbers. Usually a sum over the ranks is "
    "missing: of the gradient of this weight, or of the squares in the gradient norm"
)


def same_step(step_dir, train_on, size, flags, steps=2, one=""):
    """Demand that a layout trains as one process does: weights, losses, norms and gradients.

    one: the flags of the one process, which takes the same batch.
    """
    reference = train_on(step_dir, 1, SMALL + one, steps)
    try:
        run = train_on(step_dir, size, SMALL + flags, steps)
    except AssertionError as error:
        if "holds another value than" in str(error) and "Traceback" not in str(error):
            raise AssertionError(f"{flags}: {error}; {WEIGHTS_DIFFER}") from None
        raise
    for what in first_difference(reference, run):
        raise AssertionError(f"{flags}: {what}")


def same_training(hint, *args, **options):
    """`same_step`, with a sentence about what it usually means where it fails."""
    try:
        same_step(*args, **options)
    except AssertionError as error:
        raise AssertionError(in_one_line(error, hint)) from None


def first_difference(reference, run):
    """Yield in words what differs from the run of one process, in the order of training."""
    yield from wrong_weights(reference.before, run.before, "as it starts", FROM_THE_START)
    for step, (one, other) in enumerate(zip(reference.metrics, run.metrics, strict=True)):
        after = f"step {step + 1}"
        if wrong := difference(other["loss"], one["loss"]):
            yield f"the loss of {after} {wrong}. {LATER if step else FORWARD}"
        gradients = reference.gradients[step], run.gradients[step]
        yield from wrong_weights(*gradients, f"of {after}", BACKWARD, "gradient")
        for name in ("grad_norm", "learning_rate"):
            if wrong := difference(other[name], one[name]):
                yield f"{name} of {after} {wrong}, and the gradients are right"
    yield from wrong_weights(reference.after, run.after, "after the last step", LATER)


FORWARD = "The weights are right, so look at what the model computes forward, and how it is divided"
BACKWARD = "The loss is right, so look at what backward sends, and what it must not sum twice"
LATER = "The gradients are right, so look at what happens to them: clipping, the optimizer"
FROM_THE_START = "Each rank should draw the full weight by its name, and keep what it holds"


def wrong_weights(expected, found, when, hint, kind="weight"):
    """Yield a sentence about the weights, or their gradients, that are not right."""
    if only := expected.keys() ^ found.keys():
        yield f"{', '.join(sorted(only))}: held by one side only"
        return
    wrong = {name: difference(found[name], expected[name]) for name in expected}
    wrong = {name: how for name, how in wrong.items() if how}
    if wrong:
        name = list(wrong)[-1]  # backward meets it first
        yield (
            f"{len(wrong)} of {len(expected)} {kind}s {when} are wrong. The one nearest to the "
            f"loss is {name}: it {wrong[name]}. {hint}"
        )
