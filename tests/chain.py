"""Keep nine snapshots one code base: each step is the one before it plus one lesson.

python tests/chain.py diff 4           show what step 4 adds to step 3
python tests/chain.py carry            merge uncommitted edits into every later step
python tests/chain.py check            prove the rules of the chain
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections import ChainMap
from pathlib import Path

README = "README.md"
PAGE = ".md"  # every step has its own
STEP = re.compile(r"step(\d+)_\w+")
MARKER = re.compile(rb"^(<{7}|\|{7}|>{7})( |\r?$)", re.MULTILINE)
WHOLE_FILE = "the whole file"

LONGEST_FILE = 300
MOST_ADDED = {3: 60, 9: 300, 10: 120}  # 40 in the other steps
TOPIC = {8: "pipeline_parallel.py"}  # the module a step is about, which no limit binds
FLAGS = "flags.py"  # the command line, which none binds either
SHORTEST_LINE = 20  # shorter ones, such as `return loss`, come and go by chance

Step = dict[str, bytes]  # file -> content
Tree = dict[str, Step]  # name of the step -> step


class ChainError(Exception):
    """What the user is told, in one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ChainError(f"{message} (see {self.prog} --help)")


def report(problems: list[str], summary: str):
    for problem in problems:
        print(problem)
    if problems:
        raise ChainError(summary)


def git(root, *args: str, codes=(0,)) -> bytes:
    """Return what git prints; an exit status that is not in `codes` is an error."""
    done = subprocess.run(["git", "-C", str(root), *args], capture_output=True)
    if done.returncode not in codes:
        reason = (done.stderr.decode().splitlines() or ["failed"])[0]
        raise ChainError(f"git {args[0]}: {reason} (check --root, and that there is a commit)")
    return done.stdout


def number(step: str) -> int:
    return int(STEP.fullmatch(step)[1])


def read(root: Path, rev: str = "") -> Tree:
    """Read the steps: the files of revision `rev`, or those here that git tracks or would track."""
    here = ("ls-files", "--cached", "--others", "--exclude-standard", "-x", "__pycache__")
    listed = git(root, *(("ls-tree", "-r", "--name-only", rev) if rev else here), "-z").decode()
    tree: Tree = {}
    for path in sorted(set(listed.split("\0"))):
        step, _, file = path.partition("/")
        if STEP.fullmatch(step) and (rev or (root / path).is_file()):
            blob = ("cat-file", "blob", f"{rev}:./{path}")
            content = git(root, *blob) if rev else (root / path).read_bytes()
            tree.setdefault(step, {})[file] = content
    if not tree:
        raise ChainError(f"no step in {rev or root}: name the repository that has them with --root")
    return dict(sorted(tree.items(), key=lambda item: number(item[0])))


def pairs(tree: Tree) -> list[tuple[str, str]]:
    return list(zip(list(tree)[:-1], list(tree)[1:], strict=True))


def find(tree: Tree, wanted: int) -> str:
    for step in tree:
        if number(step) == wanted:
            return step
    raise ChainError(f"there is no step {wanted}: choose one of {', '.join(tree)}")


def lesson_files(*trees: Tree) -> set[str]:
    """Return the files of all steps but for those which are every step's own."""
    files = {file for tree in trees for step in tree.values() for file in step}
    return {file for file in files if not file.endswith(PAGE)}


def python(files) -> list[str]:
    return sorted(file for file in files if file.endswith(".py"))


def lines_of(content: bytes) -> list[str]:
    return content.decode(errors="replace").splitlines()


