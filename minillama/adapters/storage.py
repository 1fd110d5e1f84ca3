"""Adapter folders: adapter_model.safetensors, which says all that is needed to read it right, and beside it the same
again as adapter_config.json, for the PEFT library and for readers.

The weights carry their own options, their base's fingerprint and a hash of their numbers, so that one file is the whole
truth: whoever reads while another writes, or after a writer was killed, has the old adapter or the new one, and never
new weights with an old alpha. adapter_config.json is taken away first and comes back last; where it says something else
than the weights do, the folder is refused.

Where the PEFT library has the method and computes the same, the folder is in PEFT's layout and both read it (peft.py).
Elsewhere `peft_type` is "MINILLAMA", which PEFT refuses by name instead of computing something else, and the file holds
the arguments of `adapt` and the tensors under the names of `adapter_tensors`.
"""

import hashlib
import json
from pathlib import Path

import torch

from ..checkpoints.files import (
    FileError,
    as_json,
    locked,
    parse_json,
    put_tensors,
    read_json,
    read_safetensors,
    refuse_unsound,
    remove,
    replacing,
    what_is_unsound,
)
from ..checkpoints.fingerprint import of_base, of_tensor, same_base
from ..device import shapes_only
from . import adapt, adapter_tensors, adapters, base_tensors, peft, whole_or_not_at_all

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST = 2**20  # bytes of an adapter_config.json


def fingerprint(model):
    """That of its base (checkpoints/fingerprint.py); a base in fewer bits remembers the one it had before."""
    if hasattr(model, "base_fingerprint"):
        return model.base_fingerprint
    return of_base({name: of_tensor(tensor) for name, tensor in base_tensors(model).items()})


def save_adapter(model, folder, name="default"):
    """Writes one adapter's options and tensors, and the fingerprint of its base, to a folder.

    Raises ValueError for an adapter that the model does not carry or whose numbers are none, FileError where nothing
    can be written or another process writes; what the folder held is then as it was.
    """
    if name not in adapters(model):
        raise ValueError(f"the model carries no adapter {name!r}: adapt(model, method) gives it one")
    parts = adapters(model)[name]
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in adapter_tensors(model, name).items()}
    for key, tensor in tensors.items():
        if unsound := what_is_unsound(tensor):
            raise ValueError(f"{key} holds {unsound}, so nothing was saved: train with a lower learning rate")
    config, tensors = peft.to_peft(model, parts, tensors) or ({"peft_type": "MINILLAMA", "parts": parts}, tensors)
    config |= {"base_model_name_or_path": getattr(model, "source", None)}
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True}
    truth = {"adapter_config": json.dumps(config, allow_nan=False), "numbers_sha256": digest(tensors)}
    with locked(folder) as folder, replacing(folder / CONFIG) as beside, replacing(folder / WEIGHTS) as weights:
        beside.write_text(as_json(config), encoding="utf-8")
        put_tensors(weights, tensors, base_fingerprint=fingerprint(model), **truth)
        remove(folder / CONFIG)  # the last moment of the old adapter; now the weights come into place, then this file


def digest(tensors):
    """SHA-256 of names, dtypes, shapes and numbers, in the order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def read_adapter(folder):
    """(adapter_config's content, tensors, fingerprint of the base or None) of an adapter's folder."""
    path, beside = Path(folder) / WEIGHTS, Path(folder) / CONFIG
    if not path.exists() and not beside.exists():
        raise FileError(f"{folder} holds no adapter: needed are {WEIGHTS} and {CONFIG}; check the folder's name")
    tensors, metadata = read_safetensors(path)
    refuse_unsound(tensors, path)
    if "adapter_config" not in metadata:  # written by another library
        return read_json(beside, LARGEST), tensors, metadata.get("base_fingerprint")
    if metadata.get("numbers_sha256") != digest(tensors):
        raise FileError(f"{path}: its numbers are not those that were written: it is damaged, copy it again")
    config = parse_json(metadata["adapter_config"].encode(), f"{path}, its own adapter_config,")
    if beside.exists():
        other = read_json(beside, LARGEST)
        unlike = [key for key in config.keys() | other.keys() if config.get(key) != other.get(key)]
        if unlike := sorted(set(unlike) - {"base_model_name_or_path", "inference_mode", "revision"}):
            key = unlike[0]
            raise FileError(
                f"{beside} says {key} is {other.get(key)!r}, and {WEIGHTS} was written with {config.get(key)!r}: the "
                "two do not belong together; copy both again, or save the adapter once more"
            )
    return config, tensors, metadata.get("base_fingerprint")


def load_adapter(model, folder, name="default", check_base=True):
    """Attaches the adapter of a folder under a name, makes it the active one, and returns the model.

    Raises FileError for a missing or damaged file, for options or shapes that do not fit the model, and, unless
    `check_base` is False, for an adapter that was trained on another base. The model is then as it was.
    """
    config, tensors, remembered = read_adapter(folder)
    path = Path(folder) / WEIGHTS
    if check_base and remembered is not None and not same_base(remembered, ours := fingerprint(model)):
        raise FileError(
            f"{path} was trained on a base with fingerprint {remembered[:16]!r}, this one has {ours[:16]!r}: load that "
            "base, or pass check_base=False (--any-base on the command line)"
        )
    if name in adapters(model):
        raise ValueError(
            f"the model has an adapter {name!r} already: load this one under another name, or delete_adapter that one"
        )
    try:
        if config.get("peft_type") == "MINILLAMA":
            parts = own_parts(config)
        else:
            parts, tensors = peft.from_peft(model, config, tensors)
        with shapes_only():  # shapes only: what does not fit is refused before any of it is made
            shapes = type(model)(model.config)
        for part in parts:
            adapt(shapes, **part)
        refuse_unlike(adapter_tensors(shapes), tensors, path)
        with whole_or_not_at_all(model):
            for part in parts:
                adapt(model, name=name, **part)
            fill(adapter_tensors(model, name), tensors)
    except (ValueError, KeyError, RuntimeError) as error:  # the last: a size that no machine has
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise FileError(f"{Path(folder) / CONFIG}: {reason}") from None
    return model


def own_parts(config):
    """The arguments of `adapt` for each method of an adapter in our own layout."""
    parts = config["parts"]
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"parts is {str(parts)[:40]}; needed is a list with the arguments of `adapt` for each method")
    for part in parts:
        if not isinstance(part.get("method"), str) or "name" in part:
            raise ValueError("a part without its method, or with a name: it is damaged, copy it again")
    return parts


def refuse_unlike(own, tensors, path):
    """Compares every name and shape of a file's tensors with the adapter's."""
    if unlike := sorted(own.keys() ^ tensors.keys()):
        what = "missing" if unlike[0] in own else "one tensor too many"
        raise ValueError(f"{unlike[0]} is {what} in {path.name}: the two files do not belong together")
    for key, tensor in own.items():
        if tensor.shape != tensors[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(tensors[key].shape)} in {path.name} and this base needs "
                f"{tuple(tensor.shape)}: it was made for another base"
            )


@torch.no_grad()
def fill(own, tensors):
    for key, tensor in own.items():
        tensor.copy_(tensors[key])
