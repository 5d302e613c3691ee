"""The pages show the code that is there, most of what a step adds, and in few words."""

import shutil
import subprocess
import sys
from pathlib import Path

import lessons
import milestones
import pytest
from conftest import ROOT

OLD = '''\
"""Train."""


def setup(args):
    model = build(args)
    return model
'''
NEW = '''\
"""Train on many ranks."""

import ring


def setup(args):
    model = build(args)
    ring.attach(model)
    return model
'''
RING = '''\
"""A ring."""

import torch

# Ranks in a circle.
SIZE = 3


def check_ring(args):
    assert args.size == SIZE


class Ring:
    """Whom a rank talks to."""

    left = None

    def __init__(self, rank):
        self.rank = rank

    @property
    def next(self):
        return (self.rank + 1) % SIZE


def attach(model):
    model.ring = Ring(0)
'''
PAGE = """\
# Step 2

## The code

### Milestone 1: The ring

#### 1. A circle

<!-- code ring.py: SIZE, Ring.next -->
<!-- end -->

Each rank has two neighbours.

### Milestone 2: Training

#### 2. Attach it

<!-- diff train.py: setup -->
<!-- end -->

One line.

## Read more
"""


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Two made-up steps; the folder of the second."""
    for folder, files in {
        "step1_model": {"train.py": OLD, "README.md": "# Step 1\n"},
        "step2_ring": {"train.py": NEW, "ring.py": RING, "flags.py": "x = 1\n", "README.md": PAGE},
    }.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    monkeypatch.setattr(lessons, "ROOT", tmp_path)
    forget()
    yield tmp_path / "step2_ring"
    forget()


def forget():
    for function in vars(lessons).values():
        getattr(function, "cache_clear", lambda: None)()


def test_the_real_lines_come_into_the_page(course):
    lessons.write(2)
    text = (course / "README.md").read_text()
    assert "```python\n# Ranks in a circle.\nSIZE = 3\n\n    @property\n    def next(self):" in text
    assert "`ring.py`, [lines 5 to 6](ring.py#L5-L6), [lines 21 to 23](ring.py#L21-L23)" in text
    assert "```diff\n def setup(args):\n     model = build(args)\n+    ring.attach(model)\n" in text
    assert lessons.renewed(course / "README.md") == text


def test_code_that_has_changed_is_noticed(course):
    lessons.write(2)
    (course / "ring.py").write_text(RING.replace("SIZE = 3", "SIZE = 4"))
    forget()
    problems = list(lessons.problems_of(course / "README.md"))
    assert any("shows old code" in problem for problem in problems)


@pytest.mark.parametrize(
    "directive, words",
    [
        ("code ring.py: Wheel", "ring.py defines no Wheel"),
        ("code wheel.py: Wheel", "no wheel.py"),
        ("diff train.py: docstring, setup", None),
        ("diff ring.py: Wheel", "defines no Wheel"),
    ],
)
def test_a_name_that_is_not_there_is_said(course, directive, words):
    page = course / "README.md"
    page.write_text(PAGE.replace("diff train.py: setup", directive))
    if words is None:
        assert '+"""Train on many ranks.' in lessons.renewed(page)
    else:
        with pytest.raises(lessons.LessonError, match=words):
            lessons.renewed(page)


def test_a_definition_that_did_not_change_has_no_diff(course):
    (course / "train.py").write_text(OLD + "\n\ndef more():\n    pass\n")
    with pytest.raises(lessons.LessonError, match="does not change setup"):
        lessons.renewed(course / "README.md")


def test_the_share_shown_counts_no_imports_and_no_checks(course):
    # Of ring.py 13 lines: docstring, comment and SIZE, Ring 8, attach 2; shown are 2 and 3. Of
    # train.py one line and the docstring are added; shown is the line.
    assert len(lessons.lesson_lines(course / "ring.py")) == 13
    assert len(lessons.lesson_lines(course / "train.py")) == 2
    assert lessons.lesson_lines(course / "flags.py") == set()
    assert lessons.share_shown(course / "README.md") == pytest.approx(100 * (5 + 1) / (13 + 2))
    assert lessons.not_shown(course)["train.py"] == {1}


