"""What the figures share: colours, a canvas, boxes, arrows, cells."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee8866"]
EDGE = "#333333"


def ink(colour):
    """Black or white, whichever one can read on a colour."""
    channels = (c / 12.92 if c < 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    luminance = sum(map(float.__mul__, (0.2126, 0.7152, 0.0722), channels))
    return "white" if luminance < 0.19 else "black"


def pale(colour):
    """A colour half way to white; opaque, so that nothing shines through."""
    return tuple((1 + c) / 2 for c in to_rgb(colour))


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
    look = {"fontsize": size, "weight": weight, "color": ink(colour)}
    axes.annotate(text, where, ha="center", va="center", **look)


def arrow(axes, start, end, colour=EDGE, bend=0.0, style="-"):
    line = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=9,
            color=colour,
            connectionstyle=line,
            lw=1,
            linestyle=style,
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


def block(axes, x, y, width, height, colour, text="", size=7.5):
    """A bar of a time line, with a word or a number in it."""
    axes.add_patch(Rectangle((x, y), width, height, fc=colour, ec="white", lw=0.8))
    look = {"fontsize": size, "weight": "bold", "color": ink(colour)}
    axes.annotate(text, (x + width / 2, y + height / 2), ha="center", va="center", **look)
