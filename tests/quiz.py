"""`coach.py quiz N`: five questions of a step, with numbers drawn anew."""

import random
import re

import lessons
import quiz_layouts  # noqa: F401  adds its questions
from quiz_basics import QUESTIONS

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
NEAR = 0.01  # an answer that is no whole number may be off by this part of it


def questions(step, seed=None):
    """Five questions of a step: (question, answer, the way to it)."""
    if step not in QUESTIONS:
        raise lessons.LessonError(
            f"quiz {step}: there are questions for steps 1 to {max(QUESTIONS)}"
        )
    drawn = random.Random(seed)
    return [ask(drawn) for ask in QUESTIONS[step]]


def is_right(typed, answer):
    """Whether what was typed is the answer: a number, or as many numbers as it has."""
    text = typed.replace(",", " " if isinstance(answer, tuple) else "")
    numbers = [float(found) for found in NUMBER.findall(text)]
    expected = answer if isinstance(answer, tuple) else (answer,)
    if len(numbers) != len(expected):
        return False
    return all(
        abs(n - e) <= (NEAR * abs(e) if isinstance(e, float) else 1e-9)
        for n, e in zip(numbers, expected, strict=True)
    )


def shown(answer):
    if isinstance(answer, tuple):
        return ", ".join(map(str, answer))
    return f"{answer:,}" if isinstance(answer, int) else f"{answer:.4g}"


def hold(step, say, read=input):
    """Ask, grade and explain; returns how many answers were right."""
    right = 0
    for number, (question, answer, way) in enumerate(questions(step), 1):
        say(f"\n{number}. {question}")
        try:
            good = is_right(read("> "), answer)
        except EOFError:
            break
        right += good
        say(f"{'Right' if good else 'No'}: {shown(answer)} ({way}).")
    say(f"\n{right} of {len(QUESTIONS[step])} are right.")
    return right
