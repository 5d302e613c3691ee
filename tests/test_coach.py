"""The coach: stubs, what is next, what is wrong, and that nothing of a reader's is lost."""

import ast
import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import coach
import hints
import lessons
import pictures
import pytest
import stubs
import student


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(student, "HOME", tmp_path / "my_steps")
    return tmp_path / "my_steps"


@pytest.fixture
def opened(home):
    """opened(number): a step of a reader, begun from our step before."""

    def open_step(number):
        one = student.Student(number)
        one.open(lessons.before(one.ours))
        return one

    return open_step


def without_imports(text):
    """What a file does, whatever its first words and the order of its imports."""
    tree = ast.parse(text)
    kept = [n for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom)]
    return {ast.dump(node) for node in kept if not stubs.is_text(node)}


@pytest.mark.parametrize("number", range(1, len(lessons.steps()) + 1))
def test_from_stubs_to_our_step(opened, number):
    """The items that are next, each taken from us, lead to our step."""
    one, seen = opened(number), []
    while (found := one.next_item())[0] or one.waits_for():
        item, lack = found
        if item is None:  # the first page is done
            for milestone in range(1, one.waits_for()):
                one.reached(milestone, 0)
            continue
        assert lack and (item.page, item.number) not in seen, (item, lack)
        seen.append((item.page, item.number))
        one.take(item)
    assert len(seen) >= 0.75 * len(lessons.walk(one.ours)), "most items are to be written"
    for path in one.ours.glob("*.py"):
        mine = (one.own / path.name).read_text()
        assert without_imports(path.read_text()) <= without_imports(mine), path.name


@pytest.mark.parametrize("number", range(1, len(lessons.steps()) + 1))
def test_what_is_laid_holds_no_line_to_write(opened, number):
    one = opened(number)
    while one.waits_for():
        one.lay_later()
    for path in one.ours.glob("*.py"):
        past = lessons.before(one.ours)
        if lessons.is_no_lesson(path) or (past and (past / path.name).exists()):
            continue
        laid = (one.own / path.name).read_text()
        walked = {
            n
            for i in lessons.walk(one.ours)
            for p in i.pieces
            for n in p.lines
            if p.file == path.name
        }
        for node in stubs.functions_of(path.read_text()):
            if node.lineno in walked:
                name = hints.full_name(path, node)
                at = lessons.definitions_in(laid)[name]
                body = "\n".join(laid.splitlines()[at.start - 1 : at.stop - 1])
                assert "raise NotImplementedError" in body or len(node.body) == 1, name


def test_hints_say_more_each_time(opened, capsys):
    one = opened(4)
    item = next(i for i in lessons.walk(one.ours) if i.title == "Shares become a sum")
    task, idea, outline, lines = (
        hints.task(item, one.ours),
        *(hints.hint(item, one.ours, n) for n in (1, 2, 3)),
    )
    assert "write `AllReduce.forward`" in task and "pg.all_reduce" not in task
    calls = "`ctx.mark_dirty`, `pg.all_reduce`, `function.apply`"
    assert idea == f"{item.explanation}\n\nOur lines call {calls}."
    changed = next(i for i in lessons.walk(one.ours) if i.title == "The gradient norm")
    assert "def gradient_norm(parameters, names, group):" in hints.task(changed, one.ours)
    assert "with all_reduce" in outline and "pg.all_reduce(x, group)" not in outline
    assert "return pg.all_reduce(x, group)" in lines
    assert [one.next_hint(item) for _ in range(4)] == [1, 2, 3, 3]


def test_a_session(opened, home, capsys, monkeypatch):
    """Begin, ask, take one item, write another one wrongly."""

    def typed(*words):
        monkeypatch.setattr(sys, "argv", ["coach.py", *words])
        coach.main(coach.parse_args())
        return capsys.readouterr().out

    assert "4  step4_tensor_parallel    not begun" in typed()
    assert "Step 4 begins with our step 3." in typed("4", "hint")
    assert "0 of 5 milestones" in typed()
    for _ in range(3):
        typed("4", "skip")
    mine = home / "step4_tensor_parallel" / "tensor_parallel.py"
    right = mine.read_text()
    assert "Milestone 1, The sum at the end of a block: reached" in typed("4", "--once")
    said = typed("4", "--once")
    assert "reached (" not in said and "item 4, milestone 2" in said, "it is not checked again"
    assert "1 of 5 milestones" in typed()
    assert right == mine.read_text()

    one = student.Student(4)
    one.done()
    monkeypatch.setattr(student.Student, "next_item", lambda self: (None, ""))
    assert "4  step4_tensor_parallel    done  " in typed()
    mine.unlink()
    assert "4  step4_tensor_parallel    done, now broken" in typed()


