"""convergence.py and benchmark.py as commands."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import benchmark
import convergence
import kernel_times
import kernels
import numpy as np
import pytest
import workers_precision
import workers_steps
from harness import assemble, assert_close
from launch import flag, launch, ranks_of, sequences_of

TESTS = Path(__file__).parent


def command(script, *arguments, code=0):
    """Standard output of a script of this folder, which must exit with `code`."""
    done = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments], capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def rows(text):
    """The cells of a Markdown table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]


@pytest.fixture(scope="module")
def baselines(tmp_path_factory):
    """A folder for what `--save` keeps, so that tests of one dtype share their baseline."""
    return tmp_path_factory.mktemp("baselines")


@pytest.mark.slow
def test_other_layouts_converge(tmp_path, baselines):
    figure = tmp_path / "curves.png"
    flags = "--dp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 2"
    run = "step6_data_parallel " + flags
    arguments = ["--steps", "5", "--save", str(baselines / "float64.json")]
    text = command("convergence.py", *arguments, "--figure", str(figure), run)
    (base, other) = rows(text)
    assert base[0] == "step3_dataloader" and other[:3] == ["step6_data_parallel", flags, "2"]
    assert float(other[3]) < 1e-12 and float(other[4]) < 1e-12
    assert other[6] == "ok"
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_runs_are_kept_over_calls(tmp_path, monkeypatch):
    launched = []

    def train(run, common, through=()):
        launched.append((run, *(getattr(word, "name", word) for word in through)))
        return [{"step": 1, "loss": 2.0}]

    monkeypatch.setattr(convergence, "train", train)
    first = convergence.Runs(tmp_path / "runs.json", flags="--steps 2")
    assert first.metrics("a") == first.metrics("a") == [{"step": 1, "loss": 2.0}]
    first.metrics("b", "halve_norm_gradients")
    again = convergence.Runs(tmp_path / "runs.json", flags="--steps 2")
    assert again.metrics("a") == first.metrics("a") and again.metrics("b")
    assert launched == [("a",), ("b", "breaks.py", "halve_norm_gradients"), ("b",)]
    for gpus in (2, 1):  # on fewer GPUs than ranks they share them
        again.metrics(f"c --tp_size 2 --seed {gpus}", gpus=gpus)
    assert [words[1:] for words in launched[3:]] == [(), ("shared_gpus.py",)]
    with pytest.raises(SystemExit, match="--save .*other flags"):
        convergence.Runs(tmp_path / "runs.json", flags="--steps 3")
    monkeypatch.setattr("launch.machine", lambda: "another one, today")
    with pytest.raises(SystemExit, match="--save .*machines"):
        convergence.Runs(tmp_path / "runs.json", flags="--steps 2")
    with pytest.raises(SystemExit, match="--save .*name a file to write"):
        convergence.Runs(tmp_path / "missing" / "runs.json", flags="--steps 2")


def keep(path, machine="M", dtype="float32", **losses):
    """Write what --save would: runs by their names, each with its losses; `a2` has --tp_size 2."""
    runs = {
        re.sub(r"(\d)", r" --tp_size \1", name): [
            {"step": step, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 9.0}
            for step, loss in enumerate(curve, 1)
        ]
        for name, curve in losses.items()
    }
    kept = {"flags": f"--dtype {dtype}", "machine": machine, "runs": runs}
    path.write_text(json.dumps(kept))
    return path


@pytest.fixture
def compare_kept(monkeypatch, capsys):
    """compare_kept(files, *arguments): the exit's code or words, and the rows of the table."""

    def compare(files, *arguments):
        words = [word for file in files for word in ("--kept", str(file))]
        monkeypatch.setattr("sys.argv", ["convergence.py", *words, *arguments])
        with pytest.raises(SystemExit) as end:
            convergence.main()
        return end.value.code, rows(capsys.readouterr().out)

    return compare


