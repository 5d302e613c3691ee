"""Model configurations: a table of published architectures, local directories, hub ids."""

import json
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
    "smollm-135m": (30, 576, 9, 3, 1536, 49152, True, 2048, {},
                    ("HuggingFaceTB/SmolLM-135M", "HuggingFaceTB/SmolLM-135M-Instruct")),
    "smollm-360m": (32, 960, 15, 5, 2560, 49152, True, 2048, {},
                    ("HuggingFaceTB/SmolLM-360M", "HuggingFaceTB/SmolLM-360M-Instruct")),
    "smollm-1.7b": (24, 2048, 32, 32, 8192, 49152, True, 2048, {},
                    ("HuggingFaceTB/SmolLM-1.7B", "HuggingFaceTB/SmolLM-1.7B-Instruct")),
    "tinyllama-1.1b": (22, 2048, 32, 4, 5632, 32000, False, 2048, {},
                       ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama_v1.1")),
    "llama-3.2-1b": (16, 2048, 32, 8, 8192, 128256, True, 131072, {**LLAMA3_ROPE, "factor": 32.0},
                     ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct")),
    "llama-3.1-8b": (32, 4096, 32, 8, 14336, 128256, False, 131072, {**LLAMA3_ROPE, "factor": 8.0},
                     ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct",
                      "meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B-Instruct")),
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


def from_transformers(name, flag="--model_name"):
    """Read the `config.json` of a directory or a hub id, which a flag names, by transformers.

    The end tokens of its `generation_config.json` are added to the configuration's.
    """
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"{flag} {name}: the directory has no config.json")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        ends = as_list(config.eos_token_id) + ends_for_generating(name)
        ends = list(dict.fromkeys(ends))
        config.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
    except Exception as error:
        raise UserError(f"{flag} {name}: {in_one_line(error)} (or name a preset)") from None
    if reason := foreign_part(config):
        raise UserError(
            f"{flag} {name}: not a Llama of this model.py: {reason}; name a Llama or a preset"
        )
    return config


def ends_for_generating(name):
    """The end tokens, a list, of the `generation_config.json` of a directory or a hub id."""
    from transformers.utils import cached_file

    try:
        file = cached_file(name, "generation_config.json")
    except OSError:
        return []  # there is none
    return as_list(json.loads(Path(file).read_text()).get("eos_token_id"))


def as_list(ids):
    """Ids as a list, as a configuration has them: none, one, or a list."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def special_tokens(config):
    """The ids of begin, end (one or a list) and padding; None where a configuration has none."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(config, name, None) for name in names}


def ids_of(known, tokenizer):
    """The special tokens of a model that is used with a tokenizer, as from `special_tokens`.

    They are those known of the model, if the tokenizer's end is among them. Else the tokenizer is
    not the one that they are ids of, and its own count. known: None where nothing is.
    """
    own = special_tokens(tokenizer)
    return known if known and own["eos_token_id"] in as_list(known["eos_token_id"]) else own


def foreign_part(config):
    """What a configuration has that model.py has not, in words; None for a Llama."""
    kind = config.model_type
    if kind == "qwen2":
        return "a qwen2 model, whose attention has biases (of q, k and v)"
    if kind == "mistral" and config.sliding_window is not None:
        return f"a mistral model, whose attention sees the last {config.sliding_window} tokens only"
    if kind != "llama":
        return f"a {kind} model"
    if config.hidden_act != "silu":
        return f"its MLP has the activation {config.hidden_act}, not silu"
    if config.attention_bias:
        return "its attention has biases (attention_bias)"
    if config.mlp_bias:
        return "its MLP has biases (mlp_bias)"
    rope_type = (config.rope_parameters or {}).get("rope_type")
    if rope_type not in ("default", "llama3"):
        return f"its rotary positions are scaled as {rope_type} (rope_type), not default or llama3"
    return None


def override(config, args, flag="--model_name"):
    """Put the flags that were given into config and check that the shapes fit together.

    What the flags leave as it is, though it may be meant otherwise, is said.
    """
    if args.hidden_size not in (None, config.hidden_size) and args.intermediate_size is None:
        note(
            f"--hidden_size {args.hidden_size} without --intermediate_size: the latter stays at "
            f"{config.intermediate_size}, made for a width of {config.hidden_size}"
        )
    longest = config.max_position_embeddings
    if args.seq_len > longest:
        note(
            f"--seq_len {args.seq_len}: longer than the model's max_position_embeddings {longest}, "
            f"which becomes {args.seq_len}"
        )
        config.max_position_embeddings = args.seq_len
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
            raise UserError(f"{flag} {args.model_name}: its {field} is below 1")
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
