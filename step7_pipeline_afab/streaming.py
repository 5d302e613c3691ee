"""`--streaming`: texts are read and tokenised while the model trains, and nothing is kept.

Sequence p of a run is the next one of virtual shard p mod 64, whatever the layout. A rank reads the
shards that its own sequences fall into. Where in a shard a sequence begins is known, so that a run
can go on from there.
"""

import hashlib
import time
import weakref
from collections import deque
from concurrent import futures
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import corpus
import process_group as pg
from dataloader import HELD_OUT_SEQUENCES, HELD_OUT_TOKENS, Batches, Order
from errors import UserError, note
from files import local_files, shown
from presets import hub_is_unreachable
from texts import slices
from token_cache import place_for_libraries
from virtual_shards import SHARDS, START, Source

AHEAD = 16  # micro-batches that a thread reads ahead
ENDLESS = 2**62  # tokens


def tokeniser(args, world):
    """A function from a document to its tokens, an array that ends with the end token.

    The first rank alone imports `transformers`, if the tokenizer has a part that works without it.
    """
    name = corpus.tokenizer_of(args)

    def load():
        tokenizer = corpus.load_tokenizer(name)
        backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
        return backend, tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", False)

    backend, end, split = pg.from_first(world, load)
    if backend is None:
        tokenizer = corpus.load_tokenizer(name)
    else:
        from tokenizers import Tokenizer

        tokenizer = SimpleNamespace(
            backend_tokenizer=Tokenizer.from_str(backend), is_fast=True, split_special_tokens=split
        )
    ids_of, vocab_size = corpus.encoder(tokenizer), args.config.vocab_size

    def tokens_of(text):
        batches = corpus.cut_batches(slices([(text, True)]))
        tokens = np.concatenate([corpus.encode_batch(b, ids_of, [end], np.uint32) for b in batches])
        if (largest := tokens.max()) >= vocab_size:
            raise UserError(
                f"--vocab_size {vocab_size} (of --model_name {args.model_name}): the tokenizer "
                f"{name} gave the id {largest}; raise the one or change --tokenizer_name"
            )
        return tokens

    return tokens_of


def sequences(documents, seq_len, skip):
    """Yield (seq_len + 1 tokens, Place of what follows) from (Place, tokens) of documents.

    Neighbours share one token. skip: tokens of the first document that were read before.
    """
    rest, begins = np.empty(0, np.uint32), deque()  # begins: (index in rest, place) of documents
    for place, tokens in documents:
        begins.append((len(rest), place))
        rest, at = np.concatenate([rest, tokens]), skip
        skip = 0
        while at + seq_len < len(rest):
            sequence, at = rest[at : at + seq_len + 1], at + seq_len
            while len(begins) > 1 and begins[1][0] <= at:
                begins.popleft()
            yield sequence, begins[0][1]._replace(tokens=at - begins[0][0])
        rest, begins = rest[at:], deque((index - at, place) for index, place in begins)