def test_kept_curves_are_compared_on_any_machine(tmp_path, compare_kept):
    figure = tmp_path / "curves.png"
    files = [keep(tmp_path / "kept.json", a2=(2.0, 2.0), b=(2.0, 2.0), c3=(2.0, 2.001), d=(2.0,))]
    code, (base, same, other) = compare_kept(files, "--figure", str(figure))
    assert code == 1 and base[:3] == ["a", "--tp_size 2", "2"] and base[6] == "baseline"
    assert same[0] == "b" and same[6] == "ok"
    assert other[:5] == ["c", "--tp_size 3", "3", "1.0e-03", "0.0e+00"] and other[6] == "OUTSIDE"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    code, found = compare_kept(files, "--baseline", "c --tp_size 3", "b")
    assert code == 1 and [row[0] for row in found] == ["c", "b"]
    assert compare_kept(files, "--baseline", "b", "a --tp_size 2")[0] == 0
    code, found = compare_kept(files, "--steps", "1")
    assert code == 0 and [row[0] for row in found] == ["a", "b", "c", "d"]
    assert "no run 'e'" in compare_kept(files, "e")[0]
    assert "d has only 1 steps; lower --steps 2" in compare_kept(files, "d")[0]
    assert "choose 1 or more" in compare_kept(files, "--steps", "0")[0]


def test_kept_files_are_compared_with_each_other(tmp_path, compare_kept):
    first = keep(tmp_path / "first.json", a=(2.0,), b=(2.0,))
    again = keep(tmp_path / "again.json", machine="N, and more", b=(3.0,))
    code, found = compare_kept([first, again], "--baseline", "b", "b [N]")
    assert code == 1 and found[1][:4] == ["b", "[N]", "1", "1.0e+00"]
    assert "again.json: nothing new" in compare_kept([first, again, again])[0]
    keep(again, dtype="float64", b=(3.0,))
    assert "again.json: of other flags" in compare_kept([first, again])[0]
    speed = convergence.ROOT / "assets" / "speed_4xH200.json"  # of benchmark.py
    assert "name a file that --save wrote" in compare_kept([speed])[0]


SMALL = "--num_hidden_layers 2 --seq_len 8 --max_tokens 256"


@pytest.mark.slow
def test_rounding_of_gradients():
    flags = ["--after", "2", "--flags", SMALL]
    whole = "step3_dataloader --micro_batch_size 8"
    split = "step3_dataloader --micro_batch_size 2 --gradient_accumulation_steps 4"
    found = rows(command("rounding.py", f"{whole} --dtype float64", split, *flags))
    assert found[0][0] == "loss" and len(found) == 14  # two layers are one kind
    numbers = [float(cell) for row in found[1:] for cell in row[1:]]
    assert len(numbers) == 26 and 1e-9 < min(numbers) and max(numbers) < 1e-5
    layout = "step9_4d --tp_size 2 --pp_size 2 --micro_batch_size 4 --gradient_accumulation_steps 2"
    found = rows(command("rounding.py", whole, layout, "--dtype", "bfloat16", *flags))
    alone, cut = map(float, found[1][1:])
    assert found[1][0] == "whole gradient" and 1e-3 < alone < 1e-2 and cut < 1.5 * alone
    wrong = {
        "step3_dataloader --micro_batch_size 5": "5 sequences a step, not 8",
        f"{whole} --seed 1": "another model or batch",
        f"{whole} --num_hidden_layers 1": "another model or batch",
        f"{whole} --no_such_flag": "unrecognized arguments: --no_such_flag",
        "": "4 sequences a step, not 8",
    }
    for run, words in wrong.items():
        assert words in command("rounding.py", whole, run, *flags, code=1)
    assert "choose 0 or more" in command("rounding.py", whole, "--after=-1", code=1)


@pytest.mark.slow
def test_rounding_of_the_heads_product():
    flags = SMALL.split() + ["--device", "cpu", "--micro_batch_size", "6"]
    found = rows(command("head_rounding.py", "--after", "2", *flags))
    assert [row[0] for row in found] == ["8", "16", "32"]  # of 1, 2, 4 sequences of 8
    assert all(1e-9 < float(cell) < 1e-6 for row in found for cell in row[1:3])
    assert all(0 < float(row[3]) < 1 for row in found)
    assert found != rows(command("head_rounding.py", "--after", "0", *flags))
    assert "choose 0 or more" in command("head_rounding.py", "--after=-1", *flags, code=1)
    words = command("head_rounding.py", "--no_such_flag", "1", code=1)
    assert words.startswith("error: unrecognized arguments: --no_such_flag 1")


