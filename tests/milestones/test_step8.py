"""The milestones of step 8: the order of 1F1B, what is alive, and steps beside the whole model."""

import types

import pytest
import stages
from stages import MICRO_BATCHES, TOKENS, answered, same_layout

pytestmark = pytest.mark.usefixtures("worlds")

# --- 1. one forward, one backward -----------------------------------------------------------------

CASES = [(2, 4), (3, 4), (4, 8), (2, 1), (3, 1), (3, 2), (1, 3)]  # stages, micro-batches


def passes_of(size, rank, count):
    """Run the schedule of one stage with nobody to talk to.

    Returns its passes, a string; the most micro-batches alive; and its messages, for each call of
    `talk` with a neighbour (to the stage after?, sends?, receives?).
    """
    from pipeline_parallel import one_forward_one_backward

    order, waiting, alive, messages = [], list(range(count)), [], []

    def forward(x, micro_batch):
        assert micro_batch == waiting.pop(0), "micro-batches should go forward in their order"
        assert (x is not None) == (rank > 0), "forward needs what the stage before has sent"
        order.append("f")
        alive.append(order.count("f") - order.count("b"))
        return "activation"

    def backward(grad):
        assert order.count("f") > order.count("b"), (
            "no micro-batch is alive: nothing to go backward"
        )
        assert (grad is not None) == (rank + 1 < size), "backward needs what the stage after sent"
        order.append("b")
        return "gradient" if rank else None

    def talk(peer, send=None, receive=False):
        if peer is None:
            return None
        messages.append((peer > rank, send is not None, receive))
        return "a message" if receive else None

    stage = types.SimpleNamespace(group=stages.group_of(size, rank), micro_batches=count)
    stage.forward, stage.backward, stage.talk = forward, backward, talk
    stage.before, stage.after = rank - 1 if rank else None, rank + 1 if rank + 1 < size else None
    stage.finish_sends = lambda: None
    try:
        one_forward_one_backward(stage, range(count))
    except StopIteration:
        raise AssertionError(
            f"one_forward_one_backward on stage {rank} of {size} asks for more than the {count} "
            "micro-batches: its warm-up has min(p - 1 - r, m) passes"
        ) from None
    return "".join(order), max(alive), messages


def all_passes():
    return {case: [passes_of(case[0], rank, case[1]) for rank in range(case[0])] for case in CASES}


@pytest.mark.milestone(8, 1)
def test_the_order_of_the_passes(step_dir, worlds):
    (found,) = worlds(step_dir, 1).run(all_passes)
    for (size, count), ranks in found.items():
        for rank, (order, alive, messages) in enumerate(ranks):
            what = f"one_forward_one_backward, stage {rank} of {size}, {count} micro-batches:"
            ahead = min(size - 1 - rank, count)
            due = "f" * ahead + "fb" * (count - ahead) + "b" * ahead
            assert order == due, (
                f"{what} passes {order}, not {due} (f forward, b backward). The warm-up has "
                "p - 1 - r forward passes, or as many as there are micro-batches"
            )
            most = min(size - rank, count)
            assert alive == most, f"{what} {alive} are alive at most, not min(p - r, m) = {most}"
            check_messages(what, size, rank, count, messages)


def check_messages(what, size, rank, count, messages):
    """Every activation and gradient once; and what crosses on its way in one call."""
    for after, name in ((True, "after"), (False, "before")):
        if 0 <= rank + (1 if after else -1) < size:
            calls = [call[1:] for call in messages if call[0] is after]
            sends, receives = (sum(column) for column in zip(*calls, strict=True))
            assert sends == receives == count, (
                f"{what} {sends} messages to the stage {name} it and {receives} from it; {count} "
                "each way are due. Does it receive where nothing is sent: when `steady` is 0, or "
                "after the last pair?"
            )
            steady = count - min(size - 1 - rank, count)
            due = steady if after else max(0, steady - 1)
            both = sum(call == (True, True) for call in calls)
            assert both == due, (
                f"{what} {both} calls of talk send to the stage {name} it and receive from it, "
                f"{due} should. In the steady state both must be in one call, or the two stages "
                "wait for each other for ever"
            )


