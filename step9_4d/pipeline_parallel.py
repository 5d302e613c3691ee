"""Pipeline parallelism: each rank holds some of the layers, and micro-batches pass through them.

A stage receives activations from the stage before, computes its layers and sends the result on.
Gradients come back the same way. With p stages and m micro-batches each stage is idle for a share
(p - 1) / (m + p - 1) of the step, in either schedule:

    afab  all forward, then all backward: the activations of m micro-batches are alive
    1f1b  one forward, one backward, as soon as there is a gradient: those of p at most

Sources: GPipe (arXiv:1811.06965), section 2.3; PipeDream-Flush (arXiv:2006.09503), section 2.2.
"""

import collections
import warnings
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import get_gradient_edge

import process_group as pg
from timeline import Timeline

# On all stages but the last a backward pass begins with a matrix product, in autograd's own thread.
# That thread has no CUDA context yet. torch makes one, as it should, and warns.
warnings.filterwarnings("ignore", "Attempting to run cuBLAS")


def deal_layers(config, stages):
    """Which layers each stage holds, a range for each, so that the largest cost is smallest.

    The cost of a layer is the number of its weights; the first stage also has the embedding, the
    last one the head.
    """
    layers = config.num_hidden_layers
    kv_width = config.num_key_value_heads * config.head_dim
    width = config.num_attention_heads * config.head_dim + kv_width
    layer = config.hidden_size * (2 * width + 3 * config.intermediate_size)
    table = config.hidden_size * config.vocab_size

    def cost(stage, start, stop):
        return (stop - start) * layer + table * (stage == 0) + table * (stage == stages - 1)

    # best[stop]: how the stages so far best hold the layers before `stop`, as a pair: the largest
    # cost of a stage, and the stages' ranges.
    best = {0: (0, [])}
    for stage in range(stages):
        reached = {}
        for start, (largest, dealt) in best.items():
            for stop in range(start + 1, layers + 1):
                found = max(largest, cost(stage, start, stop)), [*dealt, range(start, stop)]
                if stop not in reached or found[0] < reached[stop][0]:
                    reached[stop] = found
        best = reached
    return best[layers][1]


def apply_pipeline_parallel(model, group, chunks=1):
    """Reduce a model on the meta device to what this rank's stage computes, or its several chunks.

    A stage is called like the whole model. Each module that it lacks is replaced by one that
    returns its input. So the first stage takes tokens and the others take activations; the last
    stage returns the loss and the others return activations.
    """
    if group.size == 1:
        return
    dealt = deal_layers(model.model.config, group.size * chunks)[group.rank :: group.size]
    for chunk, mine in enumerate(dealt):
        for parameter in nn.ModuleList(model.model.layers[i] for i in mine).parameters():
            parameter.chunk_number = chunk
    model.model.layers = nn.ModuleList(model.model.layers[i] for mine in dealt for i in mine)
    if not group.is_first:
        model.model.embed_tokens = nn.Identity()
    if not group.is_last:
        model.model.norm = model.lm_head = nn.Identity()
        model.cross_entropy = lambda activations, targets: activations
    if model.model.config.tie_word_embeddings:
        # The first and the last stage hold the same weight, and will add up its gradients in a
        # group of two. A stage in between makes a group too, of itself alone, so that all ranks
        # have made equally many: torch puts that number into the name of the next group, and the
        # ranks of a group must agree on its name.
        ends = (group.ranks[0], group.ranks[-1])
        own = group.ranks[group.rank]
        ranks = ends if own in ends else (own,)
        pointer = weakref.ref(dist.new_group(ranks, use_local_synchronization=True))
        for weight in model.parameters():
            if weight.global_name == "model.embed_tokens.weight":
                weight.shared = pg.Group("ends", ends, int(group.is_last), pointer)
                weight.counted &= group.is_first


def sum_shared_gradients(parameters):
    """Add up the gradients of a weight that two stages hold."""
    for parameter in parameters:
        if hasattr(parameter, "shared"):
            pg.all_reduce(parameter.grad, parameter.shared)


def message_shape(args):
    """The shape of what stages send: [sequences, tokens that a rank has of each, hidden]."""
    parts = args.cp_size * (args.tp_size if args.sequence_parallel else 1)
    return args.micro_batch_size, args.seq_len // parts, args.config.hidden_size


