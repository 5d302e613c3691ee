"""Data parallelism, step 6: what the engines keep, and when they talk."""

import itertools

from drawing import COLOURS, EDGE, arrow, block, box, canvas, pale
from matplotlib.patches import Rectangle
from recorded import record
from recorded_engines import zero3_in_a_step

FOUR_LAYERS = (
    "--device cpu --dp_size 2 --dp_engine zero3 --num_hidden_layers 4 --dataset_name random "
    "--micro_batch_size 1 --seq_len 16"
)


def engines():
    """What each data-parallel engine keeps on each of four ranks."""
    figure, axes = canvas(10, 4.0, 41, 15)
    axes.set_ylim(-1.7, 15)
    names = ["naive, bucket", "zero1", "zero2", "zero3"]
    kinds = [("weights", 1.0), ("gradients", 1.0), ("optimizer state", 2.0)]
    whole = [(True, True, True), (True, True, False), (True, False, False), (False, False, False)]
    totals = [
        "16 N bytes",
        "8 N + 12 N/4 = 11 N bytes in the\nbackward pass, 7 N after it",
        "4 N + 12 N/4 = 7 N bytes",
        "16 N/4 = 4 N bytes",
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
    text = (
        "Grey: whole on every rank. Colour: the shard of this rank. N weights in the model, four "
        "ranks, float32, Adam."
    )
    axes.text(20.5, -1.5, text, ha="center", fontsize=8)
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
    text = "one message for each parameter, after the whole backward pass"
    axes.text(5.6 + end + 0.2, 20.7, text, va="center", fontsize=7)

    axes.text(0.3, 16.9, "bucket", fontsize=9, family="monospace", weight="bold")
    row(15.1, "backward", backward, compute)
    reductions = [(wide * (i + 1), wide, f"bucket {i}") for i in range(layers)]
    row(13.6, "all-reduce", reductions, talk)
    text = "a bucket leaves as soon as it is full; the rank waits only for the last"
    axes.text(5.6 + end + wide + 0.6, 14.2, text, va="center", fontsize=7)

    axes.text(0.3, 11.9, "zero3", fontsize=9, family="monospace", weight="bold")
    row(10.1, "backward", backward, compute)
    gathers = [(i * wide, wide, f"layer {layers - 2 - i}") for i in range(layers - 1)]
    row(8.6, "all-gather", gathers, gather)
    scatters = [(wide * (i + 1), wide, f"layer {layers - 1 - i}") for i in range(layers)]
    row(7.1, "reduce-scatter", scatters, talk)
    text = (
        "while a layer computes, the weights of the\n"
        "next one come, and the gradients of the\n"
        "one before leave"
    )
    axes.text(5.6 + end + wide + 0.6, 9.2, text, va="center", fontsize=7)
    held = [
        (i * wide, wide, ", ".join(str(n) for n in (layers - 1 - i, layers - 2 - i) if n >= 0))
        for i in range(layers)
    ]
    row(5.4, "whole layers here", held, "white")
    arrow(axes, (5.6, 3.9), (5.6 + end + wide, 3.9))
    axes.text(5.6 + end + wide + 0.4, 3.9, "time", va="center", fontsize=8)
    return figure


def times_of(events):
    """When each event of `zero3_in_a_step` is drawn.

    A forward pass takes 1, a backward pass 2, head and loss 1; what takes no time gets a little, so
    that one sees the order.
    """
    last = [name for what, name, _ in events if what == "forward ends"][-1]
    lengths = {"forward begins": 1, "backward begins": 2}
    times = [0.0]
    for what, name, _ in events[:-1]:
        longer = {("forward ends", last): 1, ("gather", "embedding"): 0.4}
        times.append(times[-1] + lengths.get(what, longer.get((what, name), 0.12)))
    return times


def spans_of(events, begins, ends):
    """(name, start, end) of what two kinds of events of the same name enclose, in order."""
    spans, open_since = [], {}
    for (what, name, _), time in zip(events, times_of(events), strict=True):
        if what == begins:
            open_since[name] = time
        elif what == ends and name in open_since:
            spans.append((name, open_since.pop(name), time))
    return spans


def zero3_memory():
    """A step of zero3 on one rank: which weights are whole when, and how much that is."""
    events = record("step6_data_parallel", 2, zero3_in_a_step, FOUR_LAYERS)[0]
    times = times_of(events)
    sizes = {name: size for _, _, held in events for name, size in held.items()}
    layers = sorted(name for name in sizes if name.startswith("layer"))
    rows = [*layers, "head", "norms", "embedding"]
    colours = {name: COLOURS[rows.index(name)] if name in layers else COLOURS[6] for name in rows}
    figure, axes = canvas(11.5, 6.6, 60, 34)
    left, wide, low, high = 8.4, 46 / times[-1], 20.4, 2.4  # high: of one layer's weights

    def at(time):
        return left + time * wide

    # The curve: bytes of whole weights, in units of a layer.
    unit = sizes[layers[0]]
    heights = [low + high * sum(held.values()) / unit for _, _, held in events]
    for layer in range(5):
        y = low + layer * high
        axes.plot([left, at(times[-1])], [y, y], color="#dddddd", lw=0.7, zorder=0)
        axes.text(left - 0.5, y, layer, ha="right", va="center", fontsize=7.5)
    axes.fill_between([at(t) for t in times], low, heights, step="post", color="#dbe8f4")
    axes.step([at(t) for t in times], heights, where="post", color=COLOURS[0], lw=1.6)
    y = low + high * sum(sizes.values()) / unit
    axes.plot([left, at(times[-1])], [y, y], color=EDGE, lw=1, ls=":")
    axes.text(
        left, y + 0.4, "all weights of the model: what zero2 keeps all the time", fontsize=7.5
    )
    axes.text(left - 2.4, low + 2 * high, "whole weights,\nin layers", rotation=90, ha="center",
              va="center", fontsize=8)  # fmt: skip

    y = 16.6
    axes.text(left - 0.5, y + 1, "the rank computes", ha="right", va="center", fontsize=7.5)
    passes = {"forward": spans_of(events, "forward begins", "forward ends")}
    passes["backward"] = spans_of(events, "backward begins", "backward ends")
    turn = passes["forward"][-1][2], passes["backward"][0][1]
    for kind, spans in passes.items():
        for name, start, end in spans:
            size = 6.5 if kind == "forward" else 7.5
            block(axes, at(start), y, (end - start) * wide, 2, colours[name], name, size)
    block(axes, at(turn[0]), y, (turn[1] - turn[0]) * wide, 2, COLOURS[6], "head\nloss", 6)
    axes.text(at(passes["forward"][0][1]), y + 2.3, "forward", fontsize=7.5)
    axes.text(at(turn[1]), y + 2.3, "backward", fontsize=7.5)

    for place, name in enumerate(rows):
        y = 14.2 - place * 1.9
        axes.text(left - 0.5, y + 0.7, name, ha="right", va="center", fontsize=7.5)
        axes.plot([left, at(times[-1])], [y - 0.2, y - 0.2], color="#eeeeee", lw=0.7, zorder=0)
        for other, start, end in spans_of(events, "gather", "drop"):
            if other == name:
                style = {"fc": pale(colours[name]), "ec": EDGE, "lw": 0.7}
                axes.add_patch(Rectangle((at(start), y), (end - start) * wide, 1.4, **style))
        for other, start, end in itertools.chain(*passes.values()):
            if other == name:
                style = {"fc": colours[name], "ec": EDGE, "lw": 0.7}
                axes.add_patch(Rectangle((at(start), y), (end - start) * wide, 1.4, **style))
    y = 14.2 - 1.9 * layers.index(layers[-1])
    axes.text(at(sum(turn) / 2), y + 0.7, "stays", ha="center", va="center", fontsize=7)
    text = (
        "A bar: from the all-gather of these weights to the moment when they are freed. Full "
        "colour: the layer computes. Pale: its weights come, or stay.\n"
        "Recorded in a step of two ranks. The rank's shard, 1/n of all weights, is always there "
        "and is not drawn. A forward pass is drawn as 1, a backward pass as 2."
    )
    axes.text(0.6, 0.1, text, fontsize=7.5)
    return figure
