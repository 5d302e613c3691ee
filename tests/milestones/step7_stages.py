"""What the checks of step 7 run on each rank: stages of a small model, beside the whole one."""

import collections
import types
import weakref
from unittest.mock import patch

import stages
from same import same
from stages import MICRO_BATCHES, TOKENS


def dealt_layers():
    from pipeline_parallel import deal_layers

    found = {}
    for layers, count in ((8, 2), (7, 3), (3, 3), (11, 4)):
        config = stages.config()
        config.num_hidden_layers = layers
        found[layers, count] = [list(part) for part in deal_layers(config, count)]
    return found


APPLY = "apply_pipeline_parallel"


def parts_in_a_row(count):
    whole = stages.model_of()
    weights = {p.global_name: p for p in whole.parameters()}
    parts = [stages.model_of(stages.group_of(count, rank)) for rank in range(count)]
    held = [p.global_name for part in parts for p in part.parameters()]
    for name in weights:
        times = held.count(name)
        assert times == 1, f"{APPLY}: {times} of {count} stages hold {name}; it should be one"
    for weight in (p for part in parts for p in part.parameters()):
        name = weight.global_name
        what = f"{APPLY}: the initial value of {name}"
        same(weight, weights[name], what, "that in the whole model", 0)
    tokens, targets, positions = stages.batches()[0]
    x = tokens
    for rank, part in enumerate(parts[:-1]):
        try:
            x = part(x, targets, positions)
        except Exception as error:
            words = f"stage {rank} fails: {error}. Without a head, cross_entropy(x, targets) is x"
            raise AssertionError(f"{APPLY}: {words}") from error
        words = f"stage {rank} returns {list(x.shape)}; only the last has a loss"
        assert x.dim() == 3, f"{APPLY}: {words}"
    loss, what = parts[-1](x, targets, positions), f"{APPLY}: the loss behind the last stage"
    meaning = "the whole model's: the last stage has the norm, the head and the loss, the first "
    same(loss, whole(tokens, targets, positions), what, meaning + "has the embedding")


def tied_ends():
    """For each weight that has it: (ranks of `shared`, does torch have that group?, `counted`)."""
    import torch
    import torch.distributed as dist

    import process_group as pg
    from model import Llama
    from pipeline_parallel import apply_pipeline_parallel
    from tensor_parallel import apply_tensor_parallel

    pg.init_processes("cpu")
    config = stages.config()
    config.tie_word_embeddings = True
    with torch.device("meta"):
        model = Llama(config, torch.float64)
    mesh, made, new_group = pg.Mesh(pp=dist.get_world_size()), [], dist.new_group
    apply_tensor_parallel(model, mesh.group("tp"), False)  # sets `counted`
    group = mesh.group("pp")

    def noted(*args, **options):
        made.append(args or options)
        return new_group(*args, **options)

    with patch.object(dist, "new_group", noted):
        apply_pipeline_parallel(model, group)
    weights = {p.global_name: p for p in model.parameters()}
    shared = {
        name: (p.shared.ranks, dist.get_process_group_ranks(p.shared.handle), p.counted)
        for name, p in weights.items() if hasattr(p, "shared")
    }  # fmt: skip
    return shared, len(made)


def noted_spans():
    import time

    import torch

    from timeline import Timeline

    timeline = Timeline("a file", torch.device("cpu"))
    with timeline.span("forward"):
        time.sleep(0.02)
    words = "Timeline.span should note (name, start, end) when its block ends"
    assert len(timeline.spans) == 1, words
    ((name, start, end),) = timeline.spans
    words = f"{words}; of one with 0.02 s it notes {timeline.spans}"
    assert name == "forward" and end - start > 0.01, words
    timeline = Timeline(None, torch.device("cpu"))
    with timeline.span("forward"):
        pass
    assert not timeline.spans, "Timeline.span of a Timeline without a path should note nothing"


