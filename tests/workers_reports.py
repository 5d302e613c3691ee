"""What the tests of the reports run: traces, histories of memory, the place of a NaN."""

import contextlib
import json
import pickle
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from workers_setup import build


def trace_of(argv, count):
    """Train so many steps; what this rank's trace holds, beside what the ledger counted.

    Returns the names of the steps in order; {(category, name): events}; {name of a collective:
    calls} in the traced steps; and the arguments of the first event of NCCL, {} without one.
    """
    import ledger
    import train

    state = build(argv)
    trace, counted = state.args.trace, Counter()
    for number in range(1, count + 1):
        with ledger.recorded() as entries:
            train.train_step(state)
        if trace.first <= number <= trace.last:
            counted.update({f"{kind} {axis}": n for (axis, kind), (n, _) in entries.items()})
    trace.close()
    events = json.loads(trace.path.read_text())["traceEvents"]
    spans = sorted((e for e in events if e["ph"] == "X"), key=lambda event: event["ts"])
    named = [event["name"] for event in spans if event["cat"] == "user_annotation"]
    steps = [name for name in named if name.startswith("ProfilerStep")]
    messages = [e["args"] for e in spans if e["cat"] == "kernel" and "nccl" in e["name"]]
    kinds = Counter((event["cat"], event["name"]) for event in spans)
    return steps, kinds, counted, (messages or [{}])[0]


def graphs_of(argv):
    """(graphs, graph breaks) of dynamo after each of four steps."""
    from torch._dynamo.utils import counters

    import train

    torch._dynamo.reset()
    counters.clear()
    state, found = build(argv), []
    for _ in range(4):
        train.train_step(state)
        breaks = sum(counters["graph_break"].values())
        found.append((counters["stats"]["unique_graphs"], breaks))
    return found


def planted_nan(argv, layer):
    """What a rank says of a NaN that arises in the backward pass of one of its layers."""
    import train
    from errors import UserError

    state = build(argv)
    mlp = state.model.model.layers[layer].mlp
    right = mlp.forward
    # The derivative of a root at 0 is infinite, and 0 times that is no number.
    with patch.object(mlp, "forward", lambda x: right(x) + 0 * (x - x).sqrt()):
        try:
            train.train_step(state)
        except UserError as error:
            return str(error)
    return "nothing"


def memory_of(argv, folder, dies):
    """Two steps under --memory_snapshot, then perhaps more memory than there is: the snapshot.

    Returns the number of segments, the actions, and the functions of our own in the stacks.
    """
    import profiling
    import train

    def main(args):
        state = train.setup(args)
        for _ in range(2):
            train.train_step(state)
        if dies:
            torch.empty(2**50, device="cuda")

    args = train.parse_args(argv.split())
    with contextlib.suppress(torch.OutOfMemoryError):
        profiling.reported(main)(args)
    torch.cuda.memory._record_memory_history(None)  # the next test runs in this process
    (file,) = Path(folder).glob(f"rank{profiling.RANK}.pickle")
    snapshot = pickle.loads(file.read_bytes())
    entries = [entry for device in snapshot["device_traces"] for entry in device]
    here = str(Path(train.__file__).parent)
    stacks = [frame for entry in entries for frame in entry.get("frames", [])]
    functions = {frame["name"] for frame in stacks if frame["filename"].startswith(here)}
    return len(snapshot["segments"]), {entry["action"] for entry in entries}, functions
