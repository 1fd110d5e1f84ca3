"""Lesson 02: prompt tuning, prefix tuning and a training step, with the wrong versions that one writes easily."""

from copy import copy

import torch
from torch import nn

import minillama

from ...adapters import adapter_parameters, prefix_tuning, prompt_tuning
from ...attention import Attention, Cache, LayerCache, RoPE, embed, rotate
from .catalogue import catalogue
from .observing import Exercise, Piece, Wrong, as_function, calls, describe, fact, filled, gradients
from .predictions import Question

SPREADS = (  # how a tensor p gets its batch axis
    ("rows_cut_from_copies", "{p}.repeat_interleave({B}, 0).view({B}, *{p}.shape)", "the vectors in another order for "
     "each row of the batch; expand copies the whole for each"),
    ("batch_axis_missing", "{p}", "it needs a batch axis before it is joined to the tokens': expand(B, -1, …)"),
    ("not_expanded", "{p}[None]", "a batch of one; torch.cat does not repeat it: expand(B, -1, …)"),
)  # fmt: skip

# ── a soft prompt ─────────────────────────────────────────────────────────────────────────────────────────────────────


def prompt_of(module):
    """The module's PromptEmbedding, with `embed`, as a function of the embedding, the ids and the prompt."""

    def soft_prompt(embedding, ids, prompt, past=0, active=True):
        wrapper, cache = module.PromptEmbedding(embedding, len(prompt)), Cache()
        del wrapper.prompt
        wrapper.prompt, wrapper.active, cache.length = prompt, active, past
        return embed(wrapper, ids, None, cache)[0]

    return soft_prompt


SEEN = "return self.prompt if inner is None else torch.cat((inner, self.prompt))"
PROMPTS = catalogue(prompt_tuning, (
    ("AddedToTheWords", (SEEN, "return self.base(ids)"),
     ("return inner", "x = self.base(ids)\n        return x + self.prompt.mean(0).to(x.dtype) if self.active else x"),
     "the prompt's mean added to every token instead of put before them"),
    ("ReversedPrompt", SEEN, "return self.prompt.flip(0)", "the prompt's vectors in the wrong order"),
    ("DetachedSoftPrompt", SEEN, "return self.prompt.detach()", "the prompt detached (detach, .data, no_grad, a new "
     "Parameter): it never learns"),
    ("PromptAlwaysOn", "        if not self.active:\n            return inner\n", "", "a prompt that stays when "
     "`active` is False"),
), wrap=prompt_of)  # fmt: skip


def placed(embedding, ids, prompt, past=0, active=True):
    x = embedding(ids)
    if past or not active:
        return x
    p = prompt.to(x.dtype)
    return torch.cat((p.expand(len(x), -1, -1), x), dim=1)


SPREAD, UNLESS, CAST = "p.expand(len(x), -1, -1)", "past or not active", "prompt.to(x.dtype)"
PLACES = catalogue(placed, (
    *((name, SPREAD, new.format(p="p", B="len(x)"), sentence) for name, new, sentence in SPREADS),
    ("prompt_at_every_step", UNLESS, "not active", "the prompt put before later tokens too; where past > 0 it is in "
     "the cache already"),
    ("and_for_or", UNLESS, "past and not active", "`and` for `or`: past > 0 is enough to leave the prompt out, "
     "`active` False too"),
    ("prompt_always", UNLESS, "False", "the prompt put before later tokens too, and where it is not active"),
    ("past_above_one", "past or", "past > 1 or", "the prompt left out from past = 2 on; one cached token is enough"),
    ("past_from_K", "past or", "past >= len(prompt) or", "`past` compared with K; it counts cached tokens, from 1 on"),
    ("turned_round", UNLESS, f"not ({UNLESS})", "the condition turned round: the prompt comes where it should not"),
    ("without_the_prompt", UNLESS, "True", "no prompt at all: the tokens' embeddings alone"),
    ("zeros_where_not_active", (UNLESS, CAST), ("past", CAST + " * active"), "zeros for a prompt that is not active; "
     "zeros are tokens too, which the others see"),
    ("cached_cut_off", "x\n    p", "x[:, past:]\n    p", "the first `past` tokens cut off; the ids are the new ones"),
    ("prompt_behind_the_words", f"({SPREAD}, x)", f"(x, {SPREAD})", "the prompt behind the tokens, where a causal "
     "model never looks"),
    ("prompt_over_the_words", f"{SPREAD}, x)", f"{SPREAD}, x[:, len(p):])", "the first K tokens overwritten by the "
     "prompt; K + T vectors come out"),
    ("cut_to_T", "dim=1)", "dim=1)[:, : x.shape[1]]", "cut to T vectors; K + T come out"),
    ("prompt_in_its_own_dtype", CAST, "prompt.to(prompt.dtype)", "the float32 prompt not cast: a bfloat16 model's "
     "whole input becomes float32; use prompt.to(x.dtype)"),
    ("always_bfloat16", CAST, "prompt.bfloat16()", "the prompt rounded to bfloat16 whatever the model; .to(x.dtype)"),
    ("prompt_as_tokens_of_a_row", SPREAD, f"{SPREAD} * (torch.arange(len(x))[:, None, None] == 0)", "the prompt for "
     "the first row of the batch, zeros for the others"),
    ("copies_cut_into_rows", SPREAD, "p.repeat(len(x), 1).view(len(p), len(x), -1).transpose(0, 1)", "the prompt's "
     "rows in another order for each row of the batch; copies are (B, K, D) already, with no transpose"),
    ("sum_added", f"torch.cat(({SPREAD}, x), dim=1)", "x + p.sum(0)", "the prompt's sum added to every token; it "
     "stands before"),
    ("half_precision", CAST, "prompt.half()", "the prompt rounded to float16 whatever the model; .to(x.dtype)"),
    ("mask_returned_too", "dim=1)", "dim=1), None", "two things returned; asked is what enters the first layer alone"),
    ("expanded_to_T", SPREAD, "p.expand(ids.shape[1], -1, -1)", "expanded to T, the second size of ids; the first is B "
     ""), ("scaled_prompt", CAST, f"{CAST} * x.shape[-1] ** 0.5", "the prompt times √D; it goes in as it is"),
    ("mean_in_front", SPREAD, "p.mean(0).expand(len(x), 1, -1)", "one vector, the prompt's mean; all K go in front"),
    ("mean_over_all", SPREAD, "p.mean(0).expand(len(x), len(p), -1)", "the prompt's mean, K times"),
    ("first_vector_alone", SPREAD, "p[:1].expand(len(x), -1, -1)", "the prompt's first vector alone; all K go there"),
    ("joined_along_rows", "dim=1", "dim=0", "joined along the batch, torch.cat's default; tokens lie along dim=1"),
    ("joined_along_features", "dim=1", "dim=-1", "joined along the features; tokens lie along dim=1"),
))  # fmt: skip
PROMPT_SIZES = [dict(zip(("B", "T", "K", "D", "past", "active"), size)) for size in (
    (2, 5, 3, 8, 0, True), (2, 4, 3, 8, 2, True), (3, 1, 4, 6, 1, True), (3, 2, 5, 6, 0, False), (2, 3, 2, 4, 9, True),
    (2, 3, 4, 4, 7, False), (4, 3, 2, 6, 0, True), (1, 1, 1, 5, 0, True),
)]  # fmt: skip


