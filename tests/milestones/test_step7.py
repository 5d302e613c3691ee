"""The milestones of step 7: stages of a pipeline, in one process and on ranks, beside the whole."""

import json
from unittest.mock import patch

import pytest
import stages
from same import same
from stages import MICRO_BATCHES, TOKENS, answered, same_layout

pytestmark = pytest.mark.usefixtures("worlds")

# --- 1. a part of the layers ----------------------------------------------------------------------


def dealt_layers():
    from pipeline_parallel import deal_layers

    found = {}
    for layers, count in ((8, 2), (7, 3), (3, 3)):
        config = stages.config()
        config.num_hidden_layers = layers
        found[layers, count] = [list(part) for part in deal_layers(config, count)]
    return found


@pytest.mark.milestone(7, 1)
def test_layers_are_dealt_out(step_dir, worlds):
    (found,) = worlds(step_dir, 1).run(dealt_layers)
    for (layers, count), parts in found.items():
        what = f"deal_layers gives {count} stages of {layers} layers {parts}"
        assert sum(parts, []) == list(range(layers)), f"{what}; each layer goes to one, in order"
        sizes = [len(part) for part in parts]
        assert len(parts) == count and max(sizes) - min(sizes) <= 1, f"{what}; deal more evenly"


def parts_in_a_row(count):
    whole = stages.model_of()
    weights = {p.global_name: p for p in whole.parameters()}
    parts = [stages.model_of(stages.group_of(count, rank)) for rank in range(count)]
    held = [p.global_name for part in parts for p in part.parameters()]
    for name in weights:
        times = held.count(name)
        assert times == 1, f"{times} of {count} stages hold {name}; it should be one"
    for weight in (p for part in parts for p in part.parameters()):
        name = weight.global_name
        same(weight, weights[name], f"the initial value of {name}", "that in the whole model", 0)
    tokens, targets, positions = stages.batches()[0]
    x = tokens
    for rank, part in enumerate(parts[:-1]):
        try:
            x = part(x, targets, positions)
        except Exception as error:
            words = f"stage {rank} fails: {error}. Without a head, cross_entropy(x, targets) is x"
            raise AssertionError(words) from error
        assert x.dim() == 3, f"stage {rank} returns {list(x.shape)}; only the last has a loss"
    loss, what = parts[-1](x, targets, positions), "the loss behind the last stage"
    meaning = "the whole model's: the last stage has the norm, the head and the loss, the first "
    same(loss, whole(tokens, targets, positions), what, meaning + "has the embedding")


@pytest.mark.milestone(7, 1)
@pytest.mark.parametrize("count", [2, 3])
def test_stages_in_a_row_are_the_model(step_dir, worlds, count):
    worlds(step_dir, 1).run(parts_in_a_row, count)


# --- 2. one stage ---------------------------------------------------------------------------------


def noted_spans():
    import time

    import torch

    from timeline import Timeline

    timeline = Timeline("a file", torch.device("cpu"))
    with timeline.span("forward"):
        time.sleep(0.02)
    assert len(timeline.spans) == 1, "a span should be noted when it ends: (name, start, end)"
    ((name, start, end),) = timeline.spans
    assert name == "forward" and end - start > 0.01, f"a span of 0.02 s: {timeline.spans}"
    timeline = Timeline(None, torch.device("cpu"))
    with timeline.span("forward"):
        pass
    assert not timeline.spans, "a Timeline without a path should note nothing"


@pytest.mark.milestone(7, 2)
def test_a_timeline_notes_spans(step_dir, worlds):
    worlds(step_dir, 1).run(noted_spans)


