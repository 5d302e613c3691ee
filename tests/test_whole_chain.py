"""Real text through everything, by the commands that a reader types.

Raw files are prepared as a mix, trained on, stopped, gone on with on another layout, cooled down,
exported, opened by `transformers`, and sampled from.
"""

import ast
import json
import os
import shutil
import signal
import subprocess
import sysconfig
from pathlib import Path

import pytest
from launch import launch
from test_stops import job, ranks_of, wait_for
from test_trainer import BREAKS

MODEL = "--num_hidden_layers 4 --hidden_size 64 --num_attention_heads 4 --num_key_value_heads 2 "
MODEL += "--intermediate_size 128 --dtype float64 --seq_len 32 "
BATCH = "--micro_batch_size 2 --gradient_accumulation_steps {} "
RATES = "--lr_schedule wsd --learning_rate 3e-3 --warmup_steps 5 "


def raw_texts(folder):
    """Code of the standard library, and its docstrings, each in a folder of its own."""
    for name in ("code", "prose"):
        (folder / name).mkdir(parents=True)
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-f]*.py"))[:40]:
        text = file.read_text()
        (folder / "code" / f"{file.stem}.txt").write_text(text)
        said = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if documented(node)]
        (folder / "prose" / f"{file.stem}.txt").write_text("\n\n".join(filter(None, said)))


def documented(node):
    return isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)


def rows_of(metrics):
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.steps(9)
def test_real_text_from_raw_files_to_a_sample(step_dir, tmp_path):
    raw, text, run, cooled = (tmp_path / name for name in ("raw", "text", "run", "cooled"))
    raw_texts(raw)

    def ran(argv, **options):
        result = launch(step_dir, argv, **options)
        assert result.code == 0, (argv, result.errors, result.out[-500:])
        return result

    mix = f"{raw}/code:0.7,{raw}/prose:0.3"
    flags = f"--tokenizer_type bpe --vocab_size 512 --num_proc 2 --output_dir {text}"
    said = ran(f"--input_dir {mix} {flags}", script="prepare.py")
    assert "a vocabulary of 512" in said.out

    # Trained by one process, without a stop: what the others are compared with.
    argv = f"--dataset_name {text} " + MODEL + RATES + "--max_tokens 20480 "
    whole = ran(argv + BATCH.format(4), OMP_NUM_THREADS="1")
    assert "0_code" in whole.out and "1_prose" in whole.out and "bits a byte" in whole.out
    assert len(whole.metrics) == 80

    # On tp 2 and dp 2, stopped by a signal.
    metrics = tmp_path / "metrics.jsonl"
    argv += f"--checkpoint_dir {run} --metrics_file {metrics} "
    layout = "--tp_size 2 --dp_size 2 --dp_engine zero2 " + BATCH.format(2)
    with job(
        step_dir, argv + layout, 4, tmp_path / "logs", through=(BREAKS, "slow_steps")
    ) as going:
        wait_for(metrics, going, 10)
        os.kill(ranks_of(going)[-1], signal.SIGTERM)
        assert going.wait(timeout=120) == 0
    stopped = len(rows_of(metrics))
    assert 10 <= stopped < 80 and (run / "RESUME").exists()

    # Gone on with on pp 2, to the end.
    went_on = ran(argv + "--pp_size 2 --resume auto --save_every 20 " + BATCH.format(4))
    found = rows_of(metrics)
    assert [row["step"] for row in found] == [*range(1, 81)]
    for row, due in zip(found, whole.metrics, strict=True):
        assert row["learning_rate"] == due["learning_rate"]
        for name in ("loss", "grad_norm"):
            assert abs(row[name] - due[name]) <= 1e-9 * abs(due[name]), (row["step"], name)
    held_out = [result.out.split("held-out loss ")[1].split()[0] for result in (whole, went_on)]
    assert held_out[0] == held_out[1]

    # Cooled down from the middle, before its own decay began.
    argv = f"--dataset_name {text} " + MODEL + RATES + BATCH.format(2) + "--dp_size 2 "
    argv += f"--checkpoint_dir {cooled} --restart_from {run}/step_00000060 --restart cooldown "
    down = ran(argv + "--decay_steps 10 ")
    assert [row["step"] for row in down.metrics] == [*range(61, 71)]
    rates = [row["learning_rate"] for row in down.metrics]
    assert rates == sorted(rates, reverse=True) and rates[-1] == 0 and rates[0] < 3e-3
    before = whole.metrics[60]["loss"]
    assert abs(down.metrics[0]["loss"] - before) <= 1e-9 * before

    # Exported, opened by another library, sampled from.
    hf = tmp_path / "hf"
    ran(f"--checkpoint {cooled} --save_hf {hf}", script="huggingface.py")
    sample = "--prompt import --max_new_tokens 12 --temperature 0 "
    ours = ran(f"--load_hf {hf} {sample}", script="generate.py").out
    two = ran(f"--load_hf {hf} {sample} --tp_size 2", script="generate.py", ranks=2).out
    assert ours == two and "import" in ours
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokens = (kind.from_pretrained(sys.argv[1]) for kind in "
        "(AutoModelForCausalLM, AutoTokenizer))\n"
        "inputs = tokens('import', return_tensors='pt')\n"
        "made = model.generate(**inputs, do_sample=False, max_new_tokens=12)\n"
        "print(tokens.decode(made[0]))"
    )
    python = shutil.which("python")
    theirs = subprocess.run([python, "-c", program, hf], capture_output=True, text=True)
    assert theirs.stdout.strip() == ours.strip(), theirs.stderr[-500:]
