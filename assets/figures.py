"""Draw the figures of the READMEs: `python assets/figures.py [folder]`."""

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee8866"]
EDGE = "#333333"


def canvas(width, height, across, down):
    """A figure whose axes run from 0 to across and from 0 to down, without ticks."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=(0, across), ylim=(0, down))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text="", colour="white", size=8, weight="normal"):
    style = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec=EDGE, lw=0.8
    )
    axes.add_patch(style)
    where = (x + width / 2, y + height / 2)
    axes.annotate(text, where, ha="center", va="center", fontsize=size, weight=weight)


def arrow(axes, start, end, colour=EDGE, bend=0.0):
    line = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, color=colour, connectionstyle=line, lw=1
        )
    )


def cells(axes, x, y, width, height, owners, alpha=0.85):
    """A rectangle cut into rows and columns, each cell in the colour of the rank that has it."""
    rows, columns = len(owners), len(owners[0])
    for i, row in enumerate(owners):
        for j, owner in enumerate(row):
            corner = (x + j * width / columns, y + height - (i + 1) * height / rows)
            colour = COLOURS[owner] if owner is not None else "white"
            axes.add_patch(
                Rectangle(
                    corner,
                    width / columns,
                    height / rows,
                    fc=colour,
                    ec="white",
                    lw=0.8,
                    alpha=alpha,
                )
            )
    axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=EDGE, lw=0.8))


def nine_steps():
    """Which rank holds which part of the model and of the data, step by step."""
    steps = [
        ("1 model", "one device", [[0]], [[0]]),
        ("2 processes", "ranks, groups", [[0]], [[0]]),
        ("3 loader", "the baseline", [[0]], [[0]]),
        ("4 tensor", "split the matrices", [[0, 1]], [[0]]),
        ("5 context", "split the sequence", [[0]], [[0, 1, 1, 0]]),
        ("6 data", "split the batch", [[0]], [[0], [1]]),
        ("7 AFAB", "split the layers", [[0], [1]], [[0]]),
        ("8 1F1B", "backward sooner", [[0], [1]], [[0]]),
        ("9 4D", "all four at once", [[0, 1], [2, 3]], [[4, 5, 5, 4], [6, 7, 7, 6]]),
    ]
    figure, axes = canvas(11, 3.3, 45, 13)
    for index, (name, idea, model, data) in enumerate(steps):
        x = index * 5 + 0.3
        box(axes, x, 0.3, 4.4, 12.4, colour="#f7f7f7")
        axes.text(x + 2.2, 11.6, name, ha="center", fontsize=8.5, weight="bold")
        axes.text(x + 2.2, 10.5, idea, ha="center", fontsize=6, style="italic")
        cells(axes, x + 0.9, 5.9, 2.6, 3.7, model)
        cells(axes, x + 0.9, 1.4, 2.6, 2.9, data)
        axes.text(x + 0.6, 7.75, "layers", rotation=90, va="center", ha="center", fontsize=6)
        axes.text(x + 2.2, 5.1, "width", ha="center", fontsize=6)
        axes.text(x + 0.6, 2.85, "batch", rotation=90, va="center", ha="center", fontsize=6)
        axes.text(x + 2.2, 0.6, "sequence", ha="center", fontsize=6)
    figure.suptitle(
        "Upper rectangle: the model, lower: the data; a colour for each part",
        fontsize=8,
        y=0.99,
    )
    return figure


def one_layer():
    """The shapes inside a decoder layer."""
    figure, axes = canvas(9.5, 4.2, 38, 17)
    attention = [
        ("input_layernorm", "[b, s, hidden]"),
        ("q, k, v proj", "[b, s, heads, head_dim]"),
        ("rotary (q, k)", "[b, s, heads, head_dim]"),
        ("causal attention", "[b, s, heads, head_dim]"),
        ("o_proj", "[b, s, hidden]"),
    ]
    mlp = [
        ("post_attention_\nlayernorm", "[b, s, hidden]"),
        ("gate, up proj", "2 x [b, s, intermediate]"),
        ("silu(gate) * up", "[b, s, intermediate]"),
        ("down_proj", "[b, s, hidden]"),
    ]
    for y, parts, colour in ((11, attention, "#dbe8f4"), (3.2, mlp, "#f7dfe2")):
        axes.plot([0.5, 37.5], [y + 4.6, y + 4.6], color="#228833", lw=3, zorder=0)
        width = 5.6
        for index, (name, shape) in enumerate(parts):
            x = 2 + index * 7
            box(axes, x, y, width, 2.4, name, colour, 8)
            axes.text(x + width / 2, y - 0.9, shape, ha="center", fontsize=6.5, color="#555555")
            if index:
                arrow(axes, (x - 1.4, y + 1.2), (x, y + 1.2))
        arrow(axes, (1, y + 4.5), (2, y + 1.6), bend=0.2)
        end = 2 + (len(parts) - 1) * 7 + width
        arrow(axes, (end, y + 1.2), (end + 1.4, y + 4.4), bend=0.3)
        axes.text(end + 1.5, y + 4.6, "+", fontsize=13, ha="center", va="center", weight="bold")
    axes.text(19, 16.2, "residual stream [batch, seq, hidden]", ha="center", fontsize=8)
    return figure


def mesh():
    """Eight ranks as an array, and the groups that its axes make."""
    figure, axes = canvas(10, 3.4, 40.4, 14)
    sizes = {"dp": 2, "cp": 2, "tp": 2}
    panels = [
        ("group('tp')", ("tp",)),
        ("group('cp')", ("cp",)),
        ("group('dp')", ("dp",)),
        ("group('dp', 'cp')", ("dp", "cp")),
    ]
    for panel, (title, axes_of_group) in enumerate(panels):
        x = panel * 10 + 0.9
        axes.text(x + 4.3, 12.9, title, ha="center", fontsize=9, family="monospace")
        lines = {}
        for rank in range(8):
            place = {"dp": rank // 4, "cp": rank // 2 % 2, "tp": rank % 2}
            key = tuple(place[a] for a in sizes if a not in axes_of_group)
            colour = COLOURS[lines.setdefault(key, len(lines))]
            left = x + place["dp"] * 4.7 + place["tp"] * 2.0
            low = 6.6 - place["cp"] * 3.4
            box(axes, left, low, 1.7, 2.6, str(rank), colour, 11, "bold")
        for dp in range(2):
            axes.text(x + dp * 4.7 + 1.9, 10.3, f"dp {dp}", ha="center", fontsize=7.5)
            for tp in range(2):
                axes.text(x + dp * 4.7 + tp * 2 + 0.85, 9.5, f"tp {tp}", ha="center", fontsize=6)
        if not panel:
            axes.text(0.1, 7.9, "cp 0", rotation=90, fontsize=6.5, va="center")
            axes.text(0.1, 4.5, "cp 1", rotation=90, fontsize=6.5, va="center")
    text = "tp 2 x cp 2 x dp 2 on ranks 0 to 7: the ranks of one colour form one group"
    axes.text(20, 1.3, text, ha="center", fontsize=9)
    return figure


def packing():
    """From documents to the micro-batches of a step."""
    figure, axes = canvas(10, 4.6, 40, 19)
    lengths, x = [7, 4, 10, 5, 8], 1.0
    for index, length in enumerate(lengths):
        cells(axes, x, 16, length, 1.4, [[index]])
        axes.text(x + length / 2, 16.7, f"document {index}", ha="center", va="center", fontsize=7)
        x += length
        axes.add_patch(Rectangle((x, 16), 0.6, 1.4, fc="black"))
        x += 0.6
    axes.text(0.9, 17.8, "documents, an end token (black) after each, one array", fontsize=8)
    count, size = 9, 4.0
    for index in range(count):
        box(axes, 1 + index * size, 12.6, size - 0.25, 1.3, f"window {index}", "#eeeeee", 7)
    axes.add_patch(
        Rectangle((1 + (count - 1) * size, 12.6), size - 0.25, 1.3, fc="#ccbb44", alpha=0.7)
    )
    text = "windows of seq_len + 1 tokens, of which neighbours share one; the last 1/64 is held out"
    axes.text(0.9, 14.4, text, fontsize=8)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    for place, window in enumerate(order):
        colour = COLOURS[place // 4]
        box(axes, 1 + place * size, 8.6, size - 0.25, 1.3, f"window {window}", colour, 7)
        arrow(axes, (1 + window * size + 1.9, 12.5), (1 + place * size + 1.9, 10), "#999999")
    axes.text(33.4, 9.1, "order of an epoch:\nseed and epoch\ndecide", fontsize=7.5, va="center")
    for step in range(2):
        for micro in range(2):
            x = 1 + step * 16 + micro * 8
            rows = order[step * 4 + micro * 2 : step * 4 + micro * 2 + 2]
            for row, window in enumerate(rows):
                box(axes, x, 4.5 - row * 1.5, 7.4, 1.2, f"window {window}", COLOURS[step], 7)
            label = f"step {step}, micro-batch {micro}"
            axes.text(x + 3.7, 6.2, label, ha="center", fontsize=7.5)
    text = "another split of the batch (1 x 4, 4 x 1, more ranks) deals the same four windows"
    axes.text(17, 1.2, text, ha="center", fontsize=8)
    return figure


def ring():
    """Who attends to what, contiguous beside zigzag, and the keys and values on their way."""
    figure, axes = canvas(11, 5.6, 44, 22)
    ranks, size = 4, 1.35
    square = size * 2 * ranks
    for x, title, owner in (
        (2.2, "contiguous: rank r has chunks 2r and 2r+1", lambda chunk: chunk // 2),
        (17.2, "zigzag: rank r has chunks r and 7-r", lambda chunk: min(chunk, 7 - chunk)),
    ):
        axes.text(x + square / 2, 20.9, title, ha="center", fontsize=9)
        chunks = [[owner(i) if j <= i else None for j in range(8)] for i in range(8)]
        cells(axes, x, 8.6, square, square, chunks)
        counts = dict.fromkeys(range(ranks), 0.0)
        for i in range(8):
            y = 8.6 + square - (i + 1) * size
            axes.text(x - 0.3, y + size / 2, str(i), ha="right", va="center", fontsize=7)
            axes.text(x + (i + 0.5) * size, 19.7, str(i), ha="center", fontsize=7)
            left = x + i * size
            corners = [(left, y + size), (left + size, y + size), (left + size, y)]
            axes.add_patch(Polygon(corners, fc="white", ec="white"))  # the half that is masked
            counts[owner(i)] += i + 0.5
        axes.add_patch(Rectangle((x, 8.6), square, square, fill=False, ec=EDGE, lw=0.8))
        axes.text(x - 1.5, 14, "queries", rotation=90, va="center", fontsize=8)
        axes.text(x + square - 0.2, 18.3, "keys across, queries down", ha="right", fontsize=7)
        for rank, count in counts.items():
            y = 6.6 - 1.35 * rank
            bar = Rectangle((x, y), count * 0.34, 0.95, fc=COLOURS[rank], alpha=0.85)
            axes.add_patch(bar)
            label = f"rank {rank}: {count:g} squares"
            axes.text(x + count * 0.34 + 0.3, y + 0.45, label, va="center", fontsize=7.5)
    axes.text(37.2, 20.9, "the ring: kv blocks, step by step", ha="center", fontsize=9)
    for rank in range(ranks):
        axes.text(33.6 + rank * 2.5, 19.7, f"rank {rank}", ha="center", fontsize=7.5)
    for step in range(ranks):
        y = 17.4 - step * 3.6
        axes.text(31.9, y + 0.8, f"step {step}", ha="right", va="center", fontsize=7.5)
        for rank in range(ranks):
            source, x = (rank - step) % ranks, 32.5 + rank * 2.5
            box(axes, x, y, 2.2, 1.6, f"kv {source}", COLOURS[source], 8)
            if step + 1 < ranks:
                end = x + 3.6 if rank + 1 < ranks else 33.6
                bend = 0.0 if rank + 1 < ranks else -0.12
                colour = EDGE if rank + 1 < ranks else "#999999"
                arrow(axes, (x + 1.1, y - 0.1), (end, y - 1.9), colour, bend)
    text = (
        "each block is sent on while it is computed:\n"
        "cp steps, cp - 1 sends; backward in reverse,\n"
        "cp - 2 sends, gradients of kv straight home"
    )
    axes.text(37.2, 4.2, text, ha="center", va="center", fontsize=7.5)
    return figure


def tensor_parallel():
    """One decoder layer on two ranks: the slices they hold, and where they communicate."""
    figure, axes = canvas(12, 7, 52, 30)
    halves = {"q, k, v": 0, "gate, up": 0, "o": 1, "down": 1}  # cut along which dim

    def matrix(x, y, name, rank):
        for part in range(2):
            size = (2.4, 1.2) if halves[name] == 0 else (1.2, 2.4)
            corner = (x, y + 1.2 - 1.2 * part) if halves[name] == 0 else (x + 1.2 * part, y)
            colour = COLOURS[rank] if part == rank else "white"
            style = {"fc": colour, "ec": EDGE, "lw": 0.6, "alpha": 0.85}
            axes.add_patch(Rectangle(corner, *size, **style))
        axes.text(x + 1.2, y + 2.7, name, ha="center", fontsize=7.5, family="monospace")

    def activation(x, y, rank, dealt_out):
        for part in range(2):
            mine = not dealt_out or part == rank
            colour = (COLOURS[rank] if dealt_out else COLOURS[6]) if mine else "white"
            corner = (x, y + 1.2 - 1.2 * part)
            axes.add_patch(Rectangle(corner, 1.3, 1.2, fc=colour, ec=EDGE, lw=0.6, alpha=0.85))

    def meeting(x, y, text):
        box(axes, x, y - 0.7, 1.3, 10.6, colour="#fff3c4")
        where = {"ha": "center", "va": "center", "rotation": 90, "fontsize": 8}
        axes.text(x + 0.65, y + 4.3, text, weight="bold", **where)

    def block(x, y, rank, dealt_out, first, inner, last):
        activation(x, y, rank, dealt_out)
        colour = COLOURS[rank] if dealt_out else COLOURS[6]
        box(axes, x + 2.3, y + 0.2, 2.6, 2, "norm", colour, 8)
        matrix(x + 8.6, y, first, rank)
        box(axes, x + 12.3, y + 0.2, 3.4, 2, inner, COLOURS[rank], 7.5)
        matrix(x + 17, y, last, rank)
        stops = [(1.4, 2.2), (5, 8.5), (11.1, 12.2), (15.8, 16.9), (19.5, 22.9)]
        for start, end in stops:
            arrow(axes, (x + start, y + 1.2), (x + end, y + 1.2))
        axes.text(x + 22.95, y + 1.2, "+", fontsize=13, ha="left", va="center", weight="bold")
        bend = {"connectionstyle": "arc3,rad=0.08", "arrowstyle": "-|>", "mutation_scale": 8}
        start, end = (x + 0.65, y - 0.1), (x + 23.3, y + 0.6)
        axes.add_patch(FancyArrowPatch(start, end, color="#228833", lw=1.2, **bend))

    panels = [
        (17, "--tp_size 2: grey is the same on both ranks", False, "all-reduce"),
        (1, "--tp_size 2 --sequence_parallel: half of the tokens each", True, "reduce-scatter"),
    ]
    for y, title, dealt_out, end in panels:
        axes.text(0.3, y + 12, title, fontsize=9.5, weight="bold")
        for x in (2.2, 26.2):
            if dealt_out:
                meeting(x + 6, y + 1, "all-gather")
            meeting(x + 20.3, y + 1, end)
        for rank in range(2):
            low = y + 7.8 - 6.8 * rank
            axes.text(0.2, low + 1.2, f"rank {rank}", fontsize=8, va="center", rotation=90)
            heads = f"heads\n{4 * rank} to {4 * rank + 3}"
            block(2.2, low, rank, dealt_out, "q, k, v", heads, "o")
            block(26.2, low, rank, dealt_out, "gate, up", "silu(gate)\n* up", "down")
            activation(50.2, low, rank, dealt_out)
    return figure


def engines():
    """What each data-parallel engine keeps on each of four ranks."""
    figure, axes = canvas(10, 3.6, 41, 15)
    names = ["naive, bucket", "zero1", "zero2", "zero3"]
    kinds = [("weights", 1.0), ("gradients", 1.0), ("optimizer state", 2.0)]
    whole = [(True, True, True), (True, True, False), (True, False, False), (False, False, False)]
    totals = [
        "16 N",
        "8 N + 12 N/4 = 11 N,\nthen 7 N",
        "4 N + 12 N/4 = 7 N",
        "16 N/4 = 4 N",
    ]
    for index, (name, kept, total) in enumerate(zip(names, whole, totals, strict=True)):
        left = 1 + index * 10.2
        axes.text(left + 4.4, 14, name, ha="center", fontsize=9, family="monospace")
        for rank in range(4):
            x, y = left + rank * 2.3, 2.6
            for (_, height), is_whole in zip(kinds, kept, strict=True):
                size = height * 2.4
                for part in range(4):  # of four, the lowest is the last rank's
                    mine = is_whole or part == 3 - rank
                    shade = "#bbbbbb" if is_whole else COLOURS[rank]
                    place = (x, y + part * size / 4)
                    fill = shade if mine else "white"
                    axes.add_patch(Rectangle(place, 1.9, size / 4, fc=fill, ec="#dddddd", lw=0.5))
                axes.add_patch(Rectangle((x, y), 1.9, size, fill=False, ec=EDGE, lw=0.9))
                y += size + 0.25
            axes.text(x + 0.95, 1.7, f"rank {rank}", ha="center", fontsize=7)
            if index == 0 and rank == 0:
                y = 2.6
                for kind, height in kinds:
                    axes.text(
                        0.5, y + height * 1.2, kind, rotation=90, ha="center", va="center",
                        fontsize=7,
                    )  # fmt: skip
                    y += height * 2.4 + 0.25
        axes.text(left + 4.4, 1.1, total, ha="center", va="top", fontsize=8)
    return figure


def backward_overlap():
    """When the engines talk: time lines of a step's last backward pass, schematic."""
    figure, axes = canvas(10, 4.5, 40, 23)
    axes.set_ylim(3, 23)
    layers, wide = 4, 3.6

    def row(y, label, bars, colour):
        axes.text(5.2, y + 0.6, label, ha="right", va="center", fontsize=7.5)
        for start, width, text in bars:
            box(axes, 5.6 + start, y, width - 0.12, 1.2, text, colour, 7)

    compute, talk, gather = "#dbe8f4", "#f7dfe2", "#e3efd8"
    backward = [(i * wide, wide, f"layer {layers - 1 - i}") for i in range(layers)]
    end = layers * wide

    axes.text(0.3, 21.9, "naive", fontsize=9, family="monospace", weight="bold")
    row(20.1, "backward", backward, compute)
    row(18.6, "all-reduce", [(end + i * 0.9, 0.9, "") for i in range(16)], talk)
    text = "one for each parameter, when all is computed"
    axes.text(5.6 + end + 7.2, 20.6, text, ha="center", fontsize=7)

    axes.text(0.3, 16.9, "bucket", fontsize=9, family="monospace", weight="bold")
    row(15.1, "backward", backward, compute)
    reductions = [(wide * (i + 1), wide, f"bucket {i}") for i in range(layers)]
    row(13.6, "all-reduce", reductions, talk)
    text = "a bucket leaves as soon as it is full; only the last is waited for"
    axes.text(5.6 + end + wide + 0.6, 14.2, text, va="center", fontsize=7)

    axes.text(0.3, 11.9, "zero3", fontsize=9, family="monospace", weight="bold")
    row(10.1, "backward", backward, compute)
    gathers = [(i * wide, wide, f"layer {layers - 2 - i}") for i in range(layers - 1)]
    row(8.6, "all-gather", gathers, gather)
    scatters = [(wide * (i + 1), wide, f"layer {layers - 1 - i}") for i in range(layers)]
    row(7.1, "reduce-scatter", scatters, talk)
    text = (
        "the next layer's weights come while this\n"
        "one computes, the gradients of this one\n"
        "leave while the next one computes"
    )
    axes.text(5.6 + end + wide + 0.6, 9.2, text, va="center", fontsize=7)
    held = [
        (i * wide, wide, ", ".join(str(n) for n in (layers - 1 - i, layers - 2 - i) if n >= 0))
        for i in range(layers)
    ]
    row(5.4, "layers in memory", held, "white")
    arrow(axes, (5.6, 3.9), (5.6 + end + wide, 3.9))
    axes.text(5.6 + end + wide + 0.4, 3.9, "time", va="center", fontsize=8)
    return figure


