"""The model and its training step: against the NumPy oracle, transformers and itself."""

import json
from types import SimpleNamespace

import numpy as np
import numpy_llama
import pytest
import workers_memory
import workers_model
import workers_precision
import workers_setup
import workers_steps
from conftest import step_number
from harness import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
SHAPES = {
    "plain": {"num_key_value_heads": 6},
    "grouped": {"num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3, "num_key_value_heads": 3},
}
TINY = "--dtype float64 --num_hidden_layers 2 --seq_len 32 --learning_rate 3e-3 --warmup_steps 2 "


def oracle(run, learning_rates, max_norm, weight_decay=0.1):
    """What the oracle computes on the batches of a Run, in the form of a Run."""
    weights = {name: array.copy() for name, array in run.before.items()}
    optimizer = numpy_llama.AdamW(weights, weight_decay=weight_decay)
    metrics, gradients = [], []
    for micro_batches, learning_rate in zip(run.batches, learning_rates, strict=True):
        tokens = np.concatenate([micro_batch[0] for micro_batch in micro_batches])
        targets = np.concatenate([micro_batch[1] for micro_batch in micro_batches])
        loss, gradient = numpy_llama.loss_and_gradients(
            weights, run.config, tokens, targets, micro_batches[0][2]
        )
        gradient = {name: gradient[name] / targets.size for name in weights}
        norm = numpy_llama.gradient_norm(gradient)
        numbers = {"loss": loss / targets.size, "grad_norm": norm, "learning_rate": learning_rate}
        metrics.append(numbers)
        gradients.append(gradient)
        optimizer.step(numpy_llama.clip(gradient, max_norm), learning_rate)
    return SimpleNamespace(before=run.before, metrics=metrics, gradients=gradients, after=weights)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "shape",
    [
        "",
        "--tie_word_embeddings yes --max_grad_norm 0.5",
        "--num_attention_heads 4 --num_key_value_heads 1 --hidden_size 72 --weight_decay 0",
        "llama3",
    ],
    ids=["grouped", "tied", "odd", "llama3"],
)
def test_three_updates_agree_with_the_oracle(step_dir, train_on, shape, tmp_path):
    if shape == "llama3":
        config = workers_model.tiny_config(vocab_size=300, rope_parameters=LLAMA3)
        config.save_pretrained(tmp_path)
        shape = f"--model_name {tmp_path}"
        if step_number(step_dir) > 2:
            shape += " --tokenizer_name bytes"
    run = train_on(step_dir, 1, TINY + shape, 3)
    max_norm = 0.5 if "max_grad_norm" in shape else 1.0
    decay = 0.0 if "weight_decay" in shape else 0.1
    reference = oracle(run, [m["learning_rate"] for m in run.metrics], max_norm, decay)
    assert run.metrics[0]["grad_norm"] > max_norm, "clipping should be at work here"
    run.assert_same_as(reference)


@pytest.mark.steps(1, 1)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_weights_agree_with_transformers(step_dir, worlds, shape):
    (result,) = worlds(step_dir, 1).run(
        workers_model.against_transformers, SHAPES[shape], "float64"
    )
    ours, theirs, loss, their_loss = result
    assert np.abs(ours - theirs).max() <= 1e-10 * np.abs(theirs).max()
    # transformers sums its loss in float32, whatever the dtype of the model
    assert loss == pytest.approx(their_loss, rel=1e-6)
    # and as it is, with its own float32 rotary table and norms
    (result,) = worlds(step_dir, 1).run(
        workers_model.against_transformers, SHAPES[shape], "float32"
    )
    assert np.abs(result[0] - result[1]).max() <= 1e-5 * np.abs(result[1]).max()


