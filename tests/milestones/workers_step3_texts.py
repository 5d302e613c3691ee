"""What the checks of step 3's files and texts run in its processes."""

import gzip
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

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

KINDS = {
    "A.JSONL.gz": ("JSON", ".gz"),
    "a.txt": ("texts", ""),
    "a.parquet": ("parquet", ""),
    "a.parquet.gz": (None, ".gz"),  # packed inside, not as a whole
    "README.md": (None, ""),
}
SPLITS = {
    **{"train": "train", "Train-1.txt": "train", "test-00000-of-00002.parquet": "test"},
    **{"val.txt": "validation", "dev": "validation", "valid_1.txt": "validation"},
    **{"c4-train.00000-of-01024.json.gz": "train", "x_validation.0.txt": "validation"},
    **dict.fromkeys(["trainer.txt", "testament", "bullet_train.txt", "my-test.txt", "a.txt"]),
}
# files of a folder: (those to train on, those held out, those left out)
BY_SPLIT = {
    "train.txt val.txt test.txt": ("train.txt", "val.txt", "test.txt"),
    "train/a.txt dev/b.txt c.txt": ("train/a.txt", "dev/b.txt", "c.txt"),
    "bullet_train.txt test.txt": ("bullet_train.txt test.txt", "", ""),
    "a.txt validation.txt": ("a.txt validation.txt", "", ""),
    "x/train.txt y/test.txt": ("x/train.txt y/test.txt", "", ""),
}
# files of a folder: (kind, those to train on, those held out, words of the note)
CHOICES = [
    ("b.txt a.TXT c/d.txt.gz", "texts", "a.TXT b.txt c/d.txt.gz", "", ""),
    ("a.jsonl b.json", "JSON", "a.jsonl b.json", "", ""),
    ("a.txt README.md", "texts", "a.txt", "", "of another kind (README.md)"),
    ("a.txt .b.txt", "texts", "a.txt", "", "hidden (.b.txt)"),
    ("train.txt val.txt test.txt", "texts", "train.txt", "val.txt", "held out 1"),
    ("Train-1.txt dev.txt x.txt", "texts", "Train-1.txt", "dev.txt", "named for no split"),
    ("a-train.0-of-2.txt a-test.0-of-2.txt", "texts", "a-train.0-of-2.txt", "", "named test"),
]


def relative(top, *parts):
    """Lists of paths, each as a text of their names below a folder."""
    return tuple(" ".join(str(path.relative_to(top)) for path in part) for part in parts)


def names():
    """What a file's name says, and the names of its neighbours."""
    from collections import defaultdict

    from files import by_split, kind_of, split_of

    for name, due in KINDS.items():
        found = kind_of(name)
        assert found == due, f"kind_of({name!r}) is {found}; it should be {due}, in any case"
    for name, due in SPLITS.items():
        found = split_of(name)
        assert found == due, (
            f"split_of({name!r}) is {found}; it should be {due}: the name begins with a split's, "
            "which ends there, or has it inside before a number"
        )
    for files, due in BY_SPLIT.items():
        top, left_out = Path("top"), defaultdict(list)
        train, validation = by_split(top, [top / name for name in files.split()], left_out)
        found = relative(top, train, validation, [f for of in left_out.values() for f in of])
        assert found == due, (
            f"by_split trains on, holds out and leaves out of the files {files}: {found}; it "
            f"should be {due}: splits count beside one that is named train"
        )


def below():
    """All files below a folder, each once."""
    from collections import defaultdict

    from files import files_below, library_files

    top = folder_of({"a/b.txt": "x", "a/.c.txt": "x", "d.txt": "x"})
    (top / "0").symlink_to(top / "a")
    (top / "loop").symlink_to(top)
    left_out = defaultdict(list)
    try:
        (found,) = relative(top, files_below(top, left_out))
    except (OSError, RecursionError) as error:
        found = f"{error}"[:60]
    assert found == "a/b.txt d.txt", (
        f"files_below finds {found}; it should find a/b.txt d.txt: a file that links lead to again "
        "once, by its own path, and nothing that is hidden"
    )
    hidden = relative(top, left_out["hidden"])
    assert hidden == ("a/.c.txt",), f"files_below tells of the hidden files {hidden}, not a/.c.txt"
    files = [file for file in library_files() if "site-packages" in file.parts]
    assert not files, f"library_files has {len(files)} files of NOT_LIBRARY, as {files[0]}"


def chosen_files():
    from files import local_files

    for names, kind, train, validation, words in CHOICES:
        top = folder_of(dict.fromkeys(names.split(), "x"))
        found = local_files(str(top))
        read = relative(top, found.train, found.validation)
        assert (found.kind, *read) == (kind, train, validation), (
            f"local_files: of the files {names} it takes {read[0] or 'none'} for training and "
            f"holds out {read[1] or 'none'}, as {found.kind}; it should be {train}, "
            f"{validation or 'none'}, {kind}"
        )
        said = " ".join(found.notes)
        assert bool(words) == bool(said) and words in said, (
            f"decisions: of the files {names} it says “{said}”; it should "
            + (f"say {words}" if words else "say nothing, because everything is read")
        )
    library = local_files("python-stdlib")
    assert library.kind == "source" and any(f.name == "argparse.py" for f in library.train)
    kind = local_files("owner/name").kind
    assert kind == "hub", f"local_files: a name like owner/name is one on the hub, not {kind}"
    for files, words in (
        (None, "no such file"),
        ({"a.md": ""}, "no file with one of the endings"),
        ({"a.txt": "", "b.json": ""}, "name one kind"),
    ):
        name = "./not_there" if files is None else str(folder_of(files))
        refused(lambda name=name: local_files(name), "--dataset_name", words, by="local_files")


