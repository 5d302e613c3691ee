"""Context parallelism, step 5: the zigzag and the ring."""

from drawing import COLOURS, EDGE, arrow, box, canvas, cells, pale
from matplotlib.patches import Polygon, Rectangle
from recorded import backward_round_the_ring, record


def ring():
    """Who attends to what, contiguous beside zigzag, and the keys and values on their way."""
    figure, axes = canvas(11, 5.6, 44, 22)
    ranks, size = 4, 1.35
    square = size * 2 * ranks
    for x, title, owner in (
        (2.2, "contiguous: rank r has chunks 2r and 2r + 1", lambda chunk: chunk // 2),
        (17.2, "zigzag: rank r has chunks r and 7 - r", lambda chunk: min(chunk, 7 - chunk)),
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
        axes.text(x - 1.5, 14, "chunks of queries", rotation=90, va="center", fontsize=8)
        axes.text(x + square - 0.2, 18.3, "chunks of keys", ha="right", fontsize=8)
        for rank, count in counts.items():
            y = 6.6 - 1.35 * rank
            bar = Rectangle((x, y), count * 0.34, 0.95, fc=COLOURS[rank], alpha=0.85)
            axes.add_patch(bar)
            label = f"rank {rank}: {count:g} squares of work"
            axes.text(x + count * 0.34 + 0.3, y + 0.45, label, va="center", fontsize=7.5)
    axes.text(37.2, 20.9, "forward: which block is where", ha="center", fontsize=9)
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
        "kv 1: the keys and values of rank 1.\n"
        "A rank sends a block on while it computes\n"
        "with it. n ranks: n steps, n - 1 messages."
    )
    axes.text(37.2, 4.2, text, ha="center", va="center", fontsize=7.5)
    return figure


def ring_grid(axes, left, ranks, steps, title):
    """Names of ranks above, of steps at the side; a function from (step, rank) to a corner."""
    axes.text(left + ranks * 2.1, 26.6, title, ha="center", fontsize=9.5, weight="bold")
    for rank in range(ranks):
        axes.text(left + 1.7 + rank * 4.2, 24.9, f"rank {rank}", ha="center", fontsize=8.5)
    for step in range(steps):
        axes.text(left - 0.6, 22.7 - step * 5.6, f"step {step}", ha="right", fontsize=8.5)
    return lambda step, rank: (left + rank * 4.2, 22.0 - step * 5.6)


def down(axes, start, end, colour):
    """An arrow from the box with one corner to the box below with another."""
    bend = 0.0 if abs(end[0] - start[0]) < 5 else 0.06 if end[0] < start[0] else -0.06
    arrow(axes, (start[0] + 1.7, start[1] - 0.1), (end[0] + 1.7, end[1] + 2.3), colour, bend)


def ring_backward():
    """Backward on four ranks: the blocks turn the other way, and gradients go straight home."""
    ranks = record("step5_context_parallel", 4, backward_round_the_ring)
    count = len(ranks)
    figure, axes = canvas(12, 7.6, 45, 29)
    axes.set_ylim(-1.4, 28)
    blocks = ring_grid(axes, 3.4, count, count, "Blocks: the ring turns the other way")
    shares = ring_grid(axes, 26.6, count, count, "Gradients: each share goes straight home")
    for rank, steps in enumerate(ranks):
        for step, does in enumerate(steps):
            colour = COLOURS[does["block"]]
            box(axes, *blocks(step, rank), 3.4, 2.1, f"kv {does['block']}", colour, 8.5, "bold")
            if does["block_to"] is not None:
                down(axes, blocks(step, rank), blocks(step + 1, does["block_to"]), EDGE)
            keys = "all keys" if does["keys"] == 4 else "early half"
            text = f"of kv {does['block']}\n{keys}"
            if does["gradients_to"] is None:
                text = f"of kv {does['block']}\nits own"
            else:
                down(axes, shares(step, rank), shares(step + 1, does["gradients_to"]), colour)
            box(axes, *shares(step, rank), 3.4, 2.1, text, pale(colour), 7.5)
    text = (
        "kv 1: the keys and values of rank 1. Step 0 begins with the block\n"
        "that came last in the forward pass, because it is still there. A rank\n"
        "sends a block on while it computes with it. Its own block is the last,\n"
        "and needs no message. n ranks: n steps, n - 2 messages from each."
    )
    axes.text(3.4, 1.4, text, fontsize=8, va="center", linespacing=1.3)
    text = (
        "A box: the share of a block's gradients that a rank computes in this\n"
        "step, for the keys to which its queries attend: all, or the early half.\n"
        "The share goes to the rank that owns the block, while the next step is\n"
        "computed. In the last step each rank adds its own share to the sum."
    )
    axes.text(26.6, 1.4, text, fontsize=8, va="center", linespacing=1.3)
    return figure