def test_words_are_those_of_the_prose(course):
    page = course / "README.md"
    lessons.write(2)
    before = lessons.words(page)
    page.write_text(
        page.read_text() + "\nFive words stand here [now](README.md).\n\n```\nno\n```\n"
    )
    assert lessons.words(page) == before + 5


def test_the_walk_is_a_list_of_items(course):
    first, second = lessons.walk(course)
    assert (first.milestone, first.milestone_title, first.title) == (1, "The ring", "A circle")
    assert [piece.name for piece in first.pieces] == ["SIZE", "Ring.next"]
    assert first.explanation == "Each rank has two neighbours."
    assert (second.milestone, second.number, second.pieces[0].kind) == (2, 2, "diff")


def test_the_table_says_what_became_of_each_module(course):
    assert lessons.changes(course) == (
        "| file | what | added | deleted |\n|---|---|---:|---:|\n| `flags.py` | new | 1 | 0 |\n"
        "| `ring.py` | new | 27 | 0 |\n| `train.py` | changed | 4 | 1 |"
    )


def test_these_lessons_keep_the_rules():
    script = Path(lessons.__file__)
    done = subprocess.run([sys.executable, script, "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- a reader's own version -----------------------------------------------------------------------


def test_what_a_version_lacks_is_said_in_order(course, tmp_path):
    own = tmp_path / "mine" / "step2_ring"
    shutil.copytree(tmp_path / "step1_model", own)
    assert "`flags.py` of step2_ring" in milestones.missing(own)[1]
    shutil.copy(course / "flags.py", own)
    milestone, said = milestones.missing(own)
    assert milestone == 1 and said.startswith("Step 2 needs `ring.py` with `SIZE`; it is not there")
    assert "step2_ring/README.md, item 1, “A circle”" in said
    (own / "ring.py").write_text(RING.replace("def next", "def after"))
    assert "`ring.py` with `Ring.next`" in milestones.missing(own)[1]
    forget()
    (own / "ring.py").write_text(RING + "def (:\n")
    assert "`ring.py`, line 28: " in milestones.missing(own)[1]
    forget()
    (own / "ring.py").write_text(RING)
    milestone, said = milestones.missing(own)
    assert milestone == 2 and "changes `setup` in `train.py`; it is still that of step1" in said
    forget()
    (own / "train.py").write_text(NEW)
    assert milestones.missing(own) is None
    assert milestones.not_reached(own, 2) == (
        "Milestone 2, “Training”, is not reached. Read step2_ring/README.md, item 2."
    )


def check_of(own, *flags):
    command = [sys.executable, "-m", "pytest", f"--step-dir={own}", "-p", "no:cacheprovider"]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)


def test_a_copy_of_the_step_before_is_told_what_to_write_first(tmp_path):
    own = tmp_path / "step3_dataloader"
    shutil.copytree(ROOT / "step2_process_group", own)
    done = check_of(own)
    said = (done.stdout + done.stderr).strip().splitlines()
    assert done.returncode != 0 and len(said) == 1
    assert said[0].startswith("ERROR: Step 3 needs `flags.py`")


def test_a_milestone_that_is_not_reached_is_named(tmp_path):
    own = tmp_path / "step4_tensor_parallel"
    shutil.copytree(ROOT / "step4_tensor_parallel", own)
    done = check_of(own, "--milestone", "1")
    assert done.returncode == 0 and "Milestone 1 is reached." in done.stdout, done.stdout
    path = own / "tensor_parallel.py"
    path.write_text(path.read_text().replace("return grad, None\n", "return 2 * grad, None\n"))
    done = check_of(own)
    assert done.returncode == 1
    assert "2 times what it should be" in done.stdout
    assert "Milestone 1, “The sum at the end of a block”, is not reached." in done.stdout
    done = check_of(own, "--milestone", "7")
    assert done.returncode != 0 and "the milestones of this step are 1, 2" in done.stderr
