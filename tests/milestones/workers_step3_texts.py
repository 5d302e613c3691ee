"""What the checks of step 3's files, texts, cache and tokens run in its processes."""

import gzip
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from workers_step3 import refused


def within(folder, function):
    """Call a function whose temporary files lie in a folder."""
    with patch.object(tempfile, "tempdir", str(folder)):
        return function()


def folder_of(files):
    """A new folder with these files, {name: text}."""
    top = Path(tempfile.mkdtemp())
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return top


# --- 3. which files -------------------------------------------------------------------------------

# files of a folder: (kind, those to train on, those held out, words of the note)
CHOICES = [
    ("b.txt a.TXT c/d.txt.gz", "texts", "a.TXT b.txt c/d.txt.gz", "", ""),
    ("a.jsonl b.json", "JSON", "a.jsonl b.json", "", ""),
    ("a.txt README.md", "texts", "a.txt", "", "of another kind (README.md)"),
    ("a.txt .b.txt", "texts", "a.txt", "", "hidden (.b.txt)"),
    ("train.txt val.txt test.txt", "texts", "train.txt", "val.txt", "held out 1"),
    ("Train-1.txt dev.txt x.txt", "texts", "Train-1.txt", "dev.txt", "named for no split"),
    ("train/a.txt validation/b.txt", "texts", "train/a.txt", "validation/b.txt", "held out 1"),
    ("bullet_train.txt test.txt", "texts", "bullet_train.txt test.txt", "", ""),
    ("a-train.0-of-2.txt a-test.0-of-2.txt", "texts", "a-train.0-of-2.txt", "", "named test"),
]


def chosen_files():
    from files import kind_of, local_files, shown

    assert shown("a\nb/é") == "a\\nb/é", "`shown` writes a path in one line"
    assert kind_of("A.JSONL.gz") == ("JSON", ".gz"), "endings count in any case"
    assert kind_of("a.parquet.gz")[0] is None, "parquet is packed inside, not as a whole"
    for names, kind, train, validation, words in CHOICES:
        top = folder_of(dict.fromkeys(names.split(), "x"))
        found = local_files(str(top))
        relative = [
            " ".join(str(path.relative_to(top)) for path in part)
            for part in (found.train, found.validation)
        ]
        said = " ".join(found.notes)
        assert (found.kind, *relative) == (kind, train, validation), (
            f"of the files {names} it takes {relative[0] or 'none'} for training and holds out "
            f"{relative[1] or 'none'}, as {found.kind}; it should be {train}, "
            f"{validation or 'none'}, {kind}"
        )
        assert bool(words) == bool(said) and words in said, (
            f"of the files {names} it says “{said}”; it should "
            + (f"say {words}" if words else "say nothing, because everything is read")
        )
    library = local_files("python-stdlib")
    assert library.kind == "source" and any(f.name == "argparse.py" for f in library.train)
    assert local_files("owner/name").kind == "hub", "no path and no ending: a name on the hub"
    refused(lambda: local_files("./not_there"), "--dataset_name", "no such file")
    refused(lambda: local_files(str(folder_of({"a.md": ""}))), "no file with one of the endings")


def links():
    from files import local_files

    top = folder_of({"a/b.txt": "x"})
    (top / "again").symlink_to(top / "a")
    (top / "loop").symlink_to(top)
    found = local_files(str(top))
    names = [str(path.relative_to(top)) for path in found.train]
    assert names == ["a/b.txt"], (
        f"a file with two links to its folder is read as {names}; it should be read once"
    )


# --- 4. texts a piece at a time -------------------------------------------------------------------


def documents(name, column="text"):
    """The documents of a data set, put together from its pieces."""
    from files import local_files
    from texts import open_texts

    args = SimpleNamespace(dataset_name=str(name), text_column=column, dataset_config=None)
    texts, _, _ = open_texts(args, local_files(str(name)))
    found, rest, read = [], "", []
    for text, ends in texts.pieces(read.append):
        rest += text
        if ends:
            found.append(rest)
            rest = ""
    assert not rest, f"the last document of {name} does not end: {rest!r:.40}"
    assert sum(read) == texts.size, f"progress of {sum(read)} is told, of {texts.size} in all"
    return found


