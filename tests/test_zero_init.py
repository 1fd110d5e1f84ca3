"""The ablation's command on the bundled base: what it writes, and that the gates begin where they should."""

import json

import pytest

import minillama
from minillama.__main__ import main
from minillama.commands import zero_init


@pytest.mark.slow
def test_the_command_writes_one_run_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zero_init, "FACTORS", (1,))
    out = tmp_path / "runs.jsonl"
    options = "--base dates-llama --seeds 1 --steps 2 --batch-size 4 --test-dates 3"
    assert main(["zero-init", "--out", str(out), *options.split()]) == 0
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(run["init"], run["gate"]) for run in runs] == [("normal", 0), ("normal", 1), ("input", 0), ("input", 1)]
    assert all(len(run["losses"]) == 2 and list(run["matches"]) == list(zero_init.LANGUAGES) for run in runs)
    assert capsys.readouterr().out.count("learning rate 0.1000") == 4


@pytest.mark.slow
def test_a_gate_of_1_begins_far_from_the_base():
    def losses(gate):
        return zero_init.learn(*minillama.load("dates-llama"), gate, "normal", 1e-9, 0, 1, 8, 1)[0]

    closed, opened = losses(0.0), losses(1.0)
    assert opened[0] != pytest.approx(closed[0], abs=0.01)
