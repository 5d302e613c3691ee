"""The figures show what the code of the steps does: what they draw is recorded from it."""

import sys

import pytest
from conftest import ROOT
from harness import World

sys.path.append(str(ROOT / "assets"))
import figures_data_parallel  # noqa: E402
import figures_pipeline  # noqa: E402
import figures_ring  # noqa: E402
import recorded  # noqa: E402
import recorded_engines  # noqa: E402


def labels(figure):
    """All texts of a figure, in the order in which they were drawn."""
    return [text.get_text() for text in figure.axes[0].texts]


def ring_by_its_rules(ranks):
    """(block, keys) of each step of each rank, by what the ring says of its order."""
    import process_group as pg
    from context_parallel import Ring, attending

    found = []
    for rank in range(ranks):
        ring = Ring(pg.Group("cp", tuple(range(ranks)), rank, None), None)
        sources = [*ring.back, ring.order[0]]
        found.append([(s, len(range(4)[attending(rank, s, 2)[1]])) for s in sources])
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ring_on_its_way_back(ranks):
    step = "step5_context_parallel"
    run = recorded.record(step, ranks, recorded.backward_round_the_ring)
    with World(ROOT / step, 1) as world:
        (rules,) = world.run(ring_by_its_rules, ranks)
    for rank, steps in enumerate(run):
        assert [(does["block"], does["keys"]) for does in steps] == rules[rank]
        # The block that came last comes first, then those behind it; the own one is the last.
        assert [does["block"] for does in steps] == [(rank + 1 + i) % ranks for i in range(ranks)]
        assert [does["queries"] for does in steps] == [
            2 if does["block"] > rank else 4 for does in steps
        ]
        assert steps[-1]["block_to"] is steps[-1]["gradients_to"] is None
        for place, does in enumerate(steps[:-1]):
            assert does["gradients_to"] == does["block"], "not straight home"
            if place < ranks - 2:  # who gets the block computes with it next
                assert does["block_to"] == (rank - 1) % ranks
                assert run[does["block_to"]][place + 1]["block"] == does["block"]
            else:
                assert does["block_to"] is None


def test_the_figure_of_the_ring_has_the_blocks_of_the_run():
    run = recorded.record("step5_context_parallel", 4, recorded.backward_round_the_ring)
    blocks = [f"kv {does['block']}" for steps in run for does in steps]
    assert [text for text in labels(figures_ring.ring_backward()) if text[:3] == "kv "][
        :16
    ] == blocks


@pytest.mark.parametrize("layers", [2, 4])
def test_the_weights_of_zero3(layers):
    flags = figures_data_parallel.FOUR_LAYERS.replace("layers 4", f"layers {layers}")
    run = recorded.record("step6_data_parallel", 2, recorded_engines.zero3_in_a_step, flags)
    assert run[0] == run[1]
    events, last = run[0], f"layer {layers - 1}"
    whole = [{name for name in held if name.startswith("layer")} for *_, held in events]
    kinds = [(what, name) for what, name, _ in events]
    for layer in range(layers):
        name, before, after = (f"layer {i}" for i in (layer, layer - 1, layer + 1))
        begins, ends = kinds.index(("forward begins", name)), kinds.index(("forward ends", name))
        here = {name, after} - {f"layer {layers}"}
        assert all(now == here for now in whole[begins : ends + 1])
        begins, ends = kinds.index(("backward begins", name)), kinds.index(("backward ends", name))
        here = {name, before} - {"layer -1"}
        assert all(now == here for now in whole[begins : ends + 1])
    turn = kinds.index(("forward ends", last)), kinds.index(("backward begins", last))
    assert all(last in now for now in whole[slice(*turn)])
    assert max(map(len, whole)) == 2 and events[-1][2] == {}
    # The embedding, the head and the norms come once, layers twice, but the last one stays.
    assert [what for what, _ in kinds].count("gather") == 3 + 2 * layers - 1