def readers():
    import pyarrow
    from pyarrow import parquet

    long = "東京 " * 100_000  # a letter of three bytes lies across two blocks
    rows = ["one", None, "naïve – two"]
    lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in rows)
    top = folder_of({
        "a.txt": "\ufeffone\r\n",
        "b.txt": long,
        "c.txt.gz": gzip.compress(b"packed"),
        "rows/a.jsonl": lines,
        "list/a.json": json.dumps([{"text": text} for text in rows]),
        "cut/a.txt": "good \udc80".encode(errors="surrogateescape"),
        "cut/b.jsonl": lines + "\n{",
    })  # fmt: skip
    (top / "parquet").mkdir()
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": rows}), top / "parquet/a.parquet")
    whole = [
        document for name in ("a.txt", "b.txt", "c.txt.gz") for document in documents(top / name)
    ]
    assert whole == ["one\r\n", long, "packed"], (
        "a text file should be one document, without its byte order mark and else as it stands: "
        f"{[document[:20] for document in whole]}"
    )
    for kind in ("rows", "list", "parquet"):
        found = documents(top / kind)
        assert found == ["one", "", "naïve – two"], (
            f"the {kind} of the texts {rows} are read as {found}; it should be a document each, "
            "empty for null"
        )
    refused(lambda: documents(top / "cut/a.txt"), "a.txt, byte 5", "utf-8")
    refused(lambda: documents(top / "cut/b.jsonl"), "b.jsonl, line 4")
    refused(lambda: documents(top / "rows", "story"), "--text_column story", "'text'")


def sliced():
    import texts

    with patch.object(texts, "SLICE", 10), patch.object(texts, "LONGEST_SLICE", 20):
        pieces = [("to be or not ", False), ("to\0 be", True), ("", True), ("x" * 50 + " y", True)]
        found = list(texts.slices(pieces))
    whole, rest = [], ""
    for text, ends in found:
        rest += text
        if ends:
            whole.append(rest)
            rest = ""
    assert whole == ["to be or not to be", "", "x" * 50 + " y"], (
        f"the slices put together are {whole}; nothing may be lost but NULs, and each document "
        "must end once"
    )
    longest = max(len(text) for text, _ in found)
    assert longest <= 20, f"a slice has {longest} characters, over LONGEST_SLICE, 20"
    assert found[:2] == [("to be or not", False), (" to be", True)], (
        f"“to be or not to be” is cut into {found[:2]} for a SLICE of 10; the cut should be before "
        "the first space from there on, or a tokenizer that splits at spaces gives other tokens"
    )


# --- 5. complete or absent ------------------------------------------------------------------------


def write(folder, values=(1, 2, 300)):
    """Write tokens and about.json as a run does; returns the folder's content."""
    import hashlib

    from token_cache import FILES, room_for, write_tokens

    with room_for(folder) as part:
        digest = hashlib.sha256()
        arrays = [np.array(values[:1], np.uint16), np.array(values[1:], np.uint16)]
        count, largest = write_tokens(iter(arrays), part / FILES["tokens"], np.uint16, digest)
        about = {"tokens": count, "held_out": None, "largest_id": largest, "notes": []}
        about |= {"tokenizer": "bytes", "sha256": digest.hexdigest()}
        (part / "about.json").write_text(json.dumps(about))
    return about


