"""What a lesson puts on the page beside its figures: a function's source, tables, percentages."""

import inspect
from pathlib import Path

ROOT = Path(__file__).parents[3]  # of the repository


class Source:
    """Source text for a notebook to display: highlighted in one font everywhere, as Markdown where there is no HTML."""

    def __init__(self, places, sources):
        self.places, self.sources = places, sources

    def _repr_mimebundle_(self, include=None, exclude=None):
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer

        font = "font-family: monospace; font-size: 90%; line-height: 1.35; white-space: pre; overflow-x: auto"
        style = HtmlFormatter(noclasses=True, nobackground=True, prestyles=font)
        pages = [f"<code>{p}</code>{highlight(s, PythonLexer(), style)}" for p, s in zip(self.places, self.sources)]
        plain = [f"`{p}`\n\n```python\n{s}\n```" for p, s in zip(self.places, self.sources)]
        plain = "\n\n".join(plain)
        return {"text/html": "\n".join(pages), "text/markdown": plain, "text/plain": plain}


def show(*things):
    """The source of functions, classes or modules, as it stands in the file, for a notebook to display."""
    places, sources = [], []
    for thing in things:
        lines, first = inspect.getsourcelines(thing)
        path = Path(inspect.getsourcefile(thing)).relative_to(ROOT)
        places.append(f"{path}{f', line {first}' if first else ''}")
        sources.append("".join(lines).rstrip())
    return Source(places, sources)


def table(header, rows):
    """Rows under a header as a Markdown table, numbers flush right, for a notebook to display.
    Cells are text or numbers."""
    from IPython.display import Markdown

    def text(cell):
        if isinstance(cell, int) and not isinstance(cell, bool):
            return f"{cell:,}"
        return f"{cell:.3g}" if isinstance(cell, float) else str(cell).strip().replace("|", "\\|").replace("\n", " ")

    rows = [[text(cell) for cell in row] for row in rows]
    rule = [
        "---:" if all(cell[:1].isdigit() or cell[:1] in "-–" for cell in column) else "---" for column in zip(*rows)
    ]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in [list(header), rule, *rows]))


def percent(matches):
    """Exact matches over seeds as text: mean (lowest to highest) in percent."""
    matches = [100 * match for match in matches]
    return f"{sum(matches) / len(matches):.1f} % ({min(matches):.1f} to {max(matches):.1f})"


def matches_table(header, rows):
    """A table of rows (…, runs), the last as exact match over the seeds."""
    return table([*header, "exact match"], [(*row, percent([run.match for run in runs])) for *row, runs in rows])
