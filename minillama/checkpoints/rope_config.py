"""RoPE's part of Hugging Face's config.json: rope_theta and rope_scaling, read and written (rope.py computes them)."""

import dataclasses
import math

from ..rope import SCALINGS
from .fields import FULL, TYPES, factors, honest
from .files import shortened


def read_rope(content, row):
    """rope_theta and rope_scaling: transformers 5 writes rope_parameters, earlier releases rope_theta and
    rope_scaling."""
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = content.get(key) or {}
        if not isinstance(found, dict) or not isinstance(found.get(FULL, {}), dict):
            raise ValueError(f"{key} is {shortened(found)}; needed is an object with names and values")
        rope |= found.get(FULL, found)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if row.theirs == "Phi3ForCausalLM" and kind in ("su", "yarn"):  # as early Phi-3s call it
        kind = "longrope"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {shortened(rope['partial_rotary_factor'])}; only 1.0 can be honoured"
        )
    theta = rope.get("rope_theta", content.get("rope_theta", row.absent.get("rope_theta", 10000.0)))
    theta = {"rope_theta": float(honest("rope_theta", theta))}
    if kind == "default":
        return theta
    if not isinstance(kind, str) or kind not in SCALINGS:
        *most, last = SCALINGS
        raise ValueError(
            f"rope_type is {shortened(kind)}; only 'default', {', '.join(most)} and {last} can be honoured"
        )
    longest = content.get("max_position_embeddings", row.absent.get("max_position_embeddings", 2048))
    rope = {"original_max_position_embeddings": longest} | rope | {"max_position_embeddings": longest}
    original = content.get("original_max_position_embeddings", row.absent.get("original_max_position_embeddings"))
    if original is not None:  # what stands outside of rope_scaling counts more to transformers
        rope["original_max_position_embeddings"] = original
    numbers = {key: honest(key, value) for key, value in rope.items() if key in TYPES and value is not None}
    if kind == "longrope":
        numbers |= {key: factors(key, rope[key]) for key in ("short_factor", "long_factor") if key in rope}
        numbers.setdefault("factor", longest / numbers["original_max_position_embeddings"])
    if kind in ATTENTION_FACTORS and "factor" in numbers:
        numbers.setdefault("attention_factor", ATTENTION_FACTORS[kind](numbers))
    fields = dataclasses.fields(SCALINGS[kind])
    if missing := [own.name for own in fields if own.default is dataclasses.MISSING and own.name not in numbers]:
        raise ValueError(f"rope_type is {kind!r} and {missing[0]} is missing beside it")
    numbers = {own.name: numbers[own.name] for own in fields if own.name in numbers}
    numbers = {key: float(value) if TYPES.get(key, (0,))[0] is float else value for key, value in numbers.items()}
    return theta | {"rope_scaling": SCALINGS[kind](**numbers)}


def yarn_attention(numbers):
    """YaRN's attention_factor where config.json gives none: 0.1 ln(factor) + 1, or DeepSeek's ratio of two such."""

    def grown(by):
        return 1.0 if numbers["factor"] <= 1 else 0.1 * by * math.log(numbers["factor"]) + 1

    by, by_all = numbers.get("mscale"), numbers.get("mscale_all_dim")
    return grown(by) / grown(by_all) if by and by_all else grown(1)


def long_attention(numbers):
    """Long RoPE's: √(1 + ln factor / ln original length)."""
    factor = max(1.0, numbers["factor"])
    return math.sqrt(1 + math.log(factor) / math.log(numbers["original_max_position_embeddings"]))


ATTENTION_FACTORS = {"yarn": yarn_attention, "longrope": long_attention}


def write_rope(config):
    """The rope_parameters of config.json."""
    if config.rope_scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    (kind,) = (kind for kind, scaling in SCALINGS.items() if isinstance(config.rope_scaling, scaling))
    numbers = dataclasses.asdict(config.rope_scaling)
    for key, value in numbers.items():
        if isinstance(value, tuple):
            numbers[key] = list(value)
    if kind == "dynamic":
        del numbers["max_position_embeddings"]  # stands in config.json already
    return {"rope_type": kind, "rope_theta": config.rope_theta} | numbers
