"""Files read and written with care: a bad one ends in one sentence, and a new one appears whole or not at all.

Written is beside the old file, synced to the disk and moved into its place, so that a kill or a full disk at any moment
leaves the old one or the new one. Read is what the size and kind of a file allow, and numbers that are numbers.
"""

import contextlib
import glob
import json
import math
import os
import re
import shutil
import stat
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

try:
    import fcntl
except ImportError:  # Windows has no locks on folders: there two writers are not told of each other
    fcntl = None

JSON_BYTES = 2**26  # tokenizers of a quarter of a million tokens have half of it
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 1e15  # of a weight: float32 ends at 3e38, and a model multiplies a number by itself and by others
HELD = {}  # {folder that this process has locked: how often}


def printable(text):
    """Text as a terminal may show it, whoever wrote it: what would move its cursor, colour it or turn the order of the
    letters around stands there as an escape."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: ascii(found[0])[1:-1], text)


class FileError(OSError):
    """A missing or bad file: says which, where in it, and what to do."""

    def __init__(self, message):
        super().__init__(printable(message).replace("\n", "\\n"))  # one line, whatever a file called its keys

    def _render_traceback_(self):  # in a notebook the sentence is all there is to say
        return [f"{type(self).__name__}: {self}"]


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def reading(path):
    """Within the block, what the system says of a file becomes a FileError; it must be there, and a regular file."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise FileError(f"{path} is {kind}; needed is a file")
        yield
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{path} is missing: check the folder's name, or copy the file there again") from None
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path, limit=JSON_BYTES):
    """The object in a JSON file; FileError when it is missing, cut short, too large, or holds something else."""
    path = Path(path)
    with reading(path):
        if (size := path.stat().st_size) > limit:
            raise FileError(f"{path} has {size:,} bytes; at most {limit:,} are read: it is not what its name says")
        content = path.read_bytes()
    return parse_json(content, path)


def parse_json(content, where):
    """The object that a JSON text holds; FileError names `where` it stood."""
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=no_number)
    except RecursionError:
        raise FileError(f"{where} nests too many lists and objects: it is damaged, copy it again") from None
    except ValueError as error:  # also of text that is not UTF-8, and of a number with thousands of digits
        raise FileError(f"{where} is not valid JSON ({error}): it may have been cut short, copy it again") from None
    if not isinstance(found, dict):
        raise FileError(f"{where} holds a {type(found).__name__}; needed is an object with names and values")
    return found


def no_number(constant):
    raise ValueError(f"it holds {constant}, which is no number")


def believed(name, value, kind, least=-math.inf, most=math.inf):
    """The value that a file gives for a name, where it is of the type `kind` (int, float, bool, str, or list, of names)
    and within its bounds; else ValueError."""
    if kind is list:
        right = isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
    else:
        right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) is (kind is bool)
    if not right:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "names"}
        raise ValueError(f"{name} is {shortened(value)}; needed is {words[kind]}")
    if kind in (int, float) and not least <= value <= most:
        raise ValueError(f"{name} is {shortened(value)}; it can be {least:,} to {most:,}")
    return value


def shortened(value):
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a number of more than 19 digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_safetensors(path):
    """({name: tensor, memory-mapped}, {name: text beside them}) of a safetensors file; FileError when it is missing or
    damaged."""
    path = Path(path)
    with reading(path), whole_safetensors(path), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def stored_tensors(path, apart=False):
    """{name: a function that reads the tensor, memory-mapped} of a safetensors file. All are in one mapping of the
    file, or `apart`, each is in one of its own, which ends with it. FileError as above."""
    path = Path(path)

    def read(name):
        with reading(path), whole_safetensors(path):
            return (safe_open(path, "pt") if apart else file).get_tensor(name)

    with reading(path), whole_safetensors(path):
        file = safe_open(path, "pt")
        return {name: partial(read, name) for name in file.keys()}


@contextlib.contextmanager
def whole_safetensors(path):
    try:
        yield
    except (SafetensorError, AttributeError, ValueError) as error:  # the latter two: a dtype that torch does not have
        raise FileError(
            f"{path} ({os.path.getsize(path):,} bytes) is not a whole safetensors file ({error}): "
            "it may have been cut short, copy it again"
        ) from None


def refuse_unsound(tensors, path):
    """FileError for a tensor that holds something else than floating-point numbers, or numbers that are none."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise FileError(
                f"{path}: {name} is of {str(tensor.dtype).removeprefix('torch.')}; needed is one of {kinds}"
            )
        if unsound := what_is_unsound(tensor):
            raise FileError(f"{path}: {name} holds {unsound}, so nothing computed with it would be a number")


def what_is_unsound(tensor):
    """What a tensor holds that is no weight: NaN, infinity, or a number whose products overflow; "" for a sound one.
    Looked at in parts, so that little memory is needed."""
    parts = tensor.detach().flatten().split(2**20)
    largest = max(
        (part.abs().amax().item() for part in parts if len(part)), key=lambda most: (most != most, most), default=0
    )
    return "" if largest <= LARGEST else f"the number {largest:.1e}" if largest < math.inf else "NaN or infinity"


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def umask():
    """The process's; the system tells it only where one is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary path, in a folder of its own beside `path`, and once the block has ended well syncs the file
    there and moves it into place. What a killed process left of its own is removed: also what a library left there
    that writes beside and moves, as safetensors does."""
    path = Path(path)
    own = handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        own = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        handle = os.open(own, os.O_RDONLY) if fcntl else None
        lock(handle)
        temporary = own / path.name
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # safetensors' own are for their owner alone
        os.replace(temporary, path)
        sync(path.parent)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if own is not None:
            shutil.rmtree(own, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def lock(handle):
    """Whether this process alone has the file or folder now."""
    with contextlib.suppress(OSError):
        fcntl and fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def sweep(path):
    """Removes the temporary folders beside `path` whose writers have died: a living one holds a lock on its own."""
    for old in path.parent.glob(f".{glob.escape(path.name)}-????????") if fcntl else ():
        with contextlib.suppress(OSError):
            handle = os.open(old, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if lock(handle):
                    shutil.rmtree(old)
            finally:
                os.close(handle)


def sync(folder):
    """Writes to the disk which names the folder holds."""
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def locked(folder):
    """Makes a folder and holds it: within the block no other process writes a run or an adapter there. What was
    made for it and stays empty is removed.

    Raises FileError where another holds it, and where nothing can be written to it.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise FileError(f"{folder} cannot be written to: {error.strerror or error}") from None
    place = folder.resolve()
    try:
        if place not in HELD and not lock(handle):
            raise FileError(f"another process is writing to {folder}: wait until it ends, or name another folder")
        HELD[place] = HELD.get(place, 0) + 1
        try:
            yield folder
        finally:
            HELD[place] -= 1
            if not HELD[place]:
                del HELD[place]
    finally:
        with contextlib.suppress(OSError):  # until one holds something
            for place in made:
                place.rmdir()
        if handle is not None:
            os.close(handle)


def remove(path):
    """Takes a file away, for good."""
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
        sync(Path(path).parent)


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_json(content):
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path, content):
    write_text(path, as_json(content))


def write_tensors(path, tensors, **metadata):
    """Writes a safetensors file, with strings besides its tensors."""
    with replacing(path) as temporary:
        put_tensors(temporary, tensors, **metadata)


def put_tensors(path, tensors, **metadata):
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, path, metadata={"format": "pt"} | metadata)
    except SafetensorError as error:  # of a full disk too
        raise OSError(str(error)) from None
    with open(path, "rb+") as file:  # the library writes the strings in an order of chance: the same run, the same file
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
