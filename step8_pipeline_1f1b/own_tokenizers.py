"""Tokenizers for prepare.py: trained on a text, or made from a file of tiktoken.

Sources: byte-level BPE, GPT-2 (Radford et al., 2019), section 2.2; WordPiece, Wu et al.
(arXiv:1609.08144), section 4.1.
"""

import base64
import sys
import tempfile
from pathlib import Path

from corpus import byte_tokenizer, load_tokenizer
from errors import UserError, in_one_line, note

KINDS = ("bytes", "bpe", "wordpiece", "tiktoken")
END = "<|endoftext|>"  # the token after each document
TIKTOKEN_DEFAULT = "cl100k_base"


def make_tokenizer(args, texts):
    """The tokenizer that the flags ask for, one of `transformers`; raises UserError.

    texts: a function that yields lists of texts, to train on.
    """
    if args.tokenizer_type is None:
        return load_tokenizer(args.tokenizer_name)
    if args.tokenizer_type == "bytes":
        return byte_tokenizer()
    if args.tokenizer_type == "tiktoken":
        return of_tiktoken(args.tokenizer_name or TIKTOKEN_DEFAULT)
    return trained(args.tokenizer_type, args.vocab_size, texts)


def trained(kind, vocab_size, texts):
    """A byte-level BPE, or a WordPiece, of at most so many symbols.

    BPE gives each text back as it was. WordPiece does not: it knows words, not white space, and
    what it has not seen is [UNK].
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    options = {"vocab_size": vocab_size, "show_progress": sys.stderr.isatty()}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=[END], **options)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(special_tokens=[END, "[UNK]"], **options)
    tokenizer.train_from_iterator(texts(), trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        note(f"--vocab_size {vocab_size}: there were not more than {size} symbols to be found")
    if size > vocab_size:
        raise UserError(
            f"--vocab_size {vocab_size}: the letters of the text alone need {size}; choose more"
        )
    return wrapped(tokenizer, unk_token=None if kind == "bpe" else "[UNK]")


def of_tiktoken(name):
    """The tokenizer of an encoding that the package tiktoken knows, or of a `.tiktoken` file.

    A file has no rule for cutting a text into words; it gets that of cl100k_base.
    """
    try:
        import tiktoken
    except ImportError:
        raise UserError("--tokenizer_type tiktoken: pip install tiktoken") from None
    from transformers.convert_slow_tokenizer import TikTokenConverter

    try:
        if Path(name).is_file():
            return wrapped(TikTokenConverter(name, extra_special_tokens=[END]).converted())
        encoding = tiktoken.get_encoding(name)  # from its cache, or from the net
        with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as file:
            # The converter reads a file, and the package shows no other way to symbols and rule.
            for symbol, rank in encoding._mergeable_ranks.items():
                file.write(f"{base64.b64encode(symbol).decode()} {rank}\n")
            file.flush()
            rule = encoding._pat_str
            return wrapped(
                TikTokenConverter(file.name, rule, extra_special_tokens=[END]).converted()
            )
    except Exception as error:
        raise UserError(
            f"--tokenizer_name {name}: {in_one_line(error)} (name a file that ends in .tiktoken, "
            "or set TIKTOKEN_CACHE_DIR to a folder that has the encoding)"
        ) from None


def wrapped(tokenizer, **special):
    """The same as a `transformers` tokenizer, which can be saved.

    Where a text itself says <|endoftext|>, these are letters like others.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, split_special_tokens=True, **special
    )
