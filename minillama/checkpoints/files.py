"""Files read and written with care: a bad one ends in one sentence, and a new one appears whole or not at all."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file


class FileError(OSError):
    """A missing or bad file: says which, where in it, and what to do."""

    def _render_traceback_(self):  # in a notebook the sentence is all there is to say
        return [f"{type(self).__name__}: {self}"]


def read_json(path):
    """The object in a JSON file; FileError when it is missing, cut short, or holds something else."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} is missing: check the folder's name, or copy the file there again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not valid JSON ({error}): it may have been cut short, copy it again") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise FileError(f"{path} holds a {type(content).__name__}; needed is an object with names and values")
    return content


def read_tensors(path):
    """The tensors of a safetensors file by name, memory-mapped; FileError when it is missing or damaged."""
    path = Path(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileError(f"{path} is missing: check the folder's name, or copy the file there again") from None
    except SafetensorError as error:
        size = path.stat().st_size
        raise FileError(
            f"{path} ({size:,} bytes) is not a whole safetensors file ({error}): "
            "it may have been cut short, copy it again"
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None


def umask():
    """The process's; the system tells it only where one is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path beside `path`, and moves the file there into place once the block has ended well."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror} ({error.filename})") from None
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path, content):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_metadata(path):
    """The strings that a readable safetensors file carries besides its tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def write_tensors(path, tensors, **metadata):
    with replacing(path) as temporary:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary, metadata={"format": "pt"} | metadata)
