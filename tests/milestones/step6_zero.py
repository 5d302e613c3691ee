"""What the checks of step 6 run on each rank: the engines that shard."""

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
        assert piece.full_shape == p.shape and piece.counted, "a piece has the parameter's tags"
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
    engine = Zero3(model, group)
    every = sum(p.numel() for p in whole.values())
    for bucket in engine.buckets:
        assert held_bytes(bucket) == 0, "after lay_out the whole weights should be dropped"
        assert bucket.shard.untyped_storage().nbytes(), (
            "the shard is a view of the vector that is dropped; it needs memory of its own (clone)"
        )
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
    (grad,) = torch.autograd.grad(y.sum(), x)
    due = torch.ones_like(y) @ whole[weight.global_name]
    what = "a gradient whose weight was dropped after the forward pass and fetched again"
    same(grad, due, what, "as if it had never been away: keep the tensor, free its storage only")


def whole_layers(flags):
    """The layers that are whole when each of the five computes, forward; when it is recomputed; and
    when all is done; whether they are gathered in the dtype of their shards; and all gathers.
    """
    from ledger import recorded
    from zero import Zero3

    group, model = data_group(), small_llama(layers=5, **flags)
    engine, found = Zero3(model, group), []
    buckets = {layer.mlp.up_proj.weight: i for i, layer in enumerate(model.model.layers)}
    layers = [engine.bucket_of[weight] for weight in buckets]

    def whole():
        return [i for i, bucket in enumerate(layers) if held_bytes(bucket)]

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: found.append(whole()))
    with recorded() as traffic:
        backward(model, group.rank, [0], group.size)
        engine.finish_gradients()
    same_dtype = [bucket.weights.dtype == bucket.shard.dtype for bucket in layers]
    return found[:5], found[5:], whole(), same_dtype, traffic["dp_cp", "all_gather"][0]
