"""Mistakes, planted on purpose: what the checks must notice.

Each function takes the `train` module of a step and spoils it. As a script it trains with a
mistake: `python tests/breaks.py halve_norm_gradients step3_dataloader/train.py --max_tokens 9000`.
"""

import contextlib
import functools
import importlib
import inspect
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

from fully_sharded import fully_sharded  # noqa: F401  no mistake, but chosen by name too


def instead(train, spoil):
    """Let spoil(state, forward_backward) stand in for a step's forward_backward(state)."""
    forward_backward = train.forward_backward
    train.forward_backward = lambda state: spoil(state, forward_backward)


def after_backward(train, change):
    """Call change(parameter) when a step's gradients are complete, before the norm is taken."""

    def spoil(state, forward_backward):
        loss = forward_backward(state)
        for parameter in state.parameters:
            change(parameter)
        return loss

    instead(train, spoil)


def halve_norm_gradients(train):
    """What a sum that is missing over two ranks does to the weights of the norms."""

    def halve(parameter):
        if len(parameter.full_shape) == 1:
            parameter.grad.mul_(0.5)

    after_backward(train, halve)


def scale_gradients(train):
    """A constant factor on every gradient: Adam hides it, the gradient norm does not."""
    after_backward(train, lambda parameter: parameter.grad.mul_(2))


def mean_of_micro_batches(train):
    """Each micro-batch divided by its own number of targets, not by the step's."""

    def spoil(state, forward_backward):
        own = state.args.tokens_per_step // state.args.gradient_accumulation_steps
        with patch.object(state.args, "tokens_per_step", own):
            return forward_backward(state)

    instead(train, spoil)


def last_micro_batch_only(train):
    """Gradients of all micro-batches but the last one are lost."""

    def spoil(state, forward_backward):
        micro_batches = state.data.micro_batches

        def forgetful(step):
            for micro_batch in micro_batches(step):
                state.optimizer.zero_grad()
                yield micro_batch

        with patch.object(state.data, "micro_batches", forgetful):
            return forward_backward(state)

    instead(train, spoil)


def weights_in_bfloat16(train):
    """No float32 copy of the weights: what is smaller than their last digit is lost."""
    train_step = train.train_step

    def rounded(state):
        metrics = train_step(state)
        for parameter in state.parameters:
            parameter.data.copy_(parameter.data.bfloat16())
        return metrics

    train.train_step = rounded


def other_data_on_a_replica(train):
    """Replicas that see their sequences in another order than the first one."""
    setup = train.setup

    def spoiled(args):
        state = setup(args)
        state.data.order.seed += int(os.environ["RANK"])
        return state

    train.setup = spoiled


# --- tensor parallelism ---------------------------------------------------------------------------


def no_sum_forward(train):
    """Row-parallel layers keep their share of the sum."""
    from tensor_parallel import AllReduce

    AllReduce.forward = staticmethod(lambda ctx, x, group: x.view_as(x))


def no_sum_backward(train):
    """Column-parallel layers keep their share of the gradient for x."""
    import process_group as pg

    all_reduce = pg.all_reduce

    def deaf(x, group, op=pg.ReduceOp.SUM, async_op=False):
        return pg.Done() if async_op else all_reduce(x, group, op)

    pg.all_reduce = deaf


def first_slice_everywhere(train):
    """Every rank loads the slice of the first one, whatever its own is."""
    materialize = train.materialize

    def spoiled(model, seed, device):
        held = {p: p.held for p in model.parameters()}
        for parameter, slices in held.items():
            parameter.held = tuple(slice(0, s.stop - s.start) for s in slices)
        materialize(model, seed, device)
        for parameter, slices in zip(model.parameters(), held.values(), strict=True):
            parameter.held = slices

    train.materialize = spoiled


def weights_drawn_by_each_rank(train):
    """Each rank draws its own part of a weight: no longer the single device's weights."""
    import model

    initial_value = model.initial_value

    def drawn(name, shape, seed, std):
        return initial_value(name, shape, seed + int(os.environ["RANK"]), std)

    model.initial_value = drawn


def norm_gradients_of_own_tokens(train):
    """Sequence parallelism without the sum of the norms' gradients."""
    from tensor_parallel import SumGradient

    SumGradient.backward = staticmethod(lambda ctx, grad: (grad, None))


def replicas_counted_twice(train):
    """The gradient norm adds what all tensor-parallel ranks hold, copies included."""
    apply = train.apply_tensor_parallel

    def spoiled(model, *rest):
        apply(model, *rest)
        for parameter in model.parameters():
            parameter.counted = True

    train.apply_tensor_parallel = spoiled