def inputs_of_prompt(draw, B, T, K, D, past, active):
    ids = (draw(B, T).abs() * 40).long() % 11
    return dict(embedding=filled(nn.Embedding(11, D), draw), ids=ids, prompt=draw(K, D), past=past, active=active)


# ── a prefix in every layer ───────────────────────────────────────────────────────────────────────────────────────────


def right_turn_back(rope, keys):
    G, K, d = keys.shape
    return rotate(keys, *rope(torch.full((K,), -K)))


def neighbours_paired(rope, keys):
    """features turned in pairs (0, 1), (2, 3), …; our checkpoints pair i with i + d/2, as `rotate` does"""
    apart = torch.cat((keys[..., ::2], keys[..., 1::2]), -1)
    return torch.stack(right_turn_back(rope, apart).chunk(2, -1), -1).flatten(-2)


TURNED_TO = (  # in the place of torch.full((K,), -K)
    ("turned_from_zero", "torch.arange(K)", "the keys turned by 0, …, K - 1 like fresh tokens; all go back by K"),
    ("turned_forwards", "torch.full((K,), K)", "the keys turned on by K instead of back, behind the first tokens"),
    ("turned_to_own_places", "torch.arange(-K, 0)", "each key turned to its own place, -K, …, -1; all go back by the "
     "same K"),
    ("turned_in_reverse_order", "-torch.arange(K)", "the keys turned by 0, -1, …, 1 - K; all go back by the same K"),
    ("turned_to_places_from_behind", "-torch.arange(1, K + 1)", "the keys turned by -1, …, -K; all go back by K"),
    ("turned_to_places_behind", "torch.arange(K, 2 * K)", "the keys turned by K, K + 1, …; all go back by K"),
    ("turned_one_too_far", "torch.full((K,), -K - 1)", "the keys turned back by K + 1 instead of K"),
    ("turned_one_too_few", "torch.full((K,), 1 - K)", "the keys turned back by K - 1, the last onto the first token"),
    ("turned_by_one", "torch.full((K,), -1)", "the keys turned back by 1 instead of K"),
    ("turned_by_ten", "torch.full((K,), -10)", "the keys turned back by 10, the lesson's K; here K is keys.shape[1]"),
)  # fmt: skip
ANGLES = "torch.full((K,), -K)"
TURNS = catalogue(right_turn_back, (
    *((name, ANGLES, new, sentence) for name, new, sentence in TURNED_TO),
    ("not_turned", f"rotate(keys, *rope({ANGLES}))", "keys + 0", "the keys as they are: the tokens, counted from 0, "
     "stand among the prefix"),
    ("turned_by_heads", ", -K)", ", -G)", "the keys turned by G, the number of heads; K is keys.shape[1]"),
    ("heads_for_K", "G, K, d", "K, G, d", "K taken from the first size, G, the number of heads; it is keys.shape[1]"),
    ("in_reverse", "rotate(keys,", "rotate(keys.flip(1),", "the keys in the wrong order"),
    ("turned_by_width", ", -K)", ", -d)", "the keys turned back by their last size, d; K is keys.shape[1]"),
    ("turned_twice", ", -K)", ", -2 * K)", "the keys turned back by 2K instead of K"),
    ("cos_and_sin_exchanged", f"*rope({ANGLES})", f"*reversed(rope({ANGLES}))", "cos and sin exchanged; rope returns "
     "cos, then sin"),
    ("cosine_alone", f"rotate(keys, *rope({ANGLES}))", f"keys * rope({ANGLES})[0]", "cos alone; `rotate` adds sin"),
    ("own_theta", "*rope(", "*RoPE(d)(", "a RoPE of its own, with the default θ and no scaling; the layer's is `rope`"),
    ("without_scaling", "*rope(", "*RoPE(d, rope.theta)(", "frequencies from θ alone; `rope` scales them: call it"),
    ("angles_alone", f"rotate(keys, *rope({ANGLES}))", f"rope({ANGLES})", "cos and sin alone; `rotate` turns the keys "
     "by them"),
    ("turned_by_minus_2K_on", ANGLES, "torch.arange(-2 * K, -K)", "the keys turned by -2K, 1 - 2K, …; all go back by K "
     ""), ("not_unpacked", "*rope(", "rope(", "rope(positions) as one argument; `rotate` takes cos and sin: *rope(…)"),
    ("a_plain_number", ANGLES, "-K", "a plain number given to `rope`; it takes a tensor, torch.full((K,), -K)"),
    ("positions_of_each_head", ANGLES, "torch.full((G, K), -K)", "positions (G, K); all heads share (K,) positions"),
), neighbours_paired)  # fmt: skip
TURNED_KEYS = calls(lambda draw, G, K, d, rope: dict(rope=RoPE(d, *rope), keys=draw(G, K, d)),
    "the turned keys (G, K, d)", (
    dict(G=2, K=3, d=8, rope=(60.0,)), dict(G=3, K=5, d=4, rope=(900.0, (8.0, 1.0, 4.0, 64))),
    dict(G=1, K=1, d=6, rope=(9.0,)),
), half=False)  # fmt: skip


