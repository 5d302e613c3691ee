"""The sanity check of every step: all layouts train the same model, step by step.

    python tests/convergence.py                                   # all runs below, float64
    python tests/convergence.py --dtype float32 --figure assets/convergence.png
    python tests/convergence.py "step4_tensor_parallel --tp_size 2 --micro_batch_size 8"
    python tests/convergence.py --all-layouts                     # of all axes, gradients included
    python tests/convergence.py --tinyllama --dtype bfloat16      # 1.1 billion parameters, on GPUs

Each RUN is a step's directory and flags of its layout. Every run is launched as a reader would,
trains on the same global batch, and is compared with the first step's worth of code that reads
data, `step3_dataloader` in one process. Prints a table; exits with 1 outside the bounds.

With --tinyllama the model has TinyLlama's shape and a step 32 sequences of 1,024 tokens, on layouts
for the GPUs that are here, or with --share_gpus for more than there are: ranks share them, which
changes only the speed. In bfloat16 there is no bound: the table says how far rounding goes.

With --all-layouts the last step is trained for two updates in float64 on every layout that
`layouts.everything` lists, and its losses, norms, gradients and weights are compared with those of
one process.
"""

import argparse
import contextlib
import json
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from harness import Run, World, differences, run_steps
from launch import Saved, flag, launch, machine, ranks_of, sequences_of, table
from layouts import AXES, everything, flags_of
from tqdm import tqdm

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BASELINE = "step3_dataloader"
# dtype: steps, learning rate, bounds of |difference of loss| and of |relative difference of
# gradient norm|; in float64 the loss's bound is relative too. In float32 the learning rate is one
# at which training is stable: where the gradient norm spikes, as at 1e-3 here, rounding grows
# tenfold every twenty steps, and no two orders of addition stay together.
BOUNDS = {
    "float64": (20, 3e-3, 1e-10, 1e-10),
    "float32": (200, 3e-4, 5e-5, 1e-4),
    "bfloat16": (125, 3e-4, math.inf, math.inf),
}
SPLITS = [
    f"{BASELINE} --micro_batch_size {8 // count} --gradient_accumulation_steps {count}"
    for count in (2, 4, 8)
]
LAYOUTS = [
    "step4_tensor_parallel --tp_size 2 --micro_batch_size 8",
    "step4_tensor_parallel --tp_size 4 --sequence_parallel --micro_batch_size 8",
    "step5_context_parallel --cp_size 2 --micro_batch_size 8",
    "step5_context_parallel --cp_size 4 --micro_batch_size 8",
    "step6_data_parallel --dp_size 2 --micro_batch_size 4",
    *(
        f"step6_data_parallel --dp_size 4 --dp_engine {engine} --micro_batch_size 1 "
        "--gradient_accumulation_steps 2"
        for engine in ("naive", "bucket", "zero1", "zero2", "zero3")
    ),
    "step6_data_parallel --tp_size 2 --cp_size 2 --dp_size 2 --micro_batch_size 4",
    "step7_pipeline_afab --pp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 4",
    "step8_pipeline_1f1b --pp_size 4 --micro_batch_size 2 --gradient_accumulation_steps 4",
    "step9_4d --pp_size 2 --pp_engine interleaved --micro_batch_size 2 "
    "--gradient_accumulation_steps 4",
    "step9_4d --tp_size 2 --dp_size 2 --pp_size 2 --dp_engine zero1 --micro_batch_size 2 "
    "--gradient_accumulation_steps 2",
]
# They stand behind those of COMMON, and of two equal flags the last one counts.
TINYLLAMA = (
    "--model_name tinyllama-1.1b --num_hidden_layers 22 --seq_len 1024 --tokenizer_name bytes "
    "--device cuda --compile"
)
KINDS = ("loss", "grad_norm", "gradient", "weight")  # of differences, in the table of all layouts
COMMON = (
    "--num_hidden_layers 4 --seq_len 64 --learning_rate {learning_rate} --warmup_steps 20 "
    "--device {device} --dtype {dtype} --max_tokens {tokens} --dataset_name {data} {flags}"
)


