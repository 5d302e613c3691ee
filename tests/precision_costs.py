"""What half precision costs: the same training in several dtypes, beside float32.

python tests/precision_costs.py --save assets/precision_2cores.json   # 500 steps of a small model
python tests/precision_costs.py --flags "…"                           # of another one
python tests/precision_costs.py --kept assets/precision_2cores.json   # the table, of what was saved

Step 3 trains on real text. A row has the held-out loss at the end, its distance from float32's; the
mean distance of the losses of all steps from float32's; how many steps were skipped; and the share
of numbers in the weights that are still what they were at the beginning, of the norms and of the
matrices.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from launch import Saved, flag, machine, table

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--num_hidden_layers 4 --hidden_size 64 --num_attention_heads 4 --num_key_value_heads 2 "
SMALL += "--intermediate_size 192 --seq_len 64 --micro_batch_size 8 --learning_rate 1e-3 "
ROWS = {
    "float32": "--dtype float32",
    "bfloat16": "--dtype bfloat16",
    "float16": "--dtype float16",
    "bfloat16, weights too": "--dtype bfloat16 --weights_dtype bfloat16",
    "float16, weights too": "--dtype float16 --weights_dtype float16",
    "the same, eps 1e-4": '--dtype float16 --weights_dtype float16 --optimizer_args {"eps":1e-4}',
}


def trained(argv, steps):
    """What a run gives: losses, held-out loss, skipped steps, share of numbers that never moved."""
    from workers_setup import build

    import train

    state = build(argv)
    begun = [parameter.detach().clone() for parameter in state.parameters]
    losses, skipped, end = [], [], None
    try:
        for step in range(1, steps + 1):
            report = train.train_step(state)
            losses.append(report["loss"])
            if report.get("skipped"):
                skipped.append(step)
        held_out = train.evaluate(state)["held_out"]
    except train.UserError as error:
        held_out, end = None, str(error)
    still = {}
    for parameter, before in zip(state.parameters, begun, strict=True):
        kind = still.setdefault("vectors" if parameter.dim() == 1 else "matrices", [0, 0])
        kind[0] += (parameter.detach() == before).sum().item()
        kind[1] += parameter.numel()
    return {
        "losses": losses,
        "held_out": held_out,
        "end": end,
        "skipped": skipped,
        "scale": state.loss_scale.value,
        "still": {kind: same / count for kind, (same, count) in still.items()},
    }


def rows_of(runs):
    """Rows of the table: what the docstring says."""
    exact = runs["float32"]
    for name, run in runs.items():
        apart = [abs(a - b) for a, b in zip(run["losses"], exact["losses"], strict=False)]
        losses = ["—", "—", f"stopped at step {len(run['losses']) + 1}"]
        if run["held_out"] is not None:
            off = run["held_out"] - exact["held_out"]
            losses = [f"{run['held_out']:.4f}", f"{off:+.4f}", f"{statistics.mean(apart):.4f}"]
        still = (f"{100 * run['still'][kind]:.1f} %" for kind in ("vectors", "matrices"))
        yield [name, *losses, len(run["skipped"]), *still]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--flags", default=SMALL)
    parser.add_argument("--save", type=Path, help="keep the runs here, and go on from them")
    parser.add_argument("--kept", type=Path, help="runs that were saved; nothing is trained")
    options = parser.parse_args()
    if options.kept:
        kept = json.loads(options.kept.read_text())
        print(kept["machine"])
        runs = kept["runs"]
    else:
        print(machine())
        saved = Saved(options.save, flags=options.flags, steps=options.steps)
        runs = saved.runs
        sequences = options.steps * flag(options.flags, "micro_batch_size", 4)
        length = f"--max_tokens {sequences * flag(options.flags, 'seq_len', 128)}"
        from harness import World

        for name, flags in ROWS.items():
            if name not in runs:
                argv = f"{options.flags} {flags} {length}"
                with World(ROOT / "step3_dataloader", 1) as world:
                    (runs[name],) = world.run(trained, argv, options.steps, timeout=10**5)
                saved.keep()
                print(name, runs[name]["held_out"], file=sys.stderr, flush=True)
    headers = "dtype|held-out loss|off|mean distance|skipped|norms unmoved|matrices unmoved"
    print(table(headers.split("|"), rows_of(runs)))


if __name__ == "__main__":
    main()
