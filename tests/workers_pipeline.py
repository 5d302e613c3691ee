"""Stages and schedules of pipelines."""

import functools
from unittest.mock import patch

import torch
from workers_setup import build


def order_of_gradients(argv):
    """The layers whose weights get a gradient in the last backward pass, one after the other."""
    import train

    state, order = build(argv), []
    state.engine.on_gradient = lambda parameter: order.append(parameter.global_name)
    for parameter in state.model.parameters():
        parameter.register_post_accumulate_grad_hook(state.engine.on_gradient)
    train.forward_backward(state)
    last = order[-len(list(state.model.parameters())) :]
    return [int(name.split(".")[2]) for name in last if ".layers." in name]


def dealt_layers(argv, stages):
    """What deal_layers says, and {layers a stage: largest cost} of every way to cut."""
    import itertools

    import train
    from pipeline_parallel import deal_layers

    config = train.parse_args(argv.split()).config
    dealt = [list(part) for part in deal_layers(config, stages)]
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128
    largest = {}
    for cuts in itertools.combinations(range(1, config.num_hidden_layers), stages - 1):
        bounds = zip((0, *cuts), (*cuts, config.num_hidden_layers), strict=True)
        parts = [stop - start for start, stop in bounds]
        costs = [part * layer for part in parts]
        costs[0] += 128 * config.vocab_size
        costs[-1] += 128 * config.vocab_size
        largest[tuple(parts)] = max(costs)
    return dealt, largest


def schedule_of(argv):
    """(passes of a step in order, most micro-batches alive, exchanges that send and receive)."""
    import process_group as pg
    import train

    state = build(argv)
    stage, events, alive, together = state.stage, [], [0], [0]
    forward, backward, exchange = stage.forward, stage.backward, pg.exchange

    def went(name, real):
        def call(*args):
            events.append(name)
            alive[0] = max(alive[0], len(stage.alive) + (name == "f"))
            return real(*args)

        return call

    def exchanged(group, send=(), receive=()):
        together[0] += bool(send and receive)
        return exchange(group, send, receive)

    with patch.object(pg, "exchange", exchanged):
        with patch.multiple(stage, forward=went("f", forward), backward=went("b", backward)):
            train.forward_backward(state)
    return events, alive[0], together[0]


def outputs_alive(argv):
    """The most outputs of the stage that were in memory when it computed the next one."""
    import weakref

    import train

    state, made, most = build(argv), [], [0]

    def forward(*inputs, original=state.model.forward):
        most[0] = max(most[0], sum(output() is not None for output in made))
        out = original(*inputs)
        made.append(weakref.ref(out))
        return out

    with patch.object(state.model, "forward", forward):
        train.forward_backward(state)
    return most[0]


class Sleep(torch.autograd.Function):
    """Sleeps forward, and twice as long backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        import time

        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        import time

        time.sleep(2 * ctx.seconds)
        return grad, None


def bubble(argv, seconds):
    """The share of a step in which this stage is idle, if layers take a time that is known.

    A stage's layers sleep so long for a micro-batch forward, its chunks a part of that each.
    """
    import time

    import process_group as pg

    state = build(argv)
    chunks = getattr(state.stage, "stages", [state.stage])
    weight = torch.ones((), requires_grad=True)

    def sleepy(chunk, x, targets, positions):
        x = torch.zeros(chunk.shape) if chunk is chunks[0] and chunk.group.is_first else x
        out = Sleep.apply(x * weight, seconds / len(chunks))
        return out.sum() if chunk.after is None else out

    for chunk in chunks:
        chunk.model.forward = functools.partial(sleepy, chunk)
    micro_batches, shares = list(state.data.micro_batches(0)), []
    for _ in range(3):  # the best one: another process may take the core
        pg.dist.barrier()
        begun = time.perf_counter()
        state.stage.run(micro_batches, 1, True)
        pg.dist.barrier()
        shares.append(1 - len(micro_batches) * 3 * seconds / (time.perf_counter() - begun))
    return min(shares)


def interleaved_plans(cases):
    """For each (ranks, chunks, micro-batches): ticks, each a list of what the ranks do in it."""
    import interleaved

    def plain(tick):
        return [one and tuple(one) for one in tick]

    return [[plain(tick) for tick in interleaved.plan(*case)] for case in cases]


def timeline_of(argv, steps):
    import train

    state = build(argv)
    for _ in range(steps):
        train.train_step(state)
    state.stage.timeline.write(state.mesh.world)
