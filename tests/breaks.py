"""Mistakes, planted on purpose: what the checks must notice.

Each function takes the `train` module of a step and spoils it. As a script it trains with a
mistake: `python tests/breaks.py halve_norm_gradients step3_dataloader/train.py --max_tokens 9000`.
"""

import importlib
import os
import sys
import time
from pathlib import Path

import torch


def after_backward(train, spoil):
    """Call spoil(state) when a step's gradients are complete, before the norm is taken."""
    forward_backward = train.forward_backward

    def spoiled(state):
        loss = forward_backward(state)
        with torch.no_grad():
            spoil(state)
        return loss

    train.forward_backward = spoiled


def halve_norm_gradients(train):
    """What a sum that is missing over two ranks does to the weights of the norms."""

    def halve(state):
        for parameter in state.parameters:
            if len(parameter.full_shape) == 1:
                parameter.grad.mul_(0.5)

    after_backward(train, halve)


def scale_gradients(train):
    """A constant factor on every gradient: Adam hides it, the gradient norm does not."""

    def scale(state):
        for parameter in state.parameters:
            parameter.grad.mul_(2)

    after_backward(train, scale)


def mean_of_micro_batches(train):
    """Each micro-batch divided by its own number of targets, not by the step's."""
    forward_backward = train.forward_backward

    def spoiled(state):
        own = state.args.tokens_per_step
        state.args.tokens_per_step //= state.args.gradient_accumulation_steps
        try:
            return forward_backward(state)
        finally:
            state.args.tokens_per_step = own

    train.forward_backward = spoiled


def last_micro_batch_only(train):
    """Gradients of all micro-batches but the last one are lost."""
    forward_backward = train.forward_backward

    def spoiled(state):
        micro_batches = state.data.micro_batches

        def forgetful(step):
            for micro_batch in micro_batches(step):
                state.optimizer.zero_grad()
                yield micro_batch

        state.data.micro_batches = forgetful
        try:
            return forward_backward(state)
        finally:
            state.data.micro_batches = micro_batches

    train.forward_backward = spoiled


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
