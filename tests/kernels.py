"""Speed and error of the kernels that a step can choose between, on this machine's GPU.

    python tests/kernels.py
    python tests/kernels.py --batch 4 --heads 32 --kv_heads 8 --head_dim 128 --save kernels.json

Attention of one device; the blocks of a ring; RMSNorm. Times are medians of `triton`'s do_bench,
errors ||x - exact|| / ||exact|| of output and gradients together, with exact ones in float64.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from launch import machine, table
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[1]

try:
    from flash_attn.flash_attn_interface import (
        _flash_attn_backward,
        _flash_attn_forward,
        flash_attn_func,
    )
except ImportError:
    flash_attn_func = None


class FlashAttn:
    """Blocks of a ring by the package flash-attn, as the classes of `attention_blocks.py`."""

    @staticmethod
    def forward(q, k, v, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        out, log_sum, *_ = _flash_attn_forward(
            q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False
        )
        return out.transpose(1, 2), log_sum

    @staticmethod
    def backward(grad, q, k, v, out, log_sum, causal):
        grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        _flash_attn_backward(
            grad, q, k, v, out, log_sum.contiguous(), *grads, 0.0, q.shape[-1] ** -0.5, causal,
            -1, -1, 0.0, None, False,
        )  # fmt: skip
        return [x.transpose(1, 2) for x in grads]


def milliseconds(function, *args):
    from triton.testing import do_bench

    return do_bench(functools.partial(function, *args), warmup=50, rep=200, return_mode="median")


def both_ways(kernel, inputs, grad):
    """What an autograd function gives, and its gradients."""
    out = kernel(*inputs)
    return [out, *torch.autograd.grad(out, [x for x in inputs if torch.is_tensor(x)], grad)]


def error(found, exact):
    """||found - exact|| / ||exact|| of lists of tensors; the largest."""
    pairs = zip(found, exact, strict=True)
    return max(float((x.double() - y).norm() / y.norm()) for x, y in pairs)


def scaled_dot_product(backend, q, k, v):
    """As `causal_attention` of the steps, by one backend."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)


def attention(options, device):
    """Rows (kernel, ms forward, ms both, error) of causal attention."""
    batch, seq, dim = options.batch, options.seq_len, options.head_dim

    def draw(heads):
        x = torch.randn(batch, seq, heads, dim, device=device, dtype=torch.bfloat16)
        return x.requires_grad_()

    q, k, v = draw(options.heads), draw(options.kv_heads), draw(options.kv_heads)
    grad = torch.randn_like(q)
    one = [x.detach()[:1].double().requires_grad_() for x in (q, k, v)]
    exact = both_ways(
        functools.partial(scaled_dot_product, SDPBackend.MATH), one, grad[:1].double()
    )
    kernels = {
        f"{name} of PyTorch": functools.partial(scaled_dot_product, backend)
        for name, backend in (
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
        )
    }
    if flash_attn_func is not None:
        kernels["flash-attn"] = functools.partial(flash_attn_func, causal=True)
    for name, kernel in kernels.items():
        wrong = error([x[:1] for x in both_ways(kernel, (q, k, v), grad)], exact)
        forward = milliseconds(kernel, q, k, v)
        yield name, forward, milliseconds(both_ways, kernel, (q, k, v), grad), wrong


def blocks(options, device):
    """Rows of the two kinds of a ring's blocks: a rank's own, and one that came by."""
    import attention_blocks

    batch, seq, dim = options.batch, options.seq_len, options.head_dim
    kernels = {"cuDNN of PyTorch": attention_blocks.Cudnn}
    if flash_attn_func is not None:
        kernels["flash-attn"] = FlashAttn
    for what, keys, causal in (("own block", seq, True), ("another's", seq // 2, False)):
        # As they come in a model: [batch, seq, heads, head_dim], seen with two dims swapped.
        q, grad = (
            torch.randn(batch, seq, options.heads, dim, device=device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        k, v = torch.randn(
            2, batch, keys, options.kv_heads, dim, device=device, dtype=torch.bfloat16
        )
        q, k, v, grad = (x.transpose(1, 2) for x in (q, k, v, grad))
        one = [x[:1].double() for x in (q, k, v)]
        exact, log_sum = attention_blocks.Plain.forward(*one, causal)
        grads = attention_blocks.Plain.backward(grad[:1].double(), *one, exact, log_sum, causal)
        for name, kernel in kernels.items():
            out = kernel.forward(q, k, v, causal)
            found = [*out, *kernel.backward(grad, q, k, v, *out, causal)]
            wrong = error([x[:1] for x in found], [exact, log_sum, *grads])
            forward = milliseconds(kernel.forward, q, k, v, causal)
            back = milliseconds(kernel.backward, grad, q, k, v, *out, causal)
            yield f"{name}, {what}", forward, forward + back, wrong


def norms(options, device):
    """Rows of RMSNorm over rows as wide as the heads together."""
    import rms_norm

    width = options.heads * options.head_dim
    x = torch.randn(options.batch, options.seq_len, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(width, device=device)
    grad = torch.randn_like(x)

    def plain(x, weight, eps):
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)

    exact = [x.double().requires_grad_(), weight.double().requires_grad_(), 1e-5]
    exact = both_ways(plain, exact, grad.double())
    inputs = x.requires_grad_(), weight.requires_grad_(), 1e-5
    kernels = {
        "Triton, by hand": rms_norm.TritonRMSNorm.apply,
        "compiled": torch.compile(plain),
        "PyTorch's operator": plain,
    }
    for name, kernel in kernels.items():
        wrong = error(both_ways(kernel, inputs, grad), exact)
        forward = milliseconds(kernel, *inputs)
        yield name, forward, milliseconds(both_ways, kernel, inputs, grad), wrong


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("batch", 4), ("seq_len", 2048), ("heads", 32), ("kv_heads", 32), ("head_dim", 64)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--save", type=Path, help="write all figures to this .json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: these are kernels for CUDA, and this machine has no CUDA device")
    sys.path.insert(0, str(ROOT / "step9_4d"))
    torch.manual_seed(0)
    print(machine())
    saved = {"machine": machine(), "shape": {k: v for k, v in vars(options).items() if k != "save"}}
    for measure in (attention, blocks, norms):
        rows = list(measure(options, torch.device("cuda")))
        saved[measure.__name__] = rows
        cells = [[name, f"{f:.3f}", f"{b:.3f}", f"{e:.1e}"] for name, f, b, e in rows]
        print(f"\n{table([measure.__name__, 'forward ms', 'with backward ms', 'error'], cells)}")
    if options.save:
        options.save.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
