"""Tensor parallelism, step 4, and the four axes and checkpoints of step 9."""

import itertools

from drawing import COLOURS, EDGE, arrow, box, canvas, ink
from matplotlib.patches import FancyArrowPatch, Rectangle


def tensor_parallel():
    """One decoder layer on two ranks: the slices they hold, and where they communicate."""
    figure, axes = canvas(12, 7.4, 52, 30)
    axes.set_ylim(-1.8, 30)
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
        (
            17,
            "--tp_size 2: every rank has all tokens (grey: the same on both)",
            False,
            "all-reduce",
        ),
        (
            1,
            "--tp_size 2 --sequence_parallel: norms and sums on half of the tokens each",
            True,
            "reduce-scatter",
        ),
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
    text = (
        "Narrow bars: activations, tokens from top to bottom. Squares: weights, a rank has the "
        "coloured half. Green: the residual stream. Yellow: the ranks communicate."
    )
    axes.text(0.3, -1.6, text, fontsize=8)
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
        shade = "#333333" if rank == 5 else colour
        style = {"fontsize": 11, "weight": "bold", "color": ink(shade) if dark else EDGE}
        axes.text(x, y, str(rank), ha="center", va="center", **style)
    for pp in range(2):
        left = 2.6 + pp * 13.4
        style = {"fill": False, "ec": "#999999", "lw": 0.9}
        axes.add_patch(Rectangle((left, 1.9), 9.3, 17.2, **style))
        axes.text(
            left + 4.65,
            19.7,
            f"pp {pp}: the {('first', 'second')[pp]} half of the layers",
            ha="center",
            fontsize=9,
        )
        for tp in range(2):
            axes.text(left + 2.3 + tp * 4.4, 18.2, f"tp {tp}", ha="center", fontsize=7.5)
    for dp in range(2):
        axes.text(0.4, 14.75 - 9.4 * dp, f"dp {dp}", rotation=90, va="center", fontsize=9)
        for cp in range(2):
            y = 16.6 - 9.4 * dp - 3.7 * cp
            axes.text(1.6, y, f"cp {cp}", rotation=90, va="center", ha="center", fontsize=7.5)
    for other, (_, colour) in partners.items():
        (x, y), (there, above) = centre(5), centre(other)
        bend = {1: 0.5, 13: -0.22}.get(other, 0.0)  # round the ranks in between
        line = {"arrowstyle": "-", "lw": 2.6, "color": COLOURS[colour], "zorder": 0.5}
        line["connectionstyle"] = f"arc3,rad={bend}"
        axes.add_patch(FancyArrowPatch((x, y), (there, above), **line))

    told = [
        ("tp", 0, "4, 5", "activations: four sums in each layer,\nfor each micro-batch"),
        ("cp", 2, "5, 7", "keys and values: round a ring,\nin each layer"),
        ("dp", 1, "1, 5", "gradients: once in a step. (dp and cp\ntogether: ranks 1, 3, 5, 7.)"),
        (
            "pp",
            5,
            "5, 13",
            "activations and their gradients: from stage\nto stage, for each micro-batch",
        ),
    ]
    for place, (axis, colour, ranks, text) in enumerate(told):
        y = 15.4 - place * 3.7
        box(axes, 28.6, y, 3.4, 2.2, "", COLOURS[colour])
        style = {"ha": "center", "va": "center", "color": ink(COLOURS[colour]), "weight": "bold"}
        axes.text(30.3, y + 1.1, axis, fontsize=11, **style)
        axes.text(32.6, y + 1.5, f"ranks {ranks}", fontsize=8.5, weight="bold", va="center")
        axes.text(32.6, y + 0.1, text, fontsize=8, va="center")
    axes.text(28.6, 19.6, "the groups of rank 5", fontsize=10, weight="bold")
    text = "rank = ((pp · 2 + dp) · 2 + cp) · 2 + tp. Ranks that differ in tp are neighbours."
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

    axes.text(0.6, 17, "written by 6 ranks: tp 2 × dp 3, zero1", fontsize=9.5, weight="bold")
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
            y = low + (rows - (1, 4, 7)[dp]) * size  # in the middle of its whole rows
            fill = COLOURS[2 * dp + tp]
            style = {"ha": "center", "va": "center", "weight": "bold"}
            axes.text(x + 3 * size, y, f"dp {dp}", fontsize=8.5, color=ink(fill), **style)
    text = "each outlined rectangle is one part of\na file: dp 1 has three, dp 0 and 2 two"
    axes.text(0.6, 2.6, text, fontsize=8, va="center")

    axes.text(19.6, 17, "in the checkpoint", fontsize=9.5, weight="bold")
    text = "the key of each part says where it\nis in the full tensor"
    axes.text(19.6, 15.3, text, fontsize=8, va="center")
    files = [f"{rank:05d}_0000" for rank in range(6)]
    for rank, name in enumerate(files):
        box(axes, 19.6, 11.2 - rank * 1.4, 5.6, 1.15, "", COLOURS[rank])
        axes.text(
            22.4, 11.75 - rank * 1.4, name, fontsize=7.5, ha="center", va="center",
            color=ink(COLOURS[rank]), family="monospace",
        )  # fmt: skip
    text = "six .safetensors files; their sizes\nand checksums: checkpoint.json"
    axes.text(19.6, 2.6, text, fontsize=8, va="center")
    arrow(axes, (14.6, 8.3), (19.3, 8.3))
    arrow(axes, (25.6, 8.3), (30.2, 8.3))

    axes.text(30.6, 17, "read by 4 ranks: tp 4", fontsize=9.5, weight="bold")
    text = "each rank copies what overlaps with its\nown rectangle"
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
