"""Checkpoints that do not know the layout: a run that was saved on one goes on on any other.

    DIR/step_00000020/   weights and optimizer state, and checkpoint.json, which says of what
    DIR/config.json      the flags of the run
    DIR/RESUME           a run was asked to stop; there is more to train

A checkpoint is complete or absent: written aside, then renamed. The order of the data is a function
of the step, so that number is all there is to save of it.
"""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import torch.distributed as dist

import process_group as pg
from corpus import tokenizer_of
from errors import UserError, in_one_line, note
from presets import preset
from resharding import read_tensors, tensors_of, write_tensors

MODEL_FIELDS = sorted(vars(preset("debug")))  # of a configuration
# What makes a run another one, but may be meant.
MAY_CHANGE = ("dataset_name", "tokenizer_name", "max_tokens", "learning_rate", "warmup_steps",
              "weight_decay", "max_grad_norm", "dtype")  # fmt: skip


def checkpoints(directory):
    """The complete checkpoints of a directory, oldest first."""
    return sorted(path for path in Path(directory).glob("step_*") if path.is_dir())


def find(flag, directory):
    """The checkpoint that a flag's directory is, or the latest in it; raises UserError."""
    path = Path(directory)
    found = [path] if (path / "checkpoint.json").exists() else checkpoints(path)
    if not found:
        raise UserError(f"{flag} {directory}: no checkpoint there, nor in it; name one")
    return found[-1]


def read_about(flag, path):
    """The checkpoint.json of a checkpoint, once its files are found to be whole.

    A dict of step, flags, model and files, their sizes in bytes. Raises UserError.
    """
    remedy = "the checkpoint is damaged, name another one"
    try:
        about = json.loads((path / "checkpoint.json").read_text())
        sizes = {name: (path / name).stat().st_size for name in about["files"]}
        _ = [about[key] for key in ("step", "flags", "model", "tokenizer", "dtype")]  # all there
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{flag} {path}: {in_one_line(error)}: {remedy}") from None
    for name, size in about["files"].items():
        if sizes[name] != size:
            raise UserError(f"{flag} {path}: {name} has {sizes[name]} of {size} bytes: {remedy}")
    return about


def model_fields(config):
    """What makes a model's shape, {name: value}."""
    return {name: getattr(config, name) for name in MODEL_FIELDS}


