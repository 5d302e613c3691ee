"""Run each schedule of a pipeline with --timeline, and keep one step of it for the book.

    python assets/pipeline_runs.py --ranks 2 4
    python assets/pipeline_runs.py --ranks 4 --flags "--model_name smollm-1.7b --seq_len 2048 ..."

Writes assets/timeline_ENGINE_RANKS_MACHINE.json: the fastest step but the first, as programs that
run beside it only make it longer. The widget of pipelines draws every such file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import timeline

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
import launch  # noqa: E402

# The sizes of step 7's COSTS.md, for a few steps more.
FLAGS = (
    "--hidden_size 256 --intermediate_size 768 --micro_batch_size 4 "
    "--gradient_accumulation_steps 8 --max_tokens 32768 --dataset_name random"
)
ENGINES = {
    "afab": ("step8_pipeline_1f1b", 1),
    "1f1b": ("step8_pipeline_1f1b", 1),
    "interleaved": ("step9_4d", 2),
}


def fastest_step(path):
    """(forward passes, rows) of a trace: for each rank (F or B, start, end) in order, in ms."""
    forward, steps = timeline.steps_of(timeline.read_ranks(path))
    passes = [
        [[(name[0].upper(), *times) for name, *times in spans if name != "wait"] for spans in rows]
        for rows in steps[1:]
    ]

    def length(rows):
        times = [time for row in rows for _, *both in row for time in both]
        return max(times) - min(times)

    return forward, min(passes, key=length)


def record(engine, ranks, flags):
    """One run, as the widget reads it."""
    step, chunks = ENGINES[engine]
    argv = f"--pp_size {ranks} --pp_engine {engine} {flags}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.json"
        done = launch.launch(ROOT / step, f"{argv} --timeline {path}", through=())
        if done.code:
            sys.exit("".join(done.errors))
        forward, rows = fastest_step(path)
    begun = min(start for row in rows for _, start, _ in row)
    machine, date = launch.machine().rsplit(", ", 1)
    return {
        "command": f"torchrun --nproc_per_node {ranks} {step}/train.py {argv} --timeline FILE",
        "machine": machine,
        "date": date,
        "on": machine.split(" of ")[0].split(",")[0],
        "engine": engine,
        "ranks": ranks,
        "micro_batches": forward // chunks,
        "chunks": chunks,
        "rows": [
            [[kind, round(start - begun, 2), round(end - begun, 2)] for kind, start, end in row]
            for row in rows
        ],
    }


def main():
    parser = argparse.ArgumentParser(description="Record timelines for the book; see the file.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=[*ENGINES])
    parser.add_argument("--flags", default=FLAGS, help="the other flags of the runs")
    args = parser.parse_args()
    for ranks in args.ranks:
        for engine in args.engines:
            run = record(engine, ranks, args.flags)
            where = run["on"].replace(" ", "")
            path = ROOT / "assets" / f"timeline_{engine}_{ranks}ranks_{where}.json"
            path.write_text(json.dumps(run) + "\n")
            print(path)


if __name__ == "__main__":
    main()
