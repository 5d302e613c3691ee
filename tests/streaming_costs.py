"""What `--streaming` costs: how long steps wait for data, and how fast a place is found.

python tests/streaming_costs.py step3_dataloader

First the default model is trained: on tokens that are all there, on a stream, and on a stream
without a thread that is ahead. Then a file of so many megabytes is dealt out to 64 shards.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from launch import machine, table
from tokenising_costs import ROOT, write_texts

MODES = {"tokens that are there": "", "stream": "--streaming", "stream, not ahead": "--streaming"}


def train(step_dir, mode, steps):
    """Print as JSON what a run took: tokens a second, and ms that a step waited for data."""
    sys.path.insert(0, step_dir)
    import streaming
    import train

    if "not ahead" in mode:
        streaming.AHEAD = 1
    begun = time.perf_counter()
    state = train.setup(train.parse_args(f"--max_tokens {10**7} {MODES[mode]}".split()))
    train.train_step(state)
    first = time.perf_counter() - begun
    for _ in range(20):
        train.train_step(state)
    waited, begun = getattr(state.data, "waited", 0.0), time.perf_counter()
    for _ in range(steps):
        train.train_step(state)
    seconds = time.perf_counter() - begun
    waited = getattr(state.data, "waited", 0.0) - waited
    speed = steps * state.args.tokens_per_step / seconds
    print(json.dumps({"speed": speed, "ms": 1000 * waited / steps, "first": first}), flush=True)
    os._exit(0)


def deal(step_dir, folder):
    """Print as JSON of each kind of file: s to read all shards side by side, s to find a place."""
    sys.path.insert(0, step_dir)
    from virtual_shards import SHARDS, Source

    found = {}
    for path in sorted(Path(folder).glob("deal.*")):
        source = Source(SimpleNamespace(dataset_name=str(path), text_column="text"))
        begun, places = time.perf_counter(), {}
        shards = {shard: source.epoch(shard) for shard in range(SHARDS)}
        while shards:
            for shard, rows in [*shards.items()]:
                if (row := next(rows, None)) is None:
                    del shards[shard]
                else:
                    places[shard] = row[0]
        dealt, begun = time.perf_counter() - begun, time.perf_counter()
        for shard, place in places.items():
            next(source.epoch(shard, place))
        found[path.name] = dealt, time.perf_counter() - begun
    print(json.dumps(found), flush=True)
    os._exit(0)


def write_files(folder, megabytes):
    """One text in documents of 2 kB: as JSON lines, as packed ones and as parquet."""
    import pyarrow
    from pyarrow import parquet

    write_texts(folder, megabytes * 10**6)
    lines = (folder / "small.jsonl").read_bytes()
    (folder / "deal.jsonl").write_bytes(lines)
    (folder / "deal.jsonl.gz").write_bytes(gzip.compress(lines, 6))
    texts = [json.loads(line)["text"] for line in lines.splitlines()]
    parquet.write_table(
        pyarrow.table({"text": texts}), folder / "deal.parquet", row_group_size=1000
    )


def in_a_process(*command):
    command = [sys.executable, __file__, *map(str, command)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", nargs="?", default="step3_dataloader")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="in turns; the median is shown")
    args = parser.parse_args()
    step_dir = str((ROOT / args.step).resolve())
    rounds = [
        {mode: in_a_process("--train", step_dir, mode, args.steps) for mode in MODES}
        for _ in range(args.rounds)
    ]

    def median(mode, field):
        return statistics.median(one[mode][field] for one in rounds)

    print(machine())
    rows = [
        [mode, f"{median(mode, 'speed'):,.0f}", f"{median(mode, 'ms'):.2f}"]
        + [f"{median(mode, 'first'):.1f}"]
        for mode in MODES
    ]
    print(table(["data", "tokens/s", "ms that a step waits", "s to the end of step 1"], rows))
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), args.megabytes)
        found = in_a_process("--deal", step_dir, folder)
    rows = [
        [name.removeprefix("deal"), f"{args.megabytes / dealt:.0f}", f"{1000 * to_place / 64:.1f}"]
        for name, (dealt, to_place) in found.items()
    ]
    print(table(["one file for 64 shards", "MB/s", "ms to a place at its end"], rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    if sys.argv[1:2] == ["--deal"]:
        deal(*sys.argv[2:])
    main()