def afab_grid():
    """Layers dealt to four stages, and an AFAB step of eight micro-batches as a grid."""
    figure, axes = canvas(12, 3.9, 61, 20)
    stages, count, wide, left, top, high = 4, 8, 1.39, 14.6, 14.4, 3.5
    parts = ["embedding\nlayers 0, 1", "layers 2, 3", "layers 4, 5", "layers 6, 7\nhead, loss"]
    turn = count + stages - 1  # forward takes one cell, backward two

    def cell(stage, place, width, colour, micro):
        corner = (left + place * wide, top - stage * high)
        axes.add_patch(Rectangle(corner, width * wide, 2.6, fc=colour, ec="white", lw=0.8))
        where = (corner[0] + width * wide / 2, corner[1] + 1.3)
        axes.annotate(micro, where, ha="center", va="center", fontsize=7.5, color="white")

    for stage, part in enumerate(parts):
        y = top - stage * high
        axes.text(0.2, y + 1.3, f"stage {stage}", va="center", fontsize=8.5)
        box(axes, 4.6, y, 7.4, 2.6, part, "white", 7.5)
        if stage + 1 < stages:
            arrow(axes, (7.8, y), (7.8, y - 0.9), COLOURS[0])
            arrow(axes, (8.8, y - 0.9), (8.8, y), COLOURS[1])
        for place in range(3 * turn):
            cell(stage, place, 1, "#e8e8e8", "")
        for micro in range(count):
            cell(stage, stage + micro, 1, COLOURS[0], micro)
            cell(stage, turn + 2 * (stages - 1 - stage + micro), 2, COLOURS[1], micro)
    end = left + turn * wide
    text = f"all forward: m + p - 1 = {turn} cells"
    axes.text((left + end) / 2, 17.7, text, ha="center", fontsize=8, color=COLOURS[0])
    text = f"all backward: the same, {turn} cells of twice the width"
    axes.text(end + turn * wide, 17.7, text, ha="center", fontsize=8, color=COLOURS[1])
    axes.plot([end, end], [3.4, 18.6], color=EDGE, lw=0.8, ls=":")
    text = "grey: idle, in every row (p - 1) / (m + p - 1) = 3/11 of the time"
    axes.text(left, 2.2, text, va="center", fontsize=8)
    arrow(axes, (left + 38.5, 2.2), (left + 45.8, 2.2))
    axes.text(left + 38, 2.2, "time", ha="right", va="center", fontsize=8)
    return figure


