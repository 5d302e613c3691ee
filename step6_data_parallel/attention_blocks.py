"""One block of attention, forward and backward, by the fused kernel that knows the dtype.

`scaled_dot_product_attention` would choose the same kernels. They are called by their own names for
two reasons. It does not return log_sum, the logarithm of the softmax's denominator, but blocks are
merged by it. And its backward pass cannot be given the log_sum of a larger softmax.

Each class has the same two functions. `Plain` is the one to understand: the others compute the same
faster. q, k, v and out are [batch, heads, seq, head_dim], log_sum is [batch, heads, seq]. One head
of k and v serves several heads of q. Source: FlashAttention-2 (arXiv:2307.08691), section 3.1.
"""

import torch

aten = torch.ops.aten


class OnCpu:
    """On the CPU, for every dtype."""

    @staticmethod
    def forward(q, k, v, causal):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

    @staticmethod
    def backward(grad, q, k, v, out, log_sum, causal):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum, 0.0, causal
        )


class Cudnn:
    """On CUDA, for the half types: float16 and bfloat16."""

    @staticmethod
    def forward(q, k, v, causal):
        out, log_sum, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False
        )
        return out, log_sum.view(out.shape[:-1])

    @staticmethod
    def backward(grad, q, k, v, out, log_sum, causal):
        none = torch.empty(0, dtype=torch.int64, device=q.device)  # there is no dropout
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, log_sum[..., None].contiguous(), none, none, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal,
        )  # fmt: skip


class Efficient:
    """On CUDA, for float32. It wants a head of k and v for each head of q, and it makes log_sum
    longer: a multiple of 32.
    """

    @staticmethod
    def forward(q, k, v, causal):
        k, v = repeated(q, k, v)
        out, log_sum, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, causal
        )
        return out, log_sum[..., : q.shape[2]]

    @staticmethod
    def backward(grad, q, k, v, out, log_sum, causal):
        kv_heads = k.shape[1]
        missing = (-q.shape[2]) % 32  # up to the next multiple of 32
        log_sum = torch.nn.functional.pad(log_sum, (0, missing))
        none = torch.empty((), dtype=torch.int64, device=q.device)
        grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, *repeated(q, k, v), None, out, log_sum, none, none, 0.0,
            [True, True, True, False], causal,
        )  # fmt: skip
        return grad_q, *summed(kv_heads, grad_k, grad_v)


class Plain:
    """In plain PyTorch, for what no fused kernel knows, above all float64 on CUDA.

    It computes some rows of scores at a time.
    """

    @staticmethod
    def forward(q, k, v, causal):
        q, k, v = in_float32_or_better(q, *repeated(q, k, v))
        out, log_sum = torch.empty_like(q), q.new_empty(q.shape[:-1])
        for rows in Plain.row_slices(q, k):
            scores = Plain.scores(q, k, rows, causal)
            log_sum[:, :, rows] = scores.logsumexp(-1)
            out[:, :, rows] = scores.softmax(-1) @ v
        return out, log_sum

    @staticmethod
    def backward(grad, q, k, v, out, log_sum, causal):
        kv_heads = k.shape[1]
        grad, q, k, v, out = in_float32_or_better(grad, q, *repeated(q, k, v), out)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for rows in Plain.row_slices(q, k):
            scores, g = Plain.scores(q, k, rows, causal), grad[:, :, rows]
            p = (scores - log_sum[:, :, rows, None]).exp()  # [batch, heads, rows, keys]
            grad_v += p.mT @ g
            mean = (g * out[:, :, rows]).sum(-1, keepdim=True)  # of the gradient of p
            grad_scores = p * (g @ v.mT - mean) * q.shape[-1] ** -0.5
            grad_q[:, :, rows] = grad_scores @ k
            grad_k += grad_scores.mT @ q[:, :, rows]
        return grad_q, *summed(kv_heads, grad_k, grad_v)

    @staticmethod
    def row_slices(q, k):
        """Slices of the queries, so small that at most chunk x chunk scores exist at a time."""
        queries, keys = q.shape[2], k.shape[2]
        # Queries x keys are 2 x 2 chunks for our own block, otherwise 2 x 1 or 1 x 2, as
        # `attending` in context_parallel.py says.
        chunk = queries // 2 if queries == keys else min(queries, keys)
        size = max(1, chunk * chunk // keys)
        return [slice(start, start + size) for start in range(0, queries, size)]

    @staticmethod
    def scores(q, k, rows, causal):  # [batch, heads, rows, keys]
        scores = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
        if causal:  # only in our own block: there query i and key i are of the same token
            row = torch.arange(q.shape[2], device=q.device)[rows, None]
            later = torch.arange(k.shape[2], device=q.device) > row
            scores = scores.masked_fill_(later, -torch.inf)
        return scores


def repeated(q, *tensors):
    """Repeat each head of k and v, once for every head of q that it serves."""
    return [x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in tensors]


def summed(kv_heads, *tensors):
    """The gradient of `repeated`: a head of k and v gets the sum over the heads that it serves."""
    return [x.unflatten(1, (kv_heads, -1)).sum(2) for x in tensors]


def in_float32_or_better(*tensors):
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def kernel_for(q):
    """The kernel that knows the device and dtype of q."""
    if q.device.type == "cpu":
        return OnCpu
    if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        return Cudnn
    return Efficient if q.dtype == torch.float32 else Plain


def forward_block(q, k, v, causal):
    """Attention of q to k and v: out, like q, and log_sum, in float32 or better."""
    return kernel_for(q).forward(q, k, v, causal)


def backward_block(grad, q, k, v, out, log_sum, causal):
    """The gradients of q, k and v, from grad, the gradient of out.

    out and log_sum may be those of a softmax over more keys than k has. Then the results are shares
    of the whole gradients: the shares of all blocks add up to them.
    """
    return kernel_for(q).backward(grad, q, k, v, out, log_sum, causal)
