"""What the checks of step 3's cache, tokens and updates run in its processes."""

import json
import math
import os
import signal
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
from same import SMALL
from workers_step3 import refused
from workers_step3_texts import folder_of

# --- 5. complete or absent ------------------------------------------------------------------------


def write(folder, values=(300, 1, 2)):
    """Write tokens and about.json as a run does; returns the folder's content."""
    import hashlib

    from token_cache import FILES, room_for, write_tokens

    with room_for(folder) as part:
        digest = hashlib.sha256()
        arrays = [np.array(values[:1], np.uint16), np.array(values[1:], np.uint16)]
        count, largest = write_tokens(iter(arrays), part / FILES["tokens"], np.uint16, digest)
        about = {"tokens": count, "held_out": None, "largest_id": largest, "notes": []}
        about["bytes"] = {"tokens": count}
        about |= {"tokenizer": "bytes", "sha256": digest.hexdigest()}
        (part / "about.json").write_text(json.dumps(about))
    return about


def kept():
    from token_cache import cache_folder, read_about

    top = tempfile.mkdtemp()
    with patch.dict(os.environ, XDG_CACHE_HOME=top):
        folder = cache_folder() / "0123"
    assert str(folder).startswith(top), "cache_folder should lie below XDG_CACHE_HOME"
    assert read_about(folder) is None, "read_about of what is not there should be None"
    about = write(folder)
    tokens = np.load(folder / "tokens.npy")
    assert tokens.tolist() == [300, 1, 2] and tokens.dtype == np.uint16, (
        f"write_tokens keeps the arrays [300] and [1, 2] as {tokens}: at the end the header must "
        "have their number"
    )
    assert (about["tokens"], about["largest_id"]) == (3, 300), (
        f"write_tokens returns {about['tokens']}, {about['largest_id']} for the arrays [300] and "
        "[1, 2]; it should be the number of tokens and the largest of them, 3, 300"
    )
    found = read_about(folder)
    assert found == about, (
        f"read_about of what is whole gives {found}, not {about}. If it is None: perhaps the hash "
        "of write_tokens does not cover the tokens"
    )
    left = os.listdir(folder.parent)
    assert left == ["0123"], f"room_for leaves {left} in the cache, not only the folder 0123"
    data = bytearray((folder / "tokens.npy").read_bytes())
    data[-1] ^= 1
    (folder / "tokens.npy").write_bytes(data)
    assert read_about(folder) is None, "a token was changed, and read_about does not notice"
    write(folder, (7, 8))
    assert np.load(folder / "tokens.npy").tolist() == [7, 8], "room_for: what is broken is replaced"


def stopped():
    from token_cache import room_for

    folder = Path(tempfile.mkdtemp()) / "cache" / "0123"
    try:
        with room_for(folder) as part:
            (part / "tokens.npy").write_text("half")
            raise KeyError("stop")
    except KeyError:
        pass
    assert not os.listdir(folder.parent), (
        f"room_for: after an error the cache holds {os.listdir(folder.parent)}; what is half "
        "written must go"
    )
    read, end = os.pipe()
    child = os.fork()
    if not child:
        with room_for(folder) as part:
            (part / "tokens.npy").write_text("half")
            os.write(end, b"x")
            signal.pause()
    os.read(read, 1)
    (aside,) = os.listdir(folder.parent)
    write(folder.parent / "other")
    assert aside in os.listdir(folder.parent), (
        "room_for: what another process is writing was removed; lock the folder that lies aside "
        "for as long as it is written"
    )
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    write(folder)
    found = sorted(os.listdir(folder.parent))
    assert found == ["0123", "other"], (
        f"remove_leftovers: the cache holds {found}; what a killed process left should be removed "
        "by the next one, in room_for"
    )


# --- 6. from a name to tokens ---------------------------------------------------------------------

TEXTS = ["To be, or not to be,\nthat is the question.\n", "naïve – 東京 Ā\n", "", "x " * 3000]
ENDED = b"".join(text.encode() + b"\0" for text in TEXTS)


