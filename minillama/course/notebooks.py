"""Executes the lessons and keeps what they show true: `python -m minillama lessons` runs every notebook from clean and
stores its outputs, the seconds it took, and a hash of its code, by which a test sees that the outputs are fresh.

After a run the measured seconds stand in the notebook's first cell and in the course map, and every picture whose cell
is tagged `docs:NAME` in docs/NAME.svg.
"""

import hashlib
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from .. import data
from ..adapters import adapt
from ..checkpoints import load
from ..checkpoints.files import FileError, replacing
from ..train import train

ROOT = Path(__file__).parent.parent.parent
LESSONS = ROOT / "lessons"
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal
STEADY = 0.8  # seconds of `pace` on two undisturbed cores with AVX2, to which measured times are brought
RUNTIME = re.compile(r"(?<=\*\*Runs in )(\d+|–)(?= seconds\*\* on two CPU cores)")


def find(names=()):
    """The lessons' paths in reading order, or those whose file name begins with one of the names ("03")."""
    every = sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in every if not names or any(path.name.startswith(name) for name in names)]
    for name in names:
        if not any(path.name.startswith(name) for path in chosen):
            raise FileError(
                f"{LESSONS} has no lesson {name!r}; it has {', '.join(path.stem for path in every) or 'none'}"
            )
    return chosen


def read(path):
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat lets through whatever its parser raises
        raise FileError(
            f"{path} is not a notebook ({str(error).splitlines()[0]}): restore it from the repository"
        ) from None


def code_hash(notebook):
    """A hash of the code cells' sources, in order; prose may change without a new run."""
    sources = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def pace(steps=30):
    """Seconds that this machine takes right now for a piece of what the lessons do, 30 training steps of 16 (the least
    of three tries): shared machines differ by more than a factor of two from one hour to the next."""
    model, tokenizer = load("dates-llama")
    adapt(model, "llama_adapter")
    pairs, tries = data.examples("fr", data.split_dates()[0], steps * 16), []
    for _ in range(3):
        start = time.perf_counter()
        train(model, tokenizer, pairs, steps=steps, batch_size=16, learning_rate=0.1, progress=False)
        tries.append(time.perf_counter() - start)
    return min(tries)


def execute(path, timeout=600):
    """Runs a notebook from clean in a kernel of its own, in its folder, and returns it with its outputs.

    Raises ValueError with the cell and its error where one fails, or takes longer than `timeout` seconds.
    """
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError) as error:
        raise ValueError(f"{path.name} stopped: {COLOUR.sub('', str(error)).strip()}") from None
    return notebook


def timed(path):
    """(the notebook as `execute` returns it, seconds), these brought to a machine of a steady pace, by what `pace` says
    before and after."""
    before, start = pace(), time.perf_counter()
    notebook = execute(path)
    seconds = time.perf_counter() - start
    return notebook, seconds * 2 * STEADY / (before + pace())


def blank(path, folder):
    """Writes a lesson without its solutions and outputs into a folder, for a class; returns the new path.
    Raises FileError where a file of that name is there."""
    notebook, target = read(path), Path(folder) / path.name
    if target.exists():
        raise FileError(f"{target} is there already: name another folder, or remove it")
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    for key in ("widgets", "minillama"):
        notebook.metadata.pop(key, None)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary:
        nbformat.write(notebook, temporary)
    return target


def store(path, notebook, seconds):
    """Writes the executed notebook, its seconds into its first cell and the course map,
    and its tagged pictures into docs/.

    Of several runs of the same code the fastest counts: whatever else a machine does only adds to the time.
    """
    earlier = read(path).metadata.get("minillama", {})
    if earlier.get("code") == code_hash(notebook):
        seconds = min(seconds, earlier["seconds"])
    shown = str(max(5, 5 * round(seconds / 5)))  # to five seconds: machines differ by more
    notebook.metadata["minillama"] = {"code": code_hash(notebook), "seconds": round(seconds, 1)}
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.cells[0].source, found = RUNTIME.subn(shown, notebook.cells[0].source)
    if not found:
        raise ValueError(
            f"{path.name}: the first cell does not say '**Runs in – seconds** on two CPU cores', "
            "where the measured time goes"
        )
    for cell in notebook.cells:
        for name in (tag.removeprefix("docs:") for tag in cell.metadata.get("tags", []) if tag.startswith("docs:")):
            picture = next(
                output.data["image/svg+xml"] for output in cell.outputs if "image/svg+xml" in output.get("data", {})
            )
            with replacing(ROOT / "docs" / f"{name}.svg") as temporary:
                temporary.write_text(picture, encoding="utf-8")
    with replacing(path) as temporary:
        nbformat.write(notebook, temporary)
    course_map = LESSONS / "README.md"
    text = course_map.read_text(encoding="utf-8") if course_map.exists() else ""
    row = re.compile(rf"^(\|[^|]*\]\({re.escape(path.name)}\)[^|]*(?:\|[^|\n]*)*?\| )(\d+|–)( s \|)", re.MULTILINE)
    if row.search(text):
        with replacing(course_map) as temporary:
            temporary.write_text(row.sub(rf"\g<1>{shown}\g<3>", text), encoding="utf-8")
