"""A wrong call gets one line that says what to do, at once, on one rank."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import breaks
import pytest
import workers_data
import workers_model
import workers_setup
from conftest import step_number
from launch import launch, on_two, ranks_of

# flags: (words that the line must hold). {tmp} is a directory made by `folder`.
STEP1 = {
    "--model_name debugg": ("--model_name debugg", "smollm-135m"),
    "--model_name nobody/nothing": ("--model_name nobody/nothing", "preset"),
    "--model_name {tmp}": ("has no config.json",),
    "--model_name {tmp}/nowhere": ("--model_name", "neither a preset", "directory"),
    "--model_name {tmp}/broken": ("--model_name", "broken"),
    "--model_name {tmp}/gpt2": ("--model_name", "gpt2", "not a Llama"),
    "--model_name {tmp}/yarn": ("--model_name", "yarn", "not a Llama"),
    "--hidden_size 100": ("--hidden_size 100", "--num_attention_heads 8", "multiple"),
    "--num_attention_heads 8 --num_key_value_heads 3": ("--num_key_value_heads 3", "divisor"),
    "--device cuda": ("--device cuda", "--device cpu"),
    "--seq_len 0": ("--seq_len", "'0'", "1 or more"),
    "--micro_batch_size x": ("--micro_batch_size", "'x'"),
    "--learning_rate nan": ("--learning_rate", "'nan'", "above 0"),
    "--weight_decay -0.1": ("--weight_decay", "-0.1"),
    "--dtype int8": ("--dtype", "int8", "bfloat16"),
    "--compile fast": ("--compile", "fast", "inductor"),
    "--seq 64": ("unrecognized arguments", "--seq", "--help"),
    "--metrics_file {tmp}/nowhere/m.jsonl": ("--metrics_file", "nowhere", "directory"),
    "--metrics_file {tmp}": ("--metrics_file", "directory"),
    "--learning_rate 1e38 --warmup_steps 0 --seq_len 8": ("nan at step", "--learning_rate"),
    "--learning_rate 1e25 --warmup_steps 0 --seq_len 8 --num_hidden_layers 1 --max_tokens 64": (
        "gradient norm nan at step 2",
    ),
    "--warmup_steps 1e3": ("--warmup_steps", "'1e3'", "0 or more"),
    "--model_name {tmp}/zero": ("zero", "num_hidden_layers", "below 1"),
    "--lr_schedule slow": ("--lr_schedule", "slow", "wsd"),
    "--lr_schedule constant --decay_steps 3": ("--decay_steps", "--lr_schedule constant"),
    "--lr_schedule constant --min_lr_ratio 0": ("--min_lr_ratio", "--lr_schedule constant"),
    "--decay_steps 5000": ("--decay_steps 5000", "--max_tokens", "--warmup_steps"),
    "--min_lr_ratio 1.5": ("--min_lr_ratio 1.5", "0 to 1"),
    "--optimizer adamv": ("--optimizer adamv", "adamw"),
    "--optimizer_args [1]": ("--optimizer_args [1]", "JSON object"),
    '--optimizer_args {{"lr":1}}': ("--optimizer_args", "--learning_rate"),
    '--optimizer sgd --optimizer_args {{"beta":1}}': ("--optimizer sgd", "beta", "torch.optim"),
    "--dtype float32 --weights_dtype bfloat16": ("--weights_dtype bfloat16", "--dtype float32"),
    "--dtype float64 --weights_dtype float32": ("--weights_dtype float32", "--dtype float64"),
    "--dtype float16 --optimizer radam": ("--dtype float16", "--optimizer radam", "bfloat16"),
    "--dtype float16 --learning_rate 1e38 --warmup_steps 0 --seq_len 8 --num_hidden_layers 1": (
        "gradient norm nan at step 18",
        "loss scale fell below 1",
        "--dtype bfloat16",
    ),
    "--profile 2": ("--profile 2", "2:3"),
    "--profile 3:2": ("--profile 3:2", "from 1 to"),
    "--profile 1:99999": ("--profile 1:99999", "from 1 to"),
    "--profile 1:1 --profile_dir {tmp}/a.txt": ("--profile_dir", "a.txt", "folder"),
    "--memory_snapshot {tmp}/m": ("--memory_snapshot", "--device cpu", "CUDA"),
    "--detect_anomaly --compile aot_eager": ("--detect_anomaly", "--compile"),
    "--use_tensorboard {tmp}/a.txt": ("--use_tensorboard", "a.txt"),
}
STEP1_ONLY = {"--vocab_size 100": ("--vocab_size 100", "256")}
UNTIL_STEP8 = {"--optimizer Muon": ("--optimizer muon", "whole matrices", "adamw")}
STEP3 = {
    "--dataset_name {tmp}/nowhere.txt": ("--dataset_name", "nowhere.txt", "no such file"),
    "--dataset_name {tmp}/gpt2": ("--text_column text", "model_type"),  # not what was meant
    "--dataset_name {tmp}/pictures": ("--dataset_name", "no file", ".parquet"),
    "--dataset_name {tmp}/empty.txt": ("--dataset_name", "empty.txt", "0 training sequences"),
    "--dataset_name {tmp}/short.txt": ("short.txt", "--seq_len 128", "--micro_batch_size 4"),
    "--dataset_name {tmp}/bad.parquet": ("--dataset_name", "bad.parquet"),
    "--dataset_name {tmp}/mixed": ("--dataset_name", "mixed", "one kind"),
    "--dataset_name {tmp}/numbers.jsonl": ("--text_column text", "no text there but int64"),
    "--dataset_name {tmp}/latin.txt": ("latin.txt", "utf-8", "0xe9"),
    "--dataset_name {tmp}/rows.jsonl": ("--text_column text", "rows.jsonl", "story"),
    "--dataset_name nobody/nothing": ("--dataset_name nobody/nothing", "local file"),
    "--tokenizer_name nobody/nothing --dataset_name {tmp}/a.txt": ("--tokenizer_name", "bytes"),
    "--vocab_size 100 --dataset_name {tmp}/a.txt": ("--vocab_size 100", "bytes", "id 121"),
    "--seq_len 50000000": ("python-stdlib", "0 training sequences", "--seq_len 50000000"),
    "--seq_len 64 --stride 64": ("--stride 64", "--seq_len 64"),
    "--dataset_name {tmp}/a.txt:0.7,{tmp}/b.txt": ("--dataset_name", "each text", "a weight"),
    "--dataset_name {tmp}/a.txt:0.7,{tmp}/none.txt:0.3": ("none.txt", "no such file"),
    "--dataset_name {tmp}/a.txt:0,python-stdlib:1": ("--dataset_name", "above 0"),
    "--dataset_name {tmp}/a.txt:0.123457,python-stdlib:1": ("--dataset_name", "fewer digits"),
    "--eval_tokens 0": ("--eval_tokens", "1 or more"),
    "--streaming --dataset_name random": ("--streaming", "--dataset_name random"),
    "--streaming --dataset_name {tmp}/a.txt:0.5,python-stdlib:0.5": ("--streaming", "a mix"),
    "--streaming --stride 4": ("--streaming", "--stride 4"),
    "--streaming --dataset_name {tmp}/a.txt": ("--streaming", "a.txt", "number is 1", "64"),
    "--streaming --dataset_name {tmp}/few.jsonl": ("few.jsonl", "too few", "shard 9 of 64"),
    "--streaming --dataset_name {tmp}/rows.jsonl": ("--text_column text", "rows.jsonl", "story"),
    "--streaming --dataset_name {tmp}/list.json": ("list.json, line 1", "one a line"),
    "--streaming --seq_len 300000 --dataset_name {tmp}/many.jsonl": (
        "held out",
        "--seq_len 300000",
    ),
    "--streaming --vocab_size 100 --dataset_name {tmp}/many.jsonl": ("--vocab_size 100", "bytes"),
    "--streaming --dataset_name nobody/nothing": ("--dataset_name nobody/nothing", "local file"),
    "--gradient_accumulation_steps 0": ("--gradient_accumulation_steps", "1 or more"),
    "--learning_rate 1e39 --max_tokens 512": ("held-out loss nan at step 1", "--learning_rate"),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("zero", "gpt2", "yarn", "broken", "mixed", "pictures"):
        (folder / name).mkdir()
    (folder / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    zero = {"model_type": "llama", "num_hidden_layers": 0}
    (folder / "zero" / "config.json").write_text(json.dumps(zero))
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    workers_model.tiny_config(rope_parameters=rope).save_pretrained(folder / "yarn")
    (folder / "broken" / "config.json").write_text("{")
    (folder / "mixed" / "a.txt").write_text("text")
    (folder / "mixed" / "b.jsonl").write_text('{"text": "text"}')
    (folder / "pictures" / "a.png").write_bytes(b"x")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("ten bytes.")
    (folder / "a.txt").write_text("any text will do " * 1000)
    (folder / "bad.parquet").write_bytes(b"no parquet at all")
    (folder / "numbers.jsonl").write_text('{"text": 7}\n')
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "few.jsonl").write_text('{"text": "text"}\n' * 9)
    many = "".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(1000))
    (folder / "many.jsonl").write_text(many)
    (folder / "list.json").write_text('[{"text": "text"}]')
    (folder / "rows.jsonl").write_text('{"story": "text"}\n' * 9)
    return folder


def assert_one_line(result, words, seconds):
    assert result.code != 0
    mine, *others = result.errors
    lines = mine.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.errors
    for word in words:
        assert word in lines[0], lines[0]
    assert not any(others), others
    assert not result.metrics or "nan at step" in lines[0], "work had started"
    assert result.seconds < seconds


def launch_all(step_dir, folder, subtests, cases, seconds):
    """Launch each wrong call, as many at a time as there are cores."""

    def wrong(flags):
        # Caches of their own, but where a tokenised standard library has to be there.
        caches = {"XDG_CACHE_HOME": str(folder), "HF_HOME": str(folder / "hf")}
        caches = {} if "seq_len" in flags else caches
        caches["HF_ENDPOINT"] = "http://127.0.0.1:9"  # a hub that can't be reached
        return launch(step_dir, flags.format(tmp=folder), **caches)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for flags, result in zip(cases, pool.map(wrong, cases), strict=True):
            with subtests.test(flags):
                assert_one_line(result, cases[flags], seconds)


def alone(flags):
    """Whether a call is launched: it asks for the hub; and one more."""
    return "nobody" in flags or flags == "--hidden_size 100"


def later(flags):
    """Whether it fails only while it trains; launched where all are."""
    return "--learning_rate 1e" in flags


def check_all(step_dir, worlds, folder, subtests, cases, seconds):
    launch_all(step_dir, folder, subtests, {f: cases[f] for f in cases if alone(f)}, seconds)
    calls = [flags for flags in cases if not alone(flags) and not later(flags)]
    argvs = [flags.format(tmp=folder) for flags in calls]
    (answers,) = worlds(step_dir, 1).run(workers_setup.refusals_of_setup, argvs)
    for flags, said in zip(calls, answers, strict=True):
        with subtests.test(flags):
            assert "\n" not in said
            for word in cases[flags]:
                assert word in said


def calls_of_the_model(step_dir):
    number = step_number(step_dir)
    return STEP1 | (STEP1_ONLY if number < 3 else {}) | (UNTIL_STEP8 if number < 9 else {})


@pytest.mark.steps(1, 1)
def test_wrong_calls_of_the_model(step_dir, worlds, folder, subtests):
    check_all(step_dir, worlds, folder, subtests, calls_of_the_model(step_dir), 15)


@pytest.mark.slow
@pytest.mark.steps(1, 1)
def test_wrong_calls_of_the_model_as_launched(step_dir, folder, subtests):
    launch_all(step_dir, folder, subtests, calls_of_the_model(step_dir), 15)


@pytest.mark.slow
@pytest.mark.steps(1, 1)
def test_a_hub_id_of_a_preset_needs_no_hub(step_dir):
    flags = "--model_name HuggingFaceTB/SmolLM-135M --hidden_size 18 --num_hidden_layers 1"
    flags += " --intermediate_size 48"
    flags += " --seq_len 8 --max_tokens 1"
    if step_number(step_dir) > 2:
        flags += " --dataset_name random"
    result = launch(step_dir, flags, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.code == 0 and result.errors == [""]
    assert result.out.count("note: ") == 1
    assert "smollm-135m" in result.out.splitlines()[0]


@pytest.mark.steps(3, 3)
def test_wrong_calls_of_the_data(step_dir, worlds, folder, subtests):
    check_all(step_dir, worlds, folder, subtests, STEP3, 30)


@pytest.mark.sampled(9)
@pytest.mark.steps(3)
def test_a_held_out_loss_that_is_not_a_number_is_an_error(step_dir, worlds):
    """The last update may ruin the weights: no loss of a step would show it."""
    argv = "--dataset_name random --seq_len 8 --num_hidden_layers 2" + on_two(step_dir)
    for said in worlds(step_dir, ranks_of(argv)).run(workers_data.held_out_loss_of_ruined, argv):
        assert "held-out loss nan at step 0" in said and "--learning_rate 0.0003" in said


@pytest.mark.slow
@pytest.mark.steps(3, 3)
def test_wrong_calls_of_the_data_as_launched(step_dir, folder, subtests):
    launch_all(step_dir, folder, subtests, STEP3, 30)


@pytest.mark.slow
@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(2)
def test_one_rank_reports_and_the_others_wait_for_it(step_dir):
    flags = "--model_name debugg"
    late = (breaks.__file__, "late_first_rank")
    result = launch(step_dir, flags + on_two(step_dir), ranks=2, through=late)
    assert_one_line(result, STEP1[flags], 30)


@pytest.mark.slow
@pytest.mark.steps(3)
def test_an_error_of_the_tokenising_rank_ends_all(step_dir, folder):
    flags = "--dataset_name {tmp}/rows.jsonl"
    late = (breaks.__file__, "late_first_rank")
    argv = flags.format(tmp=folder) + on_two(step_dir)
    result = launch(step_dir, argv, ranks=2, through=late)
    assert_one_line(result, STEP3[flags], 30)


@pytest.mark.slow
@pytest.mark.steps(2, 2)
def test_an_error_in_opening_the_reports_ends_all(step_dir, tmp_path):
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "WANDB_DIR": str(tmp_path)}
    environment |= {"HOME": str(tmp_path), "WANDB_SILENT": "true"}
    result = launch(step_dir, "--use_wandb" + on_two(step_dir), ranks=2, **environment)
    assert result.code != 0
    assert result.errors[0].splitlines()[-1].startswith("error: --use_wandb"), result.errors[0]
    assert result.errors[1] == ""


@pytest.mark.slow
@pytest.mark.steps(2, 2)
def test_a_nan_under_torchrun_ends_all(step_dir):
    flags = "--learning_rate 1e38 --warmup_steps 0 --seq_len 8"
    assert_one_line(launch(step_dir, flags + on_two(step_dir), ranks=2), STEP1[flags], 30)


@pytest.mark.steps(9)
def test_a_rank_that_listens_for_signals_keeps_quiet_too(step_dir, tmp_path):
    """torchrun ends the second rank by the signal that asks a run to save and stop."""
    flags = "--learning_rate 1e38 --warmup_steps 0 --seq_len 8"
    argv = f"{flags} --checkpoint_dir {tmp_path}{on_two(step_dir)}"
    assert_one_line(launch(step_dir, argv), STEP1[flags], 30)


@pytest.mark.sampled(9, only=True)
@pytest.mark.steps(4)
def test_a_world_that_does_not_fit_is_one_line(step_dir):
    """As launched: a layout of four for a job of two."""
    flags = on_two(step_dir).replace(" 2", " 4")
    result = launch(step_dir, flags, ranks=2)
    assert_one_line(result, ("= 4 ranks, but 2 started", "--nproc_per_node"), 30)
