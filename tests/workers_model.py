"""The model and its kernels, beside those of transformers and in float64."""

import torch
from workers_setup import build

RMS_SHAPES = [(1, 3), (3, 5), (2, 7, 33), (4, 128), (300, 17), (2, 3, 2049)]


def tiny_config(**fields):
    """A `transformers.LlamaConfig` with random small fields put over it."""
    from transformers import LlamaConfig

    defaults = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
                "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
                "max_position_embeddings": 64, "rms_norm_eps": 1e-5}  # fmt: skip
    return LlamaConfig(**{**defaults, **fields})


def against_transformers(fields, dtype):
    """Logits and the summed loss of our model and of LlamaForCausalLM with the same weights.

    Returns (ours, theirs, our loss, their loss) after weights went from theirs to ours by
    `load_state_dict`, and back.
    """
    from transformers import LlamaForCausalLM

    from model import Llama, materialize

    dtype = getattr(torch, dtype)
    config = tiny_config(**fields)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype)
    if dtype == torch.float64:
        upcast_in_float64(theirs)
    with torch.device("meta"):
        ours = Llama(config, dtype)
    materialize(ours, 1, torch.device("cpu"))
    ours.load_state_dict(theirs.state_dict())
    before = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, before[name]), name
    tokens = torch.randint(config.vocab_size, (2, 24))
    positions = torch.arange(24)
    with torch.no_grad():
        our_logits = ours.lm_head(ours.model(tokens, positions))
        their_logits = theirs(tokens).logits
        loss = ours(tokens[:, :-1], tokens[:, 1:], positions[:-1])
        their_loss = theirs(tokens, labels=tokens).loss * tokens[:, 1:].numel()
    return our_logits.numpy(), their_logits.numpy(), loss.item(), their_loss.item()


def upcast_in_float64(model):
    """Where transformers computes in float32 whatever the dtype, put the same formula in float64.

    The frequencies are transformers' own, but from its formula in float32; so its rotary table is
    replaced by one of the oracle's float64 frequencies, which another test compares with its own.
    """
    import numpy_llama

    frequencies = torch.from_numpy(numpy_llama.inverse_frequencies(model.config))

    class Rotary(torch.nn.Module):
        def forward(self, x, position_ids):
            angles = position_ids[..., None].double() * frequencies
            angles = torch.cat([angles, angles], dim=-1)
            return angles.cos(), angles.sin()

    model.model.rotary_emb = Rotary()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: (
                m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon))
            )


def frequencies(fields):
    """Inverse frequencies: our model's, and those of transformers (float32 inside)."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from model import inverse_frequencies

    config = tiny_config(**fields)
    ours = inverse_frequencies(config, torch.device("cpu"))
    return ours.numpy(), LlamaRotaryEmbedding(config).inv_freq.numpy()


def attention_error(dtype, heads, kv_heads, device="cpu"):
    """Forward and backward of `causal_attention` against a plain float64 one; names of kernels.

    Returns (relative error, {kernel names}).
    """
    from torch.profiler import profile

    from model import causal_attention

    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    shapes = [(2, 37, heads, 16), (2, 37, kv_heads, 16), (2, 37, kv_heads, 16)]
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    with profile() as trace:
        out = causal_attention(q, k, v)
        out.square().sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wide = [t.repeat_interleave(heads // t.shape[2], dim=2) for t in exact]
    scores = torch.einsum("bqhd,bkhd->bhqk", wide[0], wide[1]) / 4  # sqrt(16)
    hidden = torch.ones(37, 37, dtype=torch.bool, device=device).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    reference = torch.einsum("bhqk,bkhd->bqhd", weights, wide[2])
    reference.square().sum().backward()
    pairs = [(out, reference), *((t.grad, e.grad) for t, e in zip((q, k, v), exact, strict=True))]
    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    return error, {event.key for event in trace.key_averages()}


def triton_rms_norm(dtype, device="cpu"):
    """Largest relative errors of the Triton kernels against float64, {shape: error}."""
    from rms_norm import TritonRMSNorm

    errors = {}
    for shape in RMS_SHAPES:
        torch.manual_seed(0)
        x = torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=True)
        weights_dtype = torch.promote_types(x.dtype, torch.float32)
        weight = torch.randn(shape[-1], device=device, dtype=weights_dtype, requires_grad=True)
        dy = torch.randn_like(x)
        y = TritonRMSNorm.apply(x, weight, 1e-5)
        y.backward(dy)
        exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
        exact = torch.nn.functional.rms_norm(exact_x, exact_w.shape, exact_w, 1e-5)
        exact.backward(dy.double())
        pairs = [(y, exact), (x.grad, exact_x.grad), (weight.grad, exact_w.grad)]
        errors[shape] = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    return errors


def flops_and_peak(argv, gpu_name):
    """(FLOP a token, number of parameters, peak FLOP/s of a GPU of that name)."""
    import metrics

    state = build(argv)
    torch.cuda.get_device_name = lambda device: gpu_name
    count = sum(p.full_shape.numel() for p in state.model.parameters())
    flops = metrics.flops_per_token(state.model, state.args.seq_len)
    return flops, count, metrics.peak_flops(torch.device("cuda"))


def metas_before_materialize():
    """What a model built on the meta device holds: devices, and global names in model order."""
    from model import Llama

    with torch.device("meta"):
        model = Llama(tiny_config(tie_word_embeddings=True))
    names = [p.global_name for p in model.parameters()]
    slices = [p.held for p in model.parameters()]
    shapes = [tuple(p.full_shape) for p in model.parameters()]
    return {p.device.type for p in model.parameters()}, names, slices, shapes


def preset_sizes():
    """{name: number of parameters} of all presets."""
    from model import Llama
    from presets import PRESETS, preset

    sizes = {}
    for name in PRESETS:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in Llama(preset(name)).parameters())
    return sizes
