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
    chain.delete(f"{ONE}/model.py")
    assert chain.run("carry")
    once = chain.everything()
    assert chain.run("carry") == ""
    assert chain.everything() == once


def test_an_edit_can_be_refined_and_taken_back_after_it_was_carried(chain):
    for old, new in (
        ("line 1", "edit 1"),
        ("edit 1", "a better edit"),
        ("a better edit", "line 1"),
    ):
        chain.edit(f"{ONE}/train.py", old + " of", new + " of")
        chain.run("carry")
        expected = [t.replace("line 1 of", new + " of") for t in (TRAIN, MESH, DATA, DATA)]
        assert chain.each("train.py") == expected


def test_new_and_deleted_files(chain):
    chain.write(f"{TWO}/more/new.py", "new = 1\n")
    chain.delete(f"{ONE}/model.py")
    output = chain.run("carry")
    assert f"{THREE}/more/new.py  new (+1 -0)" in output
    assert f"{TWO}/model.py  deleted (+0 -5)" in output
    assert chain.each("more/new.py") == [None, *["new = 1\n"] * 3]
    assert chain.each("model.py") == [None] * 4


def test_a_file_that_a_lesson_dropped_is_not_brought_back(chain):
    chain.edit(f"{ONE}/toy.py", "line 2", "another line")
    chain.run("carry")
    toy = TOY.replace("line 2", "another line")
    assert chain.each("toy.py") == [toy, toy, None, None]


def conflict_in_step_three(chain: Chain) -> str:
    """Edit the line beside step 3's lesson and carry that; return what the tool prints."""
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
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    chain.edit(f"{ONE}/train.py", "line 9 of", "edit nine of")
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
    conflict_in_step_three(chain)
    chain.write(f"{THREE}/train.py", DATA)
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    chain.run("carry")
    chain.git("checkout", "--quiet", f"{TWO}/model.py")
    assert f"{TWO}/model.py  has lost what was carried into it" in chain.run("carry")
    chain.run("carry", "--anew", "model.py")
    chain.run("carry")
    assert len(set(chain.each("model.py"))) == 1 and chain.each("train.py")[2:] == [DATA, DATA]


def test_what_was_carried_is_forgotten_with_the_commit_it_started_from(chain):
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    chain.run("carry")
    chain.git("checkout", "--quiet", ".")
    for step in STEPS:
        chain.edit(f"{step}/model.py", "line 4", "a committed line")
    chain.commit()
    chain.edit(f"{ONE}/model.py", "line 2", "another line")
    chain.run("carry")
    assert len(set(chain.each("model.py"))) == 1


# ---- check ---------------------------------------------------------------------------------------


def test_a_sound_chain_passes_with_a_line_for_each_step(chain):
    lines = chain.run("check").splitlines()
    assert [line.split()[0] for line in lines] == list(STEPS)
    assert lines[1].split(maxsplit=1)[1] == "1 files changed  +1 -0  limit 40"


