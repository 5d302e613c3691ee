"""What the checks of step 6 run on each rank: the engines that shard."""

import contextlib
from unittest.mock import patch

from same import same
from step6_engines import (
    SUM,
    alone,
    backward,
    bucket_of_two,
    data_group,
    sent_in_backward,
    small_llama,
    step,
)


@contextlib.contextmanager
def weights_at_hand():
    """Say what an error of PyTorch means that comes from a storage of no size."""
    try:
        yield
    except RuntimeError as error:
        if "storage" not in str(error):
            raise
        raise AssertionError(
            f"{error}. A tensor was used while its memory was freed. Is it fetched in time, by a "
            "hook before the forward pass and one before the backward pass? Does a shard have "
            "memory of its own? Is the storage resized, and the tensor kept?"
        ) from error


def adamw(parameters):
    import torch

    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def shards():
    import torch

    import process_group as pg

    bucket, parameters = bucket_of_two()
    group, due = bucket.group, [p.detach().clone() for p in parameters]
    vector = bucket.vector(parameters)
    whole, shard = vector.clone(), vector[bucket.mine]
    vector[: bucket.mine.start] = vector[bucket.mine.stop :] = 0  # of the other ranks
    out, handle = pg.all_gather(shard, group, out=vector, async_op=True)
    handle.wait()
    assert out is vector, "all_gather(shard, group, out=vector) should write into `vector`"
    same(vector, whole, "all_gather of a shard into the vector it is a part of", "all shards")

    bucket.hold(vector)
    for p, weight in zip(parameters, due, strict=True):
        same(p, weight, f"after Bucket.hold the {p.global_name}", "what it was")
        vector *= 2
        same(p, 2 * weight, f"the {p.global_name} of a doubled vector", "a view of the vector")
        vector /= 2

    gradients = torch.zeros_like(shard)
    found = []
    for piece in bucket.pieces(shard, gradients):
        p = next(p for p in parameters if p.global_name == piece.global_name)
        same(piece, p.flatten()[piece.piece], "a piece", "the slice `piece` of the flat parameter")
        lost = p.__dict__.keys() - piece.__dict__.keys()
        assert not lost, f"a piece lacks the tags {sorted(lost)} of its parameter"
        for tensor, memory in ((piece, shard), (piece.grad, gradients)):
            assert tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr(), (
                "a piece and its .grad are views of the shards: the optimizer writes there"
            )
        found.append((piece.global_name, piece.piece.start, piece.piece.stop))
    return found


def sharded(name, flags):
    """Two updates with an engine that shards, beside one process."""
    import zero
    from data_parallel import Bucketed

    group, model, whole = data_group(), small_llama(**flags), small_llama(**flags)
    with patch.object(Bucketed, "bucket_bytes", 3000):
        engine = getattr(zero, name)(model, group)
    optimizer, due = adamw(engine.parameters), adamw(whole.parameters())
    weights = dict(whole.named_parameters())
    every = sum(p.numel() for p in weights.values())
    mine = sum(piece.numel() for piece in engine.parameters)
    most = every / group.size + group.size * len(engine.buckets)
    assert mine <= most, f"the optimizer gets {mine} of {every} weights; a shard has 1/{group.size}"
    for number, numbers in enumerate([(0, 1), (2, 3, 4)], 1):
        with weights_at_hand():
            step(engine, model, numbers)
        due.zero_grad()
        alone(whole, numbers, group.size)
        for piece in engine.parameters:
            what = f"step {number}: a piece of the gradient of {piece.global_name}"
            same(piece.grad, weights[piece.global_name].grad.flatten()[piece.piece], what, SUM)
        left = [p.global_name for p in model.parameters() if p.grad is not None]
        assert not left, f"whole gradients are still there after the reduction: {left}"
        if name == "Zero3":  # as an evaluation leaves some weights here
            engine.fetch(*engine.buckets, ahead=None)
        optimizer.step()
        due.step()
        engine.finish_update()
        if name == "Zero3":
            engine.fetch(*engine.buckets, ahead=None)
        hint = "that of one process; each rank updates its shard, and the shards are gathered"
        for p in model.parameters():
            what = f"step {number}: the updated weight {p.global_name}"
            same(p, weights[p.global_name], what, hint, 1e-10)
        if name == "Zero3":
            for bucket in engine.buckets:
                engine.drop(bucket)


