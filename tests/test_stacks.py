"""What the harness says of ranks that fail, and of ranks that wait for each other."""

import multiprocessing
import re
import time
from types import SimpleNamespace

import pytest
import stacks
import workers_waiting
from conftest import ROOT
from harness import RankError, World
from stacks import Frame, Watch, causes_of_deadlock, needs_others, one_line, standing

LAST = ROOT / "step9_4d"
SMALL = "--num_hidden_layers 2 --seq_len 16 --micro_batch_size 1 --dataset_name random "


def text_of(step_dir, size, function, *args, **limits):
    """The RankError of a world of its own, and the seconds until it came."""
    with World(step_dir, size) as world:
        world.run(workers_waiting.nothing)  # the processes are there
        begun = time.monotonic()
        with pytest.raises(RankError) as error:
            world.run(function, *args, **limits)
        return str(error.value), time.monotonic() - begun


# --- errors ---------------------------------------------------------------------------------------


def test_the_first_line_is_the_error_and_the_traceback_begins_in_own_code():
    text, _ = text_of(LAST, 1, workers_waiting.fail, "in the step")
    lines = text.splitlines()
    assert re.match("rank 0 of 1 failed: AttributeError: 'str' object has no attribute", lines[0])
    assert lines[1] == "Traceback (most recent call last):"
    assert "tests/workers_waiting.py" in lines[2] and "in fail" in lines[2]
    assert "step9_4d/model.py" in text and "in cross_entropy" in text
    assert "harness.py" not in text and "multiprocessing" not in text


def test_an_error_that_another_one_led_to_shows_both():
    text, _ = text_of(LAST, 1, workers_waiting.fail, "twice")
    assert text.splitlines()[0] == "rank 0 of 1 failed: RuntimeError: the second one"
    assert "ValueError: the first one" in text and "harness.py" not in text


def test_an_error_in_one_line():
    assert one_line(ValueError("a\nb")) == "ValueError: a"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(SystemExit("error: no")) == "SystemExit: error: no"


DUMP = f"""  File "{LAST}/train.py", line 1 in setup
  File "{stacks.TESTS}/harness.py", line 1 in serve
Thread 2 (most recent call first):
  File "/lib/other.py", line 1 in a
  File "/lib/other.py", line 1 in b
  File "/lib/other.py", line 1 in c
"""


def test_who_died_comes_before_those_who_lost_it(tmp_path):
    """Where a death and the error that it causes elsewhere are found at the same time."""
    error = (False, "failed: connection closed by peer")

    world = World(LAST, 2)
    world.processes = [SimpleNamespace(join=lambda _: None, exitcode=code) for code in (0, -9)]
    world.stack_files = [tmp_path / "0", tmp_path / "1"]
    world.stack_files[1].write_text(f"Thread 1 (most recent call first):\n{DUMP}")
    (mine, theirs), (dead, closed) = multiprocessing.Pipe(), multiprocessing.Pipe()
    theirs.send(error)
    closed.close()
    (first, (good, words)), (second, _) = world.received([mine, dead], {mine: 0, dead: 1})
    assert (first, second, good) == (1, 0, False)
    lines = words.splitlines()
    assert lines[0] == "died, killed by SIGKILL"
    assert re.search("step9_4d/train.py, line 1, in setup: ", lines[2]), words
    assert lines[-1].startswith("- Somebody killed it, perhaps the system because memory was")


def test_sizes_that_do_not_fit_are_explained():
    """gloo ends the process then."""
    text, _ = text_of(LAST, 2, workers_waiting.sizes_that_do_not_fit)
    assert re.match(r"rank \d of 2 died, killed by SIGABRT\n", text), text
    assert "in add_up: pg.all_reduce(x, group)" in text
    assert "or one with a tensor of another size" in text
    assert re.search(r"^rank \d (failed: RuntimeError|died)", text, re.MULTILINE), text


# --- ranks that wait for each other ---------------------------------------------------------------


@pytest.mark.parametrize(
    "how, said",
    [
        ("other calls",
         ["rank 0 waits in pg.all_gather, called by wait_for_each_other (workers_waiting.py, l",
          "rank 1 waits in pg.all_reduce, called by add_up (workers_waiting.py, line",
          "All ranks of a group must make the same calls in the same order"]),
        ("receive first",
         ["rank 0 waits in receive_then_send (workers_waiting.py, line", "message: handle.wait()",
          "Post a send and a receive that need each other together"]),
    ],
)  # fmt: skip
def test_ranks_that_wait_for_each_other_are_found(how, said):
    text, seconds = text_of(LAST, 2, workers_waiting.wait_for_each_other, how, idle=1)
    assert text.startswith("deadlock: ranks 0 and 1 of 2 wait for each other")
    for words in said:
        assert words in text, text
    assert "process_group.py, line" in text or how == "receive first"
    assert "harness.py" not in text and "multiprocessing" not in text
    assert seconds < 20


