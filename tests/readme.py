"""Run the commands of the READMEs from the READMEs' own text, so that they cannot rot.

    python tests/readme.py README.md step3_dataloader/README.md

A block is run when the line before it is `<!-- runnable -->`: by bash, in the README's folder, and
it must exit with 0. Needs nothing but Python, as the first blocks install the rest.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

BLOCK = re.compile(r"<!-- runnable -->\n```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(path):
    """The runnable blocks of a README, in order."""
    return BLOCK.findall(Path(path).read_text())


def run(path):
    """Run the blocks of a README, output and all; the number of those that failed."""
    failed = 0
    for block in blocks(path):
        print(f"--- {path}\n{block}---", flush=True)
        begun = time.monotonic()
        folder = Path(path).absolute().parent
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=folder)
        failed += done.returncode != 0
        state = "ok" if done.returncode == 0 else f"FAILED with code {done.returncode}"
        print(f"--- {state} after {time.monotonic() - begun:.0f} s\n", flush=True)
    return failed


if __name__ == "__main__":
    failures = {path: run(path) for path in sys.argv[1:]}
    for path, count in failures.items():
        print(f"{path}: {len(blocks(path))} runnable blocks, {count} failed")
    sys.exit(any(failures.values()))
