"""How long a checkpoint takes to save and to load.

python tests/checkpoint_costs.py                        # 1 GB, one process
python tests/checkpoint_costs.py --flags "--tp_size 2"  # two processes, which share the work
python tests/checkpoint_costs.py --step-dir DIR         # another version of step 9

Each of the rounds saves and loads once; the table has their medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import workers_setup
from harness import World
from launch import machine, ranks_of, table

SHAPE = "--num_hidden_layers 8 --hidden_size 768 --num_attention_heads 12 --num_key_value_heads 12 "
SHAPE += "--intermediate_size 2816 --vocab_size 8192 --dataset_name random --seq_len 16 "


def seconds_of(argv, rounds):
    """[(seconds to save, seconds to load)] of some rounds, and the bytes of a checkpoint."""
    import checkpoint
    import process_group as pg
    import run_directory

    state = workers_setup.build(argv)
    world, found = state.mesh.world, []
    directory = Path(state.args.checkpoint_dir)
    for step in range(1, rounds + 1):
        state.step, times = step, []
        state.args.resume = directory / f"step_{step:08d}"
        for act in (checkpoint.save, checkpoint.load):
            if act is checkpoint.load:
                state.args.resumed = run_directory.read_about("--resume", state.args.resume)
            pg.dist.barrier()
            begun = time.perf_counter()
            act(state)
            seconds = [time.perf_counter() - begun]
            times.append(pg.max_over_ranks(seconds, world, state.device).item())
        found.append(times)
    return found, sum(file.stat().st_size for file in state.args.resume.iterdir())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parents[1] / "step9_4d"
    parser.add_argument("--step-dir", type=Path, default=here)
    parser.add_argument("--flags", default="")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    argv = SHAPE + options.flags
    ranks = ranks_of(argv)
    with tempfile.TemporaryDirectory(dir=".") as folder, World(options.step_dir, ranks) as world:
        argv += f" --checkpoint_dir {folder}/run --keep_last 1"
        (found, size), *_ = world.run(seconds_of, argv, options.rounds, timeout=1000)
    save, load = (statistics.median(times) for times in zip(*found, strict=True))
    print(machine())
    rows = [[f"{size / 1e9:.2f}", f"{save:.2f}", f"{load:.2f}"]]
    print(table(["GB", "save, s", "load, s"], rows))


if __name__ == "__main__":
    main()