def probe_turn(answer, draw):
    keys = draw(2, 3, 8)
    both = [z for z in (keys, answer(RoPE(8, 60.0), keys)) if getattr(z, "shape", None) == keys.shape]
    lengths = [z.unflatten(-1, (2, 4)).norm(dim=-2) for z in both]
    why = "pairs (i, i + d/2) change their length: a rotation is (left · cos - right · sin, right · cos + left · sin)."
    yield fact(torch.allclose(lengths[0], lengths[-1], atol=1e-4), "no_rotation", why)
    yield from TURNED_KEYS(answer, draw)


def layer_of(module):
    """The module's PrefixAttention as a function, kept as long as the layer stays the same (see as_function)."""
    built = as_function(lambda base, keys, values: module.PrefixAttention(base, keys.shape[1]), ("keys", "values"))

    def prefix_attention(attention, x, positions, keys, values, cache=None):
        return built(attention, x, positions, None, cache, keys, values)

    return prefix_attention


ATTEND, PROJECTED = "return self.base.attend(q, k, v, mask)", "*self.project(x, positions)"
BOTH, EXPANDED = "return k.to(dtype), v.to(dtype)", "prefix.expand(len(q), -1, -1, -1)"
JOINED, PAIRS = f"torch.cat(({EXPANDED}, own), dim=2)", "((pk, k), (pv, v))"
TURNED = "torch.full((self.length,), -self.length, device=k.device)"
OFF = "if not self.active:\n            return self.base.attend"
FORWARD = f"self.output(self.attend({PROJECTED}, mask, cache))"
SEES = "torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)"
IF_NO_MASK = ATTEND.replace("mask)", "mask, cache if mask is None else None)")
SECOND = """mask = None if mask is None else mask[..., self.length :]
        pk, pv = (z.repeat_interleave(q.shape[1] // len(z), 0) for z in (pk, pv))
        term = (q @ pk.mT / q.shape[-1] ** 0.5).softmax(-1) @ pv"""
PLANTED_IN_LAYERS = (
    ("PrefixAtTheWordsPlace", "if self.rope is not None:", "if False:", "the prefix's keys used as they are, among the "
     "tokens: turn them back by K"),
    ("PrefixHidden", ATTEND, ATTEND.replace("mask)", f"{SEES}.tril(k.shape[2] - q.shape[2] - self.length))"),
     "a causal mask that hides the prefix from the first tokens; every token sees it whole"),
    ("PrefixAsSecondSoftmax", (f"k, v = ({JOINED} for prefix, own in {PAIRS})", ATTEND), (SECOND, f"{ATTEND} + term"),
     "a softmax of its own for the prefix, added to the tokens': LLaMA-Adapter without its gate"),
    ("PrefixInTheCache", ("if cache is not None:\n            k", ATTEND),
     ("if mask is not None and cache:\n            k", IF_NO_MASK), "the prefix put into the cache at every step "
     "instead of once"),
    ("StaleKeys", BOTH, "return [z.to(dtype) for z in vars(self).setdefault('kept', (k.detach(), v.detach()))]",
     "turned keys kept between steps"),
    ("SharedKeysAndValues", "k, v = self.keys, self.values", "k, v = self.keys, self.keys", "one table for both"),
)  # fmt: skip
LAYERS = catalogue(prefix_tuning, (*PLANTED_IN_LAYERS,
    *((f"keys_{name}", TURNED, new.replace("K", "self.length"), sentence) for name, new, sentence in TURNED_TO),
    *((name, EXPANDED, new.format(p="prefix", B="len(q)"), sentence) for name, new, sentence in SPREADS),
    ("prefix_behind_the_words", JOINED, f"torch.cat((own, {EXPANDED}), dim=2)", "the prefix behind the tokens, where "
     "the causal mask hides tokens and shows later ones"),
    ("keys_turned_by_heads", TURNED, "torch.full((self.length,), -self.num_kv_heads)", "keys turned by G instead of K"),
    ("turned_and_moved", PROJECTED, "*self.project(x, positions + self.length)", "keys back by K and tokens on by K as "
     "well: the gap is there twice; do one of the two"),
    ("values_turned_too", "k = k * cos + torch.cat((-right, left), dim=-1) * sin",
     "k, v = (z * cos + torch.cat((-z.chunk(" "2, -1)[1], z.chunk(2, -1)[0]), -1) * sin for z in (k, v))",
     "the prefix's values turned like its keys; RoPE is for queries and keys alone"),
    ("keys_projected", "k, v = self.keys, self.values", "k, v = self.keys_values(self.keys)", "the prefix put through "
     "k_proj and v_proj, as LLaMA-Adapter's prompts are; these are keys and values already"),
    ("one_of_K_lost", EXPANDED, EXPANDED.replace("prefix", "prefix[:, 1:]"), "the prefix without its first token"),
    ("keys_for_values", PAIRS, "((pv, k), (pk, v))", "keys and values of the prefix in each other's place"),
    ("tables_exchanged", "k, v = self.keys, self.values", "k, v = self.values, self.keys", "keys and values exchanged"),
    ("prefix_left_out", OFF, OFF.replace("not self.active", "True"), "no prefix at all: the frozen layer's own output"),
    ("cache_forgotten", "k, v = cache.append(k, v)", "pass", "the cache not used, or not what it returns: "
     "cache.append(k, v) adds the new ones and returns all"),
    ("cache_taken_for_granted", "if cache is not None:\n            k", "if True:\n            k", "`cache` may be "
     "None"),
    ("words_cached_twice", ATTEND, ATTEND.replace("mask)", "mask, cache)"), "the tokens appended to the cache, and "
     "then `attend` given the cache, which appends them again"),
    ("heads_repeated_in_turn", ATTEND,
     f"k, v = (z.repeat(1, q.shape[1] // z.shape[1], 1, 1) for z in (k, v))\n        {ATTEND}", "key heads repeated as "
     "a b a b for a a b b; `attend` repeats them itself: leave them G"),
    ("prefix_in_the_first_call_only", OFF, OFF.replace("not self.active", "cache is not None and cache.k is not None"),
     "the prefix in the first call alone; every call puts it before the cached tokens"),
    ("positions_counted_anew", PROJECTED, "*self.project(x, torch.arange(x.shape[1]))", "positions counted from 0 in "
     "every call; the given ones go on behind the cached tokens"),
    ("positions_left_out", PROJECTED, "*self.project(x)", "the tokens not rotated: project(x, positions) does it"),
    ("prefix_detached", BOTH, "return k.detach().to(dtype), v.detach().to(dtype)", "the prefix detached from the graph "
     ""),
    ("prefix_not_cast", BOTH, "return k, v", "the prefix in float32 beside a bfloat16 model's keys: cast to x.dtype"),
    ("unscaled", ATTEND, ATTEND.replace("(q,", "(q * self.head_dim**0.5,"), "scores not divided by √d"),
    ("by_model_width", ATTEND, ATTEND.replace("(q,", "(q * (self.head_dim / self.width) ** 0.5,"), "√D in the place of "
     "√d"), ("not_causal", ATTEND, ATTEND.replace("mask)", f"{SEES})"), "no causal mask: tokens see those yet to come"),
    ("mask_from_the_left", ATTEND, ATTEND.replace("mask)", f"{SEES}.tril())"), "the causal mask begun at the first "
     "column (as is_causal=True does): it begins behind prefix and cache"),
    ("mask_without_the_past", ATTEND, ATTEND.replace("mask)", f"{SEES}.tril(self.length))"), "a causal mask that "
     "leaves out the cached tokens' columns"),
    ("hidden_from_itself", ATTEND, ATTEND.replace("mask)", f"{SEES}.tril(k.shape[2] - q.shape[2] - 1))"),
     "the mask one token too strict: a token does not see itself"),
    ("with_residual", FORWARD, f"x + {FORWARD}", "x added: the block does that, around the attention"),
    ("not_projected", FORWARD, FORWARD[12:-1], "attention.output left out, which joins the heads and projects"),
    ("heads_joined_alone", FORWARD, f"{FORWARD[12:-1]}.transpose(1, 2).flatten(2)", "not projected: attention.output "
     "does both"),
    ("joined_along_heads", JOINED, JOINED.replace("dim=2", "dim=1"), "joined along the heads; tokens lie along dim=2"),
    ("joined_along_features", JOINED, JOINED.replace("dim=2", "dim=-1"), "joined along d; tokens lie along dim=2"),
), wrap=layer_of)  # fmt: skip
LAYER_SIZES = (
    dict(B=3, T=5, K=4, D=20, H=6, G=2, d=8, theta=50.0), dict(B=2, T=3, K=5, D=12, H=3, G=3, d=4, theta=900.0),
    dict(B=1, T=1, K=1, D=6, H=2, G=1, d=2, theta=9.0),
)  # fmt: skip


