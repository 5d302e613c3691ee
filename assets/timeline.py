"""Draw one step of a pipeline's timeline, and print how much of it the ranks were idle.

    torchrun --nproc_per_node 4 step7_pipeline_afab/train.py --pp_size 4 --timeline FILE.json ...
    python assets/timeline.py FILE.json OUT.png [--step N] [--pp_size P]

One row a rank: forward and backward passes with the number of their micro-batch, and waiting.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

COLOURS = {"forward": "#4477aa", "backward": "#ee6677", "wait": "#dddddd"}


def read_ranks(path):
    """The spans of each rank in a trace, in order of time: lists of (name, start, end) in ms."""
    ranks = {}
    for event in json.loads(Path(path).read_text())["traceEvents"]:
        start, length = event["ts"] / 1e3, event["dur"] / 1e3
        ranks.setdefault(event["tid"], []).append((event["name"], start, start + length))
    return [sorted(ranks[rank], key=lambda span: span[1]) for rank in sorted(ranks)]


def steps_of(ranks):
    """Lists of spans, a step each with a row a rank; complete steps only.

    The first stage has gone backward as often as forward at the end of a step and never before, so
    it says how many micro-batches a step has. All ranks pass as many. What comes after the last
    step is an evaluation: forward only.
    """
    ahead, micro_batches = 0, 0
    for name, _, _ in ranks[0]:
        micro_batches += name == "forward"
        ahead += (name == "forward") - (name == "backward")
        if name == "backward" and ahead == 0:
            break
    else:
        raise SystemExit("error: no complete step in the trace; train for one step at least")
    steps = []
    for spans in ranks:
        done, current, rows = 0, [], []
        for span in spans:
            current.append(span)
            done += span[0] == "backward"
            if span[0] == "backward" and done % micro_batches == 0:
                rows.append(current)
                current = []
        steps.append(rows)
    return micro_batches, list(zip(*steps, strict=True))


def passes_of(rows):
    """(start, end) of all passes of a step, whichever rank had them."""
    return [span[1:] for spans in rows for span in spans if span[0] != "wait"]


def idle_share(rows):
    """The share of a step, from its first pass to its last, in which ranks computed nothing."""
    starts, ends = zip(*passes_of(rows), strict=True)
    return 1 - (sum(ends) - sum(starts)) / ((max(ends) - min(starts)) * len(rows))


def draw(rows, title):
    """A figure of one step."""
    begun = min(start for start, _ in passes_of(rows))
    figure, axes = plt.subplots(figsize=(11, 0.55 * len(rows) + 1.1))
    for rank, spans in enumerate(rows):
        count = dict.fromkeys(COLOURS, 0)
        for name, start, end in spans:
            bar = axes.barh(
                rank, end - start, 0.8, start - begun, color=COLOURS[name], ec="white", lw=0.5
            )
            if name != "wait":
                axes.bar_label(bar, [count[name]], label_type="center", fontsize=7, color="white")
            count[name] += 1
    axes.set_yticks(range(len(rows)), [f"rank {rank}" for rank in range(len(rows))], fontsize=8)
    axes.set_xlim(0, max(spans[-1][2] for spans in rows) - begun)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("ms", fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(
        handles=[Patch(color=colour, label=name) for name, colour in COLOURS.items()],
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False,
    )  # fmt: skip
    axes.set_title(title, fontsize=8, loc="left")
    figure.tight_layout()
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trace", type=Path, help="what --timeline wrote")
    parser.add_argument("output", type=Path, help="the picture")
    parser.add_argument("--step", type=int, help="counted from 1; default: the last complete one")
    parser.add_argument("--pp_size", type=int, help="stages; default: as many as ranks")
    parser.add_argument("--machine", default="", help="what to say of it in the title")
    options = parser.parse_args()

    ranks = read_ranks(options.trace)
    micro_batches, steps = steps_of(ranks)
    step, stages = options.step or len(steps), options.pp_size or len(ranks)
    if not 0 < step <= len(steps):
        parser.error(f"--step {step}: the trace has the steps 1 to {len(steps)}")
    idle = idle_share(steps[step - 1])
    bubble = (stages - 1) / (micro_batches + stages - 1)
    text = f"idle {idle:.1%}; (p - 1) / (m + p - 1) = {bubble:.1%}"
    print(f"step {step}, {stages} stages, {micro_batches} micro-batches: {text}")
    title = f"step {step}: {text}" + f"; {options.machine}" * bool(options.machine)
    draw(steps[step - 1], title).savefig(options.output, dpi=130)


if __name__ == "__main__":
    main()