def little_on_its_way():
    """The most bytes of gradients on their way at a time, and what is allowed."""
    from data_parallel import Bucketed
    from zero import Zero1

    class Watched(Zero1):
        most_bytes = 6000

        def reduce(self, bucket):
            sent, *others = super().reduce(bucket)
            most.append(sent.nbytes + self.bytes_running())
            return sent, *others

    group, model, most = data_group(), small_llama(), []
    with patch.object(Bucketed, "bucket_bytes", 3000):
        engine = Watched(model, group)
    step(engine, model, [0])
    return max(most), engine.most_bytes


def no_whole_gradients():
    from zero import Zero2

    (first, _, after), count, nothing_left = sent_in_backward(Zero2, {})
    assert first == {"reduce_scatter": count} and after == {"reduce_scatter": 2 * count}, (
        f"{first} after the first micro-batch, {after} after the second, of {count} buckets: each "
        "micro-batch's gradients are reduce-scattered as they come"
    )
    assert all(nothing_left), "after a micro-batch there are still whole gradients"


def held_bytes(bucket):
    return bucket.weights.untyped_storage().nbytes()


def fetch_and_drop():
    import torch

    from zero import Zero3

    group, model, whole = data_group(), small_llama(), dict(small_llama().named_parameters())
    with weights_at_hand():
        engine = Zero3(model, group)
    every = sum(p.numel() for p in whole.values())
    for bucket in engine.buckets:
        assert held_bytes(bucket) == 0, "after lay_out the whole weights should be dropped"
    kept = sum(bucket.shard.numel() for bucket in engine.buckets)
    assert kept < every / group.size + group.size * len(engine.buckets), "shards have 1/n of all"

    first, second, *others = engine.buckets
    engine.fetch(first, ahead=second)
    assert second.gathering is not None, "fetch(…, ahead=bucket) starts to gather that, too"
    assert not any(held_bytes(bucket) for bucket in others), "fetch takes more than it was asked"
    second.gathering.wait()
    for p in (*first.parameters, *second.parameters):
        same(p, whole[p.global_name], f"the fetched {p.global_name}", "the weights as they were")

    weight = first.parameters[0]
    x = torch.ones(2, weight.shape[1], dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)  # autograd keeps the weight
    engine.drop(first)
    assert held_bytes(first) == 0, "drop does not free the memory: resize the storage to 0"
    engine.fetch(first, ahead=None)
    with weights_at_hand():
        (grad,) = torch.autograd.grad(y.sum(), x)
    due = torch.ones_like(y) @ whole[weight.global_name]
    what = "a gradient whose weight was dropped after the forward pass and fetched again"
    same(grad, due, what, "as if it had never been away: keep the tensor, free its storage only")


def whole_layers(flags):
    """What is whole in the second micro-batch of five layers, and what is gathered.

    Layers when each of them computes forward, when each is recomputed (to its end; by itself
    PyTorch stops a little earlier), and when all is done; bytes of the embedding when the first
    layer computes; whether layers are gathered in the dtype of their shards; the all-gathers.
    """
    from torch.utils.checkpoint import set_checkpoint_early_stop

    from ledger import recorded
    from zero import Zero3

    group, model = data_group(), small_llama(layers=5, **flags)
    engine, found, embedding = Zero3(model, group), [], []
    layers = [engine.bucket_of[layer.mlp.up_proj.weight] for layer in model.model.layers]
    table = engine.bucket_of[model.model.embed_tokens.weight]

    def whole():
        return [i for i, bucket in enumerate(layers) if held_bytes(bucket)]

    def note(*_):
        found.append(whole())
        embedding.append(held_bytes(table))

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(note)
    for number in (0, 1):
        found.clear()
        with recorded() as traffic, weights_at_hand(), set_checkpoint_early_stop(False):
            backward(model, group.rank, [number], group.size)
            engine.finish_gradients()
    same_dtype = [bucket.weights.dtype == bucket.shard.dtype for bucket in layers]
    gathers = traffic["dp_cp", "all_gather"][0]
    return found[:5], found[5:], whole(), embedding[0], same_dtype, gathers
