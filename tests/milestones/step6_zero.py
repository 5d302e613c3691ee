"""What the checks of step 6 run on each rank: the engines that shard."""

import contextlib
from unittest.mock import patch

from same import same
from step6_engines import (
    SUM,
    Handle,
    alone,
    backward,
    bucket_of_two,
    data_group,
    sent_in_backward,
    small_llama,
    step,
)


@contextlib.contextmanager
def weights_at_hand(where=""):
    """Say what an error of PyTorch means that comes from a storage of no size.

    where: "Zero3.fetch: ", what is wrong if there is one.
    """
    try:
        yield
    except RuntimeError as error:
        if "storage" not in str(error):
            raise
        raise AssertionError(
            f"{where}{error}. A tensor was used while its memory was freed. Is it fetched in time, "
            "by a hook before the forward pass and one before the backward pass? Does a shard have "
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
        what = f"Bucket.hold: when the vector is doubled, the {p.global_name}"
        same(p, 2 * weight, what, "doubled too, as a view of the vector")
        vector /= 2

    gradients = torch.zeros_like(shard)
    found = []
    for piece in bucket.pieces(shard, gradients):
        lost = parameters[0].__dict__.keys() - piece.__dict__.keys()
        assert not lost, f"Bucket.pieces: a piece lacks the tags {sorted(lost)} of its parameter"
        p = next(p for p in parameters if p.global_name == piece.global_name)
        what = f"Bucket.pieces: a piece of the {p.global_name}"
        same(piece, p.flatten()[piece.piece], what, "the slice `piece` of the flat parameter")
        for tensor, memory in ((piece, shard), (piece.grad, gradients)):
            assert tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr(), (
                "Bucket.pieces: a piece and its .grad should be views of the shards: the optimizer "
                "writes there"
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
    assert mine <= most, (
        f"Zero1.__init__: the optimizer gets {mine} of {every} weights; a shard has 1/{group.size}"
    )
    check_shards(engine, name)
    for number, numbers in enumerate([(0, 1), (2, 3, 4)], 1):
        with weights_at_hand():
            step(engine, model, numbers)
        due.zero_grad()
        alone(whole, numbers, group.size)
        left = [p.global_name for p in model.parameters() if p.grad is not None]
        assert not left, (
            f"Zero1.reduce: {len(left)} whole gradients are still there after it, as of {left[0]}"
        )
        check_shards(engine, name)
        for piece in engine.parameters:
            what = f"{name}, step {number}: a piece of the gradient of {piece.global_name}"
            same(piece.grad, weights[piece.global_name].grad.flatten()[piece.piece], what, SUM)
        if name == "Zero3":  # as an evaluation leaves some weights here
            engine.fetch(*engine.buckets, ahead=None)
        optimizer.step()
        due.step()
        update(engine, name)
        if name == "Zero3":
            engine.fetch(*engine.buckets, ahead=None)
        hint = "that of one process; each rank updates its shard, and the shards are gathered"
        for p in model.parameters():
            what = f"{name}, step {number}: the updated weight {p.global_name}"
            same(p, weights[p.global_name], what, hint, 1e-10)
        if name == "Zero3":
            for bucket in engine.buckets:
                engine.drop(bucket)
        engine.zero_grad()
        assert not any(piece.grad.any() for piece in engine.parameters), (
            "Zero1.zero_grad should set the shards of the gradients to zero"
        )


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


def check_shards(engine, name):
    """Do the shards and the pieces have the memory that they should have?"""
    gradients = {memory_of(bucket.gradient_shard) for bucket in engine.buckets}
    for piece in engine.parameters:
        assert piece.grad is not None and memory_of(piece.grad) in gradients, (
            "Zero1.reduced: the .grad of a piece is no view of its bucket's gradient_shard any "
            "more: add to that in place"
        )
    for bucket in engine.buckets if name != "Zero3" else ():
        assert memory_of(bucket.shard) == memory_of(bucket.weights), (
            "Zero1.lay_out: a bucket's shard is a copy; a view of the weights costs no memory"
        )


def update(engine, name):
    """Call finish_update, and look at what it gathers and waits for."""
    import process_group as pg

    waited, into, all_gather = [], [], pg.all_gather

    def noted(x, group, out=None, async_op=False):
        into.append(out)
        found = all_gather(x, group, out, async_op)
        return (found[0], Handle(found[1], waited)) if async_op else found

    with patch.object(pg, "all_gather", noted):
        engine.finish_update()
    if name == "Zero3":
        assert not any(held_bytes(bucket) for bucket in engine.buckets), (
            "Zero3.finish_update should drop all weights: those here are from before the update"
        )
        return
    assert len(into) == len(engine.buckets), (
        f"Zero1.finish_update: {len(into)} all-gathers for {len(engine.buckets)} buckets"
    )
    weights = {memory_of(bucket.weights) for bucket in engine.buckets}
    assert all(out is not None and memory_of(out) in weights for out in into), (
        "Zero1.gather should gather into bucket.weights, with `out`: the parameters are there"
    )
    assert len(waited) == len(into), (
        f"Zero1.finish_update waits for {len(waited)} of its {len(into)} all-gathers"
    )


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
        f"Zero2.on_gradient: {first} after the first micro-batch, {after} after the second, of "
        f"{count} buckets: each micro-batch's gradients are reduce-scattered as they come"
    )
    assert all(nothing_left), (
        "Zero2.on_gradient: after a micro-batch there are still whole gradients"
    )


def held_bytes(bucket):
    return bucket.weights.untyped_storage().nbytes()


def fetch_and_drop():
    import torch

    from data_parallel import Naive
    from zero import Zero1, Zero3

    class WithoutHooks(Zero3):  # Zero3.__init__ is of a later milestone
        __init__ = Zero1.__init__

        def gather(self, bucket):
            return Handle(super().gather(bucket), waited)

    waited = []
    group, model, whole = data_group(), small_llama(), dict(small_llama().named_parameters())
    bare = object.__new__(Zero3)
    Naive.__init__(bare, model, group)
    check_cut(bare.cut(model), model)
    with weights_at_hand("Zero3.lay_out: "):
        engine = WithoutHooks(model, group)
    every = sum(p.numel() for p in whole.values())
    for bucket in engine.buckets:
        words = "Zero3.lay_out drops the whole weights, and Zero3.drop should leave no byte of them"
        assert held_bytes(bucket) == 0, words
        assert bucket.shard.untyped_storage().nbytes(), (
            "Zero3.lay_out: a shard has no memory of its own, and was freed with the whole weights"
        )
    kept = sum(bucket.shard.numel() for bucket in engine.buckets)
    words = (
        f"Zero3.lay_out: the shards of a rank have {kept} of {every} weights, not 1/{group.size}"
    )
    assert kept < every / group.size + group.size * len(engine.buckets), words

    first, second, *others = engine.buckets
    engine.fetch(first, ahead=second)
    words = "Zero3.fetch(…, ahead=bucket) should start to gather that bucket, too"
    assert second.gathering is not None, words
    words = "Zero3.fetch takes more than it was asked"
    assert not any(held_bytes(bucket) for bucket in others), words
    assert waited == [first.gathering], (
        "Zero3.fetch should wait for the weights of its buckets, and not for those of `ahead`"
    )
    second.gathering.wait()
    for p in (*first.parameters, *second.parameters):
        what = f"Zero3.fetch: the weight {p.global_name}"
        same(p, whole[p.global_name], what, "the weights as they were")

    weight = first.parameters[0]
    x = torch.ones(2, weight.shape[1], dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)  # autograd keeps the weight
    engine.drop(first)
    words = "Zero3.drop does not free the memory: resize the storage to 0"
    assert held_bytes(first) == 0 and weight.untyped_storage().nbytes() == 0, words
    words = "Zero3.drop should set bucket.gathering to None, or nobody gathers the bucket again"
    assert first.gathering is None, words
    engine.fetch(first, ahead=None)
    with weights_at_hand("Zero3.drop: "):
        (grad,) = torch.autograd.grad(y.sum(), x)
    due = torch.ones_like(y) @ whole[weight.global_name]
    what = "Zero3.drop: a gradient whose weight was dropped and fetched again in between"
    same(grad, due, what, "as if it had never been away: keep the tensor, free its storage only")


def check_cut(lists, model):
    found = [[p.global_name for p in parameters] for parameters in lists]
    names = [p.global_name for p in model.parameters()]
    norms = [name for name in names if "norm" in name]
    matrices = [name for name in names if name not in norms]
    due = [[n for n in matrices if f".layers.{i}." in n] for i in range(len(model.model.layers))]
    due += [norms, *([name] for name in matrices if ".layers." not in name)]
    for number, (one, other) in enumerate(zip(found, due, strict=False)):
        assert sorted(one) == sorted(other), (
            f"Zero3.cut: bucket {number} has {one}; it should have {other}: the matrices of each "
            "layer, then all norms, then each other matrix"
        )
    assert len(found) == len(due), f"Zero3.cut makes {len(found)} buckets, not {len(due)}"


class Layers:
    """Which layers of a model are whole, when each of them computes."""

    def __init__(self, engine, model):
        self.engine, self.model = engine, model
        inner = model.model
        self.layers = [engine.bucket_of[layer.mlp.up_proj.weight] for layer in inner.layers]
        self.table = engine.bucket_of[inner.embed_tokens.weight]
        self.forward, self.backward, self.embedding = [], [], []
        inner.register_forward_pre_hook(self.check_outside)
        for layer in inner.layers:
            layer.mlp.register_forward_pre_hook(self.note_forward)
            layer.mlp.register_forward_hook(self.note_backward)

    def whole(self):
        return [i for i, bucket in enumerate(self.layers) if held_bytes(bucket)]

    def check_outside(self, *_):
        weights = self.model.model.norm.weight, self.model.lm_head.weight
        assert all(held_bytes(self.engine.bucket_of[weight]) for weight in weights), (
            "Zero3.before_model should fetch the norms and the head, `outside`, before the model "
            "computes"
        )

    def note_forward(self, *_):
        self.forward.append(self.whole())
        self.embedding.append(held_bytes(self.table))

    def note_backward(self, layer, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda grad: self.backward.append(self.whole()))


FORWARD = [[0, 1], [1, 2], [2, 3], [3, 4], [4]]
BACKWARD = [[3, 4], [2, 3], [1, 2], [0, 1], [0]]


def demand_layers(found, due, when, missing, extra):
    """Demand which layers are whole; else say which function is wrong if one lacks, or too many."""
    for one, other in zip(found, due, strict=True):
        where = missing if set(other) - set(one) else extra
        assert one == other, f"{where}: {when} the whole layers are {found}; they should be {due}"


def whole_layers(flags):
    """Demand what is whole in two micro-batches of five layers, and what is gathered.

    What is computed again, is computed to its end; by itself PyTorch stops a little earlier.
    """
    from torch.utils.checkpoint import set_checkpoint_early_stop

    from ledger import recorded
    from zero import Zero3

    group, model = data_group(), small_llama(layers=5, **flags)
    engine = Zero3(model, group)
    cast = flags.get("dtype") == "bfloat16"
    for bucket in engine.buckets[:5]:
        assert (bucket.weights.dtype == bucket.shard.dtype) != cast, (
            "Zero3.__init__: layers are gathered in the dtype of the computation, "
            f"{model.model.dtype}; their shards stay float32"
        )
    seen, again = Layers(engine, model), flags.get("checkpointing", False)
    for number, after in enumerate(["", ", after a backward pass,"]):
        seen.forward, seen.backward, seen.embedding = [], [], []
        with recorded() as traffic, weights_at_hand(), set_checkpoint_early_stop(False):
            backward(model, group.rank, [number], group.size)
            engine.finish_gradients()
        where = ("Zero3.reduce, in_backward",) * 2
        if not number:
            where = "Zero3.before_forward, ahead", "Zero3.after_forward"
        demand_layers(seen.forward[:5], FORWARD, f"in a forward pass{after}", *where)
        words = "the embedding is still whole when the first layer computes"
        assert not seen.embedding[0], f"Zero3.__init__: {words}"
        where = ("Zero3.before_forward, in_backward",) * 2
        if again:
            demand_layers(seen.forward[5:], BACKWARD, "computed again,", *where)
        where = "Zero3.before_backward, ahead", "Zero3.reduce"
        demand_layers(seen.backward, BACKWARD, "in a backward pass", *where)
        left = seen.whole()
        assert not left, f"Zero3.reduce: after the backward pass the layers {left} are still whole"
    gathers = traffic["dp_cp", "all_gather"][0]
    assert gathers == 12, (
        f"{gathers} all-gathers; 12 would do: 5 layers, norms, embedding and head forward, 4 "
        "layers backward. The last layer stays (Zero3.after_forward), the embedding is not needed "
        "again"
    )
