"""The milestones of step 1's lesson and of its further pages."""

import numpy_llama
import pytest
import workers_step1 as workers
import workers_step1_optimizers as optimizers
import workers_step1_pages as pages
import workers_step1_precision as precision
import workers_step1_profiles as profiles
from harness import World
from launch import launch
from same import same
from workers_step1 import DERIVATIVE, array

pytestmark = pytest.mark.usefixtures("worlds")

# --- 1. the loss and the positions ----------------------------------------------------------------


@pytest.mark.milestone(1, 1)
@pytest.mark.parametrize("function", [workers.loss, workers.positions], ids=lambda f: f.__name__)
def test_loss_and_positions(step_dir, worlds, function):
    worlds(step_dir, 1).run(function)


# --- 2. a decoder layer ---------------------------------------------------------------------------


@pytest.mark.milestone(1, 2)
@pytest.mark.parametrize(
    "function", [workers.layers_with_a_weight, workers.parts_of_a_layer], ids=lambda f: f.__name__
)
def test_a_decoder_layer(step_dir, worlds, function):
    worlds(step_dir, 1).run(function)


# --- 3. the whole model ---------------------------------------------------------------------------


@pytest.mark.milestone(1, 3)
@pytest.mark.parametrize(
    "tied, checkpointing, compiled",
    [(False, False, False), (True, False, False), (False, True, False), (False, False, True)],
    ids=["plain", "tied", "activation_checkpointing", "compiled"],
)
def test_the_whole_model(step_dir, worlds, tied, checkpointing, compiled):
    worlds(step_dir, 1).run(workers.whole_model, tied, checkpointing, compiled)


@pytest.mark.milestone(1, 3)
def test_the_tags_of_a_weight(step_dir, worlds):
    worlds(step_dir, 1).run(workers.tags)


# --- 4. weights from a seed and a name ------------------------------------------------------------


@pytest.mark.milestone(1, 4)
def test_weights_are_a_function_of_seed_and_name(step_dir, worlds):
    worlds(step_dir, 1).run(workers.weights_of_a_name)


@pytest.mark.milestone(1, 4)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_meta_weights_become_real(step_dir, worlds, tied):
    worlds(step_dir, 1).run(workers.real_weights, tied)


# --- 5. the optimizer -----------------------------------------------------------------------------


@pytest.mark.milestone(1, 5)
def test_optimizer_and_norm(step_dir, worlds):
    worlds(step_dir, 1).run(workers.optimizer)


# --- 6. the training step -------------------------------------------------------------------------

TRAIN = (
    "--seed 3 --dtype float64 --device cpu --num_hidden_layers 2 --hidden_size 32 --seq_len 16 "
    "--num_attention_heads 4 --num_key_value_heads 2 --intermediate_size 48 --micro_batch_size 2 "
    "--learning_rate 3e-3 --warmup_steps 2 --max_tokens 512 --max_grad_norm 0.5"
)


def first_batch():
    import train

    tokens, targets, positions = train.setup(train.parse_args(TRAIN.split())).batch
    text = b"1 x 1 = 1\n1 x 2 = 2\n1 x 3 = 3\n1 x 4 = 4\n"[:33]
    assert tokens.flatten().tolist() == list(text[:32]), "tokens: the table's first bytes"
    assert targets.flatten().tolist() == list(text[1:]), "targets: the byte after each token"
    assert positions.tolist() == list(range(16)), "positions: 0, 1, 2, … in each sequence"


@pytest.mark.milestone(1, 6)
def test_the_batch(step_dir, worlds):
    worlds(step_dir, 1).run(first_batch)


IN_THE_STEP_BEFORE = (
    ". Up to here all was right, so look at what train_step does with the gradients: "
    "clip_gradients, the learning rate, the update, zero_grad, in the order of the lesson"
)


