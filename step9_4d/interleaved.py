"""Interleaved 1F1B: a rank holds several chunks of layers, and the bubble shrinks by their number.

With c chunks a rank there are p * c virtual stages; virtual stage s is chunk s // p of rank s % p.
So a micro-batch goes round the ranks c times. Filling and draining the pipeline still takes p - 1
passes, but a pass is only 1 / c as long: a share (p - 1) / (c m + p - 1) of the step is idle. The
price: about c times the messages, and more micro-batches alive.

Source: Megatron-LM (arXiv:2104.04473), section 2.2.
"""

import collections
import functools
from typing import NamedTuple

import torch
from torch import nn

import process_group as pg
from model import Llama
from pipeline_parallel import SCHEDULES, Stage

PIPELINE_ENGINES = [*SCHEDULES, "interleaved"]


class Pass(NamedTuple):
    """One micro-batch through one virtual stage."""

    kind: str  # forward or backward
    stage: int
    micro_batch: int


def passes_of(rank, ranks, chunks, count):
    """What a rank does, in order. Micro-batches go round in groups of as many as there are ranks.

    A rank first runs ahead: by a group through each chunk but its last one, and by twice its
    distance from the last rank. (Once would do if messages took no time.) Then it does one forward
    and one backward pass in turn.
    """
    # An evaluation plans each micro-batch alone: a round that is not full.
    rounds = [range(start, min(start + ranks, count)) for start in range(0, count, ranks)]

    def in_order(kind, order):
        return [Pass(kind, chunk * ranks + rank, i) for r in rounds for chunk in order for i in r]

    forward = in_order("forward", range(chunks))
    backward = in_order("backward", range(chunks)[::-1])
    ahead = min(len(forward), (chunks - 1) * ranks + 2 * (ranks - rank - 1))
    both = zip(forward[ahead:], backward, strict=False)
    left = backward[len(forward) - ahead :]
    return [*forward[:ahead], *(one for pair in both for one in pair), *left]


def enables(one, ranks, chunks):
    """The pass that can be done once this one is, with its result; None after the last."""
    if one.kind == "backward":
        return one._replace(stage=one.stage - 1) if one.stage > 0 else None
    if one.stage == ranks * chunks - 1:
        return one._replace(kind="backward")
    return one._replace(stage=one.stage + 1)


@functools.cache
def plan(ranks, chunks, count, backward=True):
    """Ticks, each a list of what every rank does in it: a pass, or None where it has to wait.

    Every rank knows the plan of all. So it knows which messages each tick brings.
    """
    left = [passes_of(rank, ranks, chunks, count) for rank in range(ranks)]
    if not backward:
        left = [[one for one in passes if one.kind == "forward"] for passes in left]
    ready = {Pass("forward", 0, micro_batch) for micro_batch in range(count)}
    ticks = []
    while any(left):
        tick = [passes.pop(0) if passes and passes[0] in ready else None for passes in left]
        assert any(tick), f"each rank waits for another one: {left}"
        ready |= {enables(one, ranks, chunks) for one in tick if one is not None}
        ticks.append(tick)
    return ticks


def chunk_of(model, index, is_first, is_last):
    """A model that shares one chunk's layers with the rank's, to be called like a stage's."""
    whole = model.model
    with torch.device("meta"):
        chunk = Llama(whole.config, whole.dtype, whole.activation_checkpointing)
    mine = [x for x in whole.layers if next(x.parameters()).chunk_number == index]
    chunk.model.layers = nn.ModuleList(mine)
    chunk.model.embed_tokens = whole.embed_tokens if is_first else nn.Identity()
    chunk.model.norm = whole.norm if is_last else nn.Identity()
    chunk.lm_head = model.lm_head if is_last else nn.Identity()
    chunk.cross_entropy = model.cross_entropy if is_last else lambda x, targets: x
    return chunk


class Interleaved:
    """A rank's chunks, each a `Stage`, and the plan that they follow."""

    def __init__(self, args, model, group, engine, device):
        self.group, self.stages = group, []
        for index in range(args.pp_chunks):
            is_first = group.is_first and index == 0
            is_last = group.is_last and index == args.pp_chunks - 1
            chunk = chunk_of(model, index, is_first, is_last)
            self.stages.append(stage := Stage(args, chunk, group, engine, device))
            stage.after = None if is_last else group.next
            stage.timeline = self.stages[0].timeline
        self.timeline = self.stages[0].timeline

    def run(self, micro_batches, targets_in_all, backward):
        """As `Stage.run`: the sum of losses, a float64 scalar; zero but where the last chunk is."""
        for stage in self.stages:
            stage.begin(targets_in_all)
        if backward:
            self.follow(list(micro_batches))
        else:
            for micro_batch in micro_batches:
                self.follow([micro_batch], backward=False)
                for stage in self.stages:
                    stage.alive.clear()
        return self.stages[-1].total

    def follow(self, micro_batches, backward=True):
        """Do the passes of a plan; after each tick post all messages that it makes, together.

        A rank waits for what it receives in the pass that needs it. What it has sent is waited for
        2 p ticks later at the latest, so that its memory is freed.
        """
        ranks, chunks, me = self.group.size, len(self.stages), self.group.rank
        arriving, posted = {}, collections.deque()
        for tick in plan(ranks, chunks, len(micro_batches), backward):
            out = self.compute(tick[me], arriving, micro_batches) if tick[me] else None
            sends, receives = [], {}
            for rank, one in enumerate(tick):
                then = enables(one, ranks, chunks) if one else None
                if then is None or then.stage == one.stage:
                    continue  # the loss, and the gradient of the tokens, go nowhere
                if rank == me:
                    sends.append((out.contiguous(), self.group.ranks[then.stage % ranks]))
                elif then.stage % ranks == me:
                    receives[then] = self.stages[0].empty(), self.group.ranks[rank]
            messages = Messages(self.group, sends, receives.values())
            arriving |= {then: (tensor, messages) for then, (tensor, _) in receives.items()}
            posted.append(messages)
            if len(posted) > 2 * ranks:
                posted.popleft().wait()
        for messages in posted:
            messages.wait()

    def compute(self, one, arriving, micro_batches):
        """A pass, once its message is there; what it gives to the next."""
        stage = self.stages[one.stage // self.group.size]
        received = None
        if one in arriving:
            received, messages = arriving.pop(one)
            with self.timeline.span("wait"):
                messages.wait()
        if one.kind == "forward":
            return stage.forward(received, micro_batches[one.micro_batch])
        return stage.backward(received)


class Messages:
    """What a tick sends and receives; `wait` can be called more than once."""

    def __init__(self, group, sends, receives):
        self.sends, self.handles = sends, pg.exchange(group, sends, receives)

    def wait(self):
        """Wait for all of them, and let go of what was sent."""
        while self.handles:
            self.handles.pop().wait()
        self.sends = None


def build_stage(args, model, group, engine, device):
    """What runs this rank's part of the pipeline."""
    kind = Interleaved if args.pp_chunks > 1 else Stage
    return kind(args, model, group, engine, device)
