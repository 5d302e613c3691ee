"""Buckets and shards of data parallelism: when they are sent, and how many bytes a rank holds."""

from unittest.mock import patch

from workers_setup import build


def buckets_of(argv, size):
    """[(name, bytes) of each parameter] of the buckets of a given size."""
    from data_parallel import Bucketed

    with patch.object(Bucketed, "bucket_bytes", size):
        state = build(argv + "--dp_size 2")
    return [
        [(parameter.global_name, parameter.nbytes) for parameter in bucket.parameters]
        for bucket in state.engine.buckets
    ]


def reductions_during_backward(argv):
    """For each reduction of a step, in order: how many gradients of its pass were still to come."""
    import data_parallel
    import train
    from zero import ENGINES

    engine = ENGINES[train.parse_args(argv.split()).dp_engine]
    arrived, arrivals = [0], []
    on_gradient, reduce = engine.on_gradient, engine.reduce

    def count(self, parameter):
        arrived[0] += 1
        on_gradient(self, parameter)

    def note(self, bucket):
        arrivals.append(arrived[0])
        return reduce(self, bucket)

    # The hooks hold the engine's bound method, so the engine is spoiled before it is built.
    with patch.object(data_parallel.Bucketed, "bucket_bytes", 300_000):
        with patch.object(engine, "on_gradient", count), patch.object(engine, "reduce", note):
            state = build(argv)
            train.forward_backward(state)
    return [-seen % len(list(state.model.parameters())) for seen in arrivals]


def gathers_of_a_step(argv):
    """[(what is gathered, the layer whose turn it is)] of a step of zero3; layers by number."""
    import train
    import zero

    state = build(argv)
    layers = state.engine.buckets[: len(state.model.model.layers)]
    numbers = {id(bucket): i for i, bucket in enumerate(layers)}
    gather, fetch = zero.Zero3.gather, zero.Zero3.fetch
    found, turn = [], [None]

    def noted(self, bucket):
        found.append((numbers.get(id(bucket), "outside"), turn[0]))
        return gather(self, bucket)

    def fetched(self, *buckets, ahead):
        turn[0] = numbers.get(id(buckets[0]))
        fetch(self, *buckets, ahead=ahead)

    with patch.object(zero.Zero3, "gather", noted), patch.object(zero.Zero3, "fetch", fetched):
        train.forward_backward(state)
    return found


def bytes_of_the_embedding_at_the_loss(argv):
    """Of its storage, when the loss is computed in a step."""
    import train

    state, sizes = build(argv), []
    weight, loss = state.model.model.embed_tokens.weight, state.model.cross_entropy

    def cross_entropy(logits, targets):
        sizes.append(weight.untyped_storage().nbytes())
        return loss(logits, targets)

    state.model.cross_entropy = cross_entropy
    train.forward_backward(state)
    (size,) = sizes
    return size


def owned_bytes(argv, bucket_bytes=25 * 2**20):
    """Bytes of weights, gradients and moments that this rank holds after a step; and the most of
    gradients, with what is being sent and received, at any time at which the engine waits.
    """
    import train
    from data_parallel import Bucketed
    from zero import Zero1

    with patch.object(Bucketed, "bucket_bytes", bucket_bytes):
        state = build(argv)
    engine, most = state.engine, []
    wait = "finish_oldest" if isinstance(engine, Bucketed) else "finish_gradients"
    every = [*state.model.parameters(), *state.parameters]

    def storages(tensors):
        found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(size for address, size in found.items() if address)

    def gradients():
        passing = [tensor for entry in getattr(engine, "running", ()) for tensor in entry[1:3]]
        tensors = [*passing, *(p.grad for p in every)]
        return storages(tensor for tensor in tensors if tensor is not None)

    finish = getattr(type(engine), wait)

    def watched(engine):
        most.append(gradients())
        finish(engine)

    with (
        patch.object(type(engine), wait, watched),
        patch.object(Zero1, "most_bytes", bucket_bytes),
    ):
        train.train_step(state)
    moments = [value for entry in state.optimizer.state.values() for value in entry.values()]
    return {
        "parameters": sum(p.full_shape.numel() for p in state.model.parameters()),
        "weights": storages(every),
        "gradients": gradients(),
        "moments": sum(moment.nbytes for moment in moments if moment.dim()),
        "most gradients": max(most),
    }


def owned_bytes_alone(argv, rank, size):
    """`owned_bytes` of a rank whose other ranks are not there."""
    from one_rank import one_rank

    with one_rank(rank, size):
        return owned_bytes(argv)
