"""Model configurations: a table of published architectures, local directories, hub ids."""

import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

from errors import UserError, in_one_line, note

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# name: (layers, width, heads, kv heads, intermediate, vocabulary, tied, context, rope, hub ids)
PRESETS = {
    "debug": (8, 128, 8, 4, 384, 256, False, 2048, {}, ()),
    "smollm-135m": (30, 576, 9, 3, 1536, 49152, True, 2048, {}, ("HuggingFaceTB/SmolLM-135M",)),
    "smollm-360m": (32, 960, 15, 5, 2560, 49152, True, 2048, {}, ("HuggingFaceTB/SmolLM-360M",)),
    "smollm-1.7b": (24, 2048, 32, 32, 8192, 49152, True, 2048, {}, ("HuggingFaceTB/SmolLM-1.7B",)),
    "tinyllama-1.1b": (22, 2048, 32, 4, 5632, 32000, False, 2048, {},
                       ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama_v1.1")),
    "llama-3.2-1b": (16, 2048, 32, 8, 8192, 128256, True, 131072, {**LLAMA3_ROPE, "factor": 32.0},
                     ("meta-llama/Llama-3.2-1B",)),
    "llama-3.1-8b": (32, 4096, 32, 8, 14336, 128256, False, 131072, {**LLAMA3_ROPE, "factor": 8.0},
                     ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B")),
}  # fmt: skip


def preset(name):
    """A configuration with the field names of `transformers.LlamaConfig`.

    Not the class itself: importing it costs every process more than a second.
    """
    layers, width, heads, kv_heads, intermediate, vocab, tied, context, rope, _ = PRESETS[name]
    return SimpleNamespace(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope},
        rms_norm_eps=1e-5,
        initializer_range=0.02,
    )


def load_config(args):
    """The configuration that `--model_name` names, with the shape flags that were given.

    Raises UserError for an unknown name, an unreachable hub, a model that is not a Llama, and
    shapes that do not fit together.
    """
    name = args.model_name
    if name not in PRESETS and not Path(name).is_dir():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise UserError(
                f"--model_name {name}: neither a preset ({', '.join(PRESETS)}) nor a directory nor "
                "a hub id, owner/name"
            )
        twin = next((key for key, row in PRESETS.items() if name in row[-1]), None)
        if hub_is_unreachable() and twin:
            note(f"--model_name {name}: no hub to be reached, the preset {twin} (bytes) is used")
            args.model_name = name = twin
    config = preset(name) if name in PRESETS else from_transformers(name)
    override(config, args)
    return config


def hub_is_unreachable():
    """Ask the hub once; if it does not answer, its clients will look into their cache alone.

    By themselves they would try again for half a minute. Call this before importing them.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5)
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
    return os.environ.get("HF_HUB_OFFLINE") == "1"


def from_transformers(name):
    """Read the `config.json` of a directory or a hub id through transformers."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model_name {name}: the directory has no config.json")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(f"--model_name {name}: {in_one_line(error)} (or name a preset)") from None
    unsupported = [
        f"{field} {getattr(config, field, None)}"
        for field, known in [
            ("model_type", ("llama",)),
            ("hidden_act", ("silu",)),
            ("attention_bias", (False,)),
            ("mlp_bias", (False,)),
        ]
        if getattr(config, field, None) not in known
    ]
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope_type not in ("default", "llama3"):
        unsupported.append(f"rope_type {rope_type}")
    if unsupported:
        raise UserError(f"--model_name {name}: not a Llama of this model.py: {unsupported}")
    return config


def override(config, args):
    """Put the shape flags that were given into config and check that the shapes fit together."""
    for field in (
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "intermediate_size",
        "vocab_size",
    ):
        if getattr(args, field) is not None:
            setattr(config, field, getattr(args, field))
        if getattr(config, field) < 1:
            raise UserError(f"--model_name {args.model_name}: its {field} is below 1")
    if args.tie_word_embeddings != "config":
        config.tie_word_embeddings = args.tie_word_embeddings == "yes"
    heads, kv_heads, width = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size,
    )
    if args.num_attention_heads is not None or args.hidden_size is not None:
        if width % heads or width // heads % 2:
            raise UserError(
                f"--hidden_size {width} with --num_attention_heads {heads}: the width must be an "
                "even multiple of the heads"
            )
        config.head_dim = width // heads
    if heads % kv_heads:
        raise UserError(
            f"--num_attention_heads {heads} with --num_key_value_heads {kv_heads}: each kv head "
            "must serve the same number of heads; choose a divisor"
        )
