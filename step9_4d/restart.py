"""Restarts: a new run that takes what another one has learned, all of it or a part.

    --restart    weights                 the optimizer's averages    steps count
    all          all                     all                         on
    cooldown     all                     all                         on, to a rate of zero
    weights      all                     none                        from 0
    optimizer    none                    all                         from 0
    transfer     of one name and shape   none                        from 0

A resume takes all, too, but of its own run.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from errors import UserError, note
from learning_rate import learning_rate_at
from model import Llama
from resharding import tensors_of
from run_directory import checkpoints, find, newest_sound, read_about


class Kind(NamedTuple):
    """What is taken of a checkpoint."""

    weights: str  # all, none, or fitting
    averages: bool  # what the optimizer keeps of each weight
    goes_on: bool  # in steps, data and loss scale; otherwise these begin anew
    same: tuple  # how the names of what must be the same in both runs begin
    noted: tuple = ("dtype", "weights_dtype")  # flags whose change is said


SCHEDULE = (
    *("max_tokens", "learning_rate", "warmup_steps"),
    *("lr_schedule", "min_lr_ratio", "decay_steps"),
)
OTHERS = (
    *("dataset_name", "dataset_config", "text_column", "tokenizer_name"),
    *("weight_decay", "max_grad_norm", "dtype", "weights_dtype"),
)
KINDS = {
    "all": Kind("all", True, True, ("",), SCHEDULE + OTHERS),  # each name begins with ""
    "cooldown": Kind("all", True, True, ("a model", "--optimizer", "--tokenizer_name"), OTHERS),
    "weights": Kind("all", False, False, ("a model",)),
    "optimizer": Kind("none", True, False, ("a model", "--optimizer")),
    "transfer": Kind("fitting", False, False, ()),
}
# What all ranks have to know alike of the checkpoint that is chosen.
CHOSEN = (
    *("resume", "resumed", "older", "source", "taken", "cooldown"),
    *("learning_rate", "warmup_steps", "min_lr_ratio", "total_steps"),
)


def choose_restart(args):
    """Put the checkpoint of `--restart_from` into `args.resume`, if there is none of this run.

    And what is to be taken of it into `args.taken`. Raises UserError.
    """
    args.taken, args.cooldown = KINDS["all"], None  # as of a resume
    check_restart(args)
    if args.restart is None:
        return
    if args.resume is not None:  # by auto: this is the second life of a restart
        note(f"--restart_from {args.restart_from}: not read, this run goes on from {args.resume}")
        return
    args.source, args.taken = "--restart_from", KINDS[args.restart]
    path = Path(args.restart_from)
    args.older = [] if (path / "checkpoint.json").exists() else checkpoints(path)
    if args.older:  # a run's directory
        args.resume, args.resumed = newest_sound(args.source, args.older)
    else:
        args.resume = find(args.source, path)
        args.resumed = read_about(args.source, args.resume)


def check_restart(args):
    """Raise UserError for flags of a restart that do not go together."""
    flag, what = f"--restart_from {args.restart_from}", f"--restart {args.restart}"
    if args.restart is None and args.restart_from is not None:
        raise UserError(f"{flag}: say what to take of it by --restart, one of {', '.join(KINDS)}")
    if args.restart is None:
        return
    if args.restart_from is None:
        raise UserError(f"{what}: name a checkpoint, or a run's directory, by --restart_from")
    if args.load_hf is not None:
        raise UserError(f"{flag} with --load_hf {args.load_hf}: a run begins once; leave one out")
    if args.resume is not None and not args.auto:
        raise UserError(f"{flag} with --resume {args.resume}: leave one out, or --resume auto")
    if args.restart == "cooldown" and args.decay_steps is None:
        raise UserError(f"{what}: say by --decay_steps how many steps it takes")
    if args.restart == "cooldown" and args.lr_schedule == "constant":
        raise UserError(f"{what} with --lr_schedule constant: choose cosine, linear or wsd")


def chosen(args):
    """What the first rank tells the others, who may have found another checkpoint."""
    return {name: getattr(args, name) for name in CHOSEN}


# --- what is read ---------------------------------------------------------------------------------


def to_take(state):
    """The `Tensors` of this rank that are read from `args.resume`."""
    kind, parameters = state.args.taken, state.parameters
    if kind.weights == "fitting":
        _, same = shapes_of_both(state.args)
        parameters = [p for p in parameters if p.global_name in same]
    tensors = tensors_of(parameters, state.optimizer if kind.averages else None)
    if kind.weights == "none":
        for parameter in parameters:
            del tensors[parameter.global_name]
    return tensors


def shapes_of(config):
    """{name: shape} of the weights of a model; a tied head is no weight of its own."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}