@pytest.mark.steps(1, 1)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half_head=st.integers(1, 5),
    width=st.integers(1, 9),
    vocab=st.integers(2, 99),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    scaled=st.booleans(),
)
def test_random_configurations_agree_with_transformers(
    step_dir, worlds, kv_heads, groups, half_head, width, vocab, layers, tied, scaled
):
    fields = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * groups,
        "head_dim": 2 * half_head,
        "hidden_size": width * kv_heads * groups,  # transformers wants a multiple of the heads
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "tie_word_embeddings": tied,
        "rope_parameters": LLAMA3 if scaled else {"rope_type": "default", "rope_theta": 1e4},
    }
    (result,) = worlds(step_dir, 1).run(workers_model.against_transformers, fields, "float64")
    ours, theirs, loss, their_loss = result
    assert np.abs(ours - theirs).max() <= 1e-10 * np.abs(theirs).max()
    assert loss == pytest.approx(their_loss, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_norm_is_a_float64_sum(step_dir, train_on, dtype):
    run = train_on(step_dir, 1, TINY.replace("float64", dtype), 2)
    for metrics, gradient in zip(run.metrics, run.gradients, strict=True):
        assert metrics["grad_norm"] == pytest.approx(numpy_llama.gradient_norm(gradient), rel=1e-12)


@pytest.mark.steps(1, 1)
def test_presets_have_the_published_sizes(step_dir, worlds):
    """The published counts; a slip in one number of the table changes one of them."""
    (sizes,) = worlds(step_dir, 1).run(workers_model.preset_sizes)
    assert sizes == {
        "debug": 1_640_576,
        "smollm-135m": 134_515_008,
        "smollm-360m": 361_821_120,
        "smollm-1.7b": 1_711_376_384,
        "tinyllama-1.1b": 1_100_048_384,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.1-8b": 8_030_261_248,
    }


@pytest.mark.steps(1, 1)
@pytest.mark.parametrize("shape", ["plain", "wide heads", "llama3 rope"])
def test_rotary_frequencies(step_dir, worlds, shape):
    ((ours, theirs),) = worlds(step_dir, 1).run(workers_model.frequencies, SHAPES[shape])
    exact = numpy_llama.inverse_frequencies(workers_model.tiny_config(**SHAPES[shape]))
    assert np.abs(ours / exact - 1).max() < 1e-14
    assert np.abs(ours / theirs - 1).max() < 1e-5


@pytest.mark.steps(1, 1)
def test_meta_parameters_know_their_place(step_dir, worlds):
    devices, names, slices, shapes = worlds(step_dir, 1).run(
        workers_model.metas_before_materialize
    )[0]
    assert devices == {"meta"}
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "model.norm.weight"
    assert "model.layers.2.self_attn.q_proj.weight" in names
    for shape, held in zip(shapes, slices, strict=True):
        assert held == tuple(slice(0, size) for size in shape)


@pytest.mark.steps(1, 1)
def test_initial_weights_are_a_function_of_seed_and_name(step_dir, worlds):
    world = worlds(step_dir, 1)
    argv = "--seq_len 8 --num_hidden_layers "
    (two,) = world.run(workers_setup.initial_weights, argv + "2")
    (three,) = world.run(workers_setup.initial_weights, argv + "3 --dtype float64")
    (other,) = world.run(workers_setup.initial_weights, argv + "2 --seed 43")
    assert set(two) < set(three)
    for name, weight in two.items():
        assert np.array_equal(weight, three[name]), name
        assert np.array_equal(weight, other[name]) == name.endswith("norm.weight"), name
    matrices = [weight for name, weight in two.items() if weight.ndim == 2]
    for one in matrices:
        assert 0.019 < one.std() < 0.021
        assert sum(np.array_equal(one, another) for another in matrices) == 1


@pytest.mark.parametrize("flags", ["", "--activation_checkpointing"])
def test_a_float64_step_holds_no_float32(step_dir, worlds, flags):
    seen, kept = worlds(step_dir, 1).run(workers_precision.dtypes_of_a_step, TINY + flags)[0]
    assert "torch.float32" not in seen, seen["torch.float32"]
    assert "torch.bfloat16" not in seen
    assert all(dtypes == {"torch.float64"} for dtypes in kept.values()), kept


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_computes_over_float32_state(step_dir, worlds, dtype):
    argv, half = TINY.replace("float64", dtype), f"torch.{dtype}"
    seen, kept = worlds(step_dir, 1).run(workers_precision.dtypes_of_a_step, argv)[0]
    assert all(dtypes == {"torch.float32"} for dtypes in kept.values()), kept
    assert "aten.cos.default" in seen["torch.float64"], "angles are computed in float64"
    assert "aten.cos.default" not in seen["torch.float32"]
    assert "aten._log_softmax.default" in seen["torch.float32"], "the loss is a float32 sum"
    assert "aten._log_softmax.default" not in seen[half]
    products = {"aten.mm.default", "aten.addmm.default"}
    assert products & set(seen[half])
    assert not products & set(seen["torch.float32"])


@pytest.mark.steps(1, 1)
@pytest.mark.parametrize(
    "dtype, bound", [("float64", 1e-14), ("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)]
)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_attention_on_the_cpu_is_the_fused_kernel(step_dir, worlds, dtype, bound, heads, kv_heads):
    world = worlds(step_dir, 1)
    error, kernels = world.run(workers_model.attention_error, dtype, heads, kv_heads)[0]
    assert error < bound
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in kernels
    assert "aten::_scaled_dot_product_flash_attention_for_cpu_backward" in kernels


@pytest.mark.steps(1, 1)
@pytest.mark.parametrize(
    "dtype, bound",
    [
        ("float32", 1e-6),
        pytest.param("float64", 1e-13, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1e-2, marks=pytest.mark.slow),
    ],
)
def test_triton_rms_norm_under_the_interpreter(step_dir, dtype, bound):
    pytest.importorskip("triton")
    with World(step_dir, 1, fresh=True, TRITON_INTERPRET="1") as world:
        (errors,) = world.run(workers_model.triton_rms_norm, dtype)
    assert len(errors) == len(workers_model.RMS_SHAPES)
    assert max(errors.values()) < bound, errors


@pytest.mark.sampled
@pytest.mark.parametrize(
    "flags",
    ["--activation_checkpointing", "--compile aot_eager"],
)
def test_the_same_numbers_when_recomputed_or_compiled(step_dir, train_on, flags):
    reference = train_on(step_dir, 1, TINY, 3)
    train_on(step_dir, 1, TINY + flags, 3).assert_same_as(reference)


@pytest.mark.slow
@pytest.mark.steps(1, 1)
def test_the_same_numbers_with_inductor(step_dir, train_on):
    reference = train_on(step_dir, 1, TINY, 3)
    train_on(step_dir, 1, TINY + "--compile", 3).assert_same_as(reference)


@pytest.mark.steps(1, 1)
def test_activation_checkpointing_keeps_one_tensor_a_layer(step_dir, worlds):
    argv = "--num_hidden_layers 8 --seq_len 64"
    (kept,) = worlds(step_dir, 1).run(workers_memory.saved_bytes, argv)
    (few,) = worlds(step_dir, 1).run(
        workers_memory.saved_bytes, argv + " --activation_checkpointing"
    )
    layer_input = 4 * 64 * 128 * 4  # sequences x tokens x width x bytes
    assert few < 8 * layer_input + 8 * layer_input  # plus head, loss and rotary tables
    assert kept > 5 * few


@pytest.mark.steps(1, 1)
def test_weight_decay_is_for_matrices(step_dir, worlds):
    (groups,) = worlds(step_dir, 1).run(workers_setup.optimizer_groups, "--weight_decay 0.3")
    assert groups == [(0.3, {2}), (0.0, {1})]


@pytest.mark.steps(1, 1)
def test_learning_rate_warms_up_and_decays(step_dir, worlds):
    argv = "--max_tokens 51200 --learning_rate 1e-3 --warmup_steps 10"
    ((total, rates),) = worlds(step_dir, 1).run(
        workers_setup.learning_rates, argv, [1, 10, 55, 100]
    )
    assert total == 100
    assert rates == pytest.approx([1e-4, 1e-3, 5.5e-4, 1e-4])


@pytest.mark.steps(1, 1)
def test_mfu_counts_all_parameters_and_attention(step_dir, worlds):
    ((flops, count, peak),) = worlds(step_dir, 1).run(
        workers_model.flops_and_peak, "--tie_word_embeddings yes --seq_len 64", "NVIDIA H200"
    )
    per_layer = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 384 + 2 * 128
    assert count == 256 * 128 + 8 * per_layer + 128
    assert flops == 6 * count + 12 * 8 * 128 * 64
    assert peak == 989.5e12


@pytest.mark.sampled(3)
@pytest.mark.parametrize("flags", ["", "--dtype float64 --micro_batch_size 3"])
def test_a_rebuilt_run_continues_bit_for_bit(step_dir, worlds, flags):
    argv = "--num_hidden_layers 2 --seq_len 32 --max_tokens 1280 " + flags
    if step_number(step_dir) > 2:
        argv += " --dataset_name random --gradient_accumulation_steps 2"
    whole, resumed, same_weights = worlds(step_dir, 1).run(workers_steps.continued, argv, 3, 7)[0]
    assert len(whole) == 7
    assert json.dumps(whole) == json.dumps(resumed)
    assert same_weights
