"""docs/performance.md and the README: their tables and figures beside PEFT are those of the stored benches.
`python tests/test_performance_tables.py` prints the tables."""

import json
import pathlib
import re
import statistics

import pytest

from minillama.commands.bench import ratio

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
SIDES = {
    "peft": "PEFT", "ours": "ours", "compiled": "`--compile`", "float8": "and `--quantize float8`",
    "static": "`static`",
}  # fmt: skip
BENCHES = {  # the figure and the sides of its table
    "bench_h200": ("step", ("peft", "ours", "compiled", "float8")),
    "bench_h200_decode": ("decode", ("peft", "ours", "static")),
    "bench_cpu_float32": ("step", ("peft", "ours", "compiled")),
    "bench_cpu_bfloat16": ("step", ("peft", "ours", "compiled")),
}


def bench(name):
    return json.loads((ROOT / f"docs/{name}.json").read_text(encoding="utf-8"))


def times(case, figure, side):
    """How many times longer PEFT's takes, as the bench prints it: the median of the rounds' ratios."""
    seconds = case["seconds"][figure]
    return ratio(seconds["peft"], seconds[side]).split()[0]


def table(name):
    """The table of the page that a stored bench amounts to."""
    figure, sides = BENCHES[name]
    lines = [f"| method | {' | '.join(SIDES[side] for side in sides)} |", "|---|" + len(sides) * "---:|"]
    for case in bench(name)["cases"]:
        cells = [f"`{case['method']}`"]
        for side in sides:
            if side not in case["seconds"][figure]:
                cells.append("–")
                continue
            middle = statistics.median(case["seconds"][figure][side])
            peak = case["peak_bytes"].get(side)
            shown = [f"{1000 * middle:.0f} ms", f"{peak / 2**30:.1f} GiB"] if peak else [f"{middle:.2f} s"]
            if side != "peft" and "peft" in case["seconds"][figure]:
                shown.append(f"{times(case, figure, side)} ×")
            cells.append(", ".join(shown))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", BENCHES)
def test_a_table_is_the_stored_bench(name):
    assert table(name) in PAGE, f"python tests/{pathlib.Path(__file__).name} prints what docs/{name}.json says"


def test_the_settings_and_the_readmes_figures_are_the_stored_ones():
    kinds = {name: [bench(name)["settings"][own] for own in ("base", "device", "dtype")] for name in BENCHES}
    assert all(kinds[name] == ["smollm2", "2 threads", f"torch.{name[10:]}"] for name in list(BENCHES)[2:])
    assert all(kinds[name] == ["llama-7b", "NVIDIA H200", "torch.bfloat16"] for name in list(BENCHES)[:2])
    step, decode = (bench(name)["cases"][0] for name in list(BENCHES)[:2])
    assert f"{bench('bench_h200')['settings']['ceiling'] / 1e12:.0f} TFLOP/s" in PAGE
    assert f"{1000 * step['floor']:.0f} ms" in PAGE
    assert f"{step['rows']} × {step['tokens']} tokens" in PAGE and f"K = {step['prompts']}" in PAGE
    readme = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert f"a step takes PEFT {times(step, 'step', 'compiled')} times as long" in readme
    assert f"with the base in float8 {times(step, 'step', 'float8')} times" in readme
    assert f"a token that is generated {float(times(decode, 'decode', 'static')):.1f} times" in readme
    full, half = (
        times(bench(f"bench_cpu_{dtype}")["cases"][0], "step", "compiled") for dtype in ("float32", "bfloat16")
    )
    assert f"on two CPU cores and SmolLM2's shape a step takes it {full} times as long, {half} where" in readme


if __name__ == "__main__":
    print("\n".join(table(name) for name in BENCHES))
