"""Functions that the tests run inside a `World`: there, `import train` is the step's own code.

The modules `workers_*.py` hold them by subject. Here: what is built before the first step of a run,
and what is refused.
"""

import importlib
from unittest.mock import patch

import torch


def build(argv):
    """The state of a run before its first step."""
    import train

    return train.setup(train.parse_args(argv.split()))


def initial_weights(argv):
    """{name: array} of a fresh model."""
    state = build(argv)
    return {p.global_name: p.detach().double().numpy() for p in state.model.parameters()}


def optimizer_groups(argv):
    """[(weight decay, {dims of its parameters})]."""
    state = build(argv)
    return [
        (group["weight_decay"], {p.dim() for p in group["params"]})
        for group in state.optimizer.param_groups
    ]


def learning_rates(argv, steps):
    import train

    args = train.parse_args(argv.split())
    return args.total_steps, [train.learning_rate_at(step, args) for step in steps]


def shapes_of(argv):
    """{name: shape of what this rank holds}."""
    return {p.global_name: tuple(p.shape) for p in build(argv).model.parameters()}


def module_kinds(argv):
    return {type(module).__name__ for module in build(argv).model.modules()}


def refusal(argv, started, script="train"):
    """What parse_args says of a wrong call in a job of so many processes."""
    import errors

    with patch.dict("os.environ", WORLD_SIZE=str(started), LOCAL_WORLD_SIZE=str(started)):
        try:
            importlib.import_module(script).parse_args(argv.split())
        except errors.UserError as error:
            return str(error)
    raise AssertionError(f"{argv} was taken for a good call")


def refusals_of_setup(argvs):
    """What each of several wrong calls is told, in order, before it trains."""
    import errors

    said = []
    for argv in argvs:
        try:
            build(argv)
        except errors.UserError as error:
            said.append(str(error))
        else:
            said.append("nothing")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return said


def tags_of_a_tensor(argv):
    """What parameters carry under a name that every tensor has."""
    tags = {name for parameter in build(argv).model.parameters() for name in vars(parameter)}
    return [name for name in tags if hasattr(torch.Tensor, name)]
