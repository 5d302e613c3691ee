"""What the checks of prepare.py run, in a process that has imported the libraries already."""

import contextlib
import io
import json
from unittest.mock import patch

import numpy as np


def prepare(argv, shard_bytes=2**28, stop_after=None):
    """(the error or None, what was said) of one call; it can be cut off before a shard."""
    import corpus
    import prepare
    from errors import UserError

    write, count = prepare.write_shard, iter(range(1000))

    def writing(*rest):
        if next(count) == stop_after:
            raise KeyboardInterrupt
        return write(*rest)

    said = io.StringIO()
    changed = patch.multiple(prepare, SHARD_BYTES=shard_bytes, write_shard=writing)
    small = patch.object(corpus, "BATCH", min(corpus.BATCH, shard_bytes // 2))
    with contextlib.redirect_stdout(said), changed, small:
        try:
            prepare.main(prepare.parse_args([str(part) for part in argv]))
            error = None
        except (UserError, KeyboardInterrupt) as raised:
            error = str(raised) or "stopped"
    return error, said.getvalue()


def removed_until(argv, name):
    """A call that is killed when it is to remove a folder of that name: "killed"."""
    import prepare

    remove = prepare.shutil.rmtree

    def removing(path, *rest, **options):
        if path.name == name:
            raise KeyboardInterrupt
        remove(path, *rest, **options)

    try:
        with patch.object(prepare.shutil, "rmtree", removing):
            prepare.main(prepare.parse_args([str(part) for part in argv]))
    except KeyboardInterrupt:
        return "killed"


def loaded(name, *flags):
    """[(tokens, held out or None, about)] of the texts of a run, its vocabulary; or an error."""
    import torch

    import process_group as pg
    import train
    from errors import UserError

    try:
        args = train.parse_args(["--dataset_name", str(name), *flags])
        pg.init_processes("cpu")
        texts = train.load_texts(args, pg.Mesh(dp=1).world, torch.device("cpu"))
    except UserError as error:
        return str(error)
    finally:
        if pg.dist.is_initialized():
            pg.finish()

    def read(tokens):
        return None if tokens is None else np.array(tokens[0 : len(tokens)])

    found = [(read(text.tokens), read(text.validation), text.about) for text in texts]
    return found, args.config.vocab_size, args.texts


def slices_of_shards(folder, cuts):
    """Slices of mapped shards, beside the same ones of all their tokens in one array."""
    from prepared import mapped

    shards = mapped(folder, "tokens.npy")
    whole = shards[0 : len(shards)]
    return [(np.array(shards[a:b]), whole[a:b]) for a, b in cuts]


def round_trips(folder, texts):
    """Each text after a way through the tokenizer of a prepared folder, and whether 0 is in it."""
    from transformers import AutoTokenizer

    from corpus import encoder

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = encoder(tokenizer)(texts)
    end = tokenizer.eos_token_id
    return [(tokenizer.decode(found), end in found) for found in ids]


def as_tiktoken_has_them(folder, texts):
    """The ids of a prepared folder's tokenizer, beside those that tiktoken itself gives."""
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from transformers import AutoTokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    from corpus import encoder

    ours = encoder(AutoTokenizer.from_pretrained(folder / "tokenizer"))(texts)
    ranks = load_tiktoken_bpe(str(folder.parent / "own.tiktoken"))
    theirs = tiktoken.Encoding(
        "own", pat_str=TikTokenConverter("").pattern, mergeable_ranks=ranks, special_tokens={}
    )
    return ours, [theirs.encode_ordinary(text) for text in texts]


def metadata(folder):
    return json.loads((folder / "metadata.json").read_text())
