"""Where the time of a step goes on GPUs: kernels by kind, communication that nothing hides, idling.

    torchrun --nproc_per_node 2 tests/kernel_times.py step6_data_parallel --dp_size 2 \
        --model_name smollm-1.7b --dataset_name random --compile --max_tokens 100000 \
        -- --dp_engine naive -- --dp_engine bucket

Trains as the step's `train.py` does with these flags, then one step more under PyTorch's profiler,
and prints a table: of every rank the milliseconds of that step, and the most memory that PyTorch
reserved. Flags after a `--` are of one run, which may have none; those before the first `--` of
all. Before the step's name, `--top 20` adds the kernels that took longest on the first rank.

    python tests/kernel_times.py --rank 1 step9_4d --pp_size 4 --gradient_accumulation_steps 16

With `--rank` there is only this rank of the layout, on one GPU, and a message is a copy at most:
what is left is what the rank computes, and the memory that it needs. Tokens/s are then those of a
layout in which nobody waits and every rank has as much to do.
"""

import argparse
import collections
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from launch import machine, ranks_of, table
from one_rank import one_rank

ROOT = Path(__file__).parents[1]
# The first kind whose words are in a kernel's name.
KINDS = {
    "communication": ("nccl",),
    "attention": ("fmha", "flash", "sdpa", "cudnn::fusion"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "optimizer": ("multi_tensor", "adam"),
    "compiled": ("triton",),
    "other": ("",),
}


def kind_of(kernel):
    name = kernel["name"].lower()
    return next(kind for kind, words in KINDS.items() if any(word in name for word in words))


def covered(kernels):
    """The time in which at least one of some kernels runs."""
    total, until = 0, 0
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        start, end = kernel["ts"], kernel["ts"] + kernel["dur"]
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def profiled(step):
    """The kernels that a call of `step` runs on this GPU, as the events of a Chrome trace."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def times(kernels):
    """Milliseconds by kind, of communication while nothing else runs, and without any kernel."""
    found = dict.fromkeys(KINDS, 0)
    for kernel in kernels:
        found[kind_of(kernel)] += kernel["dur"]
    computing = covered([k for k in kernels if kind_of(k) != "communication"])
    begin = min(kernel["ts"] for kernel in kernels)
    span = max(kernel["ts"] + kernel["dur"] for kernel in kernels) - begin
    found["of it alone"] = covered(kernels) - computing
    found["idle"] = span - covered(kernels)
    return {"in all": span / 1e3} | {name: number / 1e3 for name, number in found.items()}


def reserved_gib():
    """The most memory that PyTorch has reserved on this GPU."""
    return torch.cuda.max_memory_reserved() / 2**30


def measured(state, train, rank=None):
    """Train; (median seconds of a step, {rank: its figures}, this rank's kernels).

    rank: the only one that is there, or None.
    """
    seconds = []
    for _ in range(state.args.total_steps):
        begun = time.perf_counter()
        train.train_step(state)  # at its end the device has finished, too
        seconds.append(time.perf_counter() - begun)
    kernels = profiled(lambda: train.train_step(state))
    own = times(kernels) | {"GiB reserved": reserved_gib()}
    found = {rank: own}
    if rank is None:
        ranks = [None] * state.mesh.world.size
        torch.distributed.all_gather_object(ranks, own)
        found = dict(enumerate(ranks))
    return statistics.median(seconds[len(seconds) // 3 :]), found, kernels  # the first ones compile


def free(state):
    """Give back the memory of a run that has ended: hooks of its engine still hold its weights."""
    for parameter in (*state.model.parameters(), *state.parameters):
        for tensor in (parameter.data, parameter.grad):
            if tensor is not None:
                tensor.untyped_storage().resize_(0)
        parameter.grad = None
    state.optimizer.state.clear()
    torch.compiler.reset()
    gc.collect()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def longest(kernels, count):
    """Lines about the kernels that took longest in all."""
    taken, calls = collections.Counter(), collections.Counter()
    for kernel in kernels:
        taken[kernel["name"]] += kernel["dur"] / 1e3
        calls[kernel["name"]] += 1
    most = taken.most_common(count)
    return [f"{ms:9.2f} ms {calls[name]:6d} x  {name[:110]}" for name, ms in most]


def split(argv):
    """The flags of all runs, then those of each; a run may have none of its own."""
    ends = [i for i, word in enumerate(argv) if word == "--"]
    starts = [0, *(i + 1 for i in ends)]
    return [argv[start:end] for start, end in zip(starts, [*ends, None], strict=True)]


def parse(argv):
    """(what is common to all runs, the flags of each run)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top", type=int, default=0, help="so many kernels that took longest")
    parser.add_argument("--rank", type=int, help="only this one of the layout, on one GPU")
    parser.add_argument("step", help="directory of a step, from the second on")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of its train.py")
    common, *runs = split(argv)
    return parser.parse_args(common), runs or [[]]


def report(options, runs):
    """Train each run on the device that its flags name, and print the table."""
    sys.path.insert(0, str(ROOT / options.step))
    import process_group as pg
    import train

    rows, more = [], []
    for run in runs:
        flags = options.flags + run
        with contextlib.ExitStack() as stack:
            if options.rank is not None:
                size = ranks_of(" ".join(flags))
                if not 0 <= options.rank < size:
                    sys.exit(f"error: --rank {options.rank}: {' '.join(flags)} has {size} ranks")
                stack.enter_context(one_rank(options.rank, size))
            state = train.setup(train.parse_args(flags))
            seconds, ranks, kernels = measured(state, train, options.rank)
            speed = state.args.tokens_per_step / seconds / state.mesh.world.size
            for rank, found in ranks.items():
                cells = [f"`{' '.join(run)}`", f"{speed:,.0f}", f"{seconds * 1e3:.1f}", rank]
                rows.append([*cells, *(f"{number:.1f}" for number in found.values())])
            more += [" ".join(run), *longest(kernels, options.top)] if options.top else []
            reports = state.mesh.rank in (0, options.rank)
            # The next run finds the memory free, and the processes in touch.
            free(state)
            if options.rank is None:
                pg.init_processes = lambda device_type, device=state.device: device
            del state
    if reports:
        print(f"{machine()}\n{options.step} {' '.join(options.flags)}\n")
        print(table(["run", "tokens/s and GPU", "ms a step", "rank", *found], rows))
        print("\n".join(more))
    if options.rank is None:
        pg.finish()


def main():
    options, runs = parse(sys.argv[1:])
    if not torch.cuda.is_available():
        sys.exit("error: the kernels are those of a GPU, and this machine has no CUDA device")
    report(options, runs)


if __name__ == "__main__":
    main()
