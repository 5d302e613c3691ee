"""What tests of `--streaming` run in the processes of a step."""

import contextlib
import io
from unittest.mock import patch

import numpy as np
from workers_setup import build


def opened(argv, hub=None):
    """(Stream, held-out tokens) of a command line. hub: files behind any name on the hub."""
    import process_group as pg
    import streaming
    import train

    args = train.parse_args(argv.split())
    device = pg.init_processes("cpu")
    world = pg.Mesh(dp=pg.dist.get_world_size()).world
    if hub is None:
        return streaming.open_stream(args, world, device)
    import datasets

    load = datasets.load_dataset

    def of_files(name, config, streaming):
        assert (name, config, streaming) == ("some/set", None, True)
        return load("json", data_files=hub, streaming=True)

    with (
        patch.object(datasets, "load_dataset", of_files),
        patch.object(streaming, "hub_is_unreachable"),
    ):
        return streaming.open_stream(args, world, device)


def row_of(argv, count, hub=None):
    """(the first sequences of a stream, [count, seq + 1]; what is held out; bytes a token)."""
    stream, held_out = opened(argv, hub)
    found = np.stack([stream.sequence(position) for position in range(count)])
    return found, held_out, stream.about["bytes"]["held_out"]


def rows_gone_on(argv, count, starts):
    """[the sequences from a position on, as a new Stream reads them from the places there]."""
    stream, _ = opened(argv)
    for position in range(count):
        stream.sequence(position)
    import streaming

    rows = []
    for start in starts:
        again = streaming.Stream(stream.source, stream.tokens_of, stream.seq_len, 1.0)
        again.known = [
            {number: places[number]}
            for shard, places in enumerate(stream.known)
            for number in [streaming.first_in(shard, start)]
        ]
        rows.append(np.stack([again.sequence(position) for position in range(start, count)]))
    return rows


def what_is_read(argv, steps):
    """What this rank reads in some steps, in this order: (windows of each micro-batch, shards)."""
    data = build(argv + " --num_hidden_layers 1").data
    windows = [
        [np.concatenate([x.numpy(), y[:, -1:].numpy()], axis=1) for x, y, _ in micro_batches]
        for micro_batches in map(data.micro_batches, steps)
    ]
    return windows, set(data.stream.readers), [x.numpy() for x, _, _ in data.evaluation()]


def without_transformers(argv):
    """Whether ranks but the first can tokenise without it: the first tokens of this rank."""
    import corpus
    import errors

    with patch.object(corpus, "load_tokenizer", corpus.load_tokenizer) as load:
        if errors.RANK > 0:
            corpus.load_tokenizer = None
        stream, _ = opened(argv)
        corpus.load_tokenizer = load
    return stream.sequence(0)


def refusal_of_training(argv, steps):
    """What the UserError says that ends a run, and how many steps were trained before."""
    import errors
    import train

    state = None
    try:
        state = build(argv)
        for _ in range(steps):
            train.train_step(state)
    except errors.UserError as error:
        return str(error), state and state.step
    return None, state.step


def notes_of_setup(argv):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        build(argv)
    return said.getvalue().splitlines()


def waited(argv, steps):
    """Whether the thread ends with the batches: (threads while they are there, afterwards)."""
    import gc
    import threading

    import train

    before = threading.active_count()
    state = build(argv)
    for _ in range(steps):
        train.train_step(state)
    during, seconds = threading.active_count() - before, state.data.waited
    del state
    gc.collect()
    return during, threading.active_count() - before, seconds


def places_gone_on(argv):
    """(places from which the shards of a resumed run go on, those of a run that never stopped)."""
    import streaming

    state = build(argv)
    stream, position = state.data.stream, state.step * state.data.order.batch_size
    whole = streaming.Stream(stream.source, stream.tokens_of, stream.seq_len, 1.0)
    for earlier in range(position):
        whole.sequence(earlier)
    numbers = [streaming.first_in(shard, position) for shard in range(streaming.SHARDS)]
    due = [{number: tuple(whole.known[shard][number])} for shard, number in enumerate(numbers)]
    return [{number: tuple(own[number]) for number in own} for own in stream.known], due
