"""Some steps of training: in one go, stopped and continued, from given weights."""

import numpy as np
import torch
from harness import pieces
from workers_setup import build


def weights_after(argv, steps):
    """Pieces of this rank's weights after some steps of training."""
    import train

    state = build(argv)
    for _ in range(steps):
        train.train_step(state)
    return pieces(state.parameters, lambda p: p)


def gradients_at(argv, weights, step):
    """Pieces of a step's gradients, and its loss, with the weights of an .npz file.

    step: how many there were before.
    """
    import train

    state = build(argv)
    state.step = step
    with np.load(weights) as full:
        for p in state.parameters:
            own = full[p.global_name][p.held].reshape(-1)[getattr(p, "piece", slice(None))]
            p.data.copy_(torch.from_numpy(own).reshape(p.shape))
    if hasattr(state, "engine"):
        state.engine.finish_update()
    loss = train.forward_backward(state).detach().double().cpu().numpy()
    whole = "loss", (), (), slice(None), loss
    return [whole, *pieces(state.parameters, lambda p: p.grad)]


def continued(argv, stop, steps):
    """Metrics and final weights of `steps` steps in one go, and stopped and rebuilt after `stop`.

    What is carried over: weights, optimizer state, the number of the step.
    """
    import copy

    import torch.distributed as dist

    import train

    def run(state, until):
        metrics = []
        while state.step < until:
            metrics.append(train.train_step(state))
        return [{k: m[k] for k in m if k != "memory_gb"} for m in metrics]

    def weights(state):
        return [p.detach().numpy().copy() for p in state.parameters]

    def leave():
        if dist.is_initialized():
            dist.destroy_process_group()

    state = build(argv)
    whole = run(state, steps), weights(state)
    leave()
    state = build(argv)
    first = run(state, stop)
    kept = copy.deepcopy((state.model.state_dict(), state.optimizer.state_dict(), state.step))
    leave()
    state = build(argv + " --num_workers 2" if "--dataset_name" in argv else argv)
    state.model.load_state_dict(kept[0])
    state.optimizer.load_state_dict(kept[1])
    state.step = kept[2]
    resumed = first + run(state, steps), weights(state)
    leave()
    same = all(np.array_equal(a, b) for a, b in zip(whole[1], resumed[1], strict=True))
    return whole[0], resumed[0], same


KEPT = {}  # what a rank keeps from one call to the next


def segment(argv, until, resume):
    """Train up to a step, from the start or from where the last segment ended; the metrics.

    What is carried over: what the optimizer works on, its state, the number of the step.
    """
    import copy

    import train

    state = build(argv)
    if resume:
        train.evaluate(state)  # what it leaves behind must not outlive the update below
        with torch.no_grad():
            for parameter, kept in zip(state.parameters, KEPT["parameters"], strict=True):
                parameter.copy_(kept)
        if hasattr(state, "engine"):
            state.engine.finish_update()
        state.optimizer.load_state_dict(KEPT["optimizer"])
        state.step = KEPT["step"]
    metrics = []
    while state.step < until:
        result = train.train_step(state)
        metrics.append([result[key] for key in ("step", "loss", "grad_norm", "learning_rate")])
    KEPT["parameters"] = [parameter.detach().clone() for parameter in state.parameters]
    KEPT["optimizer"] = copy.deepcopy(state.optimizer.state_dict())
    KEPT["step"] = state.step
    return metrics


def trained_and_evaluated(argv):
    """Losses of two steps and held-out losses around them."""
    import train

    state = build(argv)
    losses = [train.evaluate(state)["held_out"]]
    for _ in range(2):
        losses += [train.train_step(state)["loss"], train.evaluate(state)["held_out"]]
    return losses
