"""The coach opens every exercise of the lessons, and its checks tell right from wrong."""

import re

import coach
import exercise_checks
import exercises
import lessons
import pytest
import student

RING = """
    import torch.distributed as dist
    rank, size = dist.get_rank(), dist.get_world_size()
    def send(): dist.send(mine, (rank + 1) % size)
    def take(): dist.recv(received, (rank - 1) % size)
    for act in (take, send) if rank == 0 else (send, take): act()
"""
SIMULATION = """
    queues, come, free = [list(p) for p in passes], {}, [0.0] * len(passes)
    while any(queues):
        for rank, queue in enumerate(queues):
            while queue and (queue[0] in come or queue[0][:2] == ("forward", 0)):
                one = queue.pop(0)
                begun = max(free[rank], come.get(one, 0.0))
                free[rank] = begun + (forward if one.kind == "forward" else backward)
                then = enables(one)
                if then:
                    come[then] = free[rank] + message * (then.stage != one.stage)
    return max(free)
"""
LAYOUT = "--cp_size 4 --dp_size 2 --dp_engine zero3 --activation_checkpointing "
LAYOUT += "--gradient_accumulation_steps 4"
BOTH = "    for group in (first, second) if rank == 0 else (second, first):\n"
BOTH += "        dist.all_reduce(x, group=group)\n"
BODY = "    raise NotImplementedError\n"
# A stub, what stands in it, what a right solution has there, a wrong one, and what that is told.
SOLVED = [
    ("step2_process_group_README_2", BODY, RING, RING.replace("if rank == 0 else (send, take)", ""),
     "on 2 ranks, rank 0 received RuntimeError"),
    ("step2_process_group_HANGS_1", BODY, BOTH, BOTH.replace("(second, first)", "(first, second)"),
     "rank 1 reduces in"),
    ("step9_4d_INTERLEAVED_1", BODY, SIMULATION, SIMULATION.replace("message *", "0 *"),
     "factor 1, a message of 0.5"),
    ("step9_4d_README_2", 'FLAGS = ""', f'FLAGS = "{LAYOUT}"', 'FLAGS = "--dp_size 8"',
     "GB, and has 80"),
]  # fmt: skip


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A coach's desk of a step, and what it said."""
    monkeypatch.setattr(student, "HOME", tmp_path / "my_steps")
    said = []
    return lambda number: (
        exercises.Exercises(number, said.append, said.append, coach.run_checks),
        said,
    )


@pytest.mark.parametrize("name, body, right, wrong, told", SOLVED, ids=lambda value: value[:28])
def test_code_of_ones_own_is_checked(desk, name, body, right, wrong, told):
    number = lessons.step_number(lessons.ROOT / name)
    coaching, said = desk(number)
    (one,) = [one for one in coaching.all if one.stub and one.stub.stem == name]
    coaching.obey(str(one.number), None)
    text = one.place.read_text()
    assert body in text
    for solution, answer in ((wrong, told), (right, "That is right")):
        one.place.write_text(text.replace(body, solution))
        said.clear()
        coaching.obey(str(one.number), "check")
        assert answer in " ".join(said), said


def test_a_changed_copy_is_judged_by_the_milestone_that_writes_it(desk):
    coaching, said = desk(1)
    number = next(one.number for one in coaching.all if one.title == "A mean")
    coaching.obey(str(number), "check")
    assert "Nothing is changed yet" in said[-1]
    path = coaching.all[number - 1].place / "model.py"
    path.write_text(path.read_text().replace('reduction="sum"', 'reduction="mean"'))
    coaching.obey(str(number), "check")
    assert "Changed: cross_entropy in model.py" in said
    assert re.search(r"Milestone 1 notices it .*\n.*cross_entropy", said[-2])
    coaching.obey(str(number), "answer")
    assert said[-1] == coaching.all[number - 1].answer
    coaching.obey(str(number), None)  # opening it again leaves the change alone
    assert "mean" in path.read_text()


def test_every_exercise_is_there(desk):
    for step in lessons.steps():
        coaching, said = desk(lessons.step_number(step))
        for page in lessons.pages(step):
            part = page.read_text().partition("\n## Check yourself\n")[2].partition("\n## ")[0]
            titles = re.findall(r"^\d+\. \*(.+?)\.?\*", part, re.M)
            assert titles == [one.title for one in coaching.all if one.page == page.name]
        assert all(one.answer and one.text for one in coaching.all)
        said.clear()
        coaching.obey(None, None)
        assert len(said) == len(coaching.all) + 1
    stubs = {path.name for path in exercises.STUBS.glob("*.py")}
    known = {one.stub.name for n in range(1, 10) for one in exercises.exercises(n) if one.stub}
    assert stubs == known == {f"{name}.py" for name in exercise_checks.CHECKS}


def test_an_exercise_that_is_not_there(desk):
    with pytest.raises(lessons.LessonError, match="exercise 99: this step has 1 to"):
        desk(4)[0].obey("99", None)
