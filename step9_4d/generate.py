"""Sample text from a checkpoint or a Hugging Face directory.

python generate.py --checkpoint runs/first --prompt "def "
torchrun --nproc_per_node 2 generate.py --load_hf exported --tp_size 2
"""

from errors import (  # first: Ctrl-C is one line from here on
    ArgumentParser,
    UserError,
    non_negative_float,
    non_negative_int,
    note,
    number,
    positive_int,
    run,
)

# isort: split
import os
import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import process_group as pg
from corpus import load_tokenizer
from flags import DTYPES, check_tensor_parallel
from huggingface import (
    check_directory,
    check_head,
    is_local,
    load_hf,
    stored_slices,
    tokenizer_at,
)
from model import Llama, causal_attention, materialize
from presets import as_list, from_transformers, hub_is_unreachable, ids_of, special_tokens
from resharding import read_weights
from run_directory import find, read_about
from started import check_world, together
from tensor_parallel import apply_tensor_parallel


def share(text):
    """argparse type: a number above 0 and up to 1."""
    return number(text, lambda value: 0 < value <= 1, "above 0 and at most 1")


def parse_args(argv):
    """Read the command line and look at what is to be loaded; raises UserError."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="or the directory of a run's; the latest is taken")
    source.add_argument("--load_hf", help="a Hugging Face directory")
    parser.add_argument("--tokenizer_name", help="bytes, directory or hub id; default: the model's")
    parser.add_argument("--prompt", default="", help="the text to go on with")
    parser.add_argument("--max_new_tokens", type=positive_int, default=200)
    parser.add_argument("--temperature", type=non_negative_float, default=0.8, help="0: likeliest")
    parser.add_argument("--top_k", type=non_negative_int, default=40, help="0: of all symbols")
    parser.add_argument("--top_p", type=share, default=1.0, help="the likeliest, this together")
    parser.add_argument("--seed", type=non_negative_int, default=42)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--tp_size", type=positive_int, default=1, help="ranks that share a layer")
    args = parser.parse_args(argv)
    check_world(args.device, args.tp_size)
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt {args.prompt!a}: bytes that are no UTF-8; give text") from None
    if args.checkpoint is not None:
        args.checkpoint = find("--checkpoint", args.checkpoint)
        about = read_about("--checkpoint", args.checkpoint)
        args.config, args.files = SimpleNamespace(**about["model"]), about["files"]
        args.special_tokens = about["special_tokens"]
        tokenizer = tokenizer_at(args.checkpoint, about)
    else:
        check_directory(args.load_hf)
        tokenizer = args.load_hf
    args.tokenizer_name = args.tokenizer_name or tokenizer
    if not is_local(args.tokenizer_name):
        hub_is_unreachable()  # if so, what is imported later uses only its cache
    if args.load_hf is not None:
        args.config = from_transformers(args.load_hf, "--load_hf")
        args.special_tokens = special_tokens(args.config)
        remedy = "set tie_word_embeddings there to false if the head is to be read"
        slices = stored_slices(args.load_hf, args.config)
        check_head(args.load_hf, args.config, slices, remedy)
    check_tensor_parallel(SimpleNamespace(**vars(args), sequence_parallel=False))
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    return args


class Cache:
    """Causal attention that keeps the keys and values of all tokens so far.

    So a new token costs one query and not the whole text again: with n tokens so far, n products
    for each head and layer. k, v: [batch, most, kv_heads, head_dim].
    """

    def __init__(self, most):
        self.most, self.length = most, 0

    def __call__(self, q, k, v):
        """Attention of all tokens of a first call, then of one new token a call.

        q: [batch, new, heads, head_dim], k, v: [batch, new, kv_heads, head_dim]; returns as q.
        """
        if self.length == 0:
            self.k, self.v = (t.new_empty(t.shape[0], self.most, *t.shape[2:]) for t in (k, v))
        start, self.length = self.length, self.length + q.shape[1]
        self.k[:, start : self.length] = k
        self.v[:, start : self.length] = v
        if start == 0:
            return causal_attention(q, k, v)
        # One new token: it sees all that are there, itself included.
        q, k, v = (t[:, : self.length].transpose(1, 2) for t in (q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def next_logits(model, group, tokens, positions):
    """Logits of what comes after the last token, [vocab] in float64, on every rank."""
    x = model.model(tokens, positions)[:, -1:]  # [1, 1, hidden]
    mine = model.lm_head(x).flatten()  # [vocab / tp]
    logits = torch.zeros(model.model.config.vocab_size, device=x.device, dtype=torch.float64)
    logits[model.lm_head.weight.held[0]] = mine.double()
    return pg.all_reduce(logits, group)


def sample(logits, temperature, top_k, top_p, generator):
    """A symbol drawn from softmax(logits / temperature) over the likeliest ones.

    Those are the top_k largest, or all if that is 0, and of these the fewest whose probabilities
    come to top_p together; with temperature 0 it is the likeliest. logits: [vocab]. Source: nucleus
    sampling (arXiv:1904.09751), section 3.1.
    """
    if temperature == 0:
        return int(logits.argmax())
    logits = (logits - logits.max()).cpu() / temperature  # never inf
    if 0 < top_k < len(logits):
        logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    probabilities = logits.softmax(0)
    if top_p < 1:
        falling, order = probabilities.sort(descending=True, stable=True)
        likelier = falling.cumsum(0) - falling  # what the likelier ones come to together
        probabilities[order[likelier >= top_p]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.no_grad()
def generate(model, group, prompt, args, ends):
    """The new symbols, a list: at most `max_new_tokens`, none after an end token.

    prompt: a list of at least one; ends: the ids that end a text. Every rank of the group draws the
    same.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(args.seed % 2**64)
    for layer in model.model.layers:
        layer.self_attn.attention = Cache(len(prompt) + args.max_new_tokens)
    tokens, start, new = [], 0, prompt
    for _ in range(args.max_new_tokens):
        positions = torch.arange(start, start + len(new), device=device)
        logits = next_logits(model, group, torch.tensor([new], device=device), positions)
        start += len(new)
        new = [sample(logits, args.temperature, args.top_k, args.top_p, generator)]
        tokens += new
        if new[0] in ends:
            break
    return tokens