def stages_by_hand(count):
    """What ranks would do, in one process: all forward, then all backward."""
    import weakref

    whole, pairs = stages.Whole(), []
    for rank in range(count):
        pairs.append(stages.stage_of(stages.group_of(count, rank)))
    made, last = [], []
    for stage, engine in pairs:
        stage.begin(MICRO_BATCHES * TOKENS)
        stage.model.register_forward_hook(lambda *args: made.append(weakref.ref(args[2])))
        weight = next(stage.model.parameters())
        weight.register_post_accumulate_grad_hook(
            lambda weight, engine=engine: last.append(engine.last_backward)
        )
    firsts = [sum(len(s.model.model.layers) for s, _ in pairs[:rank]) for rank in range(count)]
    for number, batch in enumerate(stages.batches()):
        x = None
        for rank, (stage, _) in enumerate(pairs):
            x = stage.forward(x, batch)
            what = f"what stage {rank} sends on of micro-batch {number}"
            assert not x.requires_grad, f"{what} has a graph; it should be out.detach()"
            if rank + 1 < count:
                same(x, whole.inputs[firsts[rank + 1]][number], what, "the whole model's")
                x = x.clone()  # as it would arrive
                kept = made[-1]() is not None
                assert not kept, f"stage {rank} keeps its output: keep its gradient edge instead"
            alive = len(stage.alive)
            assert alive == number + 1, f"{alive} in stage.alive after {number + 1} forward passes"
    for stage, _ in pairs:
        whole.same_loss(stage)
    for number in range(MICRO_BATCHES):
        grad = None
        for rank in reversed(range(count)):
            grad = pairs[rank][0].backward(grad)
            if rank:
                what = f"the gradient that stage {rank} gives back first" if not number else (
                    f"the gradient that stage {rank} gives back as number {number}"
                )  # fmt: skip
                due = whole.inputs[firsts[rank]][number].grad
                same(grad, due, what, f"that of micro-batch {number}, the oldest: alive.popleft()")
    for stage, _ in pairs:
        assert not stage.alive, "nothing should be in stage.alive after the last backward pass"
        whole.same_gradients(stage)
    due = [False] * count * (MICRO_BATCHES - 1) + [True] * count
    assert last == due, (
        f"engine.last_backward was {last} in the backward passes; it should be true in each "
        "stage's last one, before it begins: then the buckets start their sums"
    )


@pytest.mark.milestone(7, 2)
@pytest.mark.parametrize("count", [2, 3])
def test_micro_batches_pass_through_stages(step_dir, worlds, count):
    worlds(step_dir, 1).run(stages_by_hand, count)


# --- 3. neighbours talk ---------------------------------------------------------------------------


def messages():
    """Forth, back, and both at once; numbers say who sent them."""
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(pp=torch.distributed.get_world_size()).group("pp")
    stage, _ = stages.stage_of(group)
    stage.shape = 16, 32, 32  # more than gloo sends before somebody receives
    waited, posted, exchange = [], [0], pg.exchange

    class Handle:
        def __init__(self, real):
            self.real = real

        def wait(self):
            waited.append(self)
            return self.real.wait()

    def watched(*args):
        posted[0] += 1
        return [Handle(real) for real in exchange(*args)]

    def message(number):
        return torch.full(stage.shape, 10.0 * group.rank + number, dtype=torch.float64)

    def arrived(x, sender, number, what):
        same(x, 10.0 * sender + number + torch.zeros_like(message(0)), what, "what was sent", 0)

    with patch.object(pg, "exchange", watched):
        try:
            nothing = stage.talk(None, send=message(0), receive=True) is None and not posted[0]
        except Exception:
            nothing = False
        assert nothing, "talk(None, …) should do nothing: nobody is beyond the ends of the pipeline"
        for number in (1, 2):
            x = stage.talk(stage.before, receive=True)
            if not group.is_first:
                arrived(x, group.rank - 1, number, "what talk(before, receive=True) returns")
            before = len(waited)
            stage.talk(stage.after, send=message(number))
            if not group.is_last:
                early = "a send alone was waited for at once; meanwhile the stage could compute"
                assert len(waited) == before + number - 1, (
                    early
                    if len(waited) > before
                    else (
                        "before a send alone the one before it should be waited for: finish_sends"
                    )
                )
        stage.finish_sends()
        assert not stage.sending, "finish_sends should empty stage.sending"
        for _ in range(2):  # a neighbour of two stages meets one after the other
            for peer, number in ((stage.before, 3), (stage.after, 4)):
                x = stage.talk(peer, send=message(number), receive=True)
                if peer is not None:
                    arrived(x, peer, 7 - number, "what talk(…, send=…, receive=True) returns")


@pytest.mark.milestone(7, 3)
@pytest.mark.parametrize("count", [2, 3])
def test_neighbours_talk(step_dir, worlds, count):
    answered(worlds(step_dir, count), messages, timeout=12)


# --- 4. all forward, all backward -----------------------------------------------------------------