def first_in(shard, position):
    """Number of the first sequence of a shard at a position of the run, or behind it."""
    return -(-(position - shard) // SHARDS)


class Stream:
    """In place of an array of tokens: where its windows would be, there are the sequences.

    Of each shard it knows where some of the sequences begin, and goes on from the nearest place.
    """

    def __init__(self, source, tokens_of, seq_len, bytes_per_token):
        self.source, self.tokens_of, self.seq_len = source, tokens_of, seq_len
        digest = hashlib.sha256(repr(source.known_by).encode()).hexdigest()
        # Like about.json of the cache. `bytes` are those of one token, so `held_out` counts one.
        self.about = {"tokens": "a stream's", "held_out": 1, "sha256": digest}
        self.about["bytes"] = {"held_out": bytes_per_token}  # in UTF-8
        self.known = [{0: START} for _ in range(SHARDS)]  # {number of a sequence: its Place}
        self.readers = {}  # shard: (number of the sequence that comes next, iterator)

    def __len__(self):
        return ENDLESS

    def __getitem__(self, window):  # [seq + 1]
        return self.sequence(window.start // self.seq_len)

    def sequence(self, position):
        """The sequence at a position of the run; those before it in its shard are passed over."""
        number, shard = divmod(position, SHARDS)
        known = self.known[shard]
        at, reader = self.readers.get(shard, (number + 1, None))
        if at > number:
            at = max(earlier for earlier in [*known] if earlier <= number)
            reader = self.read(shard, known[at])
        while at <= number:
            at += 1
            tokens, known[at] = next(reader)
        self.readers[shard] = at, reader
        return tokens

    def read(self, shard, place):
        documents = self.source.documents(shard, place)
        tokens = ((found, self.tokens_of(text)) for found, text in documents)
        return sequences(tokens, self.seq_len, place.tokens)

    def forget(self, position):
        """Forget places before a position, but the first of each shard: from there all is found."""
        for shard, known in enumerate(self.known):
            numbers = sorted([*known])  # a list at once: the thread adds to them
            before = [number for number in numbers if number <= first_in(shard, position)]
            for number in before[1:-1]:
                del known[number]


def open_stream(args, world, device):
    """(Stream, tokens that are held out), in place of `load_tokens`; raises UserError.

    The first rank reads ahead for what is held out, and the others get it.
    """
    place_for_libraries()
    name = corpus.tokenizer_of(args)
    if local_files(args.dataset_name).kind == "hub" or not (name == "bytes" or Path(name).is_dir()):
        hub_is_unreachable()
    tokens_of, source = tokeniser(args, world), []

    def first():
        source.append(Source(args))
        for line in source[0].notes:
            note(line)
        return held_out_tokens(source[0], tokens_of, args)

    held_out, bytes_per_token = pg.from_first(world, first)
    source = source or [Source(args)]
    return Stream(source[0], tokens_of, args.seq_len, bytes_per_token), held_out


def held_out_tokens(source, tokens_of, args):
    """(As many tokens as an evaluation reads, an array; bytes of UTF-8 for each of them)."""
    if source.kind != "hub":  # there it would open 64 files once more
        for shard in range(SHARDS):
            next(source.documents(shard))  # raises where there is nothing to train on
    at_most = args.eval_tokens or min(HELD_OUT_SEQUENCES * args.seq_len, HELD_OUT_TOKENS)
    wanted = max(1, at_most // args.seq_len) * args.seq_len + 1
    parts, size = [], 0
    for text in source.held_out():
        parts.append(tokens_of(text))
        size += len(text.replace("\0", "").encode())
        if sum(map(len, parts)) >= wanted:
            break
    count = sum(map(len, parts))
    if count <= args.seq_len:
        raise UserError(
            f"--dataset_name {shown(args.dataset_name)}: too few documents for --streaming: "
            f"the {count} tokens that are held out, of one document in 64, do not fill a sequence "
            f"of --seq_len {args.seq_len}; leave --streaming out"
        )
    return np.concatenate(parts)[:wanted], size / count


class InOrder(Order):
    """Each position of the row is a sequence of the stream."""

    def sequence(self, position):
        return position


class StreamBatches(Batches):
    """`Batches` of a stream, loaded by a thread that is some micro-batches ahead."""

    def __init__(self, args, stream, device, *rest):
        super().__init__(args, stream, device, *rest)
        self.stream, self.ahead, self.waited = stream, deque(), 0.0  # waited: seconds, so far
        self.order = InOrder(self.order.count, self.order.batch_size, args.seed)
        begin = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self.thread = futures.ThreadPoolExecutor(1, initializer=begin)
        weakref.finalize(self, self.thread.shutdown, cancel_futures=True)

    def micro_batches(self, step):
        """As `Batches.micro_batches`; the time that it waits for the thread is added up."""
        if step != self.next_step:
            for future in self.ahead:
                future.cancel()
            futures.wait(self.ahead)  # one may be in the middle of a shard
            self.ahead.clear()
            self.loading = iter(self.load(self.order.cut(self.micro_batch_size, step)))
        self.next_step = None
        self.stream.forget(step * self.order.batch_size)
        for _ in range(self.micro_batches_a_step):
            while len(self.ahead) < AHEAD:
                self.ahead.append(self.thread.submit(next, self.loading))
            begun = time.perf_counter()
            windows = self.ahead.popleft().result()
            self.waited += time.perf_counter() - begun
            yield self.split(windows)
        self.next_step = step + 1
