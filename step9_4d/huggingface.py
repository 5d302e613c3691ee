"""Hugging Face checkpoints, both ways, from any layout and onto any.

Parameter names are the same there and here. Reading, each rank takes its slices straight out of the
safetensors files. Writing, the parts that ranks hold become whole tensors by way of a checkpoint
of ours, and `transformers` does the rest. So any checkpoint can be exported later, too:

python huggingface.py --checkpoint runs/first --save_hf exported
"""

from errors import (  # first: Ctrl-C is one line from here on
    ArgumentParser,
    UserError,
    in_one_line,
    note,
    run,
)

# isort: split
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import safe_open

import process_group as pg
from corpus import load_tokenizer, tokenizer_of
from model import Llama, materialize
from presets import hub_is_unreachable, load_config
from resharding import read_weights, tensors_of, write_tensors
from run_directory import find, read_about


def load_checked_config(args):
    """The configuration of --load_hf, if given, or --model_name; raises UserError.

    Also for a --load_hf whose tensors do not fit it, and a --save_hf that can't be written.
    """
    if args.save_hf is not None:
        check_save_hf(args.save_hf)
    if args.load_hf is None:
        return load_config(args)
    if args.model_name not in ("debug", args.load_hf):
        raise UserError(f"--load_hf with --model_name {args.model_name}: leave the latter out")
    check_directory(args.load_hf)
    args.model_name = args.load_hf
    config = load_config(args)
    slices = stored_slices(args.load_hf, config)
    if args.tie_word_embeddings == "yes" and "lm_head.weight" in slices:
        note(f"--tie_word_embeddings yes: lm_head.weight of {args.load_hf} is not read")
    return config


def check_save_hf(directory):
    """Make the directory to write; raises UserError if that can't be, or if it is in use."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        used = any(Path(directory).iterdir())
        if os.path.ismount(directory):
            raise OSError(errno.EBUSY, "a mount point, whose name no other can take")
        if not (os.access(directory, os.W_OK) and os.access(hidden(directory).parent, os.W_OK)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--save_hf {directory}: {error.strerror}; name a directory") from None
    if used:
        raise UserError(f"--save_hf {directory}: not empty; name another directory")


def check_tokenizer(args, world):
    """Let the first rank open the tokenizer that --save_hf needs at the end; raises UserError."""
    if args.save_hf is not None:
        # Nothing is sent to the others but an error.
        pg.from_first(world, lambda: load_tokenizer(tokenizer_of(args)) and None)


def check_directory(path):
    """Raise UserError unless --load_hf names a directory with a model's configuration."""
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"--load_hf {path}: no config.json there; name a directory that has one")


def stored_slices(directory, config):
    """{name: safetensors slice} of a directory, once found to be those of a model of config.

    They are in one file or in several with an index. Raises UserError.
    """
    path = Path(directory)
    index = path / "model.safetensors.index.json"
    try:
        names = ["model.safetensors"]
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
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


def save_hf(state, directory):
    """Write the model so that `AutoModelForCausalLM.from_pretrained` opens it.

    In the dtype of the weights, with config, tokenizer and defaults for generating; complete or
    absent. Raises UserError if it can't be written.
    """
    parts = hidden(directory) / "parts"
    args, dtype, world = state.args, state.parameters[0].dtype, state.mesh.world
    pg.from_first(world, lambda: parts.mkdir(parents=True, exist_ok=True))
    files = write_tensors(tensors_of(state.parameters), parts, world)
    pg.from_first(
        world, lambda: export(parts, files, directory, args.config, dtype, tokenizer_of(args))
    )


def hidden(directory):
    """Where to write before it gets that name."""
    path = Path(directory).absolute()
    return path.with_name(f".{path.name}")


def export(checkpoint, files, directory, config, dtype, tokenizer_name):
    """In one process: from the tensors of a checkpoint to a Hugging Face directory.

    Raises UserError for a tokenizer that can't be had, files that can't be read, or a directory in
    which something was put meanwhile.
    """
    import transformers

    with torch.device("meta"):
        model = Llama(config, dtype)
    materialize(model, None, torch.device("cpu"))
    read_weights(model, checkpoint, files)

    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(tokenizer_name)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        None,
        config=transformers.LlamaConfig(**{**vars(config), **ends}),
        state_dict=dict(model.named_parameters()),
        dtype=dtype,
    )
    if (Path(tokenizer_name) / "generation_config.json").exists():
        theirs.generation_config = transformers.GenerationConfig.from_pretrained(tokenizer_name)
    aside = hidden(directory) / "whole"
    theirs.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(directory)  # empty, as `check_save_hf` left it
    except OSError as error:
        raise UserError(f"--save_hf {directory}: {error.strerror}; all is in {aside}") from None
    shutil.rmtree(hidden(directory))


def parse_args(argv):
    """Read the command line; raises UserError."""
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="or the directory of a run's")
    parser.add_argument("--save_hf", required=True, help="a directory to write")
    args = parser.parse_args(argv)
    check_save_hf(args.save_hf)
    return args


def main(args):
    path = find("--checkpoint", args.checkpoint)
    about = read_about("--checkpoint", path)
    if not is_local(about["tokenizer"]):
        hub_is_unreachable()  # before a library that would go on asking is imported
    config = SimpleNamespace(**about["model"])
    dtype = getattr(torch, about["dtype"])
    export(path, about["files"], args.save_hf, config, dtype, about["tokenizer"])
    print(f"{path} -> {args.save_hf}")


if __name__ == "__main__":
    run(main, parse_args)
