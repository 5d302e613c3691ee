"""Functions that the tests of restarts run inside a `World`."""

import contextlib
import io

from harness import pieces
from workers_setup import build


def begun(argv):
    """What a run has before its first step.

    Returns a dict: step; weights, in pieces; averages, {name: pieces} of all that the optimizer
    keeps of each weight; scalars, what it keeps once; loss_scale; said, what was printed.
    """
    from resharding import scalars_of

    with contextlib.redirect_stdout(io.StringIO()) as said:
        state = build(argv)
    kept = state.optimizer.state
    names = [name for name, value in kept[state.parameters[0]].items() if value.dim()]
    return {
        "step": state.step,
        "weights": pieces(state.parameters, lambda p: p),
        "averages": {
            name: pieces(state.parameters, lambda p, name=name: kept[p][name]) for name in names
        },
        "scalars": scalars_of(state.optimizer, state.parameters),
        "loss_scale": state.loss_scale.saved(),
        "said": said.getvalue().splitlines(),
    }


def found_apart(argv, others):
    """A run in which the last rank has found another checkpoint than the first one.

    Returns (the step it began with, (loss, learning rate) of each step).
    """
    import errors
    import train

    args = train.parse_args((others if errors.RANK else argv).split())
    state = train.setup(args)
    begin, found = state.step, []
    while state.step < args.total_steps:
        result = train.train_step(state)
        found.append((result["loss"], result["learning_rate"]))
    return begin, found


def without_rate(path):
    """Make a checkpoint one of a program that did not write the learning rate."""
    import json

    import run_directory

    about = json.loads((path / "checkpoint.json").read_text())["about"]
    del about["learning_rate"], about["cooldown"]
    run_directory.write_about(path, about)
