"""Tests of `chain.py carry`: an edit reaches the later steps."""

import pytest
from small_chain import COMMON, DATA, FOUR, MESH, ONE, STEPS, THREE, TOY, TRAIN, TWO, Chain


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