def check_checkpoints(args):
    """Put the checkpoint to go on from into `args.resume`, None for a fresh start.

    Raises UserError for one that is missing, damaged, or of a run that is another one.
    """
    if args.checkpoint_dir is None:
        if args.save_every is not None or args.resume == "auto":
            flag = "--save_every" if args.save_every is not None else "--resume auto"
            raise UserError(f"{flag} without a --checkpoint_dir: name one")
        found = []
    else:
        what, remedy = f"--checkpoint_dir {args.checkpoint_dir}", "name a directory to write to"
        try:
            Path(args.checkpoint_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{what}: {error.strerror}; {remedy}") from None
        if not os.access(args.checkpoint_dir, os.W_OK):
            raise UserError(f"{what}: may not be written; {remedy}")
        found = checkpoints(args.checkpoint_dir)
    if args.resume == "auto":
        args.resume = found[-1] if found else None
    elif args.resume is not None:
        args.resume = find("--resume", args.resume)
    if found and (args.resume is None or args.resume.name < found[-1].name):
        raise UserError(
            f"{what}: a run is there already, up to {found[-1].name}: --resume auto goes on with "
            "it, or name another directory"
        )
    if args.resume is not None:
        compare(args, read_about("--resume", args.resume))


def compare(args, about):
    """Raise UserError, with both values, where a checkpoint's run is not this one."""
    there, here = about["flags"], args.flags
    pairs = [(f"--{name}", there[name], here[name]) for name in ("seed", "seq_len")]
    batch = ["micro_batch_size", "gradient_accumulation_steps", "dp_size"]
    pairs.append((
        "a global batch (" + " x ".join(f"--{name}" for name in batch) + ")",
        *(math.prod(flags[name] for name in batch) for flags in (there, here)),
    ))  # fmt: skip
    # As JSON has it, where a float is as it was and a tuple is a list.
    model = json.loads(json.dumps(model_fields(args.config)))
    pairs += [(f"a model of {name}", about["model"].get(name), model[name]) for name in model]
    tokenizers = about["tokenizer"], tokenizer_of(args)
    if "bytes" in tokenizers:  # others may have moved
        pairs.append(("--tokenizer_name", *tokenizers))
    for what, saved, wanted in pairs:
        if saved != wanted:
            raise UserError(f"--resume {args.resume}: saved with {what} {saved}, not {wanted}")
    for name in MAY_CHANGE:
        if there[name] != here[name]:
            note(f"--resume {args.resume}: until now --{name} was {there[name]}")


def listen(state):
    """Let SIGTERM ask for a stop after the current step, where there is a place to save to."""
    if state.args.checkpoint_dir is not None:
        signal.signal(signal.SIGTERM, lambda *_: setattr(state, "asked_to_stop", True))


def save_if_due(state):
    """Save every `--save_every` steps, after the last one, and when asked to stop."""
    args = state.args
    regular = args.save_every is not None and state.step % args.save_every == 0
    if args.checkpoint_dir and (regular or state.stop or state.step == args.total_steps):
        save(state)
    if state.stop:
        note(f"stopped by SIGTERM after step {state.step}: go on with --resume auto")


def save(state):
    """Save the run as it is after a step, and delete what `--keep_last` does not keep.

    If a rank dies meanwhile, what is there is a hidden directory, which the next save removes.
    Raises UserError if it can't be written, or if the hosts do not share it.
    """
    directory, name = Path(state.args.checkpoint_dir), f"step_{state.step:08d}"
    aside = directory / f".{name}"
    dist.barrier()  # no survivor of a dead rank goes any further
    on_first(state, lambda: (clean(directory), aside.mkdir()))
    missing = pg.max_over_ranks([not aside.is_dir()], state.mesh.world, state.device)
    if missing.item():
        raise UserError(f"--checkpoint_dir {directory}: name one that all hosts share")
    tensors = tensors_of(state.parameters, state.model.parameter_names, state.optimizer)
    write_tensors(tensors, aside)

    def complete():
        write_about(state.args, state.step, aside)
        aside.rename(directory / name)
        for old in checkpoints(directory)[: -state.args.keep_last]:
            old.rename(directory / f".{old.name}")
        clean(directory)
        if state.stop:
            (directory / "RESUME").write_text(name + "\n")

    on_first(state, complete)


def on_first(state, act):
    """Let the first rank change files; if it can't, raises UserError on every rank."""

    def tried():
        try:
            act()
        except OSError as error:
            raise UserError(f"--checkpoint_dir {state.args.checkpoint_dir}: {error}") from error

    pg.from_first(state.mesh.world, tried)


def clean(directory):
    """Delete what is not complete, or no longer."""
    for left in directory.glob(".step_*"):
        shutil.rmtree(left)
    (directory / "RESUME").unlink(missing_ok=True)


def write_about(args, step, directory):
    """Write checkpoint.json, the last file of a checkpoint."""
    about = {
        "step": step,
        "flags": args.flags,
        "tokenizer": tokenizer_of(args),
        "dtype": "float64" if args.dtype == "float64" else "float32",  # of the weights
        "model": model_fields(args.config),
        "files": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
    }
    with open(directory / "checkpoint.json", "w") as file:
        json.dump(about, file, indent=1)
        os.fsync(file.fileno())


def load(state):
    """Go on from the checkpoint in `args.resume`, whatever layout it was saved on.

    Raises UserError for files that can't be read.
    """
    path = state.args.resume
    tensors = tensors_of(state.parameters, state.model.parameter_names, state.optimizer)
    read_tensors(tensors, path)
    state.engine.finish_update()
    state.step = read_about("--resume", path)["step"]
    for entry in state.optimizer.state.values():
        entry["step"].fill_(state.step)
