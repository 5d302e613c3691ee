"""A small model, whole and in stages, and what the whole one gives: for the checks of pipelines."""

import types

from harness import RankError, Run, run_steps
from same import SMALL, in_one_line, same

LAYERS, MICRO_BATCHES, TOKENS = 4, 4, 2 * 32  # of a micro-batch


def config():
    from presets import preset

    small = {"num_hidden_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    found = preset("debug")
    found.__dict__.update(small)
    return found


def group_of(size, rank):
    """A group along pp for code that sends nothing."""
    import process_group as pg

    return pg.Group("pp", tuple(range(size)), rank, None)


def model_of(group=None):
    """The whole model in float64, or a stage of it."""
    import torch

    from model import Llama, materialize

    with torch.device("meta"):
        model = Llama(config(), torch.float64)
    if group is not None:
        from pipeline_parallel import apply_pipeline_parallel

        apply_pipeline_parallel(model, group)
    materialize(model, 3, torch.device("cpu"))
    return model


def batches():
    """Micro-batches that differ: (tokens, targets, positions) each."""
    import torch

    torch.manual_seed(1)
    tokens = torch.randint(config().vocab_size, (MICRO_BATCHES, 2, 33))
    return [(one[:, :-1], one[:, 1:], torch.arange(32)) for one in tokens]


def stage_of(group, engine="1f1b"):
    """A stage as `setup` would build it, and the object in place of an engine of dp."""
    import torch

    from pipeline_parallel import Stage

    engine_of_dp = types.SimpleNamespace(last_backward=False)
    args = types.SimpleNamespace(
        config=config(), micro_batch_size=2, seq_len=32, cp_size=1, tp_size=1, timeline=None,
        sequence_parallel=False, gradient_accumulation_steps=MICRO_BATCHES, pp_engine=engine,
    )  # fmt: skip
    return Stage(args, model_of(group), group, engine_of_dp, torch.device("cpu")), engine_of_dp


class Whole:
    """What the whole model gives for all micro-batches: loss, weights' gradients, activations.

    inputs[layer][i]: what the layer is given of micro-batch i, with its gradient.
    """

    def __init__(self):
        self.model, self.inputs, self.loss = model_of(), {}, 0
        for number, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(self.keeper(number))
        for tokens, targets, positions in batches():
            loss = self.model(tokens, targets, positions) / (MICRO_BATCHES * TOKENS)
            loss.backward()
            self.loss += loss.detach()
        self.gradients = {p.global_name: p.grad for p in self.model.parameters()}

    def keeper(self, number):
        def keep(layer, args):
            args[0].retain_grad()
            self.inputs.setdefault(number, []).append(args[0])

        return keep

    def same_gradients(self, stage):
        """Demand that a stage's weights have the gradients that they have in the whole model."""
        for weight in stage.model.parameters():
            name = weight.global_name
            meaning = f"the sum over {MICRO_BATCHES} micro-batches, each divided by targets_in_all"
            same(weight.grad, self.gradients[name], f"the gradient of {name}", meaning)

    def same_loss(self, stage, where=""):
        total = self.loss if stage.after is None else self.loss * 0
        words = "the sum of all micro-batches' losses, each divided by targets_in_all. Stage.begin "
        words += "sets it to zero, Stage.forward adds to it"
        what = f"{where}The loss of stage {stage.group.rank}, self.total,"
        assert stage.total.dtype == total.dtype, (
            f"{what} is {stage.total.dtype}; Stage.begin should make it float64"
        )
        same(stage.total, total, what, words if stage.after is None else "zero, as it has no loss")


def orders_of(stage):
    """Watch a stage: a list that gets "f" and "b" for its passes, and one of how many are alive."""
    order, alive = [], []

    def watched(name, method):
        def call(*args):
            order.append(name)
            result = method(*args)
            alive.append(len(stage.alive))
            return result

        return call

    stage.forward, stage.backward = watched("f", stage.forward), watched("b", stage.backward)
    return order, alive


WAITING = (
    "Usually one stage waits for a message that the other has not sent, or both wait until their "
    "sends are received"
)
MEANINGS = {
    " took over ": WAITING,
    "deadlock: ": WAITING,
    "implicitly created only for scalar": "A stage before the last went backward with no gradient. "
    "It should receive one from the stage after it.",
}


def answered(world, function, *args, timeout=20):
    """world.run, but where ranks wait for each other, say so."""
    try:
        return world.run(function, *args, timeout=timeout)
    except RankError as error:
        raise RankError(in_one_line(error, MEANINGS)) from None


def same_layout(step_dir, worlds, train_on, size, flags, one, hint):
    """Demand that a layout trains as one process does, with the flags of the one process.

    hint: what is usually wrong if it does not; see `in_one_line`.
    """
    reference = train_on(step_dir, 1, SMALL + one, 2)
    try:
        ranks = answered(worlds(step_dir, size), run_steps, (SMALL + flags).split(), 2)
        Run(ranks).assert_same_as(reference)
    except AssertionError as error:
        raise AssertionError(in_one_line(error, hint)) from None
