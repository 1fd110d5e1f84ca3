"""Adapter folders: adapter_config.json beside adapter_model.safetensors.

Where the PEFT library has the method and computes the same, the folder is PEFT's own and both read it. Elsewhere
`peft_type` is "MINILLAMA", which PEFT refuses by name instead of computing something else, and the file holds the
options of `adapt` and the tensors under their own names.
"""

import hashlib
from pathlib import Path

import torch

from ..files import FileError, read_json, read_metadata, read_tensors, write_json, write_tensors
from . import adapt, adapter_parameters, detach, is_adapted


def fingerprint(model):
    """16 hex digits that tell one base from another: names, shapes, and 64 spread values of each weight in bfloat16,
    so that a base read in float32 and in bfloat16 has the same."""
    digest = hashlib.sha256()
    own = set(adapter_parameters(model))
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0].replace(".base.", ".")):
        if name in own:
            continue
        digest.update(f"{name.replace('.base.', '.')} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        spread = flat[:: max(1, flat.numel() // 64)].to(torch.bfloat16).cpu()
        digest.update(spread.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def is_peft(model):
    """Whether PEFT's adaption prompt computes what this adapter does: one plain gate a layer, on a LLaMA or Mistral
    whose output projection has no bias (PEFT would add it twice)."""
    return (
        model.adapter["method"] == "llama_adapter"
        and (model.adapter["gate"], model.adapter["tanh"]) == ("layer", False)
        and getattr(model.config, "attention_bias", True) is False
    )


def to_peft(name, tensor):
    name = name.replace(".prompt", ".adaption_prompt").replace(".gate", ".adaption_gate")
    return f"base_model.model.model.{name}", tensor[None] if name.endswith("prompt") else tensor


def from_peft(name, tensor):
    name = name.removeprefix("base_model.model.model.").replace(".adaption_", ".")
    return name, tensor[0] if name.endswith("prompt") and tensor.dim() == 3 else tensor


def save_adapter(model, folder):
    """Writes the adapter's options and tensors, and the fingerprint of its base, to a folder."""
    if not is_adapted(model):
        raise ValueError("the model carries no adapter: adapt(model, method) gives it one")
    tensors, options = adapter_parameters(model), model.adapter
    config = {"peft_type": "MINILLAMA", **options}
    if is_peft(model):
        tensors = dict(to_peft(*item) for item in tensors.items())
        config = {
            "peft_type": "ADAPTION_PROMPT",
            "adapter_len": options["prompt_length"],
            "adapter_layers": options["layers"] or len(model.layers),
            "target_modules": "self_attn",
        }
    config |= {"base_model_name_or_path": getattr(model, "source", None), "task_type": "CAUSAL_LM", "inference_mode": True}
    folder = Path(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors, base_fingerprint=fingerprint(model))
    write_json(folder / "adapter_config.json", config)


def read_options(path, model):
    """The arguments of `adapt` that an adapter_config.json stands for."""
    config = read_json(path)
    about = ("peft_type", "base_model_name_or_path", "task_type", "inference_mode")
    if config.get("peft_type") == "MINILLAMA" and "method" in config:
        return {name: value for name, value in config.items() if name not in about}
    if config.get("peft_type") != "ADAPTION_PROMPT":
        raise FileError(f"{path}: peft_type is {config.get('peft_type')!r}; ADAPTION_PROMPT and MINILLAMA can be read")
    if getattr(model.config, "attention_bias", True):
        raise FileError(f"{path}: peft_type ADAPTION_PROMPT stands for another formula where the output projection has a bias, as in this base")
    for key in ("adapter_len", "adapter_layers"):
        if key not in config:
            raise FileError(f"{path}: {key} is missing, without which the adapter's shape is unknown: copy the file again")
    if config.get("target_modules") not in (None, "self_attn"):
        raise FileError(f"{path}: target_modules is {config['target_modules']!r}; only 'self_attn' can be adapted")
    return {"method": "llama_adapter", "prompt_length": config["adapter_len"], "layers": config["adapter_layers"], "gate": "layer", "tanh": False}


def load_adapter(model, folder, check_base=True):
    """Attaches the adapter of a folder, frozen base and all, and returns the model.

    Raises FileError for a missing or damaged file, for shapes that do not fit the model, and, unless `check_base` is
    False, for an adapter that was trained on another base. The model is then as it was.
    """
    config_path, path = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    options = read_options(config_path, model)
    tensors = dict(from_peft(*item) for item in read_tensors(path).items())
    remembered, ours = read_metadata(path).get("base_fingerprint"), fingerprint(model)
    if check_base and remembered not in (None, ours):
        raise FileError(f"{path} was trained on a base with fingerprint {remembered}, this one has {ours}: load that base, or pass check_base=False")
    try:
        adapt(model, **options)
    except (ValueError, TypeError) as error:
        raise FileError(f"{config_path}: {error}") from None
    try:
        own = adapter_parameters(model)
        if own.keys() != tensors.keys():
            name = sorted(own.keys() ^ tensors.keys())[0]
            raise FileError(f"{path}: {name} is {'missing' if name in own else 'one tensor too many'} for the options in {config_path.name}: the two do not belong together")
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise FileError(f"{path}: {name} has shape {tuple(tensors[name].shape)} and this base needs {tuple(parameter.shape)}: it was made for another base")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
    except BaseException:
        detach(model)
        raise
    return model
