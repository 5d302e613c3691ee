"""Causal attention by the fastest kernel that knows the dtype.

PyTorch has several kernels for one and the same formula. On an H200 cuDNN's is faster than the
flash attention of PyTorch itself or of the package flash-attn.
Source: FlashAttention-2 (arXiv:2307.08691).
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# PyTorch tries them in this order, and takes the first that knows the device and the dtype.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def causal_attention(q, k, v):
    """Causal softmax attention; every key/value head serves heads / kv_heads query heads.

    q: [batch, seq, heads, head_dim]; k, v: [batch, seq, kv_heads, head_dim]; returns the shape of
    q. Source of the grouped heads: GQA (arXiv:2305.13245).
    """
    if q.is_cuda and q.dtype == torch.float32:
        # The only fused kernel for float32 does not know grouped heads.
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [batch, heads, seq, head_dim]
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)  # [batch, seq, heads, head_dim]