def gpu_runs(count):
    """Layouts for so many GPUs, 32 sequences each: each axis alone, and where they fit, three."""
    ranks = 4 if count >= 4 else 2
    halves = "--gradient_accumulation_steps 2 --micro_batch_size"
    eighths = "--gradient_accumulation_steps 8 --micro_batch_size"
    layouts = [
        f"--tp_size {ranks} --sequence_parallel {halves} 16",
        f"--cp_size {ranks} {halves} 16",
        f"--dp_size {ranks} {halves} {16 // ranks}",
        *(f"--pp_size {ranks} --pp_engine {engine} {eighths} 4" for engine in ("afab", "1f1b")),
    ]
    if count >= 8:
        layouts.append(f"--tp_size 2 --dp_size 2 --pp_size 2 {halves} 8")
        layouts.append(f"--tp_size 2 --cp_size 2 --dp_size 2 {halves} 8")
    elif count >= 4:
        layouts.append(f"--tp_size 2 --pp_size 2 {eighths} 4")
        layouts.append(f"--cp_size 2 --dp_size 2 {halves} 8")
    return [f"step9_4d {layout}" for layout in layouts]


def train(run, common, through=()):
    """Launch one RUN, `through` a script; its list of metrics.

    Exits with the program's own words if it fails.
    """
    step, _, flags = run.partition(" ")
    result = launch(ROOT / step, f"{common} {flags}", ranks_of(flags), through, timeout=3600)
    if result.code:
        words = "\n".join([result.out[-500:], *result.errors])
        sys.exit(f"error: {run} ended with code {result.code}:\n{words}")
    return result.metrics


def check_runs(runs, sequences, flags=""):
    """Exit unless each RUN, behind the flags, names a step and has so many sequences a step."""
    for run in runs:
        if (found := sequences_of(f"{flags} {run}")) != sequences:
            sys.exit(
                f"error: {run}: {found} sequences a step, not {sequences}; let --micro_batch_size, "
                "--gradient_accumulation_steps and --dp_size multiply to that"
            )
        step = run.partition(" ")[0]
        if not step or not (ROOT / step / "train.py").is_file():
            sys.exit(f"error: {run}: no {step}/train.py; name a step's directory first")


class Runs(Saved):
    """The metrics of runs, launched when first asked for."""

    def metrics(self, run, plant=None, gpus=None):
        """gpus: how many there are, if a run of more ranks shall share them."""
        if plant:  # not what it should be, and so not kept
            return train(run, self.of["flags"], (TESTS / "breaks.py", plant))
        if run not in self.runs:
            shares = gpus is not None and ranks_of(run) > gpus
            through = (TESTS / "shared_gpus.py",) if shares else ()
            self.runs[run] = train(run, self.of["flags"], through)
            self.keep()
        return self.runs[run]


def compare(reference, metrics, dtype):
    """Largest differences of loss and gradient norm over the steps, as the bounds count them."""
    assert [m["step"] for m in reference] == [m["step"] for m in metrics], "other steps"
    pairs = list(zip(reference, metrics, strict=True))
    relative = dtype == "float64"
    loss = [abs(a["loss"] - b["loss"]) / (a["loss"] if relative else 1) for a, b in pairs]
    norm = [abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in pairs]
    return np.max(loss), np.max(norm)  # a NaN among them is the largest


def all_layouts():
    """{(tp, cp, dp, pp): [runs, largest differences of loss, norm, gradients, weights]}."""
    step_dir = max(ROOT.glob("step[0-9]_*"))
    found, alone, worlds = {}, {}, {}
    listed = sorted(everything(), key=lambda row: math.prod(row[:4]))

    def run(stack, argv):
        if (size := ranks_of(argv)) not in worlds:
            worlds[size] = stack.enter_context(World(step_dir, size))
        return Run(worlds[size].run(run_steps, argv.split(), 2, timeout=600))

    with contextlib.ExitStack() as stack:
        for row in tqdm(listed, unit="runs", disable=not sys.stderr.isatty()):
            argv, whole = flags_of(row)
            if whole not in alone:
                alone[whole] = run(stack, whole)
            counts = found.setdefault(row[:4], [0, 0.0, 0.0, 0.0, 0.0])
            counts[0] += 1
            for what, one, other in run(stack, argv).compared_with(alone[whole]):
                off = differences(one, other, what)
                assert "initial" not in what or not any(off.values()), f"{argv}: {what}"
                for name, number in off.items():
                    kind = name if name in KINDS else what.split()[-1]
                    if kind in KINDS:
                        place = 1 + KINDS.index(kind)
                        counts[place] = max(counts[place], number)
    return found