def shapes_of_both(args):
    """({name: shape} of this model and of the checkpoint's, names with one shape in both)."""
    there = SimpleNamespace(**{**vars(args.config), **args.resumed["model"]})
    both = shapes_of(args.config), shapes_of(there)
    return both, {name for name, _ in both[0].items() & both[1].items()}


def say_what_changes(args):
    """Say whether other windows are held out, and which weights are not taken.

    Raises UserError where none is.
    """
    where, before = f"{args.source} {args.resume}", {**args.flags, **args.resumed["flags"]}
    cut_anew = any(before[name] != args.flags[name] for name in ("seq_len", "stride"))
    if cut_anew and args.taken.weights != "none":
        note(f"{where}: windows are cut anew; what is held out of them may have been trained on")
    sizes = ("micro_batch_size", "gradient_accumulation_steps", "dp_size", "seq_len")
    tokens, now = math.prod(before[name] for name in sizes), args.tokens_per_step
    if args.taken.goes_on and tokens != now:
        note(f"{where}: steps had {tokens} tokens; `tokens` counts {now} for each, as it is now")
    if args.taken.weights != "fitting":
        return
    (here, there), same = shapes_of_both(args)
    if not same:
        name = next(name for name in here if name in there)
        raise UserError(
            f"{where}: no weight has the same name and shape here: {name} is {[*there[name]]} "
            f"there, {[*here[name]]} here; name a checkpoint of a more similar model"
        )
    stay = {
        name: f" ({[*there[name]]} there, {[*here[name]]} here)" if name in there else ""
        for name in here.keys() - same
    }
    spare = dict.fromkeys(there.keys() - here.keys(), "")
    said = f"{where}: {len(same)} of {len(here)} weights are taken"
    said += f"; as initialised are {in_few_words(stay, here)}" if stay else ""
    note(said + (f"; not in this model are {in_few_words(spare, there)}" if spare else ""))


def in_few_words(remarks, model):
    """Names of a model's weights with a remark behind each, as "model.layers.4-7, lm_head.weight".

    remarks: {name: text}, of layers whose numbers follow each other.
    """
    found = {}  # {(before the number, behind it): numbers of layers}
    for name in filter(remarks.__contains__, model):  # in the model's order
        head, number, tail = re.fullmatch(r"(.*\.layers\.|)(\d*)(.*)", name).groups()
        layer = [other for other in model if other.startswith(f"{head}{number}.")]
        if number and all(remarks.get(other) == remarks[name] for other in layer):
            tail = ""
        found.setdefault((head, tail + remarks[name]), []).append(number)
    return ", ".join(
        head + "-".join(dict.fromkeys([numbers[0], numbers[-1]])) + tail
        for (head, tail), numbers in found.items()
    )


# --- the cooldown ---------------------------------------------------------------------------------


def rates_of(args, step):
    """What a cooldown from here has to know: the rate of this step, and where one began before."""
    return {"learning_rate": learning_rate_at(step, args), "cooldown": args.cooldown}


def cool_down(args):
    """Let the rate fall from that of `args.resume` to zero; the run ends there.

    The schedule is that of a run without warm-up whose last `--decay_steps` steps begin now. In a
    second life the checkpoint says where the cooldown began. Raises UserError.
    """
    about, began = args.resumed, args.resumed.get("cooldown")
    if args.restart != "cooldown":
        if began is not None and args.taken.goes_on:
            note(f"{args.source} {args.resume}: until now it was a cooldown, from {began['step']}")
        return
    where = f"--restart cooldown: {args.resume}"
    if args.taken == KINDS["cooldown"]:  # its first life
        began = {"step": about["step"], "learning_rate": about.get("learning_rate")}
    if began is None:
        raise UserError(f"{where} is no part of a cooldown: name another --checkpoint_dir")
    if not began["learning_rate"]:
        had = "has a rate of 0" if "learning_rate" in about else "does not say its rate"
        raise UserError(f"{where} {had}: name an earlier one, or one saved by this program")
    args.cooldown = began
    args.learning_rate, args.warmup_steps = began["learning_rate"], 0
    args.total_steps = began["step"] + args.decay_steps
    if args.min_lr_ratio is None:
        args.min_lr_ratio = 0.0
    note(
        f"{where}: from the learning rate {began['learning_rate']:.3g} of step {began['step']} to "
        f"{args.min_lr_ratio * began['learning_rate']:.3g} at step {args.total_steps}; "
        "--max_tokens, --learning_rate and --warmup_steps are not used"
    )
