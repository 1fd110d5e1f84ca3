"""The README's Python runs as it stands, and what it points at exists."""

import json
import pathlib
import re
from collections import defaultdict

from minillama.course.lessons import percent, stored_runs
from minillama.course.lessons.sees import STORED

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, names)
    assert names["logits"].shape[0] == 3 and (tmp_path / "my-adapter/adapter_model.safetensors").exists()


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"\]\((docs/[^)]+)\)", TEXT)) | {
        name for name in re.findall(r"`([\w/.]+)`", TEXT) if "/" in name and not name.startswith("runs/")
    }
    assert len(named) > 8
    for name in named:
        assert (ROOT / name).exists(), f"README.md names {name}"


def test_the_tables_of_several_gpus_are_the_stored_ones():
    """Against the first of which lesson 09 holds its predictions."""
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (llama[\w-]+) \| ([^|]+) \| ([\d,]+)[^|]*\| ([\d.]+) GiB \|$", text, re.MULTILINE)
    stored = []
    for name, whole, parts in (
        ("bench_several_h200", "on both", "cut in two"),
        ("bench_four_h100", "on all four", "cut in four"),
    ):
        for case in json.loads((ROOT / f"docs/{name}.json").read_text(encoding="utf-8"))["cases"]:
            place = f"{parts}, `--shard`" if case["sharded"] else "one card" if case["cards"] == 1 else whole
            rate, memory = f"{case['tokens_per_second']:,}", str(case["gib_per_card"])
            stored.append((case["shape"], place, rate, memory))
    assert rows == stored


def test_every_requirement_is_pinned_with_a_reason():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"(-e \.|[\w-]+==[\w.]+)\s+# .{5,}", line), line


def test_results_on_smollm2_are_the_stored_runs():
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for row in json.loads((ROOT / "docs/smollm2_comparison.json").read_text(encoding="utf-8"))["rows"]:
        name = {"base": "the frozen base", "full": "all weights"}.get(row["method"], f"`{row['method']}`")
        assert f"| {name} | {row['parameters']:,} | {percent(row['matches'])} |" in results
        assert row["method"] not in ("ia3", "llama_adapter") or percent(row["matches"]) in re.sub(r"\s+", " ", TEXT)
    matches = defaultdict(list)
    for line in (ROOT / "docs/smollm2_zero_init.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        matches[run["gate"], run["init"], run["learning_rate"]].append(sum(run["matches"].values()) / 5)
    for gate in (0, 1):
        cells = {key: percent(values) for key, values in matches.items() if key[0] == gate}
        for init, prompts in (("normal", "N(0, 1)"), ("input", "as the tokens")):
            row = " | ".join(cell for key, cell in sorted(cells.items()) if key[1] == init)
            assert f"| {gate} | {prompts} | {row} |" in results
        assert cells[max(cells, key=lambda key: sum(matches[key]))] in re.sub(r"\s+", " ", TEXT)


def test_results_on_pictures_are_the_stored_runs():
    """Each from three seeds, what is chosen from five; the README names the defaults and the paper's way."""
    results, stored = (ROOT / "docs/results.md").read_text(encoding="utf-8"), stored_runs()
    assert set(stored) == set(STORED)
    rows = []
    for (task, way, steps, gate, spread), runs in stored.items():
        assert sorted(run["seed"] for run in runs) == list(range(5 if task == "validation" else 3))
        cells = (task, f"`{way}`", f"{steps:,}", f"{gate:.0f}", spread, f"{runs[0]['parameters']:,}")
        rows.append(f"| {' | '.join(map(str, cells))} | {percent([run['match'] for run in runs])} |")
    assert sorted(rows) == sorted(re.findall(r"^\| \w+ \| `(?:places|global)` .*\|$", results, re.MULTILINE))
    for key in (("handwriting", "places", 400), ("handwriting", "global", 2000), ("calendar", "global", 400)):
        assert percent([run["match"] for run in stored[(*key, 0.0, 0.3)]]) in re.sub(r"\s+", " ", TEXT)
