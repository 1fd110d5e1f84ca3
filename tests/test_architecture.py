"""The house: which room may import which, how long a file of the reading path may be,
and that an installed wheel works."""

import ast
import pathlib
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement

PACKAGE = pathlib.Path(__file__).parent.parent / "minillama"
READING_PATH = (
    "attention", "rope", "llama", "gpt2", "generate", "decode", "train", "data", "device", "distributed", "speed",
    "vision",
)  # fmt: skip
# From the ground up: a room imports those before it and itself.
ROOMS = ("", "checkpoints", "adapters", "course", "commands", "__main__")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(module):
    first = module.split(".")[0]
    return "" if first in READING_PATH else first


def imports(path):
    """(module, whether at the top of the file) of every minillama module that a file imports."""
    tree, package = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(PACKAGE).parent.parts
    known = {module_of(other) for other in FILES}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                found = ".".join([*base, alias.name])
                yield found if found in known else ".".join(base), node in tree.body
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "minillama" for alias in node.names):
            yield "", node in tree.body  # the whole package, as a reader imports it


def test_no_room_imports_one_above_it():
    for path in FILES:
        mine = ROOMS.index(room_of(module_of(path)))
        for module, _ in imports(path):
            assert not module or ROOMS.index(room_of(module)) <= mine, f"{path} imports {module}"


def test_nothing_but_the_command_line_imports_the_course():
    for path in FILES:
        if room_of(module_of(path)) not in ("course", "commands"):
            assert not [module for module, _ in imports(path) if room_of(module) == "course"], path


def test_no_imports_in_a_circle():
    """Among files; a package's __init__ may, below its own names, import the files that use them."""
    needs = {module_of(path): {module for module, top in imports(path) if top and module} for path in FILES}
    needs["adapters"] -= {f"adapters.{name}" for name in ("holding", "merging", "mixed", "seeing", "storage")}
    done = set()

    def visit(module, above):
        assert module not in above, " -> ".join([*above, module])
        for other in needs.get(module, ()) if module not in done else ():
            if other != module:
                visit(other, [*above, module])
        done.add(module)

    for module in needs:
        visit(module, [])


def test_the_reading_path_is_short():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*READING_PATH, "__init__", "__main__"}
    for name in READING_PATH:
        assert len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 220, name
    assert len((PACKAGE / "__main__.py").read_text(encoding="utf-8").splitlines()) < 250
    for name, most in (("llama", 190), ("gpt2", 100)):  # a page each, whatever runs through it
        assert len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= most, name


def test_the_linter_and_the_formatter_are_content():
    ruff, trees = [sys.executable, "-m", "ruff"], [PACKAGE, PACKAGE.parent / "tests"]
    for command in (("check",), ("format", "--check")):
        done = subprocess.run([*ruff, *command, "-q", *trees], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def asked_for(info):
    """The names of all packages that an installed one's metadata asks for, and that theirs ask for in turn."""
    names, ahead = set(), [metadata.PathDistribution(info)]
    while ahead:
        for needed in map(Requirement, ahead.pop().requires or ()):
            if needed.name not in names and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                names.add(needed.name)
                ahead.append(metadata.distribution(needed.name))
    return names


def link(name, site):
    """Makes a package that is installed here stand in another environment too, without a copy or a download."""
    distribution = metadata.distribution(name)
    for top in {file.parts[0] for file in distribution.files if ".." not in file.parts} - {"__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(distribution.locate_file(top))


@pytest.mark.slow
def test_a_wheel_installs_and_runs_with_what_its_own_metadata_asks_for(tmp_path, monkeypatch):
    """Built from the tree; a fresh environment gets the wheel and the packages that its metadata names, no others."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it may name the tree
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", PACKAGE.parent, source], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "minillama/bases/dates-llama/model.safetensors" in names and "minillama/course/exercises/lora.py" in names
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    bin_ = tmp_path / "fresh/bin"
    (site,) = (tmp_path / "fresh/lib").glob("python*/site-packages")
    subprocess.run([bin_ / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    for name in asked_for(next(site.glob("minillama*.dist-info"))):
        link(name, site)
    done = subprocess.run([bin_ / "python", "-m", "pip", "check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for absent in ("transformers", "peft", "nbclient"):
        assert not (site / absent).exists(), absent
    for command in ([bin_ / "minillama"], [bin_ / "python", "-m", "minillama"]):
        run = subprocess.run(
            [*command, "generate", "--prompt", "March 3, 2021 = "], capture_output=True, text=True, cwd=tmp_path
        )
        assert run.returncode == 0 and run.stdout.splitlines()[-1] == "March 3, 2021 = 2021-03-03", run.stderr
    short = [bin_ / "minillama", "--steps", "2", "--test-dates", "4"]
    run = subprocess.run(short, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "bit-identical" in run.stdout, run.stderr
