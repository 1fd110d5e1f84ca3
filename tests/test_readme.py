"""The README's Python runs as it stands, and what it points at exists."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, names)
    assert names["logits"].shape[0] == 3 and (tmp_path / "my-adapter/adapter_model.safetensors").exists()


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"\]\((docs/[^)]+)\)", TEXT)) | {name for name in re.findall(r"`([\w/.]+)`", TEXT) if "/" in name and not name.startswith("runs/")}
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), f"README.md names {name}"


def test_every_requirement_is_pinned_with_a_reason():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"(-e \.|[\w-]+==[\w.]+)\s+# .{5,}", line), line
