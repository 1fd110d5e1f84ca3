"""What PEFT's configurations can ask for: read right, to the same logits, or refused by name; never anything else."""

import copy
import json
import math

import peft
import pytest
import torch
from test_adapter_files import BASES, FUSED, theirs
from test_models import build

import minillama
from minillama import load_adapter, save_adapter
from minillama.adapters import delete_adapter, wrappers

# Which layers are adapted: a function of the base, since GPT-2 and Phi-3 have names of their own.
LAYERS = {"gpt2": "transformer.h"}


def at(kind, number, name):
    """The whole name of a projection in one layer."""
    parent = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    name = FUSED.get(kind, {}).get(name, name)
    parent = {"gpt2": {"self_attn": "attn", "mlp": "mlp"}}.get(kind, {}).get(parent, parent)
    return f"{LAYERS.get(kind, 'model.layers')}.{number}.{parent}.{name.rpartition('.')[2]}"


TARGETS = {
    "names": lambda kind: theirs(kind, ["q_proj", "v_proj", "down_proj"]),
    "one name": lambda kind: theirs(kind, ["up_proj"]),
    "whole names": lambda kind: [at(kind, 0, "q_proj"), at(kind, 2, "down_proj")],
    "a whole name beside a name": lambda kind: [at(kind, 1, "o_proj"), *theirs(kind, ["q_proj"])],
    "a regular expression": lambda kind: r".*\.[02]\..*(q_proj|qkv_proj|c_attn|down_proj)",
    "all-linear": lambda kind: "all-linear",
    "the head": lambda kind: ["lm_head", *theirs(kind, ["v_proj"])],
}
OPTIONS = {
    "plain": dict(r=4),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True),
    "dora": dict(r=2, use_dora=True),
    "dora and rslora": dict(r=3, lora_alpha=7, use_dora=True, use_rslora=True),
    "dropout": dict(r=2, lora_dropout=0.3),
    "a list excluded": dict(r=2, exclude_modules=["o_proj", "attn.c_proj", "lm_head"]),
    "a rule excludes": dict(r=2, exclude_modules=r".*\.1\..*"),
    "another start": dict(r=2, init_lora_weights=False),
    "orthogonal": dict(r=2, init_lora_weights="orthogonal"),
    "the first layer": dict(r=2, layers_to_transform=0),
    "some layers": dict(r=2, layers_to_transform=[0, 2]),
    "layers by their word": dict(r=2, layers_to_transform=[1], layers_pattern="layers"),
    "layers by several words": dict(r=2, layers_to_transform=[1, 2], layers_pattern=["layers", "h"]),
}
KINDS = ("llama", "phi3", "gpt2")
CASES = [
    (targets, options)
    for targets in TARGETS
    for options in OPTIONS
    if not ("layer" in options and targets in ("a regular expression", "all-linear"))  # PEFT refuses these itself
]
IA3 = {
    "names": lambda kind: dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "no feed-forward": lambda kind: dict(target_modules=["q_proj", "o_proj"], feedforward_modules=[]),
    "a rule": lambda kind: dict(target_modules=r".*\.[01]\..*(v_proj|up_proj)", feedforward_modules=r".*up_proj"),
    "whole names": lambda kind: dict(
        target_modules=[at(kind, 0, "v_proj"), at(kind, 1, "down_proj")], feedforward_modules=[at(kind, 1, "down_proj")]
    ),
    "some excluded": lambda kind: dict(
        target_modules=["k_proj", "v_proj"], feedforward_modules=[], exclude_modules=["k_proj"]
    ),
    "all-linear": lambda kind: dict(target_modules="all-linear", feedforward_modules=["down_proj"]),
    "no zeros": lambda kind: dict(target_modules=["v_proj"], feedforward_modules=[], init_ia3_weights=False),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{kind: (their base, ours of the same weights)}"""
    made = {}
    for kind in (*KINDS, "qwen3"):
        torch.manual_seed(0)
        base = build(BASES[kind]).eval()
        with torch.no_grad():
            for parameter in base.parameters():
                parameter += (0.3 if parameter.dim() == 1 else 0.1) * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp(kind)
        base.save_pretrained(folder)
        made[kind] = base, minillama.load(folder)[0]
    return made


def written(base, config, folder):
    """Their adapted model with random numbers, after its files were written."""
    adapted = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(word in name for word in ("lora", "ia3")):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


def read_right(base, ours, config, ids, folder):
    """What PEFT writes we read to the same logits, and what we write of it PEFT reads to the same."""
    torch.manual_seed(1)
    with torch.no_grad():
        expected = written(base, config, folder / "theirs")(ids).logits
        near = 1e-5 * max(1, expected.abs().max())
        load_adapter(ours, folder / "theirs")
        try:
            assert (ours(ids) - expected).abs().max() < near
            assert (expected - base(ids).logits).abs().max() > 1e-3
            save_adapter(ours, folder / "ours")
        finally:
            delete_adapter(ours)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()
        assert (again(ids).logits - expected).abs().max() < near


def turned(kinds, cases):
    """(kind, case) for each case one kind, in turn; the first of each dozen is fast."""
    return [
        pytest.param(kinds[i % len(kinds)], case, marks=() if i % 12 == 0 else pytest.mark.slow)
        for i, case in enumerate(cases)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, case", turned(KINDS, CASES))
def test_lora_is_read_right(kind, case, pairs, ids, tmp_path):
    targets, options = case
    config = dict(lora_alpha=5, task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2") | OPTIONS[options]
    if kind == "gpt2" and config.get("layers_pattern") == "layers":
        config["layers_pattern"] = "h"
    config = peft.LoraConfig(target_modules=TARGETS[targets](kind), **config)
    read_right(*pairs[kind], config, ids, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, case", turned(("llama", "qwen3"), [case for case in IA3 for _ in range(2)]))
def test_ia3_is_read_right(kind, case, pairs, ids, tmp_path):
    read_right(*pairs[kind], peft.IA3Config(task_type="CAUSAL_LM", **IA3[case](kind)), ids, tmp_path)


# (what the file says, what the sentence says), on a LoRA of q_proj and v_proj.
REFUSED = [
    *[({key: value}, f"{key} is") for key, value in {
        "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}, "bias": "all",
        "lora_bias": True, "layer_replication": [[0, 2], [1, 3]], "trainable_token_indices": [0, 7],
        "target_parameters": ["mlp.up_proj.weight"], "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0},
        "corda_config": {"cache_file": "x"}, "megatron_config": {"a": 1}, "use_qalora": True, "use_bdlora": {"a": 1},
        "alora_invocation_tokens": [3], "arrow_config": {"k": 1}, "velora_config": {"a": 1}, "kasa_config": {"a": 1},
        "monteclora_config": {"a": 1}, "ensure_weight_tying": True, "a_key_of_tomorrow": 0, "lora_ga_config": {"a": 1},
    }.items()],
    ({"bias": "lora_only"}, "bias is 'lora_only'.*biases"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    ({"peft_type": "P_TUNING"}, "peft_type is 'P_TUNING'"),
    ({"r": 0}, "r is 0"),
    ({"r": 5}, "shape"),
    ({"lora_alpha": math.inf}, "Infinity"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"use_rslora": 1}, "use_rslora is 1"),
    ({"layers_to_transform": [1]}, r"does not ask for model.layers.0.self_attn.q_proj .*weights have an adapter"),
    ({"layers_to_transform": 0}, r"does not ask for model.layers.1.self_attn.q_proj"),
    ({"layers_pattern": "h", "layers_to_transform": [0]}, "does not ask for model.layers.0.self_attn.q_proj"),
    ({"exclude_modules": ["v_proj"]}, "does not ask for model.layers.0.self_attn.v_proj"),
    ({"target_modules": ["q_proj"]}, "does not ask for model.layers.0.self_attn.v_proj"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "asks for model.layers.0.self_attn.o_proj.*have nothing"),
    ({"target_modules": "all-linear"}, "asks for model.layers.0.mlp.down_proj"),
    ({"target_modules": 3}, "target_modules is 3"),
    ({"exclude_modules": [3]}, "exclude_modules is"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(pairs, tmp_path_factory):
    """A folder of PEFT's with a LoRA of q_proj and v_proj."""
    path = tmp_path_factory.mktemp("lora")
    written(pairs["llama"][0], peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), path)
    return path