def passes(ahead, count):
    """When each pass of a pipeline's step starts if it waits for nothing but what it needs.

    ahead: how often each stage goes forward before it alternates; count: micro-batches. A forward
    pass takes 1, a backward pass 2. Returns a list of (kind, micro-batch, start) for each stage.
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
                free[stage] = start + (1 if kind == "forward" else 2)
                ended[kind, stage, micro] = free[stage]
                rows[stage].append((*order.pop(0), start))
    return rows


def schedules():
    """AFAB and 1F1B on four stages with eight micro-batches, and how many are alive at most."""
    figure, axes = canvas(12, 5.6, 61, 29)
    stages, count, wide, left, high = 4, 8, 1.39, 5.2, 2.75
    colours = {"forward": COLOURS[0], "backward": COLOURS[1]}
    panels = [
        ("afab: all forward, all backward", 26.2, [count] * stages),
        ("1f1b: one forward, one backward", 12.2, [stages - 1 - stage for stage in range(stages)]),
    ]
    for title, top, ahead in panels:
        axes.text(0.2, top + 1.0, title, fontsize=9.5, weight="bold")
        axes.text(left + 33 * wide + 0.6, top + 1.0, "alive at most", fontsize=8.5)
        rows = passes(ahead, count)
        whole = max(start + 2 for row in rows for *_, start in row)
        for stage, row in enumerate(rows):
            y = top - (stage + 1) * high + 0.5
            axes.text(0.2, y + 1, f"stage {stage}", va="center", fontsize=8.5)
            for place in range(whole):
                grey = {"fc": "#e8e8e8", "ec": "white", "lw": 0.8}
                axes.add_patch(Rectangle((left + place * wide, y), wide, 2, **grey))
            alive, most = 0, 0
            for place, (kind, micro, start) in enumerate(row):
                steady = ahead[stage] <= place < 2 * count - ahead[stage]
                size = wide if kind == "forward" else 2 * wide
                style = {"fc": colours[kind], "ec": "white", "lw": 0.8}
                style["alpha"] = 1 if steady or ahead[stage] == count else 0.6
                axes.add_patch(Rectangle((left + start * wide, y), size, 2, **style))
                where = (left + start * wide + size / 2, y + 1)
                axes.annotate(
                    micro, where, ha="center", va="center", fontsize=7.5, color="white",
                    weight="bold",
                )  # fmt: skip
                alive += 1 if kind == "forward" else -1
                most = max(most, alive)
            for one in range(most):
                corner = (left + whole * wide + 0.6 + one * 1.02, y + 0.4)
                axes.add_patch(Rectangle(corner, 0.85, 1.2, fc=COLOURS[2], alpha=0.85))
            end = left + whole * wide + 0.7 + most * 1.02
            axes.text(end, y + 1, str(most), va="center", fontsize=8.5)
    text = (
        "blue: forward, one cell; red: backward, two; grey: idle, 3 (p - 1) = 9 of 33 cells in "
        "every row; pale: warm-up and cool-down"
    )
    axes.text(0.2, 0.3, text, fontsize=8)
    return figure


def four_axes():
    """Sixteen ranks, and the groups of one of them."""
    figure, axes = canvas(11.5, 5.4, 46, 21.6)
    # In which group rank 5 meets a rank, and that group's colour.
    partners = {4: ("tp", 0), 7: ("cp", 2), 1: ("dp", 1), 13: ("pp", 5)}

    def centre(rank):
        pp, dp, cp, tp = (rank >> place & 1 for place in (3, 2, 1, 0))
        return 4.9 + pp * 13.4 + tp * 4.4, 16.6 - dp * 9.4 - cp * 3.7

    for rank in range(16):
        x, y = centre(rank)
        colour = COLOURS[partners[rank][1]] if rank in partners else "#f2f2f2"
        box(axes, x - 1.3, y - 1.1, 2.6, 2.2, "", "#333333" if rank == 5 else colour)
        dark = rank == 5 or rank in partners
        style = {"fontsize": 11, "weight": "bold", "color": "white" if dark else EDGE}
        axes.text(x, y, str(rank), ha="center", va="center", **style)
    for pp in range(2):
        left = 2.6 + pp * 13.4
        style = {"fill": False, "ec": "#999999", "lw": 0.9}
        axes.add_patch(Rectangle((left, 1.9), 9.3, 17.2, **style))
        axes.text(left + 4.65, 19.6, f"pp {pp}: its layers", ha="center", fontsize=9)
        for tp in range(2):
            axes.text(left + 2.3 + tp * 4.4, 18.2, f"tp {tp}", ha="center", fontsize=7.5)
    for dp in range(2):
        axes.text(0.4, 14.75 - 9.4 * dp, f"dp {dp}", rotation=90, va="center", fontsize=9)
        for cp in range(2):
            y = 16.6 - 9.4 * dp - 3.7 * cp
            axes.text(1.6, y, f"cp {cp}", rotation=90, va="center", ha="center", fontsize=7.5)
    for other, (_, colour) in partners.items():
        (x, y), (there, above) = centre(5), centre(other)
        bend = {1: 0.0, 13: -0.22}.get(other, 0.0)
        line = {"arrowstyle": "-", "lw": 2.6, "color": COLOURS[colour], "zorder": 0.5}
        line["connectionstyle"] = f"arc3,rad={bend}"
        axes.add_patch(FancyArrowPatch((x, y), (there, above), **line))

    told = [
        ("tp", 0, "4, 5", "activations, four sums a layer\nand micro-batch"),
        ("cp", 2, "5, 7", "keys and values, round a ring,\nin every layer"),
        ("dp", 1, "1, 5", "gradients, once a step; together\nwith cp: 1, 3, 5, 7"),
        ("pp", 5, "5, 13", "activations, once a stage\nand micro-batch"),
    ]
    for place, (axis, colour, ranks, text) in enumerate(told):
        y = 15.4 - place * 3.7
        box(axes, 28.6, y, 3.4, 2.2, "", COLOURS[colour])
        style = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
        axes.text(30.3, y + 1.1, axis, fontsize=11, **style)
        axes.text(32.6, y + 1.5, f"ranks {ranks}", fontsize=8.5, weight="bold", va="center")
        axes.text(32.6, y + 0.1, text, fontsize=8, va="center")
    axes.text(28.6, 19.6, "the groups of rank 5", fontsize=10, weight="bold")
    text = "rank = ((pp · 2 + dp) · 2 + cp) · 2 + tp: neighbours differ in tp, distant ranks in pp"
    axes.text(2.6, 0.6, text, fontsize=8.5)
    return figure


def rectangles():
    """A weight as six ranks hold it, as a checkpoint has it, and as other ranks read it."""
    figure, axes = canvas(12, 4.5, 48, 18)
    rows, columns, cuts = 8, 12, [0, 15, 33, 48]  # of 8 x 6 elements on a tp rank, three shards
    size, low = 1.02, 4.2

    def owner(row, column):
        """Which of six ranks has an element: tp 2, and dp 3 with zero1."""
        tp, place = column // 6, row * 6 + column % 6
        return 2 * sum(place >= cut for cut in cuts[1:-1]) + tp

    def element(x, row, column, colour, alpha=0.85):
        corner = (x + column * size, low + (rows - 1 - row) * size)
        style = {"fc": colour, "ec": "white", "lw": 0.5, "alpha": alpha}
        axes.add_patch(Rectangle(corner, size, size, **style))

    def outline(x, row, column, height, width):
        corner = (x + column * size, low + (rows - row - height) * size)
        frame = {"fill": False, "ec": EDGE, "lw": 1.6}
        axes.add_patch(Rectangle(corner, width * size, height * size, **frame))

    def split(start, stop):
        """`resharding.rectangles` for rows of 6, as (row, column, height, width)."""
        whole_start = min(-(-start // 6) * 6, stop)
        whole_stop = max(stop // 6 * 6, whole_start)
        for a, b in itertools.pairwise([start, whole_start, whole_stop, stop]):
            if a < b:
                height = max(1, (b - a) // 6)
                yield a // 6, a % 6, height, (b - a) // height

    axes.text(0.6, 17, "written: tp 2 x dp 3, zero1", fontsize=9.5, weight="bold")
    text = "tp cuts o_proj.weight by columns; of each half,\nflattened, a dp rank updates one shard"
    axes.text(0.6, 15.3, text, fontsize=8, va="center")
    for row in range(rows):
        for column in range(columns):
            element(0.6 + (column // 6) * 1.2, row, column, COLOURS[owner(row, column)])
    for tp in range(2):
        x = 0.6 + tp * (6 * size + 1.2)
        axes.text(x + 3 * size, 13.1, f"tp {tp}", ha="center", fontsize=8)
        for dp in range(3):
            for found in split(cuts[dp], cuts[dp + 1]):
                outline(x, *found)
            middle = (cuts[dp] + cuts[dp + 1]) / 2 // 6
            y = low + (rows - 0.5 - middle) * size
            style = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
            axes.text(x + 3 * size, y, f"dp {dp}", fontsize=8.5, **style)
    text = "each outlined rectangle is one part of\na file: dp 1 has three, dp 0 and 2 two"
    axes.text(0.6, 2.6, text, fontsize=8, va="center")

    axes.text(19.6, 17, "in the checkpoint", fontsize=9.5, weight="bold")
    text = "each part's key is its place in the\nfull tensor; nobody's layout"
    axes.text(19.6, 15.3, text, fontsize=8, va="center")
    files = [f"{rank:05d}_0000" for rank in range(6)]
    for rank, name in enumerate(files):
        box(axes, 19.6, 11.2 - rank * 1.4, 5.6, 1.15, "", COLOURS[rank])
        axes.text(
            22.4, 11.75 - rank * 1.4, name, fontsize=7.5, ha="center", va="center",
            color="white", family="monospace",
        )  # fmt: skip
    axes.text(
        22.4,
        2.6,
        "six .safetensors; checkpoint.json\nhas sizes and checksums",
        fontsize=8,
        ha="center",
        va="center",
    )
    arrow(axes, (14.6, 8.3), (19.3, 8.3))
    arrow(axes, (25.6, 8.3), (30.2, 8.3))

    axes.text(30.6, 17, "read: tp 4", fontsize=9.5, weight="bold")
    text = "each rank takes the overlaps of its own\nrectangle with those that are there"
    axes.text(30.6, 15.3, text, fontsize=8, va="center")
    for tp in range(4):
        x = 30.6 + tp * 1.2
        for row in range(rows):
            for column in range(3 * tp, 3 * tp + 3):
                element(x, row, column, COLOURS[owner(row, column)])
        outline(x, 0, 3 * tp, rows, 3)
        middle = x + (3 * tp + 1.5) * size
        axes.text(middle, 13.1, f"tp {tp}", ha="center", fontsize=8)
    text = "five overlaps for each rank here,\nin three of the six files"
    axes.text(30.6, 2.6, text, fontsize=8, va="center")
    return figure


def draw_all(folder):
    """Write every figure into a folder; the paths."""
    paths = []
    for draw in (
        nine_steps,
        one_layer,
        mesh,
        packing,
        tensor_parallel,
        ring,
        engines,
        backward_overlap,
        afab_grid,
        schedules,
        four_axes,
        rectangles,
    ):
        figure = draw()
        paths.append(Path(folder) / f"{draw.__name__}.png")
        figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
        plt.close(figure)
    return paths


if __name__ == "__main__":
    for path in draw_all(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent):
        print(path)
