"""Draw the figures of the READMEs: `python assets/figures.py [folder]`."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

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
        axes.text(x + 2.2, 10.5, idea, ha="center", fontsize=6.5, style="italic")
        cells(axes, x + 0.9, 5.9, 2.6, 3.7, model)
        cells(axes, x + 0.9, 1.4, 2.6, 2.9, data)
        axes.text(x + 0.6, 7.75, "layers", rotation=90, va="center", ha="center", fontsize=6)
        axes.text(x + 2.2, 5.1, "width", ha="center", fontsize=6)
        axes.text(x + 0.6, 2.85, "batch", rotation=90, va="center", ha="center", fontsize=6)
        axes.text(x + 2.2, 0.6, "sequence", ha="center", fontsize=6)
    figure.suptitle(
        "Upper rectangle: the model, lower: the data; a colour for each rank that holds a part",
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
    axes.text(0.9, 14.4, "windows of seq_len + 1 tokens; the last 1/64 is held out", fontsize=8)
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


def draw_all(folder):
    """Write every figure into a folder; the paths."""
    paths = []
    for draw in (nine_steps, one_layer, mesh, packing):
        figure = draw()
        paths.append(Path(folder) / f"{draw.__name__}.png")
        figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
        plt.close(figure)
    return paths


if __name__ == "__main__":
    for path in draw_all(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent):
        print(path)
