"""What the checks of step 6 run on each rank: the data, `naive` and `bucket`."""

from types import SimpleNamespace
from unittest.mock import patch

from same import same

SUM = (
    "the sum over all ranks and micro-batches (the loss is divided by the targets of all ranks, so "
    "the parts are added; too small: a mean over ranks, or only the last micro-batch; too large: "
    "what was summed over the ranks is summed again, or the step before is still in it)"
)


def data_group():
    """The group of all ranks, which read different data."""
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    return pg.Mesh(dp=torch.distributed.get_world_size()).group("dp", "cp")


def small_llama(dtype="float64", tied=False, checkpointing=False, layers=3):
    """A Llama with the same weights on every rank."""
    import torch

    from model import Llama, materialize

    config = SimpleNamespace(
        vocab_size=11, hidden_size=12, intermediate_size=10, num_hidden_layers=layers, head_dim=6,
        num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, initializer_range=0.3,
        tie_word_embeddings=tied, rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
    )  # fmt: skip
    with torch.device("meta"):
        model = Llama(config, getattr(torch, dtype), checkpointing)
    materialize(model, 3, torch.device("cpu"))
    return model


def micro_batch(rank, number):
    """Tokens, targets [2, 4] and positions [4] of a rank's micro-batch; all differ."""
    import torch

    generator = torch.Generator().manual_seed(100 * rank + number)
    tokens = torch.randint(11, (2, 5), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], torch.arange(4)


def backward(model, rank, numbers, ranks, before_each=lambda number: None):
    """Add the gradient of some micro-batches of a rank to a model's."""
    for number in numbers:
        before_each(number)
        (model(*micro_batch(rank, number)) / (ranks * len(numbers) * 8)).backward()


def alone(model, numbers, ranks):
    """Add the gradient of all micro-batches of all ranks to a model's: what one process does."""
    for rank in range(ranks):
        backward(model, rank, numbers, ranks)


def step(engine, model, numbers):
    """The gradient part of a training step with an engine; two micro-batches or more."""

    def before_each(number):
        engine.last_backward = number == numbers[-1]

    engine.zero_grad()
    backward(model, engine.group.rank, numbers, engine.group.size, before_each)
    engine.finish_gradients()


def sequences(micro_batches, alone):
    """(read in a step, held out, in two steps): first tokens of the sequences that a rank reads."""
    import numpy as np
    import torch

    import process_group as pg
    from dataloader import Batches

    group = data_group()
    if alone:
        group = pg.Mesh(dp=group.size).group("tp")  # a group of one
    args = SimpleNamespace(
        micro_batch_size=2, gradient_accumulation_steps=micro_batches, seq_len=3, seed=1,
        num_workers=0, dataset_name="random", stride=0, eval_tokens=None,
    )  # fmt: skip
    tokens = np.arange(1000, dtype=np.uint16)
    data = Batches(args, tokens, torch.device("cpu"), torch.arange(3), group)
    one, other = (list(data.micro_batches(number)) for number in (0, 1))
    parts = one, list(data.evaluation()), one + other
    return [[int(row[0]) for tokens, *_ in part for row in tokens] for part in parts]


def naive():
    from data_parallel import Naive

    gradients_of_two_steps(Naive, "Naive.finish_gradients", "Naive.zero_grad")


def gradients_of_two_steps(engine_class, *wheres):
    """Compare gradients, two steps after each other: the second must not contain the first.

    wheres: for each step what is wrong if its gradients are.
    """
    group, model, whole = data_group(), small_llama(), small_llama()
    engine = engine_class(model, group)
    for number, numbers in enumerate([(0, 1), (2, 3, 4)], 1):
        step(engine, model, numbers)
        whole.zero_grad()
        alone(whole, numbers, group.size)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            what = f"{wheres[number - 1]}: in step {number} the gradient of {p.global_name}"
            same(p.grad, q.grad, what, SUM)
        engine.finish_update()
    return engine


def named(name, *shape):
    """A parameter with the tags of a model's, and numbers that differ everywhere."""
    import math

    import torch

    count = math.prod(shape)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, count).double().view(shape).sin())
    weight.global_name, weight.full_shape, weight.counted = name, weight.shape, True
    weight.held = tuple(slice(0, size) for size in shape)
    return weight


