"""Adapter folders: adapter_config.json beside adapter_model.safetensors.

Where the PEFT library has the method and computes the same, the folder is in PEFT's layout and both read it (peft.py).
Elsewhere `peft_type` is "MINILLAMA", which PEFT refuses by name instead of computing something else, and the file holds
the arguments of `adapt` and the tensors under their own names.
"""

import hashlib
from pathlib import Path

import torch

from ..files import FileError, read_json, read_metadata, read_tensors, write_json, write_tensors
from . import activate, adapt, adapter_parameters, detach, own_parameters, peft, wrappers


def fingerprint(model):
    """16 hex digits that tell one base from another: names, shapes, and 64 spread values of each weight in bfloat16,
    so that a base read in float32 and in bfloat16 has the same."""
    own = {id(parameter) for _, wrapper in wrappers(model) for _, parameter in own_parameters(wrapper)}
    named = {name.replace(".base.", "."): parameter for name, parameter in model.named_parameters() if id(parameter) not in own}
    digest = hashlib.sha256()
    for name, parameter in sorted(named.items()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        spread = flat[:: max(1, flat.numel() // 64)].to(torch.bfloat16).cpu()
        digest.update(spread.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model, folder, name="default"):
    """Writes one adapter's options and tensors, and the fingerprint of its base, to a folder."""
    parts = getattr(model, "adapters", {}).get(name)
    if not parts:
        raise ValueError(f"the model carries no adapter {name!r}: adapt(model, method) gives it one")
    tensors = {key: parameter.detach().cpu() for key, parameter in adapter_parameters(model, name).items()}
    config, tensors = peft.to_peft(model, parts, tensors) or ({"peft_type": "MINILLAMA", "parts": parts}, tensors)
    config |= {"base_model_name_or_path": getattr(model, "source", None), "task_type": "CAUSAL_LM", "inference_mode": True}
    folder = Path(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors, base_fingerprint=fingerprint(model))
    write_json(folder / "adapter_config.json", config)


def load_adapter(model, folder, name="default", check_base=True):
    """Attaches the adapter of a folder under a name, makes it the active one, and returns the model.

    Raises FileError for a missing or damaged file, for options or shapes that do not fit the model, and, unless
    `check_base` is False, for an adapter that was trained on another base. The model is then as it was.
    """
    config_path, path = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    config, tensors = read_json(config_path), read_tensors(path)
    remembered, ours = read_metadata(path).get("base_fingerprint"), fingerprint(model)
    if check_base and remembered not in (None, ours):
        raise FileError(f"{path} was trained on a base with fingerprint {remembered}, this one has {ours}: load that base, or pass check_base=False")
    if name in getattr(model, "adapters", {}):
        raise ValueError(f"the model has an adapter {name!r} already: load this one under another name, or detach that one")
    active = [other for other in getattr(model, "adapters", {}) if any(w.active for _, w in wrappers(model) if w.adapter == other)]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if config.get("peft_type") == "MINILLAMA":
            parts = config["parts"]
        else:
            parts, tensors = peft.from_peft(model, config, tensors)
        for part in parts:
            adapt(model, name=name, **part)
        own = adapter_parameters(model, name)
        if unlike := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(f"{unlike[0]} is {'missing' if unlike[0] in own else 'one tensor too many'} in {path.name}: the two files do not belong together")
        for key, parameter in own.items():
            if parameter.shape != tensors[key].shape:
                raise ValueError(f"{key} has shape {tuple(tensors[key].shape)} in {path.name} and this base needs {tuple(parameter.shape)}: it was made for another base")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(tensors[key])
    except (ValueError, TypeError, KeyError) as error:
        activate(detach(model, name), *active)
        for parameter, before in required:
            parameter.requires_grad_(before)
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise FileError(f"{config_path}: {reason}") from None
    return model