@pytest.mark.steps(3, 3)
def test_the_heads_gradient_is_autograds(step_dir, worlds):
    argv = SMALL + " --device cpu --dtype float32 --micro_batch_size 6"
    (error,) = worlds(step_dir, 1).run(workers_precision.error_of_the_heads_gradient, argv)
    assert error < 1e-6


@pytest.mark.slow
@pytest.mark.steps(9, 9)
@pytest.mark.parametrize(
    "layout",
    [
        "--tp_size 2 --cp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 4",
        "--dp_size 4 --dp_engine zero1 --micro_batch_size 2",
        "--dp_size 2 --dp_engine zero3 --pp_size 2 --micro_batch_size 2 "
        "--gradient_accumulation_steps 2 --tie_word_embeddings yes",
    ],
)
def test_rounding_takes_up_training_where_it_stopped(step_dir, train_on, worlds, tmp_path, layout):
    argv = f"--num_hidden_layers 4 --seq_len 16 --dtype float64 {layout}"
    run, world = train_on(step_dir, 4, argv, 3), worlds(step_dir, 4)
    np.savez(tmp_path / "w.npz", **assemble(world.run(workers_steps.weights_after, argv, 2)))
    found = assemble(world.run(workers_steps.gradients_at, argv, tmp_path / "w.npz", 2))
    assert abs(found.pop("loss") - run.metrics[2]["loss"]) < 1e-10
    assert_close(run.gradients[2], found, "gradient of the third step")


@pytest.mark.parametrize(
    "dtype, steps", [("float64", "5"), pytest.param("float32", "200", marks=pytest.mark.slow)]
)
def test_a_planted_error_is_caught(baselines, dtype, steps):
    arguments = ["--dtype", dtype, "--steps", steps, "--plant", "halve_norm_gradients"]
    arguments += ["--save", str(baselines / f"{dtype}.json")]
    text = command("convergence.py", *arguments, "step3_dataloader --micro_batch_size 8", code=1)
    assert rows(text)[1][6] == "OUTSIDE"


