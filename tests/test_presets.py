"""What a configuration is made of: presets, hub ids, directories, and what the flags change."""

import json

import pytest
import workers_setup
import workers_trainer

pytestmark = [pytest.mark.steps(1), pytest.mark.sampled]
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
TWINS = {
    "smollm-135m": ["HuggingFaceTB/SmolLM-135M", "HuggingFaceTB/SmolLM-135M-Instruct"],
    "smollm-360m": ["HuggingFaceTB/SmolLM-360M", "HuggingFaceTB/SmolLM-360M-Instruct"],
    "smollm-1.7b": ["HuggingFaceTB/SmolLM-1.7B", "HuggingFaceTB/SmolLM-1.7B-Instruct"],
    "tinyllama-1.1b": ["TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama_v1.1"],
    "llama-3.2-1b": ["meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"],
    "llama-3.1-8b": [f"meta-llama/{old}Llama-3.1-8B{kind}" for old in ("", "Meta-")
                     for kind in ("", "-Instruct")],
}  # fmt: skip


def test_hub_ids_and_their_instruct_twins_fall_back_to_a_preset(step_dir, worlds):
    argvs = [f"--model_name {name}" for names in TWINS.values() for name in names]
    (found,) = worlds(step_dir, 1).run(workers_trainer.configured, argvs)
    expected = [preset for preset, names in TWINS.items() for _ in names]
    assert [name for name, _, _ in found] == expected
    for argv, (preset, _, said) in zip(argvs, found, strict=True):
        (line,) = said
        assert line.startswith(f"note: {argv}: no hub") and f"preset {preset}" in line


def test_what_flags_leave_or_change_unasked_is_said(step_dir, worlds, tmp_path):
    config = {**LLAMA, "intermediate_size": 160, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cases = {  # flags: (words of the note, intermediate size, longest context)
        "--hidden_size 256": (("--hidden_size 256", "--intermediate_size", "384"), 384, 2048),
        f"--model_name {tmp_path} --hidden_size 32 --seq_len 64": (("32", "160"), 160, 64),
        "--hidden_size 256 --intermediate_size 768": ((), 768, 2048),
        "--hidden_size 128": ((), 384, 2048),
        "--seq_len 4096": (("--seq_len 4096", "max_position_embeddings 2048"), 384, 4096),
        "--seq_len 2048": ((), 384, 2048),
        f"--model_name {tmp_path} --seq_len 128": (("--seq_len 128", "64"), 160, 128),
    }
    (found,) = worlds(step_dir, 1).run(workers_trainer.configured, [*cases])
    for (flags, (words, size, longest)), (_, config, said) in zip(
        cases.items(), found, strict=True
    ):
        assert len(said) == (len(words) > 0), f"with {flags} it says {said}"
        assert all(word in line for line in said for word in words), said
        assert config["intermediate_size"] == size, flags
        assert config["max_position_embeddings"] == longest, flags


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "qwen2"}, "a qwen2 model, whose attention has biases"),
        ({**LLAMA, "hidden_act": "gelu"}, "activation gelu, not silu"),
        *(
            pytest.param(fields, words, marks=pytest.mark.slow)
            for fields, words in [
                ({"model_type": "mistral", "sliding_window": 4096}, "the last 4096 tokens only"),
                ({"model_type": "mistral", "sliding_window": None}, "a mistral model"),
                ({"model_type": "gpt2"}, "a gpt2 model"),
                ({**LLAMA, "attention_bias": True}, "its attention has biases"),
                ({**LLAMA, "mlp_bias": True}, "its MLP has biases"),
                ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}, "as linear"),
            ]
        ),
    ],
)
def test_a_foreign_configuration_is_refused_in_words(step_dir, worlds, tmp_path, fields, words):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for script, flag in (("train", "model_name"), ("train", "load_hf"), ("generate", "load_hf")):
        if flag == "load_hf" and not (step_dir / "huggingface.py").exists():
            continue
        call = f"--{flag} {tmp_path}"
        (said,) = worlds(step_dir, 1).run(workers_setup.refusal, call, 1, script)
        assert said.startswith(f"{call}: not a Llama") and words in said and "\n" not in said
