"""Tests of what chain.py checks and shows: `check`, `diff` and wrong calls."""

import os
import subprocess
import sys

import pytest
from small_chain import ENVIRONMENT, FLAG, FOUR, ONE, STEPS, THREE, TOOL, TOY, TWO, code

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


# ---- diff and the command line -------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("arguments", "root", "remedy"),
    [
        ("diff 1", ".", "ask for step 2"),
        ("diff 7", ".", f"choose one of {ONE}, {TWO}"),
        ("diff many", ".", "diff --help"),
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
    done = subprocess.run([sys.executable, str(TOOL), "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
