"""What the checks of step 9's milestones run on ranks: chunks of layers, and the plan of passes."""

import contextlib
import itertools
from types import SimpleNamespace
from unittest.mock import patch

from same import same
from step9_models import batches, tiny
from step9_runs import world_group

# --- 3. layers by cost, in chunks -----------------------------------------------------------------


def dealt():
    from pipeline_parallel import deal_layers
    from presets import preset

    config, layer = preset("debug"), 2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128
    for layers, vocabulary, stages in ((8, 256, 3), (9, 5000, 4), (6, 5000, 2)):
        config.num_hidden_layers, config.vocab_size = layers, vocabulary
        table, best = 128 * vocabulary, None
        for cuts in itertools.combinations(range(1, layers), stages - 1):
            bounds = itertools.pairwise((0, *cuts, layers))
            costs = [(stop - start) * layer for start, stop in bounds]
            costs[0], costs[-1] = costs[0] + table, costs[-1] + table
            best = min(best or max(costs), max(costs))
        parts = deal_layers(config, stages)
        held = [i for part in parts for i in part]
        every = held == [*range(layers)]
        assert every, f"deal_layers: the stages hold {held}; each layer once, in order"
        costs = [len(part) * layer for part in parts]
        costs[0], costs[-1] = costs[0] + table, costs[-1] + table
        assert max(costs) == best, (
            f"deal_layers: {layers} layers, {vocabulary} symbols, {stages} stages: the largest "
            f"cost of {[len(part) for part in parts]} is {max(costs):,} weights; {best:,} is "
            "possible"
        )


def chunked():
    """Which layers and chunks a rank holds, and that no bucket mixes chunks."""
    import process_group as pg
    from data_parallel import Bucketed

    size = world_group().size
    mesh = pg.Mesh(pp=size)
    model = tiny(pp=mesh.group("pp"), chunks=2, num_hidden_layers=2 * size)
    layers = [int(name.split(".")[2]) for name, _ in model.named_parameters() if ".layers." in name]
    numbers = {
        p.global_name: p.chunk_number for p in model.parameters() if "layers" in p.global_name
    }
    held = sorted({(int(name.split(".")[2]), chunk) for name, chunk in numbers.items()})
    due = [(mesh.rank, 0), (mesh.rank + size, 1)]
    assert held == due and len({*layers}) == 2, (
        f"apply_pipeline_parallel: rank {mesh.rank} holds (layer, chunk) {held}; it should be {due}"
    )
    for bucket in Bucketed(model, mesh.group("dp")).buckets:
        chunks = {getattr(p, "chunk_number", None) for p in bucket.parameters}
        one = len(chunks) == 1
        assert one, f"Bucketed.cut: a bucket has weights of the chunks {chunks}; it should be one"


# --- 4., 5. the plan, and to follow it ------------------------------------------------------------


def plans():
    from interleaved import enables, passes_of, plan

    for ranks, chunks, count in ((2, 2, 2), (2, 3, 4), (3, 2, 6), (4, 2, 8)):
        case = f"p {ranks}, c {chunks}, m {count}:"
        for rank in range(ranks):
            check_order(f"passes_of rank {rank}, {case}", rank, ranks, chunks, count)
        last = ranks * chunks - 1
        for one in passes_of(ranks - 1, ranks, chunks, count):
            then, step = enables(one, ranks, chunks), 1 if one.kind == "forward" else -1
            due = one._replace(stage=one.stage + step)
            due = one._replace(kind="backward") if due.stage > last else due
            assert then == due, f"enables, {case} after {one} comes {then}; it should be {due}"
        assert enables(one._replace(stage=0), ranks, chunks) is None, "enables: stage 0 is the end"
        ticks, done = plan(ranks, chunks, count), {}
        for number, tick in enumerate(ticks):
            for rank, one in enumerate(tick):
                if one is None:
                    continue
                assert one.stage % ranks == rank, f"plan: rank {rank} does {one}, another one's"
                before = one._replace(stage=one.stage + (1 if one.kind == "backward" else -1))
                if before.stage > last:
                    before = one._replace(kind="forward")
                ready = before.stage < 0 or done.get(before, number) < number
                assert ready, (
                    f"plan, {case} {one} is in tick {number}, and {before} not in one before it: "
                    "what a tick gives is there for the next one"
                )
                done[one] = number
        least = 2 * (chunks * count + ranks - 1)
        assert len(ticks) == least, f"plan, {case} {len(ticks)} ticks; {least} are enough"


