"""Context parallelism: each rank holds a part of every sequence, and attention goes round a ring.

All layers but attention look at one token at a time. Attention needs the keys and values of all
earlier tokens, and other ranks have most of these. So the keys and values of each rank, its block,
travel from rank to rank. A rank computes attention to the block that is there, and merges the
result with what it has so far. Source: Ring Attention (arXiv:2310.01889), section 3.

Under a causal mask late tokens have more work than early ones. So the sequence is cut into 2 * cp
chunks. Rank r takes two of them: chunk r counted from the front, and chunk r counted from the back.
Then all ranks have the same work. Sources: Striped Attention (arXiv:2311.09431), section 3, for the
imbalance; Llama 3 (arXiv:2407.21783), section 3.3.2, for this order, the zigzag.
"""

import torch

import process_group as pg
from attention_blocks import backward_block, forward_block


def zigzag_positions(seq_len, group):
    """The positions in the sequence that this rank holds, ascending: [seq / cp]."""
    chunks = torch.arange(seq_len).tensor_split(2 * group.size)
    return torch.cat([chunks[group.rank], chunks[-1 - group.rank]])


def attending(rank, source, chunk):
    """Which of our queries attend to which keys of `source`, and whether a causal mask is needed.

    Returns two slices and a bool. rank, source: places in the group; chunk: tokens in a chunk. Each
    rank holds two chunks, an early one and a late one. The second and the third case are the same
    amount of work: two chunks by one.
    """
    if source == rank:
        return slice(None), slice(None), True
    if source < rank:  # its early chunk is before both of ours, its late chunk after both
        return slice(None), slice(0, chunk), False
    return slice(chunk, None), slice(None), False  # both of its chunks are between ours


def travel(block, sources, to, by, group):
    """Send blocks round the ring, and yield (source, block) for each of them.

    block: the first one, [2, batch, seq / cp, kv_heads, head_dim]; sources: the ranks that own the
    blocks, in the order in which they come, as places in the group. While the caller computes with
    a block, that block is sent to the global rank `to`, and the next one comes from the global rank
    `by`.
    """
    for source in sources:
        arriving, handles = None, []
        if source != sources[-1]:
            arriving = torch.empty_like(block)
            handles = pg.exchange(group, [(block, to)], [(arriving, by)])
        yield source, block
        for handle in handles:
            handle.wait()
        block = arriving


def merge(out, log_sum, block_out, block_log_sum):
    """Merge attention to one more block into attention to the blocks so far, in place.

    Both outputs are already divided by their own denominators. So the merged output is a weighted
    mean of the two. The weight of each is its share of the common denominator.
    out: [batch, heads, seq, head_dim]; log_sum: [batch, heads, seq], the log of each softmax's
    denominator. Source: online softmax (arXiv:1805.02867), section 3.
    """
    # The block's share: exp(block_log_sum) / (exp(log_sum) + exp(block_log_sum)), without overflow.
    share = torch.sigmoid(block_log_sum - log_sum)
    out.lerp_(block_out.to(out.dtype), share[..., None])
    log_sum.copy_(torch.logaddexp(log_sum, block_log_sum))


def add(total, share):
    """Add a gradient to a sum, in place. The sum's dtype may have more digits."""
    total += share


def finish(total, share, dtype):
    """Add the last share to a gradient, and round the sum to the dtype it should have."""
    return (total + share).to(dtype)


class Ring:
    """The order in which blocks come to this rank, and the functions that work on each of them.

    backend: the value of `--compile`, None without it.
    """

    def __init__(self, group, backend):
        self.group = group
        # The owners of the blocks, as places in the group: we, the rank before us, and so on.
        self.order = [(group.rank - step) % group.size for step in range(group.size)]
        self.back = self.order[:0:-1]  # backward: from the last one to index 1, without our own
        functions = merge, add, finish
        if backend is not None:  # compiled, each is one pass over memory
            functions = [torch.compile(f, backend=backend, dynamic=False) for f in functions]
        self.merge, self.add, self.finish = functions

    def send_home(self, share, source, chunk):
        """Send a share of the gradients of keys and values to `source`, the rank that owns them.

        At the same time another rank, the giver, sends us a share of ours. If `source` is two
        places after us, the giver is two places before us: while we computed with the block of
        `source`, the giver computed with our block.
        share: [2, batch, keys, kv_heads, head_dim]. Returns what `arrive` needs: the slice of our
        keys that the giver attended to, a tensor for its share, handles to wait for, and the sent
        share, which must stay alive until then.
        """
        # The giver: rank - (source - rank), as far before us as `source` is after us.
        group, giver = self.group, (2 * self.group.rank - source) % self.group.size
        columns = attending(giver, group.rank, chunk)[1]
        keys = len(range(2 * chunk)[columns])  # how many keys this slice has
        arriving = share.new_empty(*share.shape[:2], keys, *share.shape[3:])
        to, by = group.ranks[source], group.ranks[giver]
        return columns, arriving, pg.exchange(group, [(share, to)], [(arriving, by)]), share

    def arrive(self, total, columns, arriving, handles, sent):  # sent: kept alive until here
        """Wait for a share that `send_home` asked for, and add it to the sum for all our keys."""
        for handle in handles:
            handle.wait()
        self.add(total[:, :, columns], arriving)


