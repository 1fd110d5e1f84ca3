"""Lesson 01: the parts of a LLaMA and of a GPT-2, with the wrong versions that one writes easily."""

import torch
import torch.nn.functional as F

import minillama

from ...attention import Attention, RoPE, rotate
from ...checkpoints.architectures import ARCHITECTURES, from_hf
from ..papers import smollm2
from . import Exercise, Question, Wrong, describe, filled, gradients, named

# ── RMSNorm ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def right_rms_norm(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def mean_subtracted(x, weight, eps):
    """the mean subtracted first, as LayerNorm does; RMSNorm leaves the mean where it is"""
    return right_rms_norm(x - x.mean(-1, keepdim=True), weight, eps)


def eps_outside_the_root(x, weight, eps):
    """eps added to the root instead of to the mean square inside it: x / (√mean(x²) + eps)"""
    x32 = x.float()
    return (x32 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight).to(x.dtype)


def eps_forgotten(x, weight, eps):
    """eps left out: a vector of zeros is then divided by zero"""
    return right_rms_norm(x, weight, 0.0)


def weight_forgotten(x, weight, eps):
    """the learned weight left out"""
    return right_rms_norm(x, torch.ones_like(weight), eps)


def weight_plus_one(x, weight, eps):
    """multiplied by 1 + weight, which is Gemma's RMSNorm; LLaMA's multiplies by the weight alone"""
    return right_rms_norm(x, 1 + weight, eps)


def mean_over_tokens(x, weight, eps):
    """the mean taken over the tokens instead of the features; each token is normed by itself, over its last axis"""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-2, keepdim=True) + eps) * weight).to(x.dtype)


def mean_over_everything(x, weight, eps):
    """one mean over all tokens and features; each token is normed by itself: mean(-1, keepdim=True)"""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean() + eps) * weight).to(x.dtype)


def sum_for_mean(x, weight, eps):
    """the sum of the squares where their mean is needed: the result is √D too small"""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).sum(-1, keepdim=True) + eps) * weight).to(x.dtype)


def divided_by_the_length(x, weight, eps):
    """divided by the vector's length, the root of the sum of squares; it is the root of their mean plus eps"""
    x32 = x.float()
    return (x32 / x32.norm(dim=-1, keepdim=True) * weight).to(x.dtype)


def divided_by_the_deviation(x, weight, eps):
    """divided by the standard deviation, for which the mean is subtracted; RMSNorm's squares are those of x itself"""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.var(-1, keepdim=True) + eps) * weight).to(x.dtype)


def root_forgotten(x, weight, eps):
    """divided by the mean square, not by its root"""
    x32 = x.float()
    return (x32 / (x32.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def squares_in_half_precision(x, weight, eps):
    """the squares taken in the input's own dtype: in float16 they overflow beyond 255, in bfloat16 they lose digits;
    use x.float() and cast back at the end"""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def left_in_float32(x, weight, eps):
    """float32 returned for a half-precision input; cast back with .to(x.dtype)"""
    return right_rms_norm(x.float(), weight.float(), eps)


def size_detached(x, weight, eps):
    """the root mean square taken without gradient; it is part of the function, and the gradient goes through it"""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps).detach() * weight).to(x.dtype)


NORMS = (
    mean_subtracted, eps_outside_the_root, eps_forgotten, weight_forgotten, weight_plus_one, mean_over_tokens,
    mean_over_everything, sum_for_mean, divided_by_the_length, divided_by_the_deviation, root_forgotten,
    squares_in_half_precision, left_in_float32, size_detached,
)  # fmt: skip


def probe_rms_norm(answer, draw):
    x, weight = (draw(2, 5, 8) + 0.5).requires_grad_(), draw(8).requires_grad_()
    out = answer(x, weight, 0.3)
    yield "the output (B, T, D)", out
    yield from zip(("x's gradient (B, T, D)", "the weight's gradient (D)"), gradients(out, x, weight))
    yield "the output for one vector (D)", answer(x[0, 0].detach(), weight.detach(), 0.3)
    yield "the output for zeros (B, T, D)", answer(torch.zeros(1, 2, 8), weight.detach(), 1e-6)
    yield (
        "the output for large numbers in float16 (B, T, D)",
        answer((400 * x.detach()).half(), weight.detach().half(), 0.3),
    )


