"""No mistakes: without what makes a step fast."""

import contextlib
import inspect
from unittest.mock import patch

from breaks_training import instead


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
    train.shared_casts = lambda model, engine, args: contextlib.nullcontext()


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
