"""ZeRO: data parallelism in which each rank keeps a shard of what other engines keep n times.

    zero1    a rank keeps the optimizer state of its shard only, and updates only that
    zero2    and the gradients of its shard only
    zero3    and the weights of its shard only; a layer is gathered when it is needed

Sources: ZeRO (arXiv:1910.02054), section 5; FSDP (arXiv:2304.11277), section 3.
"""

import functools
import itertools

import torch

import process_group as pg
from data_parallel import Bucketed, Naive


class Zero1(Bucketed):
    """Each rank updates its shard of the weights, and keeps the optimizer state of only that.

    An all-reduce is a reduce-scatter and an all-gather. Here the update stands between the two.
    """

    axes = ("dp", "cp")
    most_bytes = 2**28  # of gradients on their way at once; they take memory until they arrive

    def __init__(self, model, group):
        super().__init__(model, group)
        self.parameters = []
        for bucket in self.buckets:
            self.lay_out(bucket)
            self.parameters += bucket.pieces(bucket.shard, bucket.gradient_shard)

    def lay_out(self, bucket):
        """Put a bucket's weights into one vector; this rank's shard of it gets a gradient."""
        bucket.hold(bucket.vector(bucket.parameters))
        bucket.shard = bucket.weights[bucket.mine]
        bucket.gradient_shard = torch.zeros_like(bucket.shard)

    def zero_grad(self):
        for bucket in self.buckets:
            bucket.gradient_shard.zero_()

    def reduce(self, bucket):
        """Start to sum a bucket's gradients into this rank's shard; drop the whole ones."""
        while self.running and bucket.nbytes + self.bytes_running() > self.most_bytes:
            self.finish_oldest()
        vector = bucket.gradients()
        for parameter in bucket.parameters:
            parameter.grad = None
        return vector, *pg.reduce_scatter(vector, self.group, async_op=True)

    def bytes_running(self):
        return sum(sent.nbytes for _, sent, _, _ in self.running)

    def reduced(self, bucket, received):
        bucket.gradient_shard += received

    def finish_update(self):
        handles = [self.gather(bucket) for bucket in self.buckets]
        for handle in handles:
            handle.wait()

    def gather(self, bucket):
        shard = bucket.shard.to(bucket.weights.dtype)  # another dtype in zero3 only
        out, handle = pg.all_gather(shard, self.group, out=bucket.weights, async_op=True)
        return handle


class Zero2(Zero1):
    """Zero1 that keeps the gradients of its shard only: each micro-batch's are sent at once."""

    def on_gradient(self, parameter):
        bucket = self.bucket_of[parameter]
        if bucket.arrived():
            self.running.append((bucket, *self.reduce(bucket)))


