"""Checkpoints that do not know the layout: a run that was saved on one goes on on any other.

    DIR/step_00000020/   one of them, see run_directory.py
    DIR/config.json      the flags of the run
    DIR/LOCK             the process that writes here, see lock.py
    DIR/RESUME           a run was asked to stop; there is more to train

The order of the data is a function of the step, so that number is all there is to save of it.
"""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import torch.distributed as dist

import process_group as pg
import run_directory
from corpus import tokenizer_of
from errors import UserError, note
from presets import preset, special_tokens
from resharding import all_finite, read_tensors, scalars_of, tensors_of, write_tensors
from restart import cool_down, rates_of, to_take
from run_directory import checkpoints, find, newest_sound, own, read_about
from stream_places import go_on, places_after

MODEL_FIELDS = sorted(vars(preset("debug")))  # of a configuration


class NotSaved(UserError):
    """A checkpoint could not be written; what is there is whole, and a later one may succeed."""

    on_all_ranks = True


def model_fields(config):
    """What makes a model's shape, {name: value}."""
    return {name: getattr(config, name) for name in MODEL_FIELDS}


def choose_checkpoint(args):
    """Put the checkpoint to go on from into `args.resume`, None for a fresh start.

    And what it says of itself into `args.resumed`. Raises UserError for one that is missing or
    damaged; `auto` takes the newest one that is whole.
    """
    args.auto, args.found, args.damaged, args.older = args.resume == "auto", [], [], []
    args.resumed, args.lock, args.source = None, None, "--resume"  # source: for messages
    if args.checkpoint_dir is None:
        needs = {"--save_every": args.save_every, "--keep_every": args.keep_every}
        for flag, given in (needs | {"--resume auto": args.auto or None}).items():
            if given is not None:
                raise UserError(f"{flag} without a --checkpoint_dir: name one")
    else:
        what, remedy = f"--checkpoint_dir {args.checkpoint_dir}", "name a directory to write to"
        try:
            Path(args.checkpoint_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{what}: {error.strerror}; {remedy}") from None
        if not os.access(args.checkpoint_dir, os.W_OK):
            raise UserError(f"{what}: may not be written; {remedy}")
        if any(ord(letter) in range(0xD800, 0xE000) for letter in args.checkpoint_dir):
            raise UserError(f"{what}: a name that is no UTF-8; {remedy}")
        run_directory.check_config(args.checkpoint_dir)
        args.found = checkpoints(args.checkpoint_dir)
    if args.auto:
        args.source, args.older = "--resume auto:", args.found
        args.resume, args.resumed = newest_sound(args.source, args.found)
    elif args.resume is not None:
        args.resume = find("--resume", args.resume)
        args.resumed = read_about("--resume", args.resume)
    newest = args.found and args.resume and args.resume.resolve() == args.found[-1].resolve()
    if args.found and not args.auto and not newest:
        raise UserError(
            f"{what}: a run is there already, up to {args.found[-1].name}: --resume auto goes on "
            "with it, or name another directory"
        )


def compare(args, about):
    """Raise UserError, with both values, where a checkpoint's run is not this one."""
    there, here = {**args.flags, **about["flags"]}, args.flags  # an older one may lack a flag
    same = ("seed", "seq_len", "stride", "streaming", "optimizer", "optimizer_args")
    pairs = [(f"--{name}", there[name], here[name]) for name in same]
    batch = ["micro_batch_size", "gradient_accumulation_steps", "dp_size"]
    pairs.append((
        "a global batch (" + " x ".join(f"--{name}" for name in batch) + ")",
        *(math.prod(flags[name] for name in batch) for flags in (there, here)),
    ))  # fmt: skip
    # As JSON has it, where a float is as it was and a tuple is a list.
    model = json.loads(json.dumps(model_fields(args.config)))
    before = {**model, **about["model"]}
    pairs += [(f"a model of {name}", before[name], model[name]) for name in model]
    tokenizers = about["tokenizer"], tokenizer_of(args)
    if "bytes" in tokenizers:  # the others are named by a place, which may be a new one
        pairs.append(("--tokenizer_name", *tokenizers))
    differ = {what: f"{what} {saved}, not {now}" for what, saved, now in pairs if saved != now}
    where = f"{args.source} {args.resume}"
    for what, said in differ.items():
        if what.startswith(args.taken.same):
            raise UserError(f"{where}: saved with {said}")
    if differ:
        note(f"{where}: saved with {'; '.join(differ.values())}")
    for name in args.taken.noted:
        if there[name] != here[name]:
            note(f"{where}: until now --{name} was {there[name]}")


def compare_data(args, about):
    """Say so where a checkpoint's run was trained on other tokens, whatever their name."""
    if about["data"] != args.data and args.taken.weights != "none":
        then, now = (
            f"{data['tokens']} tokens of sha256 {data['sha256']:.8}"
            for data in (about["data"], args.data)
        )
        note(
            f"{args.source} {args.resume}: the data are not those it was trained on until now "
            f"({then}; now {now}); what is held out from now on may have been trained on"
        )


def listen(state):
    """Let signals ask for a stop after the current step, where there is a place to save to.

    SIGTERM comes from launchers, SIGINT from Ctrl-C, SIGUSR1 from Slurm before a time limit.
    """
    if state.args.checkpoint_dir is not None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, _: setattr(state, "asked_to_stop", number))