def load(name, *flags):
    """(tokens, those held out, tokenisers that were made) of a data set."""
    import corpus
    import process_group as pg
    from flags import parse_args

    if not pg.dist.is_initialized():
        pg.init_processes("cpu")
    world, made, make = pg.Mesh(dp=pg.dist.get_world_size()).world, [], corpus.load_tokenizer
    with patch.object(corpus, "load_tokenizer", lambda name: (made.append(name), make(name))[1]):
        args = parse_args(["--device", "cpu", "--dataset_name", str(name), *flags])
        tokens, held_out = corpus.load_tokens(args, world, "cpu")
    return np.array(tokens), held_out, made


def as_bytes(tokens):
    return bytes(tokens.astype(np.uint8))


def in_batches():
    """Lists of slices for the tokenizer, and lists of tokens from several processes."""
    import corpus

    slices = [("abc", False), ("d", True), ("efghij", True), ("k", True)]
    with patch.object(corpus, "BATCH", 5):
        found = [part for part in corpus.cut_batches(iter(slices)) if part]
    assert found == [slices[:2], slices[2:3], slices[3:]], (
        f"cut_batches makes {found} of {slices} for a BATCH of 5; each list should end where it "
        "is full, and the last one where the slices end"
    )
    for count in (1, 2):
        found = list(corpus.in_processes(count, square, iter(range(30))))
        assert found == [number**2 for number in range(30)], (
            f"in_processes({count}, …) gives the squares of 0 to 29 as {found}; all results should "
            "come, in the order of what was sent"
        )
    ends = [("ab", False), ("cd", True), ("", True)]
    found = corpus.encode_batch(ends, lambda texts: [[*map(ord, t)] for t in texts], [0], np.uint16)
    due = [97, 98, 99, 100, 0, 0]
    assert found.tolist() == due and found.dtype == np.uint16, (
        f"encode_batch makes {found} of {ends}; it should be {due}: an end token after a document, "
        "and not after each of its slices"
    )


def square(number):
    return number**2


