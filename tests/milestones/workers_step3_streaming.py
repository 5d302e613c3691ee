"""What the checks of step 3's virtual shards and streams run in its processes."""

import itertools
import json
import time
from types import SimpleNamespace

import numpy as np
from workers_step3 import arguments, refused
from workers_step3_texts import folder_of


def source_of(files):
    """A Source of files of JSON lines, a list of lists of texts."""
    from virtual_shards import Source

    lines = ["".join(json.dumps({"text": text}) + "\n" for text in file) for file in files]
    top = folder_of({f"{number:03}.jsonl": text for number, text in enumerate(lines)})
    return Source(SimpleNamespace(dataset_name=str(top), text_column="text"))


def numbered(*counts):
    """Files with so many documents each, which say their file and row."""
    return [[f"{file}.{row}" for row in range(count)] for file, count in enumerate(counts)]


# --- 13. the documents of a shard -----------------------------------------------------------------


def dealt():
    """Files where there are 64 or more; else rows in turns."""
    few, many = source_of(numbered(200, 130, 90)), source_of(numbered(*[3] * 130))
    for source, shard, due in (
        (few, 0, [f"0.{row}" for row in range(0, 200, 22)]),
        (few, 4, [f"1.{row}" for row in range(1, 130, 21)]),
        (few, 63, [f"0.{row}" for row in range(21, 200, 22)]),
        (many, 1, [f"{file}.{row}" for file in (1, 65, 129) for row in range(3)]),
        (many, 63, [f"{file}.{row}" for file in (63, 127) for row in range(3)]),
    ):
        found = [text for _, text in source.epoch(shard)]
        assert found == due, (
            f"Source.epoch: of {len(source.train)} files shard {shard} has the documents "
            f"{found[:4]} … (FILE.ROW); they should be {due[:4]} …: with fewer than 64 files, "
            "files_of lets shards share a file and take its rows in turns"
        )


