"""Tensor parallelism: every matrix is cut into parts, one for each rank of a group.

A block is attention or the MLP. Its first matrices (q, k, v; gate, up) are cut by output features:
a rank computes some of the heads, or some of the intermediate features. Its last one (o; down) is
cut by input features: a rank computes a share of a sum. So each block needs one sum over the ranks
forward, and one backward. Source: Megatron-LM (arXiv:1909.08053), section 3.

With sequence parallelism a rank has only some of the tokens between the blocks, where the norms and
residuals are. Each all-reduce becomes a reduce-scatter and an all-gather. Source: arXiv:2205.05198,
section 4.2.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

import process_group as pg
from rms_norm import rms_norm


# Between the blocks x is [batch, seq, hidden] on every rank, or with sequence parallelism
# [batch, seq / tp, hidden]. Nothing there mixes tokens, so it does not matter which of them a rank
# has. The batch is cut as it lies in memory, so neither cutting nor joining copies anything. The
# collectives cut and join along dim 0.
def cut(x, group):
    """View x as the parts of all ranks: [batch, seq, hidden] -> [tp * batch, seq / tp, hidden]."""
    return x.view(group.size * x.shape[0], x.shape[1] // group.size, x.shape[2])


def joined(parts, group):
    """Undo `cut`: [tp * batch, seq / tp, hidden] -> [batch, seq, hidden]."""
    return parts.view(parts.shape[0] // group.size, parts.shape[1] * group.size, parts.shape[2])


class AllReduce(torch.autograd.Function):
    """All-reduce forward, identity backward: shares of a sum become the sum."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.mark_dirty(x)
        return pg.all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class ReduceScatter(torch.autograd.Function):
    """Reduce-scatter forward, all-gather backward: shares of a sum become a part of the sum."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return pg.reduce_scatter(cut(x, group), group)

    @staticmethod
    def backward(ctx, grad):
        # A gradient may be a view with gaps; a message needs its numbers side by side in memory.
        return joined(pg.all_gather(grad.contiguous(), ctx.group), ctx.group), None


class SumGradient(torch.autograd.Function):
    """Identity forward, all-reduce backward: a weight that each rank uses on tokens of its own."""

    @staticmethod
    def forward(ctx, weight, group):
        ctx.group = group
        return weight.view_as(weight)  # a tensor of its own, to which autograd ties `backward`

    @staticmethod
    def backward(ctx, grad):
        return pg.all_reduce(grad.contiguous(), ctx.group), None


class ColumnParallel(torch.autograd.Function):
    """x Wᵀ for several W, cut by output features. Nothing is sent forward, all-reduce backward.

    With sequence parallelism all-gather forward, reduce-scatter backward. Then the gathered x is
    not kept; backward gathers it again for the weights' gradients.
    """

    @staticmethod
    def forward(ctx, x, group, sequence_parallel, *weights):
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        ctx.save_for_backward(x, *weights)
        if sequence_parallel:
            x = joined(pg.all_gather(x, group), group)
        return tuple(F.linear(x, weight.to(x.dtype)) for weight in weights)

    @staticmethod
    def backward(ctx, *grads):  # each [batch, seq, out / tp]
        x, *weights = ctx.saved_tensors
        if ctx.sequence_parallel:  # x of all tokens travels while the next products are computed
            x, gathered = pg.all_gather(x, ctx.group, async_op=True)
        # This rank's share of a sum over the ranks: it has only some rows of each weight.
        grad_x = grads[0] @ weights[0].to(grads[0].dtype)  # [batch, seq, in]
        for g, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x.view(-1, x.shape[-1]).addmm_(g.flatten(0, 1), weight.to(g.dtype))  # adds g W
        if ctx.sequence_parallel:
            gathered.wait()
            x = joined(x, ctx.group)
            grad_x, summed = pg.reduce_scatter(cut(grad_x, ctx.group), ctx.group, async_op=True)
        else:
            summed = pg.all_reduce(grad_x, ctx.group, async_op=True)
        # While the ranks sum it, the weights' gradients: they need no communication.
        grad_weights = [g.flatten(0, 1).T @ x.flatten(0, 1) for g in grads]  # [out / tp, in]
        summed.wait()
        return grad_x, None, None, *(grad.to(weights[0].dtype) for grad in grad_weights)


def part(weight, dim, group):
    """This rank's part of a meta weight along dim; parts of a vocabulary may differ by a row.

    Returns a Parameter with the tags of the weight; its `held` says which slices it is.
    """
    start, stop = (weight.shape[dim] * rank // group.size for rank in (group.rank, group.rank + 1))
    held = tuple(slice(start, stop) if i == dim else s for i, s in enumerate(weight.held))
    own = nn.Parameter(weight.detach()[held])
    own.__dict__.update(weight.__dict__, held=held)  # the other tags stay those of the full weight
    return own


# Hidden from `--compile`: it would undo the overlap, and hide the collective from the ledger.
@torch.compiler.disable
def project(x, *linears):
    """Apply several ColumnParallelLinear to the same x: a tuple of their outputs.

    Backward, each rank adds up their gradients for x. So one all-reduce serves all of them.
    """
    group, sequence_parallel = linears[0].group, linears[0].sequence_parallel
    return ColumnParallel.apply(x, group, sequence_parallel, *(lin.weight for lin in linears))


@torch.compiler.disable
def communicate(function, x, group):
    """Call an autograd function that communicates, hidden from `--compile`."""
    return function.apply(x, group)


class ColumnParallelLinear(nn.Module):
    """A linear layer cut by output features: [..., in] -> [..., out / tp].

    The name is Megatron-LM's, which stores W as [in, out]: its columns are our rows.
    """

    def __init__(self, linear, group, sequence_parallel):
        super().__init__()
        self.weight = part(linear.weight, 0, group)
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, x):
        return project(x, self)[0]


class RowParallelLinear(nn.Module):
    """A linear layer cut by input features: [..., in / tp] -> [..., out]."""

    def __init__(self, linear, group, sequence_parallel):
        super().__init__()
        self.weight = part(linear.weight, 1, group)
        self.group, self.sum = group, ReduceScatter if sequence_parallel else AllReduce

    def forward(self, x):
        return communicate(self.sum, F.linear(x, self.weight.to(x.dtype)), self.group)


class VocabularyParallelEmbedding(nn.Module):
    """A rank has the rows of some symbols; for a token of another symbol it adds zeros."""

    def __init__(self, embedding, group, sequence_parallel):
        super().__init__()
        self.weight = part(embedding.weight, 0, group)
        self.group, self.sum = group, ReduceScatter if sequence_parallel else AllReduce

    def forward(self, tokens):  # [batch, seq]
        row, here = local_symbol(tokens, self.weight.held[0])
        x = F.embedding(row, self.weight).masked_fill(~here[..., None], 0)
        return communicate(self.sum, x, self.group)


class SequenceParallelNorm(nn.Module):
    """An RMSNorm over this rank's tokens; the gradient of its weight is that of all tokens."""

    # PLAN's classes all take the same arguments; for this one sequence_parallel is always true.
    def __init__(self, norm, group, sequence_parallel):
        super().__init__()
        self.weight, self.eps, self.group = norm.weight, norm.eps, group

    def forward(self, x):
        return rms_norm(x, communicate(SumGradient, self.weight, self.group), self.eps)