def test_the_figure_of_zero3_has_the_curve_of_the_run():
    run = recorded.record(
        "step6_data_parallel",
        2,
        recorded_engines.zero3_in_a_step,
        figures_data_parallel.FOUR_LAYERS,
    )
    held = [sum(held.values()) for *_, held in run[0]]
    curve = max(
        figures_data_parallel.zero3_memory().axes[0].lines, key=lambda line: len(line.get_xdata())
    )
    heights = curve.get_ydata()
    assert len(heights) == len(held)
    drawn = [(y - heights[-1]) / (max(heights) - heights[-1]) for y in heights]
    assert drawn == pytest.approx([size / max(held) for size in held])


@pytest.mark.parametrize("ranks, count", [(2, 3), (4, 8), (4, 2)])
def test_schedules_are_those_of_the_code(ranks, count):
    one_more = [ranks - 1 - rank for rank in range(ranks)]
    for engine, ahead in (("afab", [count] * ranks), ("1f1b", one_more)):
        (orders,) = recorded.record(
            "step8_pipeline_1f1b", 1, recorded.order_of_a_schedule, engine, ranks, count
        )
        rows = figures_pipeline.passes(ahead, count)
        assert [[(kind, micro) for kind, micro, _ in row] for row in rows] == orders


def test_the_two_stages_of_the_deadlock_are_in_the_schedule():
    """Stage 2 has gone forward with micro-batch 1 while stage 3 goes backward with 0."""
    (orders,) = recorded.record(
        "step8_pipeline_1f1b", 1, recorded.order_of_a_schedule, "1f1b", 4, 8
    )
    assert orders[2][1:3] == [("forward", 1), ("backward", 0)]
    assert orders[3][1:3] == [("backward", 0), ("forward", 1)]
    drawn = [text for text in labels(figures_pipeline.deadlock()) if " pass of " in text]
    first, then = ["forward pass of 1", "backward pass of 0"], ["backward pass of 0"]
    assert drawn == [*first, *first, *then, "forward pass of 1"]


@pytest.mark.parametrize("ranks, chunks, count", [(2, 2, 4), (4, 2, 8), (3, 3, 3)])
def test_interleaved_beside_plain(ranks, chunks, count):
    plain, interleaved = figures_pipeline.plain_and_interleaved(ranks, chunks, count)
    for rows, parts, idle in (
        (plain, 1, 2 * chunks * (ranks - 1)),
        (interleaved, chunks, 2 * (ranks - 1)),
    ):
        ends = {}
        for rank, row in enumerate(rows):
            for kind, chunk, micro, start, length in row:
                ends[kind, chunk * ranks + rank, micro] = start, start + length
            free = [0, *(start + length for *_, start, length in row)]
            assert all(start >= before for (*_, start, _), before in zip(row, free, strict=False))
        assert len(ends) == 2 * parts * ranks * count
        for (kind, stage, micro), (start, _) in ends.items():
            needed = (kind, stage - 1 if kind == "forward" else stage + 1, micro)
            if stage == parts * ranks - 1 and kind == "backward":
                needed = ("forward", stage, micro)
            assert needed not in ends or ends[needed][1] <= start
        assert max(end for _, end in ends.values()) == 2 * chunks * count + idle


def test_the_figure_of_interleaved_has_the_passes_of_the_plan():
    plain, interleaved = figures_pipeline.plain_and_interleaved(4, 2, 8)
    (ticks,) = recorded.record("step9_4d", 1, recorded.ticks_of, 4, 2, 8)
    for rank, row in enumerate(interleaved):
        passes = [tick[rank] for tick in ticks if tick[rank]]
        assert [(kind, chunk, micro) for kind, chunk, micro, *_ in row] == passes
    drawn = labels(figures_pipeline.interleaved_plan())
    for row in (*plain, *interleaved):
        numbers = [str(micro) for _, _, micro, *_ in row]
        text = "".join(t for t in drawn if len(t) == 1)
        assert "".join(numbers) in text