def from_a_place():
    """From each place on, also in the second epoch, come the documents that came before."""
    import pyarrow
    from pyarrow import parquet

    from virtual_shards import Source

    texts = [f"{number} tö" for number in range(500)]
    top = folder_of({"a/a.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in texts)})
    (top / "b").mkdir()
    parquet.write_table(pyarrow.table({"text": texts}), top / "b/a.parquet", row_group_size=70)
    sources = {}
    for kind, how in (("a", "rows_of_json"), ("b", "rows_of_parquet")):
        sources[how] = Source(SimpleNamespace(dataset_name=str(top / kind), text_column="text"))
    sources["Source.epoch"] = source_of(numbered(*[5] * 130))  # shard 1 has three files
    for how, source in sources.items():
        row = list(itertools.islice(source.documents(1), 40))
        for number, (place, text) in enumerate(row[:30]):
            found = [text for _, text in itertools.islice(source.documents(1, place), 10)]
            due = [text for _, text in row[number : number + 10]]
            assert found == due, (
                f"{how}: from {place} on, where {text!r} begins, come {found}; "
                f"it should be {due}, as before"
            )


def kept_apart():
    """What is held out is not trained on; an end is a beginning; some documents must be there."""
    import hashlib

    from virtual_shards import is_held_out

    files = numbered(6400)
    due = [t for t in files[0] if int(hashlib.sha256(t.encode()).hexdigest(), 16) % 64 == 0]
    found = [text for text in files[0] if is_held_out(text)]
    assert found == due, (
        f"is_held_out holds out {len(found)} of 6,400 documents; it should be those {len(due)} "
        "whose sha256, as a number, is a multiple of 64"
    )
    source = source_of(files)
    found = list(source.held_out())
    assert found == due, (
        f"Source.held_out yields {found[:5]} … of one file; it should be {due[:5]} …: each shard's "
        "first document, then each one's second: in one file that is the order of its rows"
    )
    own = [text for text in files[0][7::64] if text not in due]
    row = [text for _, text in itertools.islice(source.documents(7), 2 * len(own))]
    assert row == own + own, (
        "Source.documents: two epochs of shard 7 should be the same documents in the same order, "
        "without those that are held out"
    )
    refused(
        lambda: next(source_of(numbered(20)).documents(30)),
        *("too few documents", "shard 30 of 64", "--streaming"),
        by="Source.documents",
    )


def bad_line():
    """An error names the file and the line, and lines of other shards are not looked at."""
    from virtual_shards import Place, Source

    lines = ['{"text": "good"}'] * 200
    lines[131] = '{"text": }'
    top = folder_of({"a.jsonl": "\n".join(lines)})
    source = Source(SimpleNamespace(dataset_name=str(top), text_column="text"))
    found = len(list(source.epoch(4)))
    assert found == 4, f"rows_of_json: shard 4 has {found} documents, not 4"
    refused(lambda: list(source.epoch(131 % 64)), "a.jsonl, line 132", by="rows_of_json")
    beyond = Place(0, 300, 1_000_000, 0)
    refused(lambda: list(source.epoch(4, beyond)), "a.jsonl", "shorter", by="rows_of_json")


# --- 14. the sequences of a run -------------------------------------------------------------------


def letters(text):
    """A tokenizer of the checks: the bytes, and 0 at the end."""
    return np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.uint32)


def cut():
    """Sequences that share one token, and the place of what follows each."""
    from streaming import sequences
    from virtual_shards import Place

    texts = ["to be", "", "or", "not to be, that is the question", "x"] * 3
    places = [Place(0, row, 10 * row, 0) for row in range(len(texts))]
    documents = [(place, letters(text)) for place, text in zip(places, texts, strict=True)]
    whole = np.concatenate([tokens for _, tokens in documents])
    found = list(sequences(iter(documents), 4, 0))
    for number, (tokens, place) in enumerate(found):
        due = whole[4 * number : 4 * number + 5]
        assert np.array_equal(tokens, due), (
            f"sequences: number {number} of seq_len 4 is {bytes(tokens.astype(np.uint8))}; it "
            f"should be {bytes(due.astype(np.uint8))}: 5 tokens, the first one the last of the one "
            "before"
        )
        if number + 1 < len(found):
            rest = documents[places.index(place._replace(tokens=0)) :]
            again = next(sequences(iter(rest), 4, place.tokens))[0]
            assert np.array_equal(again, found[number + 1][0]), (
                f"sequences: after number {number} the place is {place}; from there on comes "
                f"{bytes(again.astype(np.uint8))}, which is not number {number + 1}"
            )
    due = (len(whole) - 1) // 4
    assert len(found) == due, f"sequences: {len(whole)} tokens give {len(found)} of 4, not {due}"


def stream_of(*counts, seq_len=4):
    from streaming import Stream

    return Stream(source_of(numbered(*counts)), letters, seq_len, 1.0)


def in_turns():
    """Sequence p is the next one of shard p mod 64; any can be read again."""
    stream = stream_of(2000, 1000, 1500)
    rows = {}
    for shard in range(64):
        texts = (text for _, text in stream.source.documents(shard))
        tokens = np.concatenate([letters(text) for text in itertools.islice(texts, 80)])
        rows[shard] = tokens
    for position in (*range(200), 1000, 130, 131, 5, 1001, 1000):
        if position == 1000:
            stream.forget(900)
        number, shard = divmod(position, 64)
        found, due = stream.sequence(position), rows[shard][4 * number : 4 * number + 5]
        assert np.array_equal(found, due), (
            f"Stream.sequence({position}) is {bytes(found.astype(np.uint8))}; it should be "
            f"{bytes(due.astype(np.uint8))}, number {number} of shard {shard}"
        )
    stream.forget(1000)
    kept = max(map(len, stream.known))
    assert kept <= 3, (
        f"Stream.forget(1000): of a shard {kept} places are known after 1002 positions; it should "
        "keep the first one and those from the position on, or memory grows with the run"
    )
    window = stream[4 * 77 : 4 * 77 + 5]
    assert np.array_equal(window, stream.sequence(77)), "Stream.__getitem__ is not sequence 77"


def apart():
    """The first tokens that are held out, and how many bytes of text are in one."""
    import streaming

    def asked(seq_len):
        return arguments(seq_len=seq_len, eval_tokens=None)

    source = source_of([[f"{row} tö" for row in range(20000)]])
    whole = "".join(text + "\0" for text in source.held_out()).encode()
    tokens, bytes_per_token = streaming.held_out_tokens(source, letters, asked(64))
    due = np.frombuffer(whole, np.uint8)[: len(tokens)]
    assert np.array_equal(tokens, due), "held_out_tokens: these are not the first ones held out"
    ends = (due == 0).mean()
    assert abs(bytes_per_token - (1 - ends)) < 1e-3, (
        f"held_out_tokens: {bytes_per_token:.3f} bytes a token; the end tokens have none, so it is "
        f"{1 - ends:.3f}"
    )
    tiny = source_of([[f"{row}" for row in range(640)]])
    words = ("too few documents", "--seq_len 4096")
    refused(
        lambda: streaming.held_out_tokens(tiny, letters, asked(4096)), *words, by="held_out_tokens"
    )


def ahead():
    """A thread loads; a step waits for it, and gets its errors."""
    import torch

    import streaming
    from errors import UserError

    stream, delay = stream_of(4000, seq_len=10), [0.0]
    load = stream.sequence

    def slow(position):
        time.sleep(delay[0])
        if position >= 100:
            raise UserError("line 7 is broken")
        return load(position)

    stream.sequence = slow
    args = arguments(streaming=True, micro_batch_size=4, gradient_accumulation_steps=2)
    data = streaming.StreamBatches(
        args, stream, torch.device("cpu"), np.arange(11, dtype=np.uint32)
    )
    again = stream_of(4000, seq_len=10)
    for step in (0, 1, 1, 2, 3):
        found = [tokens for tokens, _, _ in data.micro_batches(step)]
        due = [again.sequence(position)[:10] for position in range(8 * step, 8 * step + 8)]
        due = torch.from_numpy(np.stack(due).astype("int64"))
        assert torch.equal(torch.cat(found), due), (
            f"StreamBatches.micro_batches({step}) should have the positions {8 * step} to "
            f"{8 * step + 7}, in order"
        )
    delay[0] = 0.02
    before = data.waited
    list(data.micro_batches(0))
    waited = data.waited - before
    assert waited > 0.1, f"StreamBatches.waited grew by {waited:.3f} s while it waited for 0.16"
    delay[0] = 0.0
    refused(lambda: list(data.micro_batches(12)), "line 7", by="StreamBatches.micro_batches")
