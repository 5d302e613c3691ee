"""From the name of a data set to one long array of tokens: load, tokenise once, keep the result.

`datasets` and `transformers` are imported by the one process that tokenises: they cost seconds
each, times the number of ranks.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import process_group as pg
from errors import UserError, in_one_line, note
from files import local_files, shown
from prepared import mapped, prepared_text
from presets import PRESETS, hub_is_unreachable
from texts import open_texts, slices
from token_cache import (
    FILES,
    cache_folder,
    place_for_libraries,
    read_about,
    room_for,
    write_tokens,
)

FORMAT = 3  # of the cache: another number makes all texts be tokenised anew
BATCH = 2**18  # characters to tokenise at a time


def load_tokens(args, world, device):
    """(tokens of `--dataset_name` to train on, those to hold out or None), arrays [tokens].

    The same on every rank: the first one tokenises unless the cache has the result; the others
    wait and map the files. None: the data set names no text for validation. The name `random` is
    no text: here each rank draws ids by the seed, at least 4 steps of them.
    Raises UserError for a data set that is missing, unreadable or empty, and for a token id that
    the model's vocabulary does not have.
    """
    vocab_size = args.config.vocab_size
    if args.dataset_name == "random":  # to measure speed
        size = max(2**22, 4 * args.tokens_per_step)
        generator = np.random.default_rng(args.seed)
        return generator.integers(vocab_size, size=size, dtype=np.uint32), None
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
    return tuple(
        None if about[field] is None else mapped(folder, name) for field, name in FILES.items()
    )


def tokenised(args):
    """The folder of the cache with a data set's tokens, made if it is not there or not whole.

    In it about.json has the sha256 of the tokens, those to train on and then those to hold out, as
    they are stored. It says what a run is trained on: the same text elsewhere has the same one.
    """
    if (folder := prepared_text(args.dataset_name)) is not None:
        return folder
    files = local_files(args.dataset_name)
    for line in files.notes:
        note(line)
    tokenizer_name = tokenizer_of(args)
    folder = cache_folder() / key(args, files, tokenizer_name)
    about = read_about(folder)
    if about is None:
        place_for_libraries()
        if files.kind == "hub" or not (tokenizer_name == "bytes" or Path(tokenizer_name).is_dir()):
            # If nobody answers, this sets HF_HUB_OFFLINE, which the libraries read when they are
            # imported: then they use only their cache.
            hub_is_unreachable()
        about = {"dataset": args.dataset_name, "tokenizer": tokenizer_name}
        with room_for(folder) as unfinished:
            tokenizer = load_tokenizer(tokenizer_name)
            training, held_out, about["notes"] = open_texts(args, files)
            about |= tokenise([training, held_out], tokenizer, args.num_proc, unfinished)
            (unfinished / "about.json").write_text(json.dumps(about))
    for line in about["notes"]:
        note(line)
    return folder


def key(args, files, tokenizer_name):
    """A name for what is tokenised: another one when a file or the tokenizer may have changed.

    Of a data set or a tokenizer on the hub it knows only the name.
    """
    tokenizer = Path(tokenizer_name)
    lists = [files.train, files.validation]
    lists.append(sorted(tokenizer.glob("*")) if tokenizer.is_dir() else [])
    found = [FORMAT, args.dataset_name, args.dataset_config, args.text_column, tokenizer_name]
    for paths in lists:
        try:
            states = [(file, file.stat()) for file in paths]
        except OSError as error:
            raise UserError(f"{shown(error.filename)}: {error.strerror}") from None
        # The last is the time of any change, which no program can set back.
        times = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for _, s in states]
        names = [(str(file.absolute()), str(file.resolve())) for file, _ in states]
        found.append([*zip(names, times, strict=True)])
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def tokenizer_of(args):
    """The tokenizer's name: the one given, or the model's own."""
    own = "bytes" if args.model_name in PRESETS else args.model_name
    return args.tokenizer_name or own


def load_tokenizer(name):
    """A `transformers` tokenizer: `bytes`, a directory, or a hub id."""
    if name == "bytes":
        return byte_tokenizer()
    check_packages(name)
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


def check_packages(name):
    """Raise UserError for a directory with a bare `tokenizer.model` that no package here reads."""
    if [file.name for file in Path(name).glob("tokenizer.*")] != ["tokenizer.model"]:
        return  # a tokenizer.json, or a name on the hub
    with open(Path(name) / "tokenizer.model", "rb") as file:
        sentencepiece = file.read(1) == b"\n"  # its files begin so; Llama 3's is lines of text
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google"}
    modules = modules if sentencepiece else {"tiktoken": "tiktoken"}
    missing = [package for package, module in modules.items() if find_spec(module) is None]
    if missing:
        raise UserError(
            f"--tokenizer_name {name}: to read its tokenizer.model, pip install {' '.join(missing)}"
        )


def byte_tokenizer():
    """256 symbols, each byte its own id; byte 0 ends a document. (`slices` drops it from texts.)

    Byte-level BPE (byte pair encoding; GPT-2, section 2.2) writes each byte as one visible letter:
    bytes that cannot be printed get the letters from 256 on. BPE would then merge letters to longer
    symbols; without merges each letter stays a symbol.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    symbols |= {chr(256 + index): byte for index, byte in enumerate(others) if byte}
    # Not "Ā", the letter of byte 0: the end token is looked for in the text itself, before its
    # bytes become letters. So an Ā in a text would be read as the end token.
    symbols["\0"] = 0
    tokenizer = Tokenizer(models.BPE(vocab=symbols, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="\0")


def tokenise(parts, tokenizer, num_proc, folder):
    """Write the tokens of a pair of `Texts` into a folder; returns what about.json says of them."""
    from tqdm import tqdm

    small = max(tokenizer.get_vocab().values()) < 2**16
    dtype = np.uint16 if small else np.uint32
    encode = partial(
        encode_batch, ids_of=encoder(tokenizer), end=[tokenizer.eos_token_id], dtype=dtype
    )
    digest, about = hashlib.sha256(), {"largest_id": 0, "bytes": {}}
    for (field, name), texts in zip(FILES.items(), parts, strict=True):
        about[field] = None
        if texts is not None:
            bar = {"total": texts.size, "unit": texts.unit, "unit_scale": True}
            with tqdm(desc="tokenising", disable=None, **bar) as progress:
                found = counted(slices(texts.pieces(progress.update)), about["bytes"], field)
                batches = cut_batches(found)
                arrays = in_processes(num_proc, encode, batches)
                about[field], largest = write_tokens(arrays, folder / name, dtype, digest)
            about["largest_id"] = max(about["largest_id"], largest)
    return {**about, "sha256": digest.hexdigest()}


def counted(found, sizes, field):
    """The same slices; their bytes in UTF-8 go to sizes[field]."""
    sizes[field] = 0
    for text, ends in found:
        sizes[field] += len(text.encode())
        yield text, ends


def cut_batches(found):
    """Lists of slices that go to the tokenizer together: many, so that its threads all work."""
    batch, size = [], 0
    for text, ends in found:
        batch.append((text, ends))
        size += len(text) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def encoder(tokenizer):
    """A function from texts to lists of ids: no cutting, no padding, no ids added.

    By the `tokenizers` library itself where it can be: `transformers` would also make masks.
    A "</s>" in a text becomes the special token, unless `split_special_tokens` is set.
    """
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return lambda texts: [
        found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)
    ]


def encode_batch(batch, ids_of, end, dtype):
    """The tokens of a list of (slice, whether a document ends with it), an array [tokens].

    ids_of: from a list of texts to their lists of ids. end: [the id after a document].
    """
    ids = ids_of([text for text, _ in batch]) if batch else []
    ended = ([*one, *end] if ends else one for one, (_, ends) in zip(ids, batch, strict=True))
    return np.fromiter(itertools.chain.from_iterable(ended), dtype)


def in_processes(count, function, batches):
    """map(function, batches), in order; by `count` processes where that is more than one."""
    if count == 1:
        yield from map(function, batches)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes instead of threads
    fork = multiprocessing.get_context("fork")  # so the tokenizer is there, not sent
    with ProcessPoolExecutor(count, fork, begin_work, (function,)) as pool:
        waiting = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(work, batch))
                if len(waiting) > 4 * count:  # no more of the text than that is in memory
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"--num_proc {count}: one of these processes was killed, as happens where memory "
                "runs out; lower it"
            ) from None


def begin_work(function):
    """In a process that tokenises: leave signals to its parent, and end when that one ends."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    global tokenise_batch
    tokenise_batch = function


def work(batch):
    return tokenise_batch(batch)
