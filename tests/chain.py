"""Keep nine snapshots one code base: each step is the one before it plus one lesson.

python tests/chain.py diff 4           show what step 4 adds to step 3
python tests/chain.py carry            merge uncommitted edits into every later step
python tests/chain.py check            prove the rules of the chain
python tests/chain.py table --write    renew the table of changes in every step's README
"""

import argparse
import ast
import re
import subprocess
import tempfile
from pathlib import Path

README = "README.md"
STEP = re.compile(r"step(\d+)_\w+")
MARKER = re.compile(rb"^(<{7}|\|{7}|>{7})( |\r?$)", re.MULTILINE)
TABLE = re.compile(r"(<!-- chain:begin -->\n).*?(<!-- chain:end -->)", re.DOTALL)
WHOLE_FILE = "the whole file"

LONGEST_FILE = 300
MOST_ADDED = {3: 60, 9: 150}  # 40 in the other steps
TOPIC = {8: "pipeline_parallel.py"}  # the module a step is about, which no limit binds
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
        raise ChainError(
            f"git {args[0]}: {reason} (check --root, and that the steps are committed)"
        )
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
            content = git(root, "show", f"{rev}:./{path}") if rev else (root / path).read_bytes()
            tree.setdefault(step, {})[file] = content
    if not tree:
        raise ChainError(f"no step in {root} {rev}: name the repository that has them with --root")
    return dict(sorted(tree.items(), key=lambda item: number(item[0])))


def pairs(tree: Tree) -> list[tuple[str, str]]:
    return list(zip(list(tree)[:-1], list(tree)[1:], strict=True))


def find(tree: Tree, wanted: int) -> str:
    for step in tree:
        if number(step) == wanted:
            return step
    raise ChainError(f"there is no step {wanted}: choose one of {', '.join(tree)}")


def lesson_files(*trees: Tree) -> set[str]:
    """Return the files of all steps but for the READMEs, which are every step's own."""
    return {file for tree in trees for step in tree.values() for file in step} - {README}


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


def carry(root: Path, files: list[str], base: str, anew: bool, dry_run: bool):
    """Merge the edits made since a commit from each step into the next, first to last.

    What a step has handed to the next is remembered inside .git, for as long as the commit has the
    same two files, and the next merge starts from there: a conflict settled by hand isn't asked
    about again, and an edit can be carried, refined and carried once more.
    """
    now, past = read(root), read(root, base)
    marked = [
        f"{step}/{file}" for step in now for file in now[step] if MARKER.search(now[step][file])
    ]
    if marked:
        raise ChainError(f"conflict markers in {', '.join(marked)}: settle them first")
    chosen = selection(lesson_files(now, past), files)
    memory_file = root / git(root, "rev-parse", "--git-path", "chain-carried").decode().strip()
    memory = ast.literal_eval(memory_file.read_text()) if memory_file.exists() else {}
    changed, conflicts = {}, {}
    for step, later in pairs(now):
        if step not in past:
            print(f"{step}  is not in {base}: nothing is carried out of it")
            continue
        for file in sorted(chosen - conflicts.keys()):
            path = f"{later}/{file}"
            then, there = past[step].get(file), past.get(later, {}).get(file)
            ours, theirs = now[later].get(file), now[step].get(file)
            record = memory.pop((step, path), None)
            known = not anew and record is not None and record["at"] == (then, there)
            carried = record["carried"] if known else then
            if carried != then != theirs and ours is not None and ours == there:
                print(f"{path}  is as in {base}, though carried into before (--anew: once more)")
            labels = (path, "base", f"edit from {step}")
            merged, conflict = merge(carried, ours, theirs, labels)
            if theirs != then:
                memory[step, path] = {"at": (then, there), "carried": theirs}
            if conflict:
                conflicts[file] = f"{path}: conflict, carried no further: {conflict}"
            elif merged != ours:
                what, added, deleted = change(ours, merged)
                print(f"{path}  {what.replace('changed', 'merged')} (+{added} -{deleted})")
            if merged != ours:
                changed[root / path] = now[later][file] = merged
    if not dry_run:
        for path, content in changed.items():
            write(path, content)
        memory_file.write_text(repr(memory))
    count = len(conflicts)
    report([*conflicts.values()], f"{count} conflicts: settle them by hand, then run carry again")
