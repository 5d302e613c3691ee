"""Pipelines, steps 7 to 9."""

import itertools

from drawing import COLOURS, EDGE, arrow, block, box, canvas, pale
from matplotlib.patches import Rectangle
from recorded import record, ticks_of

KINDS = {"forward": COLOURS[0], "backward": COLOURS[1]}
IDLE = "#e8e8e8"


def afab_grid():
    """Layers dealt to four stages, and an AFAB step of eight micro-batches as a grid."""
    figure, axes = canvas(12, 3.9, 61, 20)
    stages, count, wide, left, top, high = 4, 8, 1.39, 14.6, 14.4, 3.5
    parts = ["embedding\nlayers 0, 1", "layers 2, 3", "layers 4, 5", "layers 6, 7\nhead, loss"]
    turn = count + stages - 1  # forward takes one cell, backward two

    def cell(stage, place, width, colour, micro):
        block(axes, left + place * wide, top - stage * high, width * wide, 2.6, colour, micro)

    for stage, part in enumerate(parts):
        y = top - stage * high
        axes.text(0.2, y + 1.3, f"stage {stage}", va="center", fontsize=8.5)
        box(axes, 4.6, y, 7.4, 2.6, part, "white", 7.5)
        if stage + 1 < stages:
            arrow(axes, (7.8, y), (7.8, y - 0.9), COLOURS[0])
            arrow(axes, (8.8, y - 0.9), (8.8, y), COLOURS[1])
        for place in range(3 * turn):
            cell(stage, place, 1, IDLE, "")
        for micro in range(count):
            cell(stage, stage + micro, 1, COLOURS[0], micro)
            cell(stage, turn + 2 * (stages - 1 - stage + micro), 2, COLOURS[1], micro)
    end = left + turn * wide
    text = f"all forward: m + p - 1 = {turn} cells"
    axes.text((left + end) / 2, 17.7, text, ha="center", fontsize=8, color=COLOURS[0])
    text = f"all backward: 2 (m + p - 1) = {2 * turn} cells"
    axes.text(end + turn * wide, 17.7, text, ha="center", fontsize=8, color=COLOURS[1])
    axes.plot([end, end], [3.4, 18.6], color=EDGE, lw=0.8, ls=":")
    text = (
        "A number is a micro-batch. A cell is the time of one forward pass.\n"
        "Grey: the stage is idle, in every row (p - 1) / (m + p - 1) = 3/11 of the time."
    )
    axes.text(left, 1.6, text, va="center", fontsize=8)
    arrow(axes, (left + 38.5, 2.2), (left + 45.8, 2.2))
    axes.text(left + 38, 2.2, "time", ha="right", va="center", fontsize=8)
    return figure


def passes(ahead, count, forward=1, backward=2):
    """When each pass of a pipeline's step starts if it waits for nothing but what it needs.

    ahead: how often each stage goes forward before it alternates; count: micro-batches; forward,
    backward: the time of a pass. Returns a list of (kind, micro-batch, start) for each stage.
    """
    last, orders, rows = len(ahead) - 1, [], [[] for _ in ahead]
    ended = {("forward", -1, micro): 0 for micro in range(count)}  # all data is there
    for first in (min(n, count) for n in ahead):
        steady = [("forward", first + i) for i in range(count - first)]
        back = [("backward", i) for i in range(count)]
        alternating = [one for pair in zip(steady, back, strict=False) for one in pair]
        orders.append([("forward", i) for i in range(first)] + alternating + back[count - first :])
    free = [0] * len(ahead)
    while any(orders):
        for stage, order in enumerate(orders):
            while order:
                kind, micro = order[0]
                if kind == "forward":
                    needed = (kind, stage - 1, micro)
                else:  # the last stage turns round
                    needed = (kind, stage + 1, micro) if stage < last else ("forward", last, micro)
                if needed not in ended:
                    break
                start = max(free[stage], ended[needed])
                free[stage] = start + (forward if kind == "forward" else backward)
                ended[kind, stage, micro] = free[stage]
                rows[stage].append((*order.pop(0), start))
    return rows


def most_alive(row):
    """How many micro-batches have gone forward and not yet backward, at most."""
    alive = itertools.accumulate(1 if kind == "forward" else -1 for kind, *_ in row)
    return max(alive)