def kept():
    from token_cache import cache_folder, read_about

    top = tempfile.mkdtemp()
    with patch.dict(os.environ, XDG_CACHE_HOME=top):
        folder = cache_folder() / "0123"
    assert str(folder).startswith(top), "the cache should lie below XDG_CACHE_HOME"
    assert read_about(folder) is None, "read_about of what is not there should be None"
    about = write(folder)
    tokens = np.load(folder / "tokens.npy")
    assert tokens.tolist() == [1, 2, 300] and tokens.dtype == np.uint16, (
        f"the arrays [1] and [2, 300] are kept as {tokens}"
    )
    assert (about["tokens"], about["largest_id"]) == (3, 300), (
        f"write_tokens returns {about['tokens']}, {about['largest_id']}; it should be the number "
        "of tokens and the largest of them, 3, 300"
    )
    assert read_about(folder) == about, "read_about should give about.json of what is whole"
    assert os.listdir(folder.parent) == ["0123"], f"left in the cache: {os.listdir(folder.parent)}"
    data = bytearray((folder / "tokens.npy").read_bytes())
    data[-1] ^= 1
    (folder / "tokens.npy").write_bytes(data)
    assert read_about(folder) is None, "a token was changed, and read_about does not notice"
    write(folder, (7, 8))
    assert np.load(folder / "tokens.npy").tolist() == [7, 8], "what is broken should be replaced"


def stopped():
    import signal

    from token_cache import room_for

    folder = Path(tempfile.mkdtemp()) / "cache" / "0123"
    try:
        with room_for(folder) as part:
            (part / "tokens.npy").write_text("half")
            raise KeyError("stop")
    except KeyError:
        pass
    assert not os.listdir(folder.parent), (
        f"after an error the cache holds {os.listdir(folder.parent)}; what is half written must go"
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
        "what another process is writing was removed: lock the folder for as long as it is written"
    )
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    write(folder)
    found = sorted(os.listdir(folder.parent))
    assert found == ["0123", "other"], (
        f"the cache holds {found}; what a killed process left should be removed by the next one"
    )


# --- 6. from a name to tokens ---------------------------------------------------------------------

TEXTS = ["To be, or not to be,\nthat is the question.\n", "naïve – 東京\n", "", "x" * 300]
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


def tokens_of_texts():
    files = {f"{index}.txt": text for index, text in enumerate(TEXTS)}
    top = folder_of(files)
    tokens, held_out, made = load(top)
    assert as_bytes(tokens) == ENDED, (
        f"the tokens are {as_bytes(tokens)[:60]}…; it should be {ENDED[:60]}…: each byte of a text "
        "is a token, and byte 0 comes after each document"
    )
    assert tokens.dtype == np.uint16, f"tokens are {tokens.dtype}; ids below 2**16 fit into uint16"
    assert held_out is None, "no text is named for validation: the second result is None"
    assert made == ["bytes"]
    again, _, made = load(top)
    assert np.array_equal(again, tokens) and not made, (
        "the same data set is tokenised anew; its tokens are in the cache"
    )
    (top / "4.txt").write_text("more")
    tokens, _, _ = load(top)
    assert as_bytes(tokens) == ENDED + b"more\0", (
        "a file was added, and the tokens are the old ones: `key` must change with the files"
    )
    both = folder_of({"train.txt": "to learn from", "val.txt": "to hold out"})
    tokens, held_out, _ = load(both)
    assert (as_bytes(tokens), as_bytes(held_out)) == (b"to learn from\0", b"to hold out\0")
    found, _, _ = load("random", "--vocab_size", "300")
    assert set(np.unique(found)) == set(range(300)), "random tokens should fill the vocabulary"
    refused(lambda: load(top, "--vocab_size", "100"), "--vocab_size 100", "--tokenizer_name")


def many_processes():
    import corpus

    rows = [text * 50 for text in TEXTS] * 60
    lines = "\n".join(json.dumps({"text": row}) for row in rows)
    with patch.object(corpus, "BATCH", 2**12):  # so that there are many
        tokens, _, _ = load(folder_of({"a.jsonl": lines}), "--num_proc", "2")
    assert as_bytes(tokens) == b"".join(row.encode() + b"\0" for row in rows), (
        "with --num_proc 2 the tokens are others; results must come in the order of the text"
    )


def on_several_ranks(name):
    tokens, _, made = load(name)
    return as_bytes(tokens), len(made)