def what_stages_know():
    """{flags: message_shape}, and [(before, after)] of three stages."""
    from pipeline_parallel import message_shape

    shapes = {}
    for cp, tp, sp in ((1, 1, False), (2, 1, False), (1, 2, False), (1, 2, True), (2, 2, True)):
        args = types.SimpleNamespace(
            micro_batch_size=3, seq_len=32, cp_size=cp, tp_size=tp, sequence_parallel=sp,
            config=stages.config(),
        )  # fmt: skip
        shapes[f"cp {cp}, tp {tp}, sequence_parallel {sp}"] = tuple(message_shape(args))
    three = [stages.stage_of(stages.group_of(3, rank))[0] for rank in range(3)]
    return shapes, [(stage.before, stage.after) for stage in three]


def stages_by_hand(count):
    """What ranks would do, in one process: all forward, then all backward."""
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
            what = f"what Stage.forward of stage {rank} returns for micro-batch {number}"
            assert not x.requires_grad, f"{what} has a graph; it should be out.detach()"
            if rank + 1 < count:
                same(x, whole.inputs[firsts[rank + 1]][number], what, "the whole model's")
                x = x.clone()  # as it would arrive
                kept = made[-1]() is not None
                hint = "keeps its output: keep its gradient edge instead"
                assert not kept, f"Stage.forward of stage {rank} {hint}"
            alive = len(stage.alive)
            words = f"{alive} in stage.alive after {number + 1} calls of Stage.forward"
            assert alive == number + 1, words
    for stage, _ in pairs:
        whole.same_loss(stage)
    for number in range(MICRO_BATCHES):
        grad = None
        for rank in reversed(range(count)):
            stage, what = pairs[rank][0], f"what Stage.backward of stage {rank} returns"
            grad = stage.backward(grad)
            if rank:
                assert grad is not None, (
                    f"{what} is None. It should be x.grad; for that Stage.forward makes what "
                    "arrives a leaf, with requires_grad_()"
                )
                what += " first" if not number else f" as number {number}"
                due = whole.inputs[firsts[rank]][number].grad
                same(grad, due, what, f"x.grad of micro-batch {number}, the oldest: popleft()")
    for stage, _ in pairs:
        assert not stage.alive, "nothing should be in stage.alive after the last backward pass"
        whole.same_gradients(stage)
    due = [False] * count * (MICRO_BATCHES - 1) + [True] * count
    assert last == due, (
        f"Stage.backward: engine.last_backward was {last} in the backward passes; it should be "
        "true in each stage's last one, before it begins: then the buckets start their sums"
    )


def without_a_neighbour(stage):
    """What one call of `talk` posts, keeps and waits for."""
    import torch

    import process_group as pg

    posted, waited = [], []

    def exchange(group, send=(), receive=()):
        for x, _ in send:
            sent.append(weakref.ref(x))
            assert x.is_contiguous(), "Stage.talk sends a tensor that is not contiguous"
        posted.append((len(send), len(receive)))
        return [types.SimpleNamespace(wait=lambda: waited.append(0))]

    found, due = stage.empty(), (stage.shape, torch.float64)
    assert (tuple(found.shape), found.dtype) == due, (
        f"Stage.empty makes a tensor {list(found.shape)} of {found.dtype}; a message is "
        f"{list(stage.shape)}, in the dtype of the computation, model.model.dtype: {torch.float64}"
    )
    sent, x = [], torch.ones(stage.shape, dtype=torch.float64)
    with patch.object(pg, "exchange", exchange):
        stage.talk(1, send=x.transpose(0, 1))
        assert not waited, (
            "Stage.talk waits for a send alone at once; meanwhile the stage could compute"
        )
        assert sent[0]() is not None, (
            "Stage.talk should keep what it sends, in stage.sending, until it has been sent: else "
            "its memory is used again too early"
        )
        stage.finish_sends()
        assert waited and not stage.sending, (
            "finish_sends should wait for the handles in stage.sending, and empty it"
        )
        waited.clear()
        stage.talk(1, send=x, receive=True)
    assert posted == [(1, 0), (1, 1)], (
        f"Stage.talk with send and receive posts {posted[1:]} (sends, receives); both should be in "
        "one call of pg.exchange, or two stages wait for each other for ever"
    )
    assert waited, "Stage.talk should wait for what it receives before it returns it"


