"""Tests of chain.py, on a chain of four small made-up steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        self.git("commit", "--quiet", "--message", "a commit")

    def write(self, path: str, text: str):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

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

    def lengthen(self, until: int):
        """Add steps up to number `until`, each the same as step 4."""
        for number in range(5, until + 1):
            for file, text in STEPS[FOUR].items():
                self.write(f"step{number}_more/{file}", text)

    def run(self, *args: str, fails: bool = False) -> str:
        """Return what the tool prints; where it fails, with its one line of error at the end."""
        command = [sys.executable, str(TOOL), *args, "--root", str(self.root)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == (1 if fails else 0), done.stdout + done.stderr
        assert done.stderr.count("\n") == fails and done.stderr.startswith("error: " * fails)
        return done.stdout + done.stderr


@pytest.fixture
def chain(tmp_path) -> Chain:
    return Chain(tmp_path)


# ---- carry ---------------------------------------------------------------------------------------


def test_an_edit_reaches_every_later_step_and_no_earlier_one(chain):
    chain.edit(f"{TWO}/train.py", "line 1 of", "the first line of")
    chain.edit(f"{TWO}/train.py", "train_12", "added = 1\ntrain_12")
    output = chain.run("carry")
    assert output == "".join(f"{step}/train.py  merged (+2 -1)\n" for step in (THREE, FOUR))
    texts = [MESH, DATA, DATA]
    texts = [t.replace("line 1 of", "the first line of") for t in texts]
    texts = [t.replace("train_12", "added = 1\ntrain_12") for t in texts]
    assert chain.each("train.py") == [TRAIN, *texts]


def test_files_without_a_lesson_stay_identical(chain):
    for file in ("model.py", "tools/figure.py"):
        chain.edit(f"{ONE}/{file}", "line 2", "another line")
    chain.run("carry")
    for file in ("model.py", "tools/figure.py"):
        assert set(chain.each(file)) == {COMMON[file].replace("line 2", "another line")}


def test_edits_in_several_steps_combine(chain):
    chain.edit(f"{ONE}/train.py", "line 1 of", "edit one of")
    chain.edit(f"{THREE}/train.py", "line 12 of", "edit three of")
    chain.run("carry")
    first = [text.replace("line 1 of", "edit one of") for text in (TRAIN, MESH, DATA, DATA)]
    both = first[3].replace("line 12 of", "edit three of")
    assert chain.each("train.py") == [*first[:2], both, both]


def test_carrying_twice_is_carrying_once(chain):
    chain.edit(f"{ONE}/train.py", "line 1 of", "edit one of")
    chain.write(f"{TWO}/new.py", "new = 1\n")
    (chain.root / ONE / "model.py").unlink()
    assert chain.run("carry")
    once = chain.everything()
    assert chain.run("carry") == ""
    assert chain.everything() == once


def test_an_edit_can_be_refined_and_taken_back_after_it_was_carried(chain):
    for old, new in (("line 1", "edit 1"), ("edit 1", "a better edit"), ("a better edit", "line 1")):
        chain.edit(f"{ONE}/train.py", old + " of", new + " of")
        chain.run("carry")
        expected = [t.replace("line 1 of", new + " of") for t in (TRAIN, MESH, DATA, DATA)]
        assert chain.each("train.py") == expected


def test_new_and_deleted_files(chain):
    chain.write(f"{TWO}/tools/new.py", "new = 1\n")
    (chain.root / ONE / "model.py").unlink()
    output = chain.run("carry")
    assert f"{THREE}/tools/new.py  new (+1 -0)" in output
    assert f"{TWO}/model.py  deleted (+0 -5)" in output
    assert chain.each("tools/new.py") == [None, *["new = 1\n"] * 3]
    assert chain.each("model.py") == [None] * 4


def test_a_file_that_a_lesson_dropped_is_not_brought_back(chain):
    chain.edit(f"{ONE}/toy.py", "line 2", "another line")
    chain.run("carry")
    toy = TOY.replace("line 2", "another line")
    assert chain.each("toy.py") == [toy, toy, None, None]


def conflict_in_step_three(chain: Chain) -> str:
    """Edit the line beside step 3's lesson; return the line of step 3's text with the edit."""
    chain.edit(f"{ONE}/train.py", "line 9 of", "edit nine of")
    return chain.run("carry", fails=True)


def test_a_conflict_is_named_and_goes_no_further(chain):
    output = conflict_in_step_three(chain)
    _, two, three, four = chain.each("train.py")
    line = three.splitlines().index(f"<<<<<<< {THREE}/train.py") + 1
    assert f"{THREE}/train.py: line {line}; carried no further" in output
    assert "||||||| base\n" in three and f">>>>>>> edit from {TWO}\n" in three
    assert two == MESH.replace("line 9 of", "edit nine of") and four == DATA
    before = chain.everything()
    assert f"{THREE}/train.py has conflict markers" in chain.run("carry", fails=True)
    assert chain.everything() == before


@pytest.mark.parametrize(
    "settled",
    [
        DATA.replace("line 9 of", "edit nine of"),
        DATA.replace("line 9 of", "something else of"),
        DATA,
        MESH,
        MESH.replace("line 9 of", "edit nine of"),
    ],
    ids=["both", "neither", "the step's", "the base", "the edit"],
)
def test_a_conflict_settled_by_hand_stays_settled_and_is_carried_on(chain, settled):
    conflict_in_step_three(chain)
    chain.write(f"{THREE}/train.py", settled)
    for _ in "again", "and again":
        chain.run("carry")
        assert chain.each("train.py")[2:] == [settled, settled]
    chain.edit(f"{ONE}/train.py", "line 1 of", "edit one of")
    chain.run("carry")
    settled = settled.replace("line 1 of", "edit one of")
    assert chain.each("train.py")[2:] == [settled, settled]


def test_a_conflict_in_one_file_does_not_hold_up_the_others(chain):
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    conflict_in_step_three(chain)
    assert len(set(chain.each("model.py"))) == 1


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({THREE: "some = 1\n", FOUR: "some = 2\n"}, {THREE: None}, "deleted in the step before"),
        ({}, {THREE: "some = 1\n", FOUR: "some = 2\n"}, "created in the step before"),
        ({THREE: "\0", FOUR: "\0 four"}, {THREE: "\0 three"}, "binary, changed in the step before"),
    ],
)
def test_conflicts_without_markers_are_named_and_change_nothing(chain, before, after, reason):
    for step, text in before.items():
        chain.write(f"{step}/some.py", text)
    chain.commit()
    for step, text in after.items():
        chain.write(f"{step}/some.py", text) if text else chain.delete(f"{step}/some.py")
    everything = chain.everything()
    assert f"{FOUR}/some.py: {reason}" in chain.run("carry", fails=True)
    assert chain.everything() == everything


def test_a_binary_file_is_copied_where_it_is_the_same(chain):
    for step in STEPS:
        chain.write(f"{step}/some.bin", "\0")
    chain.commit()
    chain.write(f"{ONE}/some.bin", "\0 edit")
    chain.run("carry")
    assert set(chain.each("some.bin")) == {"\0 edit"}


def test_dry_run_says_the_same_and_writes_nothing(chain):
    conflict_in_step_three(chain, "--dry-run")
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    before = chain.everything()
    output = chain.run("carry", "--dry-run", fails=True)
    assert chain.everything() == before
    assert chain.run("carry", fails=True) == output


def test_edits_already_committed_are_carried_from_an_older_base(chain):
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    chain.commit()
    assert chain.run("carry") == ""
    chain.run("carry", "--base", "HEAD~1")
    assert len(set(chain.each("model.py"))) == 1


@pytest.mark.parametrize("name", ["tools/figure.py", f"./{ONE}/tools/figure.py"])
def test_only_the_files_asked_for_are_carried(chain, name):
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    chain.edit(f"{ONE}/tools/figure.py", "line 2", "another line")
    chain.run("carry", name)
    assert len(set(chain.each("tools/figure.py"))) == 1
    assert len(set(chain.each("model.py"))) == 2


def test_readmes_and_ignored_files_stay_where_they_are(chain):
    chain.write(".gitignore", "*.log\n")
    for file in ("README.md", "run.log", "__pycache__/model.py"):
        chain.write(f"{ONE}/{file}", "something of its own\n")
    before = chain.everything()
    assert chain.run("carry") == ""
    assert chain.everything() == before


def test_a_step_that_was_never_committed_receives_and_hands_on_nothing(chain):
    chain.lengthen(6)
    chain.write("step5_more/lesson.py", "lesson = 5\n")
    chain.edit(f"{FOUR}/model.py", "line 2", "another line")
    assert "step5_more  is not in HEAD" in chain.run("carry")
    assert chain.read("step5_more/model.py") == chain.read(f"{FOUR}/model.py")
    assert chain.read("step6_more/model.py") == COMMON["model.py"]
    assert not (chain.root / "step6_more/lesson.py").exists()


def test_what_was_carried_and_thrown_away_is_pointed_out_and_carried_anew(chain):
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    chain.run("carry")
    chain.git("checkout", "--quiet", TWO, THREE, FOUR)
    assert f"{TWO}/model.py  is as it was" in chain.run("carry")
    chain.run("carry", "--anew")
    assert len(set(chain.each("model.py"))) == 1


# ---- check ---------------------------------------------------------------------------------------


def test_a_sound_chain_passes_with_a_line_for_each_step(chain):
    lines = chain.run("check").splitlines()
    assert [line.split()[0] for line in lines] == list(STEPS)
    assert lines[1].split(maxsplit=1)[1] == "1 files changed  +1 -0  limit 40"


def add_lines(count: int, file: str = "train.py"):
    def change(chain: Chain, step: str):
        chain.write(f"{step}/{file}", chain.read(f"{step}/{file}") + code("more", count))

    return change


@pytest.mark.parametrize(
    ("number", "file", "most"),
    [(4, "train.py", 40), (3, "train.py", 60), (9, "train.py", 150), (8, "model.py", 40)],
)
def test_the_lines_a_step_may_add(chain, number, file, most):
    chain.lengthen(9)
    ...