def load(args, device, group):
    """This rank's part of the model that was asked for, filled; raises UserError."""
    with torch.device("meta"):
        model = Llama(args.config, DTYPES[args.dtype])
    apply_tensor_parallel(model, group)
    materialize(model, None, device)
    if args.load_hf is not None:
        load_hf(model, args.load_hf)
    else:
        read_weights(model, args.checkpoint, args.files)
    return model


def encode(tokenizer, text, ends):
    """The symbols of a prompt, at least one. An end that the tokenizer adds is left out.

    ends: the ids that end a text; one that the text itself ends with stays.
    """
    text = text.replace("\0", "")
    tokens, plain = (tokenizer(text, add_special_tokens=add)["input_ids"] for add in (True, False))

    def last(ids):  # how many of the last ones are ends
        return next((n for n, token in enumerate(reversed(ids)) if token not in ends), len(ids))

    added = max(0, last(tokens) - last(plain))
    return tokens[: len(tokens) - added] or [tokenizer.eos_token_id]


def decode(tokenizer, prompt, tokens):
    """The text of new symbols, tokens, after those of a prompt.

    A first symbol loses its space where it is decoded by itself (SentencePiece, arXiv:1808.06226).
    """
    before, whole = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, prompt + tokens)
    )
    return whole[len(os.path.commonprefix([before, whole])) :]


@together
def main(args):
    device = pg.init_processes(args.device)
    group = pg.Mesh(args.tp_size).group("tp")
    tokenizer = load_tokenizer(args.tokenizer_name)
    ends = as_list(ids_of(args.special_tokens, tokenizer)["eos_token_id"])
    prompt = encode(tokenizer, args.prompt, ends)
    if max(prompt) >= args.config.vocab_size:
        raise UserError(
            f"--tokenizer_name {args.tokenizer_name}: it gave the id {max(prompt)}, the model "
            f"knows {args.config.vocab_size}; name the tokenizer that it was trained with"
        )
    context = args.config.max_position_embeddings
    if len(prompt) + args.max_new_tokens > context:
        note(
            f"--prompt of {len(prompt)} tokens with --max_new_tokens {args.max_new_tokens}: the "
            f"model knows {context} (max_position_embeddings), beyond that its text gets worse"
        )
    model = load(args, device, group)
    tokens = generate(model, group, prompt, args, ends)
    if group.is_first:
        sys.stdout.reconfigure(errors="backslashreplace")  # of what the terminal can't show
        print(args.prompt + decode(tokenizer, prompt, tokens))
    pg.finish()


if __name__ == "__main__":
    run(main, parse_args)
