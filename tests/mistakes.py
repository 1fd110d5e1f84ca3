"""The catalogue's mistakes (minillama/course/exercises) as the tests plant them: each is an edit of a shipped module,
and what the edited source defines takes the place of what the module has."""

import importlib
import inspect

from minillama.course.exercises import TOPICS

CASE_OF = {  # the edited module -> the case in methods.CASES whose checks it must fail
    "llama_adapter": "llama_adapter", "llama_adapter_v2": "v2", "prefix_tuning": "prefix_tuning",
    "prompt_tuning": "prompt_tuning", "ia3": "ia3", "lora": "lora", "bottleneck": "houlsby", "dora": "dora",
    "image_prompt": "image_prompt",
}  # fmt: skip

topics = [importlib.import_module(f"minillama.course.exercises.{topic}") for topic in TOPICS]
PLANTED = [mistake for topic in topics for mistake in getattr(topic, "PLANTED", ())]
HARMLESS = {name: kinds for topic in topics for name, kinds in getattr(topic, "HARMLESS", {}).items()}


def case_of(mistake):
    """The case in methods.CASES that a mistake is planted in."""
    return CASE_OF[mistake.edited.__name__.rpartition(".")[2]]


def plant(monkeypatch, mistake):
    """Puts every function and class that the edited source defines into the shipped module, in the place of its own."""
    for name, value in vars(mistake.thing).items():
        own = inspect.isclass(value) or inspect.isfunction(value)
        if own and value.__module__ == mistake.edited.__name__:
            monkeypatch.setattr(mistake.edited, name, value, raising=False)  # an edit may define more
