"""The labs: each mistake can be planted, nothing gives it away, and its check finds it."""

import ast
import io
import tokenize

import coach
import lessons
import pytest
import student
from coach_labs import Desk
from labs import labs
from launch import launch

LABS = list(labs().values())
each = pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)


def comments_of(text):
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.string for token in tokens if token.type == tokenize.COMMENT}


def names_of(text):
    nodes = list(ast.walk(ast.parse(text)))
    return {getattr(n, "id", None) or getattr(n, "attr", None) for n in nodes}


@each
def test_a_lab_can_be_opened_and_nothing_gives_it_away(lab, tmp_path):
    ours, planted = (lab.ours / lab.file).read_text(), lab.planted()
    assert ast.dump(ast.parse(ours)) != ast.dump(ast.parse(planted)), "it changes nothing"
    assert comments_of(planted) <= comments_of(ours), "a comment gives it away"
    step = "".join(path.read_text() for path in lab.ours.glob("*.py"))
    assert all(name in step for name in names_of(planted) - names_of(ours) if name)
    lab.open(tmp_path / "1")
    mine = tmp_path / "1" / lab.step
    changed = [
        p.name for p in lab.ours.glob("*.py") if p.read_text() != (mine / p.name).read_text()
    ]
    assert changed == [lab.file]
    assert lab.symptoms.strip() and lab.story.strip() and lab.level in (1, 2, 3)
    assert lab.name.replace("_", " ") not in lab.symptoms


@pytest.mark.slow
@each
def test_the_named_check_finds_it(lab, tmp_path):
    lab.open(tmp_path / "1")
    mine = tmp_path / "1" / lab.step
    wrong, _ = coach.run_checks(lab.pytest_flags(mine), mine)
    assert wrong, f"{lab.check} passes with the mistake"
    (mine / lab.file).write_text((lab.ours / lab.file).read_text())
    wrong, _ = coach.run_checks(lab.pytest_flags(mine), mine)
    assert not wrong, wrong


@pytest.mark.slow
@each
def test_its_losses_look_as_the_lab_says(lab, tmp_path):
    """`same`: the first ten losses within 2 % of ours; `differs`; `none`: it does not train."""
    lab.open(tmp_path / "1")
    ours, theirs = (
        launch(step, lab.run, lab.ranks or None, timeout=120)
        for step in (lab.ours, tmp_path / "1" / lab.step)
    )
    pairs = list(zip(ours.metrics[:10], theirs.metrics[:10], strict=False))
    near = all(abs(b["loss"] - a["loss"]) <= 0.02 * a["loss"] for a, b in pairs)
    if lab.loss == "none":
        assert theirs.code != 0
    else:
        assert len(pairs) == 10 and near == (lab.loss == "same"), pairs[-1]


def test_the_desk_says_why_and_keeps_what_another_call_found(tmp_path, monkeypatch):
    monkeypatch.setattr(student, "HOME", tmp_path / "my_steps")
    said, (one, other) = [], LABS[:2]
    checking, naming = (Desk(said.append, None) for _ in range(2))  # no check is run here
    checking.open(one)
    naming.keep(other, found=1)
    checking.keep(one, mended=1)
    assert Desk(said.append, None).state(other) == "found"
    checking.judge(one)
    assert said[-1] == "Not mended: the file with the mistake is as it was."
    path = checking.folder(one) / one.file
    path.write_text("def (:\n" + path.read_text())
    checking.judge(one)
    assert said[-1].startswith(f"{one.file}, line 1: ")
    for place in (("nope.py", 1), (one.file, 99999)):
        with pytest.raises(lessons.LessonError, match="is not in this lab"):
            checking.judge_place(one, *place)