def inputs_of_layer(draw, B, T, K, D, H, G, d, theta):
    attention, steps = filled(Attention(D, H, G, d, RoPE(d, theta), bias=True), draw), torch.arange(T)
    steps, (keys, values) = steps + 2 * (steps > 1), draw(2, G, K, d)
    return dict(attention=attention, x=draw(B, T, D), positions=steps, keys=keys, values=values)


def with_a_cache(answer, draw, given):
    attention, x, positions, keys, values = given.values()
    out = answer(attention, x, positions, keys + 1, values - 1)
    yield Piece("the output after the prefix has changed (B, T, D)", out)
    (B, T, D), cache = x.shape, LayerCache()
    x = torch.cat((x, draw(B, 3, D).to(x.dtype)), 1)
    positions = torch.cat((positions, positions[-1] + torch.tensor([1, 2, 5])))  # with a gap
    for a, b, which in ((0, T, "the first tokens"), (T, T + 2, "two more tokens"), (T + 2, T + 3, "one more token")):
        out = answer(attention, x[:, a:b], positions[a:b], keys, values, cache)
        yield Piece(f"the output for {which} with a cache (B, T, D)", out)


# ── the share, and the softmax as two ─────────────────────────────────────────────────────────────────────────────────


def right_share(q, k, prefix_keys):
    scale, T, K = q.shape[-1] ** 0.5, q.shape[2], prefix_keys.shape[1]
    on_prefix, on_tokens = q @ prefix_keys.mT / scale, q @ k.mT / scale
    on_tokens = on_tokens.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    return torch.cat((on_prefix, on_tokens), -1).softmax(-1)[..., :K].sum(-1)


def right_split(q, k, v, prefix_keys, prefix_values):
    scale, T = q.shape[-1] ** 0.5, q.shape[2]
    on_prefix, on_tokens = q @ prefix_keys.mT / scale, q @ k.mT / scale
    on_tokens = on_tokens.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    share = torch.sigmoid(on_prefix.logsumexp(-1) - on_tokens.logsumexp(-1))
    return share, on_tokens.softmax(-1) @ v, on_prefix.softmax(-1) @ prefix_values


