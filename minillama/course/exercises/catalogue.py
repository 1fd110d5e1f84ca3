"""Mistakes as edits of the right answer's source: what stands there, what one writes in its place, and the sentence.

They stand as rows in the Markdown file beside each topic. A row is (name, old, new, sentence), `old` and `new` being
tuples, for several edits at once. Each `old` must stand in the source exactly once, so that no row outlives its
reference. What is edited is a function, a class, or a whole module of the package: then the same rows plant the
mistakes in the models, where the tests must catch each.
"""

import difflib
import functools
import inspect
import linecache
import re
import textwrap
import types
from pathlib import Path


class Mistake:
    """One wrong answer: `name`, `sentence`, and `answer`, the function or class that makes it.

    edited: the function, class or module whose source `edits`, pairs (old, new), change.
    thing: what the edited source defines.  wrap: makes of it what the exercise asks for.
    """

    def __init__(self, name, sentence, edited, edits=(), wrap=None):
        self.name, self.sentence, self.edited, self.edits = name, sentence, edited, tuple(edits)
        self.wrap = wrap or (lambda thing: thing)

    def __repr__(self):
        return f"<mistake {self.name}>"

    @functools.cached_property
    def source(self):
        """The edited source. Raises ValueError where an edit does not fit exactly once."""
        source = source_of(self.edited)
        for old, new in self.edits:
            if source.count(old) != 1:
                times = f"{old!r} stands {source.count(old)} times in {self.edited.__name__}"
                raise ValueError(f"the mistake {self.name!r} edits what is not there once: {times}")
            source = source.replace(old, new)
        return source

    @functools.cached_property
    def thing(self):
        file = f"<{self.edited.__name__}: {self.name}>"
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(True), file)  # for tracebacks
        module, whole = types.ModuleType(self.edited.__name__), isinstance(self.edited, types.ModuleType)
        around = {"__package__": self.edited.__package__} if whole else vars(inspect.getmodule(self.edited))
        module.__dict__.update(around)
        exec(compile(self.source, file, "exec"), module.__dict__)
        return module if whole else getattr(module, self.edited.__name__)

    @functools.cached_property
    def answer(self):
        return self.wrap(self.thing)

    def diff(self):
        """The mistake as lines of a diff against what it edits."""
        lines = difflib.unified_diff(source_of(self.edited).splitlines(), self.source.splitlines(), n=1, lineterm="")
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]

    def __add__(self, other):
        """Both mistakes in one answer, or None where they cannot stand together."""
        if self.edited is not other.edited:
            return None
        both = Mistake(f"{self.name}+{other.name}", self.sentence, self.edited, self.edits + other.edits, self.wrap)
        try:
            return both if compile(both.source, both.name, "exec") else None
        except (ValueError, SyntaxError):
            return None


@functools.cache
def source_of(thing):
    return textwrap.dedent(inspect.getsource(thing))


def sections(path):
    """{title: rows} of a Markdown file that has a table in each section; a row is a list of its cells."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = found[line[3:]] = []
        elif " | " in line:
            rows.append(line.removeprefix("| ").removesuffix(" |").split(" | "))
    return {title: rows[1:] for title, rows in found.items()}  # without the tables' heads


def tables(topic):
    """{title: rows (name, old, new, sentence)} of the tables in the Markdown file beside a topic's module, and "said",
    {name: sentence}: what is said of facts."""
    found = sections(Path(topic).with_suffix(".md"))
    said = {"said": dict(found.pop("said", ()))}
    return said | {
        title: tuple((name, edits_of(old), edits_of(new), plain(sentence)) for name, old, new, sentence in rows)
        for title, rows in found.items()
    }


def edits_of(cell):
    """The edits in a table's cell, code under one another; "nothing" is an empty one."""
    return tuple("" if edit == "nothing" else plain(edit[1:-1]) for edit in cell.split("<br>"))


def plain(text):
    r"""A cell's text without its escapes: \n a line break, \p a bar, \q a backtick, \\ a backslash."""
    return re.sub(r"\\(.)", lambda found: {"n": "\n", "p": "|", "q": "`"}.get(found[1], found[1]), text)


def catalogue(edited, rows, wrap=None):
    """Mistakes of a table of rows (name, old, new, sentence) applied to the source of `edited`."""
    return tuple(Mistake(name, sentence, edited, zip(old, new, strict=True), wrap) for name, old, new, sentence in rows)
