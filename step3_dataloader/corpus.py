"""From the name of a data set to one long array of tokens: load, tokenise once, keep the result.

`datasets` and `transformers` are imported by the one process that tokenises: they cost seconds
each, times the number of ranks.
"""

import hashlib
import json
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

import process_group as pg
from errors import UserError, in_one_line
from presets import PRESETS, hub_is_unreachable

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "four-d-from-scratch"
FORMAT = 1  # of the cache: another number makes all texts be tokenised anew
LOADERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SAVED_TO_DISK = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in its folder
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def load_tokens(args, world, device):
    """The tokens of `--dataset_name`, an array [tokens], the same on every rank.

    The first rank tokenises unless the cache has the result; the others wait and map the file.
    Raises UserError for a data set that is missing, unreadable or empty, and for a token id that
    the model's vocabulary does not have.
    """
    vocab_size = args.config.vocab_size
    if args.dataset_name == "random":
        size = max(2**22, 4 * args.tokens_per_step)
        return np.random.default_rng(args.seed).integers(vocab_size, size=size, dtype=np.uint32)
    folder = pg.from_first(world, lambda: tokenised(args))
    if pg.max_over_ranks([not folder.exists()], world, device):
        raise UserError(f"{folder} is not on every host: set XDG_CACHE_HOME to a shared folder")
    about = json.loads((folder / "about.json").read_text())
    if about["largest_id"] >= vocab_size:
        raise UserError(
            f"--vocab_size {vocab_size} (of --model_name {args.model_name}): the tokenizer "
            f"{about['tokenizer']} gave the id {about['largest_id']}; raise the one or change "
            "--tokenizer_name"
        )
    return np.load(folder / "tokens.npy", mmap_mode="r")


def tokenised(args):
    """Folder of the cache with the data set's tokens, made if it is not there yet."""
    files = local_files(args.dataset_name)
    tokenizer_name = tokenizer_of(args)
    key = [FORMAT, args.dataset_name, args.dataset_config, args.text_column, tokenizer_name]
    local = Path(tokenizer_name).is_dir()
    behind = [*files, *(sorted(Path(tokenizer_name).glob("*")) if local else [])]
    key += [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in behind]
    folder = CACHE / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    if not folder.exists():
        if not (files and (local or tokenizer_name == "bytes")):
            hub_is_unreachable()  # before the libraries that would go on asking are imported
        # Complete or absent: written aside, then renamed.
        with room_in_cache() as aside:
            tokenizer = load_tokenizer(tokenizer_name)
            texts = load_texts(args, files)
            part = Path(aside) / "part"
            part.mkdir()
            largest = write_tokens(encode(texts, tokenizer, args), part / "tokens.npy")
            about = {"dataset": args.dataset_name, "tokenizer": tokenizer_name}
            (part / "about.json").write_text(json.dumps({**about, "largest_id": largest}))
            try:
                part.rename(folder)
            except OSError:
                if not folder.exists():  # else another run was quicker
                    raise
    return folder


def room_in_cache():
    """A new folder in the cache, there while it is a context; raises UserError."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=CACHE)
    except OSError as error:
        remedy = "set XDG_CACHE_HOME to a folder that can be written"
        raise UserError(f"{CACHE}: {error.strerror}; {remedy}") from None


def tokenizer_of(args):
    """The tokenizer's name: the one given, or the model's own."""
    own = "bytes" if args.model_name in PRESETS else args.model_name
    return args.tokenizer_name or own


def local_files(name):
    """The files behind a data set's name, in order; none for a name on the hub.

    Raises UserError for what looks like a path and is not there, or holds no text.
    """
    if name == "python-stdlib":
        return library_files()
    path = Path(name).expanduser()
    if any((path / marker).exists() for marker in SAVED_TO_DISK):
        return sorted(file for file in path.rglob("*") if file.is_file())
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    known = [file for file in files if file.suffix in LOADERS]
    if len({LOADERS[file.suffix] for file in known}) > 1:
        raise UserError(f"--dataset_name {name}: texts, JSON and parquet together; name one kind")
    if path.exists() and not known:
        raise UserError(f"--dataset_name {name}: no file with one of the endings {[*LOADERS]}")
    if not path.exists() and (path.suffix in LOADERS or name.count("/") > 1 or name[0] in "./~"):
        raise UserError(f"--dataset_name {name}: there is no such file or directory")
    return known


def library_files():
    """The source files of the running interpreter's standard library, in order."""
    files = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - NOT_LIBRARY  # walk into the others only
        files += [Path(folder) / name for name in names if name.endswith(".py")]
    return sorted(files)