def messages():
    """Forth, back, and both at once; numbers say who sent them."""
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(pp=torch.distributed.get_world_size()).group("pp")
    stage, _ = stages.stage_of(group)
    without_a_neighbour(stage)
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
        assert nothing, (
            "Stage.talk(None, …) should do nothing: nobody is beyond the ends of the pipeline"
        )
        for number in (1, 2):
            x = stage.talk(stage.before, receive=True)
            if not group.is_first:
                arrived(x, group.rank - 1, number, "what Stage.talk(before, receive=True) returns")
            before = len(waited)
            stage.talk(stage.after, send=message(number))
            if not group.is_last:
                words = "waits for a send alone at once; meanwhile the stage could compute"
                if len(waited) == before:
                    words = "should wait for the send before this one first, with finish_sends"
                assert len(waited) == before + number - 1, f"Stage.talk {words}"
        stage.finish_sends()
        assert not stage.sending, "finish_sends should empty stage.sending"
        for _ in range(2):  # a neighbour of two stages meets one after the other
            for peer, number in ((stage.before, 3), (stage.after, 4)):
                x = stage.talk(peer, send=message(number), receive=True)
                if peer is not None:
                    arrived(x, peer, 7 - number, "what Stage.talk(…, send=…, receive=True) returns")


def deeds(schedule, size, rank):
    """What a schedule does with two micro-batches on a stage with nobody to talk to, in words."""
    import pipeline_parallel

    done, alive, arrived = [], collections.deque(), [None]

    def forward(x, micro_batch):
        assert x == arrived[0], f"{schedule}: forward of stage {rank} gets what arrived before it"
        alive.append(micro_batch)
        done.append(f"forward {micro_batch}")
        return f"activation {micro_batch}"

    def backward(grad):
        done.append(f"backward {alive.popleft()}")
        return f"gradient {done[-1][-1]}" if rank else None

    def talk(peer, send=None, receive=False):
        if peer is None:
            return None
        done.extend([f"send {send} to {peer}"] if send is not None else [])
        if receive:
            done.append(f"receive from {peer}")
            arrived[0] = len(done)
            return arrived[0]

    stage = types.SimpleNamespace(alive=alive, forward=forward, backward=backward, talk=talk)
    stage.before, stage.after = rank - 1 if rank else None, rank + 1 if rank + 1 < size else None
    getattr(pipeline_parallel, schedule)(stage, range(2))
    return done


def deeds_due(schedule, size, rank):
    for number in range(2):
        yield from [f"receive from {rank - 1}"] if rank else []
        yield f"forward {number}"
        yield from [f"send activation {number} to {rank + 1}"] if rank + 1 < size else []
    for number in range(2) if schedule == "all_forward_all_backward" else ():
        yield from [f"receive from {rank + 1}"] if rank + 1 < size else []
        yield f"backward {number}"
        yield from [f"send gradient {number} to {rank - 1}"] if rank else []


def a_step():
    import torch

    import process_group as pg

    pg.init_processes("cpu")
    group = pg.Mesh(pp=torch.distributed.get_world_size()).group("pp")
    whole, (stage, _) = stages.Whole(), stages.stage_of(group)
    stage.run(stages.batches(), MICRO_BATCHES * TOKENS, backward=False)
    whole.same_loss(stage)
    assert not stage.alive, "Stage.run with backward=False should leave nothing in stage.alive"
    order, _ = stages.orders_of(stage)
    total = stage.run(stages.batches(), MICRO_BATCHES * TOKENS, backward=True)
    assert total is stage.total, "Stage.run returns the sum of the losses, self.total"
    whole.same_loss(stage, "Stage.run: before this step there was an evaluation. ")
    whole.same_gradients(stage)
    assert not stage.sending, "Stage.run should end with finish_sends"
    return "".join(order)


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


def program(argv):
    import train

    train.main(train.parse_args(argv.split()))


def write_spans(path, spans):
    import torch

    from timeline import Timeline

    Timeline(path, torch.device("cpu")).write_spans(spans)
