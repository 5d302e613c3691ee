"""Hugging Face checkpoints, both ways, from any layout and onto any.

Parameter names are the same there and here. Reading, each rank takes its slices straight out of the
safetensors files. Writing, the parts that ranks hold become whole tensors by way of a checkpoint
of ours, and `transformers` does the rest. So any checkpoint can be exported later, too:

python huggingface.py --checkpoint runs/first --save_hf exported
"""

from errors import (  # first: Ctrl-C is one line from here on
    RANK,
    ArgumentParser,
    UserError,
    in_one_line,
    note,
    run,
)

# isort: split
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open

import process_group as pg
from aside import check_room, check_save_hf, give_name, hidden, writing
from checkpoint import about_of
from corpus import load_tokenizer, tokenizer_of
from model import Llama, materialize
from presets import (
    from_transformers,
    hub_is_unreachable,
    ids_of,
    load_config,
    override,
    special_tokens,
)
from resharding import read_weights, tensors_of, write_tensors
from run_directory import find, own, read_about, write_about

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_checked_config(args):
    """The configuration of --load_hf, if given, or --model_name; raises UserError.

    Also for a --load_hf whose tensors do not fit it, and a --save_hf that can't be written.
    """
    if args.save_hf is not None:
        check_save_hf(args.save_hf)
    try:
        config = load_config(args) if args.load_hf is None else config_to_load(args)
    except UserError as error:
        if args.resume is None or Path(args.load_hf or args.model_name).exists():
            raise
        config = resumed_config(args, error)
    if args.save_hf is not None:
        # Parts, then the whole of them.
        check_room(args.save_hf, config, args.weights_dtype, copies=2)
    return config


def resumed_config(args, error):
    """The configuration that a checkpoint has of a model whose own directory is gone."""
    note(f"{error}: not needed, {args.resume} has its configuration, tokenizer and weights")
    about = args.resumed
    args.tokenizer_name = args.tokenizer_name or tokenizer_at(args.resume, about)
    config = SimpleNamespace(**about["model"], **about["special_tokens"])
    override(config, args)
    return config


def config_to_load(args):
    """The configuration of --load_hf, with the flags that were given; raises UserError."""
    if args.model_name not in ("debug", args.load_hf):
        raise UserError(f"--load_hf with --model_name {args.model_name}: leave the latter out")
    check_directory(args.load_hf)
    args.model_name = args.load_hf
    config = from_transformers(args.load_hf, "--load_hf")
    override(config, args, "--load_hf")
    slices = stored_slices(args.load_hf, config)
    if args.tie_word_embeddings == "config":
        remedy = "--tie_word_embeddings yes leaves the head unread, no trains both"
        check_head(args.load_hf, config, slices, remedy)
    elif args.tie_word_embeddings == "yes" and "lm_head.weight" in slices:
        note(f"--tie_word_embeddings yes: lm_head.weight of {args.load_hf} is not read")
    return config


def check_tokenizer(args, world):
    """Let the first rank open the tokenizer that --save_hf needs at the end; raises UserError."""
    if args.save_hf is not None:
        # Nothing is sent to the others but an error.
        pg.from_first(world, lambda: load_tokenizer(tokenizer_of(args)) and None)


def check_directory(path):
    """Raise UserError unless --load_hf names a directory with a model's configuration.

    Also says what weights there are not read.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"--load_hf {path}: no config.json there; name a directory that has one")
    if all((Path(path) / name).exists() for name in (SINGLE, INDEX)):
        note(f"--load_hf {path}: {SINGLE} is read, {INDEX} and what it lists are not")


def check_head(directory, config, slices, remedy):
    """Raise UserError, on the first rank, for a tied head that is stored with other numbers.

    slices: as from `stored_slices`; remedy: what to do.
    """
    if not (config.tie_word_embeddings and "lm_head.weight" in slices) or RANK > 0:
        return
    table, head = slices["model.embed_tokens.weight"], slices["lm_head.weight"]
    same = head.get_shape() == table.get_shape()
    for start in range(0, config.vocab_size, 4096):  # rows at a time, as the tables are large
        same = same and bool((table[start : start + 4096] == head[start : start + 4096]).all())
    if not same:
        raise UserError(
            f"--load_hf {directory}: its config.json ties the head to the embedding, but its "
            f"lm_head.weight is another one than its model.embed_tokens.weight: {remedy}"
        )


def stored_slices(directory, config):
    """{name: safetensors slice} of a directory, once found to be those of a model of config.

    They are in one file, or where there is none in several with an index. Raises UserError.
    """
    path = Path(directory)
    try:
        names = [SINGLE]
        if not (path / SINGLE).exists() and (path / INDEX).exists():
            names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        files = [safe_open(path / name, "pt") for name in names]
        slices = {name: file.get_slice(name) for file in files for name in file.keys()}
    except Exception as error:
        raise UserError(
            f"--load_hf {directory}: {in_one_line(error)} (its weights must be whole safetensors, "
            "as save_pretrained of transformers writes them)"
        ) from None
    with torch.device("meta"):
        wanted = dict(Llama(config).named_parameters())
    for name, parameter in wanted.items():
        if name not in slices:
            raise UserError(f"--load_hf {directory}: {name} is missing there")
        if (shape := slices[name].get_shape()) != [*parameter.shape]:
            raise UserError(f"--load_hf {directory}: {name} is {shape}, not {[*parameter.shape]}")
    spare = slices.keys() - wanted.keys() - {"lm_head.weight"}  # a tied one may be there
    if spare := sorted(name for name in spare if not name.endswith("rotary_emb.inv_freq")):
        raise UserError(f"--load_hf {directory}: not a Llama of this model.py: {spare[0]}")
    return slices


def is_local(tokenizer_name):
    """Whether a tokenizer needs no hub."""
    return tokenizer_name == "bytes" or Path(tokenizer_name).is_dir()


def load_hf(model, directory):
    """Fill a model with this rank's slices of a directory's tensors; raises UserError."""
    slices = stored_slices(directory, model.model.config)
    for parameter in model.parameters():
        parameter.detach().copy_(slices[parameter.global_name][parameter.held])


def tokenizer_at(checkpoint, about):
    """The name of a checkpoint's tokenizer: its own copy, or what its checkpoint.json names."""
    copy = Path(checkpoint) / "tokenizer"
    return str(copy) if copy.is_dir() else about["tokenizer"]


