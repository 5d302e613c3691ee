"""Hugging Face directories, both ways, on any layout."""

import json

import numpy as np
import pytest
import torch
import workers_model
import workers_setup
import workers_trainer
from harness import assemble
from launch import launch, ranks_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

pytestmark = pytest.mark.steps(9)
LAYOUTS = [
    "",
    "--tp_size 2 --dp_size 2 --dp_engine zero3",
    "--pp_size 2 --cp_size 2 --dp_engine zero1",
    "--tp_size 4 --sequence_parallel",
]
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


def theirs(path, tied=False, dtype=torch.float64, shard="10GB", vocab=257, **fields):
    """A directory with a random model of transformers; returns the model in float64."""
    torch.manual_seed(1)
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    config = workers_model.tiny_config(
        tie_word_embeddings=tied, vocab_size=vocab, **shape, **fields
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is not loaded
                weight.copy_(torch.rand_like(weight) + 0.5)
    model.save_pretrained(path, max_shard_size=shard)
    return model.double()


def summed_loss(model, tokens):
    workers_model.upcast_in_float64(model)
    with torch.no_grad():
        logits = model(torch.tensor(tokens[:, :-1])).logits
    targets = torch.tensor(tokens[:, 1:]).flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()


@pytest.mark.parametrize(
    "kind",
    [
        {"tied": True},
        {"tied": False, "shard": "60KB"},
        {"tied": True, "shard": "60KB", "dtype": torch.bfloat16},
        {"tied": False, "rope_parameters": ROPE, "head_dim": 12},
    ],
    ids=["tied", "sharded", "tied-sharded-bfloat16", "llama3-rope"],
)
def test_a_model_of_transformers_is_loaded_onto_any_layout(
    step_dir, worlds, tmp_path, subtests, kind
):
    model = theirs(tmp_path / "hf", **kind)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == ("shard" in kind)
    tokens = np.random.default_rng(0).integers(257, size=(3, 33))
    argv = f"--load_hf {tmp_path / 'hf'} --dtype float64 --dataset_name random --seq_len 32 "
    (ours,) = worlds(step_dir, 1).run(workers_trainer.reading, argv, tokens)
    assert ours == pytest.approx(summed_loss(model, tokens), rel=1e-10)
    alone = argv + "--micro_batch_size 4"
    ((first),) = worlds(step_dir, 1).run(workers_trainer.first_loss, alone)
    for layout in LAYOUTS[1:]:
        with subtests.test(layout):
            size = 2 if "dp_size" in layout else 4
            found = worlds(step_dir, ranks_of(layout)).run(
                workers_trainer.first_loss, argv + layout + f" --micro_batch_size {size}"
            )
            assert found == pytest.approx([first] * len(found), rel=1e-12)


@pytest.mark.parametrize("tied", ["yes", "no"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_opened_by_transformers(step_dir, worlds, tmp_path, layout, tied):
    """With the same logits, a tokenizer, and defaults for generating."""
    out = tmp_path / "out"
    argv = f"--dtype float64 --num_hidden_layers 2 --tie_word_embeddings {tied} --vocab_size 257 "
    argv += f"--dataset_name random --seq_len 32 --max_tokens 512 --save_hf {out} "
    argv += f"--learning_rate 3e-3 --warmup_steps 1 {layout} --micro_batch_size "
    argv += "4" if "dp_size" in layout else "8"
    ranks = worlds(step_dir, ranks_of(layout)).run(workers_trainer.train_and_save, argv)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)
    weights = assemble([held for _, held in ranks])
    stored = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert stored.keys() == weights.keys()
    for name, weight in weights.items():
        assert np.array_equal(weight, stored[name]), name
    assert model.config.tie_word_embeddings == (tied == "yes")
    assert model.generation_config.eos_token_id == 0
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("def ä")["input_ids"] == [*"def ä".encode()]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what was written aside is left"
    tokens = np.random.default_rng(0).integers(257, size=(2, 33))
    again = f"--load_hf {out} --dtype float64 --dataset_name random --seq_len 32"
    (ours,) = worlds(step_dir, 1).run(workers_trainer.reading, again, tokens)
    assert ours == pytest.approx(summed_loss(model, tokens), rel=1e-10)


def without(path, name):
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def with_spare(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def listed(path, content):
    """The files of an index, which counts where there is no single file."""
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(content)


def truncated(path):
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "model.safetensors").unlink(), "safetensors"),
        (truncated, "safetensors"),
        (lambda path: without(path, "model.norm.weight"), "model.norm.weight is missing"),
        (with_spare, "q_proj.bias"),
        (lambda path: listed(path, "{"), "safetensors"),
        (
            lambda path: listed(
                path, json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}})
            ),
            "gone.safetensors",
        ),
    ],
)
def test_a_directory_that_is_not_whole_is_one_line(step_dir, worlds, tmp_path, damage, words):
    theirs(tmp_path)
    damage(tmp_path)
    (said,) = worlds(step_dir, 1).run(workers_setup.refusal, f"--load_hf {tmp_path}", 1)
    assert said.startswith(f"--load_hf {tmp_path}") and words in said and "\n" not in said


def test_a_missing_tokenizer_is_noticed_before_training(step_dir, worlds, tmp_path):
    (tmp_path / "none").mkdir()
    argv = f"--dataset_name random --save_hf {tmp_path}/out --tokenizer_name {tmp_path}/none"
    ((said,),) = worlds(step_dir, 1).run(workers_setup.refusals_of_setup, [argv])
    assert said.startswith("--tokenizer_name") and "\n" not in said


@pytest.mark.slow
def test_a_name_that_is_taken_meanwhile_loses_no_model(step_dir, tmp_path):
    out = tmp_path / "out"
    argv = "--num_hidden_layers 1 --dataset_name random --seq_len 16 --max_tokens 64 "
    result = launch(step_dir, argv + f"--checkpoint_dir {out} --save_hf {out}")
    (said,) = result.errors[0].splitlines()
    whole = tmp_path / ".out.export" / "whole"
    assert result.code != 0 and said.startswith(f"error: --save_hf {out}") and f"{whole}" in said
    assert AutoModelForCausalLM.from_pretrained(whole).num_parameters() > 0


@pytest.mark.slow
def test_a_head_that_is_not_read_is_named(step_dir, tmp_path):
    theirs(tmp_path)
    argv = f"--load_hf {tmp_path} --dataset_name random --seq_len 16 --max_tokens 64 "
    for tied, notes in (("yes", 1), ("config", 0)):
        result = launch(step_dir, argv + f"--tie_word_embeddings {tied}")
        assert result.code == 0, result.errors
        assert result.out.count("note: --tie_word_embeddings yes: lm_head.weight") == notes


def test_other_wrong_calls(step_dir, worlds, tmp_path):
    theirs(tmp_path / "hf")
    for flags, words in (
        (f"--load_hf {tmp_path / 'hf'} --hidden_size 32", "[257, 64], not [257, 32]"),
        (f"--load_hf {tmp_path / 'hf'} --model_name smollm-135m", "--model_name smollm-135m"),
        (f"--load_hf {tmp_path / 'nowhere'}", "no config.json"),
        (f"--save_hf {tmp_path / 'hf'}", "not empty"),
        ("--save_hf /dev/null/hf", "--save_hf /dev/null/hf"),
        ("--save_hf /dev", "a mount point"),
    ):
        (said,) = worlds(step_dir, 1).run(workers_setup.refusal, flags, 1)
        assert words in said and "\n" not in said
