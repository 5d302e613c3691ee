"""The nine steps, and what the first three have: a layer, the ranks, the data."""

from drawing import COLOURS, arrow, block, box, canvas, cells, pale
from figures_pipeline import most_alive, passes
from matplotlib.patches import Rectangle


def rank_of_a_step(axes, x, y, name, model, data):
    """What one rank holds: above its part of the model, below its part of the data."""
    box(axes, x, y, 6.4, 10.4, colour="white")
    axes.text(x + 3.2, y + 9.3, name, ha="center", fontsize=7.5)
    for low, high, owners, across, down in (
        (4.9, 3.9, model, "width", "layers"),
        (1.0, 2.5, data, "sequence", "batch"),
    ):
        cells(axes, x + 1.7, y + low, 3.9, high, owners)
        axes.text(x + 1.2, y + low + high / 2, down, rotation=90, ha="center", va="center", size=6)
        axes.text(x + 3.65, y + low - 0.75, across, ha="center", fontsize=6)


def small_schedule(axes, x, y, ahead):
    """Two stages and four micro-batches: the layers of each, its passes, and what is alive."""
    count, wide = 4, 0.72
    axes.text(x + 2.4, y + 9.3, "its layers", ha="center", fontsize=6.5)
    axes.text(x + 4.6, y + 9.3, "its passes; time goes right", fontsize=6.5)
    axes.text(x + 16.0, y + 9.3, "alive at most", fontsize=6.5)
    for stage, row in enumerate(passes(ahead, count)):
        low = y + 5.2 - stage * 4.2
        axes.text(x + 0.5, low + 1.7, f"rank {stage}", rotation=90, va="center", fontsize=7)
        layers = [[stage if part == stage else None] for part in (0, 1)]
        cells(axes, x + 1.3, low, 2.2, 3.4, layers)
        for place in range(3 * (count + 1)):
            block(axes, x + 4.6 + place * wide, low, wide, 3.4, "#e8e8e8")
        for kind, micro, start in row:
            size = wide if kind == "forward" else 2 * wide
            colour = pale(COLOURS[stage]) if kind == "forward" else COLOURS[stage]
            block(axes, x + 4.6 + start * wide, low, size, 3.4, colour, micro, 7)
        for one in range(most_alive(row)):
            block(axes, x + 16.0 + one * 1.15, low + 1.0, 1.1, 1.4, COLOURS[stage])
    text = "pale: forward, full: backward; a number is a micro-batch"
    axes.text(x + 10.6, y + 0.0, text, ha="center", fontsize=6.5)


