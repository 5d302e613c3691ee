"""Attention in blocks: who attends to whom, and how exactly."""

from unittest.mock import patch

import numpy as np
import torch


def plain_attention(q, k, v, mask):
    """float64 attention with a boolean mask [queries, keys]; heads of k and v serve groups."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def blocks_error(dtype, heads, kv_heads, seq, device="cpu", kernel=None):
    """Attention to earlier keys and to one's own, as two merged blocks, against plain float64.

    Returns ({name: relative error of the output and of each gradient}, {kernel names}). kernel:
    name of a class of attention_blocks, if not the one that the dtype is given.
    """
    import contextlib

    from torch.profiler import profile

    import attention_blocks
    from context_parallel import merge

    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    shapes = [(2, heads, seq, 16)] + 4 * [(2, kv_heads, seq, 16)]
    q, *blocks = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    grad_out = torch.randn_like(q)
    known = [x.double().requires_grad_() for x in (q, *blocks)]
    mask = torch.ones(seq, 2 * seq, dtype=torch.bool, device=device).tril(seq)
    keys, values = (torch.cat([known[i], known[i + 2]], dim=2) for i in (1, 2))
    expected = plain_attention(known[0], keys, values, mask)
    expected.backward(grad_out.double())

    chosen = contextlib.nullcontext()
    if kernel:
        found = getattr(attention_blocks, kernel)
        chosen = patch.object(attention_blocks, "kernel_for", lambda q: found)
    with chosen, profile() as profiled:
        out, log_sum = attention_blocks.forward_block(q, *blocks[:2], False)
        out = out.to(torch.promote_types(dtype, torch.float32))
        log_sum = log_sum.contiguous()
        merge(out, log_sum, *attention_blocks.forward_block(q, *blocks[2:], True))
        merged = out.to(dtype), log_sum
        early = attention_blocks.backward_block(grad_out, q, *blocks[:2], *merged, False)
        own = attention_blocks.backward_block(grad_out, q, *blocks[2:], *merged, True)
    assert log_sum.dtype == out.dtype
    results = [out, early[0].to(out.dtype) + own[0].to(out.dtype), *early[1:], *own[1:]]
    names = ["out", "q", "k before", "v before", "k", "v"]
    errors = {}
    for name, result, exact in zip(
        names, results, [expected, *(x.grad for x in known)], strict=True
    ):
        assert result.shape == exact.shape, name
        errors[name] = ((result.double() - exact).norm() / exact.norm()).item()
    kernels = {event.key for event in profiled.key_averages() if "attention" in event.key}
    return errors, kernels


def attended_pairs(seq, cp):
    """For each rank of a ring, how often it attends from a query to a key: [seq, seq]."""
    from types import SimpleNamespace

    from context_parallel import attending, zigzag_positions

    positions = [
        zigzag_positions(seq, SimpleNamespace(size=cp, rank=rank)).numpy() for rank in range(cp)
    ]
    found = []
    for rank in range(cp):
        pairs = np.zeros((seq, seq))
        for source in range(cp):
            rows, columns, causal = attending(rank, source, seq // cp // 2)
            queries, keys = positions[rank][rows], positions[source][columns]
            block = np.ones((len(queries), len(keys)))
            pairs[np.ix_(queries, keys)] += np.tril(block) if causal else block
        found.append(pairs)
    return found


def plain_rows(queries, keys):
    """(most rows at a time, all rows in order) of the plain kernel."""
    from attention_blocks import Plain

    q, k = torch.zeros(1, 1, queries, 4), torch.zeros(1, 1, keys, 4)
    rows = [range(queries)[part] for part in Plain.row_slices(q, k)]
    return max(map(len, rows)), [row for part in rows for row in part]
