"""Lesson 01: the parts of a LLaMA and of a GPT-2, with the wrong versions that one writes easily."""

import torch
import torch.nn.functional as F

import minillama

from ...attention import Attention, RoPE, rotate
from ...llama import RMSNorm
from ..papers import smollm2
from .catalogue import catalogue
from .observing import Exercise, Piece, Wrong, calls, describe, fact, filled, gradients, in_bfloat16
from .predictions import Question

PLANTED = ()  # these mistakes edit no shipped module; tests/test_base_model_mistakes.py puts them in a part's place
HARMLESS = {}


def with_more(usual, more):
    """A probe that looks at `more` after the usual calls."""

    def probe(answer, draw):
        yield from usual(answer, draw)
        yield from more(answer, draw)

    probe.inputs = usual.inputs
    return probe


def pair(result, names):
    """The two things an answer returned."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Wrong("not_a_pair", f"needed are two things, {names}; it returned {describe(result)}.")
    return result


# ── RMSNorm ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def rms_norm(x, weight, eps):
    x32 = x.float()
    mean_square = x32.pow(2).mean(-1, keepdim=True)  # (B, T, 1)
    return (x32 / torch.sqrt(mean_square + eps) * weight).to(x.dtype)


OVERFLOW = (
    "the squares taken in the input's own dtype: in float16 they overflow beyond 255, in bfloat16 they lose digits; "
    "use x.float() and cast back at the end"
)
MEAN, ROOT = "x32.pow(2).mean(-1, keepdim=True)", "x32 / torch.sqrt(mean_square + eps)"
ITSELF = "each token is normed by itself, over its last axis: mean(-1, keepdim=True)"
DEVIATION = "divided by the standard deviation, for which the mean is subtracted; RMSNorm's squares are those of x"
NORMS = catalogue(rms_norm, (
    ("mean_subtracted", "x.float()", "x.float() - x.float().mean(-1, keepdim=True)", "the mean subtracted first, as "
     "LayerNorm does; RMSNorm leaves the mean where it is"),
    ("eps_outside_the_root", ROOT, "x32 / (torch.sqrt(mean_square) + eps)", "eps added to the root instead of to the "
     "mean square inside it: x / (√mean(x²) + eps)"),
    ("eps_forgotten", " + eps", "", "eps left out: a vector of zeros is then divided by zero"),
    ("eps_hard_coded", " + eps", " + 1e-6", "an eps of your own, such as 1e-6; it is given, and not always small"),
    ("eps_as_a_floor", "mean_square + eps", "mean_square.clamp(min=eps)", "eps as the least mean square; it is added"),
    ("eps_floors_the_root", ROOT, "x32 / torch.sqrt(mean_square).clamp(min=eps)", "eps as the least root; it is added"),
    ("eps_in_the_sum", "+ eps", "+ eps / x.shape[-1]", "eps added to the sum of squares; it is added to their mean"),
    ("weight_forgotten", " * weight", "", "the learned weight left out"),
    ("weight_plus_one", "* weight", "* (1 + weight)", "multiplied by 1 + weight, as in Gemma; here by weight"),
    ("weight_added", "* weight", "+ weight", "the weight added; it multiplies"),
    ("weight_before_the_norm", (" * weight", "x.float()"), ("", "(x * weight).float()"), "the weight multiplied too "
     "early"),
    ("mean_over_tokens", "mean(-1", "mean(-2 if x.dim() > 2 else -1", f"the mean taken over the tokens instead of the "
     f"features; {ITSELF}"),
    ("mean_over_batch", "mean(-1", "mean(0", f"the mean taken over the batch; {ITSELF}"),
    ("mean_over_everything", "mean(-1, keepdim=True)", "mean()", f"one mean over all tokens and features; {ITSELF}"),
    ("mean_over_a_row", "mean(-1,", "mean((-2, -1),", f"one mean over all tokens of a row; {ITSELF}"),
    ("keepdim_forgotten", "(-1, keepdim=True)", "(-1)", "keepdim=True left out: (B, T) does not line up with (B, T, "
     "D)"),
    ("sum_for_mean", ".mean(", ".sum(", "the sum of the squares where their mean is needed: √D too small"),
    ("divided_by_tokens", MEAN, "x32.pow(2).sum(-1, keepdim=True) / x.shape[1]", "the sum divided by T; the mean is "
     "over D"),
    ("divided_by_the_length", ROOT, "x32 / x32.norm(dim=-1, keepdim=True)", "divided by the vector's length, the root "
     "of the sum of squares; it is the root of their mean plus eps"),
    ("divided_by_the_deviation", MEAN, "x32.var(-1, keepdim=True)", DEVIATION),
    ("divided_by_the_biased_deviation", MEAN, "x32.var(-1, keepdim=True, correction=0)", DEVIATION),
    ("absolute_values", ".pow(2)", ".abs()", "the absolute values' mean under the root; it is the mean of the squares"),
    ("absolute_mean", ROOT, "x32 / (x32.abs().mean(-1, keepdim=True) + eps)", "divided by the absolute values' mean"),
    ("squares_forgotten", "x32.pow(2)", "x32", "the squares forgotten: the mean of x itself, which may be negative"),
    ("root_forgotten", ROOT, "x32 / (mean_square + eps)", "divided by the mean square, not by its root"),
    ("multiplied_by_the_root", "x32 / torch", "x32 * torch", "multiplied by the root (or divided by rsqrt); divide"),
    ("squares_in_half_precision", "x.float()", "x", OVERFLOW),
    ("left_in_float32", ".to(x.dtype)", "", "float32 returned for a half-precision input; cast back with .to(x.dtype)"),
    ("normalised", ROOT, "F.normalize(x32, dim=-1, eps=eps) * x.shape[-1] ** 0.5", "F.normalize, whose eps is a floor"),
    ("mean_over_batch_and_features", "mean(-1", "mean((0, -1) if x.dim() > 2 else -1", f"one mean for the batch; "
     f"{ITSELF}"),
    ("one_less_than_width", MEAN, "x32.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)", "divided by D − 1, not by D"),
    ("width_hard_coded", MEAN, "x32.pow(2).sum(-1, keepdim=True) / 128", "the width taken as 128, whatever x has"),
    ("eps_squared", "+ eps", "+ eps**2", "eps squared under the root; it is added as it is given"),
    ("eps_subtracted", "+ eps", "- eps", "eps subtracted; it is added"),
    ("eps_at_the_end", (" + eps", " * weight)"), ("", " * weight + eps)"), "eps added at the end, not in the root"),
    ("eps_added_to_x", (" + eps", "x32.pow"), ("", "(x32 + eps).pow"), "eps added to x, not to the mean square"),
    ("square_of_the_mean", MEAN, "x32.mean(-1, keepdim=True).pow(2)", "the mean squared; first come the squares"),
    ("weight_divides", "* weight", "/ weight", "divided by the weight; it multiplies"),
    ("weight_squared", "* weight", "* weight**2", "multiplied by the weight twice"),
    ("largest_for_mean", MEAN, "x32.pow(2).amax(-1, keepdim=True)", "the largest square; it is the squares' mean"),
    ("median_for_mean", MEAN, "x32.pow(2).median(-1, keepdim=True).values", "the squares' median; it is their mean"),
    ("size_detached", ROOT, "x32 / torch.sqrt(mean_square + eps).detach()", "the root mean square taken without "
     "gradient; it is part of the function, and the gradient goes through it"),
))  # fmt: skip


def more_of_rms_norm(answer, draw):
    x, weight = draw(2, 5, 8), draw(8)
    yield Piece("the output (D)", answer(x[0, 0], weight, 0.3), "for one vector, x (D,),")
    yield Piece("the output (B, T, D)", answer(torch.zeros(1, 2, 8), weight, 1e-6), "for zeros")
    large = answer((400 * x).half(), weight.half(), 0.3)
    if not isinstance(large, torch.Tensor):
        raise Wrong("shape", f"the output should be a tensor; it is {describe(large)}.")
    lost = not large.isfinite().all() or bool(large.abs().max() < 0.01)
    yield fact(lost, "squares_in_half_precision", f"this equals a known mistake: {OVERFLOW}.")
    tiny = answer(torch.full((1, 1, 8), 1e-8), torch.ones(8), 0.3).abs().max() > 3e-7
    yield fact(tiny, "eps_hard_coded", "a tiny x comes out large; eps, which is given, keeps it small.", "a tiny x")
    for dtype in (torch.bfloat16, torch.float16):
        x, one = draw(512, 8).index_fill(1, torch.tensor(0), 1.0).to(dtype), torch.ones(8, dtype=dtype)
        off = answer(x[None], one, 0.3)[0, :, 0] != rms_norm(x, one, 0.3)[:, 0]  # what 1 becomes, to the last digit
        why = f"this equals a known mistake: {OVERFLOW}."
        yield fact(off.float().mean() > 0.02, "squares_in_half_precision", why, f"last digits in {dtype}")


probe_rms_norm = with_more(
    calls(lambda draw, B, T, D, eps: dict(x=draw(B, T, D) + 0.5, weight=draw(D), eps=eps), "the output (B, T, D)",
          (dict(B=2, T=5, D=8, eps=0.3), dict(B=3, T=3, D=3, eps=0.05), dict(B=1, T=1, D=6, eps=2.0)), again={}),
    more_of_rms_norm,
)  # fmt: skip

# ── RoPE ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rope(x, positions, theta):
    d = x.shape[-1]
    speeds = theta ** -(torch.arange(0, d, 2).float() / d)  # (d/2,) radians a position
    angle = positions[:, None].float() * speeds  # (T, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)  # (B, H, T, d/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


EXPONENT, FIRST, SECOND = "torch.arange(0, d, 2).float() / d", "a * cos - b * sin", "b * cos + a * sin"
CUT, JOINED = "x.chunk(2, -1)", "torch.cat((a * cos - b * sin, b * cos + a * sin), -1)"
COS_SIN = "cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)"
BY_TURNS, PAIR = f"torch.stack(({FIRST}, {SECOND}), -1).flatten(-2)", "feature i goes with i + d/2"
ROPES = catalogue(rope, (
    ("pairs_interleaved", (CUT, JOINED), ("(x[..., ::2], x[..., 1::2])", BY_TURNS),
     f"neighbours turned together, as in Meta's files; {PAIR}"),
    ("interleaved_and_joined_as_halves", CUT, "(x[..., ::2], x[..., 1::2])",
     f"neighbours turned together, put back as halves; {PAIR}"),
    ("put_back_by_turns", JOINED, BY_TURNS, "the two halves put back by turns; one stands behind the other, torch.cat"),
    ("turned_backwards", (FIRST, SECOND), ("a * cos + b * sin", "b * cos - a * sin"), "turned the wrong way: the new "
     "first half is a·cos − b·sin, the new second half b·cos + a·sin"),
    ("positions_from_one", "positions[:, None]", "(positions[:, None] + 1)", "positions counted from 1 where they are "
     "given from 0: the first token must come out as it went in"),
    ("own_positions", "positions[", "torch.arange(x.shape[-2])[", "the given positions ignored, counted anew from 0"),
    ("positions_from_the_first", "positions[", "(positions - positions[0])[", "positions counted from the first one "
     "given"),
    ("not_a_column", "positions[:, None]", "positions", "positions as a row; make them a column: positions[:, None]"),
    ("exponent_halved", EXPONENT, "torch.arange(d // 2).float() / d", "the exponent too small by a factor of two: it "
     "is −2i/d, arange(0, d, 2) / d and not arange(d / 2) / d"),
    ("exponent_doubled", EXPONENT, "torch.arange(0, d, 2).float() / (d // 2)", "the exponent too large by a factor of "
     "two: arange(0, d, 2) is 2i already, divide it by d"),
    ("exponent_positive", "** -(", "** (", "the exponent's sign lost: theta^(+2i/d) turns later pairs faster"),
    ("exponent_not_divided", " / d", "", "the exponent not divided by d: it is −2i/d"),
    ("slowest_is_theta", EXPONENT, "torch.arange(d // 2) / max(1, d // 2 - 1)", "the exponent −i/(d/2−1); it is −2i/d"),
    ("pairs_from_one", "arange(0, d, 2)", "arange(2, d + 2, 2)", "pairs counted from 1: the first turns by theta^0"),
    ("theta_hard_coded", "theta **", "10000.0 **", "theta taken as 10,000 whatever is given"),
    ("one_speed", "* speeds", "* torch.ones(d // 2)", "one speed for every pair; pair i turns by theta^(−2i/d)"),
    ("angle_doubled", "* speeds", "* 2 * speeds", "the angle doubled: pair i turns by theta^(−2i/d) a position"),
    ("in_degrees", "* speeds", "* speeds * (torch.pi / 180)", "the angle taken as degrees; it is in radians"),
    ("in_turns", "* speeds", "* speeds * (2 * torch.pi)", "the angle taken as whole turns; it is in radians"),
    ("layouts_mixed", JOINED,
     "x * cos.repeat_interleave(2, -1) + torch.cat((-b, a), -1) * sin.repeat_interleave(2, -1)",
     "features paired as halves, with angles laid out for neighbours: here they stand twice behind each other"),
    ("mixed_layouts", JOINED,
     "x * cos.repeat(1, 2) + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin.repeat(1, 2)",
     f"neighbours paired, with angles laid out for halves; {PAIR}"),
    ("partner_flipped", JOINED, "x * cos.repeat(1, 2) + x.flip(-1) * sin.repeat(1, 2)",
     f"partners read backwards; {PAIR}"),
    ("one_sign_wrong", SECOND, "b * cos - a * sin", "the second half made as b·cos − a·sin; it has no minus"),
    ("no_minus", FIRST, "a * cos + b * sin", "the first half made as a·cos + b·sin; it is a·cos − b·sin"),
    ("second_half_left", SECOND, "b", "only the first half turned, the second left as it was"),
    ("first_half_left", FIRST, "a", "only the second half turned, the first left as it was"),
    ("second_half_as_the_first", SECOND, "a * cos + b * sin", "the second half made as a·cos + b·sin, not b·cos + "
     "a·sin"),
    ("halves_swapped", JOINED, f"torch.cat(({SECOND}, {FIRST}), -1)", "the two halves put back in each other's place"),
    ("second_from_new_first", SECOND, f"b * cos + ({FIRST}) * sin", "made from the first half's new value, not its old "
     "one"),
    ("sine_and_cosine_swapped", "cos, sin =", "sin, cos =", "sine and cosine swapped: position 0 must change nothing"),
    ("cosine_alone", (FIRST, SECOND), ("a * cos", "b * cos"), "the cosine alone; the partner times sine is missing"),
    ("no_partner", (FIRST, SECOND), ("a * cos", "b * sin"), "one half times cosine, one times sine; each needs both"),
    ("added", (FIRST, SECOND), ("a + cos", "b + sin"), "cos and sin added, as in the first Transformer; RoPE turns"),
    ("added_sine_first", (FIRST, SECOND), ("a + sin", "b + cos"), "sin and cos added, as in the first Transformer; "
     "RoPE turns"),
    ("angles_in_half_precision", ("positions[:, None].float()", "* speeds"),
     ("positions[:, None].to(x.dtype)", "* speeds.to(x.dtype)"), "the angles computed in bfloat16, which cannot tell "
     "position 1001 from 1000; compute them in float32"),
    ("speeds_in_half_precision", "* speeds", "* speeds.to(x.dtype)", "speeds rounded to x's dtype, which far positions "
     "multiply; keep positions, speeds and angles in float32"),
    ("power_first", f"-({EXPONENT})", "-2 * torch.arange(d // 2).float() / d", "theta ** -2 * i / d takes the power "
     "first: brackets, theta ** (-2 * i / d)"),
    ("slow_pairs_first", "* speeds", "* speeds.flip(0)", "the speeds backwards; pair 0 is the fastest"),
    ("positions_counted_on", "positions[:", "(positions[0] + torch.arange(len(positions)))[:", "the first position "
     "counted on; the others are given too, and may have gaps"),
    ("positions_sorted", "positions[:", "positions.sort().values[:", "positions sorted; each belongs to its own token"),
    ("d_hard_coded", "float() / d", "float() / 32", "d taken as 32, whatever x has"),
    ("divided_by_heads", "float() / d", "float() / x.shape[1]", "divided by the number of heads; d is x.shape[-1]"),
    ("first_half_twice", SECOND, "a * cos - b * sin", "the first half's numbers put into the second too"),
    ("no_sine_in_the_second", SECOND, "b * cos", "the second half without a·sin; it is b·cos + a·sin"),
    ("second_half_negated", SECOND, "-(b * cos + a * sin)", "the second half's sign turned; it is b·cos + a·sin"),
    ("rope_left_in_float32", COS_SIN, "cos, sin = angle.cos(), angle.sin()", "float32 returned for a bfloat16 input; "
     "cast cos and sin with .to(x.dtype)"),
))  # fmt: skip


def inputs_of_rope(draw, B, H, T, d, theta, start):
    return dict(x=draw(B, H, T, d), positions=start + 7 * torch.arange(T) % 11, theta=theta)  # not in order, with gaps


ROPE_SIZES = (
    dict(B=2, H=3, T=5, d=8, theta=100.0, start=2), dict(B=1, H=2, T=4, d=6, theta=20000.0, start=301),
    dict(B=3, H=4, T=4, d=4, theta=500.0, start=0), dict(B=1, H=2, T=3, d=16, theta=10000.0, start=1200),
    dict(B=1, H=1, T=1, d=2, theta=50.0, start=9),
)  # fmt: skip

# ── attention ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def grouped_query_attention(q, k, v):
    k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))  # (B, H, T, d)
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (B, H, T, T)
    future = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return weights @ v


SCALE, WEIGHTS = "/ q.shape[-1] ** 0.5", "scores.masked_fill(future, -torch.inf).softmax(-1)"
REPEATED = "k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))"
WIDE = "z.repeat_interleave(q.shape[1] // z.shape[1], 1)"
BLIND = "a mask off by one: a token does not see itself; mask from the first diagonal above the main one"
SCALES = (
    ("scaled_by_width", SCALE, "/ (q.shape[1] * q.shape[-1]) ** 0.5", "scores divided by √D, the root of the whole "
     "width H·d; each head has d features, divide by √d"),
    ("unscaled", SCALE, "", "scores not divided at all; divide them by √d"),
    ("scaled_by_d", SCALE, "/ q.shape[-1]", "scores divided by d; divide them by its root, √d"),
    ("scaled_up", SCALE, "* q.shape[-1] ** 0.5", "scores multiplied by √d; divide them by it"),
)  # fmt: skip
OVER_KEYS = "each query shares out its attention over the keys, the last axis"
ALTERNATING = (
    "key heads repeated as a b a b a b; query heads that share a key head lie side by side, a a a b b b: "
    "repeat_interleave, not repeat"
)
K_WIDE, V_WIDE = (f"{z}.repeat_interleave(q.shape[1] // {z}.shape[1], 1)" for z in "kv")
ATTENTIONS = catalogue(grouped_query_attention, SCALES + (
    ("scaled_by_key_width", (REPEATED, SCALE), ("G = k.shape[1]; " + REPEATED, "/ (G * q.shape[-1]) ** 0.5"),
     "divided by the root of all key heads' width, G·d; divide by √d"),
    ("keys_not_turned", "k.mT", "k", "keys not transposed: q @ k.mT multiplies each query with each key"),
    ("masked_with_ten", "-torch.inf", "-10.0", "hidden scores set to −10, which still has a share; set them to −∞"),
    ("scaled_by_tokens", SCALE, "/ q.shape[2] ** 0.5", "divided by the root of the number of tokens; divide by √d"),
    ("scaled_by_heads", SCALE, "/ q.shape[1] ** 0.5", "divided by the root of the number of heads; divide by √d"),
    ("scaled_after_softmax", (SCALE, "weights @ v"), ("", "weights @ v / q.shape[-1] ** 0.5"), "the division by √d "
     "behind the softmax; it belongs to the scores, before it"),
    ("no_mask", WEIGHTS, "scores.softmax(-1)", "no mask: every token sees those that come after it"),
    ("sees_one_ahead", "triu(1)", "triu(2)", "a mask off by one: each token sees the next one, which it shall predict"),
    ("blind_to_itself", "triu(1)", "triu(0)", f"{BLIND}, and the first, which sees nothing, becomes NaN"),
    ("blind_to_itself_but_finite", ("triu(1)", "-torch.inf"), ("triu(0)", "-1e9"), BLIND),
    ("mask_upside_down", "triu(1)", "tril(-1)", "the mask upside down: tokens see themselves and what comes after"),
    ("mask_inverted", "(future", "(~future", "the mask turned round, so that the last token becomes NaN"),
    ("mask_inverted_but_finite", "future, -torch.inf", "~future, -1e9", "the mask turned round"),
    ("masked_with_zero", "-torch.inf", "0.0", "hidden scores set to 0; the softmax gives e⁰ its share, set them to −∞"),
    ("masked_with_one", "-torch.inf", "-1.0", "hidden scores set to −1; e⁻¹ still has a share, set them to −∞"),
    ("masked_with_plus", "-torch.inf", "1e9", "hidden scores made huge, which takes everything; set them to −∞"),
    ("infinity_times_zero", WEIGHTS, "(scores + future.to(q.dtype) * -torch.inf).softmax(-1)", "0 · −∞ is NaN: "
     "masked_fill"),
    ("mask_subtracted", WEIGHTS, "(scores - future.to(q.dtype)).softmax(-1)", "1 off the hidden scores; set them to "
     "−∞"),
    ("mask_added", WEIGHTS, "(scores + future.to(q.dtype)).softmax(-1)", "1 added to the hidden scores; set them to "
     "−∞"),
    ("negative_scores", "q @ k.mT", "-q @ k.mT", "the scores' sign lost: the key that fits best gets least"),
    ("masked_after_softmax", WEIGHTS, "scores.softmax(-1).masked_fill(future, 0.0)", "the mask behind the softmax: the "
     "weights then no longer sum to 1, and early tokens come out small"),
    ("no_softmax", WEIGHTS, "scores.masked_fill(future, 0.0)", "no softmax: scores become weights only through it"),
    ("sigmoid_for_softmax", "softmax(-1)", "sigmoid()", "a sigmoid for the softmax: weights do not sum to 1"),
    ("softmax_over_queries", "softmax(-1)", "softmax(-2)", f"the softmax over the queries' axis; {OVER_KEYS}"),
    ("softmax_over_heads", ("-torch.inf", "softmax(-1)"), ("-1e9", "softmax(1)"),
     f"the softmax over the heads' axis; {OVER_KEYS}"),
    ("softmax_over_heads_to_nan", "softmax(-1)", "softmax(1)", f"the softmax over the heads' axis; {OVER_KEYS}"),
    ("heads_alternating", WIDE, "z.repeat(1, q.shape[1] // z.shape[1], 1, 1)", ALTERNATING),
    ("first_group_for_all", WIDE, "z[:, :1]", "the first key and value head used for every query head"),
    ("groups_averaged", WIDE, "z.mean(1, keepdim=True)", "the key and value heads averaged; each serves H / G queries"),
    ("values_alternating", REPEATED, f"k, v = {K_WIDE}, v.repeat(1, q.shape[1] // v.shape[1], 1, 1)",
     "the keys repeated as a a a b b b and the values as a b a b a b: repeat both alike"),
    ("keys_alternating", REPEATED, f"v, k = {V_WIDE}, k.repeat(1, q.shape[1] // k.shape[1], 1, 1)",
     "the values repeated as a a a b b b and the keys as a b a b a b: repeat both alike"),
    ("heads_not_repeated", REPEATED, "k, v = k, v", "key heads not repeated, or not H / G times along axis 1: each of "
     "H query heads must meet one"),
    ("root_without_brackets", SCALE, "/ q.shape[-1] ** 1 / 2", "/ d ** 1 / 2 divides by 2 d: brackets, d ** (1 / 2)"),
    ("d_hard_coded", SCALE, "/ 32 ** 0.5", "d taken as 32, whatever q has; it is q.shape[-1]"),
    ("blind_and_nan_to_zero", ("triu(1)", "weights @ v"), ("triu(0)", "(weights @ v).nan_to_num(0.0)"), BLIND),
    ("keys_and_values_exchanged", ("q @ k.mT", "weights @ v"), ("q @ v.mT", "weights @ k"), "keys and values swapped"),
    ("softmax_twice", "softmax(-1)", "softmax(-1).softmax(-1)", "a softmax of the softmax; one is enough"),
    ("softmax_over_the_table", "softmax(-1)", "flatten(2).softmax(-1).view_as(scores)", "one softmax for all queries"),
    ("groups_reversed", WIDE, "z.flip(1).repeat_interleave(q.shape[1] // z.shape[1], 1)", "key heads in reverse order"),
    ("weights_transposed", "weights @ v", "weights.mT @ v", "the weights transposed: row i holds those of query i"),
    ("query_added", "return", "return q +", "q added to the result; the residual sum is the block's affair"),
    ("values_masked", ("scores.masked_fill(future, -torch.inf)", "weights @ v"), ("scores", "weights @ v.tril()"),
     "the mask laid on the values; it belongs to the scores, before the softmax"),
    ("mask_of_heads", "torch.ones(q.shape[2], q.shape[2])", "torch.ones(q.shape[1], q.shape[1])", "a mask as large as "
     "there are heads; T is q.shape[2]"),
    ("keys_averaged", "weights @ v", "weights @ k", "the keys averaged where the values should be"),
    ("keys_ask", "q @ k.mT", "k @ q.mT", "the scores turned round: each row belongs to a query, q @ k.mT"),
    ("heads_joined", "weights @ v", "(weights @ v).transpose(1, 2).flatten(2)", "heads joined; return (B, H, T, d)"),
    ("heads_behind_tokens", "weights @ v", "(weights @ v).transpose(1, 2)", "returned as (B, T, H, d), not (B, H, T, "
     "d)"),
))  # fmt: skip


def inputs_of_attention(draw, B, H, G, T, d):
    return dict(q=draw(B, H, T, d), k=draw(B, G, T, d), v=draw(B, G, T, d))


def attention_of_one_token(answer, draw):
    """Without gradients: those of q and k are 0 up to rounding."""
    for B, H, G, d in ((2, 6, 2, 8), (1, 1, 1, 3)):
        out = answer(*inputs_of_attention(draw, B, H, G, 1, d).values())
        yield Piece("the output (B, H, T, d)", out, f"for B = {B}, H = {H}, G = {G}, T = 1, d = {d}")


ATTENTION_SIZES = (
    dict(B=2, H=6, G=2, T=5, d=8), dict(B=3, H=4, G=4, T=3, d=6), dict(B=1, H=4, G=1, T=4, d=4),
    dict(B=1, H=2, G=1, T=20, d=2), dict(B=1, H=1, G=1, T=2, d=1),
)  # fmt: skip

# ── SwiGLU ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def swiglu(x, gate, up, down):
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


PRODUCT = "F.silu(x @ gate.T) * (x @ up.T)"
OTHERS = (
    ("plain_glu", "torch.sigmoid", "a sigmoid for the gate, which is the first GLU"), ("elu", "F.elu", "ELU for SiLU"),
    ("geglu", "F.gelu", "GELU for SiLU, which is GEGLU"), ("reglu", "F.relu", "ReLU for SiLU, which is ReGLU"),
    ("geglu_tanh", "torch.nn.GELU('tanh')", "GELU for SiLU, which is GEGLU"), ("mish", "F.mish", "Mish for SiLU"),
    ("geglu_sigmoid", "(lambda z: z * torch.sigmoid(1.702 * z))", "z · sigmoid(1.702 z) for SiLU, nearly GELU"),
    ("leaky", "F.leaky_relu", "a leaky ReLU for SiLU"), ("softplus", "F.softplus", "softplus for SiLU"),
    ("softmax_glu", "(lambda z: z.softmax(-1))", "a softmax for SiLU"), ("tanh_glu", "torch.tanh", "a tanh for SiLU"),
    ("squared_relu", "(lambda z: F.relu(z) ** 2)", "a squared ReLU for SiLU"),
    ("hardswish", "F.hardswish", "a hard swish for SiLU"), ("selu", "F.selu", "SELU for SiLU"),
    ("sigmoid_turned", "(lambda z: 1 - torch.sigmoid(z))", "1 − sigmoid for SiLU"),
    ("exponent_positive", "(lambda z: z / (1 + torch.exp(z)))", "z / (1 + e^z) for SiLU, which is z · sigmoid(−z)"),
)  # fmt: skip
STORED, ALL = "a linear layer keeps its matrix as (out, in): x @ W.T, or F.linear(x, W)", f"({PRODUCT}) @ down.T"
FOR_SILU = tuple((name, "F.silu", new, f"{what}; SiLU is z · sigmoid(z)") for name, new, what in OTHERS)
SWIGLUS = catalogue(swiglu, FOR_SILU + (
    ("activation_on_the_other_branch", PRODUCT, "(x @ gate.T) * F.silu(x @ up.T)", "SiLU on up's branch, not on "
     "gate's"),
    ("activation_on_both", "(x @ up.T)", "F.silu(x @ up.T)", "SiLU on both branches; up's stays linear"),
    ("activation_on_the_product", PRODUCT, "F.silu((x @ gate.T) * (x @ up.T))", "SiLU on the product of the branches; "
     "it belongs on gate's branch, before the product"),
    ("activation_on_x", "F.silu(x @ gate.T)", "(F.silu(x) @ gate.T)", "SiLU on x; it comes behind gate's matrix"),
    ("activation_at_the_end", ALL, "F.silu(((x @ gate.T) * (x @ up.T)) @ down.T)", "SiLU behind down; not on gate's"),
    ("activation_at_the_end_too", ALL, f"F.silu({PRODUCT}) @ down.T", "SiLU on the product too; on gate's branch "
     "alone"),
    ("activation_twice", "F.silu(x @ gate.T)", "F.silu(F.silu(x @ gate.T))", "SiLU twice on gate's branch"),
    ("gated_twice", "F.silu(", "(x @ gate.T) * F.silu(", "SiLU times its input once more: z · σ(z) is all of it"),
    ("plain_glu_turned", PRODUCT, "(x @ gate.T) * torch.sigmoid(x @ up.T)", "a sigmoid on up's branch, not SiLU on "
     "gate's"),
    ("geglu_turned", PRODUCT, "(x @ gate.T) * F.gelu(x @ up.T)", "GELU, and on up's branch; SiLU belongs on gate's"),
    ("sigmoid_on_both", PRODUCT, "torch.sigmoid(x @ gate.T) * torch.sigmoid(x @ up.T)", "a sigmoid on both, no SiLU"),
    ("bilinear", "F.silu", "", "no non-linearity at all: SiLU on gate's branch is missing"),
    ("branches_added", "* (x", "+ (x", "the branches added; they are multiplied, feature by feature"),
    ("branches_subtracted", "* (x", "- (x", "the branches subtracted; they are multiplied, feature by feature"),
    ("no_second_branch", " * (x @ up.T)", "", "up's branch left out: an ordinary feed-forward layer with SiLU"),
    ("no_gate", PRODUCT, "F.silu(x @ up.T)", "gate's branch left out: an ordinary feed-forward layer with SiLU"),
    ("residual_inside", "return", "return x +", "x added to the result; the residual sum is the block's affair"),
    ("not_brought_down", " @ down.T", "", "down left out: the product still has F features; down brings it back to D"),
    ("scaled", "return", "return gate.shape[0] ** -0.5 *", "the result divided by √F; nothing is scaled here"),
    ("activation_behind_down_too", ALL, "F.silu((F.silu(x @ gate.T) * (x @ up.T)) @ down.T)", "SiLU behind down too"),
    ("activation_on_x_twice", PRODUCT, "(F.silu(x) @ gate.T) * (F.silu(x) @ up.T)", "SiLU on x; it is on x @ gate.T"),
    ("activation_of_the_matrix", "F.silu(x @ gate.T)", "(x @ F.silu(gate).T)", "SiLU of gate's weights; of x @ gate.T"),
    ("sigmoid_of_up", "(x @ up.T)", "torch.sigmoid(x @ up.T)", "a sigmoid on up's branch, which stays linear"),
    ("one_behind_the_other", PRODUCT, "F.silu(x @ gate.T @ up) @ up.T", "gate and up in a row; both read x itself"),
    ("mean_of_tokens", PRODUCT, "(F.silu(x @ gate.T) * (x @ up.T)).mean(1, keepdim=True).expand(-1, x.shape[1], -1)",
     "a mean over the tokens; each token is computed by itself"),
    ("matrices_reshaped", ("gate.T", "up.T", "down.T"), ("gate.reshape(-1, len(gate))", "up.reshape(-1, len(up))",
     "down.reshape(-1, len(down))"), f"matrices reshaped, which shuffles them, not transposed: {STORED}"),
    ("down_reshaped", "down.T", "down.reshape(-1, len(down))", "down reshaped, which shuffles it; transpose it"),
    ("matrices_not_transposed", "gate.T", "gate", f"gate or up not transposed: {STORED}"),
    ("down_not_transposed", "down.T", "down", f"down not transposed: {STORED}"),
))  # fmt: skip


def inputs_of_swiglu(draw, B, T, D, F):
    return dict(x=draw(B, T, D), gate=draw(F, D) / 2, up=draw(F, D) / 2, down=draw(D, F) / 3)


# ── the fused matrix of GPT-2 ─────────────────────────────────────────────────────────────────────────────────────────


def split_fused(weight, bias):
    matrices = torch.stack([part.T for part in weight.chunk(3, 1)])  # (3, D, D)
    return matrices, torch.stack(bias.chunk(3))


MATRICES = "torch.stack([part.T for part in weight.chunk(3, 1)])"
BOTH = "return matrices, torch.stack(bias.chunk(3))"
BIASES, THIRDS = "torch.stack(bias.chunk(3))", "torch.stack([weight.T[i::3] for i in range(3)])"
BLOCKS = "there are three blocks: q's outputs, k's, v's"
IN_FRONT = "the axis of three is first: torch.stack(…)"
SPLITS = catalogue(split_fused, (
    ("not_transposed", "part.T", "part", "the matrices not transposed: the file keeps them (in, out) and multiplies x "
     "@ W, a linear layer keeps (out, in)"),
    ("cut_along_the_inputs", MATRICES, "weight.reshape(3, weight.shape[0], -1)", "cut along the inputs: q, k and v lie "
     "side by side in the columns of the file's matrix, which are the outputs"),
    ("cut_along_the_inputs_and_transposed", MATRICES, "weight.reshape(3, weight.shape[0], -1).mT",
     "the memory read as (3, D, D) before transposing, which cuts along the inputs; the outputs are the columns: "
     "chunk(3, dim=1), then transpose each"),
    ("rows_cut", "chunk(3, 1)", "chunk(3, 0)", "cut along the inputs, the file's rows; q, k, v are blocks of columns"),
    ("every_third", (MATRICES, "bias.chunk(3)"), (THIRDS, "[bias[i::3] for i in range(3)]"),
     f"every third output taken; {BLOCKS}"),
    ("every_third_not_turned", (MATRICES, "bias.chunk(3)"),
     (THIRDS.replace(".T[i::3]", "[:, i::3]"), "[bias[i::3] for i in range(3)]"),
     f"every third output taken, and not transposed; {BLOCKS}"),
    ("matrices_take_turns", MATRICES, THIRDS, f"the biases cut in blocks and the matrices by turns; {BLOCKS}"),
    ("biases_take_turns", BIASES, "bias.unflatten(0, (-1, 3)).T",
     f"the matrices cut in blocks and the biases by turns; {BLOCKS}"),
    ("keys_first", BOTH, "return matrices[[1, 0, 2]], bias.view(3, -1)[[1, 0, 2]]", "the order k, q, v; q is first"),
    ("values_second", BOTH, "return matrices[[0, 2, 1]], bias.view(3, -1)[[0, 2, 1]]", "the order q, v, k; k is "
     "second"),
    ("order_reversed", BOTH, "return matrices.flip(0), bias.view(3, -1).flip(0)", "the order v, k, q; the file has q "
     "first"),
    ("bias_keys_first", BOTH, "return matrices, bias.view(3, -1)[[1, 0, 2]]", "the biases' order k, q, v; q is first"),
    ("matrix_keys_first", BOTH, "return matrices[[1, 0, 2]], bias.view(3, -1)", "the matrices' order k, q, v; q is "
     "first"),
    ("one_transposed", "part.T for part in weight.chunk(3, 1)",
     "w if i else w.T for i, w in enumerate(weight.chunk(3, 1))", "only the first matrix transposed; all three are "
     "kept (in, out) in the file"),
    ("three_axis_last", "chunk(3, 1)])", "chunk(3, 1)], -1)", f"stacked along the last axis; {IN_FRONT}"),
    ("three_axis_between", "chunk(3, 1)])", "chunk(3, 1)], 1)", f"stacked along axis 1; {IN_FRONT}"),
    ("matrices_not_stacked", "torch.stack([", "torch.cat([",
     f"the three matrices on top of one another, (3 D, D); {IN_FRONT}"),
    ("biases_not_stacked", BIASES, "bias", "the biases left as one row, (3 D,); needed is (3, D)"),
    ("biases_as_columns", BIASES, "torch.stack(bias.chunk(3), 1)", "the biases as columns, (D, 3); needed is (3, D)"),
    ("biases_zero", BIASES, "torch.zeros(3, len(weight))", "the biases left at 0"),
    ("pair_swapped", BOTH, "return torch.stack(bias.chunk(3)), matrices", "the biases first; needed are matrices, then "
     "biases"),
    ("outputs_flipped", "part.T", "part.T.flip(0)", "matrices turned by a quarter, or outputs flipped; transpose them"),
    ("values_not_transposed", "part.T for part in weight.chunk(3, 1)",
     "w.T if i < 2 else w for i, w in enumerate(weight.chunk(3, 1))", "v's matrix not transposed; all three need it"),
    ("keys_first_values_not_transposed", MATRICES, "(lambda q, k, v: torch.stack((k.T, q.T, v)))(*weight.chunk(3, 1))",
     "q and k in each other's place, and v's matrix not transposed"),
    ("heads_take_turns", (MATRICES, BIASES), (
     "weight.T.reshape(4, 3, -1, len(weight)).transpose(0, 1).reshape(3, len(weight), len(weight))",
     "bias.reshape(4, 3, -1).transpose(0, 1).reshape(3, -1)"), f"q, k and v taken head by head; {BLOCKS}"),
    ("matrix_values_second", BOTH, "return matrices[[0, 2, 1]], bias.view(3, -1)", "the matrices' order q, v, k"),
    ("biases_reversed", BOTH, "return matrices, bias.view(3, -1).flip(0)", "the biases' order v, k, q; q is first"),
    ("biases_alike", BIASES, "bias.chunk(3)[0].expand(3, -1)", "q's bias three times"),
    ("matrices_alike", MATRICES, "weight.chunk(3, 1)[0].T.expand(3, -1, -1)", "q's matrix three times"),
))  # fmt: skip


def probe_split(answer, draw):
    names = "the three matrices (3, D, D)", "the three biases (3, D)"
    for i, D in enumerate((8, 6, 1, 8)):
        result = answer(draw(D, 3 * D), draw(3 * D))
        for what, value in zip(names, pair(result, "the three matrices, then the three biases")):
            if isinstance(value, tuple | list) and len({getattr(part, "shape", None) for part in value}) == 1:
                value = torch.stack(tuple(value))  # a list of three counts as their stack
            yield Piece(what, value, (f"for D = {D}" + " again" * (i > 2)) * (i > 0))


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def cached_attention(attention, x, past):
    S, T = 0 if past is None else past[0].shape[2], x.shape[1]
    q, k, v = attention.project(x, S + torch.arange(T))
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, G, S + T, d)
    all_k, all_v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
    scores = q @ all_k.mT / q.shape[-1] ** 0.5  # (B, H, T, S + T)
    hidden = torch.ones(scores.shape[-2:]).triu(S + 1).bool()
    y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ all_v
    return attention.output(y), (k, v)


PLACES, KEPT, WEIGHED = "S + torch.arange(T)", "(k, v)\n", "scores.masked_fill(hidden, -torch.inf).softmax(-1)"
BEHIND = "k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)"
GROUPS = "z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v)"
STANDS = "behind S cached tokens the first new one stands at S"
SEES = "new token i sees the first S + i + 1: tril(S)"
CACHES = catalogue(cached_attention, (
    ("positions_restart", PLACES, "torch.arange(T)", "the new tokens' positions begin at 0 again; they go on, from S"),
    ("not_turned", ", " + PLACES, "", "no positions given to `project`; without them RoPE has nothing to turn by"),
    ("positions_leave_a_gap", PLACES, "S + int(S > 0) + torch.arange(T)",
     f"the new tokens' positions one too late: {STANDS}"),
    ("positions_from_one", PLACES, "S + 1 + torch.arange(T)", f"positions counted from 1; {STANDS}"),
    ("positions_one_too_early", PLACES, "S - int(S > 0) + torch.arange(T)",
     f"the new tokens' positions one too early: {STANDS}"),
    ("positions_all_alike", PLACES, "S + 0 * torch.arange(T)", "one position, S, for all new tokens: S, S + 1, …"),
    ("positions_behind_the_new", PLACES, "S + T + torch.arange(T)", f"positions that begin at S + T; {STANDS}"),
    ("scaled_by_stream", "q.shape[-1] ** 0.5", "attention.width ** 0.5", "divided by √D, the stream's width; divide by "
     "√d"),
    ("positions_of_the_batch", PLACES, "(S and len(past[0])) + torch.arange(T)", "positions from past[0].shape[0]; S "
     "is shape[2]"),
    ("positions_of_another_axis", PLACES, "(S and past[0].shape[1]) + torch.arange(T)", "positions that begin at "
     "past[0].shape[1], the number of key heads; S is past[0].shape[2]"),
    ("new_before_old", BEHIND, "k, v = torch.cat((k, past[0]), 2), torch.cat((v, past[1]), 2)",
     "the new keys put before the cached ones; they go behind them"),
    ("turned_twice", "((past[0], k)", "((rotate(past[0], *attention.rope(torch.arange(S))), k)",
     "cached keys turned a second time; a key is turned once, when it is new, then kept as it is"),
    ("kept_unturned", ("    if past", "q @ all_k.mT"),
     ("    k, v = attention.keys_values(x)\n    if past", "q @ rotate(all_k, *attention.rope(torch.arange(S + T))).mT"),
     "keys cached before they are turned, so that every step must turn all of them again; turn a key once, then keep "
     "it"),
    ("only_the_new_kept", KEPT, "(k[:, :, S:], v[:, :, S:])", "only the new keys and values returned as the cache: "
     "what came before is lost at the next step"),
    ("new_not_kept", KEPT, "(past or (k, v))", "the old cache returned, without the new tokens"),
    ("old_not_seen", (" for z in (k, v)", "triu(S + 1)"), (" for z in (k[:, :, S:], v[:, :, S:])", "triu(1)"),
     "the new tokens look at each other only, not at the cached ones"),
    ("past_ignored", "0 if past is None else past[0].shape[2]", "(past := None) or 0", "`past` not used"),
    ("values_not_kept", "past[1]", "0 * past[1]", "zeros in the place of the cached values; both are kept"),
    ("keys_for_values", "past[1]", "past[0]", "the cached keys put where the cached values belong, past[1]"),
    ("keys_and_values_swapped", KEPT, "(v, k)", "the cache returned as (values, keys); needed is (keys, values)"),
    ("joined_along_heads", BEHIND, "k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)",
     "the cached keys joined along the heads' axis; tokens are axis 2 of (B, G, S, d)"),
    ("no_mask", "scores.masked_fill(hidden, -torch.inf)", "scores", "no mask at all: a token sees those that come "
     "after it"),
    ("new_see_each_other", "triu(S + 1)", "triu(S + T if S else 1)",
     f"no mask among the new tokens: each sees those behind it; {SEES}"),
    ("mask_from_the_corner", "triu(S + 1)", "triu(1)",
     f"a mask begun in its upper left corner, which is what is_causal=True gives; {SEES}"),
    ("mask_hides_the_new", ("triu(S + 1)", "-torch.inf"), ("triu(S or 1)", "-1e9"),
     f"a mask off by one: the new tokens do not see themselves; {SEES}"),
    ("mask_hides_itself", "triu(S + 1)", "triu(S)",
     f"a mask off by one: no token sees itself, and the first becomes NaN; {SEES}"),
    ("mask_shows_the_next", "triu(S + 1)", "triu(S + 2)",
     f"a mask off by one: each token sees the one behind it too; {SEES}"),
    ("mask_of_the_new", "triu(S + 1)", "triu(T + 1)", f"a mask begun at the number of new tokens, T; {SEES}"),
    ("hidden_set_to_zero", "-torch.inf", "0.0", "hidden scores set to 0; e⁰ still has a share, set them to −∞"),
    ("masked_after_softmax", WEIGHED, "scores.softmax(-1).masked_fill(hidden, 0.0)", "the mask behind the softmax; it "
     "belongs before it"),
    ("heads_repeated_in_the_cache", "    if past", f"    k, v = ({GROUPS})\n    if past", "key and value heads "
     "repeated before they are cached, which makes the cache H / G times as large; keep G heads and repeat afterwards"),
    ("heads_alternating", GROUPS, "z.repeat(1, q.shape[1] // z.shape[1], 1, 1) for z in (k, v)", ALTERNATING),
    ("not_projected", "attention.output(y)", "y.transpose(1, 2).flatten(2)", "not projected: call attention.output(y)"),
    ("y_returned", "attention.output(y)", "y", "neither joined nor projected: call attention.output(y)"),
    ("mask_inverted", f"{WEIGHED} @ all_v", "F.scaled_dot_product_attention(q, all_k, all_v, attn_mask=hidden)",
     f"the mask turned round: with scaled_dot_product_attention True means seen; {SEES}"),
    ("mask_transposed", f"{WEIGHED} @ all_v", "F.scaled_dot_product_attention(q, all_k, all_v, "
     "attn_mask=torch.ones(T, S + T).triu(S).bool())", f"the mask the wrong way round, triu(S); {SEES}"),
    ("seen_raised_by_one", WEIGHED, "(scores + (~hidden).to(x.dtype)).softmax(-1)", "a mask of 0 and 1, which is "
     "added to the scores: hidden ones need −∞, or give a mask of booleans"),
    ("hidden_raised_by_one", WEIGHED, "(scores + hidden.to(x.dtype)).softmax(-1)", "a mask of 1 and 0, which is "
     "added to the scores: hidden ones need −∞"),
    ("infinity_times_zero", WEIGHED, "(scores + hidden.float() * -torch.inf).softmax(-1)", "0 · −∞ is NaN"),
    ("new_see_themselves_alone", "torch.ones(scores.shape[-2:]).triu(S + 1).bool()",
     "~torch.cat((torch.ones(T, S), torch.eye(T)), 1).bool()", f"no new token sees the new ones before it; {SEES}"),
    ("length_of_another_axis", "past[0].shape[2]", "past[0].shape[1]", "S from past[0].shape[1], which is G"),
    ("length_of_the_pair", "past[0].shape[2]", "len(past)", "S from len(past), which is 2; it is past[0].shape[2]"),
    ("softmax_over_queries", "softmax(-1)", "softmax(-2)", f"the softmax over the queries' axis; {OVER_KEYS}"),
    ("positions_from_the_new", PLACES, "(S and T) + torch.arange(T)", f"positions that begin at T; {STANDS}"),
    ("positions_of_the_pair", PLACES, "(S and 2) + torch.arange(T)", f"positions that begin at len(past); {STANDS}"),
    ("positions_of_the_width", PLACES, "(S and past[0].shape[3]) + torch.arange(T)", "positions beginning at d, not S"),
    ("positions_backwards", PLACES, "(S + torch.arange(T)).flip(0)", f"positions counted down; {STANDS}"),
    ("positions_of_all", PLACES, "torch.arange(S + T)", f"S + T positions for T new tokens; {STANDS}"),
    ("positions_up_to_new", PLACES, "torch.arange(S, T)", f"positions from S to T; they go from S to S + T: {STANDS}"),
    ("queries_not_turned", "    if past", "    q = attention.project(x)[0]\n    if past", "queries without positions; "
     "they are turned as the keys are"),
    ("keys_twice", KEPT, "(k, k)\n", "the keys returned twice; the cache is (keys, values)"),
    ("kept_transposed", KEPT, "(k.transpose(1, 2), v.transpose(1, 2))\n", "cached as (B, S, G, d), not (B, G, S, d)"),
    ("new_in_front", (BEHIND, "torch.ones(scores.shape[-2:]).triu(S + 1).bool()"),
     ("k, v = torch.cat((k, past[0]), 2), torch.cat((v, past[1]), 2)",
      "torch.cat((torch.ones(T, T).triu(1), torch.zeros(T, S)), 1).bool()"), "the new keys in front; they go behind"),
    ("new_values_in_front", "torch.cat((past[1], v), 2)", "torch.cat((v, past[1]), 2)", "new values before the old"),
    ("all_turned_again", "q @ all_k.mT", "q @ (rotate(all_k, *attention.rope(torch.arange(S + T))) if S else all_k).mT",
     "cached keys turned again when they are used; a key is turned once, when it is new"),
    ("keys_averaged", "@ all_v", "@ all_k", "the keys averaged where the values should be"),
    ("residual_added", "return attention", "return x + attention", "x added; the residual sum is the block's affair"),
    ("heads_not_brought_back", "attention.output(y)", "attention.o_proj(y.reshape(*x.shape[:2], -1))", "reshaped, "
     "which mixes heads and tokens: call attention.output(y), or transpose(1, 2) first"),
    ("pair_swapped", "attention.output(y), (k, v)", "(k, v), attention.output(y)", "the cache first; needed are the "
     "output, then the cache"),
) + SCALES)  # fmt: skip


CACHE_SIZES = (2, 40, 6, 2, 8, (4, 3, 1)), (1, 10, 3, 3, 4, (1, 2, 2)), (3, 6, 4, 1, 2, (2, 1, 9))  # B, D, H, G, d, T …


def probe_cached(answer, draw):
    for halved in (False, True):
        for B, D, H, G, d, portions in CACHE_SIZES:
            attention, past, S = filled(Attention(D, H, G, d, RoPE(d, 50.0 * H), bias=True), draw), None, 0
            attention = in_bfloat16(attention) if halved else attention
            for T in portions:
                where = f"for H = {H}, G = {G}, d = {d}, " * (D < 40)
                where += f"of {T} token{'s' * (T > 1)}" + f" behind {S} cached" * (S > 0) + ", in bfloat16" * halved
                x, S = draw(B, T, D), S + T
                x = (in_bfloat16(x) if halved else x).requires_grad_()
                out, past = pair(answer(attention, x.clone(), past), "the output, then the cache")
                past = pair(past.unbind() if isinstance(past, torch.Tensor) else past, "keys and values")
                yield Piece("the output (B, T, D)", out, where)
                yield from (Piece(f"the {kind} (B, G, S, d)", z, where) for kind, z in zip(("keys", "values"), past))
                if T > 1:  # a single token that sees one key has no gradient but rounding
                    found = gradients(out, x)[0]  # a cache may be cut off from the graph, the new tokens may not
                    yield Piece("the gradient with respect to x", found, where, "gradient", "x")
                past = tuple(value.detach() for value in past)
        if not halved:
            yield from probe_turns(answer, draw)


def probe_turns(answer, draw):
    """Two texts by turns, then the same past twice: whatever is kept between calls is another's."""
    attention, pasts = filled(Attention(40, 6, 2, 8, RoPE(8, 70.0), bias=True), draw), [None, None]
    for i, T in ((0, 4), (1, 2), (0, 3), (1, 3), (1, 1), (1, 1)):
        out, past = pair(answer(attention, draw(2, T, 40), pasts[i]), "the output, then the cache")
        yield Piece("the output (B, T, D)", out, "where two texts take turns, each with its past given again")
        pasts[i] = past if T > 1 else pasts[i]