def a_step(engine, by_name):
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(pp=torch.distributed.get_world_size()).group("pp")
    whole, (stage, _) = stages.Whole(), stages.stage_of(group, engine)
    order, _ = stages.orders_of(stage)
    if by_name:
        stage.run(stages.batches(), MICRO_BATCHES * TOKENS, backward=False)
        passes = f"passes {''.join(order)}; it should only go forward"
        assert set(order) == {"f"}, f"Stage.run with backward=False: {passes}"
        order.clear()
        stage.run(stages.batches(), MICRO_BATCHES * TOKENS, backward=True)
    else:
        from pipeline_parallel import one_forward_one_backward

        stage.begin(MICRO_BATCHES * TOKENS)
        one_forward_one_backward(stage, stages.batches())
        stage.finish_sends()
    whole.same_loss(stage)
    whole.same_gradients(stage)
    return "".join(order)


@pytest.mark.milestone(8, 1)
@pytest.mark.parametrize("count", [2, 3])
def test_stages_that_alternate(step_dir, worlds, count):
    answered(worlds(step_dir, count), a_step, "1f1b", False)


# --- 2. a schedule by name ------------------------------------------------------------------------


def names():
    from pipeline_parallel import SCHEDULES

    return {name: schedule.__name__ for name, schedule in SCHEDULES.items()}


@pytest.mark.milestone(8, 2)
def test_schedules_have_names(step_dir, worlds):
    due = {"afab": "all_forward_all_backward", "1f1b": "one_forward_one_backward"}
    (found,) = worlds(step_dir, 1).run(names)
    assert found == due, f"SCHEDULES has {found}; it should have {due}"


@pytest.mark.milestone(8, 2)
@pytest.mark.parametrize(
    "count, engine, due",
    [
        (2, "afab", ["ffffbbbb"] * 2),
        (2, "1f1b", ["ffbfbfbb", "fbfbfbfb"]),
        (1, "afab", ["fbfbfbfb"]),
    ],
)
def test_run_calls_the_schedule(step_dir, worlds, count, engine, due):
    found = answered(worlds(step_dir, count), a_step, engine, True)
    hint = "Stage.run should call the schedule of that name"
    if count == 1:
        hint = "Stage.__init__ should give a stage alone 1f1b, whatever the flag says"
    assert found == due, (
        f"--pp_engine {engine} on {count} stages: passes {found}, not {due}. {hint}"
    )


# --- 3. the whole program -------------------------------------------------------------------------

FOUR = "--num_hidden_layers 4 --micro_batch_size 1 --gradient_accumulation_steps 4 "
ONE = "--num_hidden_layers 4 --micro_batch_size 4 "
HINT = "Milestones 1 and 2 are reached: compare flags.py and Stage.__init__."


def default_engine():
    import train

    return train.parse_args([]).pp_engine


@pytest.mark.milestone(8, 3)
def test_the_default(step_dir, worlds):
    assert worlds(step_dir, 1).run(default_engine) == ["1f1b"], (
        "parse_args in flags.py: --pp_engine 1f1b is the default"
    )


@pytest.mark.milestone(8, 3)
@pytest.mark.parametrize("flags", ["--pp_engine afab", "--pp_engine 1f1b"])
def test_both_schedules_train_as_one_process(step_dir, worlds, train_on, flags):
    same_layout(step_dir, worlds, train_on, 2, FOUR + f"--pp_size 2 {flags}", ONE, HINT)


@pytest.mark.milestone(8, 3)
def test_beside_data_parallelism(step_dir, worlds, train_on):
    flags = FOUR + "--pp_size 2 --dp_size 2 --gradient_accumulation_steps 2"
    hint = "Without dp it is right. Usually the buckets start their sums before the last pass: "
    hint += "engine.last_backward must count the passes."
    same_layout(step_dir, worlds, train_on, 4, flags, ONE, hint)