def save_if_due(state):
    """Save every `--save_every` steps, after the last one, and when asked to stop.

    A save that fails in between is noted, and training goes on; one that fails after the last step
    is kept in `state.not_saved`, because there may still be a model to export. Raises UserError.
    """
    args = state.args
    last = state.step == args.total_steps
    regular = args.save_every is not None and state.step % args.save_every == 0
    if args.checkpoint_dir and (regular or state.stop or last):
        try:
            save(state)
        except NotSaved as error:
            if state.stop:
                raise
            state.not_saved = error if last else None
            note(f"{error}; step {state.step} is not saved")
    if state.stop:
        name = signal.Signals(state.stop).name
        note(f"stopped by {name} after step {state.step}: go on with --resume auto")


def save(state):
    """Save the run as it is after a step, and delete what no flag keeps.

    If a rank dies meanwhile, what is there is a hidden directory, which the next save removes.
    Raises UserError if there are numbers that are not finite, if the hosts share no directory, or
    if another run has taken it; NotSaved if the disk refuses.
    """
    args, directory = state.args, Path(state.args.checkpoint_dir)
    dist.barrier()  # no survivor of a dead rank goes any further
    tensors = tensors_of(state.parameters, state.optimizer)
    if not all(pg.from_all(state.mesh.world, lambda: all_finite(tensors))):
        why = f"the weights are not finite after step {state.step}, which is not saved: lower "
        why += f"--learning_rate {args.learning_rate}{last_good(args)}"
        raise pg.on_all_ranks(UserError(why))
    aside = directory / on_first(state, lambda: begin(state))
    try:
        if not all(pg.from_all(state.mesh.world, aside.is_dir)):
            raise UserError(f"--checkpoint_dir {directory}: name one that all hosts share")
        files = write_tensors(tensors, aside, state.mesh.world)
        places = places_after(state)
        on_first(state, lambda: complete(state, files, places, aside))
    except (OSError, UserError) as error:
        if state.mesh.world.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise not_saved(args, error) from error
        raise


def begin(state):
    """On the first rank: a place to write to, if the directory is still ours; its name."""
    if state.args.lock is not None:
        state.args.lock.check()
    return run_directory.begin(state.args.checkpoint_dir, state.step)


def about_of(state, files, others, places=None):
    """What a checkpoint says of itself: its files with their checksums, and of which run it is."""
    args = state.args
    return {
        "step": state.step,
        "run": run_directory.run_id(args.checkpoint_dir) if args.checkpoint_dir else None,
        "flags": args.flags,
        "tokenizer": tokenizer_of(args),
        "special_tokens": special_tokens(args.config),
        "dtype": args.weights_dtype,
        "loss_scale": state.loss_scale.saved(),
        "model": model_fields(args.config),
        "data": args.data,
        **rates_of(args, state.step),
        "stream": places,
        "scalars": scalars_of(state.optimizer, state.parameters),
        "files": files,
        "others": others,
    }


def complete(state, files, places, aside):
    """On the first rank: all that makes a directory of tensors a checkpoint with a name."""
    args, directory = state.args, Path(state.args.checkpoint_dir)
    others = run_directory.write_tokenizer(tokenizer_of(args), aside)
    run_directory.write_about(aside, about_of(state, files, others, places))
    if args.lock is not None:
        args.lock.check()
    run_directory.complete(aside, directory, state.step)
    run_directory.keep(directory, args.keep_last, args.keep_every, args.damaged)
    if state.stop:
        (directory / "RESUME").write_text(run_directory.name_of(state.step) + "\n")


def on_first(state, act):
    """Let the first rank change files, and return what it returns; if it can't, NotSaved on all."""
    try:
        return pg.from_first(state.mesh.world, act)
    except OSError as error:
        raise not_saved(state.args, error) from error


def not_saved(args, error):
    where = f" ({error.filename})" if error.filename else ""
    what = f"--checkpoint_dir {args.checkpoint_dir}: {error.strerror}{where}"
    return NotSaved(f"{what}; make room, or name another directory")


def last_good(args):
    """What an error adds: the checkpoint to go on from, where there is one."""
    found = own(args.checkpoint_dir) if args.checkpoint_dir else []
    return f"; the last good checkpoint is {found[-1]}" if found else ""


def load(state):
    """Go on from the checkpoint in `args.resume`, whatever layout it was saved on.

    Or begin with what a restart takes of it. Raises UserError, on every rank, for files that are
    not as they were written; all ranks then take the next older one, if there is a choice.
    """
    args, world = state.args, state.mesh.world
    tensors = to_take(state)

    def read():
        read_tensors(tensors, args.resume, args.resumed["files"])

    def next_older():
        return newest_sound(args.source, [p for p in args.older if p.name < args.resume.name])

    while not read_by_all(args, world, read):
        args.damaged.append(args.resume)
        args.resume, args.resumed = pg.from_first(world, next_older)
        if args.resume is None:
            raise UserError(f"{args.source} {args.older[0].parent}: none is sound; name another")
        compare(args, args.resumed)
        cool_down(args)
    compare_data(args, args.resumed)
    state.engine.finish_update()
    state.step = args.resumed["step"]
    scalars = args.resumed.get("scalars", {"step": state.step})  # older ones are AdamW's
    for entry in state.optimizer.state.values() if args.taken.averages else ():
        for name, value in scalars.items():
            entry[name].fill_(value)
    if args.taken.goes_on:
        go_on(state)
        state.loss_scale.restore(args.resumed.get("loss_scale"))
    else:
        state.step = 0


def read_by_all(args, world, read):
    """Whether no rank finds damage. Raises UserError where no older checkpoint may do."""
    try:
        pg.from_all(world, read)
        return True
    except UserError as error:
        if not args.older:
            remedy = "the checkpoint is damaged, name another one"
            raise UserError(f"{args.source} {error}: {remedy}") from None
        note(f"{args.source} {error}; an older one is tried")
        return False
