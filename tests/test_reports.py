"""Traces name what the ledger counts; reports change no number; curves are those of the metrics."""

import json
import math

import pytest
import torch
import workers_reports
from conftest import step_number
from harness import assert_close
from launch import launch, on_two, ranks_of
from test_checkpoint import SHAPE, batch
from test_errors import assert_one_line

TINY = (
    "--num_hidden_layers 4 --hidden_size 32 --num_attention_heads 4 --num_key_value_heads 2 "
    "--intermediate_size 48 --seq_len 16 --micro_batch_size 2 --vocab_size 256 "
)


def data_of(step_dir):
    """Flags for data that needs no text, and two micro-batches, where a step knows them."""
    more = "--dataset_name random --gradient_accumulation_steps 2 "
    return more if step_number(step_dir) > 2 else ""


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# --- traces ---------------------------------------------------------------------------------------

LAYOUTS = [
    "--tp_size 2 --sequence_parallel",
    slow("--cp_size 2 --activation_checkpointing"),
    slow("--dp_size 2 --dp_engine zero1"),
    slow("--dp_size 2 --dp_engine zero3"),
    slow("--pp_size 2 --dp_size 2 --dp_engine zero2"),
    slow("--pp_size 2 --pp_engine interleaved --tp_size 2"),
    slow("--tp_size 2 --compile aot_eager"),
]


def assert_trace(found, gpu=False):
    """found: what `trace_of` returns of a rank, whose trace is of the steps 2 and 3 of 4."""
    steps, kinds, counted, _ = found
    assert steps == ["ProfilerStep#2", "ProfilerStep#3"]
    names = {name: calls for (kind, name), calls in kinds.items() if kind == "user_annotation"}
    assert counted, "nothing was sent: this shows nothing"
    for name, calls in counted.items():
        collective, axis = name.split()
        if collective == "send":  # several of them, and receives, go out together
            assert names[f"exchange {axis}"] > 0
            assert gpu or kinds["cpu_op", "c10d::send"] >= calls
        else:
            assert names.get(name) == calls, f"{name}: {names.get(name)} in the trace, not {calls}"
    known = {*counted, *(f"exchange {name.split()[1]}" for name in counted)}
    words = ("all_reduce ", "all_gather ", "reduce_scatter ", "broadcast ", "exchange ")
    assert {name for name in names if name.startswith(words)} <= known


@pytest.mark.steps(9)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trace_names_what_the_ledger_counts(step_dir, worlds, tmp_path, layout):
    argv = f"{TINY}{data_of(step_dir)}{layout} --profile 2:3 --profile_dir {tmp_path}"
    for found in worlds(step_dir, ranks_of(layout)).run(workers_reports.trace_of, argv, 4):
        assert_trace(found)
        if "pp_size" in layout:
            named = {name for kind, name in found[1] if kind == "user_annotation"}
            assert {"forward", "backward", "wait"} <= named


@pytest.mark.slow
@pytest.mark.steps(2, 8)
def test_each_step_names_its_collectives(step_dir, worlds, tmp_path):
    layout = on_two(step_dir)
    argv = f"{TINY}{data_of(step_dir)}{layout} --profile 2:3 --profile_dir {tmp_path}"
    for found in worlds(step_dir, 2).run(workers_reports.trace_of, argv, 4):
        assert_trace(found)


@pytest.mark.slow
@pytest.mark.steps(9)
@pytest.mark.parametrize("layout", ["--tp_size 2", "--tp_size 2 --sequence_parallel"])
def test_a_trace_makes_no_new_graphs(step_dir, worlds, tmp_path, layout):
    argv = f"{TINY}{data_of(step_dir)}{layout} --compile aot_eager "
    plain = worlds(step_dir, 2).run(workers_reports.graphs_of, argv)
    argv += f"--profile 3:3 --profile_dir {tmp_path}"
    assert worlds(step_dir, 2).run(workers_reports.graphs_of, argv) == plain
    assert plain[0][0] == plain[0][-1], "compiled anew after the first step"


# --- no number changes ----------------------------------------------------------------------------


@pytest.mark.steps(9)
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "--tp_size 2",
        slow("--dp_size 2 --dp_engine zero3 --activation_checkpointing"),
        slow("--pp_size 2 --cp_size 2"),
        slow("--pp_size 2 --pp_engine interleaved --dp_size 2 --dp_engine zero1"),
    ],
)
def test_reports_change_no_number(step_dir, train_on, tmp_path, layout):
    argv = SHAPE + batch(layout)
    size, reports = ranks_of(layout), f" --detect_anomaly --profile 2:2 --profile_dir {tmp_path}"
    plain, run = (train_on(step_dir, size, argv + more, 3) for more in ("", reports))
    run.assert_same_as(plain, tolerance=0)
    assert_close(plain.after, run.after, "final weight", tolerance=0)
    assert len(list(tmp_path.iterdir())) == size


# --- where a NaN begins ---------------------------------------------------------------------------


@pytest.mark.steps(9)
@pytest.mark.parametrize(
    "layout",
    [
        slow("--tp_size 2"),
        "--dp_size 2 --dp_engine zero3",
        slow("--cp_size 2 --activation_checkpointing"),
    ],
)
def test_a_planted_nan_is_found(step_dir, worlds, layout):
    argv = f"{TINY}{data_of(step_dir)}{layout} --detect_anomaly"
    for said in worlds(step_dir, 2).run(workers_reports.planted_nan, argv, 2):
        for word in ("step 1", "SqrtBackward0", "model.layers.2", "model.py line", "self.mlp("):
            assert word in said, said


