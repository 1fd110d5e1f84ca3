"""Lesson 01's catalogue planted in the models: each wrong part moves the logits, so none would pass unseen."""

import copy

import pytest
import torch
from conftest import make

import minillama
from minillama import attention, llama
from minillama.attention import Attention, RoPE
from minillama.checkpoints.architectures import ARCHITECTURES, to_hf
from minillama.course.exercises import base_models as parts


def random_model():
    """A small LLaMA with grouped queries, eps in its norms large enough for its place to matter."""
    torch.manual_seed(0)
    model = make("grouped")
    for module in model.modules():
        if isinstance(module, llama.RMSNorm):
            module.eps = 0.3
    return model


def moved(a, b):
    """How far a stands from b, as a share of b's largest number; NaN is far."""
    return ((a - b).abs().max() / b.abs().max()).nan_to_num(nan=1.0).item()


def in_norm(patch, mistake):
    patch.setattr(llama.RMSNorm, "forward", lambda self, x: mistake(x, self.weight, self.eps))


def in_rope(patch, mistake):
    patch.setattr(RoPE, "__call__", lambda self, positions: (positions, self.theta))  # handed through to `rotate`
    patch.setattr(attention, "rotate", mistake)


def in_attend(patch, mistake):
    patch.setattr(Attention, "attend", lambda self, q, k, v, mask=None, cache=None: mistake(q, k, v))


def in_mlp(patch, mistake):
    def forward(self, x):
        return mistake(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)

    patch.setattr(llama.MLP, "forward", forward)


def in_cached_attention(patch, mistake):
    def forward(self, x, positions=None, mask=None, cache=None):
        out, (cache.k, cache.v) = mistake(self, x, None if cache.k is None else (cache.k, cache.v))
        return out

    patch.setattr(Attention, "forward", forward)


def cases(mistakes, plant, but=()):
    return [pytest.param(plant, mistake, id=mistake.__name__) for mistake in mistakes if mistake not in but]


DTYPES = (  # right in float32
    parts.squares_in_half_precision, parts.left_in_float32, parts.angles_in_half_precision, parts.rope_left_in_float32,
)  # fmt: skip
ONCE = (
    *cases(parts.NORMS, in_norm, (*DTYPES, parts.size_detached)),
    *cases(parts.ROPES, in_rope, (*DTYPES, parts.positions_from_one, parts.own_positions)),
    *cases(parts.ATTENTIONS, in_attend),
    *cases(parts.SWIGLUS, in_mlp),
)
SAME_LOGITS = (parts.kept_unturned, parts.heads_repeated_in_the_cache)  # what they cache is wrong
RIGHT = (
    (in_norm, parts.right_rms_norm),
    (in_rope, parts.right_rope),
    (in_attend, parts.right_attention),
    (in_mlp, parts.right_swiglu),
)


@torch.no_grad()
@pytest.mark.parametrize("plant, right", RIGHT)
def test_the_right_part_moves_nothing(plant, right, monkeypatch, ids):
    model = random_model()
    logits = model(ids)
    plant(monkeypatch, right)
    assert moved(model(ids), logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("plant, mistake", ONCE)
def test_a_wrong_part_moves_the_logits(plant, mistake, monkeypatch, ids):
    model = random_model()
    logits = model(ids)
    plant(monkeypatch, mistake)
    assert moved(model(ids), logits) > 0.01


def token_by_token(model, ids):
    """Logits and the first layer's cache, the ids given in three portions."""
    cache = minillama.Cache()
    logits = torch.cat([model(part, cache=cache) for part in ids.split([4, 1, 4], dim=1)], dim=1)
    return logits, cache.layers[0].k


@torch.no_grad()
@pytest.mark.parametrize("mistake", (parts.positions_from_one, parts.own_positions))
def test_only_distances_count(mistake, monkeypatch, ids):
    """All positions later by the same number are no mistake to a LLaMA;
    positions that begin again at each call are one."""
    model = random_model()
    logits = model(ids)
    in_rope(monkeypatch, mistake)
    assert moved(model(ids), logits) < 1e-4
    assert (moved(token_by_token(model, ids)[0], logits) < 1e-4) == (mistake is parts.positions_from_one)


@torch.no_grad()
@pytest.mark.parametrize("plant, mistake", cases((parts.right_cached, *parts.CACHES), in_cached_attention))
def test_a_wrong_cache_moves_the_logits(plant, mistake, monkeypatch, ids):
    model = random_model()
    whole, (_, keys) = model(ids), token_by_token(model, ids)
    plant(monkeypatch, mistake)
    logits, kept = token_by_token(model, ids)
    if mistake is parts.right_cached or mistake in SAME_LOGITS:
        assert moved(logits, whole) < 1e-4
        assert (kept.shape == keys.shape and moved(kept, keys) < 1e-5) == (mistake is parts.right_cached)
    else:
        assert moved(logits, whole) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("split", (parts.right_split, *parts.SPLITS))
def test_a_wrong_split_moves_the_logits(split, ids):
    torch.manual_seed(0)
    model = make("gpt2")
    logits, file = model(ids), to_hf(ARCHITECTURES["gpt2"], model.state_dict())
    for i, layer in enumerate(model.layers):
        matrices, biases = split(*(file[f"transformer.h.{i}.attn.c_attn.{kind}"] for kind in ("weight", "bias")))
        for name, matrix, bias in zip(("q_proj", "k_proj", "v_proj"), matrices, biases):
            projection = getattr(layer.self_attn, name)
            projection.weight.copy_(matrix), projection.bias.copy_(bias)
    assert (moved(model(ids), logits) < 1e-5) == (split is parts.right_split)


@torch.no_grad()
def test_squares_overflow_in_float16(monkeypatch, ids):
    """A residual stream in the hundreds, as large models have: the right norm does not notice,
    squares in float16 are infinite."""
    model = random_model()
    model.embed_tokens.weight *= 500
    logits, half = model(ids), copy.deepcopy(model).half()
    assert moved(half(ids).float(), logits) < 0.01
    in_norm(monkeypatch, parts.squares_in_half_precision)
    assert moved(half(ids).float(), logits) > 0.1


@torch.no_grad()
def test_angles_lose_their_positions_in_bfloat16(monkeypatch):
    """Positions beyond 256 are no longer whole in bfloat16: angles made there move the late logits."""
    model = random_model()
    ids = torch.randint(0, 101, (1, 500), generator=torch.Generator().manual_seed(1))
    logits, model = model(ids)[:, -50:], model.bfloat16()
    near = (model(ids)[:, -50:].float() - logits).abs().mean()
    in_rope(monkeypatch, parts.angles_in_half_precision)
    assert (model(ids)[:, -50:].float() - logits).abs().mean() > 2 * near


@torch.no_grad()
@pytest.mark.parametrize("plant, mistake", [(in_norm, parts.left_in_float32), (in_rope, parts.rope_left_in_float32)])
def test_a_part_that_leaves_bfloat16_stops_the_model(plant, mistake, monkeypatch, ids):
    model = random_model().bfloat16()
    plant(monkeypatch, mistake)
    with pytest.raises(RuntimeError, match="dtype"):
        model(ids)


def test_a_norm_without_its_gradient_trains_otherwise(monkeypatch, ids):
    model = random_model()

    def gradient():
        model.zero_grad()
        minillama.answer_loss(model, ids, ids).backward()
        return model.embed_tokens.weight.grad.clone()

    right = gradient()
    in_norm(monkeypatch, parts.size_detached)
    assert moved(gradient(), right) > 0.01
