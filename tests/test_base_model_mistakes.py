"""Lesson 01's catalogue planted in the models: each wrong part moves the logits, so none would pass unseen."""

import copy

import pytest
import torch
from small import make

import minillama
from minillama import attention, llama
from minillama.attention import Attention, RoPE
from minillama.checkpoints.architectures import ARCHITECTURES
from minillama.checkpoints.tensors import to_hf
from minillama.course.exercises import base_models as parts


def random_model():
    """A small LLaMA with grouped queries, eps in its norms large enough for its place to matter."""
    torch.manual_seed(0)
    model = make("grouped")
    for module in model.modules():
        if isinstance(module, llama.RMSNorm):
            module.eps = 0.3
    return model


def token_by_token(model, ids):
    """Logits and the first layer's cache, the ids given in three portions."""
    cache = minillama.Cache()
    logits = torch.cat([model(part, cache=cache) for part in ids.split([4, 1, 4], dim=1)], dim=1)
    return logits, cache.layers[0].k


KEPT = []


@pytest.fixture
def right(ids):
    """The random model, its logits, and the keys it caches: made once, for what is planted in its classes leaves them
    as they are."""
    with torch.no_grad():
        KEPT.extend(() if KEPT else (model := random_model(), model(ids), token_by_token(model, ids)[1]))
    return KEPT


def moved(a, b):
    """How far a stands from b, as a share of b's largest number; NaN is far."""
    return ((a - b).abs().max() / b.abs().max()).nan_to_num(nan=1.0).item()


def moves(model, ids, logits):
    """Whether the model's logits are others than these, or do not fit its next part at all."""
    try:
        return moved(model(ids), logits) > 0.01
    except (RuntimeError, IndexError):
        return True


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


def known(name):
    """The catalogue of an exercise: {mistake's name: wrong function}."""
    return {mistake.name: mistake.answer for mistake in parts.EXERCISES[name].mistakes}


def cases(name, plant, but=()):
    return [pytest.param(plant, wrong, id=f"{name}-{n}") for n, wrong in known(name).items() if n not in but]


NORMS, ROPES = known("rms_norm"), known("rope")
IN_HALF = (
    *("squares_in_half_precision", "left_in_float32"),
    *("angles_in_half_precision", "speeds_in_half_precision", "rope_left_in_float32", "positions_in_float16"),
)
NO_MATTER = (  # to this model, to a sum over features, and to positions 0, 1, 2 …
    *("theta_hard_coded", "put_back_by_turns", "halves_swapped"),
    *("second_half_negated", "positions_sorted", "positions_counted_on", "table_too_short"),
)
LATER = (
    "positions_from_one",
    "own_positions",
    "positions_from_the_first",
    "positions_from_their_mean",
)  # distances stay
ONCE = (
    *cases("rms_norm", in_norm, (*IN_HALF, "size_detached", "mean_over_axis_two", "eps_at_least")),
    *cases("rope", in_rope, (*IN_HALF, *LATER, *NO_MATTER)),
    *cases("grouped_query_attention", in_attend, ("masked_with_ten", "masked_with_fifty")),  # a share of e⁻¹⁰
    *cases("swiglu", in_mlp, ("batch_squeezed",)),
)
# what they cache is wrong
SAME_LOGITS = ("kept_unturned", "heads_repeated_in_the_cache", "positions_from_one", "new_in_front")
RIGHT = (
    (in_norm, parts.rms_norm),
    (in_rope, parts.rope),
    (in_attend, parts.grouped_query_attention),
    (in_mlp, parts.swiglu),
)


