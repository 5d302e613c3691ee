"""RMSNorm, fused: one kernel forward and one backward, written in Triton for CUDA.

Eager PyTorch reads and writes the activations once for each of cast, square, mean, scale and
multiply; a norm is bound by memory, so one pass is several times faster. Elsewhere, and under
`torch.compile`, which fuses by itself, PyTorch's own operator is used.

    r = 1 / sqrt(mean(x²) + eps)        y = x r w
    dx = r (w dy - x r² mean(w dy x))    dw = sum over rows of dy x r

Source: RMSNorm (arXiv:1910.07467), section 4.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform
    triton = None

BACKWARD_PROGRAMS = 256  # each sums the weight gradient of its rows; the sums are added after

if triton is not None:

    @triton.jit
    def forward_kernel(
        x_ptr, weight_ptr, y_ptr, r_ptr, hidden, eps: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < hidden
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
        x = tl.load(x_ptr + row * hidden + columns, mask=inside, other=0.0).to(weight.dtype)
        r = 1 / tl.sqrt(tl.sum(x * x) / hidden + eps)
        y = x * r * weight
        tl.store(r_ptr + row, r)
        tl.store(y_ptr + row * hidden + columns, y.to(y_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def backward_kernel(
        dy_ptr, x_ptr, weight_ptr, r_ptr, dx_ptr, dw_ptr, rows, hidden, BLOCK: tl.constexpr
    ):
        columns = tl.arange(0, BLOCK)
        inside = columns < hidden
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
        dw = tl.zeros_like(weight)
        program, programs = tl.program_id(0), tl.num_programs(0)
        offset = program.to(tl.int64) * hidden + columns
        r_ptr += program
        for _ in range(program, rows, programs):
            x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(weight.dtype)
            dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(weight.dtype)
            r = tl.load(r_ptr)
            dx = r * (weight * dy - x * (r * r * tl.sum(weight * dy * x) / hidden))
            dw += dy * x * r
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            offset += programs * hidden
            r_ptr += programs
        tl.store(dw_ptr + program * hidden + columns, dw, mask=inside)


class TritonRMSNorm(torch.autograd.Function):
    """x: [..., hidden] in any float dtype, weight: [hidden] in float32 or float64."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        hidden = x.shape[-1]
        y = torch.empty_like(x)
        r = torch.empty(x.shape[:-1], dtype=weight.dtype, device=x.device)
        block = triton.next_power_of_2(hidden)
        forward_kernel[(r.numel(),)](x, weight, y, r, hidden, eps, BLOCK=block)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        hidden, rows = x.shape[-1], r.numel()
        dx = torch.empty_like(x)
        programs = min(rows, BACKWARD_PROGRAMS)
        dw = torch.empty(programs, hidden, dtype=weight.dtype, device=x.device)
        block = triton.next_power_of_2(hidden)
        backward_kernel[(programs,)](
            dy.contiguous(), x, weight, r, dx, dw, rows, hidden, BLOCK=block
        )
        return dx, dw.sum(0), None


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x², last dim) + eps) * weight, computed in float32 or better.

    x: [..., hidden]; weight: [hidden]; returns the shape and dtype of x.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if triton is not None and x.is_cuda and not torch.compiler.is_compiling():
        return TritonRMSNorm.apply(x, weight, eps)
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
