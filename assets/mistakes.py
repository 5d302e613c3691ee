"""Train with mistakes planted on purpose, each beside the right run, and keep the curves.

    python assets/mistakes.py [--steps 120] [--only NAME ...] [--output assets/mistakes.json]

The mistakes are functions of tests/breaks_*.py. Each run is a small model in float64, in a world of
up to two processes with one thread each. A run in one process of step 3 says what is right: each
gradient is compared with its gradient of the same step. The widget of mistakes draws the file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from harness import World  # noqa: E402
from launch import machine  # noqa: E402

STEPS = 120
SMALL = (
    "--device cpu --dtype float64 --num_hidden_layers 4 --hidden_size 64 --intermediate_size 192 "
    "--num_attention_heads 4 --num_key_value_heads 2 --seq_len 64"
)


class Mistake(NamedTuple):
    step: str
    ranks: int
    flags: str  # each a global batch of 4 sequences
    more: str = ""  # flags of the right run, too


MISTAKES = {
    "scale_gradients": Mistake(
        "step8_pipeline_1f1b", 2,
        "--pp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 2",
    ),
    "only_the_last_micro_batch_is_summed": Mistake(
        "step6_data_parallel", 2,
        "--dp_size 2 --micro_batch_size 1 --gradient_accumulation_steps 2",
    ),
    "gradients_not_summed": Mistake(
        "step6_data_parallel", 2, "--cp_size 2 --micro_batch_size 4"
    ),
    "norm_gradients_of_own_tokens": Mistake(
        "step4_tensor_parallel", 2, "--tp_size 2 --sequence_parallel --micro_batch_size 4"
    ),
    "gradients_never_sent_home": Mistake(
        "step5_context_parallel", 2, "--cp_size 2 --micro_batch_size 4"
    ),
    "positions_from_zero": Mistake(
        "step5_context_parallel", 2, "--cp_size 2 --micro_batch_size 4"
    ),
    "ends_not_summed": Mistake(
        "step8_pipeline_1f1b", 2,
        "--pp_size 2 --micro_batch_size 2 --gradient_accumulation_steps 2",
        "--tie_word_embeddings yes",
    ),
    "weights_in_bfloat16": Mistake("step3_dataloader", 1, "--micro_batch_size 4"),
}  # fmt: skip


def train(argv, steps, break_it, folder, keep):
    """On every rank: train, and compare each gradient with the file that the right run has kept.

    keep: this is the right run. Returns losses, gradient norms, for each step {tensor: (largest
    difference, largest right element)}, and how far a norm's weight has moved from 1 at most.
    """
    import breaks

    import train

    if break_it:
        getattr(breaks, break_it)(train)
    state = train.setup(train.parse_args(argv.split()))
    forward_backward, apart = train.forward_backward, []

    def compared(state):
        loss, found = forward_backward(state), {}
        for parameter in state.parameters:
            path = Path(folder, f"{len(apart)} {parameter.global_name}.npy")
            own = parameter.grad.numpy()
            if keep:
                np.save(path, own)
            right = np.load(path)
            found[parameter.global_name] = (
                float(np.abs(own - right[parameter.held]).max()),
                float(np.abs(right).max()),
            )
        apart.append(found)
        return loss

    train.forward_backward = compared
    metrics = [train.train_step(state) for _ in range(steps)]
    norms = [p for p in state.parameters if len(p.full_shape) == 1]
    return {
        "loss": [m["loss"] for m in metrics],
        "grad_norm": [m["grad_norm"] for m in metrics],
        "apart": apart,
        "moved": max([0.0, *(float((p.detach() - 1).abs().max()) for p in norms)]),
    }


def run(step, ranks, argv, steps, break_it, folder, keep=False):
    """The curves of one run: what the first rank reports, and the worst gradient of any rank."""
    argv = f"{SMALL} {argv} --max_tokens {STEPS * 256}"
    with World(ROOT / step, ranks) as world:
        found = world.run(train, argv, steps, break_it, str(folder), keep, timeout=600)
    shares = [
        {
            name: max(rank["apart"][i][name][0] / rank["apart"][i][name][1] for rank in holders)
            for name, holders in holding(found).items()
        }
        for i in range(steps)
    ]
    off = [name for name, share in shares[0].items() if share > 1e-9]
    return {
        "loss": [float(f"{loss:.5f}") for loss in found[0]["loss"]],
        "grad_norm": [float(f"{norm:.5g}") for norm in found[0]["grad_norm"]],
        "apart": [float(f"{max(share.values()):.2g}") for share in shares],
        "off": len(off),
        "off_in": [*dict.fromkeys(name.split(".")[-2] for name in off)],
        "tensors": len(shares[0]),
        "moved": float(f"{max(rank['moved'] for rank in found):.2g}"),
    }


def holding(found):
    """{name of a tensor: the results of the ranks that have it, or a part of it}."""
    names = dict.fromkeys(name for rank in found for name in rank["apart"][0])
    return {name: [rank for rank in found if name in rank["apart"][0]] for name in names}


def main():
    parser = argparse.ArgumentParser(description="Curves of planted mistakes; see the file.")
    parser.add_argument("--steps", type=int, default=STEPS, help="so many of the 120")
    parser.add_argument("--only", nargs="+", choices=MISTAKES, default=[*MISTAKES])
    parser.add_argument("--output", type=Path, default=ROOT / "assets" / "mistakes.json")
    args = parser.parse_args()
    where, date = machine().rsplit(", ", 1)
    result = {"machine": where, "date": date, "flags": SMALL, "right": {}, "mistakes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for more in dict.fromkeys(MISTAKES[name].more for name in args.only):
            kept = Path(folder, more or "plain")
            kept.mkdir()
            flags = f"--micro_batch_size 4 {more}"
            one = run("step3_dataloader", 1, flags, args.steps, None, kept, keep=True)
            result["right"][more] = {key: one[key] for key in ("loss", "grad_norm", "moved")}
            for name in args.only:
                step, ranks, flags, its = MISTAKES[name]
                if its != more:
                    continue
                argv = f"{flags} {more}"
                right = run(step, ranks, argv, args.steps, None, kept)
                wrong = run(step, ranks, argv, args.steps, name, kept)
                result["mistakes"][name] = {
                    "step": step, "ranks": ranks, "flags": flags, "more": more,
                    "right_apart": right["apart"], **wrong,
                }  # fmt: skip
                print(
                    f"{name}: loss {wrong['loss'][-1]} for {one['loss'][-1]}, norm of step 1 "
                    f"{wrong['grad_norm'][0]} for {one['grad_norm'][0]}, a gradient apart by "
                    f"{wrong['apart'][0]} (right run: {max(right['apart'])})",
                    flush=True,
                )
    args.output.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(args.output, args.output.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
