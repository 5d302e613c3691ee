"""`--optimizer`: those of torch.optim that treat each number of a weight by itself."""

import functools
import inspect
import json

import torch
from torch import optim

from errors import UserError, in_one_line, note

ELEMENTWISE = {
    kind.__name__.lower(): kind
    for kind in (
        *(optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.ASGD),
        *(optim.NAdam, optim.RAdam, optim.RMSprop, optim.Rprop, optim.SGD),
    )
}
# Those that we do not take, and what they work on. The first three give a number of a weight
# another update where only a part of the weight is there.
NOT_ELEMENTWISE = {
    "adafactor": "rows and columns of a weight",
    "lbfgs": "all weights at once",
    "muon": "whole matrices",
    "sparseadam": "sparse gradients, and a Llama has none",
}
# Where we take another value than torch. Betas: Llama 2 (arXiv:2307.09288), section 2.2. `fused`
# goes through weights and moments once instead of several times.
DEFAULTS = {
    "adamw": {"betas": (0.9, 0.95), "fused": True},
    "adam": {"fused": True},
    "sgd": {"fused": True},
}


def choose_optimizer(args, known=ELEMENTWISE):
    """Make `args.make_optimizer`, a function from groups of parameters and `lr` to an optimizer.

    known: the classes there are, by name. Raises UserError for a name that is not there, or
    arguments that it does not take.
    """
    name, flag = args.optimizer, f"--optimizer {args.optimizer}"
    choice = f"choose one of {', '.join(known)}"
    if name not in known:
        reason = f"it works on {NOT_ELEMENTWISE[name]}; " if name in NOT_ELEMENTWISE else ""
        raise UserError(f"{flag}: {reason}{choice}")
    kind, options = known[name], DEFAULTS.get(name, {}) | own_arguments(args)
    args.make_optimizer = functools.partial(kind, **options)
    if args.optimizer_args != "{}":
        try_out(args)
    if args.weight_decay and "weight_decay" not in inspect.signature(kind).parameters:
        note(f"{flag}: it has no weight decay; --weight_decay {args.weight_decay} is not used")


def own_arguments(args):
    """What `--optimizer_args` says, a dict; raises UserError."""
    flag, example = f"--optimizer_args {args.optimizer_args}", "'{\"momentum\": 0.9}'"
    try:
        found = json.loads(args.optimizer_args)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{flag}: no JSON object; write it as {example}")
    for key, instead in (("lr", "--learning_rate"), ("weight_decay", "--weight_decay")):
        if key in found:
            raise UserError(f"{flag}: give {key} as {instead}")
    return found


def try_out(args):
    """Make the optimizer for one number, and take a step; raises UserError where it can't."""
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    try:
        args.make_optimizer([weight], lr=args.learning_rate).step()
    except Exception as error:
        what = f"--optimizer {args.optimizer} --optimizer_args {args.optimizer_args}"
        kind = args.make_optimizer.func
        remedy = f"the documentation of {kind.__module__}.{kind.__name__} has its arguments"
        raise UserError(f"{what}: {in_one_line(error)}; {remedy}") from None