def real_batches(axes, x, y):
    """Windows of text, shuffled, and the micro-batches of two steps."""
    steps = [2, 7]  # a colour for each
    axes.text(x + 3.2, y + 9.3, "windows of text", ha="center", fontsize=6.5)
    for place, step in enumerate((0, 1, 1, 0, 1, 0, 0, 1)):
        corner = (x + 0.7 + place % 2 * 2.6, y + 6.9 - place // 2 * 1.9)
        block(axes, *corner, 2.4, 1.4, COLOURS[steps[step]])
    arrow(axes, (x + 6.0, y + 4.7), (x + 7.1, y + 4.7))
    for step, colour in enumerate(steps):
        left = x + 7.4 + step * 3.2
        axes.text(left + 1.35, y + 9.3, f"step {step}", ha="center", fontsize=6.5)
        for row in range(4):
            block(axes, left, y + 6.3 - row * 1.4 - row // 2 * 1.5, 2.7, 1.2, COLOURS[colour])
    for micro in range(2):
        text = f"micro-batch {micro}"
        axes.text(x + 10.35, y + 7.8 - micro * 4.3, text, ha="center", fontsize=6)
    rank_of_a_step(axes, x + 14.3, y, "every rank", [[0]], [[2], [2], [2], [2]])


def nine_steps():
    """What each step adds, and which rank then holds which part of the model and of the data."""
    whole = [[0]], [[1]]
    split = {
        4: (([[0, None]], [[None, 1]]), whole),
        5: (whole, ([[0, None, None, 0]], [[None, 1, 1, None]])),
        6: (whole, ([[0], [None]], [[None], [1]])),
    }
    cards = [
        ("1  the model", "a Llama that trains on one device,", "on one batch that never changes"),
        (
            "2  processes",
            "several ranks that all do the same,",
            "and groups in which they talk",
        ),
        ("3  the data", "real text: another batch in each step,", "cut into micro-batches"),
        ("4  tensor parallelism", "each rank has a part", "of every matrix"),
        ("5  context parallelism", "each rank has a part", "of every sequence"),
        ("6  data parallelism", "each rank has other", "sequences of the batch"),
        (
            "7  pipeline, AFAB",
            "each rank has some of the layers;",
            "all forward, then backward",
        ),
        ("8  pipeline, 1F1B", "another order: backward as soon as", "possible, so fewer are alive"),
        (
            "9  four dimensions",
            "all four splits, on 16 ranks; each has",
            "a part of the model and of the data",
        ),
    ]
    figure, axes = canvas(11, 8.9, 66, 53.4)
    for index, (name, *added) in enumerate(cards):
        step, x, y = index + 1, index % 3 * 22 + 0.3, 36.7 - index // 3 * 17.2
        box(axes, x, y, 21.2, 16.2, colour="#f7f7f7")
        axes.text(x + 0.8, y + 14.6, name, fontsize=10, weight="bold")
        axes.text(x + 0.8, y + 12.8, "\n".join(added), fontsize=7.5, va="center", linespacing=1.25)
        low = y + 0.8
        if step == 1:
            rank_of_a_step(axes, x + 7.4, low, "one device", *[[[0]], [[6]]])
        elif step == 2:
            for rank in range(2):
                rank_of_a_step(axes, x + 3 + rank * 8.8, low, f"rank {rank}", whole[rank], [[6]])
            axes.text(x + 10.6, low + 5, "=", ha="center", va="center", fontsize=15)
        elif step == 3:
            real_batches(axes, x, low)
        elif step in split:
            for rank in range(2):
                place = (x + 3 + rank * 8.8, low, f"rank {rank}")
                rank_of_a_step(axes, *place, *(part[rank] for part in split[step]))
        elif step < 9:
            small_schedule(axes, x, low, [4, 4] if step == 7 else [1, 0])
        else:
            cells(axes, x + 2.6, low + 1.6, 6.6, 7, [[0, 1], [2, 3]])
            cells(axes, x + 12.4, low + 1.6, 6.6, 7, [[4, 5, 5, 4], [6, 7, 7, 6]])
            axes.text(x + 5.9, low + 9.2, "model, 4 parts", ha="center", fontsize=7)
            axes.text(x + 15.7, low + 9.2, "data, 4 parts", ha="center", fontsize=7)
            axes.text(x + 10.3, low + 5.1, "×", ha="center", va="center", fontsize=13)
            for left, across, down in ((2.6, "width", "layers"), (12.4, "sequence", "batch")):
                axes.text(x + left + 3.3, low + 0.7, across, ha="center", fontsize=6)
                axes.text(x + left - 0.6, low + 5.1, down, rotation=90, va="center", ha="center",
                          fontsize=6)  # fmt: skip
    text = (
        "Blue: what rank 0 has. Red: what rank 1 has. White: what it has not. Grey: one batch for "
        "all steps. Step 9: a colour for each part."
    )
    axes.text(33, 0.6, text, ha="center", fontsize=8)
    return figure


def one_layer():
    """The shapes inside a decoder layer."""
    figure, axes = canvas(9.5, 4.2, 38, 17)
    attention = [
        ("input_layernorm", "[b, s, h]"),
        ("q, k, v proj", "q [b, s, heads, head_dim]\nk, v [b, s, kv_heads, head_dim]"),
        ("rotary (q, k)", "the same shapes"),
        ("causal attention", "[b, s, heads, head_dim]"),
        ("o_proj", "[b, s, h]"),
    ]
    mlp = [
        ("post_attention_\nlayernorm", "[b, s, h]"),
        ("gate, up proj", "2 × [b, s, f]"),
        ("silu(gate) * up", "[b, s, f]"),
        ("down_proj", "[b, s, h]"),
    ]
    for y, parts, colour in ((11, attention, "#dbe8f4"), (3.2, mlp, "#f7dfe2")):
        axes.plot([0.5, 37.5], [y + 4.6, y + 4.6], color="#228833", lw=3, zorder=0)
        width = 5.6
        for index, (name, shape) in enumerate(parts):
            x = 2 + index * 7
            box(axes, x, y, width, 2.4, name, colour, 8)
            style = {"ha": "center", "va": "top", "fontsize": 6.5, "color": "#555555"}
            axes.text(x + width / 2, y - 0.4, shape, **style)
            if index:
                arrow(axes, (x - 1.4, y + 1.2), (x, y + 1.2))
        arrow(axes, (1, y + 4.5), (2, y + 1.6), bend=0.2)
        end = 2 + (len(parts) - 1) * 7 + width
        arrow(axes, (end, y + 1.2), (end + 1.4, y + 4.4), bend=0.3)
        axes.text(end + 1.5, y + 4.6, "+", fontsize=13, ha="center", va="center", weight="bold")
    axes.text(19, 16.2, "residual stream [b, s, h]", ha="center", fontsize=8)
    axes.text(12, 8.3, "the stream goes on, with what attention has added", fontsize=8)
    axes.text(37.5, 8.3, "to the next layer", ha="right", fontsize=8)
    text = "b sequences · s tokens in each · h hidden_size · f intermediate_size"
    axes.text(19, 0.3, text, ha="center", fontsize=7.5)
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
            axes.text(x + dp * 4.7 + 1.9, 10.3, f"dp {dp}", ha="center", fontsize=8)
            for tp in range(2):
                axes.text(x + dp * 4.7 + tp * 2 + 0.85, 9.5, f"tp {tp}", ha="center", fontsize=6)
        if not panel:
            axes.text(0.1, 7.9, "cp 0", rotation=90, fontsize=6.5, va="center")
            axes.text(0.1, 4.5, "cp 1", rotation=90, fontsize=6.5, va="center")
    text = "8 ranks = dp 2 × cp 2 × tp 2. In each panel, ranks of one colour form one group."
    axes.text(20, 1.3, text, ha="center", fontsize=9)
    return figure


def packing():
    """From documents to the micro-batches of a step."""
    figure, axes = canvas(10, 4.6, 40, 19)
    lengths, x = [7, 4, 10, 5, 8], 1.0
    for index, length in enumerate(lengths):
        cells(axes, x, 16, length, 1.4, [[6]])
        axes.text(x + length / 2, 16.7, f"document {index}", ha="center", va="center", fontsize=7)
        x += length
        axes.add_patch(Rectangle((x, 16), 0.6, 1.4, fc="black"))
        x += 0.6
    text = "one long array of tokens: all documents, with an end token (black) after each"
    axes.text(0.9, 17.8, text, fontsize=8)
    count, size = 9, 4.0
    for index in range(count):
        box(axes, 1 + index * size, 12.6, size - 0.25, 1.3, f"window {index}", "#eeeeee", 7)
    axes.add_patch(
        Rectangle((1 + (count - 1) * size, 12.6), size - 0.25, 1.3, fc="#ccbb44", alpha=0.7)
    )
    axes.text(1 + 8.5 * size - 0.1, 11.8, "held out", ha="center", fontsize=7.5)
    text = (
        "windows of s + 1 tokens; neighbours share one token; the last 1/64 of all windows is "
        "held out"
    )
    axes.text(0.9, 14.4, text, fontsize=8)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    for place, window in enumerate(order):
        colour = COLOURS[place // 4]
        box(axes, 1 + place * size, 8.6, size - 0.25, 1.3, f"window {window}", colour, 7)
        arrow(axes, (1 + window * size + 1.9, 12.5), (1 + place * size + 1.9, 10), "#999999")
    axes.text(
        33.4, 9.1, "in another order:\nthe seed and the\nepoch decide it", fontsize=7.5, va="center"
    )
    for step in range(2):
        for micro in range(2):
            x = 1 + step * 16 + micro * 8
            rows = order[step * 4 + micro * 2 : step * 4 + micro * 2 + 2]
            for row, window in enumerate(rows):
                box(axes, x, 4.5 - row * 1.5, 7.4, 1.2, f"window {window}", COLOURS[step], 7)
            label = f"step {step}, micro-batch {micro}"
            axes.text(x + 3.7, 6.2, label, ha="center", fontsize=7.5)
    text = (
        "Another split of the batch (4 micro-batches of 1 window, 1 of 4, or more ranks): "
        "each step still has the same four windows."
    )
    axes.text(1, 1.2, text, fontsize=8)
    return figure
