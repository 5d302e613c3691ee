"""Mistakes of data parallelism and of sharded state."""

from breaks_training import instead


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

    def spoiled(self, parameter):
        if not self.last_backward:
            parameter.local, parameter.grad = parameter.grad, None
        on_gradient(self, parameter)

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
