"""The quiz: its answers are what the steps' own code says, and it knows a right answer."""

import random
import re
import sys
from types import SimpleNamespace

import lessons
import pytest
import quiz
import quiz_layouts
from quiz_basics import QUESTIONS, places


@pytest.mark.parametrize("step", range(1, len(lessons.steps()) + 1))
def test_five_questions_that_can_be_answered(step):
    for seed in range(50):
        asked = quiz.questions(step, seed)
        assert len(asked) == 5
        for question, answer, way in asked:
            assert question.endswith(("?", ")")) and way and "{" not in question
            assert quiz.is_right(quiz.shown(answer), answer), (question, answer)
            wrong = tuple(n + 1 for n in answer) if isinstance(answer, tuple) else answer * 2 + 1
            assert not quiz.is_right(quiz.shown(wrong), answer), (question, answer)
    assert quiz.questions(step, 1) == quiz.questions(step, 1) != quiz.questions(step, 2)


def test_what_counts_as_right():
    assert quiz.is_right("1,024 bytes", 1024) and not quiz.is_right("1025", 1024)
    assert quiz.is_right("33.4 %", 100 / 3) and not quiz.is_right("34", 100 / 3)
    assert quiz.is_right("2 and 5", (2, 5)) and quiz.is_right("2,5", (2, 5))
    assert not quiz.is_right("5, 2", (2, 5)) and not quiz.is_right("", 3)


def numbers_in(question):
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", question)]


def test_answers_are_those_of_the_code(monkeypatch):
    """Layers of a stage, chunks and positions of the ring, and places in the mesh."""
    ours = lessons.step_of(9)
    monkeypatch.syspath_prepend(str(ours))
    before = set(sys.modules)
    try:
        from context_parallel import zigzag_positions

        r = random.Random(1)
        for _ in range(20):
            question, answer, _ = quiz_layouts.position_in_the_late_chunk(r)
            cp, tokens, rank = numbers_in(question)
            group = SimpleNamespace(size=cp, rank=rank)
            held = zigzag_positions(tokens, group)
            assert held[len(held) // 2] == answer

        import torch

        for _ in range(20):
            question, rank, _ = quiz_layouts.ranks_of_a_layout(r)
            tp, cp, dp, pp, *place = numbers_in(question)
            grid = torch.arange(tp * cp * dp * pp).view(pp, dp, cp, tp)
            assert grid[place[3], place[2], place[1], place[0]] == rank
            assert places([tp, cp, dp, pp], rank) == tuple(place)
    finally:
        for name in set(sys.modules) - before:
            if str(ours) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    assert set(QUESTIONS) == set(range(1, len(lessons.steps()) + 1))
