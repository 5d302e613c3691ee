"""The same checks where the GPU's own kernels and NCCL do the work: `pytest -m gpu`.

One GPU is enough for all that is about numbers: ranks share it (`shared_gpus.py`).
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_checkpoint as checkpoints
import torch
import workers_context
import workers_gpu
import workers_memory
import workers_model
import workers_precision
import workers_process_group
import workers_trainer
from conftest import step_number
from harness import World
from launch import launch, on_two, ranks_of
from layouts import ENGINES
from test_casts import assert_casts_are_kept_once
from test_errors import assert_one_line
from test_half import overflow
from test_huggingface import theirs
from test_layouts import SHAPE, WHOLE, assert_bfloat16_trains_like_float32, split
from test_model import TINY, oracle
from test_process_group import assert_collectives, assert_mesh

pytestmark = pytest.mark.gpu
CUDA = "--device cuda "


def random_data(step_dir):
    """Flags for data that needs no text, if this step reads any."""
    return " --dataset_name random" if step_number(step_dir) > 2 else ""


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.steps(1, 1)
@pytest.mark.parametrize(
    "dtype, bound, kernel",
    [
        ("bfloat16", 1e-2, "cudnn_attention"),
        ("float16", 2e-3, "cudnn_attention"),
        ("float32", 1e-5, "efficient_attention"),
        ("float64", 1e-13, "attention_math"),
    ],
)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_attention_backend(step_dir, worlds, dtype, bound, kernel, heads, kv_heads):
    world = worlds(step_dir, 1)
    error, kernels = world.run(workers_model.attention_error, dtype, heads, kv_heads, "cuda")[0]
    assert error < bound
    names = {name for name in kernels if "attention" in name}
    assert any(kernel in name for name in names), names


@pytest.mark.steps(1, 1)
@pytest.mark.parametrize(
    "dtype, bound",
    [("float64", 1e-13), ("float32", 1e-6), ("bfloat16", 5e-3), ("float16", 1e-3)],
)
def test_triton_rms_norm(step_dir, worlds, dtype, bound):
    (errors,) = worlds(step_dir, 1).run(workers_model.triton_rms_norm, dtype, "cuda")
    assert max(errors.values()) < bound, errors
    (kernels,) = worlds(step_dir, 1).run(workers_gpu.rms_norm_on_cuda)
    assert {"forward_kernel", "backward_kernel"} <= kernels, kernels


@pytest.mark.parametrize("flags", ["", "--compile", "--activation_checkpointing"])
def test_three_updates_agree_with_the_oracle(step_dir, train_on, flags):
    run = train_on(step_dir, 1, TINY + CUDA + flags + random_data(step_dir), 3)
    run.assert_same_as(oracle(run, [m["learning_rate"] for m in run.metrics], 1.0))


@pytest.mark.steps(3)
@pytest.mark.parametrize("count", [2, 8])
def test_splits_of_the_batch(step_dir, train_on, count):
    reference = train_on(step_dir, 1, WHOLE + " " + CUDA, 3)
    train_on(step_dir, 1, SHAPE + CUDA + split(count), 3).assert_same_as(reference)


@pytest.mark.parametrize("dtype, bound", [("bfloat16", 3e-2), ("float16", 4e-3)])
@pytest.mark.parametrize("flags", ["", "--compile"])
def test_half_gradients_stay_near_float32(step_dir, train_on, worlds, flags, dtype, bound):
    argv = "--num_hidden_layers 4 --seq_len 128 --device cuda " + flags + random_data(step_dir)
    exact = train_on(step_dir, 1, argv + " --dtype float32", 1).gradients[0]
    run = train_on(step_dir, 1, argv + f" --dtype {dtype}", 1)
    rough, scale = run.gradients[0], run.metrics[0].get("loss_scale", 1)
    for name in exact:
        error = np.linalg.norm(rough[name] / scale - exact[name]) / np.linalg.norm(exact[name])
        assert error < bound, (name, error)
    if "--compile" in flags:
        return  # what watches every operator does not see into compiled layers
    for weights in ("float32", dtype):
        half = f" --dtype {dtype} --weights_dtype {weights}"
        _, kept = worlds(step_dir, 1).run(workers_precision.dtypes_of_a_step, argv + half)[0]
        assert all(dtypes == {f"torch.{weights}"} for dtypes in kept.values()), kept


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adamw",
        '--optimizer adam --optimizer_args {"amsgrad":true} --compile',
        '--optimizer sgd --optimizer_args {"momentum":0.9}',
        "--tp_size 2 --sequence_parallel",
        "--pp_size 2 --dp_size 2 --dp_engine zero3",
        '--cp_size 2 --dp_engine zero2 --weights_dtype float16 --optimizer_args {"eps":1e-4}',
    ],
)
def test_an_overflow_on_one_rank_skips_the_step_everywhere(step_dir, worlds, flags):
    argv = f"--num_hidden_layers 2 --seq_len 64 --dataset_name random --dtype float16 {CUDA}{flags}"
    reports, still, *_ = overflow(step_dir, worlds, argv, ranks_of(argv) - 1, [1, 3], 4)
    assert still == [True, False, True, False]
    assert [m["loss_scale"] for m in reports] == [2**16, 2**15, 2**15, 2**14]


@pytest.mark.steps(2, 2)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_collectives_on_nccl(step_dir, worlds, dtype):
    assert_collectives(
        worlds(step_dir, 2).run(workers_process_group.collectives, dtype, 2, "cuda"), dtype
    )


@pytest.mark.steps(9)
@pytest.mark.parametrize("asked, grow", [(None, True), ("expandable_segments:False", False)])
def test_memory_is_in_segments_that_grow(step_dir, asked, grow):
    """It is asked for by the environment, which has to happen before anything reads it."""
    environment = {"PYTORCH_ALLOC_CONF": asked} if asked else {}
    with World(step_dir, 1, fresh=True, **environment) as world:
        assert world.run(workers_memory.segments_that_grow) == [{grow}]


@pytest.mark.steps(2, 2)
def test_an_error_in_the_middle_is_one_line(step_dir):
    flags = CUDA + "--learning_rate 1e38 --warmup_steps 0 --seq_len 8"
    for ranks in range(1, min(2, torch.cuda.device_count()) + 1):
        layout = on_two(step_dir) if ranks == 2 else ""
        assert_one_line(launch(step_dir, flags + layout, ranks), ("nan at step",), 60)


@pytest.mark.steps(2, 3, only=True)
def test_replicas_on_nccl(step_dir, train_on):
    reference = train_on(step_dir, 1, TINY + CUDA + random_data(step_dir), 2)
    train_on(step_dir, 2, TINY + CUDA + random_data(step_dir), 2).assert_same_as(reference)


@pytest.mark.steps(2, 2)
def test_a_mesh_on_nccl(step_dir):
    for sizes in ({"tp": 2, "cp": 1, "dp": 2, "pp": 1}, {"tp": 1, "cp": 2, "dp": 1, "pp": 2}):
        assert_mesh(step_dir, sizes, "cuda")


def test_errors_of_the_kernels_that_could_be_chosen(tmp_path):
    """cuDNN, flash and flash-attn if it is installed, on one device and in a ring; RMSNorm."""
    shape = "--batch 2 --seq_len 256 --heads 4 --kv_heads 2".split()
    command = [sys.executable, Path(__file__).with_name("kernels.py"), *shape, "--save"]
    subprocess.run([*command, tmp_path / "kernels.json"], check=True)
    figures = json.loads((tmp_path / "kernels.json").read_text())
    for what in ("attention", "blocks", "norms"):
        assert len(figures[what]) >= 2
        for name, _, _, error in figures[what]:
            assert error < 1e-2, (what, name)


LAYOUTS = {
    4: [
        "--tp_size 2",
        "--tp_size 2 --sequence_parallel --compile",
        "--tp_size 4 --sequence_parallel --activation_checkpointing",
        "--tp_size 4 --tie_word_embeddings yes",
    ],
    5: [
        "--cp_size 2",
        "--cp_size 2 --compile",
        "--cp_size 4 --activation_checkpointing",
        "--cp_size 2 --tp_size 2 --sequence_parallel",
    ],
    6: [
        *(f"--dp_size 2 --dp_engine {engine}" for engine in ENGINES),
        "--dp_size 2 --dp_engine zero3 --compile",
        "--dp_size 4 --dp_engine zero3 --activation_checkpointing",
        "--cp_size 2 --dp_size 2 --dp_engine zero1",
        "--tp_size 2 --dp_size 2 --dp_engine zero2 --sequence_parallel --compile",
        "--tp_size 2 --cp_size 2 --dp_engine bucket",
    ],
    7: [
        "--pp_size 2",
        "--pp_size 4",
        "--pp_size 2 --dp_size 2 --dp_engine zero3",
        "--pp_size 2 --tp_size 2 --sequence_parallel --compile",
    ],
}
LAYOUTS[8] = [*LAYOUTS[7], "--pp_size 4 --pp_engine afab"]
LAYOUTS[9] = [
    "--pp_size 4",
    "--pp_size 4 --pp_engine afab --tie_word_embeddings yes",
    "--pp_size 2 --cp_size 2 --dp_engine zero1 --compile",
    "--pp_size 2 --tp_size 2 --sequence_parallel --activation_checkpointing",
    "--tp_size 2 --pp_size 2 --dp_size 2 --dp_engine zero3",
    "--tp_size 2 --cp_size 2 --pp_size 2",
    "--pp_size 2 --pp_engine interleaved",
    "--pp_size 2 --pp_engine interleaved --dp_size 2 --dp_engine zero1 --compile",
]


def a_gpu_for_each_rank(argv):
    """Skip where ranks would have to share GPUs, as they do in tests of numbers."""
    if torch.cuda.device_count() < ranks_of(argv):
        pytest.skip(f"needs {ranks_of(argv)} GPUs")


@pytest.mark.steps(4)
def test_layouts_on_nccl(step_dir, train_on, subtests):
    """N5 in float64 for each axis and engine, two updates."""
    for flags in LAYOUTS[step_number(step_dir)]:
        with subtests.test(flags):
            more = "--tie_word_embeddings yes " if "tie" in flags else ""
            more += "--num_hidden_layers 4 " if "pp" in flags else ""
            reference = train_on(step_dir, 1, WHOLE + " " + CUDA + more, 2)
            dp = 2 if "--dp_size 2" in flags else 4 if "--dp_size 4" in flags else 1
            split = f"--gradient_accumulation_steps 2 --micro_batch_size {4 // dp} "
            argv = SHAPE + CUDA + more + split + flags
            run = train_on(step_dir, ranks_of(flags), argv, 2)
            run.assert_same_as(reference)


@pytest.mark.steps(4)
def test_bfloat16_layouts_stay_near_float32(step_dir, train_on, worlds, subtests):
    argv = "--num_hidden_layers 4 --seq_len 256 --device cuda --dataset_name random "
    exact = train_on(step_dir, 1, argv + "--dtype float32 --micro_batch_size 8", 1).gradients[0]
    for flags in LAYOUTS[step_number(step_dir)]:
        if "tie" in flags:
            continue
        with subtests.test(flags):
            dp = 2 if "--dp_size 2" in flags else 4 if "--dp_size 4" in flags else 1
            split = (
                f"--gradient_accumulation_steps 2 --micro_batch_size {4 // dp} --dtype bfloat16 "
            )
            size = ranks_of(flags)
            rough = train_on(step_dir, size, argv + split + flags, 1).gradients[0]
            for name in exact:
                error = np.linalg.norm(rough[name] - exact[name]) / np.linalg.norm(exact[name])
                assert error < 3e-2, (name, error)
            for seen in worlds(step_dir, size).run(
                workers_precision.reduction_dtypes, argv + split + flags
            ):
                for what, dtypes in seen.items():
                    assert dtypes <= {"torch.float32", "torch.float64"}, (what, dtypes)


@pytest.mark.steps(3)
def test_bfloat16_curves_stay_near_float32(step_dir, subtests):
    most_ranks = torch.cuda.device_count()
    assert_bfloat16_trains_like_float32(step_dir, subtests, "cuda", most_ranks)


@pytest.mark.steps(9)
@pytest.mark.parametrize("flags", ["", "--compile", "--tp_size 2 --sequence_parallel --compile"])
def test_micro_batches_keep_one_cast_of_a_weight(step_dir, worlds, flags):
    assert_casts_are_kept_once(step_dir, worlds, CUDA + flags, 2)


# Large enough that a layer computes for longer than its weights travel.
WIDE = (
    "--hidden_size 2048 --intermediate_size 8192 --num_attention_heads 32 --vocab_size 4096 "
    "--num_key_value_heads 32 --num_hidden_layers 4 --dataset_name random "
) + CUDA


@pytest.mark.steps(6, 6)
def test_allocated_bytes_are_those_of_the_zero_paper(step_dir, worlds):
    """ZeRO (arXiv:1910.02054), section 5: weights and gradients 4 N, moments 8 N, in float32."""
    a_gpu_for_each_rank("--dp_size 2")
    for dp in (2, 4)[: torch.cuda.device_count() // 2]:
        peaks = {}
        for engine in ENGINES:
            argv = WIDE + f"--dp_size {dp} --dp_engine {engine} --gradient_accumulation_steps 2 "
            argv += "--seq_len 128 --micro_batch_size 1"
            ranks = worlds(step_dir, dp).run(workers_memory.allocated_bytes, argv)
            shards = {"zero1": 3, "zero2": 3, "zero3": 4}.get(engine, 0)  # of weights, gradients, …
            due = 16 - 4 * shards * (1 - 1 / dp)
            for held, _, count in ranks:
                assert held == pytest.approx(due * count, rel=1e-2), (engine, held / count, due)
            peaks[engine] = max(peak for _, peak, _ in ranks)
        assert peaks["bucket"] > peaks["zero1"] > peaks["zero2"] > peaks["zero3"], peaks


@pytest.mark.steps(9)
@pytest.mark.parametrize("engine", ENGINES)
def test_reductions_and_gathers_travel_while_kernels_compute(step_dir, worlds, engine):
    argv = WIDE + f"--dp_size 2 --dp_engine {engine} --seq_len 2048 --micro_batch_size 8"
    a_gpu_for_each_rank(argv)
    for found, _ in worlds(step_dir, 2).run(workers_gpu.kernels_of, argv):
        alone = found["of it alone"] / found["communication"]
        assert alone > 0.9 if engine == "naive" else alone < 0.5, found


@pytest.mark.steps(9)
def test_the_ring_travels_while_kernels_compute(step_dir, worlds):
    argv = WIDE + "--cp_size 2 --seq_len 8192 --micro_batch_size 4"
    a_gpu_for_each_rank(argv)
    for found, _ in worlds(step_dir, 2).run(workers_gpu.kernels_of, argv):
        assert found["of it alone"] < 0.5 * found["communication"], found


@pytest.mark.steps(9)
def test_sends_travel_while_kernels_compute(step_dir, worlds):
    """Under AFAB: all activations but the last on the first rank, and gradients on the other one.

    They are counted, because a receive may wait for what is still being computed.
    """
    argv = WIDE + "--pp_size 2 --pp_engine afab --gradient_accumulation_steps 8 "
    argv += "--seq_len 2048 --micro_batch_size 4"
    a_gpu_for_each_rank(argv)
    for found, hidden in worlds(step_dir, 2).run(workers_gpu.kernels_of, argv):
        assert sum(share > 0.5 for share in hidden) == 7, (found, hidden)


@pytest.mark.steps(9)
def test_a_run_goes_on_on_another_layout_on_nccl(step_dir, worlds, tmp_path, subtests):
    for dtype, tolerance in (("float64", 1e-10), ("bfloat16", 1e-2)):
        shape = checkpoints.SHAPE + checkpoints.STEPS + CUDA + f"--dtype {dtype} "
        numbers, _ = checkpoints.train(worlds, step_dir, shape + checkpoints.batch(""))
        for place, route in enumerate(checkpoints.ROUTES):
            with subtests.test(f"{dtype}, {' -> '.join(route)}"):
                path = tmp_path / f"{dtype}{place}"
                before, after = (shape + checkpoints.batch(layout) for layout in route)
                before += f"--checkpoint_dir {path} --save_every 2"
                after += f"--checkpoint_dir {path} --resume auto"
                first, _ = checkpoints.train(worlds, step_dir, before, until=2)
                rest, _ = checkpoints.train(worlds, step_dir, after)
                checkpoints.assert_same_curve(numbers, first + rest, tolerance)


@pytest.mark.steps(9)
def test_generating_on_nccl(step_dir, worlds, tmp_path):
    theirs(tmp_path / "hf", initializer_range=0.2)
    argv = f"--load_hf {tmp_path / 'hf'} --dtype float64 --temperature 0 --max_new_tokens 40 "
    run = workers_trainer.generated
    (alone,) = worlds(step_dir, 1).run(run, argv + "--device cpu", [5, 250, 3])
    for size in (1, 2):
        found = worlds(step_dir, size).run(run, argv + f"{CUDA}--tp_size {size}", [5, 250, 3])
        assert found == [alone] * size


@pytest.mark.steps(5, 5)
@pytest.mark.parametrize(
    "dtype, bound, kernel",
    [
        ("bfloat16", 1e-2, "cudnn_attention"),
        ("float16", 2e-3, "cudnn_attention"),
        ("float32", 1e-5, "efficient_attention"),
        ("float64", 1e-13, None),
    ],
)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("seq", [40, 128])
def test_blocks_of_the_ring(step_dir, worlds, dtype, bound, kernel, heads, kv_heads, seq):
    ((errors, kernels),) = worlds(step_dir, 1).run(
        workers_context.blocks_error, dtype, heads, kv_heads, seq, "cuda"
    )
    assert max(errors.values()) < bound, errors
    assert any(kernel in name for name in kernels) if kernel else not kernels, kernels
