"""What the book's widget `planner` needs beside its formulas: models, GPUs, and how fast both are.

The formulas are those of plan.py; planner.js has them once more, and a test compares the two.
"""

import contextlib
import functools
import importlib
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST, LARGE = (
    "70.6b",  # no preset, but a model of step 9's COSTS.md
    "--num_hidden_layers 80 --hidden_size 8192 --num_attention_heads 64 --num_key_value_heads 8 "
    "--intermediate_size 28672 --vocab_size 128256 --tie_word_embeddings no",
)
FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
          "head_dim", "intermediate_size", "vocab_size", "tie_word_embeddings")  # fmt: skip
HOST = 8  # GPUs of one host, in each of these systems
# name: (its name in step 9's metrics.py, GB of memory, GB/s that a GPU sends inside of its host,
# and to other hosts). NVIDIA gives the sum of both directions for NVLink, so here is half of that;
# between hosts each GPU has a port of 200 or 400 Gbit/s.
GPUS = {
    "A100, 40 GB": ("A100", 40, 300, 25),
    "A100, 80 GB": ("A100", 80, 300, 25),
    "H100, 80 GB": ("H100", 80, 450, 50),
    "H200, 141 GB": ("H200", 141, 450, 50),
    "B200, 180 GB": ("B200", 180, 900, 50),
}
SOURCE = "NVIDIA's data sheets of DGX A100, DGX H100, DGX H200 and DGX B200"


def numbers():
    """{"models": {name: its shape}, "gpus": {name: bytes, FLOP/s, bytes/s}, "host", "source"}."""
    models = {}
    for name in (*load("plan").load_config.__globals__["PRESETS"], LARGEST):
        config = arguments(name).config
        models[name] = {field: getattr(config, field) for field in FIELDS}
    return {"models": models, "gpus": {name: gpu(name) for name in GPUS}, "host": HOST,
            "source": SOURCE}  # fmt: skip


def gpu(name):
    """{"memory", bytes; "peak", FLOP/s; "inside" and "outside", bytes/s of the links}."""
    chip, memory, inside, outside = GPUS[name]
    peak = load("metrics").PEAK_FLOPS[chip]
    return {"memory": memory * 1e9, "peak": peak, "inside": inside * 1e9, "outside": outside * 1e9}


def arguments(model, **given):
    """A layout as plan.py's command line reads it; ends the program where it cannot run."""
    shape = LARGE.split() if model == LARGEST else ["--model_name", model]
    flags = [f"--{name}" if value is True else f"--{name}={value}"
             for name, value in given.items() if value is not False]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # its notes
        return load("plan").parse_args([*shape, *flags])


def seconds(args, stage, gpu):
    """How long a stage computes, waits and sends in a step at best: {"products", "bubble", axis…}.

    At the GPU's peak and at the full rate of the link that the ranks of an axis need.
    """
    found = {"products": stage.flops() / gpu["peak"]}
    found["bubble"] = found["products"] * (args.pp_size - 1) / stage.m  # step 7
    for axis, _, _, size in stage.traffic():
        rate = gpu["inside" if is_inside(args, axis) else "outside"]
        found[axis] = found.get(axis, 0) + size / rate
    return found


def is_inside(args, axis):
    """Whether each group of an axis is on one host: of tp, cp, dp, pp the first varies fastest."""
    cp = args.tp_size * args.cp_size
    world = cp * args.dp_size * args.pp_size
    reach = {"tp": args.tp_size, "cp": cp, "dp_cp": cp * args.dp_size}.get(axis, world)
    return world <= HOST or HOST % reach == 0


@functools.cache
def load(name):
    """plan.py, or a module of step 9, without what other steps have under the same names."""
    own = {path.stem for path in (ROOT / "step9_4d").glob("*.py")}
    path, others = list(sys.path), {key: sys.modules.pop(key) for key in own & set(sys.modules)}
    sys.path[:0] = [str(ROOT / "step9_4d"), str(ROOT / "assets")]
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = path  # the ranks of later worlds inherit it
        for key in own & set(sys.modules):
            del sys.modules[key]
        sys.modules.update(others)
