"""Speed and memory of a list of layouts, beside LlamaForCausalLM of the same shape, in one run.

    python tests/benchmark.py                      # a small model on the CPU, one rank and two
    python tests/benchmark.py --gpus               # 1.8 billion parameters, on the GPUs here
    python tests/benchmark.py --flags "--model_name smollm-135m --seq_len 512" \
        "step3_dataloader --micro_batch_size 8" "LlamaForCausalLM --micro_batch_size 8"

Each RUN is a step's directory and flags of its layout, or `LlamaForCausalLM`: the model of
transformers with torch.optim.AdamW, clipping and random tokens, with `--dp_size` above 1 in DDP,
with `--dp_engine zero3` sharded by `fully_shard`. Runs take turns, `--rounds` times, so that a
machine that slows down does so for all; the figure of a run is the median of its steps.

GPUs of one host are not equally fast, and ranks that work together go at the pace of the slowest.
So with --gpus what runs on one of them runs on each at the same time, and the slowest one counts.
"""

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from launch import Saved, flag, launch, machine, ranks_of, sequences_of, table

ROOT = Path(__file__).parents[1]
SMALL = "--num_hidden_layers 4 --seq_len 64"
LARGE = "--model_name smollm-1.7b --tie_word_embeddings no --device cuda --seq_len 2048 --compile"
BASE, LAST = "step3_dataloader", "step9_4d"
PLAIN = "LlamaForCausalLM"
RUNS = [
    f"{BASE} --micro_batch_size 12",
    f"{PLAIN} --micro_batch_size 12",
    f"{LAST} --dp_size 2 --micro_batch_size 6 --dp_engine bucket",
    f"{LAST} --dp_size 2 --micro_batch_size 6 --dp_engine zero3",
    f"{PLAIN} --dp_size 2 --micro_batch_size 6",
    f"{PLAIN} --dp_size 2 --micro_batch_size 6 --dp_engine zero3",
    f"{LAST} --tp_size 2 --micro_batch_size 12",
    f"{LAST} --cp_size 2 --micro_batch_size 12",
    f"{LAST} --pp_size 2 --micro_batch_size 3 --gradient_accumulation_steps 4",
]


