"""What the checks of step 5 run on each rank of a ring."""

from same import same
from workers_context import plain_attention


def sequence(tokens):
    """q, k, v [2, heads, tokens, 8] of whole sequences, their attention, and a gradient of it.

    The same on all ranks. A head of k and v serves two heads of q.
    """
    import torch

    torch.manual_seed(0)
    q, grad = torch.randn(2, 2, 4, tokens, 8).double()
    k, v = torch.randn(2, 2, 2, tokens, 8).double()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = plain_attention(q, k, v, torch.ones(tokens, tokens, dtype=torch.bool).tril())
    out.backward(grad)
    return q, k, v, out.detach(), grad


def setting():
    """This rank's cp group, positions, q and kv; and the whole: q, k, v, out, gradient of out."""
    import torch

    import process_group as pg
    from context_parallel import zigzag_positions

    pg.init_processes("cpu")
    group = pg.Mesh(cp=torch.distributed.get_world_size()).group("cp")
    whole = sequence(6 * group.size)
    mine = zigzag_positions(6 * group.size, group)
    q, k, v = (x.detach()[:, :, mine] for x in whole[:3])
    kv = (
        torch.stack([k, v]).transpose(2, 3).contiguous()
    )  # [2, batch, seq / cp, kv_heads, head_dim]
    return group, mine, q.requires_grad_(), kv.requires_grad_(), whole


def events_of(function):
    """What function() returns, and the order in which this rank sends, computes and waits.

    Messages are numbered, with who sends them: "send 0 (of travel)", "compute", "wait 0 …".
    """
    import sys
    from unittest.mock import patch

    import context_parallel
    import process_group as pg

    events, exchange = [], pg.exchange

    class Handle:
        def __init__(self, handle, number):
            self.handle, self.number = handle, number

        def wait(self):
            events.append(f"wait {self.number}")
            self.handle.wait()

    def watched(group, send, receive):
        ((_, to),), ((_, by),) = send, receive
        number = sum(event.startswith("send") for event in events)
        number = f"{number} (of {sys._getframe(1).f_code.co_name})"
        events.append(f"send {number}")
        giver = (2 * group.rank - to) % group.size
        assert by == giver, (
            f"rank {group.rank} of {group.size} sends to rank {to} and expects a message from rank "
            f"{by}; it should be from rank {giver}, as far before it as rank {to} is after it"
        )
        return [Handle(handle, number) for handle in exchange(group, send, receive)]

    def computed(name):
        compute = getattr(context_parallel, name)

        def instead(*args):
            events.append("compute")
            return compute(*args)

        return patch.object(context_parallel, name, instead)

    with patch.object(pg, "exchange", watched), computed("forward_block"):
        with computed("backward_block"):
            return function(), events


def check_overlap(events):
    """Demand that each message has a block to travel behind."""
    sends = [event for event in events if event.startswith("send")]
    for send in sends:
        wait = send.replace("send", "wait", 1)
        assert wait in events, f"message {send[5:]} is never waited for: {events}"
        assert "compute" in events[events.index(send) : events.index(wait)], (
            f"nothing is computed while message {send[5:]} travels: {events}. First send, then "
            "compute with a block, then wait"
        )
    return len(sends), events.count("compute")


def forward():
    from context_parallel import Ring, RingAttention

    group, mine, q, kv, whole = setting()
    ring = Ring(group, None)
    order = [(group.rank - step) % group.size for step in range(group.size)]
    for found, due in (ring.order, order), (ring.back, order[:0:-1]):
        which = "order" if found is ring.order else "back"
        assert found == due, (
            f"Ring: {which} of rank {group.rank} of {group.size} is {found}; it should be {due}. "
            "order: we, the rank before us, and so on; back: the reverse, without us"
        )
    out, events = events_of(lambda: RingAttention.apply(q, kv, ring))
    found = check_overlap(events)
    hint = (
        "attention of our queries to all earlier keys. Is each block that of the `source` that "
        "travel names? Is it merged into the rows that attend to it, out and log_sum?"
    )
    same(out, whole[3][:, :, mine], "the output of RingAttention.forward", hint)
    assert found == (group.size - 1, group.size), (
        f"{group.size} ranks: {found[0]} messages and {found[1]} blocks in a forward pass; there "
        f"should be {group.size - 1} and {group.size}: the last block is not sent on"
    )


def shares_home():
    """Each rank sends a share of ones, times its rank + 1, for each block; then look at the sum."""
    import torch

    from context_parallel import Ring, attending

    group, chunk = setting()[0], 3
    ring, total, due = Ring(group, None), *torch.zeros(2, 2, 1, 2 * chunk, 1, 1).double()
    for source in ring.back:
        giver = (2 * group.rank - source) % group.size
        keys = len(range(2 * chunk)[attending(group.rank, source, chunk)[1]])
        share = torch.full((2, 1, keys, 1, 1), group.rank + 1).double()
        columns, *arriving = ring.send_home(share, source, chunk)
        mine = attending(giver, group.rank, chunk)[1]
        assert columns == mine, (
            f"send_home of rank {group.rank} to rank {source} returns {columns}; it should be "
            f"{mine}, the keys of ours that rank {giver} attends to, from which a share comes"
        )
        ring.arrive(total, columns, *arriving)
        due[:, :, mine] += giver + 1
    hint = "the sum of the others' shares, each waited for, and of the keys that rank attended to"
    same(total, due, "what Ring.arrive adds up", hint)


def backward():
    from context_parallel import Ring, RingAttention
    from ledger import recorded

    group, mine, q, kv, (whole_q, whole_k, whole_v, _, grad) = setting()
    out = RingAttention.apply(q, kv, Ring(group, None))
    with recorded() as traffic:
        _, events = events_of(lambda: out.backward(grad[:, :, mine]))
    found = check_overlap(events)
    hint = (
        "the sum of the shares of all blocks that our queries attend to. Is each share made with "
        "out and log_sum of the whole softmax?"
    )
    what = "RingAttention.backward: the gradient of"
    same(q.grad, whole_q.grad[:, :, mine], f"{what} q", hint)
    hint = "the sum of the shares of all ranks whose queries attend to them: each is sent home once"
    for name, share, x in zip("kv", kv.grad.transpose(2, 3), (whole_k, whole_v), strict=True):
        same(share, x.grad[:, :, mine], f"{what} {name}", hint)
    n, rank, block = group.size, group.rank, kv.nbytes
    assert found == (2 * n - 3, n), (
        f"{n} ranks: {found[0]} messages and {found[1]} blocks in a backward pass; there should be "
        f"{n - 2} messages with blocks (the first is still there, the last is our own), {n - 1} "
        f"with gradients, and {n} blocks"
    )
    size, due = traffic["cp", "send"][1], (2 * n - 3 - rank) * block + rank * block // 2
    assert size == due, (
        f"rank {rank} of {n} sends {size:,} bytes, not {due:,}: a share has the keys that were "
        "attended to, and the dtype of k and v"
    )
