"""What a topic says, in the Markdown file beside its module, so that the module is code alone.

The section "said" has a sentence for each fact by its mistake's name, that of a prediction the rows "why" and "nudge"
and one for each wrong answer that is foreseen, written as a student writes it: `{"A", "B"}`, `"the same"`, `32 * 640`.
These tables have no bar at either end of a line, unlike those of the mistakes (catalogue.py).
"""

from pathlib import Path

from .observing import fact
from .predictions import Question


def wording(topic):
    """{section: {name or answer: sentence}} of the Markdown file beside a topic's module."""
    sections = {}
    for line in Path(topic).with_suffix(".md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = sections[line[3:]] = {}
        elif line == "---|---":
            rows.clear()  # of the table's head
        elif " | " in line and not line.startswith("|"):
            name, sentence = line.split(" | ")
            rows[name.strip("`")] = sentence
    return sections


def teller(said, mistakes=()):
    """A function that makes a fact of a value and a mistake's name, with the sentence of `said` or of the mistake.

    what: the fact's own name, where that of its mistake may differ.  numbers: what stands in the sentence's braces.
    """
    sentences = {mistake.name: f"{mistake.sentence}." for mistake in mistakes} | said

    def tell(value, name, what=None, /, **numbers):
        return fact(value, name, sentences[name].format(**numbers) if numbers else sentences[name], what or name)

    tell.sentences = sentences
    return tell


def question(truth, said, choices=()):
    """A Question with the sentences of its section."""
    wrong = {}
    for answer, sentence in said.items():
        if answer not in ("why", "nudge"):
            value = eval(answer)
            wrong[frozenset(value) if isinstance(value, set) else value] = sentence
    return Question(truth, said["why"], wrong, choices, said["nudge"])
