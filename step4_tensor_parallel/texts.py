"""The texts of a data set, read a piece at a time: none has to fit into memory.

`datasets` reads what is on the hub or was saved by it; files we read ourselves, so that an error
can name the file and the place, and only the text column is looked at.
"""

import bz2
import codecs
import errno
import gzip
import io
import json
import lzma
import os
import re
import sys
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from errors import UserError, in_one_line
from files import VALIDATION, kind_of, shown

BLOCK = 2**18  # bytes of a text file to read at a time
SLICE = 2**12  # characters, or a little more
LONGEST_SLICE = 2**16
WORD_ENDS = re.compile(r"\S ")  # the last letter of a word, and the space after it
ROWS = 100  # of a table to read at a time
LOOKED_AT = 1000  # objects without the text column: then we stop
JSON_TYPES = {int: "int64", float: "double", bool: "bool", list: "list", dict: "struct"}

# How much there is to read, in which unit, and a function that reads it and reports progress; it
# yields (text, whether a document ends there).
Texts = namedtuple("Texts", "size unit pieces")


def open_texts(args, files):
    """(Texts to train on, Texts to hold out or None, notes on the choice of a split).

    Raises UserError for what is missing or has no text in `--text_column`; so does reading them.
    """
    if files.kind in ("hub", "saved"):
        return open_dataset(args, files.kind)
    parts = (files.train, files.validation)
    train, validation = (
        Texts(
            sum(file.stat().st_size for file in part),
            "B",
            partial(read_files, part, files.kind, args),
        )
        for part in parts
    )
    return train, (validation if files.validation else None), []


def slices(pieces):
    """Cut long documents into slices, (text, whether a document ends with it), without NULs.

    A cut is before a space, and of several spaces before the first, so that tokenizers that split
    at white space give the same tokens. Where LONGEST_SLICE characters have none, it cuts there.
    """
    rest = ""
    for text, ends in pieces:
        rest += text.replace("\0", "")
        start = 0
        # While the document goes on, wait for the whole range in which a cut may be. Otherwise the
        # cut would depend on where a piece ends.
        while len(rest) - start > (SLICE if ends else LONGEST_SLICE):
            # The last of SLICE characters may be the letter that is found. The cut is behind it.
            found = WORD_ENDS.search(rest, start + SLICE - 1, start + LONGEST_SLICE)
            end = found.end() - 1 if found else start + LONGEST_SLICE
            yield rest[start:end], False
            start = end
        rest = rest[start:]
        if ends:
            yield rest, True
            rest = ""


# --- files ----------------------------------------------------------------------------------------


class NoText(Exception):
    """The text column is not there, or is none of text."""


class Counted(io.FileIO):
    """A file that reports how many of its bytes were read, never more than its size."""

    def __init__(self, path, progress):
        super().__init__(path)
        self.left, self.progress = os.fstat(self.fileno()).st_size, progress

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.advance(count)
        return count

    def advance(self, count):
        count = min(count, self.left)
        self.left -= count
        self.progress(count)


@contextmanager
def told_of(file, place, args):
    """Make a UserError of what goes wrong: it names the file and the place in it, {"line": 3}."""
    try:
        yield
    except Exception as error:
        where = shown(file) + "".join(f", {unit} {number}" for unit, number in place.items())
        what, remedy = f"--text_column {args.text_column}", ""
        if not isinstance(error, NoText):
            what = f"--dataset_name {shown(args.dataset_name)}"
            remedy = " (mend the file, or take it away)"
        raise UserError(f"{what}: {where}: {in_one_line(error)}{remedy}") from None


def read_files(files, kind, args, progress):
    """The pieces of the documents in some files; a UserError names the file and the place in it."""
    for file in files:
        with told_of(file, place := {}, args), Counted(file, progress) as counted:
            stream = unpack(io.BufferedReader(counted, BLOCK), kind_of(file.name)[1])
            yield from READERS[kind](stream, place, args.text_column)
            counted.advance(counted.left)  # what needed no reading


def unpack(stream, packing):
    """The stream of what is in a packed one."""
    if packing == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"), BLOCK)
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return io.BufferedReader(openers[packing](stream), BLOCK) if packing else stream