SCALE, SEEN_AFTER, SUM = "= q.shape[-1] ** 0.5", ".triu(1)", ".softmax(-1)[..., :K].sum(-1)"
COUNTED = "(1 / (1 + torch.arange(1, T + 1) / on_prefix.shape[-1])).expand(q.shape[:-1])"
SCORES = (  # of both
    ("later_words_counted", SEEN_AFTER, ".triu(T)", "no causal mask: token t sees tokens 0 to t, and none yet to come"),
    ("next_token_seen", SEEN_AFTER, ".triu(2)", "the mask one too loose: token t sees the next one too; triu(1) is hidden"),
    ("word_hidden_from_itself", SEEN_AFTER, ".triu()", "the mask one too strict: token t does not see itself; "
     "torch.triu(1) is hidden"),
    ("earlier_words_hidden", SEEN_AFTER, ".tril(-1)", "the mask on the wrong side: t sees the tokens from t on; "
     "torch.triu(1) is hidden"),
    ("mask_turned_round", SEEN_AFTER, ".tril()", "the mask turned round: hidden are the tokens from t + 1 on, triu(1)"),
    ("hidden_with_zero", "-torch.inf)", "0)", "hidden tokens given the score 0, which weighs e^0 = 1; theirs is -∞"),
    ("share_unscaled", SCALE, "= 1.0", "scores not divided by √d"),
    ("share_by_model_width", SCALE, "= (q.shape[1] * q.shape[-1]) ** 0.5", "scores over √(H·d); the heads' own is √d"),
    ("share_by_head_width", SCALE, "= q.shape[-1]", "scores divided by d instead of √d"),
    ("tokens_scores_unscaled", "q @ k.mT / scale", "q @ k.mT", "no √d for the tokens' scores"),
    ("prefix_scores_unscaled", "q @ prefix_keys.mT / scale", "q @ prefix_keys.mT", "no √d for the prefix's scores"),
)  # fmt: skip
SHARE = "torch.cat((on_prefix, on_tokens), -1)" + SUM
SHARES = catalogue(right_share, (*SCORES,
    ("hidden_with_minus_100", "-torch.inf)", "-100.0)", "hidden tokens given -100, which is not hidden where scores "
     "lie hundreds below 0; -∞ is"),
    ("prefix_under_the_mask", SUM, f".masked_fill(torch.ones(T, K + T, dtype=torch.bool).triu(1), -torch.inf){SUM}",
     "the causal mask laid over the prefix too; every token sees all of it"),
    ("softmax_over_queries", "softmax(-1)", "softmax(-2)", "the softmax along the tokens that look, axis -2, not what "
     "they look at"),
    ("softmax_of_the_prefix_alone", SUM, "[..., :K].softmax(-1).sum(-1)", "a softmax over the prefix alone always sums "
     "to 1; it goes over prefix and tokens"),
    ("two_softmaxes", SHARE,
     "on_prefix.softmax(-1).sum(-1) / (on_prefix.softmax(-1).sum(-1) + on_tokens.softmax(-1)" ".sum(-1))",
     "a softmax for each, so that the share is always a half"),
    ("first_columns_of_the_words", "(on_prefix, on_tokens), -1", "(on_tokens, on_prefix), -1", "the tokens joined "
     "first: the first K columns are tokens"),
    ("last_columns", ":K]", "-K:]", "the last K columns, which are tokens; the prefix was joined before them"),
    ("columns_by_heads", ":K]", ": len(prefix_keys)]", "as many columns as heads; K is prefix_keys.shape[1]"),
    ("share_of_the_words", "return torch", "return 1 - torch", "the tokens' share, 1 - λ, instead of the prefix's"),
    ("odds", SHARE, "(on_prefix.logsumexp(-1) - on_tokens.logsumexp(-1)).exp()", "λ / (1 - λ), the prefix's sum over "
     "the tokens'; a share divides by both"),
    ("log_odds", SHARE, "on_prefix.logsumexp(-1) - on_tokens.logsumexp(-1)", "the logarithm of λ / (1 - λ), without "
     "sigmoid"),
    ("with_an_axis", ".sum(-1)", ".sum(-1, keepdim=True)", "an axis of 1 behind (keepdim); (B, H, T) is asked"),
    ("columns_by_width", ":K]", ": q.shape[-1]]", "as many columns as features; K is prefix_keys.shape[1]"),
    ("largest_scores", SHARE, "torch.sigmoid(on_prefix.amax(-1) - on_tokens.amax(-1))", "the largest score of each; "
     "all count"),
    ("scores_summed", SHARE, "torch.sigmoid(on_prefix.sum(-1) - on_tokens.nan_to_num(neginf=0).sum(-1))",
     "scores summed before exp; the share sums their exponentials"),
    ("two_largest", SHARE,
     "(on_prefix := (on_prefix - on_prefix.amax(-1, True)).exp().sum(-1)) / (on_prefix + " "on_tokens.exp().sum(-1))",
     "the largest taken off the prefix's scores alone; take one off both"),
    ("means_for_sums", SHARE, "on_prefix.exp().mean(-1) / (on_prefix.exp().mean(-1) + on_tokens.exp().sum(-1))",
     "the mean of the prefix's exponentials; they are summed, as the tokens' are"),
    ("scores_for_weights", SHARE, "on_prefix.sum(-1) / (on_prefix.sum(-1) + on_tokens.nan_to_num(neginf=0).sum(-1))",
     "a share of the scores themselves; the share is of their exponentials"),
    ("scaled_behind", ("= q.shape[-1] ** 0.5", ".sum(-1)"), ("= 1.0", ".sum(-1) / q.shape[-1] ** 0.5"), "√d behind the "
     "softmax; the scores are divided by it before"),
    ("summed_over_tokens", ".sum(-1)", ".sum(-2)", "summed over the tokens, axis -2; the sum goes over the prefix's "
     "columns"), ("rounded", ".sum(-1)", ".sum(-1).round(decimals=2)", "rounded: a rounded share has no gradient"),
    ("mean_of_the_weights", ".sum(-1)", ".mean(-1)", "the mean of the prefix's weights, not their sum"),
    ("largest_weight", ".sum(-1)", ".amax(-1)", "the largest of the prefix's weights instead of their sum"),
    ("not_summed", ".sum(-1)", "", "the prefix's K weights one by one; their sum is the share"),
    ("share_by_counting", SHARE, COUNTED, "K / (K + n) for n tokens: right for equal scores only"),
    ("share_averaged_over_heads", ".sum(-1)", ".sum(-1).mean(1)", "the heads' mean; each has its own share"),
    ("share_that_overflows", SUM, ".exp()[..., :K].sum(-1) / torch.cat((on_prefix, on_tokens), -1).exp().sum(-1)",
     "exp of the scores themselves, infinite above 88; softmax takes the largest off first"),
))  # fmt: skip
OWN, TOKENS, WEIGHT = "on_prefix.softmax(-1) @ prefix_values", "on_tokens.softmax(-1) @ v", "share[..., None]"
LSE, PARTS = "torch.sigmoid(on_prefix.logsumexp", f"return share, {TOKENS}, {OWN}"
WHOLE = f"torch.lerp({TOKENS}, {OWN}, {WEIGHT})"
SPLITS = catalogue(right_split, (*SCORES,
    ("parts_weighted_already", PARTS, f"return share, (1 - {WEIGHT}) * ({TOKENS}), {WEIGHT} * ({OWN})", "parts of the "
     "one softmax, which carry their share already; each has weights that sum to 1"),
    ("words_weighted_already", TOKENS, f"(1 - {WEIGHT}) * ({TOKENS})", "the tokens' part with 1 - λ in it already; its "
     "own softmax sums to 1"),
    ("prefix_weighted_already", OWN, f"{WEIGHT} * ({OWN})", "the prefix's part with λ in it already; its own softmax "
     "sums to 1"),
    ("whole_in_the_place_of_prefix", OWN, WHOLE, "the whole output, tokens included, for the prefix's part"),
    ("whole_in_the_place_of_words", TOKENS, WHOLE, "the whole output, prefix included, for the tokens' part"),
    ("share_turned_round", "return share", "return 1 - share", "1 - λ, the tokens' share, for λ, the prefix's"),
    ("parts_in_the_wrong_order", PARTS, f"return share, {OWN}, {TOKENS}", "the prefix's part before the tokens'"),
    ("all_turned_round", PARTS, f"return 1 - share, {OWN}, {TOKENS}", "prefix and tokens exchanged throughout; asked "
     "are λ, tokens, prefix"),
    ("share_of_a_count", "return share", f"return {COUNTED}", "a share that does not look at the scores, K / (K + n)"),
    ("share_with_an_axis", "return share", f"return {WEIGHT}", "the share with an axis of 1 behind; (B, H, T)"),
    ("share_is_no_share", LSE, "(on_prefix.logsumexp", "the logarithm of λ / (1 - λ); the sigmoid makes λ of it"),
    ("odds", LSE, "torch.exp(on_prefix.logsumexp", "λ / (1 - λ), the prefix's sum over the tokens'; a share divides by "
     "both"),
    ("tokens_not_causal", TOKENS, "(q @ k.mT / scale).softmax(-1) @ v", "the mask left out of the tokens' part"),
    ("the_blend_alone", PARTS, f"return {WHOLE}", "the blend, which is attention with the prefix; asked are its three "
     "parts"),
    ("without_the_share", PARTS, f"return {TOKENS}, {OWN}", "the two parts without λ; asked are λ, tokens, prefix"),
    ("share_behind", PARTS, f"return {TOKENS}, {OWN}, share", "the share behind the parts; asked are λ, tokens, prefix "
     ""),
    ("heads_joined", PARTS, f"return share, ({TOKENS}).transpose(1, 2).flatten(2), ({OWN}).transpose(1, 2).flatten(2)",
     "the heads joined, as `output` does it; the parts stand before it, (B, H, T, d)"),
    ("divided_crosswise", PARTS,
     f"return share, (1 - {WEIGHT}) / {WEIGHT} * ({TOKENS}), {WEIGHT} / (1 - {WEIGHT}) * ({OWN})", "each part divided "
     "by the other's share; the tokens' belongs to 1 - λ, the prefix's to λ"),
    ("share_of_a_half", "return share", "return share * 0 + 0.5", "λ = 1/2 for all, as two softmaxes give; one gives λ "
     ""),
    ("share_not_causal", " - on_tokens.logsumexp", " - (q @ k.mT / scale).logsumexp", "the mask left out of the share"),
    ("prefix_masked", OWN,
     "on_prefix.masked_fill(torch.ones_like(on_prefix).triu(1).bool(), -torch.inf).softmax(" "-1) @ prefix_values",
     "a causal mask over the prefix, which every token sees whole"),
    ("share_averaged_over_heads", "return share", "return share.mean(1, keepdim=True).expand_as(share)",
     "the heads' mean; each has its own share"),
    ("words_unscaled", TOKENS, f"(scale * {TOKENS[:9]}){TOKENS[9:]}", "no √d in the tokens' own softmax"),
    ("prefix_unscaled", OWN, f"(scale * {OWN[:9]}){OWN[9:]}", "no √d in the prefix's own softmax"),
    ("keys_for_values", OWN, OWN.replace("values", "keys"), "the average of the prefix's keys; its values are averaged "
     ""),
    ("plain_mean_of_values", OWN, "prefix_values.mean(-2, keepdim=True).expand(q.shape)", "the values' plain mean; a "
     "softmax weighs them"),
    ("prefix_not_normalised", OWN, "on_prefix.exp() @ prefix_values", "the prefix's weights not divided by their sum"),
    ("prefix_softmax_over_queries", OWN, OWN.replace("-1", "-2"), "the prefix's softmax along axis -2, the tokens that "
     "look"), ("scores_for_weights", OWN, "on_prefix @ prefix_values", "the prefix's scores without their softmax"),
))  # fmt: skip
HEADS_SIZES = dict(B=2, T=5, K=3, H=4, d=8), dict(B=3, T=2, K=5, H=1, d=4), dict(B=1, T=1, K=1, H=2, d=6)


