"""A few kills of each command at random moments; `python tests/reliability/kills.py` makes a hundred."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("command, number", [("adapt", 5), ("pretrain", 3)])
def test_a_killed_run_leaves_nothing_wrong_and_ends_as_if_it_had_not_been(command, number):
    """In an interpreter of its own, since autograd's threads do not outlive the fork with which a run begins there."""
    options = ["--command", command, "--kills", str(number), "--seed", str(number)]
    bench = [sys.executable, Path(__file__).with_name("kills.py"), *options]
    done = subprocess.run(bench, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"kills {number},"), done.stdout + done.stderr