probe_cached.told = True


# ── the answer's labels ───────────────────────────────────────────────────────────────────────────────────────────────


def answer_labels(prompt_ids, answer_ids):
    ids = torch.tensor(prompt_ids + answer_ids)
    labels = torch.tensor([-100] * len(prompt_ids) + answer_ids)
    return ids, labels


IDS, ANSWER = "prompt_ids + answer_ids", "[-100] * len(prompt_ids) + answer_ids"
READS = "the model reads both in one row; mask labels alone"
LABELS = catalogue(answer_labels, (
    ("loss_on_the_prompt", ANSWER, "prompt_ids + answer_ids", "the ids as labels: loss on the prompt too; -100 there"),
    ("loss_on_the_prompt_alone", ANSWER, "prompt_ids + [-100] * len(answer_ids)", "the mask turned round"),
    ("shifted_already", ANSWER, "[-100] * (len(prompt_ids) - 1) + answer_ids + [-100]", "labels shifted by one "
     "already; the loss shifts them itself: a label is the id at its own place"),
    ("shifted_and_cut", "return ids, labels", "return ids[:-1], labels[1:]", "ids without the last and labels without "
     "the first, which shifts them; the loss does that itself"),
    ("shifted_the_other_way", ANSWER, "[-100] * (len(prompt_ids) + 1) + answer_ids[:-1]", "labels one place too late; "
     "a label is the id at its own place"),
    ("first_of_the_answer_masked", ANSWER, "[-100] * (len(prompt_ids) + 1) + answer_ids[1:]", "a mask one too long: "
     "the answer's first id carries loss too, the prompt's last token predicts it"),
    ("last_of_the_prompt_learned", ANSWER, "[-100] * (len(prompt_ids) - 1) + prompt_ids[-1:] + answer_ids",
     "a mask one too short: the prompt's last id would carry loss"),
    ("last_of_the_answer_masked", ANSWER, "[-100] * len(prompt_ids) + answer_ids[:-1] + [-100]",
     "the answer's last id without loss; by it the model learns to stop"),
    ("masked_as_long_as_the_answer", ANSWER, "[-100] * len(answer_ids) + (prompt_ids + answer_ids)[len(answer_ids) :]",
     "as many -100 as the answer has ids; the prompt's places are to be left out"),
    ("masked_by_value", ANSWER, "[-100 if i in prompt_ids else i for i in prompt_ids + answer_ids]",
     "ids masked that occur in the prompt; an answer may repeat them: mask by place"),
    ("rolled_back", "return ids, labels", "return ids, labels.roll(1)", "labels one place too late"),
    ("all_masked", ANSWER, "[-100] * len(prompt_ids + answer_ids)", "every label -100: no loss falls anywhere"),
    ("zero_for_ignored", "[-100]", "[0]", "0 where no loss is to fall; 0 is an id, the loss leaves out -100"),
    ("minus_one_for_ignored", "[-100]", "[-1]", "-1 where no loss is to fall; the loss leaves out -100"),
    ("hundred_for_ignored", "[-100]", "[100]", "100 where no loss is to fall; it is minus 100"),
    ("labels_of_the_answer_alone", ANSWER, "answer_ids", "labels of the answer alone; as long as ids, -100 at first"),
    ("answer_masked_in_ids", IDS, "prompt_ids + [-100] * len(answer_ids)",
     f"-100 among the ids, in the answer's place; {READS}"),
    ("prompt_masked_in_ids", IDS, "[-100] * len(prompt_ids) + answer_ids",
     f"-100 among the ids too (labels = ids is one tensor: clone it); {READS}"),
    ("answer_zeroed_in_ids", IDS, "prompt_ids + [0] * len(answer_ids)", f"the answer's ids set to 0; {READS}"),
    ("ids_of_the_prompt_alone", IDS, "prompt_ids", f"ids without the answer; {READS}"),
    ("parts_apart", (IDS, ANSWER), ("prompt_ids", "answer_ids"),
     f"the prompt as ids and the answer as labels; {READS}"),
    ("ids_of_the_answer_alone", IDS, "answer_ids", f"ids without the prompt; {READS}"),
    ("answer_first", IDS, "answer_ids + prompt_ids", "the answer before the prompt"),
    ("both_answer_first", (IDS, ANSWER), ("answer_ids + prompt_ids", "answer_ids + [-100] * len(prompt_ids)"),
     "the answer before the prompt"),
    ("pair_swapped", "return ids, labels", "return labels, ids", "labels and ids in each other's place: ids first"),
    ("a_mask_for_labels", ANSWER, "[0] * len(prompt_ids) + [1] * len(answer_ids)", "a mask; labels are ids, or -100"),
    ("repeats_masked", ANSWER, "[-100] * len(prompt_ids) + [-100 if i in answer_ids[:n] else i for n, i in "
     "enumerate(answer_ids)]", "an id that the answer repeats masked; each of its places carries loss: mask by place"),
    ("found_by_value", ANSWER, "[i if i in answer_ids else -100 for i in prompt_ids + answer_ids]", "loss wherever an "
     "id of the answer stands, in the prompt too; mask by place"),
    ("sixteen_masked", ANSWER, "([-100] * 16 + (prompt_ids + answer_ids)[16:])[: len(prompt_ids + answer_ids)]",
     "16 places masked, whatever the prompt's length"),
    ("eleven_counted", ANSWER, "[-100] * (len(prompt_ids + answer_ids) - 11) + (prompt_ids + answer_ids)[-11:]",
     "the last 11 places with loss, whatever the answer's length"),
    ("half_masked", ANSWER, "[-100] * (len(prompt_ids + answer_ids) // 2) + (prompt_ids + answer_ids)[len(prompt_ids + "
     "answer_ids) // 2 :]", "half of the places masked; it is the prompt's"),
    ("shifted_and_zero", ANSWER, "([-100] * len(prompt_ids) + answer_ids)[1:] + [0]", "shifted; the loss does that"),
    ("shifted_ids", ANSWER, "(prompt_ids + answer_ids)[1:] + [-100]", "the ids shifted; the loss does that"),
    ("first_alone", ANSWER, "[-100] * len(prompt_ids) + answer_ids[:1] + [-100] * (len(answer_ids) - 1)",
     "the answer's first id alone with loss; all of the answer carries it"),
    ("last_alone", ANSWER, "[-100] * (len(prompt_ids + answer_ids) - 1) + answer_ids[-1:]", "the last alone with loss"),
    ("masked_behind", ANSWER, "answer_ids + [-100] * len(prompt_ids)", "-100 behind; the prompt's places are in front"),
    ("answer_reversed", ANSWER, "[-100] * len(prompt_ids) + answer_ids[::-1]", "the answer's labels backwards"),
    ("an_end_added", (IDS, ANSWER), ("prompt_ids + answer_ids + [0]", "[-100] * len(prompt_ids) + answer_ids + [0]"),
     "an id added at the end; ids and labels are as long as prompt and answer together"),
    ("batch_axis", "return ids, labels", "return ids[None], labels[None]", "a batch axis, (1, T); needed is (T,)"),
))  # fmt: skip