@pytest.mark.parametrize(
    ("number", "room", "limit"), [(3, 59, 60), (4, 40, 40), (8, 40, 40), (9, 300, 300)]
)
def test_how_many_lines_a_step_may_add(chain, number, room, limit):
    chain.lengthen(9)
    chain.grow(number, "train.py", code("more", room // 2))
    chain.grow(number, "data.py" if number > 3 else "model.py", code("rest", room - room // 2))
    chain.run("check")
    chain.grow(number, "model.py", "another = 1\n")
    expected = f"adds {limit + 1} lines to old files, {limit} are allowed"
    assert expected in chain.run("check", fails=True)


def test_new_files_the_command_line_and_the_topic_of_step_eight_are_not_counted(chain):
    chain.lengthen(8)
    for number, name in ((7, "pipeline"), (8, "schedule")):
        chain.write(f"step{number}_more/pipeline_parallel.py", code(name, 300))
        chain.write(f"step{number}_more/flags.py", code(f"flag_{name}", 300))
    assert "step8_more               2 files changed  +0 -0" in chain.run("check")


BREAKS = {
    "deletes more than it adds": (
        lambda chain: chain.edit(f"{FOUR}/train.py", code("train", 1), ""),
        f"{FOUR} deletes 1 lines of old files and adds only 0",
    ),
    "a long file": (
        lambda chain: chain.write(f"{FOUR}/tools/long.py", code("long", 301)),
        f"{FOUR}/tools/long.py has 301 lines, 300 are allowed",
    ),
    "a file brought back": (
        lambda chain: chain.write(f"{FOUR}/toy.py", TOY),
        f"{FOUR}/toy.py brings back what {THREE} dropped: the whole file",
    ),
    "a line brought back": (
        lambda chain: chain.edit(f"{TWO}/model.py", code("model", 1), "model_01 = 1\n"),
        f"{THREE}/model.py brings back what {TWO} dropped: {code('model', 1)}",
    ),
    "a flag that does nothing": (
        lambda chain: chain.grow(
            4, "train.py", FLAG.format('tp-size", dest="tp_size') + "args.tp_sizes\n"
        ),
        f"{FOUR}/train.py: --tp-size does nothing yet",
    ),
    "a flag of flags.py that does nothing": (
        lambda chain: chain.write(f"{FOUR}/flags.py", FLAG.format("cp_size")),
        f"{FOUR}/flags.py: --cp_size does nothing yet",
    ),
    "reformatting": (
        lambda chain: chain.edit(f"{FOUR}/model.py", "model_02 =", "\nmodel_02  ="),
        f"{FOUR}/model.py: reformatting only",
    ),
    "no README": (lambda chain: chain.delete(f"{TWO}/README.md"), f"{TWO}/README.md is missing"),
    "no train.py": (lambda chain: chain.delete(f"{FOUR}/train.py"), f"{FOUR}/train.py is missing"),
    "a gap": (
        lambda chain: (chain.root / THREE).rename(chain.root / "later"),
        "the steps are numbered [1, 2, 4]",
    ),
    "two of a number": (
        lambda chain: (chain.root / THREE).rename(chain.root / "step2_again"),
        "the steps are numbered [1, 2, 2, 4]",
    ),
    "not Python": (
        lambda chain: chain.grow(4, "model.py", "a step in prose\n"),
        f"{FOUR} has a file that is not Python",
    ),
}


@pytest.mark.parametrize(("violate", "message"), BREAKS.values(), ids=BREAKS)
def test_each_broken_rule_is_named(chain, violate, message):
    violate(chain)
    assert message in chain.run("check", fails=True)


def test_what_the_rules_let_pass(chain):
    chain.write(f"{FOUR}/long.py", code("long", 300))
    chain.grow(3, "train.py", FLAG.format("tp-size") + FLAG.format("cp-size"))
    chain.grow(3, "group.py", 'print(args.tp_size, getattr(args, "cp_size"))\n')
    chain.edit(f"{FOUR}/data.py", "line 1", "another line")
    for step in (THREE, FOUR):
        chain.write(f"{step}/some.bin", f"\0 {step}")
    moved = code("model", 5).removeprefix(code("model", 1)) + code("model", 1)
    chain.write(f"{TWO}/model.py", moved)
    for step, text in zip(STEPS, ("short = 1\n", "brief = 2\n", "short = 1\n"), strict=False):
        chain.write(f"{step}/short.py", text)
    chain.run("check")


# ---- diff, table and the command line ------------------------------------------------------------


def test_diff_shows_what_a_step_adds(chain):
    output = chain.run("diff", "3")
    assert f"--- a/{TWO}/train.py\n+++ b/{THREE}/train.py\n" in output
    assert '\n+lesson = "the data' in output
    assert f"--- /dev/null\n+++ b/{THREE}/data.py\n" in output
    assert f"--- a/{TWO}/toy.py\n+++ /dev/null\n" in output
    assert "model.py" not in output and chain.run("diff", "4") == ""


def test_diff_counts_and_shows_the_readme_when_asked(chain):
    chain.grow(3, "README.md", "A line.\n")
    counts = "7\t0\tdata.py (new)\n0\t4\ttoy.py (deleted)\n1\t0\ttrain.py (changed)\n"
    assert chain.run("diff", "3", "--stat") == counts
    assert chain.run("diff", "3", "--stat", "--readme") == "1\t0\tREADME.md (changed)\n" + counts


def test_diff_is_coloured_on_a_terminal(chain):
    ours, theirs = os.openpty()
    command = [sys.executable, str(TOOL), "diff", "2", "--root", str(chain.root)]
    subprocess.run(command, stdout=theirs, env=ENVIRONMENT, check=True)
    assert b"\x1b[" in os.read(ours, 100)


TABLE_THREE = """\
| file | what | added | deleted |
|---|---|---:|---:|
| `data.py` | new | 7 | 0 |
| `train.py` | changed | 1 | 0 |
| `toy.py` | deleted | 0 | 4 |
| `group.py`, `model.py`, `tools/figure.py` | unchanged | | |
"""


def test_table_says_what_became_of_each_module(chain):
    assert chain.run("table", "3") == TABLE_THREE
    assert "| `train.py` | new | 14 | 0 |" in chain.run("table", "1")
    assert f"{THREE}\n\n{TABLE_THREE}" in chain.run("table")


def test_table_is_written_between_its_markers_and_checked(chain):
    chain.write(f"{THREE}/README.md", f"above\n{MARKERS}below, <!-- chain:end -->\n")
    assert chain.run("table", "3", "--write") == f"{THREE}/README.md  renewed\n"
    begin, end = MARKERS.splitlines(keepends=True)
    expected = f"above\n{begin}\n{TABLE_THREE}\n{end}below, {end}"
    assert chain.read(f"{THREE}/README.md") == expected
    assert chain.read(f"{TWO}/README.md") == MARKERS

    chain.run("table", "--write")
    assert chain.run("table", "--check") == ""
    chain.grow(4, "train.py", "one_more = 1\n")
    chain.write(f"{TWO}/README.md", "no markers\n")
    output = chain.run("table", "--check", fails=True)
    assert f"{FOUR}/README.md has an old table: run table 4 --write" in output
    assert f"{TWO}/README.md lacks <!-- chain:begin -->" in output
    assert ONE not in output and THREE not in output


@pytest.mark.parametrize(
    ("arguments", "root", "remedy"),
    [
        ("diff 1", ".", "ask for step 2"),
        ("diff 7", ".", f"choose one of {ONE}, {TWO}"),
        ("diff many", ".", "diff --help"),
        ("table 7", ".", f"choose one of {ONE}, {TWO}"),
        ("carry nothing.py", ".", "no step has a file nothing.py to carry: check its name"),
        ("carry --base nowhere", ".", "nowhere (check --root, and that there is a commit)"),
        ("check", ONE, "name the repository that has them with --root"),
        ("check", "..", "not a git repository"),
        ("check", "nowhere", "check --root"),
    ],
)
def test_a_wrong_call_gets_one_line_that_says_what_to_do(chain, arguments, root, remedy):
    assert remedy in chain.run(*arguments.split(), root=root, fails=True)


def test_this_repository_keeps_its_chain():
    for command in (["check"], ["table", "--check"]):
        done = subprocess.run([sys.executable, str(TOOL), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
