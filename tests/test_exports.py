"""Exports that must not be had: on a full disk, of spoiled numbers; and what they must keep."""

import contextlib
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import workers_setup
import workers_trainer
from launch import launch, ranks_of
from safetensors.torch import load_file
from test_generate import PIECES, llama2_tokenizer
from test_huggingface import theirs
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.steps(9)
SMALL = "--num_hidden_layers 2 --dataset_name random --seq_len 32 --max_tokens 256 "
SIZE = 4 * (2 * 256 * 128 + 2 * (128 * 384 * 3 + 128 * 128 * 3 + 2 * 128) + 128)  # of the weights


@pytest.fixture
def disk(tmp_path):
    """disk(size): a file system of so many bytes, mounted; skips where that is not allowed."""
    with contextlib.ExitStack() as mounted:

        def mount(size):
            path = tmp_path / f"disk{size}"
            path.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no file system may be mounted here: {error}")
            mounted.callback(subprocess.run, ["umount", "-l", str(path)], check=True)
            return path

        yield mount


def test_no_room_is_said_before_any_work(step_dir, worlds, disk):
    """In float64 it takes twice as much; a checkpoint, whose parts are there, half as much."""
    sizes = random.Random(24)
    for _ in range(3):
        path = disk(sizes.randrange(SIZE, 2 * SIZE - 2**16))
        (said,) = worlds(step_dir, 1).run(workers_setup.refusal, SMALL + f"--save_hf {path}/hf", 1)
        assert said.startswith(f"--save_hf {path}/hf: that takes {2 * SIZE / 1e9:.3g} GB")
        assert "are free" in said and "\n" not in said
    path = disk(2 * SIZE + 2**16)
    assert worlds(step_dir, 1).run(workers_trainer.parsed, SMALL + f"--save_hf {path}/hf")
    double = SMALL + f"--save_hf {path}/hf --dtype float64"
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, double, 1)
    assert f"that takes {4 * SIZE / 1e9:.3g} GB" in said


@pytest.mark.parametrize("layout", ["", "--tp_size 2"])
def test_a_disk_that_fills_up_leaves_nothing_partial(step_dir, worlds, disk, tmp_path, layout):
    path, sizes = disk(4 * SIZE), random.Random(24)
    frees = [sizes.randrange(2**12, SIZE), *(sizes.randrange(SIZE, 2 * SIZE) for _ in range(3))]
    argv = SMALL + f"--save_hf {path}/hf {layout} --micro_batch_size 4"
    kept = tmp_path / "kept"
    argv += f" --checkpoint_dir {kept}" if layout else ""
    ranks = worlds(step_dir, ranks_of(argv)).run(
        workers_trainer.full_disk_export, argv, frees, str(path)
    )
    for found in ranks:
        assert len(found) == len(frees) + 1
        for free, (said, there) in zip(frees, found, strict=False):
            assert said.startswith(f"--save_hf {path}/hf: No space left on device"), said
            # Weights that no checkpoint holds stay where they are whole: that is the first copy.
            parts = None if layout or free < SIZE else path / ".hf.export" / "parts"
            there = {Path(name).parts[0] for name in there}
            assert "\n" not in said and there == ({"hf", ".hf.export"} if parts else {"hf"}), free
            if layout or parts:
                saved = parts or kept / "step_00000002"
                assert f"huggingface.py --checkpoint {saved} --save_hf" in said
        said, there = found[-1]
        assert said is None and "hf/model.safetensors" in there and ".hf.export" not in there
    if layout:  # what is named does it
        shutil.rmtree(path / "hf")
        worlds(step_dir, 1).run(
            workers_trainer.exported, f"--checkpoint {kept}/step_00000002 --save_hf {path}/hf"
        )
        assert AutoModelForCausalLM.from_pretrained(path / "hf").num_parameters() == SIZE // 4


