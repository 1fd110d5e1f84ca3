"""A few kills of each command at random moments; `python tests/reliability/kills.py` makes a hundred."""

import kills
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("command, number", [("adapt", 8), ("pretrain", 4)])
def test_a_killed_run_leaves_nothing_wrong_and_ends_as_if_it_had_not_been(command, number):
    counts = kills.bench(command, number, seed=number)
    told = kills.told(counts)
    assert counts["kills"] == number and counts["ended"], told
    assert not any(counts[what] for what in ("wrong", "unreadable", "failed", "left over", "missing")), told
