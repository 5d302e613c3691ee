"""What it costs to train a tokenizer and to tokenise: time and memory of prepare.py.

python tests/prepare_costs.py step3_dataloader --megabytes 1000 --num_proc 2

The text is what this machine has of it: the sources and notes of the installed packages, each once,
then again in another order of its lines until there is enough.
"""

import argparse
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

from launch import machine

ROOT = Path(__file__).parents[1]
ENDINGS = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".c", ".cpp", ".json"}


def write_texts(folder, size):
    """Files of 10 MB that have `size` bytes together; returns how many of these are new."""
    tops = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = sorted({file for top in tops for file in top.rglob("*") if file.suffix in ENDINGS})
    lines, written, new, number = [], 0, 0, 0
    generator = random.Random(0)
    sources = iter(files)
    pool = []
    while written < size:
        file = next(sources, None)
        if file is not None:
            text = file.read_text(errors="ignore")
            pool.append(text)
            new = written + len(text)
        else:
            rows = generator.choice(pool).splitlines(keepends=True)
            generator.shuffle(rows)
            text = "".join(rows)
        lines.append(text)
        written += len(text)
        if sum(map(len, lines)) > 10_000_000 or written >= size:
            (folder / f"{number:04d}.txt").write_text("".join(lines))
            lines, number = [], number + 1
    return min(new, written)


def memory_of(pid):
    """Resident bytes of a process and its children, shared pages once (PSS)."""
    total = 0
    for process in [pid, *children(pid)]:
        try:
            rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(row.split()[1]) for row in rows if row.startswith("Pss:")) * 1024
        except OSError:
            pass
    return total


def children(pid):
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [grandchild for child in found for grandchild in (child, *children(child))]


def measured(step_dir, folder, flags):
    """(seconds until the tokenizer is there, seconds in all, bytes at the peak, what it said)."""
    out = folder / "processed"
    command = [sys.executable, "prepare.py", "--input_dir", folder / "raw", "--output_dir", out]
    begun = time.perf_counter()
    running = subprocess.Popen([*map(str, command), *flags], cwd=step_dir, stdout=subprocess.PIPE)
    peak, trained = 0, None
    reader = threading.Thread(target=lambda: said.append(running.stdout.read().decode()))
    said = []
    reader.start()
    while running.poll() is None:
        peak = max(peak, memory_of(running.pid))
        if trained is None and (folder / ".processed.unfinished" / "tokenizer").exists():
            trained = time.perf_counter() - begun
        time.sleep(0.1)
    reader.join()
    if running.returncode:
        raise SystemExit(f"prepare.py ended with {running.returncode}")
    return trained, time.perf_counter() - begun, peak, said[0].strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", nargs="?", default="step3_dataloader")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--num_proc", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "raw").mkdir()
        new = write_texts(folder / "raw", args.megabytes * 10**6)
        flags = f"--tokenizer_type bpe --vocab_size {args.vocab_size} --num_proc {args.num_proc}"
        trained, seconds, peak, said = measured(ROOT / args.step, folder, flags.split())
    print(machine())
    print(f"{args.megabytes} MB of text, {new / 10**6:.0f} MB of it new; {flags}")
    print(said.partition(": ")[2])
    print(
        f"tokenizer after {trained:.0f} s, all after {seconds:.0f} s; peak memory of all processes "
        f"{peak / 10**9:.2f} GB"
    )


if __name__ == "__main__":
    main()
