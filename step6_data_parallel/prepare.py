"""From raw texts to a folder that trains: a tokenizer, tokens in shards, and what they are.

    python prepare.py --input_dir raw --output_dir processed --tokenizer_type bpe --vocab_size 32000
    python train.py --dataset_name processed

What is there is complete: until then it lies beside the folder, in one whose name begins with a
dot. The same command again goes on where the last one was stopped.
"""

from errors import ArgumentParser, UserError, note, positive_int, run  # first: see errors.py

# isort: split
import argparse
import functools
import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpus import cut_batches, encode_batch, encoder, in_processes, key, load_tokenizer
from files import local_files, shown
from own_tokenizers import KINDS, make_tokenizer
from presets import hub_is_unreachable
from text_names import parts_of, weights_of
from texts import open_texts, slices
from token_cache import FILES, lock, place_for_libraries, unlock, write_tokens

FORMAT = 1  # another number makes what was left unfinished be made anew
SHARD_BYTES = 2**28  # of text in a file of tokens, and a little more


def in_our_words(function):
    """Let errors name the flag that this program has for a data set."""

    @functools.wraps(function)
    def wrapper(given):
        try:
            return function(given)
        except UserError as error:
            raise UserError(str(error).replace("--dataset_name", "--input_dir")) from None

    return wrapper


@in_our_words
def parse_args(argv):
    """Read the command line; raises UserError."""
    parser = ArgumentParser(description="Tokenise texts: see PREPARE.md.", allow_abbrev=False)
    parser.add_argument("--input_dir", required=True, help="file, folder, hub id, mix")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dataset_config", help="of a data set on the hub")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--tokenizer_type", choices=KINDS, help="which one to make")
    parser.add_argument("--tokenizer_name", help="one that is there; with tiktoken: its encoding")
    parser.add_argument("--vocab_size", type=positive_int, help="at most; default: 32000")
    parser.add_argument("--num_proc", type=positive_int, default=1, help="tokenising processes")
    args = parser.parse_args(argv)
    trains = args.tokenizer_type in ("bpe", "wordpiece")
    if args.tokenizer_name and args.tokenizer_type not in (None, "tiktoken"):
        raise UserError(
            f"--tokenizer_name {args.tokenizer_name} with --tokenizer_type {args.tokenizer_type}: "
            "take one that is there, or make one; leave one out"
        )
    if args.tokenizer_name is None and args.tokenizer_type is None:
        raise UserError(f"--tokenizer_type: choose one of {', '.join(KINDS)}, or --tokenizer_name")
    if args.vocab_size is not None and not trains:
        raise UserError("--vocab_size: only for --tokenizer_type bpe or wordpiece; leave it out")
    args.vocab_size = args.vocab_size or 32_000
    if args.tokenizer_type == "bpe" and args.vocab_size < 257:
        raise UserError(
            f"--vocab_size {args.vocab_size}: 256 bytes and an end are 257; choose more"
        )
    args.dataset_name = args.input_dir  # as train.py calls it
    args.texts = parts_of(weights_of(args.input_dir), args.input_dir)
    for name in args.texts:
        if name == "random":
            raise UserError("--dataset_name random: that is no text; name one")
        local_files(name)  # raises for a path that is not there
    return args


@in_our_words
def main(args):
    output = Path(args.output_dir).expanduser()
    if output.exists():
        raise UserError(f"--output_dir {shown(output)}: it is there already; name another one")
    aside = output.with_name(f".{output.name}.unfinished")
    aside.mkdir(parents=True, exist_ok=True)
    held = lock(aside)
    if held is None:
        raise UserError(f"--output_dir {shown(output)}: another process prepares it; wait for it")
    try:
        metadata = prepare(args, aside)
        aside.rename(output)
        (output / "plan.json").unlink()
    finally:
        unlock(held)
    print(
        f"{shown(output)}: {metadata['documents']:,} documents, {metadata['tokens']:,} tokens of "
        f"{metadata['bytes_per_token']:.2f} bytes, a vocabulary of {metadata['vocab_size']:,}"
    )


def prepare(args, aside):
    """Put all into a folder, and go on with what is there; returns what metadata.json says."""
    place_for_libraries()
    if args.tokenizer_name or any(local_files(name).kind == "hub" for name in args.texts):
        hub_is_unreachable()  # sets HF_HUB_OFFLINE, before the libraries are imported
    begin(args, aside)
    tokenizer = tokenizer_in(args, aside)
    parts = {}
    for number, (name, part) in enumerate(args.texts.items()):
        folder = f"{number}_{re.sub(r'[^A-Za-z0-9.-]', '_', Path(name).stem)}"
        prepare_text(named(args, name), tokenizer, aside / folder)
        parts[folder] = part
    metadata = metadata_of(aside, parts, tokenizer)
    write_whole(aside / "metadata.json", metadata)
    return metadata


def named(args, name):
    """The arguments with the name of one text."""
    return argparse.Namespace(**{**vars(args), "dataset_name": name})


def begin(args, aside):
    """Keep what another call of the same command has left; remove what another command has."""
    keys = [
        key(named(args, name), local_files(name), str(args.tokenizer_name)) for name in args.texts
    ]
    plan = [FORMAT, SHARD_BYTES, args.tokenizer_type, args.vocab_size, args.texts, keys]
    there, left = aside / "plan.json", [*aside.iterdir()]
    if there.exists() and json.loads(there.read_text()) == plan:
        note(f"going on with what is in {shown(aside)}")
        return
    if {path.name for path in left} - {"plan.part"} and not there.exists():
        raise UserError(f"{shown(aside)}: it is needed to work in, and has other files: move them")
    write_whole(there, None)  # until all is removed: what is here is ours, but of no use
    for path in left:
        if path != there:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_whole(there, plan)