def check_order(what, rank, ranks, chunks, count):
    """What one rank does: every pass of its chunks once, in order, and how far it runs ahead."""
    from interleaved import passes_of

    found = passes_of(rank, ranks, chunks, count)
    for kind, order in (("forward", range(chunks)), ("backward", range(chunks)[::-1])):
        rounds = [range(start, start + ranks) for start in range(0, count, ranks)]
        due = [(chunk * ranks + rank, i) for r in rounds for chunk in order for i in r]
        own = [(one.stage, one.micro_batch) for one in found if one.kind == kind]
        assert own == due, (
            f"{what} the {kind} passes (stage, micro-batch) are {own}; they should be {due}: in "
            "groups of p micro-batches, through the chunks in the order of the pass"
        )
    ahead = min(chunks * count, (chunks - 1) * ranks + 2 * (ranks - rank - 1))
    kinds, rest = "".join(one.kind[0] for one in found), chunks * count - ahead
    assert kinds == "f" * ahead + "fb" * rest + "b" * ahead, (
        f"{what} passes {kinds} (f forward, b backward); it runs ahead by {ahead}, (c - 1) p and "
        "twice the distance from the last rank, then alternates"
    )


def interleaved(rounds):
    """Gradients of chunks on all ranks, beside those of the whole model."""
    import torch

    import process_group as pg
    from data_parallel import Naive
    from interleaved import build_stage

    size = world_group().size
    group, count = pg.Mesh(pp=size).group("pp"), size * rounds
    whole = tiny(num_hidden_layers=2 * size)
    parts = batches(count)
    expected = sum(whole(*part) / 1000 for part in parts)
    expected.backward()
    model = tiny(pp=group, chunks=2, num_hidden_layers=2 * size)
    args = SimpleNamespace(
        pp_chunks=2, pp_engine="interleaved", gradient_accumulation_steps=count, timeline=None,
        micro_batch_size=2, seq_len=16, cp_size=1, tp_size=1, sequence_parallel=False,
        config=model.model.config,
    )  # fmt: skip
    stage = build_stage(args, model, group, Naive(model, group), torch.device("cpu"))
    for index, one in enumerate(stage.stages):
        ends = [group.is_first and index == 0, group.is_last and index == 1]
        body = one.model.model
        found = [not isinstance(x, torch.nn.Identity) for x in (body.embed_tokens, body.norm)]
        assert found == ends, (
            f"Interleaved.__init__: chunk {index} of rank {group.rank} has (embedding, norm) "
            f"{found}; it should be {ends}: only the first and the last chunk of all (chunk_of)"
        )
        after = None if ends[1] else group.next
        assert one.after == after, f"Interleaved.__init__: stage.after is {one.after}, not {after}"
    watch = Watched(2 * size)
    with watch.all():
        total = stage.run(iter(parts), 1000, True)
    watch.check()
    if group.is_last:
        meaning = "the sum of the micro-batches' losses / 1000"
        same(total, expected.detach(), "Interleaved.run: the loss", meaning)
    weights = dict(whole.named_parameters())
    hint = "that of the whole model: each micro-batch once, through all chunks in order"
    for parameter in model.parameters():
        due = weights[parameter.global_name].grad
        what = f"Interleaved.follow: the gradient of {parameter.global_name}"
        same(parameter.grad, due, what, hint)
    total = stage.run(iter(parts), 1000, False)
    if group.is_last:
        what = "Interleaved.run: the loss of an evaluation"
        same(total, expected.detach(), what, "that of training")
    alive = [len(stage.alive) for stage in stage.stages]
    assert not any(alive), f"Interleaved.run: after an evaluation {alive} micro-batches are kept"


class Watched:
    """How many messages of a step were used too early, or waited for too late.

    allowed: ticks after which what was sent should have been waited for.
    """

    def __init__(self, allowed):
        self.made, self.allowed, self.late, self.early = [], allowed, 0, 0

    @contextlib.contextmanager
    def all(self):
        import interleaved
        from pipeline_parallel import Stage

        real, watch = interleaved.Messages, self

        class Kept(real):
            def __init__(self, group, sends, receives):
                receives = list(receives)
                self.arriving = [tensor for tensor, _ in receives]
                watch.late += sum(bool(one.handles) for one in watch.made[: -watch.allowed])
                super().__init__(group, sends, receives)
                watch.made.append(self)

        def early(function):
            def called(stage, received, *rest):
                waiting = [one for one in watch.made if one.handles for x in one.arriving
                           if x is received]  # fmt: skip
                watch.early += len(waiting)
                return function(stage, received, *rest)

            return called

        with (
            patch.object(interleaved, "Messages", Kept),
            patch.object(Stage, "forward", early(Stage.forward)),
            patch.object(Stage, "backward", early(Stage.backward)),
        ):
            yield

    def check(self):
        assert not self.early, (
            f"Interleaved.compute: {self.early} passes begin before their message was waited for"
        )
        assert not self.late, (
            "Interleaved.follow: what a tick sends should be waited for 2 p ticks later, "
            f"{self.allowed}, so that its memory is freed; some of it is under way for longer"
        )
        left = [one for one in self.made if one.handles]
        assert not left, f"Interleaved.follow: {len(left)} ticks' messages are never waited for"
        kept = sum(bool(one.sends) for one in self.made)
        assert not kept, f"Messages.wait: what {kept} ticks have sent is still in memory"