def save_hf(state, directory):
    """Write the model so that `AutoModelForCausalLM.from_pretrained` opens it.

    In the dtype of the weights, with config, tokenizer and defaults for generating; complete or
    absent. Raises UserError if it can't be written.
    """
    args, world, dtype = state.args, state.mesh.world, state.parameters[0].dtype
    parts, known = hidden(directory) / "parts", special_tokens(args.config)
    saved = own(args.checkpoint_dir) if args.checkpoint_dir else []

    def export_and_name(files):
        write_about(parts, about_of(state, files, {}))  # so it is a checkpoint, of weights only
        with writing(directory, advice_of(saved or [parts]), [] if saved else ["parts"]):
            export(parts, files, directory, args.config, dtype, tokenizer_of(args), known)
        give_name(directory)

    with writing(directory, advice_of(saved), cleans=world.is_first):
        pg.from_first(world, lambda: parts.mkdir(parents=True, exist_ok=True))
        files = write_tensors(tensors_of(state.parameters), parts, world)
    pg.from_first(world, lambda: export_and_name(files))


def advice_of(saved):
    """What to do after an export that failed, with the last of some checkpoints."""
    command = "python huggingface.py --checkpoint"
    return f"; when that is mended: {command} {saved[-1]} --save_hf DIR" if saved else ""


def export(checkpoint, files, directory, config, dtype, tokenizer_name, known):
    """In one process: from the tensors of a checkpoint to a Hugging Face directory, not yet named.

    files: what `write_tensors` told of them. known: special tokens of the model, as for `ids_of`.
    Raises UserError for a tokenizer that can't be had, files that can't be read, and numbers that
    are not finite.
    """
    import transformers

    with torch.device("meta"):
        model = Llama(config)
    materialize(model, None, torch.device("cpu"), dtype)
    read_weights(model, checkpoint, files)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(
                f"--save_hf {directory}: {name} has numbers that are not finite, so nothing is "
                "written: train with a lower --learning_rate, or export an earlier checkpoint"
            )
    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(tokenizer_name)
    ids = ids_of(known, tokenizer)
    if (ids["pad_token_id"] or 0) >= config.vocab_size:
        note(
            f"--save_hf {directory}: pad_token_id {ids['pad_token_id']}, of no symbol, is left out"
        )
        ids = {**ids, "pad_token_id": None}
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        None,
        config=transformers.LlamaConfig(**{**vars(config), **ids}),
        state_dict=dict(model.named_parameters()),
        dtype=dtype,
    )
    if (Path(tokenizer_name) / "generation_config.json").exists():
        theirs.generation_config = transformers.GenerationConfig.from_pretrained(tokenizer_name)
    theirs.save_pretrained(hidden(directory) / "whole")
    tokenizer.save_pretrained(hidden(directory) / "whole")


def parse_args(argv):
    """Read the command line; raises UserError."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="or the directory of a run's")
    parser.add_argument("--save_hf", required=True, help="a directory to write")
    parser.add_argument("--tokenizer_name", help="bytes, directory or hub id; default: the model's")
    args = parser.parse_args(argv)
    check_save_hf(args.save_hf)
    return args


def main(args):
    path = find("--checkpoint", args.checkpoint)
    about = read_about("--checkpoint", path)
    config, known = SimpleNamespace(**about["model"]), about["special_tokens"]
    check_room(args.save_hf, config, about["dtype"], copies=1)
    tokenizer = args.tokenizer_name or tokenizer_at(path, about)
    if not is_local(tokenizer):
        hub_is_unreachable()  # if so, what is imported later uses only its cache
    dtype = getattr(torch, about["dtype"])
    with writing(args.save_hf):
        export(path, about["files"], args.save_hf, config, dtype, tokenizer, known)
    give_name(args.save_hf)
    print(f"{path} -> {args.save_hf}")


if __name__ == "__main__":
    run(main, parse_args)
