"""Llama, written out: embedding, decoder layers, final norm, head and loss.

Parameter names are those of a Hugging Face checkpoint, so a `state_dict` of `LlamaForCausalLM`
loads as it is. Architecture: Llama 2 (arXiv:2307.09288), section 2.2; Llama 3 (arXiv:2407.21783),
section 3.2.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import causal_attention
from rms_norm import rms_norm


def cross_entropy(logits, targets):
    """Summed negative log-likelihood, in float32 or better.

    logits: [batch, seq, vocab]; targets: [batch, seq]; returns a scalar.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def inverse_frequencies(config, device):
    """Rotary frequencies in radians per position, [head_dim / 2] in float64.

    Source: RoPE (arXiv:2104.09864), section 3.2.2. The `llama3` scaling stretches the wavelengths
    that the original context never saw in full, and leaves the short ones alone.
    """
    rope = config.rope_parameters
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    frequencies = rope["rope_theta"] ** (-exponent / config.head_dim)
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / rope["factor"])
    return frequencies


def rotary_tables(positions, config, dtype):
    """Cosines and sines for positions [seq], computed in float64; each [seq, 1, head_dim]."""
    angles = positions.double()[:, None] * inverse_frequencies(config, positions.device)
    angles = torch.cat([angles, angles], dim=-1)[:, None, :]  # [seq, 1, head_dim]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x, cos, sin):
    """Rotate each pair (i, i + head_dim / 2) of x: [batch, seq, heads, head_dim] by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Linear(nn.Module):
    """y = x Wᵀ without a bias. x: [..., in_features]; weight: [out_features, in_features].

    The weight keeps its own dtype and is cast to that of x where it is used, so its gradient
    arrives in the weight's dtype.
    """

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Module):
    """Rows of weight: [vocab, hidden] picked by tokens: [batch, seq] -> [batch, seq, hidden]."""

    def __init__(self, vocab_size, hidden_size):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens):
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim. Source: RMSNorm (arXiv:1910.07467), section 4."""

    def __init__(self, hidden_size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def project(x, *linears):
    """The products of several layers with the one x that they share, a tuple."""
    return tuple(linear(x) for linear in linears)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions. Source: GQA (arXiv:2305.13245)."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.project, self.attention = project, causal_attention  # later steps put theirs here

    def forward(self, x, cos, sin):  # x: [batch, seq, hidden]
        q, k, v = self.project(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.unflatten(-1, (-1, self.head_dim))  # [batch, seq, heads, head_dim]
        k = k.unflatten(-1, (-1, self.head_dim))  # [batch, seq, kv_heads, head_dim]
        v = v.unflatten(-1, (-1, self.head_dim))  # [batch, seq, kv_heads, head_dim]
        out = self.attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v)
        return self.o_proj(out.flatten(-2))  # [batch, seq, hidden]


class MLP(nn.Module):
    """SwiGLU feed-forward. Source: GLU variants (arXiv:2002.05202), section 2."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.project = project

    def forward(self, x):  # [batch, seq, hidden]
        gate, up = self.project(x, self.gate_proj, self.up_proj)  # [batch, seq, intermediate]
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin):  # x: [batch, seq, hidden]
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything between the tokens and the head; `model.` in the parameter names."""

    def __init__(self, config, dtype, activation_checkpointing):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens, positions):  # [batch, seq], [seq]
        x = self.embed_tokens(tokens).to(self.dtype)  # [batch, seq, hidden]
        table_dtype = torch.promote_types(self.dtype, torch.float32)
        cos, sin = rotary_tables(positions, self.config, table_dtype)
        for layer in self.layers:
            if self.activation_checkpointing:
                # No randomness in a layer, so no generator state to save (arXiv:1604.06174).
                x = checkpoint(layer, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """A Llama that returns its own summed loss.

    Build it under `torch.device("meta")`, then call `materialize`. Every parameter carries
    `global_name`, `full_shape` and `held`, the slices of the full tensor that this process holds.

    config: a `transformers.LlamaConfig` or anything with its fields; dtype: the dtype of the
    computation. `materialize` knows that of the weights.
    """

    def __init__(self, config, dtype=torch.float32, activation_checkpointing=False):
        super().__init__()
        self.model = Decoder(config, dtype, activation_checkpointing)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.cross_entropy = cross_entropy
        # Of the whole model; later steps take parts of it away.
        self.parameter_names = [name for name, _ in self.named_parameters()]
        self.parameter_count = sum(parameter.numel() for parameter in self.parameters())
        for name, parameter in self.named_parameters():
            parameter.global_name = name
            parameter.full_shape = parameter.shape
            parameter.held = tuple(slice(0, size) for size in parameter.shape)

    def forward(self, tokens, targets, positions):
        """Summed negative log-likelihood of targets [batch, seq], a scalar.

        tokens: [batch, seq]; positions: [seq], the place of each token in its sequence.
        """
        logits = self.lm_head(self.model(tokens, positions))  # [batch, seq, vocab]
        return self.cross_entropy(logits, targets)

    def compile_layers(self, backend):
        """Compile each decoder layer and the loss: all layers share one compiled graph."""
        for layer in self.model.layers:
            layer.compile(backend=backend)
        self.cross_entropy = torch.compile(self.cross_entropy, backend=backend)


def initial_value(name, shape, seed, std):
    """The full float32 tensor that a parameter starts from: a function of seed and name alone.

    Norm weights, the only vectors, are ones; matrices are normal with standard deviation std.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn(shape, generator=generator) * std


def materialize(model, seed, device, dtype=None):
    """Replace the meta parameters of a model by real ones, initialised, on a device.

    One full tensor at a time exists on the CPU; only the part that is held stays. dtype: that of
    the weights, by default float64 if the computation is, else float32.
    """
    std = model.model.config.initializer_range
    dtype = dtype or torch.promote_types(model.model.dtype, torch.float32)
    made = {}  # a tied weight is met twice and made once
    for module in model.modules():
        for key, meta in list(module.named_parameters(recurse=False)):
            if meta not in made:
                full = initial_value(meta.global_name, meta.full_shape, seed, std)
                part = torch.empty(meta.shape, dtype=dtype, device=device)
                made[meta] = nn.Parameter(part.copy_(full[meta.held]))
                made[meta].__dict__.update(meta.__dict__)  # global_name, full_shape, held
            module.register_parameter(key, made[meta])
