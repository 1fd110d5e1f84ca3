"""Damaged and hostile files of every kind; `python tests/reliability/mutations.py` draws as many as one likes."""

import mutations
import pytest


@pytest.mark.slow
def test_a_damaged_file_is_refused_or_opened_as_others_open_it():
    counts, bad = mutations.bench(400)
    said = [f"{kind} {file} {outcome}: {said}" for kind, file, outcome, said, _ in bad]
    assert not bad, "\n".join([mutations.told(counts), *said])
