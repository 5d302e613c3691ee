"""Functions that the tests of checkpoints and of Hugging Face directories run inside a `World`."""

import contextlib
import io
import itertools
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import workers_setup
from harness import pieces

NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "tokens")


def train_and_save(argv, until=None):
    """Train up to a step, or to the end, saving as the flags say: (numbers, pieces of weights)."""
    import checkpoint
    import huggingface
    import train

    state = workers_setup.build(argv)
    numbers = []
    while state.step < (until or state.args.total_steps):
        result = train.train_step(state)
        numbers.append([result[key] for key in NUMBERS])
        checkpoint.save_if_due(state)
    if state.args.save_hf:
        huggingface.save_hf(state, state.args.save_hf)
    return numbers, pieces(state.parameters, lambda p: p)


def wrong_rectangles(shape):
    """Boxes and pieces of a shape, of all there are, whose rectangles are not what is held.

    Returns (how many there are, the wrong ones).
    """
    from resharding import rectangles

    def parts(size):
        return itertools.starmap(slice, itertools.combinations(range(size + 1), 2))

    count, wrong = 0, []
    for held in itertools.product(*map(parts, shape)):
        box_shape = [part.stop - part.start for part in held]
        elements = math.prod(box_shape)
        for piece in parts(elements):
            box = np.full(elements, -1)
            box[piece] = np.arange(piece.stop - piece.start)
            true, said = np.full(shape, -1), np.full(shape, -1)
            true[held] = box.reshape(box_shape)
            parameter = SimpleNamespace(held=held, piece=piece, numel=lambda: 0)
            found = list(rectangles(parameter))
            for offsets, sizes, part in found:
                place = tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))
                said[place] = np.arange(piece.stop - piece.start)[part].reshape(sizes)
            count += 1
            elements_said = sum(math.prod(sizes) for _, sizes, _ in found)
            once = elements_said == piece.stop - piece.start and len(found) <= 3
            if not (once and np.array_equal(said, true)):
                wrong.append((held, piece))
    return count, wrong


def asked_to_stop(argv, rank_asked, step_asked):
    """Steps trained when one rank gets a SIGTERM during a step; what else each rank thinks."""
    import checkpoint
    import train

    state = workers_setup.build(argv)
    checkpoint.listen(state)
    while state.step < state.args.total_steps and not state.stop:
        if state.step + 1 == step_asked and state.mesh.rank == rank_asked:
            os.kill(os.getpid(), signal.SIGTERM)
        train.train_step(state)
        checkpoint.save_if_due(state)
    return state.step, bool(state.asked_to_stop), bool(state.stop)


def saved_apart(argv, directory):
    """What the ranks say that save to directories of their own, as hosts without a shared one."""
    import checkpoint
    import errors

    state = workers_setup.build(argv)
    state.args.checkpoint_dir = f"{directory}/{state.mesh.rank}"
    os.makedirs(state.args.checkpoint_dir, exist_ok=True)
    state.step = 1
    try:
        checkpoint.save(state)
    except errors.UserError as error:
        return str(error)


def first_loss(argv):
    """The loss of a run's first step."""
    import train

    return train.train_step(workers_setup.build(argv))["loss"]


def reading(argv, tokens):
    """Summed loss of tokens [batch, seq + 1] under a loaded model, in one process."""
    state = workers_setup.build(argv)
    tokens = torch.tensor(tokens)
    positions = torch.arange(tokens.shape[1] - 1)
    with torch.no_grad():
        return state.model(tokens[:, :-1], tokens[:, 1:], positions).item()


def generated(argv, prompt, cached=True, ends=()):
    """Symbols that `generate.py` adds to a prompt, a list; without the cache if asked."""
    import generate
    import process_group as pg
    from model import causal_attention

    args = generate.parse_args(argv.split())
    device = pg.init_processes(args.device)
    group = pg.Mesh(args.tp_size).group("tp")
    model = generate.load(args, device, group)
    if cached:
        return generate.generate(model, group, prompt, args, ends)
    tokens = list(prompt)
    for layer in model.model.layers:
        assert layer.self_attn.attention is causal_attention
    with torch.no_grad():
        while len(tokens) < len(prompt) + args.max_new_tokens:
            positions = torch.arange(len(tokens))
            logits = generate.next_logits(model, group, torch.tensor([tokens]), positions)
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def drawn(logits, temperature, top_k, count, top_p=1.0):
    """How often each symbol is drawn."""
    from generate import sample

    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor(logits, dtype=torch.float64)
    found = [sample(logits, temperature, top_k, top_p, generator) for _ in range(count)]
    return np.bincount(found, minlength=len(logits)) / count