def numstat(old: bytes | None, new: bytes | None, *flags: str) -> tuple[int, int]:
    """Count lines added and deleted as `git diff --no-index --numstat` does (a binary: none)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "old").write_bytes(old or b"")
        Path(folder, "new").write_bytes(new or b"")
        # The algorithm is named because the reader's git settings must not change the counts.
        how = ("--no-index", "--numstat", "--diff-algorithm=myers", *flags)
        counts = git(folder, "diff", *how, "old", "new", codes=(0, 1)).split()[:2]
    added, deleted = (int(count) if count.isdigit() else 0 for count in counts or (b"0", b"0"))
    return added, deleted


def change(old: bytes | None, new: bytes | None) -> tuple[str, int, int]:
    """Return what became of a file (None: it isn't there), and the lines added and deleted."""
    what = "new" if old is None else "deleted" if new is None else "changed"
    return what, *numstat(old, new)


def diff(root: Path, wanted: int, stat: bool, readme: bool):
    """Show what step N adds to the one before it."""
    if wanted == 1:
        raise ChainError("step 1 has no step before it: ask for step 2 or a later one")
    tree = read(root)
    previous, step = find(tree, wanted - 1), find(tree, wanted)
    for file in sorted(lesson_files(tree) | ({README} if readme else set())):
        old, new = tree[previous].get(file), tree[step].get(file)
        if stat and old != new:
            what, added, deleted = change(old, new)
            print(added, deleted, f"{file} ({what})", sep="\t")
        elif old != new:
            left = "/dev/null" if old is None else f"{previous}/{file}"
            right = "/dev/null" if new is None else f"{step}/{file}"
            # Git writes to our own stdout, so that it sees whether that is a terminal.
            subprocess.run(["git", "--no-pager", "diff", "--no-index", left, right], cwd=root)


def merge(base, ours, theirs, labels) -> tuple[bytes | None, str]:
    """Merge three contents (None: no such file) into one, and say what conflicts, if anything."""
    if theirs in (base, ours):
        return ours, ""
    if ours == base:
        return theirs, ""
    if ours is None:  # a later lesson dropped the file
        return None, ""
    if None in (base, theirs) or b"\0" in base + ours + theirs:
        what = "deleted" if theirs is None else "created" if base is None else "binary, changed"
        return ours, f"{what} in the step before, but different here"
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (("ours", ours), ("base", base), ("theirs", theirs)):
            Path(folder, name).write_bytes(content)
        how = ["-p", "--diff3", *(word for label in labels for word in ("-L", label))]
        merged = git(folder, "merge-file", *how, "ours", "base", "theirs", codes=range(128))
    lines = [n for n, line in enumerate(merged.split(b"\n"), 1) if line.startswith(b"<<<<<<< ")]
    return merged, "line " + ", ".join(map(str, lines)) if lines else ""


def selection(known: set[str], wanted: list[str]) -> set[str]:
    """Return the files to carry: all that are known, or `wanted` in whichever step it is named."""
    files = {re.sub(rf"^(.*/)?{STEP.pattern}/", "", Path(path).as_posix()) for path in wanted}
    if files - known:
        raise ChainError(f"no step has a file {min(files - known)} to carry: check its name")
    return files or known


def write(path: Path, content: bytes | None):
    if content is None:
        path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def carry_file(file: str, step: str, later: str, now: Tree, past: Tree, memory: dict) -> str:
    """Merge a file's edits from a step into the later one, in `now`; return the conflict, if any.

    What the step handed on is remembered as long as both files stay the same in `past`, and is the
    base of the next merge: so a conflict settled by hand isn't asked about again, and an edit can
    be carried, refined and carried once more.
    """
    path, then, there = f"{later}/{file}", past[step].get(file), past.get(later, {}).get(file)
    ours, theirs = now[later].get(file), now[step].get(file)
    record = memory.pop((step, later, file), None)
    base = record["carried"] if record and record["at"] == (then, there) else then
    if base != then != theirs and ours is not None and ours == there:
        print(f"{path}  has lost what was carried into it (--anew carries that again)")
    merged, conflict = merge(base, ours, theirs, (path, "base", f"edit from {step}"))
    if theirs != then:
        memory[step, later, file] = {"at": (then, there), "carried": theirs}
    if merged != ours:
        now[later][file] = merged
        what, added, deleted = change(ours, merged)
        done = "conflict" if conflict else what.replace("changed", "merged")
        print(f"{path}  {done} (+{added} -{deleted})")
    return conflict and f"{path}: {conflict}; carried no further"


def carry(root: Path, files: list[str], base: str, anew: bool, dry_run: bool):
    """Merge the edits made since a commit from each step into the next, first to last."""
    past, now = read(root, base), {step: ChainMap({}, old) for step, old in read(root).items()}
    for step in now:
        for file, content in now[step].items():
            if MARKER.search(content):
                raise ChainError(f"{step}/{file} has conflict markers: settle that conflict first")
    chosen = selection(lesson_files(now, past), files)
    memory_file = root / git(root, "rev-parse", "--git-path", "chain-carried").decode().strip()
    memory = ast.literal_eval(memory_file.read_text()) if memory_file.exists() else {}
    if anew:
        memory = {edge: memory[edge] for edge in memory if edge[-1] not in chosen}
    conflicts = {}
    for step, later in pairs(now):
        if step not in past:
            print(f"{step}  is not in {base}: nothing is carried out of it")
            continue
        for file in sorted(chosen - conflicts.keys()):
            if conflict := carry_file(file, step, later, now, past, memory):
                conflicts[file] = conflict
    if not dry_run:
        for step in now:
            for file, content in now[step].maps[0].items():
                write(root / step / file, content)
        memory_file.write_text(repr(memory))
    report([*conflicts.values()], "settle the conflicts above by hand, then run carry again")


def idle_flags(files: Step) -> list[str]:
    """Return the flags that no module reads, as `args.flag` or by the name "flag".

    Each as "file: --flag", with the file that has it: flags.py, or train.py where there is none.
    """
    flags, rest = [], []
    for file in python(files):
        lines = lines_of(files[file])
        for node in ast.walk(ast.parse(files[file])):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                first, end = node.lineno - 1, node.end_lineno
                lines[first:end] = [""] * (end - first)
                names = [str(getattr(arg, "value", "")) for arg in node.args]
                if file in ("train.py", FLAGS):
                    flags += [f"{file}: {name}" for name in names if name.startswith("--")]
        rest += lines
    text, reads = "\n".join(rest), r"\bargs\.{0}\b|[\"']{0}[\"']"
    named = {flag: flag.partition("--")[2].replace("-", "_") for flag in flags}
    return [flag for flag in flags if not re.search(reads.format(named[flag]), text)]


def shape_problems(step: str, files: Step):
    """Yield what is wrong with a step, taken by itself."""
    for file in {README, "train.py"} - files.keys():
        yield f"{step}/{file} is missing"
    for file in python(files):
        if (length := len(lines_of(files[file]))) > LONGEST_FILE:
            yield f"{step}/{file} has {length} lines, {LONGEST_FILE} are allowed"
    try:
        yield from (f"{step}/{flag} does nothing yet" for flag in idle_flags(files))
    except (SyntaxError, ValueError) as error:
        yield f"{step} has a file that is not Python: {error}"


def lesson_problems(step: str, old: Step, new: Step):
    """Print how much a step changes in the one before it, and yield what is wrong with that."""
    shared = sorted(lesson_files({step: old}) & lesson_files({step: new}))
    counts = {file: numstat(old[file], new[file]) for file in shared if old[file] != new[file]}
    counted = [
        counts[file] for file in python(counts) if file not in (FLAGS, TOPIC.get(number(step)))
    ]
    added, deleted = (sum(count[i] for count in counted) for i in (0, 1))
    limit = MOST_ADDED.get(number(step), 40)
    print(f"{step:24} {len(counts)} files changed  +{added} -{deleted}  limit {limit}")
    if added > limit:
        yield f"{step} adds {added} lines to old files, {limit} are allowed"
    if deleted > added:
        yield f"{step} deletes {deleted} lines of old files and adds only {added}"
    for file in counts:
        unspaced = numstat(old[file], new[file], "-w", "--ignore-blank-lines")
        if any(counts[file]) and not any(unspaced):
            yield f"{step}/{file}: reformatting only"


def parts(content: bytes | None) -> set[str]:
    """Return what of a file can be dropped and brought back: itself, and its longer lines.

    An import is none: its line is another one with each name that comes or goes.
    """
    if content is None:
        return set()
    lines = {
        line.strip() for line in lines_of(content) if not line.startswith(("from ", "import "))
    }
    return {WHOLE_FILE} | {line for line in lines if len(line) >= SHORTEST_LINE}


def returning(tree: Tree):
    """Yield what a step drops and a later one brings back (a line that moved wasn't dropped)."""
    for file in sorted(lesson_files(tree)):
        dropped: dict[str, str] = {}
        for previous, step in pairs(tree):
            old, new = parts(tree[previous].get(file)), parts(tree[step].get(file))
            if not (old and new):
                old, new = old & {WHOLE_FILE}, new & {WHOLE_FILE}
            for part in sorted((new - old) & dropped.keys()):
                yield f"{step}/{file} brings back what {dropped[part]} dropped: {part}"
            dropped.update(dict.fromkeys(old - new, step))


def check(root: Path):
    """Prove the rules of the chain, a line for each step, and name what breaks them."""
    tree = read(root)
    first, *_ = tree
    print(f"{first:24} {len(tree[first])} files")
    problems = [p for old, new in pairs(tree) for p in lesson_problems(new, tree[old], tree[new])]
    problems += [p for step in tree for p in shape_problems(step, tree[step])]
    problems += returning(tree)
    numbers = [number(step) for step in tree]
    if numbers != list(range(1, len(tree) + 1)):
        problems.append(f"the steps are numbered {numbers}: number them from 1 on without a gap")
    report(problems, f"{len(problems)} breaches of the chain's rules: mend what is named above")


def parse_args() -> dict:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function):
        sub = commands.add_parser(function.__name__, description=function.__doc__)
        sub.set_defaults(function=function)
        here = Path(__file__).resolve().parent.parent
        sub.add_argument("--root", type=Path, default=here, help="directory of the steps")
        return sub.add_argument

    add = command(diff)
    add("wanted", metavar="N", type=int, help="number of the step")
    add("--stat", action="store_true", help="count the lines only")
    add("--readme", action="store_true", help="show the READMEs too")
    add = command(carry)
    add("files", metavar="FILE", nargs="*", help="only these files, in every step")
    add("--base", metavar="REV", default="HEAD", help="commit that the edits are counted from")
    add("--anew", action="store_true", help="forget what earlier runs have carried")
    add("--dry-run", action="store_true", help="write nothing")
    command(check)
    return vars(parser.parse_args())


if __name__ == "__main__":
    # In a log, too, an error has to come after the lines that it speaks of.
    sys.stdout.reconfigure(line_buffering=True)
    try:
        options = parse_args()
        options.pop("function")(**options)
    except (ChainError, OSError) as error:
        sys.exit(f"error: {error}")