# ── RoPE ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def angles(positions, d, theta):
    return positions[:, None].float() * theta ** -(torch.arange(0, d, 2).float() / d)  # (T, d/2)


def turned(x, angle, sign=1):
    """x with feature i turned against feature i + d/2 by these angles (…, d/2)."""
    (a, b), cos, sin = x.chunk(2, -1), angle.cos().to(x.dtype), sign * angle.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def right_rope(x, positions, theta):
    return turned(x, angles(positions, x.shape[-1], theta))


def pairs_interleaved(x, positions, theta):
    """neighbours turned together, features 2i and 2i + 1, as in Meta's files;
    here feature i goes with feature i + d/2"""
    angle = angles(positions, x.shape[-1], theta)
    (a, b), cos, sin = (x[..., ::2], x[..., 1::2]), angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def turned_backwards(x, positions, theta):
    """turned the wrong way: the new first half is a·cos − b·sin, the new second half b·cos + a·sin"""
    return turned(x, angles(positions, x.shape[-1], theta), sign=-1)


def positions_from_one(x, positions, theta):
    """positions counted from 1 where they are given from 0: the first token must come out as it went in"""
    return right_rope(x, positions + 1, theta)


def own_positions(x, positions, theta):
    """the tokens counted anew from 0, the given positions ignored"""
    return right_rope(x, torch.arange(x.shape[-2]), theta)