@pytest.mark.slow
@pytest.mark.steps(9)
@pytest.mark.parametrize("layout", ["", "--tp_size 2", "--pp_size 2"])
def test_a_ruined_model_is_named_in_one_line(step_dir, layout):
    argv = f"{TINY}{data_of(step_dir)}{layout} --learning_rate 1e38 --warmup_steps 0 "
    result = launch(step_dir, argv + "--detect_anomaly --device cpu")
    result.metrics.clear()  # of the first step, which was good
    words = "--detect_anomaly: step 2", "the output of model.embed_tokens is not finite"
    assert_one_line(result, words, 60)


# --- curves ---------------------------------------------------------------------------------------


def curves(folder):
    """{name: [(step, number)]} as TensorBoard reads them."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = reading.EventAccumulator(str(folder)).Reload()
    return {
        name: [(point.step, point.value) for point in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
    }


@pytest.mark.slow
@pytest.mark.steps(9)
def test_curves_are_the_metrics_also_of_a_resumed_run(step_dir, tmp_path):
    pytest.importorskip("tensorboard")
    argv = f"{TINY}{data_of(step_dir)}--tp_size 2 --max_tokens 384 --eval_every 2 --device cpu "
    argv += f"--save_every 2 --metrics_file {tmp_path}/m.jsonl --use_tensorboard {tmp_path}/curves "
    saved = tmp_path / "run" / "step_00000004"
    for more in (
        f"--checkpoint_dir {saved.parent}",
        f"--checkpoint_dir {tmp_path} --resume {saved}",
    ):
        result = launch(step_dir, argv + more)
        assert result.code == 0, result.errors
        lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
        found = curves(tmp_path / "curves")
        assert {"loss", "grad_norm", "held_out", "tokens_per_second"} <= found.keys()
        assert "mfu" not in found and "step" not in found
        for name, points in found.items():
            due = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            assert [step for step, _ in points] == [step for step, _ in due]
            for (_, point), (_, number) in zip(points, due, strict=True):
                assert math.isclose(point, number, rel_tol=1e-6)  # they are kept in float32


@pytest.mark.slow
@pytest.mark.steps(1, 1)
def test_a_missing_tensorboard_is_one_line(step_dir, tmp_path):
    (tmp_path / "tensorboard.py").write_text("")  # a module, and no package with parts
    argv = f"{TINY}--use_tensorboard {tmp_path}/curves --device cpu"
    hidden = "import sys; sys.modules['tensorboard'] = None"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    result = launch(step_dir, argv, PYTHONPATH=str(tmp_path))
    assert_one_line(result, ("--use_tensorboard", "pip install tensorboard"), 15)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@pytest.mark.steps(9)
@pytest.mark.parametrize("compiled", ["", "--compile"])
def test_a_trace_of_a_gpu_has_its_kernels(step_dir, worlds, tmp_path, cuda, compiled):
    argv = f"{TINY}{data_of(step_dir)}--tp_size 2 --device cuda {compiled} "
    argv += f"--profile 2:3 --profile_dir {tmp_path}"
    for found in worlds(step_dir, 2).run(workers_reports.trace_of, argv, 4):
        assert_trace(found, gpu=True)
        _, kinds, _, message = found
        assert sum(calls for (kind, _), calls in kinds.items() if kind == "kernel") > 50
        # Above a kernel stands the innermost name, NCCL's own. The kernel itself knows its group.
        assert kinds["gpu_user_annotation", "nccl:all_reduce"]
        assert message["Process Group Description"] == "tp", message


@pytest.mark.gpu
@pytest.mark.steps(1)
@pytest.mark.sampled()
@pytest.mark.parametrize("dies", [False, True], ids=["ends", "out of memory"])
def test_a_memory_snapshot(step_dir, worlds, tmp_path, cuda, dies):
    layout = on_two(step_dir)
    argv = f"{TINY}{data_of(step_dir)}{layout} --device cuda --memory_snapshot {tmp_path}"
    world = worlds(step_dir, ranks_of(layout))
    for found in world.run(workers_reports.memory_of, argv, str(tmp_path), dies):
        segments, actions, functions = found
        assert segments > 0
        assert {"alloc", "free_completed"} <= actions and ("oom" in actions) == dies
        assert {"materialize", "train_step", "forward"} <= functions


@pytest.mark.gpu
@pytest.mark.steps(1, 1)
def test_a_memory_snapshot_of_a_program(step_dir, tmp_path, cuda):
    result = launch(step_dir, f"{TINY}--max_tokens 64 --memory_snapshot {tmp_path}")
    assert result.code == 0, result.errors
    assert (tmp_path / "rank0.pickle").stat().st_size > 1000


@pytest.mark.gpu
@pytest.mark.steps(9)
def test_a_planted_nan_is_found_on_a_gpu(step_dir, worlds, cuda):
    argv = f"{TINY}{data_of(step_dir)}--tp_size 2 --device cuda --detect_anomaly"
    for said in worlds(step_dir, 2).run(workers_reports.planted_nan, argv, 2):
        for word in ("SqrtBackward0", "model.layers.2", "model.py line"):
            assert word in said, said