def large_ids():
    """A tokenizer of three symbols, of which one has an id that is no uint16."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    import corpus
    from texts import Texts

    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "low": 1, "high": 70_000}, "low"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    begin = processors.TemplateProcessing(single="high $A", special_tokens=[("high", 70_000)])
    tokenizer.post_processor = begin
    tokenizer.enable_truncation(2)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    found = corpus.encoder(made)(["low low low low"])
    assert found == [[1] * 4], (
        f"encoder: four words become the ids {found}; they should be 4, without those that a "
        "tokenizer adds at the beginning, and nothing is cut"
    )
    texts = Texts(8, "B", lambda progress: iter([("low high", True)]))
    folder = Path(tempfile.mkdtemp())
    try:
        largest = corpus.tokenise([texts, None], made, 1, folder)["largest_id"]
        kept = np.load(folder / "tokens.npy").tolist()
    except OverflowError as error:  # of NumPy 2; an older one begins again at 0
        kept, largest = error, None
    assert kept == [1, 70_000, 0] and largest == 70_000, (
        f"tokenise: the ids 1, 70000, 0 are kept as {kept}, the largest is {largest}; where the "
        "largest id of the vocabulary is 2**16 or more they need uint32"
    )


def tokens_of_texts():
    files = {f"{index}.txt": text for index, text in enumerate(TEXTS)}
    top = folder_of(files)
    tokens, held_out, made = load(top)
    found = as_bytes(tokens)
    place = next((i for i, (a, b) in enumerate(zip(found, ENDED, strict=False)) if a != b), 0)
    assert found == ENDED, (
        f"byte_tokenizer: {len(found)} tokens, {found[place : place + 20]} from {place} on; it "
        f"should be {len(ENDED)}, {ENDED[place : place + 20]}: each byte of a text is a token, "
        "also those of Ā, and byte 0 comes after each document"
    )
    kind = tokens.dtype
    assert kind == np.uint16, f"tokenise: tokens are {kind}; ids below 2**16 fit into uint16"
    assert held_out is None, "load_tokens: no text is for validation, so the second result is None"
    assert made == ["bytes"], f"tokenised makes the tokenizers {made}, not one, `bytes`"
    again, _, made = load(top)
    assert np.array_equal(again, tokens) and not made, (
        "tokenised: the same data set is tokenised anew; its tokens are in the cache"
    )
    for name, text, what in (("4.txt", "more", "added"), ("4.txt", "less", "changed")):
        (top / name).write_text(text)
        tokens, _, _ = load(top)
        assert as_bytes(tokens) == ENDED + text.encode() + b"\0", (
            f"key: a file was {what}, and the tokens are the old ones; it must change with the "
            "files, their sizes and their times"
        )
    both = folder_of({"train.txt": "to learn from", "val.txt": "to hold out"})
    tokens, held_out, _ = load(both)
    found = as_bytes(tokens), held_out is not None and as_bytes(held_out)
    due = b"to learn from\0", b"to hold out\0"
    assert found == due, f"load_tokens: of train.txt and val.txt it gives {found}, not {due}"
    found, _, _ = load("random", "--vocab_size", "300")
    assert set(np.unique(found)) == set(range(300)), (
        "load_tokens: random tokens should fill the vocabulary"
    )
    flags = "--vocab_size", "100"
    refused(lambda: load(top, *flags), "--vocab_size 100", "--tokenizer_name", by="load_tokens")


def many_processes():
    import corpus

    rows = [text * 5 for text in TEXTS] * 20
    lines = "\n".join(json.dumps({"text": row}) for row in rows)
    with patch.object(corpus, "BATCH", 2**12):  # so that there are many
        tokens, _, _ = load(folder_of({"a.jsonl": lines}), "--num_proc", "2")
    assert as_bytes(tokens) == b"".join(row.encode() + b"\0" for row in rows), (
        "tokenise: with --num_proc 2 the tokens are others; results must come in the order of the "
        "text"
    )


def on_several_ranks(name):
    tokens, _, made = load(name)
    return as_bytes(tokens), len(made)


# --- 8. the whole program -------------------------------------------------------------------------


def update():
    """Two steps: what `train_step` reports of each, and what it does to the gradients."""
    import train

    state = train.setup(train.parse_args(SMALL.split()))
    for step in (1, 2):
        state.optimizer.zero_grad()
        loss = train.forward_backward(state).item()  # train_step begins with other gradients
        norm = train.gradient_norm(state.parameters, state.model.parameter_names).item()
        state.args.max_grad_norm = norm / 2
        found = train.train_step(state)
        rate = train.learning_rate_at(step, state.args)
        due = {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": rate}
        for name, value in {**due, "tokens": 32 * step}.items():
            assert math.isclose(found[name], value, rel_tol=1e-9), (
                f"train_step: {name} of step {step} is {found[name]}; it should be {value}, "
                f"{REPORTED[name]}"
            )
        rates = {group["lr"] for group in state.optimizer.param_groups}
        assert rates == {rate}, f"train_step: the optimizer's rates are {rates}, not {rate}"
        left = train.gradient_norm(state.parameters, state.model.parameter_names).item()
        assert math.isclose(left, norm / 2, rel_tol=1e-4), (
            f"train_step: the optimizer gets gradients of norm {left}; it should be "
            f"--max_grad_norm {norm / 2}, to which they are clipped"
        )


REPORTED = {
    "step": "one more",
    "loss": "the mean over the step's targets",
    "grad_norm": "of this step's gradients only, before clipping",
    "learning_rate": "that of learning_rate_at for this step, the first one being 1",
    "tokens": "all since the start",
}


def apart():
    """A run on a data set that names a text for validation."""
    import train

    top = folder_of({"train.txt": "a" * 2000, "val.txt": "b" * 200})
    flags = f"{SMALL} --dataset_name {top} --device cpu"
    state = train.setup(train.parse_args(flags.split()))
    read = {token for tokens, _, _ in state.data.evaluation() for token in tokens.unique().tolist()}
    assert read <= {0, ord("b")}, (
        f"setup: an evaluation reads the bytes {read}; it should read those of val.txt, "
        f"{ord('b')}: Batches gets the second text of load_tokens, too"
    )