class Zero3(Zero2):
    """Zero2 that keeps the weights of its shard only: a layer is whole while it computes.

    The matrices of a layer are one bucket. It is gathered before the layer computes and freed after
    that, once in the forward pass and once in the backward pass. While a layer computes, the next
    one is gathered. The last layer stays from its forward pass to its backward pass.

    The norms of all layers are one bucket, and the head is one. Both are gathered when the forward
    pass begins, and stay until their gradients are there. The embedding is whole in its forward
    pass only: its backward pass needs no weights. If it is tied, it is the head, too, and stays.

    The matrices of the layers and the head travel in the dtype of the computation. `Linear` would
    cast them to it anyway, so this changes no number. The shards keep their own dtype.
    """

    def __init__(self, model, group):
        super().__init__(model, group)
        count = len(model.model.layers)
        self.layers, self.outside = self.buckets[:count], self.buckets[count:]
        named = {bucket.parameters[0].global_name: bucket for bucket in self.outside}
        # Each may be None: a stage of a pipeline (step 7) lacks one or both; a tied head is the
        # embedding.
        embedding = named.get("model.embed_tokens.weight")
        head = named.get("lm_head.weight")
        if embedding is not None and not model.model.config.tie_word_embeddings:
            self.outside.remove(embedding)
            embed = model.model.embed_tokens
            embed.register_forward_pre_hook(lambda *_: self.fetch(embedding, ahead=None))
            embed.register_forward_hook(lambda *_: self.drop(embedding))
        for bucket in filter(None, [*self.layers, head]):
            # `gather` casts the shard to the dtype of this vector; the shard stays as it is.
            bucket.hold(torch.empty_like(bucket.weights, dtype=model.model.dtype))
            self.drop(bucket)
        for bucket in self.layers:
            bucket.before = bucket.after = None
        for bucket, after in itertools.pairwise(self.layers):
            bucket.after, after.before = after, bucket
        for bucket, layer in zip(self.layers, model.model.layers, strict=True):
            bucket.in_backward = False
            layer.register_forward_pre_hook(functools.partial(self.before_forward, bucket))
            layer.register_forward_hook(functools.partial(self.after_forward, bucket))
        model.register_forward_pre_hook(self.before_model)

    def cut(self, model):
        """Lists of parameters: the matrices of each layer, all norms, each other matrix alone."""
        norms = [p for p in self.parameters if p.dim() < 2]
        layers = [list(layer.parameters()) for layer in model.model.layers]
        layers = [[p for p in layer if p.dim() > 1] for layer in layers]
        inside = {parameter for layer in layers for parameter in layer}
        outside = [[p] for p in self.parameters if p.dim() > 1 and p not in inside]
        return [*layers, norms, *outside]

    def lay_out(self, bucket):
        super().lay_out(bucket)
        bucket.shard = bucket.shard.clone()  # the vector that it was a part of is freed
        bucket.gathering = None  # the handle of its all-gather; None: the weights are not here
        self.drop(bucket)

    def fetch(self, *buckets, ahead):
        """Wait until the weights of some buckets are here; start to gather those of `ahead`."""
        for bucket in (*buckets, ahead):
            if bucket is not None and bucket.gathering is None:
                bucket.weights.untyped_storage().resize_(bucket.weights.nbytes)
                bucket.gathering = self.gather(bucket)
        for bucket in buckets:
            bucket.gathering.wait()

    def drop(self, bucket):
        """Free the memory of gathered weights, but keep their tensors.

        The parameters, and what autograd saved of them, use the same storage: they find the
        weights there again after the next `fetch`. Autograd counts the writes to a tensor, and
        refuses a saved one whose count has changed. A gather changes only the count of
        `bucket.weights`. A slice of that vector would share its count, but a parameter does not:
        `hold` has set its `.data`, and a parameter keeps its own count then.
        """
        if bucket.gathering is not None:
            bucket.gathering.wait()
        bucket.gathering = None
        bucket.weights.untyped_storage().resize_(0)

    def before_model(self, model, inputs):
        self.fetch(*self.outside, ahead=self.layers[0])

    @torch.compiler.disable
    def before_forward(self, bucket, layer, inputs):
        self.fetch(bucket, ahead=None if bucket.in_backward else bucket.after)

    @torch.compiler.disable
    def after_forward(self, bucket, layer, inputs, output):
        if bucket.in_backward:  # activation checkpointing computes it again; backward is next
            return
        output.register_hook(functools.partial(self.before_backward, bucket))
        if bucket.after is not None:  # backward begins with the last one
            self.drop(bucket)

    def before_backward(self, bucket, grad):
        """Called when the gradient of a layer's output is there: its backward pass is next."""
        bucket.in_backward = True
        self.fetch(bucket, ahead=bucket.before)

    def reduce(self, bucket):
        # The weights are not needed any more: the backward pass of a linear layer computes the
        # gradients of its input and of its weight together, before the hook runs.
        bucket.in_backward = False
        self.drop(bucket)
        return super().reduce(bucket)

    def finish_update(self):
        # After a backward pass `reduce` has dropped all weights. But a program may evaluate before
        # the update. This leaves the last layer, the norms and the head here. The update has made
        # them old.
        for bucket in self.buckets:
            self.drop(bucket)


ENGINES = {"naive": Naive, "bucket": Bucketed, "zero1": Zero1, "zero2": Zero2, "zero3": Zero3}


def data_parallel(name, model, group):
    """The engine of a name; for a group of one the simplest, as there is nothing to share."""
    return (ENGINES[name] if group.size > 1 else Naive)(model, group)