def load_texts(args, files):
    """The data set as `datasets.Dataset` with the texts in `--text_column`."""
    name, path = args.dataset_name, Path(args.dataset_name).expanduser()
    import datasets

    datasets.disable_caching()  # of intermediate results; ours is the one that is kept
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is ours to say
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if name == "python-stdlib":
            texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
            return datasets.Dataset.from_dict({args.text_column: texts})
        if any((path / marker).exists() for marker in SAVED_TO_DISK):
            found = datasets.load_from_disk(str(path))
        elif files:
            kind = LOADERS[files[0].suffix]
            whole = {"sample_by": "document"} if kind == "text" else {}
            found = datasets.load_dataset(kind, data_files=[*map(str, files)], **whole)
        else:
            found = datasets.load_dataset(name, args.dataset_config)
    except Exception as error:
        raise UserError(
            f"--dataset_name {name}: {in_one_line(error)} (mend it, or name a local file)"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    if args.text_column not in found.column_names:
        raise UserError(
            f"--text_column {args.text_column}: {name} has the columns {found.column_names}"
        )
    kind = getattr(found.features[args.text_column], "dtype", "nested")
    if kind not in ("string", "large_string", "null"):
        raise UserError(f"--text_column {args.text_column}: {name} has no text there but {kind}")
    return found


def load_tokenizer(name):
    """A `transformers` tokenizer: `bytes`, a directory, or a hub id."""
    if name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"--tokenizer_name {name}: {in_one_line(error)} (or use --tokenizer_name bytes)"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--tokenizer_name {name}: it has no end token to put between documents")
    return tokenizer


def byte_tokenizer():
    """256 symbols, each byte its own id; byte 0 ends a document and is dropped from texts.

    Byte-level BPE (GPT-2, section 2.2) without a single merge: the vocabulary is its alphabet,
    which writes each byte as one printable character.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols |= {chr(256 + index): byte for index, byte in enumerate(others) if byte}
    symbols["\0"] = 0  # by itself: as a printable character it would also match that character
    tokenizer = Tokenizer(models.BPE(vocab=symbols, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\0")


def encode(texts, tokenizer, args):
    """Tokenise every document and end it with the end token; a chunked Arrow array of lists."""

    def tokenise(batch):
        batch = [(text or "").replace("\0", "") for text in batch[args.text_column]]
        ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        return {"ids": [np.array([*i, tokenizer.eos_token_id], dtype=np.uint32) for i in ids]}

    if args.num_proc > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes instead of threads
    options = {"num_proc": args.num_proc} if args.num_proc > 1 else {}
    texts = texts.map(
        tokenise,
        batched=True,
        batch_size=100,
        remove_columns=texts.column_names,
        desc="tokenising",
        **options,
    )
    return texts.data.column("ids") if len(texts) else None


def write_tokens(documents, path):
    """Write all documents one after the other as a .npy of [tokens]; returns the largest id."""
    parts = [chunk.flatten().to_numpy() for chunk in documents.chunks] if documents else []
    largest = max((int(part.max()) for part in parts if len(part)), default=0)
    size = sum(map(len, parts))
    if not size:
        np.save(path, np.zeros(0, dtype=np.uint16))
        return largest
    dtype = np.uint16 if largest < 2**16 else np.uint32
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(size,))
    start = 0
    for part in parts:
        tokens[start : start + len(part)] = part
        start += len(part)
    tokens.flush()
    return largest