def inputs_of_share(draw, B, T, K, H, d):
    return dict(q=draw(B, H, T, d), k=draw(B, H, T, d), prefix_keys=draw(H, K, d))


def inputs_of_split(draw, B, T, K, H, d):
    return dict(zip(("q", "k", "v", "prefix_keys", "prefix_values"), (*draw(3, B, H, T, d), *draw(2, H, K, d))))


def whole_gradient(answer, draw, given):
    """The gradients of all three together: those of one may be 0 in one way of writing, and rounding in another."""
    given = {name: z.requires_grad_() for name, z in given.items()}
    whole = torch.cat([z.flatten() for z in answer(*given.values())])
    for name, found in zip(given, gradients(whole, *given.values())):
        yield Piece(f"the gradient with respect to {name}", found, kind="gradient", of=name)


def large_scores(answer, draw, given):
    q, k, prefix_keys = (z.detach() for z in given.values())
    yield Piece("the share where all scores lie hundreds below 0 (B, H, T)", answer(q + 8, k - 8, prefix_keys - 8))
    yield Piece("the share where all scores are hundreds (B, H, T)", answer(q + 8, k + 8, prefix_keys + 8))
    last = torch.arange(k.shape[2])[:, None] == k.shape[2] - 1
    what = "the share where the last token's score is hundreds, and the others lie hundreds below (B, H, T)"
    yield Piece(what, answer(q + 8, torch.where(last, k + 8, k - 8), prefix_keys - 8))


# ── a training step ───────────────────────────────────────────────────────────────────────────────────────────────────


def right_step(model, optimizer, ids, labels):
    optimizer.zero_grad()
    loss = minillama.answer_loss(model, ids, labels)
    loss.backward()
    optimizer.step()
    return loss.item()


LOSS, ZERO = "minillama.answer_loss(model, ids, labels)", "    optimizer.zero_grad()"
BACK, STEP = "    loss.backward()", "    optimizer.step()"
BY_HAND = """    for p in filter(lambda p: p.grad is not None, model.parameters()):
        p.data -= optimizer.param_groups[0]['lr'] * p.grad"""