def probe_labels(answer, draw):
    long = [i * i % 53 for i in range(90)]
    for prompt, reply in (([5, 9, 7, 5], [7, 0, 3]), ([4], [6, 2, 6, 4, 8, 2, 1]), ([3, 0, 8, 2, 6], [9]), ([2], [2]),
                          (long[:50], long[50:])):  # fmt: skip
        given = list(prompt), list(reply)
        result = answer(*given)
        why = "your function changes a list it was given (`+=` lengthens it): write prompt_ids + answer_ids, a new one."
        yield fact(given != (prompt, reply), "in place", why)
        for what, value in zip(("ids (T)", "labels (T)"), pair(result, "ids and labels")):
            if not isinstance(value, torch.Tensor):
                raise Wrong("not_a_tensor", f"{what} should be a tensor, torch.tensor(…); it is {describe(value)}.")
            why = f"{what} is {str(value.dtype)[6:]}; ids are whole numbers, torch.int64."
            yield fact(value.dtype == torch.int64, "not_int64", why, f"whether {what} is int64")
            yield Piece(what, value.long(), f"for {len(prompt)} + {len(reply)} ids" if prompt[0] != 5 else "")


# ── predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────


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


INSTEAD = "does what you are to write here; do without it"
EXERCISES = {
    "rms_norm": Exercise(
        "rms_norm(x, weight, eps) -> (B, T, D)", rms_norm, NORMS, probe_rms_norm,
        forbidden=dict.fromkeys((F.rms_norm, torch.rms_norm), f"F.rms_norm, which nn.RMSNorm calls too, {INSTEAD}")
        | {RMSNorm.forward: f"minillama's RMSNorm {INSTEAD}"},
    ),
    "rope": Exercise(
        "rope(x, positions, theta) -> (B, H, T, d)", rope, ROPES,
        calls(inputs_of_rope, "the output (B, H, T, d)", ROPE_SIZES, again=dict(theta=30.0, start=40)),
        forbidden={rotate: f"attention.rotate {INSTEAD}", RoPE.__call__: f"attention.RoPE {INSTEAD}"},
    ),
    "grouped_query_attention": Exercise(
        "grouped_query_attention(q, k, v) -> (B, H, T, d)", grouped_query_attention, ATTENTIONS,
        with_more(calls(inputs_of_attention, "the output (B, H, T, d)", ATTENTION_SIZES, again={}),
                  attention_of_one_token),
        hints={"H": "Which key head belongs to which query head? With H = 6 and G = 2: a a a b b b."},
        forbidden=dict.fromkeys((F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention,
                                 torch._scaled_dot_product_attention_math), f"scaled_dot_product_attention {INSTEAD}")
        | {Attention.attend: f"attention.attend {INSTEAD}"},
    ),
    "swiglu": Exercise(
        "swiglu(x, gate, up, down) -> (B, T, D)", swiglu, SWIGLUS,
        calls(inputs_of_swiglu, "the output (B, T, D)",
              (dict(B=2, T=5, D=8, F=12), dict(B=3, T=2, D=4, F=4), dict(B=1, T=1, D=3, F=1)), again={}),
    ),
    "split_fused": Exercise(
        "split_fused(weight, bias) -> matrices (3, D, D), biases (3, D)", split_fused, SPLITS, probe_split,
    ),
    "cached_attention": Exercise(
        "cached_attention(attention, x, past) -> output (B, T, D), (keys, values)", cached_attention, CACHES,
        probe_cached,
        forbidden={Attention.attend: f"attention.attend, which attention(…) calls too, {INSTEAD}"},
    ),
    "answer_labels": Exercise(
        "answer_labels(prompt_ids, answer_ids) -> ids (T,), labels (T,)", answer_labels, LABELS, probe_labels,
    ),
    "cache_numbers": Question(
        cache_numbers, "Keys and values, in each layer, for each key head: 2 · L · G · d.",
        {30 * 3 * 64: "that is the keys; the values are kept as well.",
         2 * 30 * 9 * 64: "queries are not kept, and their heads share keys and values: "
                          "count the G key heads, not the H query heads.",
         30 * 9 * 64: "queries are not kept: count the G key heads, not the H query heads, and both keys and values.",
         2 * 3 * 64: "that is one layer; each layer keeps its own.", 3 * 64: "that is one layer's keys.",
         2 * 9 * 64: "that is one layer, and with a key head for each query head.",
         3 * 30 * 3 * 64: "two things are kept, keys and values; a query is used once, by its own token.",
         2 * 30 * 3: "that counts the vectors; each has d numbers.", 2 * 30 * 64: "that is one key head; there are G.",
         30 * 576: "that is a vector of the stream for each layer; what is kept are keys and values.",
         2 * 30 * 576: "that is as wide as the stream, as without grouped queries; there are G key heads of width d.",
         4 * 30 * 3 * 64: "that is bytes in bfloat16; count numbers."},
        nudge="Multiply: how many things are kept, in how many layers, for how many heads, each of which width?",
    ),
    "shifted_llama": Question(
        lambda: shifted("llama"),
        "A score depends on how far apart query and key stand, and RoPE is all that a LLaMA knows of positions.",
        {"different": "each query and each key is turned further, but by the same angle: "
                      "what does that do to the angle between them?"},
        nudge="Turn both hands of a clock by the same angle: what happens to the angle between them?",
    ),
    "shifted_gpt2": Question(
        lambda: shifted("gpt2"),
        "A GPT-2 adds the learned vector of each place to the token; place 100 has another one than place 0.",
        {"same": "what does a GPT-2 add to the token at place 100, and what at place 0?"},
        nudge="Two rows of a table that is learned row by row: is there any reason for them to be equal?",
    ),
}  # fmt: skip
