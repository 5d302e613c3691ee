"""Context parallelism: each rank holds a part of every sequence, and attention goes round a ring.

All layers but attention look at one token at a time; only attention needs the keys and values of
all earlier tokens. They travel from rank to rank, each of which attends to the block that is there
and merges what it got with what it had. Source: Ring Attention (arXiv:2310.01889), section 3.

With causal attention late tokens have more to do than early ones. So the sequence is cut into
2 * cp chunks, and rank r takes chunk r from the front and chunk r from the back: all do the same
work. Source: Striped Attention (arXiv:2311.09431), section 3, for the imbalance; the zigzag is that
of Llama 3 (arXiv:2407.21783), section 3.3.2.
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

    Both ranks hold two chunks of so many tokens, an early and a late one. Each case but the first
    is the same work: two chunks by one.
    """
    if source == rank:
        return slice(None), slice(None), True
    if source < rank:  # its early chunk is before both of ours, its late chunk after both
        return slice(None), slice(0, chunk), False
    return slice(chunk, None), slice(None), False  # both of its chunks are between ours


def travel(block, sources, to, by, group):
    """Yield (source, block) for each of `sources`, the ranks whose blocks we see; `block` is first.

    block: [2, batch, seq / cp, kv_heads, head_dim]; sources: places in the group. While the caller
    works on one block, it is also on its way to the global rank `to`, and the one after it on its
    way from the global rank `by`.
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
    """Add a block to a softmax over the blocks so far, in place; both parts are normalised.

    So what comes out is a mean of the two, weighted by their shares of the common denominator.
    out: [batch, heads, seq, head_dim]; log_sum: [batch, heads, seq], the log of each softmax's
    denominator. Source: online softmax (arXiv:1805.02867), section 3.
    """
    share = torch.sigmoid(block_log_sum - log_sum)  # of the block
    out.lerp_(block_out.to(out.dtype), share[..., None])
    log_sum.copy_(torch.logaddexp(log_sum, block_log_sum))


def add(total, share):
    """Add a gradient to a sum that may have more digits, in place."""
    total += share


def finish(total, share, dtype):
    """Add the last share to a gradient, and round the sum to the dtype it should have."""
    return (total + share).to(dtype)


class Ring:
    """The order in which blocks come by, and what is done to each of them."""

    def __init__(self, group, backend):
        self.group = group
        # Whose blocks come by, as places in the group: our own, that of the rank before, and so on.
        self.order = [(group.rank - step) % group.size for step in range(group.size)]
        self.back = self.order[:0:-1]  # the others, the last one first
        functions = merge, add, finish
        if backend is not None:  # each is one pass over memory then
            functions = [torch.compile(f, backend=backend, dynamic=False) for f in functions]
        self.merge, self.add, self.finish = functions

    def send_home(self, share, source, chunk):
        """Send a share of the gradients of keys and values to `source`, whose block they are.

        share: [2, batch, keys, kv_heads, head_dim]. While we worked on that block, the rank as far
        behind as `source` is ahead worked on ours. Returns (which of our keys it comes for, its
        share, handles to wait for, what must stay alive until then).
        """
        group, giver = self.group, (2 * self.group.rank - source) % self.group.size
        columns = attending(giver, group.rank, chunk)[1]
        keys = len(range(2 * chunk)[columns])
        arriving = share.new_empty(*share.shape[:2], keys, *share.shape[3:])
        to, by = group.ranks[source], group.ranks[giver]
        return columns, arriving, pg.exchange(group, [(share, to)], [(arriving, by)]), share

    def arrive(self, total, columns, arriving, handles, sent):  # sent: only kept alive until here
        """Wait for what `send_home` returned, and add it to the gradients of all our keys."""
        for handle in handles:
            handle.wait()
        self.add(total[:, :, columns], arriving)


class RingAttention(torch.autograd.Function):
    """Causal attention over a sequence that is dealt out by `zigzag_positions`.

    q: [batch, heads, seq / cp, head_dim]; kv, keys and values: [2, batch, seq / cp, kv_heads,
    head_dim]. The latter travel the ring. The backward pass is the forward pass in reverse: it
    begins with the block that came last, the ring turns the other way, and each rank sends its
    shares of the gradients straight home, the last of them while it works on its own block.
    """

    @staticmethod
    def forward(ctx, q, kv, ring):
        group, chunk = ring.group, q.shape[2] // 2
        exact = torch.promote_types(q.dtype, torch.float32)
        for source, block in travel(kv, ring.order, group.next, group.previous, group):
            k, v = block.transpose(2, 3)  # [batch, kv_heads, seq / cp, head_dim]
            rows, columns, causal = attending(group.rank, source, chunk)
            part = forward_block(q[:, :, rows], k[:, :, columns], v[:, :, columns], causal)
            if source == group.rank:  # the first
                out, log_sum = (x.to(exact) for x in part)
            else:
                ring.merge(out[:, :, rows], log_sum[:, :, rows], *part)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, block, out, log_sum)  # block: the one that came last
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
                # The finished output and denominator: they make the block's gradients shares of
                # those of the whole softmax. Source: FlashAttention-2 (arXiv:2307.08691), 3.1.2.
                out[:, :, rows],
                log_sum[:, :, rows],
                causal,
            )
            return rows, share_q, torch.stack([x.transpose(1, 2) for x in share_kv]).to(kv.dtype)

        coming = None  # the share of our gradients that is on its way
        for source, block in travel(last, ring.back, group.previous, group.next, group):
            rows, share_q, share_kv = shares(source, block)
            before, coming = coming, ring.send_home(share_kv, source, chunk)
            ring.add(grad_q[:, :, rows], share_q)
            if before:  # it had the time of this block
                ring.arrive(grad_kv, *before)
        _, share_q, share_kv = shares(group.rank, kv)
        ring.arrive(grad_kv, *coming)
        grad_q = ring.finish(grad_q, share_q, q.dtype)
        return grad_q, ring.finish(grad_kv, share_kv, kv.dtype), None


def apply_context_parallel(model, group, backend=None):
    """Let attention go round the ring of a group; a group of one keeps its kernel.

    backend: of `torch.compile`; None leaves everything as it is.
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


def sum_gradients(parameters, group):
    """Add up the gradients of ranks that saw other tokens."""
    for parameter in parameters:
        pg.all_reduce(parameter.grad, group)
