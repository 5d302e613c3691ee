"""Mistakes of context parallelism."""

import sys


def chunks_in_a_row(train):
    """A sequence dealt out from front to back, while attention believes in the zigzag."""
    import torch

    train.zigzag_positions = lambda seq_len, group: torch.arange(seq_len).chunk(group.size)[
        group.rank
    ]


def positions_from_zero(train):
    """Every rank rotates as if its part began the sequence."""
    split = train.Batches.split

    def spoiled(self, window):
        tokens, targets, positions = split(self, window)
        return tokens, targets, positions.argsort()

    train.Batches.split = spoiled


def late_chunk_for_early(train):
    """Attention looks at the late chunk of an earlier rank, not at its early one."""
    import context_parallel

    attending = context_parallel.attending

    def swapped(rank, source, chunk):
        rows, columns, causal = attending(rank, source, chunk)
        return (rows, slice(chunk, None), causal) if source < rank else (rows, columns, causal)

    context_parallel.attending = swapped


def blocks_added_up(train):
    """Softmax blocks added without their denominators."""
    import context_parallel

    context_parallel.merge = lambda out, log_sum, block, block_log_sum: out.add_(block)


def gradients_never_sent_home(train):
    """Gradients of keys and values stay on the rank that computed them."""
    import process_group as pg

    exchange = pg.exchange

    def stay(group, send=(), receive=()):
        if sys._getframe(1).f_code.co_name != "send_home":  # keys and values travel as they should
            return exchange(group, send, receive)
        receive[0][0].zero_()
        return []

    pg.exchange = stay


def gradients_not_summed(train):
    """Ranks that read other tokens keep their own gradients."""
    import process_group as pg

    all_reduce = pg.all_reduce

    def kept(*args, **kwargs):
        if sys._getframe(1).f_code.co_name in ("sum_gradients", "finish_gradients", "reduce"):
            return pg.Done()
        return all_reduce(*args, **kwargs)

    pg.all_reduce = kept
