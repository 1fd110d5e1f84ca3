"""Every lesson runs from clean and shows what it last computed;
the course map and the README say the same as the lessons."""

import re

import pytest
import torch

from minillama.course import lessons, notebooks

LESSONS = notebooks.find()
STORED = {path: notebooks.read(path) for path in LESSONS}
each = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def text(cell):
    """What a code cell printed or showed, as text."""
    return "".join(
        output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in cell.outputs
    )


def assert_solved(notebook):
    """A blank exercise says what is missing and stops nothing; every solution passes its own checker."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    checks = [cell for cell in code if re.search(r"^check\(", cell.source, re.MULTILINE)]
    for cell in checks:
        marks = set(re.findall(r"^[✓✗]", text(cell), re.MULTILINE))
        solution = "solution" in cell.metadata.get("tags", [])
        assert marks == ({"✓"} if solution else {"✗"}), cell.source + "\n" + text(cell)
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == solution
    return len(checks) // 2


@each
def test_outputs_are_fresh(path):
    notebook = STORED[path]
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert notebook.metadata["minillama"]["code"] == notebooks.code_hash(notebook), (
        f"run: python -m minillama lessons {path.name[:2]}"
    )
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        if "Figure" in str(output.get("data", {}).get("text/plain", "")):
            # the second for a JupyterLab that does not trust the notebook
            assert {"image/svg+xml", "image/png"} <= output["data"].keys()
    assert path.stat().st_size < 1.5e6


def test_a_changed_cell_is_not_fresh():
    notebook = notebooks.read(LESSONS[0])
    before = notebooks.code_hash(notebook)
    next(cell for cell in notebook.cells if cell.cell_type == "markdown").source += " more"
    assert notebooks.code_hash(notebook) == before
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "\n1"
    assert notebooks.code_hash(notebook) != before


@each
def test_words_and_numbers_agree(path):
    """The runtime in the first cell and in the course map is the measured one;
    the map counts the exercises; links lead somewhere."""
    notebook, course_map = STORED[path], (notebooks.LESSONS / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in course_map.splitlines() if f"]({path.name})" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    shown = notebooks.RUNTIME.search(notebook.cells[0].source)[0]
    assert abs(int(shown) - notebook.metadata["minillama"]["seconds"]) <= 2.5 + 5 * (int(shown) == 5)
    assert cells[3] == f"{shown} s"
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert f"# {path.name[:2]} · " in prose and "TODO" not in prose
    exercises = re.findall(rf"^### {int(path.name[:2])}\.\d+ ", prose, re.MULTILINE)
    assert cells[5] == (str(len(exercises)) if exercises else "") and cells[4]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        assert (path.parent / target).exists(), target


@each
def test_solutions_pass_and_blanks_say_so(path):
    solved = assert_solved(STORED[path])
    assert solved >= 4 or path.name[:2] in ("00", "07", "08")


def test_pictures_of_the_docs_are_the_lessons():
    for path, notebook in STORED.items():
        for cell in notebook.cells:
            for tag in cell.metadata.get("tags", []):
                if tag.startswith("docs:"):
                    picture = notebooks.ROOT / "docs" / f"{tag.removeprefix('docs:')}.svg"
                    shown = [output.get("data", {}).get("image/svg+xml") for output in cell.outputs]
                    assert picture.read_text(encoding="utf-8") in shown, path.name


def test_a_bad_notebook_and_a_bad_name_are_sentences(tmp_path):
    broken = tmp_path / "00_x.ipynb"
    broken.write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(notebooks.FileError, match="00_x.ipynb is not a notebook"):
        notebooks.read(broken)
    with pytest.raises(notebooks.FileError, match="no lesson '17'; it has 00_tour"):
        notebooks.find(["17"])


def test_runs_side_by_side_are_the_runs_alone():
    options = dict(steps=3, batch_size=4, test_dates=2)
    torch.set_num_threads(2)
    both = lessons.over_seeds("bottleneck", "fi", **options)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    for seed, run in enumerate(both):
        alone = lessons.adaptation("bottleneck", "fi", seed=seed, **options)
        assert [record["loss"] for record in run.history] == [record["loss"] for record in alone.history]
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), alone.model.parameters()))
    assert both[0].history[-1]["loss"] != both[1].history[-1]["loss"]


def test_measured_runtimes_fit_a_course_hour():
    seconds = {path.name[:2]: notebook.metadata["minillama"]["seconds"] for path, notebook in STORED.items()}
    real = seconds.pop("08")  # a real model, and two minutes of training
    assert max(seconds.values()) < 75 and sum(seconds.values()) < 7 * 60 and real < 6 * 60, seconds


@pytest.mark.slow
@each
def test_runs_from_clean(path, request):
    real = path.name.startswith("08")
    if real:
        request.getfixturevalue("smollm2")  # skips where the model cannot be had
    limit = 1800 if real else 600  # seconds a cell; only where a kernel hangs does it end so
    notebook, _ = notebooks.execute(path, timeout=limit)
    assert_solved(notebook)


def test_results_of_the_readme_are_the_lessons():
    readme = (notebooks.ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `?([\w ]+)`? \| ([\d,]+) \| ([\d.]+ % \([^)]*\)) \|$", readme, re.MULTILINE)
    code = [cell for cell in STORED[LESSONS[7]].cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    computed = "".join(str(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert len(shown) == 9
    for name, parameters, match in shown:
        name = {"the frozen base": "base", "all weights": "full"}.get(name, name)
        assert f"| {name} | {parameters} | {match} |" in computed