def test_a_pipeline_that_forgets_a_micro_batch_is_explained():
    argv = SMALL + "--pp_size 2 --gradient_accumulation_steps 3"
    step = ROOT / "step7_pipeline_afab"
    text, _ = text_of(step, 2, workers_waiting.one_micro_batch_less, argv, idle=1)
    assert re.search(r"rank 0 waits in talk \(pipeline_parallel.py, line \d+\) for a message", text)
    # With its loss the last stage has come to the first call in which all stages take part.
    assert re.search(r"rank 1 waits in pg.\w+, called by mean_loss \(train.py", text), text
    assert "The ranks are in different calls" in text, text
    assert re.search(r"train.py, line \d+, in forward_backward: ", text)


@pytest.mark.slow
def test_a_deadlock_is_found_in_less_than_25_s():
    text, seconds = text_of(LAST, 2, workers_waiting.wait_for_each_other, "other calls")
    assert text.startswith("deadlock") and 14 < seconds < 25


@pytest.mark.parametrize("how", ["sleep", "compute"])
def test_a_rank_that_comes_late_is_waited_for(how):
    """Another rank waits meanwhile for longer than it takes to find a deadlock."""
    with World(LAST, 2) as world:
        assert world.run(workers_waiting.come_late, how, 5, idle=1) == [True, True]


def test_who_took_too_long_is_shown():
    text, _ = text_of(LAST, 2, workers_waiting.come_late, "sleep", 60, timeout=3)
    assert text.startswith("ranks [0, 1] took over 3 s\nrank 0 waits in torch.distributed.barrier")
    assert re.search(r"rank 1 is in come_late .*: time.sleep\(seconds\)", text)


def test_where_processor_time_cannot_be_read_nobody_is_taken_for_idle(monkeypatch):
    watch = Watch(SimpleNamespace(processes=[SimpleNamespace(pid=1)] * 2), idle=2)
    times = iter([1.0, 1.0, 1.01, 1.0, 1.02, 1.01, 1.07, 1.01, 1.07, 1.03, 1.07, 1.05])
    monkeypatch.setattr(stacks, "processor_seconds", lambda pid: next(times))
    # The first look has nothing to compare with; 0.05 s of one rank at the fourth one is work.
    assert [watch.is_quiet() for _ in range(6)] == [False, False, True, False, False, True]
    monkeypatch.setattr(stacks, "processor_seconds", lambda pid: None)
    assert not any(watch.is_quiet() for _ in range(6))


STEP = "/somewhere/step4"
TORCH = "/lib/torch/distributed/distributed_c10d.py"


@pytest.fixture
def line_of(monkeypatch):
    """Source lines of files that do not exist, by their line number."""
    lines = {1: "pg.all_reduce(x, group)", 2: "work.wait()", 3: "time.sleep(1)", 4: "y = x @ w"}
    monkeypatch.setattr(Frame, "code", property(lambda frame: lines[frame.line]))


def test_which_ranks_need_others(line_of):
    own, last = Frame(f"{STEP}/train.py", 2, "f"), Frame(f"{stacks.TESTS}/harness.py", 1, "serve")
    assert needs_others([own], STEP) and needs_others([Frame(TORCH, 2, "barrier"), last], STEP)
    assert not needs_others([own._replace(line=3)], STEP)
    assert not needs_others([own._replace(line=4)], STEP)
    assert not needs_others([Frame("/lib/subprocess.py", 2, "wait"), own], STEP)
    assert "is in f (train.py, line 4): y = x @ w" in standing(0, [own._replace(line=4)], STEP)
    assert "has done its work" in standing(0, [Frame(TORCH, 2, "barrier"), last], STEP)


def test_what_a_deadlock_usually_means(line_of):
    call = Frame(f"{STEP}/train.py", 1, "f")

    def stack(name):
        return [Frame(TORCH, 2, "x"), Frame(f"{STEP}/process_group.py", 1, name), call]

    def cause(*stacks, finished=()):
        (text,) = causes_of_deadlock(dict(enumerate(stacks)), finished, STEP)
        return text

    assert "rank 1 ended all work, and rank 0 still wait" in cause(
        stack("all_reduce"), finished=[1]
    )
    assert "different calls" in cause(stack("all_reduce"), stack("exchange"))
    assert "is never sent" in cause(stack("exchange"), stack("exchange"))
    assert "they name different groups" in cause(stack("all_reduce"), stack("all_reduce"))
    assert "same groups in the same order" in cause(stack("group"), stack("group"))