def print_all_layouts():
    rows = all_layouts()
    print(f"float64, 2 updates, {machine()}\n")
    headers = [*AXES, "ranks", "runs", *(f"Δ {kind}" for kind in KINDS)]
    cells = [
        [*sizes, math.prod(sizes), count, *(f"{number:.0e}" for number in largest)]
        for sizes, (count, *largest) in rows.items()
    ]
    print(table(headers, cells))
    worst = max(number for _, *largest in rows.values() for number in largest)
    print(
        f"\n{len(rows)} layouts, {sum(row[0] for row in rows.values())} runs, at most {worst:.1e}"
    )
    return worst <= BOUNDS["float64"][2]


def speed(metrics):
    return statistics.median(m["tokens_per_second"] for m in metrics[len(metrics) // 4 :])


def short(run):
    """A RUN as it stands in a figure."""
    return re.sub("_size|--|gradient_|_steps|^step", "", run)


def draw(reference, curves, path, base, title):
    """Overlaid loss curves, and below them their distance from the baseline on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    steps = [m["step"] for m in reference]
    losses = [m["loss"] for m in reference]
    top.plot(steps, losses, "k", linewidth=4, alpha=0.25, label=f"baseline, {short(base)}")
    for name, metrics in curves.items():
        top.plot(steps, [m["loss"] for m in metrics], linewidth=1, label=short(name))
        gaps = [abs(a - b["loss"]) or math.nan for a, b in zip(losses, metrics, strict=True)]
        bottom.plot(steps, gaps, ".", markersize=4)  # where there is none, no point
    top.set_ylabel("loss (nats per byte)")
    top.legend(fontsize=5)
    bottom.set_yscale("log")
    bottom.set_ylabel("|difference of loss| to the baseline")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(title, 110), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(base, reference, others, dtype, where, figure):
    """Compare runs with the one called base: a table, a figure; whether all are within the bounds.

    reference: the metrics of base; others: pairs of a RUN and its metrics.
    """
    *_, loss_bound, norm_bound = BOUNDS[dtype]
    curves, failed = {}, False
    step, _, layout = base.partition(" ")
    rows = [[step, layout, ranks_of(base), "", "", f"{speed(reference):,.0f}", "baseline"]]
    for run, metrics in others:
        curves[run] = metrics
        loss, norm = compare(reference, metrics, dtype)
        good = loss <= loss_bound and norm <= norm_bound
        failed |= not good
        step, _, layout = run.partition(" ")
        row = [step, layout, ranks_of(run), f"{loss:.1e}", f"{norm:.1e}"]
        rows.append([*row, f"{speed(metrics):,.0f}", "ok" if good else "OUTSIDE"])
        print(" ".join([run + ":", *rows[-1][3:]]), file=sys.stderr, flush=True)
        if figure:  # after each run: one that is stopped leaves those before it
            draw(reference, curves, figure, base, f"{dtype}, {where}")
    relative = "relative " if dtype == "float64" else ""
    headers = ["step", "layout", "ranks", f"max {relative}Δ loss", "max relative Δ grad norm"]
    print(table([*headers, "tokens/s", ""], rows))
    print(f"\nbounds: loss {loss_bound:.0e}, gradient norm {norm_bound:.0e}")
    return not failed


def kept_runs(paths):
    """(dtype, flags, machines, {RUN: metrics}) of files that --save wrote.

    Runs of later files get their machine behind the name. Exits if the files do not fit.
    """
    flags, machines, runs = None, [], {}
    for path in paths:
        try:
            kept = json.loads(path.read_text())
            own, where, theirs = kept["flags"], kept["machine"], kept["runs"]
            dtype = re.findall(r"--dtype (\w+)", own)[-1]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            sys.exit(f"error: --kept {path}: {error!r}; name a file that --save wrote")
        if flags not in (None, own):
            sys.exit(f"error: --kept {path}: of other flags than the files before; leave it out")
        behind = f" [{where.split(',')[0]}]" if machines else ""
        named = {run + behind: metrics for run, metrics in theirs.items()}
        if not named or named.keys() & runs.keys():
            sys.exit(f"error: --kept {path}: nothing new in it; leave it out")
        flags, machines, runs = own, [*machines, where], runs | named
    return dtype, flags, " and ".join(machines), runs


def report_kept(options):
    """The same of what files of --save keep, on any machine."""
    dtype, flags, where, runs = kept_runs(options.kept)
    base = options.baseline or next(iter(runs))
    for run in [base, *options.runs]:
        if run not in runs:
            sys.exit(f"error: --kept: no run {run!r}; there is {', '.join(runs)}")
    steps = options.steps or len(runs[base])
    short = [run for run, metrics in runs.items() if len(metrics) < steps]
    others = options.runs or [run for run in runs if run != base and run not in short]
    for run in [base, *others]:
        if run in short:
            sys.exit(f"error: --kept: {run} has only {len(runs[run])} steps; lower --steps {steps}")
    print(f"{dtype}, {steps} steps, {where}\nflags of all runs: {flags}\n")
    if not options.runs and short:
        print(f"left out, as they have fewer steps: {', '.join(short)}\n")
    pairs = ((run, runs[run][:steps]) for run in others)
    return report(base, runs[base][:steps], pairs, dtype, where, options.figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--dtype", choices=BOUNDS, default="float64")
    parser.add_argument(
        "--steps",
        type=int,
        help="default: 20 in float64, 200 in float32, 125 in bfloat16; of --kept, all",
    )
    parser.add_argument("--sequences", type=int, default=8, help="global batch size")
    parser.add_argument("--dataset_name", default="python-stdlib")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flags", default="", help="further flags for every run, in quotes")
    parser.add_argument("--figure", type=Path, help="write the curves to this image")
    parser.add_argument(
        "--tinyllama", action="store_true", help="1.1 billion parameters, 32 sequences, on GPUs"
    )
    parser.add_argument(
        "--share_gpus", type=int, metavar="N", help="as if there were N GPUs: right, and slow"
    )
    parser.add_argument("--all-layouts", action="store_true", help="of all axes, by gradients")
    parser.add_argument(
        "--save", type=Path, help="metrics go to this .json, and what is in it is not run again"
    )
    parser.add_argument(
        "--kept",
        type=Path,
        action="append",
        help="compare what this file of --save has, on any machine; may be given again",
    )
    parser.add_argument("--baseline", metavar="RUN", help="what the others are compared with")
    parser.add_argument("--plant", help="a function of breaks.py, for every run but the baseline")
    options = parser.parse_args()

    if options.steps is not None and options.steps < 1:
        sys.exit(f"error: --steps {options.steps}: choose 1 or more")
    if options.all_layouts:
        sys.exit(0 if print_all_layouts() else 1)
    if options.kept:
        sys.exit(0 if report_kept(options) else 1)
    if options.share_gpus and (options.plant or not options.tinyllama):
        sys.exit("error: --share_gpus is for --tinyllama, and not with --plant; leave one out")
    base, gpus = f"{BASELINE} --micro_batch_size {options.sequences}", None
    if options.tinyllama:
        count = gpus = torch.cuda.device_count()
        if options.share_gpus and gpus:
            count = options.share_gpus
        if count < 2:
            sys.exit("error: --tinyllama needs 2 CUDA devices, or one and --share_gpus 2")
        options.sequences, options.device = 32, "cuda"
        options.flags = f"{TINYLLAMA} {options.flags}"
        base = f"{BASELINE} --gradient_accumulation_steps 2 --micro_batch_size 16"  # memory
        # One device too, its additions in another order: how far rounding alone leads.
        again = f"{BASELINE} --gradient_accumulation_steps 8 --micro_batch_size 4"
        options.runs = options.runs or [again, *gpu_runs(count)]
    options.runs = options.runs or SPLITS + LAYOUTS
    base = options.baseline or base
    steps, learning_rate, *_ = BOUNDS[options.dtype]
    steps = options.steps or steps
    check_runs([base, *options.runs], options.sequences)
    common = COMMON.format(
        device=options.device,
        dtype=options.dtype,
        learning_rate=learning_rate,
        tokens=steps * options.sequences * flag(options.flags, "seq_len", 64),
        data=options.dataset_name,
        flags=options.flags,
    )
    print(f"{options.dtype}, {steps} steps, {machine()}\nflags of all runs: {common}\n", flush=True)
    runs = Runs(options.save, flags=common)
    pairs = ((run, runs.metrics(run, options.plant, gpus)) for run in options.runs)
    good = report(base, runs.metrics(base), pairs, options.dtype, machine(), options.figure)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