@pytest.mark.parametrize(
    "run, words",
    [
        ("step3_dataloader --micro_batch_size 3", "3 sequences a step, not 8"),
        ("step33_dataloader --micro_batch_size 8", "no step33_dataloader/train.py"),
        pytest.param(
            "step3_dataloader --micro_batch_size 8 --seq_len 0",
            "ended with code 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_cannot_be_compared_is_refused(run, words):
    assert words in command("convergence.py", "--steps", "1", run, code=1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_layouts():
    text = command("convergence.py", "--all-layouts")
    sizes = [tuple(map(int, row[:4])) for row in rows(text)]
    assert len(set(sizes)) == len(sizes) == 45 and (2, 2, 2, 2) in sizes
    for row in rows(text):
        ranks, runs = map(int, row[4:6])
        assert ranks == math.prod(map(int, row[:4]))
        assert runs >= (6 if row[3] != "1" else 1)
        assert max(map(float, row[6:])) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("dtype, steps", [("float64", 20), ("float32", 200)])
@pytest.mark.timeout(3600)
def test_all_runs_over_the_full_number_of_steps(dtype, steps):
    text = command("convergence.py", "--dtype", dtype)
    assert f"{dtype}, {steps} steps" in text
    assert [row[6] for row in rows(text)] == ["baseline"] + 18 * ["ok"]
    print(text)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_benchmark_measures_beside_transformers(tmp_path, ranks):
    saved = tmp_path / "figures.json"
    runs = ["step3_dataloader", f"LlamaForCausalLM --dp_size {ranks}"]
    arguments = ["--steps", "8", "--rounds", "1", "--save", str(saved)]
    text = command("benchmark.py", *arguments, *runs)
    found = [(row[0], row[2]) for row in rows(text)]
    assert found == [("step3_dataloader", "1"), ("LlamaForCausalLM", str(ranks))]
    assert rows(text)[0][6] == "1.00"
    figures = json.loads(saved.read_text())
    assert re.search(r"torch \d", figures["machine"])
    for run in figures["runs"].values():
        assert run["tokens_per_second"] > 500 and run["memory_gb"] > 0.1
    assert rows(command("benchmark.py", *arguments, *runs)) == rows(text)  # nothing ran again


@pytest.mark.slow
def test_of_several_gpus_the_slowest_counts(capsys, monkeypatch):
    """Two processes at once, as they would run on two GPUs; and what one of them has to say."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    run = "step3_dataloader --micro_batch_size 2"
    flags = "--device cpu --num_hidden_layers 1 --seq_len 16"
    metrics = benchmark.measure(run, flags, steps=8, gpus=2)
    said = capsys.readouterr().out
    name, speeds = said.rsplit(": ", 1)
    assert name == f"{run}, on each GPU"
    speeds = sorted(int(number.replace(",", "")) for number in speeds.split(", "))
    assert len(speeds) == 2
    assert round(benchmark.median(metrics)["tokens_per_second"]) == speeds[0]
    with pytest.raises(SystemExit, match="error: .* no_such_preset"):
        benchmark.measure(run, "--model_name no_such_preset", steps=8, gpus=2)


@pytest.mark.parametrize(
    "script, flags",
    [
        (benchmark, "--gpus"),
        (convergence, "--tinyllama"),
        (kernels, ""),
        (kernel_times, "step9_4d"),
    ],
)
def test_what_needs_a_gpu_says_so(monkeypatch, script, flags):
    monkeypatch.setattr("sys.argv", ["script", *flags.split()])
    with pytest.raises(SystemExit, match="error: .* CUDA device"):
        script.main()


@pytest.mark.parametrize("flags", ["--share_gpus 2", "--tinyllama --share_gpus 2 --plant x"])
def test_gpus_are_shared_by_tinyllama_only(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["convergence.py", *flags.split()])
    with pytest.raises(SystemExit, match="error: --share_gpus .*leave one out"):
        convergence.main()


def test_layouts_for_gpus():
    for count in (2, 4, 8):
        for run in convergence.gpu_runs(count):
            assert sequences_of(run) == 32 and ranks_of(run) in (min(count, 4), count)
        large, small = benchmark.gpu_runs(count, 150), benchmark.gpu_runs(count, 85)
        for run, half in zip(large, small, strict=True):
            assert ranks_of(run) in (1, count)
            tokens = sequences_of(run) * flag(run, "seq_len", 2048)
            assert tokens == 32_768 * ranks_of(run), run
            assert sequences_of(run) == sequences_of(half) and ranks_of(run) == ranks_of(half)
            smaller = flag(half, "micro_batch_size", 0) < flag(run, "micro_batch_size", 0)
            assert smaller or "--recompute" in half or flag(run, "pp_size", 1) > 1


def test_times_of_kernels():
    """Communication from 0 to 10 µs, of which a product hides 5 to 10; nothing from 15 to 20."""
    events = [("ncclDevKernel", 0, 10), ("nvjet_sm90", 5, 10), ("triton_poi", 20, 5)]
    kernels = [{"name": name, "ts": start, "dur": length} for name, start, length in events]
    found = {name: 1000 * ms for name, ms in kernel_times.times(kernels).items() if ms}
    assert found == pytest.approx(
        {"in all": 25, "communication": 10, "products": 10, "compiled": 5, "of it alone": 5,
         "idle": 5}
    )  # fmt: skip


@pytest.mark.slow
def test_throughput_beside_transformers():
    """One process; two with DDP's buckets; two sharded."""
    found = rows(command("benchmark.py"))
    speeds = [float(row[3].replace(",", "")) for row in found]
    for ours, plain in ((0, 1), (2, 4), (3, 5)):
        assert found[ours][0] != found[plain][0] == "LlamaForCausalLM"
        assert speeds[plain] <= 1.1 * speeds[ours], found


@pytest.mark.slow
def test_a_ring_takes_longer_than_its_blocks():
    flags = "--batch 1 --seq_len 256 --heads 4 --kv_heads 2"  # messages are most of it
    result = launch(TESTS, flags, 4, script="ring_times.py")
    assert result.code == 0, result.errors
    whole, blocks = rows(result.out)
    assert [whole[0], blocks[0]] == ["as it is", "blocks alone"]
    assert 1.5 * float(blocks[1]) < float(whole[1])
    assert "one message: 0 MB" in result.out
