"""A reader's own task: lines {"prompt": ..., "response": ...} of .jsonl files."""

import json
from pathlib import Path

from .files import FileError


def read_pairs(path):
    """(pairs, empty) of a file of lines {"prompt": ..., "response": ...}, or of every *.jsonl in a folder.

    empty: how many lines had an empty prompt or response; they are left out.  Raises FileError with file and line.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileError(
            f'{path} has no *.jsonl: needed is at least one, with lines such as {{"prompt": "...", "response": "..."}}'
        )
    pairs = [pair for file in files for pair in read_lines(file)]
    whole = [pair for pair in pairs if all(text.strip() for text in pair)]
    return whole, len(pairs) - len(whole)


def read_lines(file):
    """(prompt, response) of each line of a .jsonl file that is not blank."""
    try:
        # not splitlines: JSON may hold other line ends as they are
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # of thousands of digits, or of brackets, too
            raise FileError(f"{file}:{number} is not valid JSON ({error}): each line is one object") from None
        for key in ("prompt", "response"):
            if not isinstance(record, dict) or key not in record:
                raise FileError(f'{file}:{number} has no "{key}": each line is an object with "prompt" and "response"')
            if not isinstance(record[key], str):
                raise FileError(f'{file}:{number}: "{key}" is of type {type(record[key]).__name__}; needed is text')
        yield record["prompt"], record["response"]
