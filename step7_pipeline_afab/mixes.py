"""What a run reads: one text, or a mix of several, each with a share of the sequences.

    --dataset_name "code.jsonl:0.7,books/:0.3"

The place of a sequence in the run decides, and nothing else, from which text it comes. So nothing
has to be saved to go on later. From the start of the run to any place each text has had its share,
to within one sequence.
Source: Tijdeman, The chairman assignment problem (Discrete Mathematics 32, 1980).
"""

import argparse
import copy
import hashlib
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from torch.utils.data import ConcatDataset

from corpus import load_tokens
from dataloader import Batches, Order
from streaming import Stream, StreamBatches, open_stream


@dataclass
class Text:
    """One of the texts of a run, as tokens."""

    args: object  # those of the run, but with the name and the seed of this text
    part: int  # of so many sequences of each period
    tokens: np.ndarray  # to train on
    validation: np.ndarray  # to hold out; None: the last 1/64 of `tokens`
    about: dict  # how many they are, their sha256, and the `bytes` of text that they stand for

    @property
    def bytes_per_token(self):
        """Of the text that is held out, in UTF-8; None for random tokens."""
        field = "tokens" if self.validation is None else "held_out"
        size = self.about["bytes"][field]
        return size and size / self.about[field]


def load_texts(args, world, device):
    """The `Text` of each name, the same on every rank; raises UserError as `load_tokens` does."""
    texts = []
    for number, (name, part) in enumerate(args.texts.items()):
        own = argparse.Namespace(**{**vars(args), "dataset_name": name})
        load = open_stream if args.streaming else load_tokens
        tokens, validation = load(own, world, device)
        if len(args.texts) > 1:
            own.seed = f"{args.seed} text {number}"  # for an order of its own
        texts.append(Text(own, part, tokens, validation, about_of(tokens)))
    return texts


def about_of(tokens):
    """What the cache says of tokens that it has, or the same of a stream, or of random ones."""
    if isinstance(tokens, Stream):
        return tokens.about
    if (file := getattr(tokens, "filename", None)) is not None:  # mapped
        return json.loads(Path(file).with_name("about.json").read_text())
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return {"tokens": len(tokens), "held_out": None, "sha256": digest, "bytes": {"tokens": None}}


def batches(texts, *others):
    """`Batches` of one text, or of a mix; `parts_of` gives those of each text.

    others: what `Batches` takes between tokens and validation.
    """
    kind = StreamBatches if texts[0].args.streaming else Batches
    parts = [kind(text.args, text.tokens, *others, text.validation) for text in texts]
    whole = parts[0]
    if len(parts) > 1:
        whole = copy.copy(parts[0])
        whole.windows = ConcatDataset([part.windows for part in parts])
        orders = [part.order for part in parts]
        starts = [0, *whole.windows.cumulative_sizes]
        whole.order = MixedOrder([text.part for text in texts], orders, starts)
    whole.texts, whole.mixed = texts, parts[1:] and parts
    return whole


def parts_of(data):
    """The `Batches` of each text, a list."""
    return data.mixed or [data]


class MixedOrder(Order):
    """The row of all sequences: each is the next one in the row of its text."""

    def __init__(self, parts, orders, starts):
        """parts: of each period; orders: of the texts; starts: the number of their first window."""
        self.parts, self.orders, self.starts = parts, orders, starts
        self.batch_size = orders[0].batch_size
        self.texts = period_of(parts)
        seen, self.turns = [0] * len(parts), []  # how often a text came before in its period
        for text in self.texts:
            self.turns.append(seen[text])
            seen[text] += 1

    def sequence(self, position):
        """Index of the window at a position, where the windows of all texts are in one row."""
        period, place = divmod(position, len(self.texts))
        text = self.texts[place]
        turn = period * self.parts[text] + self.turns[place]
        return self.starts[text] + self.orders[text].sequence(turn)


def period_of(parts):
    """The texts of one period, a list of numbers in which text i comes parts[i] times.

    A text is ready when it has waited so long for its next turn that it would not come too early.
    Of those that are ready, the one comes that would be too late first. So at every place p, text
    i has come p parts[i] / sum(parts) times, to within less than one.
    """
    period, many = sum(parts), max(1, 2 * len(parts) - 2)
    came, texts = [0] * len(parts), []

    def latest(text):  # places that it can wait
        return Fraction((many - 1) * period - many * due[text], parts[text])

    for place in range(1, period + 1):
        # How much of a turn each is owed, in units of 1 / period.
        due = [part * place - period * count for part, count in zip(parts, came, strict=True)]
        ready = [text for text, owed in enumerate(due) if many * owed >= period]
        texts.append(min(ready, key=latest))
        came[texts[-1]] += 1
    return texts