STEPS = catalogue(right_step, (
    ("gradients_accumulated", ZERO + "\n", "", "the gradients never zeroed: backward() adds to the last step's"),
    ("zeroed_before_the_step", STEP, f"{ZERO}\n{STEP}", "the gradients zeroed between backward() and step()"),
    ("step_forgotten", STEP + "\n", "", "no optimizer.step() of the optimizer that is given"),
    ("backward_forgotten", BACK + "\n", "", "no loss.backward(): there is no gradient to step along"),
    ("step_before_backward", f"{BACK}\n{STEP}", f"{STEP}\n{BACK}", "step() before backward(): the gradients have just "
     "been zeroed"),
    ("loss_after_the_step", "return loss.item()", f"return {LOSS}.item()", "the loss computed again after the step; "
     "asked is the one that the gradients came from"),
    ("two_steps", STEP, f"{STEP}\n{STEP}", "optimizer.step() more than once; one call is one step"),
    ("loss_with_its_graph", "return loss.item()", "return loss", "the loss with its graph, which keeps every "
     "activation in memory; loss.item() is the number"),
    ("loss_as_a_tensor", "return loss.item()", "return loss.detach()", "the loss as a tensor; loss.item() is a float"),
    ("loss_on_all_tokens", LOSS, "minillama.answer_loss(model, ids, ids)", "ids for labels: the loss falls on the "
     "prompt's tokens too; the labels are -100 there"),
    ("not_shifted", LOSS, "torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())",
     "logits and labels at the same place; answer_loss shifts by one"),
    ("shifted_twice", LOSS, "minillama.answer_loss(model, ids[:, :-1], labels[:, 1:])", "shifted by hand; answer_loss "
     "does it"),
    ("loss_summed", LOSS, f"{LOSS} * (labels[:, 1:] >= 0).sum()", "the sum of the losses; answer_loss is their mean"),
    ("nothing_returned", "    return loss.item()\n", "", "the loss not returned: return loss.item()"),
    ("rows_averaged", LOSS,
     "torch.stack([minillama.answer_loss(model, i[None], j[None]) for i, j in zip(ids, labels)]).mean()",
     "the mean of the rows' means; the mean goes over all the answers' tokens, and rows differ in how many they have"),
    ("rows_summed", LOSS, "sum(minillama.answer_loss(model, i[None], j[None]) for i, j in zip(ids, labels))",
     "the rows' losses added up; answer_loss(model, ids, labels) is the mean over all the answers' tokens"),
    ("loss_rounded", "return loss.item()", "return round(loss.item(), 2)", "the loss rounded; print it so, and return "
     "it whole"), ("uphill", BACK, "    (-loss).backward()", "the sign turned round: these steps make the loss larger"),
    ("loss_divided", BACK, "    (loss / len(ids)).backward()", "the loss divided by the batch; it is a mean already"),
    ("gradients_clipped", STEP, f"    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n{STEP}", "the gradients "
     "clipped, which `train` does and this step does not"),
    ("without_gradient", f"loss = {LOSS}", f"loss = {LOSS}.detach()", "a loss without a graph: no detach, no "
     "torch.no_grad(), and the adapter must be active"),
    ("item_before_backward", f"loss = {LOSS}", f"loss = {LOSS}.item()", ".item() before backward(): a number has no "
     "graph"),
    ("in_eval_mode", ZERO, f"    model.eval()\n{ZERO}", "model.eval() switches dropout off; leave the mode as it is"),
    ("everything_trains", ZERO, f"    model.requires_grad_(True)\n{ZERO}", "the base's weights get gradients: "
     "requires_grad stays as it is"),
    ("moved_by_hand", STEP, BY_HAND, "the weights moved by hand; optimizer.step() does it in its own way"),
    ("optimizer_made_anew", ZERO,
     f"    optimizer = type(optimizer)(optimizer.param_groups[0]['params'], lr=0.03)\n{ZERO}", "another optimizer made "
     "in the step: it forgets the earlier steps"),
))  # fmt: skip
SAID = {mistake.name: mistake.sentence for mistake in STEPS} | {
    "left_in_eval_mode": "the model is left in eval mode; leave the mode as it is",
    "frozen_moved": "frozen weights of the base have moved",
    "adapter_frozen": "the adapter's own numbers no longer train",
}  # fmt: skip


def probe_step(answer, draw):
    for method, B, T in (("llama_adapter", 3, 6), ("lora", 2, 4), ("ia3", 1, 2)):
        model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig(31, 16, 24, 2, 2)), method).train()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(draw(*p.shape) / p.shape[-1] ** 0.5 + (p.dim() == 1))
        own, seen = adapter_parameters(model), {}
        base = [(p, p.detach().clone()) for p in model.parameters() if not p.requires_grad]
        # the second and third are given the frozen weights too
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        if method == "llama_adapter":
            optimizer = torch.optim.AdamW(own.values(), lr=0.03, eps=1e-3)

        def count(name, number=1, seen=seen):
            seen[name] = seen.get(name, 0) + number

        def entered(layer, inputs, count=count):
            count("rows", len(inputs[0]))
            count("eval", not layer.training)

        next(iter(own.values())).register_hook(lambda gradient, count=count: count("backward"))
        optimizer.register_step_post_hook(lambda *_, seen=seen, count=count: count("early", "backward" not in seen))
        optimizer.register_step_post_hook(lambda *_, count=count: count("steps"))
        model.layers[0].register_forward_pre_hook(entered)
        for step in (1, 2, 3):
            seen.clear()
            ids = (draw(B, T).abs() * 40).long() % 31
            first = T // 2 - torch.arange(B)[:, None] % 2  # the answer's first token, another in every second row
            loss = answer(model, optimizer, ids, torch.where(torch.arange(T) < first, -100, ids))
            tensor = isinstance(loss, torch.Tensor) and loss.numel() == 1
            if not tensor and not hasattr(loss, "__float__"):
                raise Wrong("form", f"needed is the loss as a float; it returned {describe(loss)}.")
            for name, value in {
                "loss_with_its_graph": tensor and loss.requires_grad, "loss_as_a_tensor": tensor,
                "in_eval_mode": seen.get("eval", 0) > 0, "left_in_eval_mode": not model.training,
                "everything_trains": any(p.requires_grad or p.grad is not None for p, _ in base),
                "frozen_moved": not all(torch.equal(p, before) for p, before in base),
                "adapter_frozen": not all(p.requires_grad for p in own.values()),
                "backward_forgotten": "backward" not in seen, "step_forgotten": "steps" not in seen,
                "two_steps": seen.get("steps", 0) > 1, "step_before_backward": seen.get("early", 0) > 0,
            }.items():  # fmt: skip
                yield fact(value, name, f"{SAID[name]}.", f"{name} in step {step}")
            why = "the model runs twice on the same rows in one step; one pass gives the loss and its gradients."
            yield Piece("rows", torch.tensor(seen.get("rows", 0)), kind="count", mistake="run_twice", why=why)
            yield Piece(f"the loss of step {step}", torch.tensor(float(loss.detach() if tensor else loss)))
            yield from (Piece(f"{name} after step {step}", p) for name, p in own.items())


# ── predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def zero_share(n):
    """What 5 zero keys take of the softmax of a token that sees n tokens, itself among them, each with score 0."""
    return lambda: right_share(*torch.zeros(2, 1, 1, n, 8), torch.zeros(1, 5, 8))[0, 0, -1].item()


def zero_prefix_makes():
    """What twenty tokens of zero keys and values do to the output of attention, where ten stood."""
    attention, x = Attention(16, 2, rope=RoPE(8)).requires_grad_(False), torch.randn(1, 6, 16)
    layer, places = layer_of(prefix_tuning), torch.arange(6)
    ten, twenty = (layer(copy(attention), x, places, *torch.zeros(2, 2, K, 8)).norm() for K in (10, 20))
    return "same" if torch.isclose(twenty, ten) else "smaller" if twenty < ten else "larger"


def tokens_after_zeros():
    """How many different tokens a prefix of five has after five steps, three begun at zero and two from N(0, 1)."""
    torch.manual_seed(0)
    model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), "prefix_tuning", prefix_length=5)
    own, ids = list(adapter_parameters(model).values()), torch.randint(0, 31, (2, 6))  # (G, K, d) each
    for p in own:
        p.data[:, :3] = 0
    optimizer = torch.optim.AdamW(own, lr=0.1)
    for _ in range(5):
        right_step(model, optimizer, ids, ids)
    tokens = torch.cat([p.detach().transpose(0, 1).flatten(1) for p in own], 1)  # (K, everything of a token)
    return len(torch.unique(tokens.mul(1e4).round(), dim=0))


PLANTED = (*PROMPTS, *LAYERS[: len(PLANTED_IN_LAYERS)])  # each must fail a test where it stands in the models
HARMLESS = {"PrefixAtTheWordsPlace": ("gpt2",)}  # whose positions are no part of the keys

EXERCISES = {
    "soft_prompt": Exercise(
        "soft_prompt(embedding, ids, prompt, past=0, active=True) -> (B, K + T, D), "
        "or (B, T, D) where past > 0 or not active",
        prompt_of(prompt_tuning), PROMPTS + PLACES,
        calls(inputs_of_prompt, "what enters the first layer (B, S, D)", PROMPT_SIZES, float32=("prompt",)),
    ),
    "turn_back": Exercise("turn_back(rope, keys) -> (G, K, d)", right_turn_back, TURNS, probe_turn),
    "prefix_attention": Exercise(
        "prefix_attention(attention, x, positions, keys, values, cache=None) -> (B, T, D)", layer_of(prefix_tuning),
        LAYERS, calls(inputs_of_layer, "the output (B, T, D)", LAYER_SIZES, ("keys", "values"), then=with_a_cache,
                      once=tuple(f"attention.{name}_proj" for name in "qkvo")),
    ),
    "share_of_ten": Question(
        zero_share(10), "Each of the 15 scores is 0, each weight e^0 / (15 · e^0); five of them are the prefix's.",
        {0: "a score of 0 is not a weight of 0: e^0 is 1, as for every token.",
         1: "the tokens have score 0 too: nobody is ahead.", 2 / 3: "that is what the tokens keep.",
         0.5: "that is five against five; how many tokens does the tenth see?",
         5 / 14: "nine tokens stand before the tenth; it sees itself as well.",
         5 / 16: "nine tokens stand before the tenth, and it sees itself: ten in all.",
         1 / 15: "that is one key of the prefix; how many are there?"},
        nudge="How many scores are in this token's softmax, what weight has each, and how many are the prefix's?",
    ),
    "share_of_the_first": Question(
        zero_share(1),
        "The first token sees itself and the five: 5 / (5 + 1). The fewer tokens there are, the more a prefix takes.",
        {0: "a score of 0 is not a weight of 0: e^0 is 1.", 1: "the token sees itself too.",
         0.5: "it sees one token and five keys of the prefix, and all six weigh the same.",
         1 / 3: "the tokens behind the first one are hidden from it: it sees itself alone.",
         1 / 6: "that is what the token keeps for itself."},
        nudge="Which tokens does the first one see? How many scores does that make, and how many are the prefix's?",
    ),
    "longer_zero_prefix": Question(
        zero_prefix_makes,
        "Zero values add nothing, but their keys take: the tokens' part is multiplied by 1 - λ, and λ grows with K.",
        {"same": "the values add nothing; but what do the keys take from the tokens' weights?",
         "larger": "nothing is added, since the values are 0; what happens to the tokens' weights?"},
        nudge="Write the output as (1 - λ) · tokens + λ · prefix: what is each for K = 10, and for K = 20?",
    ),
    "tokens_after_zeros": Question(
        tokens_after_zeros, "The three equal tokens get equal gradients and stay equal, one token counted three times; "
        "the other two began apart.",
        {5: "what could make the three that began at zero differ? They are equal, and each token weighs them equally.",
         1: "what could make tokens equal that began apart?", 2: "do the two from N(0, 1) begin equal?",
         4: "three began equal: what could make one of them differ from the other two?"},
        nudge="Which tokens begin equal, and what gradients do equal tokens get?",
    ),
    "prefix_share": Exercise(
        "prefix_share(q, k, prefix_keys) -> (B, H, T)", right_share, SHARES,
        calls(inputs_of_share, "the share (B, H, T)", HEADS_SIZES, half=False, then=large_scores),
    ),
    "training_step": Exercise(
        "training_step(model, optimizer, ids, labels) -> the loss as a float", right_step, STEPS, probe_step,
        changes=(0, 1),
    ),
    "split_softmax": Exercise(
        "split_softmax(q, k, v, prefix_keys, prefix_values) -> share (B, H, T), tokens (B, H, T, d), "
        "prefix (B, H, T, d)", right_split, SPLITS,
        calls(inputs_of_split,
              ("the share (B, H, T)", "the tokens' part (B, H, T, d)", "the prefix's part (B, H, T, d)"),
              HEADS_SIZES, half=False, gradient=False, then=whole_gradient),
    ),
}  # fmt: skip