@pytest.mark.parametrize("says, named", REFUSED, ids=lambda value: next(iter(value), "") if value else "")
def test_what_is_not_honoured_is_refused_by_name(says, named, pairs, folder, tmp_path):
    ours = pairs["llama"][1]
    config = json.loads((folder / "adapter_config.json").read_text()) | says
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(minillama.FileError, match=named) as error:
        load_adapter(ours, tmp_path)
    assert not wrappers(ours) and "\n" not in str(error.value)


def test_there_are_cases_enough():
    assert len(CASES) + 2 * len(IA3) + len(REFUSED) >= 120


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_auto_peft_opens_our_folders(pairs, ids, tmp_path):
    """By base_model_name_or_path: the folder of the base, or its name on the hub where it came from its cache."""
    base, _ = pairs["qwen3"]
    cached = tmp_path / "models--owner--a.model-3b" / "snapshots" / "0123abcd"
    for folder, source in ((tmp_path / "base", str(tmp_path / "base")), (cached, "owner/a.model-3b")):
        base.save_pretrained(folder)
        ours, _ = minillama.load(folder)
        assert ours.source == source
        minillama.adapt(ours, "lora", targets="all-linear", layers=2, alpha=3.0)
        for parameter in minillama.trainable_parameters(ours).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        save_adapter(ours, tmp_path / "adapter")
        said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == source and said["layers_to_transform"] == [1, 2]
        if folder != cached:
            theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
            assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-5 * max(1, ours(ids).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_dropout_is_seeded_and_off_in_eval(method, pairs, ids):
    ours = minillama.adapt(copy.deepcopy(pairs["llama"][1]), method, dropout=0.5, targets="all-linear")
    for parameter in minillama.trainable_parameters(ours).values():
        parameter.copy_(0.3 * torch.randn(parameter.shape))
    assert torch.equal(ours(ids), ours(ids))  # the base was in eval mode
    ours.train()
    seeded = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        seeded.append(ours(ids))
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    assert torch.equal(ours.eval()(ids), ours(ids))


@pytest.mark.parametrize("method", ("lora", "dora", "ia3", "bottleneck"))
def test_layers(method, pairs):
    """The top so many, or those with these numbers; others are refused."""
    ours = copy.deepcopy(pairs["llama"][1])
    for layers, numbers in ((None, {0, 1, 2}), (1, {2}), (2, {1, 2}), ([0], {0}), ((0, 2), {0, 2})):
        minillama.adapt(ours, method, layers=layers)
        assert {int(place.split(".")[1]) for place, _ in wrappers(ours)} == numbers
        delete_adapter(ours)
    for wrong in (0, 4, -1, [3], [-1], []):
        with pytest.raises(ValueError, match="layers is .*the model has 3"):
            minillama.adapt(ours, method, layers=wrong)
        assert not wrappers(ours)