def a_step():
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(pp=torch.distributed.get_world_size()).group("pp")
    whole, (stage, _) = stages.Whole(), stages.stage_of(group)
    stage.run(stages.batches(), MICRO_BATCHES * TOKENS, backward=False)
    whole.same_loss(stage)
    assert not stage.alive, "an evaluation should leave nothing in stage.alive"
    order, _ = stages.orders_of(stage)
    total = stage.run(stages.batches(), MICRO_BATCHES * TOKENS, backward=True)
    assert total is stage.total, "run returns the sum of the losses, self.total"
    whole.same_loss(stage)
    whole.same_gradients(stage)
    assert not stage.sending, "run should end with finish_sends"
    return "".join(order)


@pytest.mark.milestone(7, 4)
@pytest.mark.parametrize("count, due", [(1, "fbfbfbfb"), (2, "ffffbbbb"), (3, "ffffbbbb")])
def test_a_step_of_stages(step_dir, worlds, count, due):
    for order in answered(worlds(step_dir, count), a_step):
        assert order == due, f"passes of a stage (f forward, b backward): {order}, not {due}"


# --- 5. the whole program -------------------------------------------------------------------------

FOUR = "--num_hidden_layers 4 --micro_batch_size 1 --gradient_accumulation_steps 4 "
ONE = "--num_hidden_layers 4 --micro_batch_size 4 "


def weights_made(argv):
    """The names of the weights that a rank makes, and of those that it keeps."""
    import model
    import train

    made, initial_value = [], model.initial_value

    def noted(name, *args):
        made.append(name)
        return initial_value(name, *args)

    with patch.object(model, "initial_value", noted):
        state = train.setup(train.parse_args(argv.split()))
    return sorted(made), sorted(p.global_name for p in state.model.parameters())


@pytest.mark.milestone(7, 5)
def test_only_the_own_weights_are_made(step_dir, worlds):
    argv = "--pp_size 2 --dataset_name random --hidden_size 32 --num_hidden_layers 2"
    for made, kept in answered(worlds(step_dir, 2), weights_made, argv):
        assert made == kept, (
            f"a stage makes {len(made)} weights and keeps {len(kept)}; setup should call "
            "apply_pipeline_parallel before materialize"
        )


@pytest.mark.milestone(7, 5)
def test_two_stages_train_as_one_process(step_dir, worlds, train_on):
    hint = "If only the loss or the norm differs: a group in train.py that does not contain pp."
    same_layout(step_dir, worlds, train_on, 2, FOUR + "--pp_size 2", ONE, hint)


@pytest.mark.milestone(7, 5)
def test_tied_embeddings_on_three_stages(step_dir, worlds, train_on):
    hint = (
        "Untied it is right. Usually the ends do not add up their gradients of the tied weight "
        "(another value), count it twice in the norm, or the stage in between made no group "
        "(stages wait for each other)."
    )
    tied = "--tie_word_embeddings yes "
    same_layout(step_dir, worlds, train_on, 3, FOUR + tied + "--pp_size 3", ONE + tied, hint)


@pytest.mark.milestone(7, 5)
def test_zero3_in_a_pipeline(step_dir, worlds, train_on):
    hint = "Without zero3 it is right: look at Zero3.after_model, which fetches weights again."
    flags = FOUR + "--pp_size 2 --dp_size 2 --dp_engine zero3 --gradient_accumulation_steps 2"
    same_layout(step_dir, worlds, train_on, 4, flags, ONE, hint)


def program(argv):
    import train

    train.main(train.parse_args(argv.split()))


@pytest.mark.milestone(7, 5)
def test_the_program_writes_a_timeline(step_dir, worlds, tmp_path):
    path = tmp_path / "timeline.json"
    argv = "--pp_size 2 --gradient_accumulation_steps 2 --dataset_name random --seq_len 16 "
    argv += f"--hidden_size 32 --num_hidden_layers 2 --max_tokens 128 --timeline {path}"
    answered(worlds(step_dir, 2), program, argv)
    assert path.exists(), "--timeline wrote no file: main calls state.stage.timeline.write(world)"
    events = json.loads(path.read_text())["traceEvents"]
    for rank in (0, 1):
        names = [event["name"] for event in events if event["tid"] == rank]
        assert names.count("backward") == 2, f"rank {rank}: {names.count('backward')}, not 2 spans"
        assert "wait" in names, f"rank {rank} should have a span for waiting"
    assert min(event["ts"] for event in events) == 0, "the trace should begin at 0 microseconds"