def parsed(argv):
    """The flags that a command line comes to, as `args.flags`, and the total of steps."""
    import train

    args = train.parse_args(argv.split())
    return args.flags, args.total_steps


def lines_kept(argv, content, step):
    """Open a file of metrics for a run that goes on from a step; what is in it then."""
    import train
    from metrics import Metrics

    args = train.parse_args(argv.split())
    with open(args.metrics_file, "w") as file:
        file.write(content)
    metrics = Metrics(args, torch.device("cpu"), 1.0, 1)
    metrics.open(step)
    metrics.close()
    with open(args.metrics_file) as file:
        return file.read()


def configured(argvs):
    """(model's name, fields of its configuration, lines printed) of each of several calls, with no
    hub to be reached.
    """
    import presets
    import train

    found = []
    for argv in argvs:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), patch.object(presets, "hub_is_unreachable") as hub:
            hub.return_value = True
            args = train.parse_args(argv.split())
        fields = ("intermediate_size", "max_position_embeddings")
        config = {name: getattr(args.config, name) for name in fields}
        found.append((args.model_name, config, said.getvalue().splitlines()))
    return found


def continued(name, cases, ends):
    """(symbols of the prompt, text after it) for cases of (prompt, new symbols), by a tokenizer."""
    from corpus import load_tokenizer
    from generate import decode, encode

    tokenizer = load_tokenizer(name)
    found = []
    for text, new in cases:
        prompt = encode(tokenizer, text, ends)
        found.append((prompt, decode(tokenizer, prompt, new)))
    return found


def spoiled_export(argv, spoiled):
    """What each of several exports says in which other weights are spoiled: {name: number}."""
    import errors
    import huggingface

    state = workers_setup.build(argv)
    said = []
    for numbers in spoiled:
        for parameter in state.parameters:
            number = numbers.get(parameter.global_name, 0.0)
            parameter.detach().view(-1)[-1:] = number
        try:
            huggingface.save_hf(state, state.args.save_hf)
        except errors.UserError as error:
            said.append(str(error))
    return said


def full_disk_export(argv, frees, disk, enough=True):
    """Exports at the end of a run, of whose disk only so many bytes are still free.

    Returns for each (what it says, what is on the disk beside the filler); then, if enough is
    wanted, the same without a filler.
    """
    import checkpoint
    import errors
    import huggingface

    state = workers_setup.build(argv)
    if state.args.checkpoint_dir:
        state.step = state.args.total_steps
        checkpoint.save_if_due(state)
    found = []
    for free in [*frees, None] if enough else frees:
        if free is not None and state.mesh.rank == 0:
            shutil.rmtree(huggingface.hidden(state.args.save_hf), ignore_errors=True)
            size = shutil.disk_usage(disk).free - free
            with open(f"{disk}/filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        torch.distributed.barrier()
        said = None
        try:
            huggingface.save_hf(state, state.args.save_hf)
        except errors.UserError as error:
            said = str(error)
        torch.distributed.barrier()
        there = sorted(str(path.relative_to(disk)) for path in Path(disk).rglob("*"))
        found.append((said, [name for name in there if name != "filler"]))
        torch.distributed.barrier()
        if free is not None and state.mesh.rank == 0:
            os.remove(f"{disk}/filler")
    return found


def exported(argv, special_tokens=None):
    """Run `huggingface.py`; with the special tokens that a checkpoint may say."""
    import huggingface

    args = huggingface.parse_args(argv.split())
    about = huggingface.read_about("--checkpoint", huggingface.find("", args.checkpoint))
    about |= {"special_tokens": special_tokens} if special_tokens else {}
    with patch.object(huggingface, "read_about", lambda *_: about):
        huggingface.main(args)


def tokenizer_for_generating(argv):
    """The name of the tokenizer that `generate.py` will open."""
    import generate

    return generate.parse_args(argv.split()).tokenizer_name


def without_packages(name):
    """What is said of a tokenizer where what reads sentencepiece files is not installed."""
    import sys

    import corpus
    import errors

    missing = dict.fromkeys(["sentencepiece", "google", "google.protobuf", "tiktoken"])
    with patch.dict(sys.modules, missing):
        try:
            corpus.load_tokenizer(name)
        except errors.UserError as error:
            return str(error)