def tokenizer_in(args, aside):
    """The tokenizer of the folder, made if it is not there."""
    folder, unfinished = aside / "tokenizer", aside / "tokenizer.part"
    if not folder.exists():
        found = make_tokenizer(args, lambda: training_texts(args))
        shutil.rmtree(unfinished, ignore_errors=True)
        found.save_pretrained(unfinished)
        unfinished.rename(folder)
    return load_tokenizer(str(folder))


def training_texts(args):
    """Lists of pieces of all texts, to train a tokenizer on."""
    for name in args.texts:
        text, _, _ = open_texts(named(args, name), local_files(name))
        with bar("reading", text) as progress:
            for batch in cut_batches(slices(text.pieces(progress.update))):
                yield [piece for piece, _ in batch]


def bar(what, text):
    """A progress bar over a `Texts`."""
    return tqdm(total=text.size, unit=text.unit, unit_scale=True, desc=what, disable=None)


def prepare_text(args, tokenizer, folder):
    """Write the tokens of one text into shards, and about.json when all are there."""
    if (folder / "about.json").exists():
        return
    folder.mkdir(exist_ok=True)
    files = local_files(args.dataset_name)
    training, held_out, notes = open_texts(args, files)
    about = {"dataset": args.dataset_name, "tokenizer": "tokenizer", "bytes": {}, "files": {}}
    about |= {"notes": [*files.notes, *notes], "documents": 0, "largest_id": 0}
    for line in about["notes"]:
        note(line.replace("--dataset_name", "--input_dir"))
    digest = hashlib.sha256()
    for (field, name), text in zip(FILES.items(), (training, held_out), strict=True):
        about[field] = None
        if text is not None:
            shards = write_shards(args, tokenizer, text, folder / name)
            about[field] = sum(shard["tokens"] for shard in shards)
            about["bytes"][field] = sum(shard["bytes"] for shard in shards)
            about["documents"] += sum(shard["documents"] for shard in shards)
            about["largest_id"] = max(about["largest_id"], *(s["largest_id"] for s in shards))
            for shard in shards:
                about["files"][shard["file"]] = shard["sha256"]
                digest.update(shard["sha256"].encode())
    about["sha256"] = digest.hexdigest()
    write_whole(folder / "about.json", about)


def write_shards(args, tokenizer, text, path):
    """Write the shards of a `Texts` beside a path; what is said of each, a list of dicts.

    A shard that is there has a .json beside it, and is not made again. Its text is read again, as
    far as it is needed to find the place where the next one begins.
    """
    shards = []
    with bar("tokenising", text) as progress:
        found = slices(text.pieces(progress.update))
        while True:
            file = path.with_name(f"{path.stem}_{len(shards):05d}.npy")
            said = file.with_suffix(".json")
            if said.exists():
                shards.append(json.loads(said.read_text()))
                for _ in itertools.islice(found, shards[-1]["slices"]):
                    pass
            else:
                shards.append(write_shard(args, tokenizer, found, file))
                write_whole(said, shards[-1])
            if shards[-1]["last"]:
                return shards


def write_shard(args, tokenizer, found, file):
    """Write one shard of the slices that come; returns what is said of it, a dict."""
    small = max(tokenizer.get_vocab().values()) < 2**16
    dtype = np.uint16 if small else np.uint32
    encode = functools.partial(
        encode_batch, ids_of=encoder(tokenizer), end=[tokenizer.eos_token_id], dtype=dtype
    )
    about = {"file": file.name, "slices": 0, "documents": 0, "bytes": 0, "last": False}
    digest = hashlib.sha256()
    batches = shard_of(found, about)
    tokens, largest = write_tokens(
        in_processes(args.num_proc, encode, batches), file, dtype, digest
    )
    return {**about, "tokens": tokens, "largest_id": largest, "sha256": digest.hexdigest()}


def shard_of(found, about):
    """Batches of slices until they are SHARD_BYTES of text; counts what they are."""
    for batch in cut_batches(found):
        about["slices"] += len(batch)
        about["documents"] += sum(ends for _, ends in batch)
        about["bytes"] += sum(len(piece.encode()) for piece, _ in batch)
        yield batch
        if about["bytes"] >= SHARD_BYTES:
            return
    about["last"] = True


def write_whole(file, content):
    """Write JSON so that the file is there whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(file)


def metadata_of(aside, parts, tokenizer):
    """What metadata.json says: all texts together, and each."""
    about = {folder: json.loads((aside / folder / "about.json").read_text()) for folder in parts}
    tokens = sum(one["tokens"] + (one["held_out"] or 0) for one in about.values())
    size = sum(sum(one["bytes"].values()) for one in about.values())
    symbols = aside / "tokenizer" / "tokenizer.json"
    files = sorted(symbols.parent.iterdir())
    rules = [symbols] if symbols.exists() else files
    digest = hashlib.sha256(f"{tokenizer.eos_token_id}".encode())
    for file in rules:
        digest.update(file.read_bytes())
    return {
        "prepared": parts,
        "tokenizer": digest.hexdigest(),
        "tokenizer_files": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        },
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "documents": sum(one["documents"] for one in about.values()),
        "tokens": tokens,
        "bytes": size,
        "bytes_per_token": size / max(1, tokens),
        "texts": about,
    }


if __name__ == "__main__":
    run(main, parse_args)
