"""Run the commands of the READMEs from the READMEs' own text, so that they cannot rot.

    python tests/readme.py README.md step3_dataloader/README.md
    python tests/readme.py --jobs 2 step*/README.md    # folders side by side

A block is run when the line before it is `<!-- runnable -->`: by bash, in the README's folder, and
it must exit with 0. Where the README shows after it what it printed, rows of the ledger must be
printed again as they stand there, and the losses and gradient norms of the first 20 steps to a
thousandth; until later ones another processor's rounding may have grown. Only the ledger where the
steps train on the standard library, from step 3 on, and this Python has another one than theirs.
Needs nothing but Python, as the first blocks install the rest.
"""

import argparse
import collections
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PYTHON = "3.11.7"  # the one on whose standard library the lessons trained
BLOCK = re.compile(
    r"^<!-- runnable -->\n```bash\n(.*?)^```$(?:\n\n```\n(.*?)^```$)?", re.DOTALL | re.MULTILINE
)
LEDGER = re.compile(r"^(\w+ +(?:all_|reduce_|broadcast|send).*)", re.MULTILINE)
STEP = re.compile(r"^step +(\d+) \| loss +(\S+) \| grad norm +(\S+) ", re.MULTILINE)


def blocks(path):
    """The runnable blocks of a README, in order: (commands, what they printed or nothing)."""
    return BLOCK.findall(Path(path).read_text())


def unlike(shown, printed, losses=True):
    """Lines about what a README shows and a run did not print."""
    rows = {" ".join(row.split()) for row in LEDGER.findall(printed)}
    for row in LEDGER.findall(shown):
        if " ".join(row.split()) not in rows:
            yield f"not printed: {row}"
    steps = collections.defaultdict(list)  # a block with several runs prints a step several times
    for step, *found in STEP.findall(printed):
        steps[step].append(tuple(map(float, found)))
    for step, *row in STEP.findall(shown) if losses else ():
        if int(step) <= 20 and not any(near(row, found) for found in steps[step]):
            yield f"step {step}: {steps[step]}, not {row}"


def near(shown, found):
    """Whether numbers agree to a thousandth, or both are infinite. NaN agrees with nothing."""
    pairs = [(float(a), b) for a, b in zip(shown, found, strict=True)]
    return all(a == b or abs(a - b) <= 1e-3 * a for a, b in pairs)


def run(path, say=print):
    """Run the blocks of a README, output and all; the number of those that failed."""
    failed, folder = 0, Path(path).absolute().parent
    losses = platform.python_version() == PYTHON or folder.name.startswith(("step1_", "step2_"))
    if not losses:
        say(f"{path}: losses not compared: Python is {platform.python_version()}, not {PYTHON}")
    # Each torchrun finds a port of its own, as two of them may run at once.
    env = dict(os.environ, PET_STANDALONE="1")
    for block, shown in blocks(path):
        say(f"--- {path}\n{block}---")
        begun, printed = time.monotonic(), []
        command = ["bash", "-euo", "pipefail", "-c", block]
        with subprocess.Popen(
            command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout:
                printed.append(line)
                say(line.rstrip("\n"))
        wrong = [f"exit code {process.returncode}"] * (process.returncode != 0)
        wrong += unlike(shown, "".join(printed), losses)
        failed += bool(wrong)
        state = f"FAILED: {'; '.join(wrong)}" if wrong else "ok"
        say(f"--- {state} after {time.monotonic() - begun:.0f} s\n")
    return failed


def run_folder(paths, together):
    """Run the READMEs of a folder, one after the other: {path: blocks that failed}.

    Where folders run side by side, what a page printed is shown when it is done.
    """
    failures = {}
    for path in paths:
        said = []
        failures[path] = run(path, said.append if together else print_now)
        print_now("\n".join(said))
    return failures


def print_now(text):
    print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description="Run the commands of READMEs; see the file.")
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--jobs", type=int, default=1, help="folders that run at the same time")
    args = parser.parse_args()
    folders = collections.defaultdict(list)
    for path in args.paths:
        folders[Path(path).absolute().parent].append(path)
    longest_first = sorted(folders.values(), key=lambda f: -sum(len(blocks(p)) for p in f))
    with ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda paths: run_folder(paths, args.jobs > 1), longest_first)
        failures = {path: count for one in found for path, count in one.items()}
    for path, count in failures.items():
        print(f"{path}: {len(blocks(path))} runnable blocks, {count} failed")
    sys.exit(any(failures.values()))


if __name__ == "__main__":
    main()