def test_words_are_about_what_is_wrong(opened, capsys):
    """After a failed check a hint is about its milestone, and about the function it names."""
    one = opened(4)
    one.failed(1, "the output of RowParallelLinear is off by up to 4.7")
    assert one.wrong_item().title == "Cut by input features"
    one.failed(1, "something is off")
    assert one.wrong_item().number == 1
    coach.tell(one, 4, "cross_entropy of a part is off")  # `part` is of milestone 1
    assert "item 8 of README.md, The loss from two numbers a token." in capsys.readouterr().out
    assert one.wrong_item().title == "The loss from two numbers a token"
    one.reached(1, 9)
    assert one.wrong_item() is None


def test_what_a_reader_breaks_is_said_and_kept(opened, monkeypatch, capsys):
    """A syntax error, a file that is gone, an endless loop: a sentence each."""
    one = opened(4)
    path = one.own / "tensor_parallel.py"
    laid = path.read_text()
    path.write_text("def (:\n" + laid)
    assert one.broken().startswith("tensor_parallel.py, line 1: ")
    assert not coach.look(one) and "item" not in capsys.readouterr().out
    with pytest.raises(lessons.LessonError, match="tensor_parallel.py, line 1: .* Mend that first"):
        one.take(one.next_item()[0])
    assert path.read_text() == "def (:\n" + laid
    path.unlink()
    assert "`tensor_parallel.py` with `part`; it is not there yet" in one.next_item()[1]
    assert one.broken().startswith("tensor_parallel.py is gone. As it was laid at first: ")
    one.take(one.next_item()[0])  # ours, although the file is gone
    assert "def part(" in path.read_text()

    endless = laid + "\nwhile True:\n    pass\n"
    path.write_text(endless)
    monkeypatch.setattr(coach, "LONGEST", 10)
    wrong, seconds = coach.check(one, 1, 1)
    assert "is there an endless loop?" in wrong and seconds < 40
    assert path.read_text() == endless


def lines_of(path, name):
    """The text of a function in a file."""
    text = path.read_text()
    at = lessons.definitions_in(text)[name]
    return "\n".join(text.splitlines()[at.start - 1 : at.stop - 1]) + "\n"


