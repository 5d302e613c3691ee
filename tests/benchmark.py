"""Speed and memory of a list of layouts, beside LlamaForCausalLM of the same shape, in one run.

    python tests/benchmark.py
    python tests/benchmark.py --flags "--model_name smollm-135m --seq_len 512" \
        "step3_dataloader --micro_batch_size 8"

Each RUN is a step's directory and flags of its layout. Runs take turns, `--rounds` times, so that
a machine that slows down does so for all; the figure of a run is the median of its steps. The plain
loop is LlamaForCausalLM, torch.optim.AdamW and random tokens, with clipping and nothing else.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from launch import flag, launch, machine, ranks_of, sequences_of, table

ROOT = Path(__file__).parents[1]
SMALL = "--num_hidden_layers 4 --seq_len 64"
BASE = "step3_dataloader"
RUNS = [f"{BASE} --micro_batch_size 12"]
PLAIN = "LlamaForCausalLM"


def plain_loop(argv):
    """What a user of transformers would write; a list of metrics as a step's metrics file."""
    import time

    sys.path.insert(0, str(ROOT / BASE))
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import train
    from metrics import flops_per_token, peak_flops, peak_memory_gb

    args = train.parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    config = LlamaConfig(**vars(args.config))
    dtype = torch.float64 if args.dtype == "float64" else torch.float32
    model = LlamaForCausalLM(config).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    cast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    model.parameter_count = sum(parameter.numel() for parameter in model.parameters())
    flops, peak = flops_per_token(model, args.seq_len), peak_flops(device)
    metrics, shape = [], (args.micro_batch_size, args.seq_len)
    for step in range(args.total_steps):
        begun = time.perf_counter()
        tokens = torch.randint(args.config.vocab_size, shape, device=device)
        with cast:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        speed = tokens.numel() / (time.perf_counter() - begun)
        metrics.append(
            {
                "step": step + 1,
                "tokens_per_second": speed,
                "tokens_per_second_per_device": speed,
                "mfu": speed * flops / peak if peak else None,
                "memory_gb": peak_memory_gb(device),
            }
        )
    with open(args.metrics_file, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in metrics)


def measure(run, flags):
    """Launch one RUN; its list of metrics. Exits with the program's own words if it fails."""
    step, _, layout = run.partition(" ")
    argv = f"{flags} {layout} --dataset_name random"
    if step == PLAIN:
        result = launch(ROOT / BASE, argv, through=(__file__, "--plain"))
    else:
        result = launch(ROOT / step, argv, ranks_of(layout))
    if result.code:
        sys.exit(f"error: {run} ended with code {result.code}:\n" + "\n".join(result.errors))
    return result.metrics[len(result.metrics) // 4 :]  # the first steps warm up and compile


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="RUN")
    parser.add_argument("--flags", default=SMALL, help="of every run, in quotes: shape, device")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write all figures to this .json")
    options = parser.parse_args()

    plain = f"{PLAIN} {options.runs[0].partition(' ')[2]}"
    found = {run: [] for run in [*options.runs, plain]}
    print(f"{machine()}\nflags of all runs: {options.flags}\n", flush=True)
    for _ in range(options.rounds):
        for run, metrics in found.items():
            sequences = sequences_of(run)
            seq_len = flag(options.flags, "seq_len", 128)
            tokens = f"--max_tokens {options.steps * sequences * seq_len}"
            metrics += measure(run, f"{options.flags} {tokens}")
    rows, result = [], {"machine": machine(), "flags": options.flags, "runs": {}}
    for run, metrics in found.items():
        median = {
            key: statistics.median(m[key] for m in metrics) if metrics[0][key] is not None else None
            for key in ("tokens_per_second", "tokens_per_second_per_device", "mfu", "memory_gb")
        }
        result["runs"][run] = median
    against = result["runs"][plain]["tokens_per_second_per_device"]
    for run, median in result["runs"].items():
        step, _, layout = run.partition(" ")
        rows.append(
            [
                step,
                layout,
                ranks_of(run),
                f"{median['tokens_per_second']:,.0f}",
                f"{median['tokens_per_second_per_device']:,.0f}",
                "" if median["mfu"] is None else f"{median['mfu']:.1%}",
                f"{median['memory_gb']:.2f}",
                f"{median['tokens_per_second_per_device'] / against:.2f}",
            ]
        )
    headers = ["step", "layout", "ranks", "tokens/s", "tokens/s/device", "MFU", "GB", "x plain"]
    print(table(headers, rows))
    if options.save:
        options.save.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain"]:
        plain_loop(sys.argv[3:])
    else:
        main()
