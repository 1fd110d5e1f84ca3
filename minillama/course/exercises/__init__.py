"""The lessons' exercises: `check("gated_prefix_attention", your_function)` runs your code and names the mistake in it.

Your function is run, not read: what it does is held against what the right answer does and, where the two differ,
against what each of the known wrong answers does. The files, in the order in which to read them:

    lora.py …       a topic for each lesson. Its EXERCISES are what `check` knows by name: an Exercise has the right
                    answer, a catalogue of wrong ones, and a probe
    observing.py    the probe calls an answer, at several sizes and in two dtypes, and yields Pieces: what was returned,
                    the gradients of that, and facts, such as which parameters train
    running.py      runs a probe on an answer, which may also raise an error or change what it was given
    judging.py      an answer is right where every Piece equals the right answer's; otherwise the first explanation
                    that fits is told, and the first of these is: it equals a mistake of the catalogue
    catalogue.py    a mistake is an edit of the right answer's source, a row in lora.md …, beside the topic
    predictions.py  a Question asks for a guess before the lesson runs the thing; what to answer is in questions.md
    modules.py      what several topics' probes need

To add a mistake, add a row; `python -m minillama mistakes lora_linear` shows each row as a diff. The mistakes in a
topic's PLANTED are edits of a module of the package, and there each must fail one of the package's own tests too.
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
