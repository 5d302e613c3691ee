"""A chain of four small made-up steps, and chain.py to run on it."""

import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).with_name("chain.py")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
ENVIRONMENT |= {"GIT_CONFIG_GLOBAL": os.devnull, "TERM": "xterm"}
MARKERS = "<!-- chain:begin -->\n<!-- chain:end -->\n"
FLAG = 'parser.add_argument("--{}", type=int)\n'


def code(name: str, count: int) -> str:
    return "".join(f'{name}_{n:02} = "line {n} of {name}"\n' for n in range(1, count + 1))


def with_lesson(text: str, after: int, lesson: str) -> str:
    """Put a lesson behind line `after` of the made-up train.py."""
    line = f'train_{after:02} = "line {after} of train"\n'
    return text.replace(line, f'{line}lesson = "{lesson}, which is this step\'s"\n')


TRAIN = FLAG.format("seq_len") + "print(args.seq_len)\n" + code("train", 12)
MESH = with_lesson(TRAIN, 6, "the mesh")
DATA = with_lesson(MESH, 9, "the data")
COMMON = {"README.md": MARKERS, "model.py": code("model", 5), "tools/figure.py": code("figure", 3)}
TOY, GROUP, LOADER = code("toy", 4), code("group", 6), code("loader", 7)
STEPS = {
    "step1_model": COMMON | {"train.py": TRAIN, "toy.py": TOY},
    "step2_process_group": COMMON | {"train.py": MESH, "toy.py": TOY, "group.py": GROUP},
    "step3_dataloader": COMMON | {"train.py": DATA, "group.py": GROUP, "data.py": LOADER},
    "step4_tensor_parallel": COMMON | {"train.py": DATA, "group.py": GROUP, "data.py": LOADER},
}
ONE, TWO, THREE, FOUR = STEPS


class Chain:
    """A repository with a chain of steps, and the tool to run on it."""

    def __init__(self, root: Path):
        self.root = root
        for step, files in STEPS.items():
            for file, text in files.items():
                self.write(f"{step}/{file}", text)
        self.git("init", "--quiet")
        self.git("config", "user.name", "A Maintainer")
        self.git("config", "user.email", "maintainer@example.org")
        self.commit()

    def git(self, *args: str):
        subprocess.run(["git", *args], cwd=self.root, env=ENVIRONMENT, check=True)

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "a commit")

    def write(self, path: str, text: str):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def delete(self, path: str):
        (self.root / path).unlink()

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def edit(self, path: str, old: str, new: str):
        assert old in self.read(path)
        self.write(path, self.read(path).replace(old, new))

    def each(self, file: str) -> list[str | None]:
        """Return a file's text in every step, None where there is no such file."""
        paths = [f"{step}/{file}" for step in STEPS]
        return [self.read(path) if (self.root / path).exists() else None for path in paths]

    def everything(self) -> dict[Path, bytes]:
        paths = (path for path in self.root.glob("step*/**/*") if path.is_file())
        return {path: path.read_bytes() for path in paths}

    def grow(self, number: int, file: str, text: str):
        """Add `text` to the end of a file in step `number` and all that follow."""
        for path in self.root.glob(f"step*/{file}"):
            if int(path.relative_to(self.root).parts[0][4]) >= number:
                path.write_text(path.read_text() + text)

    def lengthen(self, until: int):
        """Add steps up to number `until`, each the same as step 4."""
        for number in range(5, until + 1):
            for file, text in STEPS[FOUR].items():
                self.write(f"step{number}_more/{file}", text)

    def run(self, *args: str, fails: bool = False, root: str = ".") -> str:
        """Return what the tool prints; where it fails, with its one line of error at the end."""
        command = [sys.executable, str(TOOL), *args, "--root", str(self.root / root)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == (1 if fails else 0), done.stdout + done.stderr
        assert done.stderr.count("\n") == fails and done.stderr.startswith("error: " * fails)
        return done.stdout + done.stderr