def read_text(stream, place, column, errors="strict"):
    """A file that is one document."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    read = 0
    while True:
        block = stream.read(BLOCK)
        place["byte"] = read - len(decoder.getstate()[0])  # a letter may have begun before
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place["byte"] += error.start
            raise ValueError(not_utf8(error)) from None
        if not block:
            yield text, True
            return
        yield text if read else text.removeprefix("\ufeff"), False
        read += len(block)


def not_utf8(error):
    return f"0x{error.object[error.start]:02x} is not utf-8 ({error.reason})"


def read_json(stream, place, column):
    """A file of JSON objects, a document each."""
    first, found = None, False
    for number, row in enumerate(json_values(stream, place)):
        text = text_of(row, column)
        first = row if first is None else first
        found = found or column in row
        if not found and number == LOOKED_AT:
            break
        yield text, True
    if first is not None and not found:
        place.clear()  # it is the whole file
        raise NoText(f"the columns are {[*first]}")


def text_of(row, column):
    """The text in a JSON object; an empty one for null, or where the column is not there."""
    if not isinstance(row, dict):
        raise ValueError(f"no object but {row!r:.40}")
    text = row.get(column)
    if not isinstance(text, str | None):
        raise NoText(f"no text there but {JSON_TYPES[type(text)]}")
    (text or "").encode()  # raises for half a surrogate pair, "\\ud800"
    return text or ""


def json_values(stream, place, first=1):
    """The values in a file of JSON lines, or in one that is a list; first: number of a line."""

    def parse(text):
        try:
            return json.loads(text.decode())
        except UnicodeDecodeError as error:
            place["line"] += text.count(b"\n", 0, error.start)
            raise ValueError(not_utf8(error)) from None
        except json.JSONDecodeError as error:
            place["line"] += error.lineno - 1
            raise ValueError(f"{error.msg} (column {error.colno})") from None

    begun = False
    for number, line in enumerate(stream, first):
        line = line.removeprefix(codecs.BOM_UTF8 * (number == 1)).strip()
        if not line:
            continue
        place["line"] = number
        # A list, or a line that is only "{": one value over all lines.
        if not begun and (line[:1] == b"[" or line == b"{"):
            whole = parse(line + b"\n" + stream.read())
            for index, value in enumerate(whole if isinstance(whole, list) else [whole]):
                place["object"] = index + 1
                yield value
            return
        begun = True
        yield parse(line)


def read_parquet(stream, place, column):
    """A file of rows, a document each; of the other columns only the names are read."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stream)
    check_column(file.schema_arrow, column)
    place["row"] = 0
    for rows in file.iter_batches(ROWS, columns=[column]):
        for text in rows.column(0):
            place["row"] += 1
            yield text.as_py() or "", True


READERS = {
    "texts": read_text,
    "source": partial(read_text, errors="ignore"),
    "JSON": read_json,
    "parquet": read_parquet,
}


def check_column(schema, column):
    """Raise NoText unless a column of an Arrow schema is text."""
    if column not in schema.names:
        raise NoText(f"the columns are {schema.names}")
    kind = schema.field(column).type
    # A dictionary has each text once, and a number for each row: here the texts' type counts.
    kind = str(getattr(kind, "value_type", kind) if "dictionary" in str(kind) else kind)
    if kind not in ("string", "large_string", "string_view", "null"):
        raise NoText(f"no text there but {kind}")


# --- what `datasets` reads ------------------------------------------------------------------------


def load_splits(args, kind, **options):
    """(the split to train on, the one to hold out or None, notes), as `datasets` has them."""
    import datasets

    name = shown(args.dataset_name)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is ours to say
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if kind == "saved":
            found = datasets.load_from_disk(str(Path(args.dataset_name).expanduser()))
        else:
            found = datasets.load_dataset(args.dataset_name, args.dataset_config, **options)
    except Exception as error:
        said, remedy = in_one_line(error), "mend it, or name a local file"
        if os.strerror(errno.ENOSPC) in said:
            remedy = "set HF_HOME to a folder with room"
        raise UserError(f"--dataset_name {name}: {said} ({remedy})") from None
    if not isinstance(found, dict):
        return found, None, []
    if not found:
        raise UserError(f"--dataset_name {name}: it has no split")
    train = "train" if "train" in found else [*found][0]
    names = [split for split in VALIDATION if split in found and train == "train"][:1]
    rest = [split for split in found if split not in (train, *names)]
    words = [f"trained on the split {train}", *(f"held out the split {split}" for split in names)]
    words += [f"left out {', '.join(rest)}"] * bool(rest)
    notes = [] if [*found] == ["train"] else [f"--dataset_name {name}: {'; '.join(words)}"]
    return found[train], found[names[0]] if names else None, notes


def open_dataset(args, kind):
    """`open_texts` of a data set on the hub, or of a folder that `save_to_disk` wrote."""
    train, validation, notes = load_splits(args, kind)
    splits = [split for split in (train, validation) if split is not None]
    with told_of(args.dataset_name, {}, args):
        for split in splits:
            check_column(split.features.arrow_schema, args.text_column)
    parts = [Texts(len(s), " rows", partial(read_rows, s, args.text_column)) for s in splits]
    return parts[0], None if validation is None else parts[1], notes


def read_rows(dataset, column, progress):
    """The pieces of the documents of a `datasets.Dataset`."""
    for rows in dataset.select_columns([column]).with_format("arrow").iter(ROWS):
        for text in rows.column(0):
            yield text.as_py() or "", True
        progress(len(rows))
