"""What a topic says of facts: a sentence for each mistake's name, in the section "said" of the Markdown file beside its
module, so that the module is code alone."""

from pathlib import Path

from .catalogue import sections
from .observing import fact


def wording(topic):
    """{"said": {name: sentence}} of the Markdown file beside a topic's module."""
    return {"said": dict(sections(Path(topic).with_suffix(".md"))["said"])}


def teller(said, mistakes=()):
    """A function that makes a fact of a value and a mistake's name, with the sentence of `said` or of the mistake.

    what: the fact's own name, where that of its mistake may differ.  numbers: what stands in the sentence's braces.
    """
    sentences = {mistake.name: f"{mistake.sentence}." for mistake in mistakes} | said

    def tell(value, name, what=None, /, **numbers):
        return fact(value, name, sentences[name].format(**numbers) if numbers else sentences[name], what or name)

    tell.sentences = sentences
    return tell