def bucket_of_two():
    """A bucket of a matrix and a vector; on three ranks it needs one number of padding."""
    from data_parallel import Bucket

    parameters = [named("matrix", 2, 3), named("vector", 2)]
    return Bucket(parameters, data_group()), parameters


def shards_of_a_bucket():
    bucket, _ = bucket_of_two()
    return bucket.length, bucket.mine.start, bucket.mine.stop


def a_bucket():
    import torch

    from data_parallel import Bucket

    bucket, parameters = bucket_of_two()
    size = bucket.group.size
    vector = bucket.vector(parameters)
    due = torch.cat([p.detach().flatten() for p in parameters])
    padding = -8 % size
    same(vector, torch.cat([due, due.new_zeros(padding)]), "Bucket.vector", "all, then zeros")
    for p, view in zip(parameters, bucket.views(vector), strict=True):
        same(view, p, f"Bucket.views of the {p.global_name}", "its place in the vector")
        assert view.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr(), (
            "Bucket.views returns copies; a view has the vector's memory"
        )
    for p in parameters:
        p.grad = 2 * p.detach()
    same(bucket.gradients(), 2 * vector, "Bucket.gradients", "the gradients, one after the other")
    one = Bucket(parameters[:1], bucket.group)
    assert one.gradients().data_ptr() == parameters[0].grad.data_ptr(), (
        "Bucket.gradients copies where one gradient is the whole bucket: its own memory will do"
    )
    one, due = Bucket(parameters[1:], bucket.group), parameters[1].grad
    due = torch.cat([due, due.new_zeros(-2 % size)])
    what = "Bucket.gradients of a single gradient, in a bucket that may need padding,"
    same(one.gradients(), due, what, "the gradient, then zeros")
    last = [bucket.arrived() for _ in range(4)]
    assert last == [False, True] * 2, (
        f"Bucket.arrived of two gradients in two backward passes says {last}; it is true for the "
        "last one of each pass, and must count anew for the next"
    )


def cuts():
    from data_parallel import cut_by_size

    parameters = [named(str(count), count) for count in (3, 2, 1, 9, 4, 2)]
    lists = cut_by_size(parameters, 6 * 8)
    return [[p.numel() for p in part] for part in lists]


def hooks_and_buckets():
    """What an engine of a small model makes, without any message."""
    from data_parallel import Bucketed

    class Watched(Bucketed):
        def on_gradient(self, parameter):
            seen.append((parameter.global_name, parameter.grad is not None))

    group, model, seen = data_group(), small_llama(), []
    with patch.object(Bucketed, "bucket_bytes", 3000):
        engine = Watched(model, group)
    names = [[p.global_name for p in bucket.parameters] for bucket in engine.buckets]
    for part in names:
        assert len(part) == 1 or all(".layers." in name for name in part), (
            f"Bucketed.cut: {part} share a bucket; what is outside of the layers is alone in one"
        )
    layers = [name for part in names for name in part if ".layers." in name]
    assert ".layers.2." in layers[0] and ".layers.0." in layers[-1], (
        f"Bucketed.cut: the first bucket begins with {layers[0]}; backward meets the last layer "
        "first"
    )
    assert len(layers) > sum(".layers." in part[0] for part in names), (
        "Bucketed.cut: each weight of the layers has a bucket of its own; cut_by_size puts several "
        "into one"
    )
    backward(model, 0, [0], 1)
    due = sorted(p.global_name for p in model.parameters())
    assert sorted(name for name, _ in seen) == due, (
        f"Bucketed.__init__: on_gradient was called {len(seen)} times in a backward pass, with "
        f"{len(due)} weights; once for each is due"
    )
    assert all(there for _, there in seen), (
        "Bucketed.__init__: on_gradient was called before the gradient was in .grad; "
        "register_post_accumulate_grad_hook calls it afterwards"
    )


def bucketed():
    from data_parallel import Bucketed

    with patch.object(Bucketed, "bucket_bytes", 3000):
        gradients_of_two_steps(Bucketed, *["Bucketed"] * 2)


