"""The lessons' exercises: `check("gated_prefix_attention", your_function)` runs your code and names the mistake in it.

A topic is a module here, named as its lesson; its EXERCISES are what `check` knows by name: an Exercise has the right
answer, a catalogue of wrong ones (catalogue.py) and a probe, which calls an answer and yields what came of it, piece by
piece (observing.py). An answer is right when every piece equals the right answer's; otherwise judging.py says what is
wrong. A Question is a prediction (predictions.py). The test suite plants the same catalogue in the models, where each
entry must fail.
"""

import difflib
import functools
import importlib
import textwrap
from dataclasses import dataclass

from .catalogue import Mistake, catalogue
from .judging import judge
from .observing import Exercise, Piece, Wrong
from .predictions import EARLIER, Question, judge_prediction

__all__ = ["Exercise", "Mistake", "Piece", "Question", "Verdict", "Wrong", "catalogue", "check", "exercises"]

TOPICS = "tour base_models prefix_tuning llama_adapter ia3 bottleneck lora comparison scaling_out image_prompt".split()


@dataclass(frozen=True)
class Verdict:
    """passed, and mistake: a name of the catalogue, of what any answer can get wrong (blank, form, in place, unfrozen,
    detached, not_cast, precision, kept, one_size, unread, run_twice, left_behind, shortcut, prediction), or what can
    be described and not named (error, shape, how_many_things, dtype, sign, scale, place, value, random); else None."""

    passed: bool
    mistake: str | None
    message: str

    def _ipython_display_(self):
        """Nothing: `check` has printed the message, and a notebook would print the verdict once more."""


@functools.cache
def exercises():
    """All exercises and questions by name."""
    topics = [importlib.import_module(f"{__name__}.{topic}") for topic in TOPICS]
    return {name: exercise for topic in topics for name, exercise in topic.EXERCISES.items()}


def exercise(name):
    """The exercise or question of that name. Raises ValueError for a name that none has."""
    known = exercises()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3)
        hint = f"perhaps {' or '.join(near)}" if near else f"they are {', '.join(known)}"
        raise ValueError(f"there is no exercise {name!r}: {hint}")
    return known[name]


def check(name, answer):
    """Prints a verdict on an answer to the exercise of that name, and returns it.

    answer: a function (or class) as the exercise asks for it, or for a prediction its value.
    Raises ValueError for a name that no exercise has.
    """
    asked = exercise(name)
    if isinstance(asked, Question):
        passed, mistake, message = judge_prediction(asked, answer, EARLIER.setdefault(name, []))
    else:
        passed, mistake, message = judge(asked, answer)
    verdict = Verdict(passed, mistake, f"{'✓' if passed else '✗'} {name}: {message}")
    wrap = functools.partial(textwrap.wrap, width=108, break_long_words=False, break_on_hyphens=False)
    print(*(line for part in verdict.message.splitlines() for line in wrap(part)), sep="\n")
    return verdict