def test_weights_that_found_no_room_twice_can_be_exported_elsewhere(
    step_dir, worlds, disk, tmp_path
):
    """There is no checkpoint of the run, but one of the two copies was whole."""
    path = disk(4 * SIZE)
    argv = SMALL + f"--save_hf {path}/hf --micro_batch_size 4"
    (((said, _),),) = worlds(step_dir, 1).run(
        workers_trainer.full_disk_export, argv, [3 * SIZE // 2], str(path), False
    )
    parts = re.search(r"--checkpoint (\S+) --save_hf", said)[1]
    worlds(step_dir, 1).run(
        workers_trainer.exported, f"--checkpoint {parts} --save_hf {tmp_path}/elsewhere"
    )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")
    assert exported.num_parameters() == SIZE // 4


@pytest.mark.parametrize("layout", ["", "--tp_size 2"])
def test_numbers_that_are_not_finite_are_not_exported(step_dir, worlds, tmp_path, layout):
    norm, head = "model.layers.1.input_layernorm.weight", "lm_head.weight"
    spoiled = [
        {norm: float("nan")},
        {head: float("-inf"), norm: float("inf")},
        {head: float("nan")},
    ]
    argv = SMALL + f"--save_hf {tmp_path}/hf {layout}"
    world = worlds(step_dir, ranks_of(argv))
    for said in world.run(workers_trainer.spoiled_export, argv, spoiled):
        assert len(said) == 3
        for name, line in zip([norm, norm, head], said, strict=True):
            assert line.startswith(f"--save_hf {tmp_path}/hf: {name} has numbers that are not")
            assert "--learning_rate" in line and "\n" not in line
    assert [path.name for path in tmp_path.rglob("*")] == ["hf"]


@pytest.mark.slow
def test_a_run_that_overflows_at_its_last_step_exports_nothing(step_dir, tmp_path):
    argv = f"--learning_rate 1e39 --max_tokens 512 --dataset_name random --save_hf {tmp_path}/hf"
    result = launch(step_dir, argv)
    assert result.code != 0
    (line,) = result.errors[0].splitlines()
    assert line.startswith("error: ")
    assert [path.name for path in tmp_path.rglob("*")] == ["hf"]


def ids_in(path):
    """The special tokens of an exported directory: of its config, then of its defaults."""
    found = []
    for name in ("config.json", "generation_config.json"):
        content = json.loads((path / name).read_text())
        found += [content.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
    return found


def test_all_end_tokens_and_the_padding_survive(step_dir, worlds, tmp_path):
    """In the configuration several, in the defaults for generating one more."""
    source, run = tmp_path / "source", worlds(step_dir, 1).run
    known = {"bos_token_id": 1, "eos_token_id": [2, 40], "pad_token_id": 7}
    theirs(source, vocab=len(PIECES), dtype=torch.float32, **known)
    llama2_tokenizer(source)
    defaults = json.loads((source / "generation_config.json").read_text())
    assert defaults["eos_token_id"] == [2, 40]
    defaults["eos_token_id"] = [2, 50]
    (source / "generation_config.json").write_text(json.dumps(defaults))
    argv = f"--load_hf {source} --dataset_name random --seq_len 128 --max_tokens 512 "
    run(workers_trainer.train_and_save, argv + f"--save_hf {tmp_path}/a")
    assert ids_in(tmp_path / "a") == [1, [2, 40, 50], 7, 1, [2, 50], 7]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["max_position_embeddings"] == 128  # 64 before
    # A tokenizer with another end: the configuration's ids mean nothing to it.
    run(workers_trainer.train_and_save, argv + f"--tokenizer_name bytes --save_hf {tmp_path}/b")
    assert ids_in(tmp_path / "b") == [None, 0, None, None, 0, None]
    # By way of a checkpoint, which says them or, as before, does not.
    run(workers_trainer.train_and_save, argv + f"--checkpoint_dir {tmp_path}/run")
    call = f"--checkpoint {tmp_path}/run --save_hf {tmp_path}/"
    several = {**known, "eos_token_id": [2, 40, 50]}
    run(workers_trainer.exported, call + f"c --tokenizer_name {source}", several)
    assert ids_in(tmp_path / "c") == [1, [2, 40, 50], 7, 1, [2, 50], 7]
    run(workers_trainer.exported, call + "d --tokenizer_name bytes", several)
    assert ids_in(tmp_path / "d") == [None, 0, None, None, 0, None]


def test_a_checkpoint_with_a_tokenizer_of_its_own(step_dir, worlds, tmp_path):
    run = worlds(step_dir, 1).run
    argv = SMALL + f"--checkpoint_dir {tmp_path}/run --vocab_size {len(PIECES)}"
    run(workers_trainer.train_and_save, argv)
    (checkpoint,) = (tmp_path / "run").glob("step_*")
    shutil.rmtree(checkpoint / "tokenizer", ignore_errors=True)
    llama2_tokenizer(checkpoint / "tokenizer")
    call = f"--checkpoint {tmp_path}/run "
    for flag, name in (("", f"{checkpoint}/tokenizer"), ("--tokenizer_name bytes", "bytes")):
        assert run(workers_trainer.tokenizer_for_generating, call + flag) == [name]
        run(workers_trainer.exported, call + f"--save_hf {tmp_path}/{name[-5:]} " + flag)
    there = [
        json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("nizer", "bytes")
    ]
    assert ["▁def" in words["model"]["vocab"] for words in there] == [True, False]
    shutil.rmtree(checkpoint / "tokenizer")
    assert run(workers_trainer.tokenizer_for_generating, call) == ["bytes"]


def test_a_head_of_its_own_in_a_tied_model_and_a_stale_index(step_dir, worlds, tmp_path):
    run = worlds(step_dir, 1).run
    path, shape = tmp_path / "hf", {"vocab": 5000, "num_hidden_layers": 1}  # two blocks of rows
    theirs(path, tied=True, **shape)
    file = path / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    head = table.clone()
    save(tensors | {"lm_head.weight": head}, file)
    argv = f"--load_hf {path} --dtype float64 --dataset_name random --seq_len 32 "
    (same,) = run(workers_trainer.first_loss, argv)  # as `torch.save` of a tied model had it
    head[-1, -1] += 1e3
    save(tensors | {"lm_head.weight": head}, file)
    (said,) = run(workers_setup.refusal, argv, 1)
    for words in (f"--load_hf {path}: ", "lm_head.weight is another", "--tie_word_embeddings yes"):
        assert words in said and "\n" not in said
    (said,) = run(workers_setup.refusal, f"--load_hf {path}", 1, "generate")
    assert "lm_head.weight is another" in said and "set tie_word_embeddings" in said
    assert run(workers_trainer.first_loss, argv + "--tie_word_embeddings yes") == [same]
    (other,) = run(workers_trainer.first_loss, argv + "--tie_word_embeddings no")
    assert other > same + 0.1
    # Shards of an older model, and their index.
    old = tmp_path / "old"
    theirs(old, tied=True, shard="60KB", **shape, initializer_range=0.5)
    save(tensors, file)
    for left in old.glob("model*"):
        shutil.copy(left, path)
    assert run(workers_trainer.first_loss, argv) == [same]
    ((_, _, said),) = run(workers_trainer.configured, [argv])[0]
    assert (
        "model.safetensors is read, model.safetensors.index.json and what it lists are" in said[0]
    )


def save(tensors, file):
    from safetensors.torch import save_file

    save_file(tensors, file, {"format": "pt"})


def test_a_bare_tokenizer_model_names_the_packages_that_it_needs(step_dir, worlds, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (said,) = worlds(step_dir, 1).run(workers_trainer.without_packages, str(tmp_path))
    assert said.startswith(f"--tokenizer_name {tmp_path}: ") and "\n" not in said
    assert "pip install sentencepiece protobuf" in said
