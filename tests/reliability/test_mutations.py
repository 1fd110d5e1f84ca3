"""Damaged and hostile files of every kind; `python tests/reliability/mutations.py` draws as many as one likes."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_damaged_file_is_refused_or_opened_as_others_open_it():
    """In an interpreter of its own, which forks for each file."""
    bench = [sys.executable, Path(__file__).with_name("mutations.py"), "--number", "100", "--jobs", "1"]
    done = subprocess.run(bench, capture_output=True, text=True)
    assert done.returncode == 0 and "refused" in done.stdout, done.stdout + done.stderr