@pytest.mark.milestone(1, 6)
def test_three_steps(step_dir, train_on):
    """Weights, losses and norms beside those of a Llama and an AdamW in NumPy."""
    run = train_on(step_dir, 1, TRAIN, 3)
    weights = {name: weight.copy() for name, weight in run.before.items()}
    adamw = numpy_llama.AdamW(weights, weight_decay=0.1)
    for place, (found, ((tokens, targets, positions),)) in enumerate(
        zip(run.metrics, run.batches, strict=True)
    ):
        total, gradients = numpy_llama.loss_and_gradients(
            weights, run.config, tokens, targets, positions
        )
        gradients = {name: gradient / targets.size for name, gradient in gradients.items()}
        rate = [1.5e-3, 3e-3, found["learning_rate"]][place]
        due = {
            "loss": (total / targets.size, "the mean over all targets of the step"),
            "grad_norm": (numpy_llama.gradient_norm(gradients), "of this step only, not clipped"),
            "learning_rate": (rate, "that of learning_rate_at, set before the update"),
            "tokens": (32 * (place + 1), "all since the start"),
        }
        for name, (value, meaning) in due.items():
            assert found[name] == pytest.approx(value, rel=1e-10), (
                f"{name} of step {place + 1} is {found[name]}, {found[name] / value:.4g} times "
                f"what it should be: {value}, {meaning}{IN_THE_STEP_BEFORE if place else ''}"
            )
        for name, gradient in gradients.items():
            what = f"the gradient of {name}, before clipping, at step {place + 1}"
            same(array(run.gradients[place][name]), array(gradient), what, DERIVATIVE, 1e-10)
        adamw.step(numpy_llama.clip(gradients, 0.5), found["learning_rate"])
    for name, weight in weights.items():
        what = f"{name} after three steps"
        same(array(run.after[name]), array(weight), what, "what AdamW in NumPy makes of it", 1e-10)


@pytest.mark.milestone(1, 6)
def test_the_program(step_dir):
    result = launch(step_dir, TRAIN, ranks=1)
    assert result.code == 0, f"python train.py ends with {result.code}: {result.errors[0]}"
    steps = [line["step"] for line in result.metrics]
    assert steps == list(range(1, 17)), (
        f"python train.py reports the steps {steps}; 512 tokens are 16 steps. Does the file end "
        "with run(main, parse_args)?"
    )


# --- 7. and 8. KERNELS.md -------------------------------------------------------------------------


@pytest.mark.milestone(1, 7)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_attention(step_dir, worlds, heads, kv_heads):
    (kernels,) = worlds(step_dir, 1).run(pages.attention, heads, kv_heads)
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert fused in kernels, (
        "attention on the CPU does not run PyTorch's fused kernel: call "
        "F.scaled_dot_product_attention with is_causal=True and no mask of your own"
    )


@pytest.mark.milestone(1, 8)
def test_the_norm(step_dir, worlds):
    worlds(step_dir, 1).run(pages.rms_norm, False)


@pytest.mark.milestone(1, 8)
def test_the_kernels_of_the_norm(step_dir):
    pytest.importorskip("triton")
    with World(step_dir, 1, fresh=True, TRITON_INTERPRET="1") as world:
        world.run(pages.rms_norm, True)


# --- 9. and 10. REPORTS.md ------------------------------------------------------------------------


@pytest.mark.milestone(1, 9)
def test_the_file_of_metrics(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(pages.metrics_file, str(tmp_path / "metrics.jsonl"))


@pytest.mark.milestone(1, 9)
def test_a_full_disk(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(pages.full_disk)
    worlds(step_dir, 1).run(pages.room_for_a_part, str(tmp_path / "metrics.jsonl"))


@pytest.mark.milestone(1, 10)
def test_what_is_reported_of_a_step(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(pages.metrics, str(tmp_path / "metrics.jsonl"))


@pytest.mark.milestone(1, 10)
def test_curves(step_dir, worlds, tmp_path):
    pytest.importorskip("tensorboard")
    worlds(step_dir, 1).run(profiles.board, tmp_path)


# --- 11. and 12. OPTIMIZERS.md --------------------------------------------------------------------


@pytest.mark.milestone(1, 11)
def test_the_learning_rate(step_dir, worlds):
    worlds(step_dir, 1).run(optimizers.learning_rates)


@pytest.mark.milestone(1, 12)
def test_another_optimizer(step_dir, worlds):
    worlds(step_dir, 1).run(optimizers.chosen)
    worlds(step_dir, 1).run(optimizers.refused)


# --- 13. and 14. PRECISION.md ---------------------------------------------------------------------


@pytest.mark.milestone(1, 13)
def test_dtypes_that_go_together(step_dir, worlds):
    worlds(step_dir, 1).run(precision.dtypes_that_fit)
    worlds(step_dir, 1).run(precision.dtypes_that_do_not)


@pytest.mark.milestone(1, 14)
@pytest.mark.parametrize("check", ["updates", "first_step", "up_and_down"])
def test_the_loss_scale(step_dir, worlds, check):
    worlds(step_dir, 1).run(getattr(precision, check))


# --- 15. and 16. PROFILES.md ----------------------------------------------------------------------


@pytest.mark.milestone(1, 15)
def test_traces(step_dir, worlds, tmp_path):
    worlds(step_dir, 1).run(profiles.refused, tmp_path)
    worlds(step_dir, 1).run(profiles.traces, tmp_path)


@pytest.mark.milestone(1, 16)
def test_where_a_nan_begins(step_dir, worlds):
    worlds(step_dir, 1).run(profiles.nans)
