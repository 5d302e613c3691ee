"""Mistakes, planted on purpose: what the checks must notice.

Each function takes the `train` module of a step and spoils it. As a script it trains with a
mistake: `python tests/breaks.py halve_norm_gradients step3_dataloader/train.py --max_tokens 9000`.
"""

import importlib
import os
import sys
import time
from pathlib import Path
from unittest.mock import patch


def instead(train, spoil):
    """Let spoil(state, forward_backward) stand in for a step's forward_backward(state)."""
    forward_backward = train.forward_backward
    train.forward_backward = lambda state: spoil(state, forward_backward)


def after_backward(train, change):
    """Call change(parameter) when a step's gradients are complete, before the norm is taken."""

    def spoil(state, forward_backward):
        loss = forward_backward(state)
        for parameter in state.parameters:
            change(parameter)
        return loss

    instead(train, spoil)


def halve_norm_gradients(train):
    """What a sum that is missing over two ranks does to the weights of the norms."""

    def halve(parameter):
        if len(parameter.full_shape) == 1:
            parameter.grad.mul_(0.5)

    after_backward(train, halve)


def scale_gradients(train):
    """A constant factor on every gradient: Adam hides it, the gradient norm does not."""
    after_backward(train, lambda parameter: parameter.grad.mul_(2))


def mean_of_micro_batches(train):
    """Each micro-batch divided by its own number of targets, not by the step's."""

    def spoil(state, forward_backward):
        own = state.args.tokens_per_step // state.args.gradient_accumulation_steps
        with patch.object(state.args, "tokens_per_step", own):
            return forward_backward(state)

    instead(train, spoil)


def last_micro_batch_only(train):
    """Gradients of all micro-batches but the last one are lost."""

    def spoil(state, forward_backward):
        micro_batches = state.data.micro_batches

        def forgetful(step):
            for micro_batch in micro_batches(step):
                state.optimizer.zero_grad()
                yield micro_batch

        with patch.object(state.data, "micro_batches", forgetful):
            return forward_backward(state)

    instead(train, spoil)


def other_data_on_a_replica(train):
    """Replicas that see their sequences in another order than the first one."""
    setup = train.setup

    def spoiled(args):
        state = setup(args)
        state.data.order.seed += int(os.environ["RANK"])
        return state

    train.setup = spoiled


def late_first_rank(train):
    """No mistake, but bad luck: the rank that reports errors is two seconds late."""
    if os.environ.get("RANK", "0") == "0":
        time.sleep(2)


if __name__ == "__main__":
    name, script, *argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    train = importlib.import_module("train")
    globals()[name](train)
    errors = importlib.import_module("errors")
    try:
        train.main(train.parse_args(argv))
    except errors.UserError as error:
        errors.stop(error)