def schedules():
    """AFAB and 1F1B on four stages with eight micro-batches, and how many are alive at most."""
    figure, axes = canvas(12, 5.8, 61, 30)
    stages, count, wide, left, high = 4, 8, 1.39, 5.2, 2.75
    panels = [
        ("afab: all forward, all backward", 27.4, [count] * stages),
        ("1f1b: one forward, one backward", 13.4, [stages - 1 - stage for stage in range(stages)]),
    ]
    for title, top, ahead in panels:
        axes.text(0.2, top + 1.0, title, fontsize=9.5, weight="bold")
        where = (left + 33 * wide + 0.6, top + 0.55)
        axes.text(*where, "micro-batches\nalive at most", fontsize=8, linespacing=1.1)
        rows = passes(ahead, count)
        whole = max(start + 2 for row in rows for *_, start in row)
        for stage, row in enumerate(rows):
            y = top - (stage + 1) * high + 0.5
            axes.text(0.2, y + 1, f"stage {stage}", va="center", fontsize=8.5)
            for place in range(whole):
                block(axes, left + place * wide, y, wide, 2, IDLE)
            for place, (kind, micro, start) in enumerate(row):
                steady = ahead[stage] <= place < 2 * count - ahead[stage]
                colour = KINDS[kind] if steady or ahead[stage] == count else pale(KINDS[kind])
                size = wide if kind == "forward" else 2 * wide
                block(axes, left + start * wide, y, size, 2, colour, micro)
            most = most_alive(row)
            for one in range(most):
                corner = (left + whole * wide + 0.6 + one * 1.02, y + 0.4)
                axes.add_patch(Rectangle(corner, 0.85, 1.2, fc=COLOURS[2], alpha=0.85))
            end = left + whole * wide + 0.7 + most * 1.02
            axes.text(end, y + 1, str(most), va="center", fontsize=8.5)
    text = (
        "A number is a micro-batch. Blue: forward, one cell. Red: backward, two cells. Pale: "
        "warm-up and cool-down.\n"
        "Grey: the stage is idle, 3 (p - 1) = 9 of 33 cells in every row, under both schedules."
    )
    axes.text(0.2, 0.2, text, fontsize=8)
    return figure


def deadlock():
    """Two stages that have something for each other, one message after the other, and together."""
    figure, axes = canvas(11, 5.0, 60, 27)
    width, talk, never = 10.2, "#fff3c4", "#f4f4f4"

    def action(column, y, height, text, colour, size=8):
        box(axes, column, y, width, height, text, colour, size)

    def begin(x, title):
        axes.text(x, 26, title, fontsize=9.5, weight="bold")
        for stage, kind, micro in ((2, "forward", 1), (3, "backward", 0)):
            column = x + (stage - 2) * 16
            axes.text(column + width / 2, 24, f"stage {stage}", ha="center", fontsize=9)
            action(column, 20.6, 2.4, f"{kind} pass of {micro}", KINDS[kind])
        return x, x + 16

    one, other = begin(0.4, "One after the other: both send first, and wait for ever")
    action(one, 14.6, 5, "send activation 1\n\nwaits until stage 3\nreceives it", talk)
    action(other, 14.6, 5, "send gradient 0\n\nwaits until stage 2\nreceives it", talk)
    action(one, 8.6, 2.8, "receive gradient 0", never)
    action(other, 8.6, 2.8, "receive activation 1", never)
    for start, end, colour in ((one + width, other, COLOURS[0]), (other, one + width, COLOURS[1])):
        arrow(axes, (start, 16.6), (end, 10.0), colour, style="--")
    middle = (one + width + other) / 2
    axes.text(middle, 13.3, "✕", ha="center", va="center", fontsize=17, color="#bb0000")
    for column in (one, other):
        axes.text(column + width / 2, 12.9, "is never reached", ha="center", fontsize=7.5,
                  style="italic", va="center")  # fmt: skip
        arrow(axes, (column + width / 2, 14.4), (column + width / 2, 13.6), "#999999")
    text = (
        "A send ends when the other stage has posted the receive.\n"
        "Each stage would post its receive after its own send: so neither does.\n"
        "(Both receive first: the same, each waits for a send that comes later.)"
    )
    axes.text(one, 4.9, text, fontsize=8, va="center", linespacing=1.4)

    one, other = begin(32.6, "Posted together: both messages pass")
    action(
        one, 14.6, 5, "send activation 1\nand receive gradient 0\n\nthen wait for both", talk, 7.5
    )
    action(
        other, 14.6, 5, "send gradient 0\nand receive activation 1\n\nthen wait for both", talk, 7.5
    )
    arrow(axes, (one + width + 0.1, 18.0), (other - 0.1, 18.0), COLOURS[0])
    arrow(axes, (other - 0.1, 16.2), (one + width + 0.1, 16.2), COLOURS[1])
    middle = (one + width + other) / 2
    axes.text(middle, 18.4, "activation 1", ha="center", fontsize=7.5, color=COLOURS[0])
    axes.text(middle, 15.1, "gradient 0", ha="center", fontsize=7.5, color=COLOURS[1])
    for column, kind, micro in ((one, "backward", 0), (other, "forward", 1)):
        arrow(axes, (column + width / 2, 14.4), (column + width / 2, 11.6))
        action(column, 8.6, 2.8, f"{kind} pass of {micro}", KINDS[kind])
    text = (
        "One call posts the send and the receive.\n"
        "So both receives are there, and both sends end.\n"
        "Each stage then has what its next pass needs."
    )
    axes.text(one, 4.9, text, fontsize=8, va="center", linespacing=1.4)
    text = (
        "Stages 2 and 3 of four, in the steady state of 1F1B. The numbers are micro-batches. "
        "Time goes down."
    )
    axes.text(30, 0.9, text, ha="center", fontsize=8)
    return figure


