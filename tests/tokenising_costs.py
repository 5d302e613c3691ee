"""What it costs to tokenise a large text: memory over an empty run, and speed beside small ones.

python tests/tokenising_costs.py step3_dataloader --megabytes 200

The same text is one .txt, and documents of 2 kB in a .jsonl; each is tokenised by `bytes` in a
process of its own, with an empty cache.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from launch import machine, table

ROOT = Path(__file__).parents[1]


def write_texts(folder, size):
    """large.txt of some bytes, small.jsonl with the same in documents of 2 kB, and empty.txt."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "".join(file.read_text(errors="ignore") for file in sources)
    text = "".join(letter for letter in text if letter.isascii())
    text = (text * (size // len(text) + 1))[:size]
    (folder / "empty.txt").write_text("")
    (folder / "large.txt").write_text(text)
    with open(folder / "small.jsonl", "w") as file:
        for start in range(0, size, 2000):
            file.write(json.dumps({"text": text[start : start + 2000]}) + "\n")


def tokenise(step_dir, argv):
    """Print as JSON what one data set took: seconds, MB at the peak, tokens."""
    sys.path.insert(0, step_dir)
    import transformers  # noqa: F401  seconds that no text costs

    import process_group as pg
    import train
    from corpus import load_tokens

    args = train.parse_args(argv)
    device = pg.init_processes("cpu")
    begun = time.perf_counter()
    tokens, *_ = load_tokens(args, pg.Mesh(dp=1).world, device)
    seconds = time.perf_counter() - begun
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the one that started us
    peak = int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024
    print(json.dumps({"s": seconds, "cpu": cpu, "MB": peak, "tokens": len(tokens)}), flush=True)
    os._exit(0)


def measured(step_dir, name, flags):
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", step_dir, "--dataset_name", str(name), *flags]
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", nargs="?", default="step3_dataloader")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="in turns; the median is shown")
    parser.add_argument("--flags", default="", help="of the step, --num_proc 2 for instance")
    args = parser.parse_args()
    step_dir = str((ROOT / args.step).resolve())
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_texts(folder, args.megabytes * 10**6)
        names = ("empty.txt", "large.txt", "small.jsonl")
        rounds = [
            {name: measured(step_dir, folder / name, args.flags.split()) for name in names}
            for _ in range(args.rounds)
        ]

    def median(name, field):
        return sorted(one[name][field] for one in rounds)[args.rounds // 2]

    print(machine())
    rows = [
        [
            name,
            f"{median(name, 'tokens'):,}",
            f"{median(name, 'MB') - median('empty.txt', 'MB'):.0f}",
            f"{args.megabytes / median(name, 's'):.1f}" if name != "empty.txt" else "–",
            f"{median(name, 'cpu') - median('empty.txt', 'cpu'):.1f}",
        ]
        for name in names
    ]
    print(table(["text", "tokens", "MB over the empty one", "MB/s", "s of the cores"], rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        tokenise(sys.argv[2], sys.argv[3:])
    main()
