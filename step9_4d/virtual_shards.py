"""A data set dealt out to 64 virtual shards, whose documents are read from any place on.

Which documents a shard has depends on the files alone, never on the ranks that read them.
"""

import codecs
import hashlib
from collections import deque, namedtuple
from functools import partial

from errors import UserError, note
from files import kind_of, local_files, shown
from texts import (
    BLOCK,
    READERS,
    ROWS,
    NoText,
    check_column,
    json_values,
    load_splits,
    text_of,
    told_of,
    unpack,
)

SHARDS = 64

# Where a sequence begins. `files` of the shard were read to their end, over all epochs. In the next
# one its document begins at a row and a byte, and `tokens` of the document lie before.
Place = namedtuple("Place", "files row byte tokens")
START = Place(0, 0, 0, 0)


# --- rows of a file, from a place on --------------------------------------------------------------

# Each yields (row, byte, text) of a shard's own rows, from a row on, which begins at a byte. Rows
# `own[0]`, `own[0] + own[1]`, … are its own. `where` gets what an error names: {"line": 3}.


def rows_of_text(stream, where, column, row, byte, own, kind="texts"):
    """A file that is one document, row 0."""
    if own[0] == 0:
        yield 0, 0, "".join(text for text, _ in READERS[kind](stream, where, column))


def rows_of_json(stream, where, column, row, byte, own):
    """A file with an object a line. Lines of others are counted, and not looked at."""
    left = byte
    while passed := stream.read(min(left, BLOCK)):
        left -= len(passed)
    if left:
        raise ValueError("the file is shorter than it was")
    for number, line in enumerate(stream, row):
        if number % own[1] == own[0]:
            where["line"] = number + 1
            begin = line.strip(codecs.BOM_UTF8 + b" \t\r\n")
            if begin[:1] == b"[" or begin == b"{":
                raise ValueError("no whole object in the line; --streaming reads one a line")
            for value in json_values([line], where, number + 1):
                text = text_of(value, column)
                if number == own[0] and column not in value:
                    raise NoText(f"the columns are {[*value]}")
                yield number, byte, text
        byte += len(line)


def rows_of_parquet(stream, where, column, row, byte, own):
    """A file of rows. Groups of rows that lie before the place are not read."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stream, buffer_size=BLOCK, pre_buffer=False)
    check_column(file.schema_arrow, column)
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if first + count > row:
            batches = file.iter_batches(ROWS, row_groups=[group], columns=[column])
            yield from rows_of_tables(batches, where, column, first, row, own)
        first += count


def rows_of_tables(tables, where, column, first, row, own):
    """Arrow tables, of which the first one begins with row `first`."""
    for table in tables:
        check_column(table.schema, column)
        texts, end = table.column(column), first + len(table)
        begin = max(first, row)
        for number in range(begin + (own[0] - begin) % own[1], end, own[1]):
            where["row"] = number + 1
            yield number, 0, texts[number - first].as_py() or ""
        first = end


def rows_of_dataset(part, where, column, row, byte, own):
    """A part of a data set that `datasets` streams: it reads on to the row."""
    tables = part().skip(row).with_format("arrow").iter(ROWS)
    yield from rows_of_tables(tables, where, column, row, row, own)


ROWS_OF = {
    "texts": rows_of_text,
    "source": partial(rows_of_text, kind="source"),
    "JSON": rows_of_json,
    "parquet": rows_of_parquet,
}


# --- documents of a shard -------------------------------------------------------------------------


class Source:
    """The files of a data set, and the documents of its shards. Raises UserError, as reading does.

    With 64 files or more, shard v has the files v, v + 64, …; with fewer, some shards share a
    file, and take its rows in turns.
    """

    def __init__(self, args):
        self.args, files = args, local_files(args.dataset_name)
        self.kind, self.notes, self.told = files.kind, files.notes, False
        self.train, self.validation = files.train, files.validation
        self.known_by = [(file.name, file.stat().st_size) for file in files.train]
        if self.kind in ("hub", "saved"):
            train, validation, self.notes = load_splits(args, self.kind, streaming=True)
            self.train, self.validation = parts_of(train), parts_of(validation)
            size = train.info.dataset_size
            self.known_by += [(args.dataset_name, args.dataset_config, len(self.train), size)]

    def rows(self, file, row, byte, own):
        """The rows of one of the files, by the reader of its kind."""
        column = self.args.text_column
        if callable(file):
            with told_of(self.args.dataset_name, where := {}, self.args):
                yield from rows_of_dataset(file, where, column, row, byte, own)
            return
        with told_of(file, where := {}, self.args), open(file, "rb", BLOCK) as stream:
            stream = unpack(stream, kind_of(file.name)[1])
            yield from ROWS_OF[self.kind](stream, where, column, row, byte, own)

    def files_of(self, shard):
        """(The files of a shard, the `own` of its rows in them)."""
        groups = min(SHARDS, len(self.train))
        own = shard // groups, len(range(shard % groups, SHARDS, groups))
        return self.train[shard % groups :: groups], own

    def epoch(self, shard, place=START):
        """Yield (Place, text) of the documents of a shard, from a place to the end of its epoch."""
        files, own = self.files_of(shard)
        before = place.files - place.files % len(files)  # in the epochs that are over
        begin = place.row, place.byte
        for count in range(place.files, before + len(files)):
            for row, byte, text in self.rows(files[count - before], *begin, own):
                yield Place(count, row, byte, 0), text
            begin = 0, 0

    def documents(self, shard, place=START):
        """Yield (Place, text) of what a shard trains on; after its end it begins again."""
        idle, count = 0, len(self.files_of(shard)[0])
        while idle < 2:  # the first epoch may begin near its end
            idle += 1
            epoch = self.epoch(shard, place)
            for place, text in epoch:
                if self.validation or not is_held_out(text):
                    idle = 0
                    yield place, text
            place = Place((place.files // count + 1) * count, 0, 0, 0)
            if not idle and not self.told:
                self.told = True
                note("--streaming: a shard is at its end, and begins again in the same order")
        raise UserError(
            f"--dataset_name {shown(self.args.dataset_name)}: too few documents for --streaming: "
            f"shard {shard} of {SHARDS} has none to train on; leave --streaming out"
        )

    def held_out(self):
        """Yield the texts to hold out: those for validation, or else of all shards in turns."""
        for file in self.validation:
            yield from (text for _, _, text in self.rows(file, 0, 0, (0, 1)))
        turns = deque(() if self.validation else map(self.epoch, range(SHARDS)))
        while turns:
            _, text = next(turns[0], (None, None))
            turns.rotate(-1)
            if text is None:
                turns.pop()
            elif is_held_out(text):
                yield text


def parts_of(dataset):
    """What a `datasets` data set is read by, as functions that open a part; [] for None."""
    if dataset is None:
        return []
    if hasattr(dataset, "to_iterable_dataset"):  # one that `save_to_disk` wrote
        dataset = dataset.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(dataset))))
    count = dataset.num_shards
    return [partial(dataset.shard, num_shards=count, index=index) for index in range(count)]


def is_held_out(text):
    """One document in 64, by nothing but its text."""
    return hashlib.sha256(text.encode()).digest()[-1] % 64 == 0