class Stage:
    """A rank's part of the model, and its way of talking to the stages before and after."""

    def __init__(self, args, model, group, engine, device):
        self.model, self.engine, self.device, self.group = model, engine, device, group
        self.before = None if group.is_first else group.previous
        self.after = None if group.is_last else group.next
        self.shape = message_shape(args)
        self.micro_batches = args.gradient_accumulation_steps  # how many a step has
        # In a stage alone each micro-batch goes backward at once, as without a pipeline.
        self.schedule = args.pp_engine if group.size > 1 else "1f1b"
        self.timeline = Timeline(args.timeline, device)
        # For each micro-batch that has not gone backward yet: its input, and where in autograd's
        # graph its backward pass will begin. Nobody needs an output that has been sent.
        self.alive = collections.deque()
        self.sending = []  # handles, with the tensors that they send

    def run(self, micro_batches, targets_in_all, backward):
        """Forward and backward for a step's micro-batches; or forward only, for any number of them.

        Returns the sum of their losses, each divided by targets_in_all, as a float64 scalar; zero
        on all stages but the last.
        """
        self.begin(targets_in_all)
        if backward:
            SCHEDULES[self.schedule](self, micro_batches)
        else:
            for micro_batch in micro_batches:
                all_forward(self, [micro_batch])
                self.alive.clear()  # at once: nothing will go backward
        self.finish_sends()
        return self.total

    def begin(self, targets_in_all):
        """Start a step: no loss is added up yet, and no micro-batch has gone backward."""
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.targets_in_all, self.went_backward = targets_in_all, 0

    def empty(self):
        """Memory for what a neighbour sends."""
        return torch.empty(self.shape, dtype=self.model.model.dtype, device=self.device)

    def finish_sends(self):
        """Wait for the sends that are under way, and let go of their tensors."""
        for handle, _ in self.sending:
            handle.wait()
        self.sending.clear()

    def forward(self, x, micro_batch):
        """Compute one micro-batch; returns what to send on.

        x: what arrived, activations of `message_shape`; None on the first stage, which takes the
        tokens. Returns activations of the same shape; the last stage returns the loss.
        """
        tokens, targets, positions = micro_batch
        x = tokens if x is None else x.requires_grad_()
        with self.timeline.span("forward"):
            out = self.model(x, targets, positions)
            if self.after is None:
                out = out / self.targets_in_all
                self.total += out.detach()
        self.alive.append((x, get_gradient_edge(out)))
        return out.detach()

    def backward(self, grad):
        """Go backward with the oldest micro-batch alive; returns the gradient of its input.

        So the gradients of weights are added in the order of a run without a pipeline. grad is the
        gradient of its output: None on the last stage, whose output is the loss. The first stage
        returns None.
        """
        x, edge = self.alive.popleft()
        self.went_backward += 1
        self.engine.last_backward = self.went_backward == self.micro_batches
        with self.timeline.span("backward"):
            torch.autograd.backward(edge, grad)
        return x.grad

    def talk(self, peer, send=None, receive=False):
        """Send to a neighbour, receive from it, or both at once; returns what was received.

        peer: its global rank; None beyond an end of the pipeline, where there is nothing to do. A
        send alone is waited for only before the next one: the stage computes meanwhile.
        """
        if peer is None:
            return None
        sends = [] if send is None else [(send.contiguous(), peer)]
        if not receive:
            self.finish_sends()  # the one before; then its memory is free
            self.sending = [(handle, sends) for handle in pg.exchange(self.group, sends)]
            return None
        arriving = self.empty()
        with self.timeline.span("wait"):
            for handle in pg.exchange(self.group, sends, [(arriving, peer)]):
                handle.wait()
        return arriving


def all_forward(stage, micro_batches):
    """Receive, compute and send on, one micro-batch after the other."""
    for micro_batch in micro_batches:
        x = stage.talk(stage.before, receive=True)
        stage.talk(stage.after, send=stage.forward(x, micro_batch))


def all_forward_all_backward(stage, micro_batches):
    """AFAB: the activations of all micro-batches are alive at once."""
    all_forward(stage, micro_batches)
    while stage.alive:
        grad = stage.talk(stage.after, receive=True)
        stage.talk(stage.before, send=stage.backward(grad))


def one_forward_one_backward(stage, micro_batches):
    """1F1B: a stage goes forward a few times, then alternates, and at last only goes backward.

    Its warm-up is one forward pass for each stage after it. While it alternates, it and its
    neighbour have something for each other at the same time. So both messages are posted together:
    if each stage waited for its send first, neither would come to its receive.
    """
    micro_batches = iter(micro_batches)
    ahead = min(stage.group.size - 1 - stage.group.rank, stage.micro_batches)
    steady = stage.micro_batches - ahead
    for _ in range(ahead):  # warm-up
        x = stage.talk(stage.before, receive=True)
        stage.talk(stage.after, send=stage.forward(x, next(micro_batches)))
    x = stage.talk(stage.before, receive=True) if steady else None
    for done, micro_batch in enumerate(micro_batches, 1):
        grad = stage.talk(stage.after, send=stage.forward(x, micro_batch), receive=True)
        x = stage.talk(stage.before, send=stage.backward(grad), receive=done < steady)
    for _ in range(ahead):  # cool-down
        grad = stage.talk(stage.after, receive=True)
        stage.talk(stage.before, send=stage.backward(grad))


SCHEDULES = {"afab": all_forward_all_backward, "1f1b": one_forward_one_backward}