@torch.no_grad()
@pytest.mark.parametrize("plant, part", RIGHT)
def test_the_right_part_moves_nothing(plant, part, monkeypatch, ids, right):
    model, logits, _ = right
    plant(monkeypatch, part)
    assert moved(model(ids), logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("plant, mistake", ONCE)
def test_a_wrong_part_moves_the_logits(plant, mistake, monkeypatch, ids, right):
    model, logits, _ = right
    plant(monkeypatch, mistake)
    assert moves(model, ids, logits)


@torch.no_grad()
@pytest.mark.parametrize("name", NO_MATTER)
def test_the_order_of_features_does_not_count(name, monkeypatch, ids, right):
    """A score sums over features, in whatever order queries and keys have them; and the model's theta is 10,000."""
    model, logits, _ = right
    in_rope(monkeypatch, ROPES[name])
    assert moved(model(ids), logits) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", LATER)
def test_only_distances_count(name, monkeypatch, ids, right):
    """All positions later by the same number are no mistake to a LLaMA;
    positions that begin again at each call are one."""
    model, logits, _ = right
    in_rope(monkeypatch, ROPES[name])
    assert moved(model(ids), logits) < 1e-4
    assert (moved(token_by_token(model, ids)[0], logits) < 1e-4) == (name == "positions_from_one")


@torch.no_grad()
@pytest.mark.parametrize("name", ("right", *known("cached_attention")))
def test_a_wrong_cache_moves_the_logits(name, monkeypatch, ids, right):
    model, whole, keys = right
    in_cached_attention(monkeypatch, {"right": parts.cached_attention, **known("cached_attention")}[name])
    try:
        logits, kept = token_by_token(model, ids)
    except (RuntimeError, IndexError, ValueError, TypeError):  # what it cached does not fit what comes next
        assert name not in ("right", *SAME_LOGITS)
        return
    if name in ("right", *SAME_LOGITS):
        assert moved(logits, whole) < 1e-4
        assert (kept.shape == keys.shape and moved(kept, keys) < 1e-5) == (name == "right")
    else:
        assert moved(logits, whole) > 0.01


AS_A_TENSOR = (  # what a model takes as well
    *("tuple_of_matrices", "list_of_matrices", "tuple_of_biases"),
    *("biases_in_float32", "all_in_float32"),
)


def with_split(model, split):
    """A GPT-2's projections taken from its file's fused matrices, cut by this function."""
    file = to_hf(ARCHITECTURES["gpt2"], model.state_dict())
    for i, layer in enumerate(model.layers):
        matrices, biases = split(*(file[f"transformer.h.{i}.attn.c_attn.{kind}"] for kind in ("weight", "bias")))
        for name, matrix, bias in zip(("q_proj", "k_proj", "v_proj"), matrices, biases):
            projection = getattr(layer.self_attn, name)
            if (matrix.shape, bias.shape) != (projection.weight.shape, projection.bias.shape):
                raise RuntimeError(f"{name} does not fit")
            projection.weight.copy_(matrix), projection.bias.copy_(bias)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ("right", *(name for name in known("split_fused") if name not in AS_A_TENSOR)))
def test_a_wrong_split_moves_the_logits(name, ids):
    torch.manual_seed(0)
    model = make("gpt2")
    for parameter in model.parameters():  # biases of 0 could be cut in any way
        parameter += 0.1 * torch.randn(parameter.shape)
    logits, split = model(ids), {"right": parts.split_fused, **known("split_fused")}[name]
    try:
        right = moved(with_split(model, split)(ids), logits) < 1e-5
    except (RuntimeError, IndexError):
        right = False
    assert right == (name == "right")


@pytest.mark.parametrize("name", ("right", *known("answer_labels")))
def test_wrong_labels_change_the_loss(name, right):
    """Only the right labels are those of `collate`, and give its loss."""
    prompt, answer = [77, 5, 9, 5, 8, 5], [9, 5, 0, 5, 10]
    (model, *_), tokenizer = right, minillama.data.ByteTokenizer()
    expected = minillama.data.collate([(prompt, answer)], tokenizer)
    labels = {"right": parts.answer_labels, **known("answer_labels")}[name](prompt, answer)
    if name == "batch_axis":
        assert labels[0].dim() == 2
        return
    ids, labels = (row[None] for row in labels)
    loss = minillama.answer_loss(model, *expected)
    try:
        same = torch.allclose(minillama.answer_loss(model, ids, labels), loss)
    except (RuntimeError, IndexError, ValueError):
        same = False
    assert same == (name == "right")


@torch.no_grad()
def test_squares_overflow_in_float16(monkeypatch, ids):
    """A residual stream in the hundreds, as large models have: the right norm does not notice,
    squares in float16 are infinite."""
    model = random_model()
    model.embed_tokens.weight *= 500
    logits, half = model(ids), copy.deepcopy(model).half()
    assert moved(half(ids).float(), logits) < 0.01
    in_norm(monkeypatch, NORMS["squares_in_half_precision"])
    assert moved(half(ids).float(), logits) > 0.1


@torch.no_grad()
def test_angles_lose_their_positions_in_bfloat16(monkeypatch):
    """Positions beyond 256 are no longer whole in bfloat16: angles made there move the late logits."""
    model = random_model()
    ids = torch.randint(0, 101, (1, 500), generator=torch.Generator().manual_seed(1))
    logits, model = model(ids)[:, -50:], model.bfloat16()
    near = (model(ids)[:, -50:].float() - logits).abs().mean()
    in_rope(monkeypatch, ROPES["angles_in_half_precision"])
    assert (model(ids)[:, -50:].float() - logits).abs().mean() > 2 * near


@torch.no_grad()
@pytest.mark.parametrize(
    "plant, mistake", [(in_norm, NORMS["left_in_float32"]), (in_rope, ROPES["rope_left_in_float32"])]
)
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
    in_norm(monkeypatch, NORMS["size_detached"])
    assert moved(gradient(), right) > 0.01