def exponent_halved(x, positions, theta):
    """the exponent too small by a factor of two: pair i turns by theta^(−2i/d), which is arange(0, d, 2) / d,
    not arange(d / 2) / d"""
    d = x.shape[-1]
    return turned(x, positions[:, None].float() * theta ** -(torch.arange(d // 2).float() / d))


def exponent_doubled(x, positions, theta):
    """the exponent too large by a factor of two: pair i turns by theta^(−2i/d);
    arange(0, d, 2) is 2i already, divide it by d"""
    d = x.shape[-1]
    return turned(x, positions[:, None].float() * theta ** -(torch.arange(0, d, 2).float() / (d // 2)))


def exponent_positive(x, positions, theta):
    """the exponent's sign lost: theta^(+2i/d) turns later pairs faster, they should turn slower"""
    d = x.shape[-1]
    return turned(x, positions[:, None].float() * theta ** (torch.arange(0, d, 2).float() / d))


def pairs_from_one(x, positions, theta):
    """the pairs counted from 1: the first pair turns by one radian a position, theta^0"""
    d = x.shape[-1]
    return turned(x, positions[:, None].float() * theta ** -(torch.arange(2, d + 2, 2).float() / d))


def one_speed(x, positions, theta):
    """every pair turned at the same speed; pair i turns by theta^(−2i/d) a position"""
    return turned(x, positions[:, None].float().expand(-1, x.shape[-1] // 2))


def layouts_mixed(x, positions, theta):
    """features paired as halves, with angles laid out for neighbours: here the (T, d/2) angles
    stand twice behind each other, not each twice in a row"""
    angle, (a, b) = angles(positions, x.shape[-1], theta).repeat_interleave(2, -1), x.chunk(2, -1)
    return x * angle.cos().to(x.dtype) + torch.cat((-b, a), -1) * angle.sin().to(x.dtype)


def one_sign_wrong(x, positions, theta):
    """the second half made as b·cos − a·sin; it is b·cos + a·sin, only the first half has a minus"""
    angle = angles(positions, x.shape[-1], theta)
    return torch.cat((turned(x, angle).chunk(2, -1)[0], turned(x, angle, sign=-1).chunk(2, -1)[1]), -1)


def second_half_left(x, positions, theta):
    """only the first half turned, the second left as it was"""
    return torch.cat((right_rope(x, positions, theta).chunk(2, -1)[0], x.chunk(2, -1)[1]), -1)


def second_from_new_first(x, positions, theta):
    """the second half made from the first half's new value; both are made from the old ones"""
    (a, b), angle = x.chunk(2, -1), angles(positions, x.shape[-1], theta)
    a = a * angle.cos().to(x.dtype) - b * angle.sin().to(x.dtype)
    return torch.cat((a, b * angle.cos().to(x.dtype) + a * angle.sin().to(x.dtype)), -1)


def sine_and_cosine_swapped(x, positions, theta):
    """sine and cosine changed places: position 0, with cos 0 = 1 and sin 0 = 0, must change nothing"""
    return turned(x, torch.pi / 2 - angles(positions, x.shape[-1], theta))


def added(x, positions, theta):
    """cos and sin added to the features, as the first Transformer's positions are;
    RoPE turns, and leaves lengths as they are"""
    angle = angles(positions, x.shape[-1], theta)
    return x + torch.cat((angle.cos(), angle.sin()), -1).to(x.dtype)


def angles_in_half_precision(x, positions, theta):
    """the angles computed in bfloat16, which cannot tell position 1001 from 1000;
    compute them in float32 and cast cos and sin"""
    speed = theta ** -(torch.arange(0, x.shape[-1], 2).float() / x.shape[-1])
    return turned(x, positions[:, None].to(x.dtype) * speed.to(x.dtype))


def rope_left_in_float32(x, positions, theta):
    """float32 returned for a bfloat16 input; cast cos and sin with .to(x.dtype)"""
    return right_rope(x.float(), positions, theta)


ROPES = (
    pairs_interleaved, turned_backwards, positions_from_one, own_positions, exponent_halved, exponent_doubled,
    exponent_positive, pairs_from_one, one_speed, layouts_mixed, one_sign_wrong, second_half_left,
    second_from_new_first, sine_and_cosine_swapped, added, angles_in_half_precision, rope_left_in_float32,
)  # fmt: skip


def probe_rope(answer, draw):
    x = draw(2, 3, 5, 8)
    yield "the output (B, H, T, d)", answer(x, torch.arange(5), 100.0)
    yield "the output at positions 7, 3, 0, 20, 21 (B, H, T, d)", answer(x, torch.tensor([7, 3, 0, 20, 21]), 10000.0)
    yield (
        "the output in bfloat16 at positions 1000 to 1004 (B, H, T, d)",
        answer(x.bfloat16(), torch.arange(1000, 1005), 100.0),
    )


# ── attention ───────────────────────────────────────────────────────────────────────────────────────────────────────


def right_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def repeated(z, q):
    """Key or value heads (B, G, T, d) repeated as a a a b b b for as many query heads as q has."""
    return z.repeat_interleave(q.shape[1] // z.shape[1], 1)


def seen(q, k):
    """(T, T), True where a token may look: at itself and at what stands before it."""
    return torch.ones(q.shape[-2], k.shape[-2]).tril().bool()


def by_scores(weigh):
    """Attention with its own way from scores (B, H, T, T) and what is seen to weights;
    the values are averaged as they should be."""

    def function(q, k, v):
        return weigh(q @ repeated(k, q).mT / q.shape[-1] ** 0.5, seen(q, k)) @ repeated(v, q)

    function.__name__, function.__doc__ = weigh.__name__, weigh.__doc__
    return function


def scaled_by_width(q, k, v):
    """scores divided by √D, the root of the whole width H·d; each head has d features, divide by √d"""
    return right_attention(q / q.shape[1] ** 0.5, k, v)


def unscaled(q, k, v):
    """scores not divided at all; divide them by √d"""
    return right_attention(q * q.shape[-1] ** 0.5, k, v)


def scaled_by_d(q, k, v):
    """scores divided by d; divide them by its root, √d"""
    return right_attention(q / q.shape[-1] ** 0.5, k, v)


def scaled_after_softmax(q, k, v):
    """the division by √d behind the softmax; it belongs to the scores, before it"""
    return unscaled(q, k, v) / q.shape[-1] ** 0.5


@by_scores
def no_mask(scores, seen):
    """no mask: every token sees those that come after it"""
    return scores.softmax(-1)


@by_scores
def sees_one_ahead(scores, seen):
    """a mask off by one: each token sees the next one too, the very one it shall predict"""
    return scores.masked_fill(torch.ones_like(seen).triu(2), -torch.inf).softmax(-1)


@by_scores
def blind_to_itself(scores, seen):
    """a mask off by one: a token does not see itself, and the first, which sees nothing, becomes NaN;
    mask from the first diagonal above the main one"""
    return scores.masked_fill(torch.ones_like(seen).triu(0), -torch.inf).softmax(-1)


@by_scores
def blind_to_itself_but_finite(scores, seen):
    """a mask off by one: a token does not see itself; mask from the first diagonal above the main one"""
    return scores.masked_fill(torch.ones_like(seen).triu(0), -1e9).softmax(-1)


@by_scores
def mask_upside_down(scores, seen):
    """the mask upside down: tokens see themselves and what comes after"""
    return scores.masked_fill(~seen.mT, -torch.inf).softmax(-1)


@by_scores
def masked_with_zero(scores, seen):
    """hidden scores set to 0; the softmax gives e⁰ its share, set them to −∞"""
    return (scores * seen).softmax(-1)


@by_scores
def masked_after_softmax(scores, seen):
    """the mask behind the softmax: the weights then no longer sum to 1, and early tokens come out small"""
    return scores.softmax(-1) * seen


@by_scores
def softmax_over_queries(scores, seen):
    """the softmax over the queries' axis; each query shares out its attention over the keys, the last axis"""
    return scores.masked_fill(~seen, -torch.inf).softmax(-2)


@by_scores
def softmax_over_heads(scores, seen):
    """the softmax over the heads' axis; each head has its own, over the keys, the last axis"""
    return scores.masked_fill(~seen, -1e9).softmax(1)


def heads_alternating(q, k, v):
    """key heads repeated as a b a b a b; query heads that share a key head lie side by side, a a a b b b:
    repeat_interleave, not repeat"""
    times = q.shape[1] // k.shape[1]
    return right_attention(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1))


def first_group_for_all(q, k, v):
    """the first key and value head used for every query head"""
    return right_attention(q, k[:, :1], v[:, :1])


def values_alternating(q, k, v):
    """the keys repeated as a a a b b b and the values as a b a b a b: repeat both alike"""
    return right_attention(q, repeated(k, q), v.repeat(1, q.shape[1] // v.shape[1], 1, 1))


def keys_averaged(q, k, v):
    """the keys averaged where the values should be"""
    return right_attention(q, k, k)


ATTENTIONS = (
    scaled_by_width, unscaled, scaled_by_d, scaled_after_softmax, no_mask, sees_one_ahead, blind_to_itself,
    blind_to_itself_but_finite, mask_upside_down, masked_with_zero, masked_after_softmax, softmax_over_queries,
    softmax_over_heads, heads_alternating, first_group_for_all, values_alternating, keys_averaged,
)  # fmt: skip


def probe_attention(answer, draw):
    q, k, v = (draw(2, heads, 5, 8).requires_grad_() for heads in (6, 2, 2))
    out = answer(q, k, v)
    yield "the output (B, H, T, d)", out
    names = ("q's gradient (B, H, T, d)", "k's gradient (B, G, T, d)", "v's gradient (B, G, T, d)")
    yield from zip(names, gradients(out, q, k, v))
    yield "the output with as many key heads as query heads (B, H, T, d)", answer(*(draw(2, 4, 3, 8) for _ in range(3)))
    yield "the output for a single token (B, H, T, d)", answer(draw(1, 6, 1, 8), draw(1, 2, 1, 8), draw(1, 2, 1, 8))
    yield "the output in bfloat16 (B, H, T, d)", answer(*(z.detach().bfloat16() for z in (q, k, v)))


# ── SwiGLU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def right_swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def activation_on_the_other_branch(x, gate, up, down):
    """SiLU on up's branch; it belongs on gate's"""
    return right_swiglu(x, up, gate, down)


def activation_on_both(x, gate, up, down):
    """SiLU on both branches; up's stays linear"""
    return (F.silu(x @ gate.T) * F.silu(x @ up.T)) @ down.T


def activation_on_the_product(x, gate, up, down):
    """SiLU on the product of the branches; it belongs on gate's branch, before the product"""
    return F.silu((x @ gate.T) * (x @ up.T)) @ down.T


def plain_glu(x, gate, up, down):
    """a sigmoid for the gate, which is the first GLU; SiLU is z · sigmoid(z)"""
    return (torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T


def geglu(x, gate, up, down):
    """GELU for SiLU, which is GEGLU; SiLU is z · sigmoid(z)"""
    return (F.gelu(x @ gate.T) * (x @ up.T)) @ down.T


def reglu(x, gate, up, down):
    """ReLU for SiLU, which is ReGLU; SiLU is z · sigmoid(z)"""
    return (F.relu(x @ gate.T) * (x @ up.T)) @ down.T


def tanh_glu(x, gate, up, down):
    """a tanh for SiLU; SiLU is z · sigmoid(z)"""
    return (torch.tanh(x @ gate.T) * (x @ up.T)) @ down.T


def bilinear(x, gate, up, down):
    """no non-linearity at all: SiLU on gate's branch is missing"""
    return ((x @ gate.T) * (x @ up.T)) @ down.T


def branches_added(x, gate, up, down):
    """the branches added; they are multiplied, feature by feature"""
    return (F.silu(x @ gate.T) + x @ up.T) @ down.T


def no_second_branch(x, gate, up, down):
    """up's branch left out: an ordinary feed-forward layer with SiLU"""
    return F.silu(x @ gate.T) @ down.T


def residual_inside(x, gate, up, down):
    """x added to the result; the residual sum is the block's affair, not the feed-forward layer's"""
    return x + right_swiglu(x, gate, up, down)


SWIGLUS = (
    activation_on_the_other_branch, activation_on_both, activation_on_the_product, plain_glu, geglu, reglu, tanh_glu,
    bilinear, branches_added, no_second_branch, residual_inside,
)  # fmt: skip


def probe_swiglu(answer, draw):
    x, gate, up, down = draw(2, 5, 8), draw(12, 8).div(2), draw(12, 8).div(2), draw(8, 12).div(3)
    for tensor in (x, gate, up, down):
        tensor.requires_grad_()
    out = answer(x, gate, up, down)
    yield "the output (B, T, D)", out
    names = ("x's gradient (B, T, D)", "gate's gradient", "up's gradient", "down's gradient")
    yield from zip(names, gradients(out, x, gate, up, down))
    yield "the output in bfloat16 (B, T, D)", answer(*(z.detach().bfloat16() for z in (x, gate, up, down)))


# ── the fused matrix of GPT-2 ───────────────────────────────────────────────────────────────────────────────────────


def right_split(weight, bias):
    file = {"transformer.h.0.attn.c_attn.weight": weight, "transformer.h.0.attn.c_attn.bias": bias}
    ours = from_hf(ARCHITECTURES["gpt2"], file)
    return tuple(
        torch.stack([ours[f"layers.0.self_attn.{name}_proj.{kind}"] for name in "qkv"]) for kind in ("weight", "bias")
    )


def not_transposed(weight, bias):
    """the matrices not transposed: the file keeps them (in, out) and multiplies x @ W,
    a linear layer keeps (out, in)"""
    return torch.stack(weight.chunk(3, 1)), bias.unflatten(0, (3, -1))


def cut_along_the_inputs(weight, bias):
    """cut along the inputs: q, k and v lie side by side in the columns of the file's matrix, which are the outputs"""
    return weight.reshape(3, weight.shape[0], -1), bias.unflatten(0, (3, -1))


def cut_along_the_inputs_and_transposed(weight, bias):
    """the memory read as (3, D, D) before transposing, which cuts along the inputs; the outputs are the columns:
    chunk(3, dim=1), then transpose each"""
    return weight.reshape(3, weight.shape[0], -1).mT, bias.unflatten(0, (3, -1))


def every_third(weight, bias):
    """every third output taken, as if q, k and v took turns; they lie in three blocks,
    first q's outputs, then k's, then v's"""
    return torch.stack([weight.T[i::3] for i in range(3)]), torch.stack([bias[i::3] for i in range(3)])


def keys_first(weight, bias):
    """the order k, q, v; the file has q first"""
    w, b = right_split(weight, bias)
    return w[[1, 0, 2]], b[[1, 0, 2]]


def order_reversed(weight, bias):
    """the order v, k, q; the file has q first"""
    w, b = right_split(weight, bias)
    return w.flip(0), b.flip(0)


def biases_take_turns(weight, bias):
    """the matrices cut in blocks and the biases by turns; both lie in three blocks"""
    return right_split(weight, bias)[0], bias.unflatten(0, (-1, 3)).T


SPLITS = (
    not_transposed, cut_along_the_inputs, cut_along_the_inputs_and_transposed, every_third, keys_first, order_reversed,
    biases_take_turns,
)  # fmt: skip


def probe_split(answer, draw):
    weight, bias = draw(8, 24), draw(24)
    names = "the three matrices (3, D, D)", "the three biases (3, D)"
    yield from zip(names, answer_pair(answer(weight, bias), names))


def answer_pair(result, names):
    """The pair an answer returned; a list of three tensors counts as their stack."""
    for what, value in named(names, result):
        if isinstance(value, tuple | list):
            if len({tuple(part.shape) for part in value if isinstance(part, torch.Tensor)}) != 1:
                needed = f"{what} should be one tensor, or three of the same shape"
                raise Wrong("shape", f"{needed}; it is {describe(value)}")
            value = torch.stack(tuple(value))
        yield value


# ── the cache ───────────────────────────────────────────────────────────────────────────────────────────────────────


def behind(past, k, v):
    """New keys and values behind the cached ones."""
    return (k, v) if past is None else (torch.cat((past[0], k), 2), torch.cat((past[1], v), 2))


def places(x, past):
    """The positions of the new tokens behind the cached ones."""
    return torch.arange(x.shape[1]) + (0 if past is None else past[0].shape[2])


def right_cached(attention, x, past):
    q, k, v = attention.project(x, places(x, past))
    k, v = behind(past, k, v)
    return attention.output(attention.attend(q, k, v)), (k, v)


def with_mask(attention, q, k, v, mask):
    """Attention under a mask of one's own, joined and projected; a token that sees nothing at all looks everywhere."""
    scores = (q @ repeated(k, q).mT / q.shape[-1] ** 0.5).masked_fill(~mask, -1e9)
    return attention.output(scores.softmax(-1) @ repeated(v, q))


def positions_restart(attention, x, past):
    """the new tokens' positions begin at 0 again; they go on behind the cached ones, from S"""
    q, k, v = attention.project(x, torch.arange(x.shape[1]))
    k, v = behind(past, k, v)
    return attention.output(attention.attend(q, k, v)), (k, v)


def not_turned(attention, x, past):
    """no positions given to `project`, so that nothing is turned; without them RoPE has nothing to turn by"""
    q, k, v = attention.project(x)
    k, v = behind(past, k, v)
    return attention.output(attention.attend(q, k, v)), (k, v)


def positions_leave_a_gap(attention, x, past):
    """the new tokens' positions one too late: behind S cached tokens, at 0 … S − 1, the first new one stands at S"""
    q, k, v = attention.project(x, places(x, past) + int(past is not None))
    k, v = behind(past, k, v)
    return attention.output(attention.attend(q, k, v)), (k, v)


def positions_one_too_early(attention, x, past):
    """the new tokens' positions one too early: behind S cached tokens, at 0 … S − 1, the first new one stands at S"""
    q, k, v = attention.project(x, places(x, past) - int(past is not None))
    k, v = behind(past, k, v)
    return attention.output(attention.attend(q, k, v)), (k, v)


def new_before_old(attention, x, past):
    """the new keys put before the cached ones; they go behind them"""
    q, k, v = attention.project(x, places(x, past))
    if past is not None:
        k, v = torch.cat((k, past[0]), 2), torch.cat((v, past[1]), 2)
    return attention.output(attention.attend(q, k, v)), (k, v)


def turned_twice(attention, x, past):
    """cached keys turned a second time; a key is turned once, when it is new, then kept as it is"""
    q, k, v = attention.project(x, places(x, past))
    if past is not None:
        old = past[0].shape[2]
        past = rotate(past[0], *attention.rope(torch.arange(old))), past[1]
    k, v = behind(past, k, v)
    return attention.output(attention.attend(q, k, v)), (k, v)


def kept_unturned(attention, x, past):
    """keys cached before they are turned, so that every step must turn all of them again;
    turn a key once, then keep it"""
    q, _, _ = attention.project(x, places(x, past))
    k, v = behind(past, *attention.keys_values(x))
    turned_keys = rotate(k, *attention.rope(torch.arange(k.shape[2])))
    return attention.output(attention.attend(q, turned_keys, v)), (k, v)


def only_the_new_kept(attention, x, past):
    """only the new keys and values returned as the cache: what came before is lost at the next step"""
    q, k, v = attention.project(x, places(x, past))
    return attention.output(attention.attend(q, *behind(past, k, v))), (k, v)


def new_not_kept(attention, x, past):
    """the old cache returned, without the new tokens"""
    q, k, v = attention.project(x, places(x, past))
    out = attention.output(attention.attend(q, *behind(past, k, v)))
    return out, (k, v) if past is None else past


def old_not_seen(attention, x, past):
    """the new tokens look at each other only, not at the cached ones"""
    q, k, v = attention.project(x, places(x, past))
    return attention.output(attention.attend(q, k, v)), behind(past, k, v)


def new_see_each_other(attention, x, past):
    """no mask among the new tokens: each sees those behind it; new token i sees the first S + i + 1"""
    q, k, v = attention.project(x, places(x, past))
    k, v = behind(past, k, v)
    mask = torch.ones(q.shape[2], k.shape[2]).bool() if past is not None else seen(q, k)
    return with_mask(attention, q, k, v, mask), (k, v)


def mask_from_the_corner(attention, x, past):
    """a (T, S + T) mask begun in its upper left corner, which is what is_causal=True gives: new token i then sees the
    first i + 1 only; it should see the first S + i + 1, tril(S)"""
    q, k, v = attention.project(x, places(x, past))
    k, v = behind(past, k, v)
    return with_mask(attention, q, k, v, seen(q, k)), (k, v)


def mask_hides_the_new(attention, x, past):
    """a mask off by one: the new tokens do not see themselves; new token i sees the first S + i + 1,
    itself the last of them"""
    q, k, v = attention.project(x, places(x, past))
    k, v = behind(past, k, v)
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, S).tril(S - T - 1).bool() if past is not None else seen(q, k)
    return with_mask(attention, q, k, v, mask), (k, v)


def heads_repeated_in_the_cache(attention, x, past):
    """key and value heads repeated before they are cached, which makes the cache H / G times as large;
    keep G heads and repeat afterwards"""
    q, k, v = attention.project(x, places(x, past))
    k, v = behind(past, repeated(k, q), repeated(v, q))
    mask = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
    return with_mask(attention, q, k, v, mask), (k, v)


CACHES = (
    positions_restart, not_turned, positions_leave_a_gap, positions_one_too_early, new_before_old, turned_twice,
    kept_unturned, only_the_new_kept, new_not_kept, old_not_seen, new_see_each_other, mask_from_the_corner,
    mask_hides_the_new, heads_repeated_in_the_cache,
)  # fmt: skip


def probe_cached(answer, draw):
    attention, past, S = filled(Attention(40, 6, 2, 8, RoPE(8), bias=True), draw), None, 0
    steps = {4: "of the first 4 tokens", 3: "of 3 tokens behind 4 cached ones", 1: "of 1 token behind 7 cached ones"}
    for T, what in steps.items():
        x, S = draw(2, T, 40), S + T
        (_, out), (_, past) = named(("the output", "the cache"), answer(attention, x, past))
        yield f"the output {what} (B, T, D)", out
        past = tuple(value for _, value in named(("keys", "values"), past))
        for kind, value in zip(("keys", "values"), past):
            yield f"the {kind} {what}, all so far (B, G, S, d)", value


# ── predictions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def cache_numbers():
    """How many numbers SmolLM2-135M's cache holds for one token."""
    with torch.device("meta"):
        model, cache = smollm2(), minillama.Cache()
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    return sum(layer.k.numel() + layer.v.numel() for layer in cache.layers)


@torch.no_grad()
def shifted(model, by=100):
    """Whether the logits stay the same when every position is `by` further on: "same" or "different"."""
    torch.manual_seed(0)
    config = dict(vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    if model == "llama":
        model = minillama.LLaMA(minillama.LLaMAConfig(**config))
    else:
        model = minillama.GPT2(minillama.GPT2Config(**config))
    ids = torch.randint(0, 31, (1, 6))
    logits = []
    for positions in (torch.arange(6), torch.arange(6) + by):
        x = model.embed_tokens(ids)
        if hasattr(model, "embed_positions"):
            x = x + model.embed_positions(positions)
        for layer in model.layers:
            x = layer(x, positions)
        logits.append(model.lm_head(model.norm(x)))
    return "same" if torch.allclose(*logits, atol=1e-3) else "different"


EXERCISES = {
    "rms_norm": Exercise("rms_norm(x, weight, eps) -> (B, T, D)", right_rms_norm, NORMS, probe_rms_norm),
    "rope": Exercise("rope(x, positions, theta) -> (B, H, T, d)", right_rope, ROPES, probe_rope),
    "grouped_query_attention": Exercise(
        "grouped_query_attention(q, k, v) -> (B, H, T, d)", right_attention, ATTENTIONS, probe_attention,
    ),
    "swiglu": Exercise("swiglu(x, gate, up, down) -> (B, T, D)", right_swiglu, SWIGLUS, probe_swiglu),
    "split_fused": Exercise(
        "split_fused(weight, bias) -> matrices (3, D, D), biases (3, D)", right_split, SPLITS, probe_split,
    ),
    "cached_attention": Exercise(
        "cached_attention(attention, x, past) -> output (B, T, D), (keys, values)", right_cached, CACHES, probe_cached,
    ),
    "cache_numbers": Question(
        cache_numbers, "Keys and values, in each layer, for each key head: 2 · L · G · d.",
        {30 * 3 * 64: "that is the keys; the values are kept as well.",
         2 * 30 * 9 * 64: "queries are not kept, and their heads share keys and values: "
                          "count the G key heads, not the H query heads.",
         30 * 9 * 64: "queries are not kept: count the G key heads, not the H query heads, and both keys and values.",
         2 * 3 * 64: "that is one layer; each layer keeps its own."},
    ),
    "shifted_llama": Question(
        lambda: shifted("llama"),
        "A score depends on how far apart query and key stand, and RoPE is all that a LLaMA knows of positions.",
        {"different": "each query and each key is turned further, but by the same angle: "
                      "what does that do to the angle between them?"},
    ),
    "shifted_gpt2": Question(
        lambda: shifted("gpt2"),
        "A GPT-2 adds the learned vector of each place to the token; place 100 has another one than place 0.",
        {"same": "what does a GPT-2 add to the token at place 100, and what at place 0?"},
    ),
}  # fmt: skip