def gpu_runs(count, gigabytes):
    """Layouts for so many GPUs of such memory, 32,768 tokens a GPU and step, each with its best
    micro-batch. Where there is less than an H200 has, what does not fit has half of it, twice as
    often; AFAB, with all activations alive, computes some of them again.
    """
    small = gigabytes < 120

    def batch(size, number=1):
        size, number = (size // 2, 2 * number) if small else (size, number)
        accumulated = f" --gradient_accumulation_steps {number}" if number > 1 else ""
        return f"--micro_batch_size {size}{accumulated}"

    plain = batch(8, 2)  # LlamaForCausalLM has no memory for 16 at once
    runs = [f"{BASE} {batch(16)}", f"{PLAIN} {plain}"]
    if count == 1:
        return runs
    data = f"--dp_size {count}"
    engines = ("bucket", "zero1", "zero3")
    runs += [f"{LAST} {data} {batch(16)} --dp_engine {engine}" for engine in engines]
    runs += [f"{PLAIN} {data} {plain}{engine}" for engine in ("", " --dp_engine zero3")]
    ranks = min(count, 4)  # of the other axis; dp has the rest
    rest = f"--dp_size {count // ranks} " if count > ranks else ""
    tokens = 32_768 * ranks
    runs.append(f"{LAST} --tp_size {ranks} --sequence_parallel {rest}{batch(tokens // 2048)}")
    pipeline = f"{LAST} --pp_size {ranks} {rest}--micro_batch_size 4 "
    pipeline += f"--gradient_accumulation_steps {tokens // 8192} --pp_engine "
    afab = "afab --recompute_elementwise" if small else "afab"
    runs += [pipeline + engine for engine in (afab, "1f1b", "interleaved --pp_chunks 3")]
    ring = f"{LAST} --cp_size {ranks} {rest}{batch(tokens // 8192)} --dp_engine zero3"
    return [*runs, f"{ring} --seq_len 8192"]


def plain_loop(argv):
    """What a user of transformers would write; its metrics file is like that of a step."""
    import time

    sys.path[:0] = [str(ROOT / BASE)]
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from transformers import LlamaConfig, LlamaForCausalLM

    import train
    from metrics import flops_per_token, peak_flops, peak_memory_gb

    ranks, sharded = flag(argv, "dp_size", 1), "zero3" in argv
    argv = argv.replace(f"--dp_size {ranks}", "").replace("--dp_engine zero3", "")
    args = train.parse_args(argv.split())
    micro_batches = args.gradient_accumulation_steps
    device = torch.device(args.device)
    if ranks > 1:
        torch.distributed.init_process_group()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    first = int(os.environ.get("RANK", 0)) == 0
    torch.manual_seed(args.seed)
    config = LlamaConfig(**vars(args.config))
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    if args.compile:
        for layer in model.model.layers:
            layer.compile(backend=args.compile)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    run = model
    if sharded:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        options = {"mp_policy": policy} if args.dtype == "bfloat16" else {}
        for module in (*model.model.layers, model):
            fully_shard(module, **options)
    elif ranks > 1:
        run = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model.parameter_count = count
    flops, peak = flops_per_token(model, args.seq_len), peak_flops(device)
    metrics, shape = [], (args.micro_batch_size, args.seq_len)
    for step in range(args.total_steps // ranks):
        begun = time.perf_counter()
        for left in reversed(range(micro_batches)):
            if sharded:
                model.set_requires_gradient_sync(left == 0)
            elif ranks > 1:
                run.require_backward_grad_sync = left == 0
            tokens = torch.randint(args.config.vocab_size, shape, device=device)
            with cast:
                loss = run(input_ids=tokens, labels=tokens).loss
            (loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        speed = micro_batches * tokens.numel() / (time.perf_counter() - begun)
        metrics.append(
            {
                "step": step + 1,
                "tokens_per_second": speed * ranks,
                "tokens_per_second_per_device": speed,
                "mfu": speed * flops / peak if peak else None,
                "memory_gb": peak_memory_gb(device),
            }
        )
    if first:
        with open(args.metrics_file, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in metrics)
    if ranks > 1:
        torch.distributed.barrier()  # a rank that goes first breaks its neighbours' connections
        torch.distributed.destroy_process_group()


def measure(run, flags, steps, gpus):
    """Launch one RUN; the metrics of its steps after the first quarter, in which it warms up and
    compiles. What needs one GPU runs on so many at once, and the slowest one's metrics come back.
    Exits with the program's own words if it fails.
    """
    step, _, layout = run.partition(" ")
    sequences, seq_len = sequences_of(run), flag(f"{flags} {layout}", "seq_len", 128)
    # Of two equal flags argparse takes the last: a run's own seq_len wins.
    argv = f"{flags} {layout} --dataset_name random --max_tokens {steps * sequences * seq_len}"
    directory, through = (BASE, (__file__, "--plain")) if step == PLAIN else (step, ())

    def once(**environment):
        result = launch(ROOT / directory, argv, ranks_of(layout), through, **environment)
        if result.code:
            sys.exit(f"error: {run} ended with code {result.code}:\n" + "\n".join(result.errors))
        return result.metrics[len(result.metrics) // 4 :]

    if gpus < 2 or ranks_of(layout) > 1:
        return once()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    with ThreadPoolExecutor(gpus) as pool:
        found = list(pool.map(lambda name: once(CUDA_VISIBLE_DEVICES=name), names))
    speeds = [median(metrics)["tokens_per_second"] for metrics in found]
    print(f"{run}, on each GPU: " + ", ".join(f"{speed:,.0f}" for speed in speeds), flush=True)
    return found[speeds.index(min(speeds))]


def median(metrics):
    """The median of each figure over the steps; None where it is unknown."""
    keys = ("tokens_per_second", "tokens_per_second_per_device", "mfu", "memory_gb")
    return {
        key: statistics.median(m[key] for m in metrics) if metrics[0][key] is not None else None
        for key in keys
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--gpus", action="store_true", help="layouts for the GPUs of this machine")
    parser.add_argument("--flags", help="of every run, in quotes: shape, device")
    parser.add_argument("--steps", type=int, help="default: 120, with --gpus 12")
    parser.add_argument("--rounds", type=int, help="default: 3, with --gpus 1")
    parser.add_argument(
        "--save", type=Path, help="figures go to this .json, and what is in it is not run again"
    )
    options = parser.parse_args()
    count = torch.cuda.device_count()
    if options.gpus and not count:
        sys.exit("error: --gpus: this machine has no CUDA device; leave it out")

    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if options.gpus else 0
    runs = options.runs or (gpu_runs(count, memory) if options.gpus else RUNS)
    flags = options.flags or (LARGE if options.gpus else SMALL)
    steps = options.steps or (12 if options.gpus else 120)
    rounds = options.rounds or (1 if options.gpus else 3)
    saved = Saved(options.save, flags=flags, steps=steps, rounds=rounds)
    found = {run: [] for run in runs if run not in saved.runs}
    print(f"{machine()}\nflags of all runs: {flags}\n", flush=True)
    for turn in range(rounds):
        for run, metrics in found.items():
            metrics += measure(run, flags, steps, count if options.gpus else 0)
            figures = median(metrics)
            speed, memory = figures["tokens_per_second_per_device"], figures["memory_gb"]
            print(f"{run}: {speed:,.0f}, {memory:.1f} GB", file=sys.stderr, flush=True)
            if turn + 1 == rounds:
                saved.runs[run] = figures
                saved.keep()
    # What one device does alone is what each of several is measured by.
    alone = next((saved.runs[run] for run in runs if ranks_of(run) == 1), None)
    rows = []
    for run in runs:
        figures = saved.runs[run]
        step, _, layout = run.partition(" ")
        speed = figures["tokens_per_second_per_device"]
        rows.append(
            [
                step,
                f"`{layout}`",
                ranks_of(run),
                f"{speed:,.0f}",
                "" if figures["mfu"] is None else f"{figures['mfu']:.1%}",
                f"{figures['memory_gb']:.2f}",
                f"{speed / alone['tokens_per_second_per_device']:.2f}" if alone else "",
            ]
        )
    headers = ["step", "layout", "ranks", "tokens/s and device", "MFU", "peak GB", "x one device"]
    print(table(headers, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        plain_loop(" ".join(sys.argv[3:]))
    else:
        main()