def plain_and_interleaved(ranks, chunks, count):
    """1F1B and interleaved 1F1B on the same layers, in the time of a pass through one chunk.

    Returns two lists with a row for each rank, of (kind, chunk, micro-batch, start, length); under
    plain 1F1B there is one chunk, as long as all of a rank's chunks together. Forward and backward
    passes count alike, as in the plan.
    """
    ahead = [ranks - 1 - rank for rank in range(ranks)]
    plain = [
        [(kind, 0, micro, start, chunks) for kind, micro, start in row]
        for row in passes(ahead, count, chunks, chunks)
    ]
    (ticks,) = record("step9_4d", 1, ticks_of, ranks, chunks, count)
    interleaved = [
        [(*tick[rank], start, 1) for start, tick in enumerate(ticks) if tick[rank]]
        for rank in range(ranks)
    ]
    return plain, interleaved


def interleaved_plan():
    """The plan of interleaved 1F1B, and plain 1F1B with the same layers on the same scale."""
    ranks, chunks, count = 4, 2, 8
    figure, axes = canvas(12, 6.4, 62, 33)
    wide, left, high = 1.2, 7.6, 2.55
    plain, interleaved = plain_and_interleaved(ranks, chunks, count)
    end = max(start + length for row in plain for *_, start, length in row)
    panels = [
        ("1f1b: each rank has one chunk of two layers", 29.6, plain, "layers {0}, {1}"),
        (
            "interleaved: each rank has two chunks of one layer",
            15.2,
            interleaved,
            "layers {2}, {3}",
        ),
    ]
    for title, top, rows, layers in panels:
        ticks = max(start + length for row in rows for *_, start, length in row)
        busy = sum(length for *_, length in rows[0])
        text = f"{ticks} ticks; each rank is idle in {ticks - busy} of them: {1 - busy / ticks:.1%}"
        axes.text(0.2, top + 1.0, title, fontsize=9.5, weight="bold")
        axes.text(left + end * wide, top + 1.0, text, ha="right", fontsize=8.5)
        for rank, row in enumerate(rows):
            y = top - (rank + 1) * high + 0.5
            axes.text(0.2, y + 1.35, f"rank {rank}", va="center", fontsize=8.5)
            text = layers.format(2 * rank, 2 * rank + 1, rank, rank + ranks)
            axes.text(0.2, y + 0.3, text, va="center", fontsize=7)
            for tick in range(ticks):
                block(axes, left + tick * wide, y, wide, 2.1, IDLE)
            for kind, chunk, micro, start, length in row:
                colour = pale(KINDS[kind]) if chunk else KINDS[kind]
                block(axes, left + start * wide, y, length * wide, 2.1, colour, micro)
        low = top - ranks * high + 0.3
        for tick in range(0, end + 1, 2):
            axes.plot([left + tick * wide] * 2, [low - 0.35, low], color=EDGE, lw=0.7)
            axes.text(left + tick * wide, low - 1.2, tick, ha="center", fontsize=7)
        axes.text(left - 0.7, low - 1.2, "tick", ha="right", fontsize=7.5)
    for place, (kind, chunk) in enumerate([(kind, c) for kind in KINDS for c in range(chunks)]):
        x = left + place * 11.5
        block(axes, x, 1.5, 1.2, 1.2, pale(KINDS[kind]) if chunk else KINDS[kind])
        axes.text(x + 1.5, 2.1, f"{kind}, chunk {chunk}", va="center", fontsize=8)
    block(axes, left + 46, 1.5, 1.2, 1.2, IDLE)
    axes.text(left + 47.5, 2.1, "idle", va="center", fontsize=8)
    text = (
        "A number is a micro-batch. A tick is the time of a pass through one layer; forward and "
        "backward passes are drawn alike here."
    )
    axes.text(left, 0.1, text, fontsize=8)
    return figure