def local_symbol(symbols, held):
    """Which of this rank's rows each symbol is (0 if it is elsewhere), and whether it is here."""
    here = (symbols >= held.start) & (symbols < held.stop)
    return (symbols - held.start).where(here, 0), here


class SumOfLosses(torch.autograd.Function):
    """All-gather of two numbers a token forward, no communication backward.

    parts: [2, batch, seq]: the log-sum-exp of this rank's logits, and the logit of the target, zero
    where another rank has it. Returns the summed loss, a scalar.
    """

    @staticmethod
    def forward(ctx, parts, group):
        every = pg.all_gather(parts[None], group)  # [tp, 2, batch, seq]
        log_sum = every[:, 0].logsumexp(0)  # [batch, seq]
        ctx.save_for_backward((parts[0] - log_sum).exp())  # this rank's fraction of Σ exp(logits)
        return (log_sum - every[:, 1].sum(0)).sum()

    @staticmethod
    def backward(ctx, grad):
        (fraction,) = ctx.saved_tensors
        return torch.stack([fraction, -torch.ones_like(fraction)]) * grad, None


def cross_entropy(logits, targets, held, group):
    """Summed negative log-likelihood, where each rank has only the logits of its symbols.

    logits: [batch, seq, vocab / tp]; targets: [batch, seq]; held: the slice of the vocabulary that
    this rank has; returns a scalar, the same on all ranks.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    column, here = local_symbol(targets, held)
    picked = x.gather(-1, column[..., None])[..., 0].where(here, 0)  # [batch, seq]
    return communicate(SumOfLosses, torch.stack([x.logsumexp(-1), picked]), group)


PLAN = {
    "embed_tokens": VocabularyParallelEmbedding,
    **dict.fromkeys(["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ColumnParallelLinear),
    **dict.fromkeys(["o_proj", "down_proj"], RowParallelLinear),
    "lm_head": ColumnParallelLinear,
    # with sequence parallelism only
    **dict.fromkeys(["input_layernorm", "post_attention_layernorm", "norm"], SequenceParallelNorm),
}


def apply_tensor_parallel(model, group, sequence_parallel=False):
    """Cut the layers of a model on the meta device: this rank holds and computes its part.

    The modules that PLAN names are replaced, norms only under sequence parallelism. Attention and
    MLP get `project`, and the model `cross_entropy`, of this file; tied weights are tied again. A
    group of one leaves the layers as they are. Every parameter gets `counted`: whether this rank's
    copy is the one that enters the gradient norm.
    """
    if group.size > 1:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in PLAN and (sequence_parallel or PLAN[name] is not SequenceParallelNorm):
                    setattr(parent, name, PLAN[name](child, group, sequence_parallel))
            if hasattr(parent, "project"):  # attention and MLP
                parent.project = project  # instead of that of model.py
        if model.model.config.tie_word_embeddings:  # one weight again, and not two equal parts
            model.lm_head.weight = model.model.embed_tokens.weight
        held = model.lm_head.weight.held[0]  # the symbols whose logits this rank computes
        model.cross_entropy = functools.partial(cross_entropy, held=held, group=group)
    for weight in model.parameters():
        weight.counted = group.is_first or weight.shape != weight.full_shape