class RingAttention(torch.autograd.Function):
    """Causal attention over a sequence that `zigzag_positions` has dealt out to the ranks.

    q: [batch, heads, seq / cp, head_dim]; kv: keys and values, [2, batch, seq / cp, kv_heads,
    head_dim]. Forward, kv travels round the ring. Backward, the blocks come again in the reverse
    order, so the ring turns the other way. With each block a rank computes a share of the block's
    gradients, and sends it straight to the rank that owns the block. It ends with its own block:
    while it computes with that, the last message is on its way.
    """

    @staticmethod
    def forward(ctx, q, kv, ring):
        group, chunk = ring.group, q.shape[2] // 2
        exact = torch.promote_types(q.dtype, torch.float32)
        for source, block in travel(kv, ring.order, group.next, group.previous, group):
            k, v = block.transpose(2, 3)  # [batch, kv_heads, seq / cp, head_dim]
            rows, columns, causal = attending(group.rank, source, chunk)
            part = forward_block(q[:, :, rows], k[:, :, columns], v[:, :, columns], causal)
            if source == group.rank:  # our own block, which comes first
                out, log_sum = (x.to(exact) for x in part)
            else:
                ring.merge(out[:, :, rows], log_sum[:, :, rows], *part)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, block, out, log_sum)  # block: the one of the last step
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, kv, last, out, log_sum = ctx.saved_tensors
        ring, group, chunk = ctx.ring, ctx.ring.group, q.shape[2] // 2
        grad_q, grad_kv = (torch.zeros_like(x, dtype=log_sum.dtype) for x in (q, kv))

        def shares(source, block):
            k, v = block.transpose(2, 3)
            rows, columns, causal = attending(group.rank, source, chunk)
            share_q, *share_kv = backward_block(
                grad_out[:, :, rows],
                q[:, :, rows],
                k[:, :, columns],
                v[:, :, columns],
                # Not those of this block but those of the whole softmax. So the results are shares
                # of the whole gradients. Source: FlashAttention-2 (arXiv:2307.08691), 3.1.2.
                out[:, :, rows],
                log_sum[:, :, rows],
                causal,
            )
            return rows, share_q, torch.stack([x.transpose(1, 2) for x in share_kv]).to(kv.dtype)

        coming = None  # the share of our gradients that is on its way
        for source, block in travel(last, ring.back, group.previous, group.next, group):
            rows, share_q, share_kv = shares(source, block)
            before, coming = coming, ring.send_home(share_kv, source, chunk)
            ring.add(grad_q[:, :, rows], share_q)  # the queries are our own: no message
            if before:  # it was on its way while we computed with this block
                ring.arrive(grad_kv, *before)
        _, share_q, share_kv = shares(group.rank, kv)
        ring.arrive(grad_kv, *coming)
        grad_q = ring.finish(grad_q, share_q, q.dtype)
        return grad_q, ring.finish(grad_kv, share_kv, kv.dtype), None


def apply_context_parallel(model, group, backend=None):
    """Let attention go round the ring of a group. A group of one keeps its kernel.

    backend: the value of `--compile`; with None, what merges and adds blocks is not compiled.
    """
    if group.size == 1:
        return
    ring = Ring(group, backend)

    @torch.compiler.disable  # the sends overlap with the blocks, which no compiled graph would do
    def attention(q, k, v):  # [batch, seq / cp, heads, head_dim]
        kv = torch.stack([k, v])  # one message
        return RingAttention.apply(q.transpose(1, 2), kv, ring).transpose(1, 2)

    for layer in model.model.layers:
        layer.self_attn.attention = attention
