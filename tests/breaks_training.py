"""Mistakes of training: in gradients, in what they are divided by, in weights and data."""

import os
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


def weights_in_bfloat16(train):
    """No float32 copy of the weights: what is smaller than their last digit is lost."""
    train_step = train.train_step

    def rounded(state):
        metrics = train_step(state)
        for parameter in state.parameters:
            parameter.data.copy_(parameter.data.bfloat16())
        return metrics

    train.train_step = rounded


def other_data_on_a_replica(train):
    """Replicas that see their sequences in another order than the first one."""
    setup = train.setup

    def spoiled(args):
        state = setup(args)
        state.data.order.seed += int(os.environ["RANK"])
        return state

    train.setup = spoiled
