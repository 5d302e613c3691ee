"""What a step reports: a readable line, a line of JSON, and curves elsewhere if asked."""

import resource
import sys
import time

import torch

from errors import UserError, in_one_line, note
from metrics_file import MetricsFile

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
    """Forward and backward of one token: 6 N + 12 L h s. Source: PaLM (arXiv:2204.02311), B."""
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
        self.args, self.file, self.wandb, self.board = args, None, None, None
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
        if args.use_tensorboard:
            self.board = Board(args.use_tensorboard, first_step=1)

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
        if self.board:
            self.board.write(metrics)

    def close(self):
        """End what the numbers go to; raises UserError where some of them found no room."""
        if self.wandb:
            self.wandb.finish()
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()


class Board:
    """The numbers of a run as curves, in a folder of TensorBoard."""

    def __init__(self, folder, first_step):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.failed = folder, None
        # A reader of the folder forgets what another start wrote of this step and later ones.
        self.writer = SummaryWriter(folder, purge_step=first_step, flush_secs=10)

    def write(self, metrics):
        """Add a point to each curve. A disk that is full ends the curves, but not the training."""
        try:
            for name, number in metrics.items():
                if name != "step" and number is not None and not self.failed:
                    self.writer.add_scalar(name, number, metrics["step"])
        except OSError as error:
            note(f"--use_tensorboard {self.folder}: {error.strerror}; training goes on")
            self.failed = error

    def close(self):
        try:
            self.writer.close()
        except OSError as error:
            self.failed = error
        if self.failed:
            why = self.failed.strerror
            raise UserError(f"--use_tensorboard {self.folder}: {why}; the curves end too early")


def readable(metrics):
    """One line of a step for people."""
    mfu = f" | mfu {metrics['mfu']:.1%}" if metrics["mfu"] is not None else ""
    scale = f" | loss scale {metrics['loss_scale']:.0f}" if "loss_scale" in metrics else ""
    scale += ", step skipped" if metrics.get("skipped") else ""
    return (
        f"step {metrics['step']:5d} | loss {metrics['loss']:7.4f}"
        f" | grad norm {metrics['grad_norm']:8.4f} | lr {metrics['learning_rate']:.2e}"
        f" | {metrics['tokens_per_second']:9,.0f} tokens/s{mfu}"
        f" | {metrics['memory_gb']:.2f} GB{scale}"
    )