def symbols_of_others_found_here(train):
    """An embedding that does not leave the symbols of other ranks out."""
    import tensor_parallel

    local_symbol = tensor_parallel.local_symbol

    def everything_here(symbols, held):
        column, here = local_symbol(symbols, held)
        return column, here | True

    tensor_parallel.local_symbol = everything_here


# --- context parallelism --------------------------------------------------------------------------


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


# --- data parallelism -----------------------------------------------------------------------------


def mean_over_ranks(train):
    """Gradients averaged, though the loss was divided by the targets of all ranks already."""

    def spoil(state, forward_backward):
        loss = forward_backward(state)
        for parameter in state.parameters:
            parameter.grad.div_(state.engine.group.size)
        return loss

    instead(train, spoil)


def same_data_on_every_rank(train):
    """Every rank reads the micro-batches of the first one."""
    import dataclasses

    setup = train.setup

    def spoiled(args):
        state = setup(args)
        state.data.group = dataclasses.replace(state.data.group, rank=0)
        return state

    train.setup = spoiled


def only_the_last_micro_batch_is_summed(train):
    """A hook that reduces the gradient of the last micro-batch, and leaves the other one local."""
    from data_parallel import Bucketed

    on_gradient, finish = Bucketed.on_gradient, Bucketed.finish_gradients

    def spoiled(self, bucket, parameter):
        if not self.last_backward:
            parameter.local, parameter.grad = parameter.grad, None
        on_gradient(self, bucket, parameter)

    def finished(self):
        finish(self)
        for parameter in self.parameters:
            parameter.grad += parameter.local

    Bucketed.on_gradient, Bucketed.finish_gradients = spoiled, finished


def every_backward_is_the_last(train):
    """Buckets that are summed after each micro-batch, so that the first ones count again."""
    train.Naive.last_backward = property(lambda self: True, lambda self, value: None)


def hooks_vanish(train):
    """Hooks that nobody kept a reference to, and that never fire."""
    import torch

    torch.nn.Parameter.register_post_accumulate_grad_hook = lambda self, hook: None


def update_not_shared(train):
    """The other ranks' updates never arrive: weights stay as they were gathered."""
    import zero

    zero.Zero1.finish_update = lambda self: None


def weights_not_gathered_anew(train):
    """Layers keep the weights that were gathered before the update."""
    import zero

    zero.Zero3.drop = lambda self, bucket: None


# --- pipelines ------------------------------------------------------------------------------------


def stages_start_at_layer_zero(train):
    """Each stage names its layers from 0 on, and so draws the weights of the first ones."""
    import re

    materialize = train.materialize

    def spoiled(model, seed, device):
        names = {p: p.global_name for p in model.parameters()}
        first = min(map(int, model.model.layers))
        for parameter, name in names.items():
            parameter.global_name = re.sub(r"[0-9]+", lambda n: str(int(n[0]) - first), name)
        materialize(model, seed, device)
        for parameter, name in zip(model.parameters(), names.values(), strict=True):
            parameter.global_name = name

    train.materialize = spoiled


def ends_not_summed(train):
    """Tied embeddings whose two stages keep their own gradients."""
    train.sum_shared_gradients = lambda parameters: None


def norm_of_the_own_stage(train):
    """A gradient norm of the layers that a stage has."""
    gradient_norm = train.gradient_norm

    def own(parameters, names, group):
        import dataclasses

        return gradient_norm(parameters, names, dataclasses.replace(group, ranks=group.ranks[:1]))

    train.gradient_norm = own


def tables_among_others(train):
    """The embedding and the head share buckets with layers, as tp cuts them unevenly."""
    import data_parallel

    data_parallel.Bucketed.cut = lambda self, model: data_parallel.cut_by_size(
        self.parameters[::-1], self.bucket_bytes
    )


def small_buckets(train):
    """No mistake: buckets so small that most parameters have one of their own."""
    from data_parallel import Bucketed

    Bucketed.bucket_bytes = 1000


def late_first_rank(train):
    """No mistake, but bad luck: the rank that reports errors is two seconds late."""
    if os.environ.get("RANK", "0") == "0":
        time.sleep(2)


def slow_steps(train):
    """No mistake, but time to send a signal in: each step takes a quarter of a second longer."""
    before(train, "train_step", lambda: time.sleep(0.25))


# --- no mistakes: without what makes a step fast --------------------------------------------------


def layers_fetched_when_needed(train):
    """zero3 without the gather of the next layer beside the computation of this one."""
    from zero import Zero3

    fetch = Zero3.fetch
    Zero3.fetch = lambda self, *buckets, ahead: fetch(self, *buckets, ahead=None)