# --- 4. texts a piece at a time -------------------------------------------------------------------


def opened(name, column="text"):
    """What `open_texts` returns of a data set."""
    from files import local_files
    from texts import open_texts

    args = SimpleNamespace(dataset_name=str(name), text_column=column, dataset_config=None)
    return open_texts(args, local_files(str(name)))


def documents(name, how, column="text"):
    """The documents of a data set, put together from its pieces; how: the function that reads."""
    return joined(opened(name, column)[0], how)


def joined(texts, how):
    """The documents of `Texts`, put together from their pieces."""
    found, rest, read = [], "", []
    for text, ends in texts.pieces(read.append):
        assert isinstance(text, str), f"{how} yields {text!r}; a row without text is an empty one"
        rest += text
        if ends:
            found.append(rest)
            rest = ""
    assert not rest, f"{how}: the last document does not end: {rest!r:.40}"
    by = "read_rows" if how == "read_rows" else "read_files"
    assert sum(read) == texts.size, f"{by} tells a progress of {sum(read)}, of {texts.size} in all"
    return found


def readers():
    import pyarrow
    from pyarrow import parquet

    from errors import UserError

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
        "cut/c.txt": "go東".encode()[:-1],
        "cut/b.jsonl": lines + "\n{",
    })  # fmt: skip
    (top / "parquet").mkdir()
    rest = [os.urandom(2**19) for _ in rows]  # nobody reads that
    parquet.write_table(
        pyarrow.table({"n": [1, 2, 3], "text": rows, "rest": rest}), top / "parquet/a.parquet"
    )
    for name, due in {"a.txt": "one\r\n", "b.txt": long, "c.txt.gz": "packed"}.items():
        try:
            found = documents(top / name, "read_text")
        except UserError as error:
            found = [str(error)]
        assert found == [due], (
            f"read_text: {name} is read as {[one[:80] for one in found]}, not as {due[:20]!r}: a "
            "file is one document, without its byte order mark and else as it stands, also where "
            "a letter lies across two blocks"
        )
    for kind, how in READ_BY.items():
        found = documents(top / kind, how)
        assert found == ["one", "", "naïve – two"], (
            f"{how}: the {kind} of the texts {rows} are read as {found}; it should be a document "
            "each, empty for null"
        )
    for name, words, column in (
        ("cut/a.txt", ("a.txt, byte 5", "utf-8"), "text"),
        ("cut/c.txt", ("c.txt, byte 2", "utf-8"), "text"),
        ("cut/b.jsonl", ("b.jsonl, line 4",), "text"),
        ("rows", ("--text_column story", "'text'"), "story"),
        ("parquet", ("--text_column n", "no text there but int64"), "n"),
    ):
        how = {"a.txt": "read_text", "c.txt": "read_text", "b.jsonl": "json_values"}
        how = how.get(name[4:], READ_BY.get(name))
        refused(lambda name=name, column=column: documents(top / name, "", column), *words, by=how)


READ_BY = {"rows": "read_json", "list": "read_json", "parquet": "read_parquet"}


def of_datasets():
    """What `datasets` has saved: its splits, and an empty text for null."""
    import datasets

    top = tempfile.mkdtemp()
    parts = {"test": ["not read"], "train": ["one", None], "validation": ["held out"]}
    made = {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in parts.items()}
    datasets.DatasetDict(made).save_to_disk(top)
    train, held_out, notes = opened(top)
    for name, texts, due in (("train", train, ["one", ""]), ("validation", held_out, ["held out"])):
        found = None if texts is None else joined(texts, "read_rows")
        assert found == due, (
            f"open_dataset: of the splits {[*parts]} the texts of {name} are {found}, not {due}"
        )
    assert "left out test" in " ".join(notes), f"open_dataset says {notes}; test is left out"


def sliced():
    import texts

    with patch.object(texts, "SLICE", 10), patch.object(texts, "LONGEST_SLICE", 20):
        pieces = [("to be or no", False), ("t\0 to be", True), ("", True), ("x" * 50 + " y", True)]
        found = list(texts.slices(pieces))
    whole, rest = [], ""
    for text, ends in found:
        rest += text
        if ends:
            whole.append(rest)
            rest = ""
    assert whole == ["to be or not to be", "", "x" * 50 + " y"], (
        f"slices: put together they are {whole}; nothing may be lost or come again but NULs, and "
        "each document must end once"
    )
    longest = max(len(text) for text, _ in found)
    assert longest <= 20, f"slices: one has {longest} characters, over LONGEST_SLICE, 20"
    assert found[:2] == [("to be or not", False), (" to be", True)], (
        f"slices: “to be or no”, “t to be” is cut into {found[:2]} for a SLICE of 10; the cut "
        "should be before the first space from there on, wherever a piece ends, or a tokenizer "
        "that splits at spaces gives other tokens"
    )
