"""What each rank of a pipeline does, in order, for the widget of pipelines; and what was measured.

A rank's program is a list of words, written down while the code of steps 8 and 9 runs with passes
that compute nothing and messages that go nowhere:

    F0  B0     forward and backward through the rank's chunk 0, with its next micro-batch
    >+ <-      together: send to the next rank, and receive from the one before; `>+>-` is two sends
    w0  w1     wait for what was posted last, or one post before that

The widget computes when each of them happens.
"""

import collections
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from recorded import record

ASSETS = Path(__file__).parent
RANKS, MICRO_BATCHES, CHUNKS = range(1, 9), range(1, 17), range(2, 5)
LETTERS = [chr(code) for code in range(35, 127) if chr(code) != "\\"]


def stand_in(engine, chunks, ranks, count, rank, went):
    """A rank's own `Stage` or `Interleaved` of the step that is imported, without a model.

    A pass of it only calls went(F or B, chunk, micro-batch).
    """
    import torch

    import pipeline_parallel
    import process_group as pg

    numbers, result = itertools.count(), SimpleNamespace(contiguous=lambda: None)

    class Stage(pipeline_parallel.Stage):
        def __init__(self, *args):
            super().__init__(*args)
            self.chunk = next(numbers)

        def forward(self, x, micro_batch):
            self.alive.append(micro_batch)
            went("F", self.chunk, micro_batch)
            return result

        def backward(self, grad):
            went("B", self.chunk, self.alive.popleft())
            return result

        def empty(self):
            return None

    args = SimpleNamespace(
        cp_size=1, tp_size=1, sequence_parallel=False, micro_batch_size=1, seq_len=1,
        config=SimpleNamespace(hidden_size=1), gradient_accumulation_steps=count,
        pp_engine=engine, pp_chunks=chunks, timeline=None,
    )  # fmt: skip
    group = pg.Group("pp", tuple(range(ranks)), rank, None)
    rest = None, group, SimpleNamespace(), torch.device("cpu")
    if chunks == 1:
        return Stage(args, *rest)
    import interleaved

    with patch.multiple(interleaved, Stage=Stage, chunk_of=lambda *args: None):
        return interleaved.Interleaved(args, *rest)


def program_of(engine, chunks, ranks, count, rank):
    """The words of one rank."""
    import process_group as pg

    words, posted, passed = [], [], collections.Counter()

    def went(kind, chunk, micro_batch):
        word = f"{kind}{chunk}"
        assert micro_batch == passed[word], "the widget counts micro-batches in order"
        passed[word] += 1
        words.append(word)

    def exchange(group, send=(), receive=()):
        """What is posted together is waited for together: the last handle says when."""
        peers = [(">", peer) for _, peer in send] + [("<", peer) for _, peer in receive]
        if not peers:
            return []
        words.append("".join(sign + "-+"[peer == group.next] for sign, peer in peers))
        number, left = len(posted), [*peers]
        posted.append(number)

        def wait():
            left.pop()
            if not left:
                words.append(f"w{len(posted) - 1 - number}")

        return [SimpleNamespace(wait=wait) for _ in peers]

    with patch.object(pg, "exchange", exchange):
        stand_in(engine, chunks, ranks, count, rank, went).run(range(count), 1, backward=True)
    return words


def programs_of(engine, chunks, sizes):
    """On a rank of step 8 or 9: for each (ranks, micro-batches) the program of every rank."""
    return [
        [program_of(engine, chunks, ranks, count, rank) for rank in range(ranks)]
        for ranks, count in sizes
    ]


def engines():
    """(name in the data, step, engine, chunks) of what is written down."""
    yield "afab", "step8_pipeline_1f1b", "afab", 1
    yield "1f1b", "step8_pipeline_1f1b", "1f1b", 1
    for chunks in CHUNKS:
        yield f"interleaved {chunks}", "step9_4d", "interleaved", chunks


def sizes_of(chunks):
    """(ranks, micro-batches): those that step 9 allows where a rank has several chunks."""
    for ranks, count in itertools.product(RANKS, MICRO_BATCHES):
        if chunks == 1 or (ranks > 1 and count % ranks == 0):
            yield ranks, count


def pipelines():
    """{words: a letter for each word; texts: programs in these letters; programs: {engine: {"p m":
    places in `texts`, a rank each}}; measured: recorded runs}."""
    words, texts, programs = {}, {}, {}
    for name, step, engine, chunks in engines():
        sizes = tuple(sizes_of(chunks))
        (found,) = record(step, 1, programs_of, engine, chunks, sizes)
        programs[name] = {}
        for (p, m), rows in zip(sizes, found, strict=True):
            lines = (
                "".join(LETTERS[words.setdefault(word, len(words))] for word in row) for row in rows
            )
            places = [texts.setdefault(line, len(texts)) for line in lines]
            programs[name][f"{p} {m}"] = places
    letters = dict(zip(LETTERS, words, strict=False))
    return {
        "words": letters,
        "texts": [*texts],
        "programs": programs,
        "measured": measured(),
    }


def measured():
    """The runs that timeline.py has kept as assets/timeline_*.json, by name."""
    paths = sorted(ASSETS.glob("timeline_*.json"))
    return {re.sub("timeline_", "", path.stem): json.loads(path.read_text()) for path in paths}
