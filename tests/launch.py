"""Start a step as a reader does, with `python` or `torchrun`, and collect what it said."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Result:
    code: int
    out: str  # of the first rank
    errors: list  # each rank's own standard error, without the launcher's
    seconds: float
    metrics: list  # a dict a step
    others: str  # what the other ranks printed


def flag(argv, name, default):
    """The whole number that a command line gives for --name."""
    found = re.findall(rf"--{name}[ =](\d+)", argv)
    return int(found[-1]) if found else default  # argparse takes the last one, too


def sequences_of(argv):
    """Global batch size of a run, in sequences."""
    names = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "dp_size": 1}
    return math.prod(flag(argv, name, default) for name, default in names.items())


def ranks_of(argv):
    """World size of a command line: the product of the sizes in it."""
    return math.prod(flag(argv, f"{axis}_size", 1) for axis in ("tp", "cp", "dp", "pp"))


def on_two(step_dir):
    """Flags that make two ranks of a step: replicas at first, then its newest axis."""
    step = int(re.match(r"step(\d+)", Path(step_dir).name)[1])
    axes = {4: "tp", 5: "cp", 6: "dp", 7: "pp"}
    return f" --{axes[min(step, max(axes))]}_size 2" if step in range(4, 10) else ""


def launch(step_dir, argv, ranks=None, through=(), timeout=300, script="train.py", **environment):
    """Run `train.py argv` on as many ranks as its sizes say, or `ranks`; never raises on failure.

    through: a script and its arguments, put before train.py. Under torchrun each rank gets one
    thread, as torchrun does; a single process may use all cores.
    """
    ranks = ranks or ranks_of(argv)
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        command = [*map(str, through), str(Path(step_dir).absolute() / script), *argv.split()]
        if script == "train.py" and "--metrics_file" not in argv:
            command += ["--metrics_file", str(metrics)]
        logs = Path(folder) / "logs"
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            start += ["--log-dir", str(logs), "--redirects", "3"]
        begun, others = time.monotonic(), ""
        done = subprocess.run(
            [*start, *command],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        seconds = time.monotonic() - begun
        out, errors = done.stdout, [done.stderr]
        if ranks > 1:
            out = "".join(path.read_text() for path in logs.glob("*/*/0/stdout.log"))
            said = sorted(logs.glob("*/*/*/stdout.log"))
            others = "".join(path.read_text() for path in said if path.parent.name != "0")
            errors = [path.read_text() for path in sorted(logs.glob("*/*/*/stderr.log"))]
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        metrics = [json.loads(line) for line in lines]
        return Result(done.returncode, out, errors, seconds, metrics, others)


def machine():
    """One line that says what the figures were measured on."""
    if torch.cuda.is_available():
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    else:
        lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.split(":")[1].strip() for line in lines.splitlines() if "model name" in line]
        where = f"{os.cpu_count()} cores{' of ' + names[0] if names else ''}"
    version = ".".join(map(str, sys.version_info[:2]))
    return f"{where}, torch {torch.__version__}, Python {version}, {time.strftime('%Y-%m-%d')}"


class Saved:
    """What runs gave, by their flags: `runs`. With a file, kept over calls that are `of` the same,
    on the same machine.
    """

    def __init__(self, path, **of):
        self.path, self.runs = path, {}
        self.of = {**of, "machine": machine().rsplit(", ", 1)[0]}  # without the date
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if any(kept.get(key) != value for key, value in self.of.items()):
                sys.exit(f"error: --save {path}: of other flags or machines; name another file")
            self.runs = kept["runs"]
        self.keep()  # or that it can't be written would be known after the first run

    def keep(self):
        if self.path is not None:  # written aside: a call that is killed leaves the file whole
            aside = self.path.with_suffix(".part")
            try:
                aside.write_text(json.dumps(self.of | {"runs": self.runs}, indent=1) + "\n")
            except OSError as error:
                sys.exit(f"error: --save {self.path}: {error.strerror}; name a file to write")
            aside.replace(self.path)


def table(headers, rows):
    """A Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
