"""Data sets, loaders and held-out losses."""

from unittest.mock import patch

import numpy as np
import torch
from workers_setup import build


def tokens_of(argv):
    """(tokens of a data set to train on, heavy libraries that this rank has imported for them)."""
    import sys

    import corpus
    import process_group as pg
    import train

    before = set(sys.modules)
    args = train.parse_args(argv.split())
    device = pg.init_processes("cpu")
    tokens, _ = corpus.load_tokens(args, pg.Mesh(dp=pg.dist.get_world_size()).world, device)
    heavy = {"datasets", "transformers", "pyarrow"} & (set(sys.modules) - before)
    return np.array(tokens), heavy


def data_of(argv, tokens, validation=None):
    """The batches of a run that trains on these tokens, and holds out those."""
    import mixes
    import process_group as pg
    import train

    if pg.dist.is_initialized():
        pg.finish()
    sizes = {"tokens": len(tokens), "held_out": None if validation is None else len(validation)}
    about = {**sizes, "sha256": "0" * 64, "bytes": sizes}  # a byte a token
    texts = lambda args, *_: [mixes.Text(args, 1, tokens, validation, about)]  # noqa: E731
    with patch.object(train, "load_texts", texts):
        return build(argv + " --num_hidden_layers 1").data


def batches_of(argv, tokens, steps, validation=None):
    """[windows of step, [batch, seq + 1]], held-out windows, and how many are for training."""
    data = data_of(argv, tokens, validation)

    def windows(micro_batches):
        found = []
        for inputs, targets, positions in micro_batches:
            assert torch.equal(positions, torch.arange(inputs.shape[1]))
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            found.append(torch.cat([inputs, targets[:, -1:]], dim=1).numpy())
        assert len({len(part) for part in found}) == 1
        return np.concatenate(found)

    train_windows = [windows(data.micro_batches(step)) for step in steps]
    return train_windows, windows(data.evaluation()), data.order.count


def byte_tokenizer_round_trip(text):
    import corpus

    tokenizer = corpus.byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, tokenizer.decode(ids), tokenizer.eos_token_id, len(tokenizer)


def forgotten_loader(argv, tokens):
    """Processes that are still there after a loader in the middle of an epoch was let go."""
    import multiprocessing

    data = data_of(argv, tokens)
    list(data.micro_batches(0))
    started = len(multiprocessing.active_children())
    list(data.micro_batches(7))
    del data
    return started, len(multiprocessing.active_children())


def loads_and_passes(argv, steps):
    """What happens in some steps, in order: a new loader, a micro-batch loaded, a forward pass."""
    import train

    state, events = build(argv), []

    def watched(function, name):
        def wrapper(*args):
            events.append(name)
            return function(*args)

        return wrapper

    state.data.load = watched(state.data.load, "new loader")
    state.data.split = watched(state.data.split, "load")
    state.model.register_forward_pre_hook(lambda model, inputs: events.append("forward"))
    for _ in range(steps):
        train.train_step(state)
    return events


def left_and_read_again(argv, tokens):
    """Tokens of step 1, read whole after step 0, and after a first micro-batch was taken."""

    def fresh():
        data = data_of(argv, tokens)
        list(data.micro_batches(0))
        return data

    data = fresh()
    next(data.micro_batches(1))
    again = [inputs for inputs, _, _ in data.micro_batches(1)]
    whole = [inputs for inputs, _, _ in fresh().micro_batches(1)]
    return torch.cat(whole).numpy(), torch.cat(again).numpy()


def evaluated(argv):
    """(held-out loss, weights, config, all tokens and targets that it is the mean over)."""
    import train

    state = build(argv)
    tokens, targets, _ = zip(*state.data.evaluation(), strict=True)
    weights = {p.global_name: p.detach().numpy() for p in state.model.parameters()}
    both = torch.cat(tokens).numpy(), torch.cat(targets).numpy()
    return train.evaluate(state)["held_out"], weights, state.args.config, *both


def held_out_loss_of_ruined(argv):
    """What is said of the held-out loss when a weight is no number."""
    import errors
    import train

    state = build(argv)
    with torch.no_grad():
        for parameter in state.parameters:
            parameter.fill_(float("nan"))
    try:
        return f"a loss of {train.evaluate(state)}"
    except errors.UserError as error:
        return str(error)


def local_batches_of(argv, tokens, step):
    """[(tokens, targets, positions)] that this rank reads in a step, and its held-out tokens."""
    data = data_of(argv, tokens)
    micro_batches = [tuple(t.numpy() for t in batch) for batch in data.micro_batches(step)]
    return micro_batches, [batch[0].numpy() for batch in data.evaluation()]
