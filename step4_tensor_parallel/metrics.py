"""What a step reports: a readable line, a line of JSON, and Weights & Biases if asked."""

import json
import resource
import sys
import time
from pathlib import Path

import torch

from errors import UserError, check_writable, in_one_line, note

# Dense bfloat16 FLOP/s by what the GPU's name contains; from the vendors' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "MI300X": 1307e12,
}


def peak_flops(device):
    """Peak FLOP/s of a device, None where unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def flops_per_token(model, seq_len):
    """Forward and backward of one token: 6 N + 12 L H S. Source: PaLM (arXiv:2204.02311), B."""
    config = model.model.config
    attention = 12 * config.num_hidden_layers * config.hidden_size * seq_len
    return 6 * model.parameter_count + attention


def peak_memory_gb(device):
    """Peak memory in 1e9 bytes: allocated on CUDA, resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Metrics:
    """Takes each step's numbers, adds the speed, and writes them out."""

    def __init__(self, args, device, flops_per_token, devices):
        self.devices = devices
        self.flops_per_token = flops_per_token
        self.peak = peak_flops(device)
        self.args, self.file, self.wandb = args, None, None
        self.tokens = 0
        self.clock = time.perf_counter()

    def open(self):
        """Open what the numbers go to; raises UserError."""
        args = self.args
        if args.metrics_file:
            self.file = MetricsFile(args.metrics_file, args.flags)
        if args.use_wandb:
            import wandb

            try:
                self.wandb = wandb.init(
                    project="four-d-from-scratch", name=args.run_name, config=args.flags
                )
            except wandb.Error as error:
                words = in_one_line(error)
                raise UserError(f"--use_wandb: {words} (or set WANDB_MODE=offline)") from None

    def log(self, metrics):
        """Report what `train_step` returned, with tokens/s and MFU since the last call."""
        now = time.perf_counter()
        speed = (metrics["tokens"] - self.tokens) / (now - self.clock)
        self.tokens, self.clock = metrics["tokens"], now
        per_device = speed / self.devices
        metrics = {
            **metrics,
            "tokens_per_second": speed,
            "tokens_per_second_per_device": per_device,
            "mfu": per_device * self.flops_per_token / self.peak if self.peak else None,
        }
        print(readable(metrics), flush=True)
        if self.file:
            self.file.write(metrics)
        if self.wandb:
            self.wandb.log(metrics, step=metrics["step"])

    def close(self):
        """End what the numbers go to; raises UserError where some of them found no room."""
        if self.wandb:
            self.wandb.finish()
        if self.file:
            self.file.close()


class MetricsFile:
    """One line of JSON a step. A disk that is full ends the lines, but not the training.

    Beside it stands the run's flags, so that the same command may be given again, and no other run
    writes over these lines.
    """

    def __init__(self, path, flags):
        self.path, self.waiting, self.failed = path, b"", None
        try:
            self.file = open(path, "ab", buffering=0)
            if Path(path).is_file():
                flags_beside(path).write_text(json.dumps(flags, indent=1) + "\n")
                self.file.truncate(0)
        except OSError as error:
            raise UserError(f"--metrics_file {path}: {error.strerror}; name another file") from None

    def write(self, metrics):
        """Add a line. What finds no room waits for the next call."""
        self.waiting += json.dumps(metrics).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if self.failed is None:
                note(f"--metrics_file {self.path}: {error.strerror}; training goes on")
            self.failed = error

    def close(self):
        self.file.close()
        if lines := self.waiting.count(b"\n"):
            why = self.failed.strerror
            raise UserError(f"--metrics_file {self.path}: {why}; its last {lines} lines are lost")


def flags_beside(path):
    """Where the flags of the run stand that wrote a file of metrics."""
    return Path(f"{path}.config.json")


def check_metrics_file(args):
    """Raise UserError unless `--metrics_file` can be written, and nothing is lost by that.

    It may be new, or empty, or hold the lines of a run of the same flags.
    """
    path = args.metrics_file
    check_writable("--metrics_file", path)
    if path is None or not Path(path).is_file():
        return
    empty = Path(path).stat().st_size == 0
    if empty and not flags_beside(path).exists():
        return
    *lines, _ = Path(path).read_bytes().split(b"\n")  # the last one may be cut off
    try:
        before = json.loads(flags_beside(path).read_text())
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict) or "metrics_file" not in before or None in map(step_of, lines):
        raise UserError(f"--metrics_file {path}: it holds something else; name another file")
    if not empty and not same_flags(before, args.flags):
        raise UserError(
            f"--metrics_file {path}: it is of a run of other flags, which are in "
            f"{flags_beside(path)}; name another file"
        )


def step_of(line):
    """The step that a line of metrics is of; None if it is no such line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def same_flags(one, other):
    """Whether two runs have the same flags, wherever they write their metrics."""
    return all(one.get(key) == other.get(key) for key in {*one, *other} - {"metrics_file"})


def readable(metrics):
    """One line of a step for people."""
    mfu = f" | mfu {metrics['mfu']:.1%}" if metrics["mfu"] is not None else ""
    return (
        f"step {metrics['step']:5d} | loss {metrics['loss']:7.4f}"
        f" | grad norm {metrics['grad_norm']:8.4f} | lr {metrics['learning_rate']:.2e}"
        f" | {metrics['tokens_per_second']:9,.0f} tokens/s{mfu}"
        f" | {metrics['memory_gb']:.2f} GB"
    )
