"""`coach.py N picture`: what a reader's own ring, buckets or schedule did, beside what ours does.

Each picture is recorded by running the reader's code (`assets/recorded.py`), shown as text, drawn
as PNG, and measured against a target: messages, bytes or ticks.
"""

import sys

import lessons
from harness import World

sys.path.append(str(lessons.ROOT / "assets"))
STAGES, MICRO_BATCHES, RANKS = 4, 8, 4
FOUR_LAYERS = (
    "--dp_size 2 --dp_engine zero3 --num_hidden_layers 4 --device cpu --dataset_name random "
    "--micro_batch_size 1 --max_tokens 2048"
)


def picture(number, own, path, say):
    """Show a step's picture as text, and save it as PNG."""
    if number not in PICTURES:
        numbers = ", ".join(map(str, PICTURES))
        raise lessons.LessonError(f"step {number} has no picture; steps {numbers} have one")
    mine, target = PICTURES[number](own), PICTURES[number](lessons.step_of(number))
    for title, found in (("yours", mine), ("ours", target)):
        say(f"{title}:")
        for line in found["lines"]:
            say(f"  {line}")
    for name, value in mine["numbers"].items():
        best = target["numbers"][name]
        say(f"{name}: {value:,} (target: {best:,})" + "  <-" * (value != best))
    draw(mine, target, path)
    say(f"Drawn in {path}.")


def run(own, ranks, function, *args):
    """Call a function on every rank of a step, anew each time: its code may have changed."""
    with World(own, ranks) as world:
        return world.run(function, *args)


# --- schedules ------------------------------------------------------------------------------------


def orders(name, stages, count):
    """For each stage the passes of a schedule in order: (forward or backward, micro-batch)."""
    import types

    import pipeline_parallel

    def order_of(rank):
        order, alive = [], []
        stage = types.SimpleNamespace(
            group=types.SimpleNamespace(rank=rank, size=stages), micro_batches=count, alive=alive,
            before=None, after=None, talk=lambda peer, send=None, receive=False: None,
        )  # fmt: skip

        def forward(x, micro_batch):
            order.append(("forward", micro_batch))
            alive.append(micro_batch)

        def backward(grad):
            order.append(("backward", alive.pop(0)))

        stage.forward, stage.backward = forward, backward
        getattr(pipeline_parallel, name)(stage, range(count))
        return order

    return [order_of(rank) for rank in range(stages)]


def timed(rows, forward=1, backward=2):
    """When each pass starts if it waits for nothing but what it needs: (kind, micro, start)."""
    last, ended, free, done = len(rows) - 1, {}, [0] * len(rows), [[] for _ in rows]
    waiting = [list(row) for row in rows]
    progress = True
    while progress:
        progress = False
        for stage, row in enumerate(waiting):
            while row:
                kind, micro = row[0]
                if kind == "forward":
                    needed = (kind, stage - 1, micro) if stage else None
                else:
                    needed = (kind, stage + 1, micro) if stage < last else ("forward", last, micro)
                if needed and needed not in ended:
                    break
                start = max(free[stage], ended.get(needed, 0))
                free[stage] = ended[kind, stage, micro] = start + (
                    forward if kind == "forward" else backward
                )
                done[stage].append((*row.pop(0), start))
                progress = True
    return done, any(waiting)


def schedule(own, name):
    rows, stuck = timed(run(own, 1, orders, name, STAGES, MICRO_BATCHES)[0])
    ticks = max((s + (1 if k == "forward" else 2) for row in rows for k, _, s in row), default=0)
    lines = [f"stage {stage} |{cells(row, ticks)}|" for stage, row in enumerate(rows)]
    if stuck:
        lines.append("and then no stage can go on: each waits for another one")
    alive = [max(accumulated(row), default=0) for row in rows]
    return {"lines": lines, "numbers": {"ticks": ticks, "alive on stage 0": alive[0]}, "rows": rows}


def cells(row, ticks):
    """One character a tick: a digit forward, a letter twice backward (a is micro-batch 0)."""
    text = ["·"] * ticks
    for kind, micro, start in row:
        text[start] = str(micro) if kind == "forward" else chr(ord("a") + micro)
        if kind == "backward":
            text[start + 1] = text[start]
    return "".join(text)


def accumulated(row):
    count = 0
    for kind, *_ in row:
        count += 1 if kind == "forward" else -1
        yield count


# --- the ring, and zero3 --------------------------------------------------------------------------


def ring(own):
    from recorded import backward_round_the_ring

    ranks = run(own, RANKS, backward_round_the_ring)
    lines = []
    for rank, steps in enumerate(ranks):
        blocks = " ".join(f"kv {does['block']}" for does in steps)
        home = " ".join("-" if d["gradients_to"] is None else str(d["gradients_to"]) for d in steps)
        lines.append(f"rank {rank}: computes with {blocks}; sends gradients to {home}")
    blocks = sum(does["block_to"] is not None for steps in ranks for does in steps)
    shares = sum(does["gradients_to"] is not None for steps in ranks for does in steps)
    return {"lines": lines, "numbers": {"blocks sent": blocks, "shares sent home": shares}}


def zero3(own):
    from recorded_engines import zero3_in_a_step

    events = run(own, 2, zero3_in_a_step, FOUR_LAYERS)[0]
    most = max(sum(held.values()) for _, _, held in events)
    passes = [one for one in events if one[0].endswith("begins")]
    lines = [f"{what:16} {name}; whole: {', '.join(held)}" for what, name, held in passes]
    gathers = sum(what == "gather" for what, *_ in events)
    numbers = {"gathers": gathers, "bytes of whole weights at most": most}
    return {"lines": lines, "numbers": numbers}


PICTURES = {
    5: ring,
    6: zero3,
    7: lambda own: schedule(own, "all_forward_all_backward"),
    8: lambda own: schedule(own, "one_forward_one_backward"),
}


def draw(mine, target, path):
    """Save both as PNG: schedules as bars, other pictures as their lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 1, figsize=(12, 6))
    for axes, title, one in zip(panels, ("yours", "ours"), (mine, target), strict=True):
        axes.set_title(title, loc="left")
        axes.set_axis_off()
        if "rows" in one:
            draw_bars(axes, one["rows"], target["numbers"]["ticks"])
            continue
        for row, line in enumerate(one["lines"]):
            axes.text(0, -row, line, family="monospace", fontsize=9, va="center")
        axes.set(xlim=(0, 10), ylim=(-len(one["lines"]), 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_bars(axes, rows, ticks):
    for stage, row in enumerate(rows):
        axes.text(-0.4, -stage, f"stage {stage}", ha="right", va="center")
        for kind, micro, start in row:
            wide, colour = (1, "#4477aa") if kind == "forward" else (2, "#ee6677")
            axes.barh(-stage, wide, left=start, color=colour, edgecolor="white")
            axes.text(start + wide / 2, -stage, micro, ha="center", va="center", color="white")
    axes.axvline(ticks, color="#888888", linestyle=":")
    axes.set(xlim=(-3, 1.3 * ticks))