def sends_waited_for(train):
    """A stage does not compute while what it has sent is on its way."""
    stage = train.Stage
    talk = stage.talk

    def patient(self, *args, **kwargs):
        arrived = talk(self, *args, **kwargs)
        self.finish_sends()
        return arrived

    stage.talk = patient


def casts_by_each_micro_batch(train):
    """No cast of a weight is shared: each micro-batch makes its own, and keeps it."""
    train.shared_casts = lambda model, args: contextlib.nullcontext()


def host_waits_for_micro_batches(train):
    """What reading a micro-batch's loss does: the host prepares nothing while the GPU computes."""
    import torch

    def spoil(state, forward_backward):
        micro_batches = state.data.micro_batches

        def waiting(step):
            for micro_batch in micro_batches(step):
                yield micro_batch
                if state.device.type == "cuda":
                    torch.cuda.synchronize()

        with patch.object(state.data, "micro_batches", waiting):
            return forward_backward(state)

    instead(train, spoil)


def messages_waited_for(train):
    """Nothing is computed while a message is on its way: neither beside a sum, nor in the ring."""
    import process_group as pg

    def arrived(result):
        if isinstance(result, tuple | list):
            return type(result)(map(arrived, result))
        if not hasattr(result, "wait"):
            return result  # a tensor
        result.wait()
        return pg.Done()  # gloo would wait for a second message

    def patient(function):
        return lambda *args, **kwargs: arrived(function(*args, **kwargs))

    for name in ("all_reduce", "all_gather", "reduce_scatter", "exchange"):
        setattr(pg, name, patient(getattr(pg, name)))


def only_layers_compiled(train):
    """`--compile` without the loss, and without what merges the blocks of a ring."""
    import torch

    original = torch.compile
    # A layer hands over a method of its own, all others are functions.
    torch.compile = lambda f, **options: original(f, **options) if inspect.ismethod(f) else f


def all_layers_in_one_graph(train):
    """`--compile` of the whole model at once, instead of one layer that all others are like."""
    from model import Llama

    Llama.compile_layers = lambda self, backend, *rest: self.compile(backend=backend)


def adamw_not_fused(train):
    """An update in several passes over the weights."""
    import torch

    AdamW = torch.optim.AdamW
    torch.optim.AdamW = lambda *args, fused, **options: AdamW(*args, **options)


def norm_of_copies(train):
    """A gradient norm that makes a float64 copy of each gradient first."""
    import torch

    torch._foreach_norm = lambda gradients, order, dtype: [
        torch.linalg.vector_norm(gradient, order, dtype=dtype) for gradient in gradients
    ]


def batches_loaded_when_needed(train):
    """No micro-batch is ready before the device asks for it."""

    def micro_batches(self, step):
        if step != self.next_step:
            self.loading = iter(self.load(self.order.cut(self.micro_batch_size, step)))
        for _ in range(self.micro_batches_a_step):
            yield self.split(next(self.loading))
        self.next_step = step + 1

    train.Batches.micro_batches = micro_batches


# --- deaths ---------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, act):
    """Do something each time a function is called, before it runs."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        act()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def die_in_a_save(train):
    """The rank, the save (from 1) and the place in it that DEATH names, as in "1 2 writing"."""
    import pathlib

    import checkpoint
    import resharding
    import run_directory

    rank, count, place = os.environ["DEATH"].split()
    if rank != os.environ.get("RANK", "0"):
        return
    saves = []

    def die_if_it_is_time():
        if len(saves) == int(count):
            die()

    owner, name = {
        "beginning": (checkpoint, "save"),
        "planning": (checkpoint, "write_tensors"),
        "writing": (resharding, "write_file"),
        "gathering": (resharding, "header_of"),
        "about": (run_directory, "write_about"),
        "renaming": (pathlib.Path, "rename"),
        "deleting": (shutil, "rmtree"),
    }[place]
    before(owner, name, die_if_it_is_time)
    before(checkpoint, "save", lambda: saves.append(1))


def die_in_a_step(train):
    """The rank, the step and the seconds after the step's begin that DEATH names: "1 5 0.02"."""
    rank, step, seconds = os.environ["DEATH"].split()
    if rank == os.environ.get("RANK", "0"):
        steps = iter(range(1, 1000))
        before(
            train,
            "train_step",
            lambda: (
                threading.Timer(float(seconds), die).start() if next(steps) == int(step) else None
            ),
        )


if __name__ == "__main__":
    name, script, *argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    sys.argv = [script, *argv]
    train = importlib.import_module("train")
    globals()[name](train)
    importlib.import_module("errors").run(train.main, train.parse_args)