def sent_in_backward(engine_class, flags):
    """What two micro-batches send, as {collective: calls} after the first, after the second, and
    in all; the number of buckets; whether no whole gradient is left after each.
    """
    from data_parallel import Bucketed
    from ledger import recorded

    group, model = data_group(), small_llama(**flags)
    with patch.object(Bucketed, "bucket_bytes", 3000):
        engine = engine_class(model, group)
    found, seen = [], []
    with recorded() as traffic:
        for number in (0, 1):
            engine.last_backward = number == 1
            backward(model, group.rank, [number], group.size)
            found.append({kind: calls for (_, kind), (calls, _) in traffic.items()})
            seen.append(all(p.grad is None for p in model.parameters()))
        engine.finish_gradients()
        found.append({kind: calls for (_, kind), (calls, _) in traffic.items()})
    return found, len(engine.buckets), seen


class Handle:
    """A handle that notes the first wait."""

    def __init__(self, handle, waited):
        self.handle, self.waited = handle, waited

    def wait(self):
        self.handle.wait()
        if self not in self.waited:
            self.waited.append(self)


def bucket_messages():
    import process_group as pg
    from data_parallel import Bucketed

    waited, views, all_reduce, finish = [], [], pg.all_reduce, Bucketed.finish_gradients

    def noted(x, group, *args, **options):
        handle = all_reduce(x, group, *args, **options)
        return Handle(handle, waited) if options.get("async_op") else handle

    def views_then_finish(engine):
        assert not waited, "Bucketed.on_gradient waits for a sum; only finish_gradients does"
        for bucket, sent, *_ in engine.running:
            memory = sent.untyped_storage().data_ptr()
            views.extend(p.grad.untyped_storage().data_ptr() == memory for p in bucket.parameters)
        finish(engine)
        assert not engine.running, (
            f"Bucketed.finish_gradients: {len(engine.running)} buckets are still in `running`"
        )

    with (
        patch.object(pg, "all_reduce", noted),
        patch.object(Bucketed, "finish_gradients", views_then_finish),
    ):
        (first, before, after), count, _ = sent_in_backward(Bucketed, {})
    assert count > 4, f"{count} buckets of 3,000 bytes: the layers should fill more"
    assert not first, (
        f"Bucketed.on_gradient: after the first of two micro-batches {first} were sent; only in "
        "the last backward pass (last_backward) a sum starts"
    )
    assert before == {"all_reduce": count}, (
        f"Bucketed.on_gradient: {before} when the last backward pass ends, of {count} buckets; "
        "each is sent when its last gradient has arrived"
    )
    assert all(views), (
        "Bucketed.reduce: each .grad should be a view of the vector that is sent, as the sum "
        "arrives there"
    )
    assert after == before, f"Bucketed.finish_gradients sends {after}; it only waits"
    assert len(waited) == count, (
        f"Bucketed.finish_oldest: {len(waited)} of {count} sums were waited for"
    )


def engine_of(name, ranks):
    """The class of the engine that a training run has."""
    import train

    argv = f"--num_hidden_layers 1 --dataset_name random --dp_engine {name} --dp_size {ranks}"
    return type(train.setup(train.parse_args(argv.split())).engine).__name__


def calls_of_a_step():
    """(last_backward in each backward pass, what is called in its order) of a step of train.py."""
    import train

    argv = "--num_hidden_layers 1 --dataset_name random --gradient_accumulation_steps 3 "
    argv += "--micro_batch_size 1 --seq_len 16 --hidden_size 32"
    state = train.setup(train.parse_args(argv.split()))
    last, calls = [], []

    def note(owner, function, name):
        real = getattr(owner, function)

        def noted(*args, **options):
            calls.append(name)
            return real(*args, **options)

        return patch.object(owner, function, noted)

    weight = state.parameters[0]
    weight.register_post_accumulate_grad_hook(lambda _: last.append(state.engine.last_backward))
    with (
        note(state.engine, "zero_grad", "zero_grad"),
        note(state.engine, "finish_gradients", "finish_gradients"),
        note(train, "gradient_norm", "gradient_norm"),
        note(state.optimizer, "step", "optimizer.step"),
        note(state.engine, "finish_update", "finish_update"),
    ):
        train.train_step(state)
    return last, calls
