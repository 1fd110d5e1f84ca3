"""Every lesson runs from clean and shows what it last computed;
the course map and the README say the same as the lessons."""

import ast
import re

import pytest
import torch
from test_browser import CHROMIUM

from minillama.__main__ import main
from minillama.course import check, lessons, notebooks, plots, schematics

LESSONS = notebooks.find()
STORED = {path: notebooks.read(path) for path in LESSONS}
each = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def text(cell):
    """What a code cell printed or showed, as text."""
    return "".join(
        output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in cell.outputs
    )


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def asked(source):
    """The exercises that a cell puts to the checker."""
    return re.findall(r"""^check\(\s*"(\w+)\"""", source, re.MULTILINE)


def assert_asked(notebook):
    """A blank exercise says what is missing and stops nothing, and no solution stands open."""
    for cell in code_cells(notebook):
        if names := asked(cell.source):
            assert re.findall(r"^[✓✗]", text(cell), re.MULTILINE) == ["✗"] * len(names), cell.source + text(cell)


def solutions(notebook):
    """(cell's number, the code) of every solution: in a markdown cell that is folded up until a reader opens it."""
    for i, cell in enumerate(notebook.cells):
        if "solution" in cell.metadata.get("tags", []):
            form = r"<details><summary>Solution</summary>\n\n```python\n(.*)\n```\n+</details>"
            found = re.fullmatch(form, cell.source.strip(), re.DOTALL)
            assert cell.cell_type == "markdown" and found, cell.source
            yield i, found[1]


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


@each
def test_cells_fit_the_page(path):
    for cell in code_cells(STORED[path]):
        lines = cell.source.splitlines()
        assert len(lines) <= 25 and max(map(len, lines)) <= 88, cell.source


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
def test_blanks_say_so_and_each_has_its_solution_below(path):
    """Every exercise is asked once, above its solution, with nothing but the blank and a hint between them."""
    notebook = STORED[path]
    assert_asked(notebook)
    code = {i: cell for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and asked(cell.source)}
    assert sum(map(len, (asked(cell.source) for cell in code.values()))) >= (
        1 if path.name[:2] in ("00", "07", "08") else 4
    )
    solved = [name for _, source in solutions(notebook) for name in asked(source)]
    assert solved == [name for cell in code.values() for name in asked(cell.source)]
    for i, _ in solutions(notebook):
        assert i - 1 in code or i - 2 in code, notebook.cells[i].source


@pytest.mark.slow
@each
def test_solutions_pass(path):
    """Executed after the notebook's imports, in its folder's place."""
    notebook, space = STORED[path], {}
    for cell in code_cells(notebook):
        for statement in ast.parse(re.sub(r"^[%!].*", "", cell.source, flags=re.MULTILINE)).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([statement], []), path.name, "exec"), space)
    verdicts = []
    space["check"] = lambda name, answer: verdicts.append(check(name, answer))
    for _, source in solutions(notebook):
        exec(source, space)
    assert verdicts and all(verdict.passed for verdict in verdicts), [v.message for v in verdicts if not v.passed]


def test_what_a_notebook_takes_from_the_course_is_there():
    """Every lessons.NAME, plots.NAME and schematics.NAME of its code, and what it imports by name."""
    for path, notebook in STORED.items():
        for cell in code_cells(notebook):
            for node in ast.walk(ast.parse(re.sub(r"^[%!].*", "pass", cell.source, flags=re.MULTILINE))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    module = {"lessons": lessons, "plots": plots, "schematics": schematics}.get(node.value.id)
                    assert module is None or hasattr(module, node.attr), f"{path.name}: {ast.unparse(node)}"
                elif isinstance(node, ast.ImportFrom) and node.module.startswith("minillama"):
                    exec(compile(ast.Module([node], []), path.name, "exec"), {})


def test_a_blank_copy_has_neither_outputs_nor_solutions(tmp_path):
    assert main(["lessons", "03", "--blank", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.ipynb")
    blank = notebooks.read(path)
    assert not list(solutions(blank)) and not [cell for cell in code_cells(blank) if cell.outputs]
    assert [cell.source for cell in code_cells(blank)] == [cell.source for cell in code_cells(STORED[LESSONS[3]])]


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


@pytest.mark.slow
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
    assert seconds.pop("08") < 6 * 60, "a real model, and two minutes of training"
    assert max(seconds.values()) < 75 and sum(seconds[f"{i:02}"] for i in range(8)) < 7 * 60, seconds


@pytest.mark.slow
@each
def test_runs_from_clean(path, request):
    real = path.name.startswith("08")
    if path.name.startswith("03") and CHROMIUM:
        pytest.skip("a browser executes it in test_browser.py")
    if real:
        request.getfixturevalue("smollm2")  # skips where the model cannot be had
    limit = 1800 if real else 600  # seconds a cell; only where a kernel hangs does it end so
    assert_asked(notebooks.execute(path, timeout=limit))


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
