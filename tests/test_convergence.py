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
import pytest
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


def test_kept_curves_are_compared_on_any_machine(tmp_path, monkeypatch, capsys):
    def curve(loss):
        kept = {"grad_norm": 1.0, "tokens_per_second": 9.0}
        return [{"step": step, "loss": loss, **kept} for step in (1, 2)]

    kept, figure = tmp_path / "kept.json", tmp_path / "curves.png"
    runs = {"a --tp_size 2": curve(2.0), "b": curve(2.0), "c --dp_size 3": curve(2.001)}
    kept.write_text(json.dumps({"flags": "--dtype float32", "machine": "M", "runs": runs}))

    def main(*more, files=(kept,)):
        words = [word for file in files for word in ("--kept", str(file))]
        monkeypatch.setattr("sys.argv", ["convergence.py", *words, *more])
        with pytest.raises(SystemExit) as end:
            convergence.main()
        return end.value.code, rows(capsys.readouterr().out)

    code, (base, same, other) = main("--figure", str(figure))
    assert code == 1 and base[:3] == ["a", "--tp_size 2", "2"] and base[6] == "baseline"
    assert same[0] == "b" and same[6] == "ok"
    assert other[:5] == ["c", "--dp_size 3", "3", "1.0e-03", "0.0e+00"] and other[6] == "OUTSIDE"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    code, found = main("--baseline", "c --dp_size 3", "b")
    assert code == 1 and [row[0] for row in found] == ["c", "b"]
    assert main("--baseline", "b", "a --tp_size 2")[0] == 0
    assert "no run 'd'" in main("d")[0]
    runs["c --dp_size 3"][0] = runs["b"][0]
    kept.write_text(json.dumps({"flags": "--dtype float32", "machine": "M", "runs": runs}))
    assert main()[0] == 1 and main("--steps", "1")[0] == 0
    again = tmp_path / "again.json"  # of another machine
    again.write_text(
        json.dumps({"flags": "--dtype float32", "machine": "N", "runs": {"b": curve(3.0)}})
    )
    code, found = main("--baseline", "b", "b [N]", files=(kept, again))
    assert code == 1 and found[1][:4] == ["b", "[N]", "1", "1.0e+00"]
    again.write_text(json.dumps({"flags": "--dtype float64", "machine": "N", "runs": {}}))
    assert "again.json: of other flags" in main(files=(kept, again))[0]
    speed = convergence.ROOT / "assets" / "speed_4xH200.json"  # of benchmark.py
    assert "name a file that --save wrote" in main(files=(speed,))[0]


def test_rounding_of_gradients():
    flags = ["--after", "2", "--flags", "--num_hidden_layers 2 --seq_len 8 --max_tokens 128"]
    split = "step3_dataloader --micro_batch_size 2 --gradient_accumulation_steps 4"
    layouts = [
        f"step9_4d --tp_size 2 --dp_size 2 --dp_engine {engine} --micro_batch_size 4"
        for engine in ("zero1", "zero3")
    ]
    found = rows(
        command("rounding.py", "step3_dataloader --micro_batch_size 8", split, *layouts, *flags)
    )
    assert len(found) == 12  # two layers are one kind
    numbers = [float(cell) for row in found for cell in row[1:]]
    assert len(numbers) == 48 and 1e-9 < min(numbers) and max(numbers) < 1e-5
    words = command("rounding.py", split, "step3_dataloader --micro_batch_size 5", *flags, code=1)
    assert "error: step3_dataloader --micro_batch_size 5: 5 sequences a step, not 8" in words
    words = command("rounding.py", f"{split} --no_such_flag", *flags, code=1)
    assert "unrecognized arguments: --no_such_flag" in words


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


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
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
        for run in benchmark.gpu_runs(count):
            assert ranks_of(run) in (1, count)
            if "LlamaForCausalLM" not in run:
                tokens = sequences_of(run) * flag(run, "seq_len", 2048)
                assert tokens == 32_768 * ranks_of(run), run


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
    ours, plain = rows(command("benchmark.py"))
    assert float(plain[6]) <= 1.1  # of our speed
    print(ours, plain)


@pytest.mark.slow
def test_a_ring_takes_longer_than_its_blocks():
    flags = "--batch 1 --seq_len 256 --heads 4 --kv_heads 2"  # messages are most of it
    result = launch(TESTS, flags, 4, script="ring_times.py")
    assert result.code == 0, result.errors
    whole, blocks = rows(result.out)
    assert [whole[0], blocks[0]] == ["as it is", "blocks alone"]
    assert 1.5 * float(blocks[1]) < float(whole[1])
    assert "one message: 0 MB" in result.out