def processes_with(mark):
    """The processes that inherited a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are seen in /proc")
def test_ctrl_c_in_a_check_ends_its_processes(opened, tmp_path, monkeypatch):
    """Every rank is in an endless loop; the reader's file stays as it is."""
    one = opened(4)
    one.take(one.next_item()[0])
    path, begun = one.own / "tensor_parallel.py", tmp_path / "begun"
    head = path.read_text().split("def part(")[1].splitlines()[0]
    endless = f"def part({head}\n    open({str(begun)!r}, 'w')\n    while True:\n        pass\n"
    endless = path.read_text().replace(lines_of(path, "part"), endless)
    path.write_text(endless)
    mark = f"COACH_TEST={tmp_path}"
    monkeypatch.setenv(*mark.split("="))

    def press_ctrl_c():
        while not begun.exists():
            time.sleep(0.1)
        assert len(processes_with(mark)) >= 3, "pytest and two ranks"
        os.kill(os.getpid(), signal.SIGINT)

    # A shell that starts something with & lets it ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    presser = threading.Thread(target=press_ctrl_c)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        coach.check(one, 1, 1)
    presser.join()
    signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 10
    while processes_with(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes_with(mark)
    assert path.read_text() == endless


def test_what_stands_is_named():
    """A loop or a wait in a rank, as pytest prints it: the coach says where each rank is."""
    said = "E   harness.RankError: ranks [0, 1] took over 20 s\n"
    said += "E   rank 0 is in backward (tensor_parallel.py, line 48): pass\n"
    said += "E   rank 1 waits in all_reduce, called by forward (x.py, line 7): y\n"
    words = coach.in_words(said, Path("."))
    assert "rank 0 is in backward (tensor_parallel.py, line 48): pass" in words
    assert "rank 1 waits in all_reduce, called by forward (x.py, line 7)" in words
    assert "endless loop" in words


def test_who_died_is_named_first():
    """Others fail because of it, and may be heard first."""
    said = "E   harness.RankError: rank 0 of 2 failed: RuntimeError: Connection reset by peer\n"
    said += "E   rank 1 died, exit code 3\n"
    assert coach.in_words(said, Path(".")).startswith("rank 1 died, exit code 3")


@pytest.mark.slow
def test_a_rank_that_dies_is_named(opened):
    one = opened(4)
    one.take(one.next_item()[0])
    path = one.own / "tensor_parallel.py"
    ours = lines_of(path, "part")
    head, doc = (
        ours.splitlines()[0],
        "    import os\n    if group.rank == 1:\n        os._exit(3)\n",
    )
    path.write_text(path.read_text().replace(head + "\n", head + "\n" + doc, 1))
    wrong, _ = coach.check(one, 1, 1)
    assert "rank 1" in wrong


def test_the_coach_writes_only_in_its_folder(opened, home):
    one = opened(4)
    one.take(one.next_item()[0])
    one.keep()
    assert {path.name for path in home.parent.iterdir()} == {"my_steps"}
    assert {path.name for path in home.iterdir()} == {".coach", "step4_tensor_parallel"}
    copies = list((one.aside / "before").iterdir())
    assert [path.name for path in copies] == ["tensor_parallel.py.1"], "ours never replaces unseen"


def test_an_opened_step_is_there_whole_or_not_at_all(home, monkeypatch):
    """Interrupted while it is laid, a step begins anew at the next call."""
    one = student.Student(4)

    def interrupted(*_):
        raise KeyboardInterrupt

    lay = stubs.lay
    monkeypatch.setattr(stubs, "lay", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.open(lessons.before(one.ours))
    assert not student.Student(4).is_open
    monkeypatch.setattr(stubs, "lay", lay)
    one.open(lessons.before(one.ours))
    assert student.Student(4).is_open and one.next_item()[0].number == 1


def test_a_picture_shows_what_a_schedule_does(opened, tmp_path):
    """Ours meets its target; without a warm-up fewer are alive, and it takes longer or stands."""
    said, one = [], opened(8)
    for item in lessons.walk(one.ours):
        one.take(item)
    pictures.picture(8, one.own, tmp_path / "picture.png", said.append)
    assert "  stage 3 |···0aa1bb2cc3dd4ee5ff6gg7hh······|" in said
    assert "ticks: 33 (target: 33)" in said and "alive on stage 0: 4 (target: 4)" in said
    assert (tmp_path / "picture.png").stat().st_size > 5000

    path = one.own / "pipeline_parallel.py"
    ours = "stage.group.size - 1 - stage.group.rank, stage.micro_batches"
    assert ours in path.read_text()
    path.write_text(path.read_text().replace(ours, "0, stage.micro_batches"))
    said.clear()
    pictures.picture(8, one.own, tmp_path / "picture.png", said.append)
    assert "ticks: 33 (target: 33)" not in said
    with pytest.raises(lessons.LessonError, match="has no picture"):
        pictures.picture(4, one.own, tmp_path / "picture.png", said.append)


def test_a_name_that_comes_from_another_module_is_imported_anew():
    text = stubs.with_imports("from a import f, g\n", "from a import g\nfrom b import f\n")
    assert text == "from a import f, g\nfrom b import f\n"


def test_what_a_further_page_is_about_stays_ours_until_its_milestone(opened):
    one = opened(9)
    first, second, *_ = stubs.later_milestones(one.ours)
    one.lay_later()
    left = {
        (page, n) for file in one.own.glob("*.py") for page, n in stubs.left_in(file.read_text())
    }
    begun = {(i.page, i.number): i.milestone for i in lessons.walk(one.ours)}
    later = {begun[item] for item in left if begun[item] >= first}
    assert later == {first} and one.waits_for() == second


def test_a_function_of_mine_with_a_name_of_ours_is_no_stub(opened):
    one = opened(9)
    own = "class Mine:\n    def __init__(self):\n        self.x = 1\n\n\n"
    milestone = stubs.later(one.ours)["owners.py"]
    text = stubs.stubbed_for(
        milestone, one.ours, "owners.py", own + (one.ours / "owners.py").read_text()
    )
    assert text.startswith(own) and stubs.left_in(text)
