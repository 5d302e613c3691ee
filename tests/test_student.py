"""A scripted student builds each step from its stubs, and writes one wrong line in each milestone.

`wrong_lines/STEP.yaml` lists the mistakes: the milestone, the file, our line, the wrong one, and a
word of what the student must be told.
"""

import coach
import lessons
import milestones
import pytest
import student
import yaml
from conftest import ROOT

FOLDER = ROOT / "tests" / "wrong_lines"
LONGEST = 15  # seconds, on two quiet cores


def mistakes_in(step):
    path = FOLDER / f"{step.name}.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else []


def on(mistakes, milestone):
    return [mistake for mistake in mistakes if mistake["milestone"] == milestone]


@pytest.fixture
def student_of(tmp_path, monkeypatch):
    """student_of(step): a student who has the stubs of a step."""
    monkeypatch.setattr(student, "HOME", tmp_path / "my_steps")

    def begin(step):
        one = student.Student(lessons.step_number(step))
        one.open(lessons.before(step))
        return one

    return begin


def write_up_to(one, milestone):
    """Write our lines for all items of the milestones up to this one."""
    while (item := one.next_item()[0]) and item.milestone <= milestone:
        one.take(item)


def told_of(one, mistake):
    """What a student is told who writes a wrong line, which is mended again."""
    path = one.own / mistake["file"]
    text = path.read_text()
    assert text.count(mistake["ours"]) == 1, f"not once in {path.name}: {mistake['ours']}"
    path.write_text(text.replace(mistake["ours"], mistake["wrong"]))
    try:
        told, _ = coach.check(one, mistake["milestone"], mistake["milestone"])
    finally:
        path.write_text(text)
    return told


def build(one, mistakes, subtests, last):
    for milestone in range(1, last + 1):
        write_up_to(one, milestone)
        with subtests.test(f"milestone {milestone}, our lines"):
            told, seconds = coach.check(one, milestone, milestone)
            assert told is None, told
            one.reached(milestone, seconds)
            print(f"{one.ours.name} milestone {milestone}: {seconds:.1f} s")
        for mistake in on(mistakes, milestone):
            with subtests.test(f"milestone {milestone}: {mistake['wrong']}"):
                told = told_of(one, mistake)
                assert told and mistake["says"] in told, told


def test_the_last_pipeline_is_built_from_its_stubs(student_of, subtests):
    """The short version of the test below: step 8, and five wrong lines."""
    step = lessons.step_of(8)
    mistakes = mistakes_in(step)
    few = [m for n, most in ((1, 2), (2, 2), (3, 1)) for m in on(mistakes, n)[:most]]
    assert len(few) == 5
    build(student_of(step), few, subtests, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # some seconds a wrong line, and more where others compute too
@pytest.mark.parametrize("step", lessons.steps(), ids=lambda step: step.name)
def test_each_step_is_built_from_its_stubs(step, student_of, subtests):
    one = student_of(step)
    build(one, mistakes_in(step), subtests, max(milestones.titles(step)))
    assert one.next_item()[0] is None


def test_each_milestone_has_a_wrong_line():
    count = 0
    for step in lessons.steps():
        made = {mistake["milestone"] for mistake in mistakes_in(step)}
        assert made == set(milestones.titles(step)), step.name
        count += len(mistakes_in(step))
        for mistake in mistakes_in(step):
            text, ours = (step / mistake["file"]).read_text(), mistake["ours"]
            assert text.count(ours) == 1, f"not once in {step.name}/{mistake['file']}: {ours}"
    assert count >= 40
