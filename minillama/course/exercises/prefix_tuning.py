"""Lesson 02: prompt tuning and prefix tuning, with the wrong versions that one writes easily."""

import torch
from torch import nn

import minillama

from ...adapters import llama_adapter
from ...adapters.prefix_tuning import PrefixAttention
from ...adapters.prompt_tuning import PromptEmbedding
from ...attention import Attention, Cache, LayerCache, RoPE, embed, rotate
from . import Exercise, Question, filled, gradients, named

# ── the catalogue ─────────────────────────────────────────────────────────────────────────────────────────────────────


# ── prefix tuning ─────────────────────────────────────────────────────────────────────────────────────────────────────


class PrefixAtTheWordsPlace(PrefixAttention):
    """keys of the prefix used as if the tokens began at position 0"""

    harmless_for = ("gpt2",)  # its positions are no part of the keys

    def prefix(self, dtype):
        return self.keys.to(dtype), self.values.to(dtype)


class PrefixHidden(PrefixAttention):
    """a causal mask that hides the prefix from the first tokens"""

    def attend(self, q, k, v, mask=None, cache=None):
        past = cache.k.shape[2] if cache is not None and cache.k is not None else 0
        T, S = q.shape[2], past + k.shape[2]
        seen = torch.arange(self.length + S) <= torch.arange(past, past + T)[:, None]
        if cache is not None:
            k, v = cache.append(k, v)
        pk, pv = (z.expand(len(q), -1, -1, -1) for z in self.prefix(q.dtype))
        return self.base.attend(q, torch.cat((pk, k), 2), torch.cat((pv, v), 2), seen[None, None])


class PrefixAsSecondSoftmax(PrefixAttention):
    """a softmax of its own for the prefix, added to the tokens': LLaMA-Adapter without its gate"""

    def attend(self, q, k, v, mask=None, cache=None):
        y = self.base.attend(q, k, v, mask, cache)
        return y + llama_adapter.prefix_attention(q, *self.prefix(q.dtype))


class PrefixInTheCache(PrefixAttention):
    """the prefix put into the cache at every step instead of once"""

    def attend(self, q, k, v, mask=None, cache=None):
        pk, pv = (z.expand(len(q), -1, -1, -1) for z in self.prefix(q.dtype))
        if mask is not None:
            return super().attend(q, k, v, mask, cache)
        return self.base.attend(q, torch.cat((pk, k), 2), torch.cat((pv, v), 2), None, cache)


class StaleKeys(PrefixAttention):
    """the turned keys kept in the module from one step to the next"""

    def prefix(self, dtype):
        if not hasattr(self, "kept"):
            self.kept = [z.detach() for z in super().prefix(dtype)]
        return [z.to(dtype) for z in self.kept]


class SharedKeysAndValues(PrefixAttention):
    """one table for keys and values"""

    def prefix(self, dtype):
        k, _ = super().prefix(dtype)
        return k, self.keys.to(dtype)


# ── prompt tuning ─────────────────────────────────────────────────────────────────────────────────────────────────────


class AddedToTheWords(PromptEmbedding):
    """the prompt's mean added to every token instead of put before them"""

    soft_prompt = None

    def forward(self, ids):
        return self.base(ids) + self.prompt.mean(0).to(self.base(ids).dtype) if self.active else self.base(ids)


class ReversedPrompt(PromptEmbedding):
    """the prompt's vectors in the wrong order"""

    @property
    def soft_prompt(self):
        return self.prompt.flip(0) if self.active else None


class DetachedSoftPrompt(PromptEmbedding):
    """the prompt detached from the graph: it never learns"""

    @property
    def soft_prompt(self):
        return self.prompt.detach() if self.active else None


class PromptAlwaysOn(PromptEmbedding):
    """a prompt that stays when the adapter is disabled"""

    @property
    def soft_prompt(self):
        return self.prompt


# ── what is asked ─────────────────────────────────────────────────────────────────────────────────────────────────────


# ── a soft prompt ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Embedded(nn.Module):
    """A wrapped embedding and what enters the first layer, as one module."""

    def __init__(self, wrapper, base, prompt_length):
        super().__init__()
        self.inner = wrapper(base, prompt_length)

    def forward(self, ids, past, active):
        cache, self.inner.active = Cache(), active
        cache.length = past
        return embed(self.inner, ids, None, cache)[0]


def embedding_of(wrapper):
    """A wrapper of the embedding as the function that the exercise asks for."""

    def function(embedding, ids, prompt, past=0, active=True):
        module = Embedded(wrapper, embedding, len(prompt))
        return torch.func.functional_call(module, {"inner.prompt": prompt}, (ids, past, active))

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def prompt_at_every_step(embedding, ids, prompt, past=0, active=True):
    """the prompt put before later tokens too; tokens that follow cached ones (past > 0) have it in the cache already"""
    return right_soft_prompt(embedding, ids, prompt, 0, active)


def prompt_behind_the_words(embedding, ids, prompt, past=0, active=True):
    """the prompt put behind the tokens, where a causal model never looks; it belongs before them"""
    x = embedding(ids)
    return torch.cat((x, prompt.to(x.dtype).expand(len(x), -1, -1)), 1) if active and not past else x


def prompt_over_the_words(embedding, ids, prompt, past=0, active=True):
    """the first K tokens overwritten by the prompt; it stands before all of them, and K + T vectors come out"""
    x = embedding(ids)
    return torch.cat((prompt.to(x.dtype).expand(len(x), -1, -1), x[:, len(prompt) :]), 1) if active and not past else x


def prompt_in_its_own_dtype(embedding, ids, prompt, past=0, active=True):
    """the float32 prompt not cast: the whole input of a bfloat16 model becomes float32; use prompt.to(x.dtype)"""
    x = embedding(ids)
    return torch.cat((prompt.expand(len(x), -1, -1), x.to(prompt.dtype)), 1) if active and not past else x


def prompt_as_tokens_of_a_row(embedding, ids, prompt, past=0, active=True):
    """the prompt given to the first row of the batch and zeros to the others; expand it over the batch"""
    x = embedding(ids)
    rows = torch.arange(len(x), device=x.device)[:, None, None] == 0
    return torch.cat((prompt.to(x.dtype) * rows, x), 1) if active and not past else x


def and_for_or(embedding, ids, prompt, past=0, active=True):
    """`and` where `or` is needed: the prompt came again though past > 0, and it came though `active` is False;
    either is enough to leave it out"""
    return right_soft_prompt(embedding, ids, prompt)


def rows_cut_from_copies(embedding, ids, prompt, past=0, active=True):
    """these are the prompt's rows, but in another order for each row of the batch; every row gets the same prompt
    (repeat_interleave copies vector by vector, prompt.expand(B, -1, -1) copies the whole)"""
    return right_up_to(lambda p, B: p.repeat_interleave(B, 0).view(B, *p.shape), embedding, ids, prompt, past, active)


def copies_cut_into_rows(embedding, ids, prompt, past=0, active=True):
    """these are the prompt's rows, but in another order for each row of the batch; every row gets the same prompt
    (copies one behind the other are (B, K, D) already, with no transpose)"""

    def spread(p, B):
        return p.repeat(B, 1).view(len(p), B, -1).transpose(0, 1)

    return right_up_to(spread, embedding, ids, prompt, past, active)


def right_up_to(spread, embedding, ids, prompt, past, active):
    """Right but for how spread(prompt, B) gives the prompt its batch axis."""
    x = embedding(ids)
    return torch.cat((spread(prompt.to(x.dtype), len(x)), x), 1) if active and not past else x


right_soft_prompt = embedding_of(PromptEmbedding)


def probe_soft_prompt(answer, draw):
    embedding, ids = filled(nn.Embedding(11, 8), draw), (draw(2, 5).abs() * 40).long() % 11
    prompt = draw(3, 8).requires_grad_()
    x = answer(embedding, ids, prompt)
    yield "what enters the first layer, S = K + T (B, S, D)", x
    yield "the prompt's gradient (K, D)", gradients(x, prompt)[0]
    yield "later tokens, behind 4 in the cache (B, T, D)", answer(embedding, ids, prompt, 4)
    yield "the tokens with the prompt not active (B, T, D)", answer(embedding, ids, prompt, 0, False)
    yield "what enters a bfloat16 model (B, S, D)", answer(embedding.bfloat16(), ids, prompt)


# ── a prefix in every layer ───────────────────────────────────────────────────────────────────────────────────────────


def right_turn_back(rope, keys):
    return rotate(keys, *rope(torch.full((keys.shape[1],), -keys.shape[1])))


def turned_by(steps):
    """An answer that turns every key by a wrong number of positions, which steps(keys) gives."""
    return lambda rope, keys: rotate(keys, *rope(torch.full((keys.shape[1],), steps(keys))))


def turned_by_heads(rope, keys):
    """the keys turned back by their first size, G, the number of heads; K is keys.shape[1]"""
    return turned_by(lambda keys: -keys.shape[0])(rope, keys)


def turned_one_too_far(rope, keys):
    """the keys turned back by K + 1 instead of K"""
    return turned_by(lambda keys: -keys.shape[1] - 1)(rope, keys)


def turned_in_reverse_order(rope, keys):
    """the keys turned by 0, -1, …, 1 - K; all go back by the same K"""
    return rotate(keys, *rope(-torch.arange(keys.shape[1])))


def cos_and_sin_exchanged(rope, keys):
    """cos and sin in each other's place; rope(positions) returns cos, then sin"""
    return rotate(keys, *reversed(rope(torch.full((keys.shape[1],), -keys.shape[1]))))


def not_turned(rope, keys):
    """the keys used as they are: the tokens, which the model counts from 0, would stand among the prefix"""
    return keys + 0


def turned_forwards(rope, keys):
    """the keys turned on by K positions instead of back: they would stand behind the first tokens"""
    return rotate(keys, *rope(torch.full((keys.shape[1],), keys.shape[1])))


def turned_to_own_places(rope, keys):
    """each key turned to a place of its own, -K, …, -1; they hold their places among themselves already:
    all go back by the same K"""
    return rotate(keys, *rope(torch.arange(-keys.shape[1], 0)))


def turned_from_zero(rope, keys):
    """the keys turned by 0, 1, …, K - 1 as if they were fresh tokens;
    they are used as they are, only K positions back"""
    return rotate(keys, *rope(torch.arange(keys.shape[1])))


def turned_by_one(rope, keys):
    """the keys turned back by 1 instead of K"""
    return rotate(keys, *rope(torch.full((keys.shape[1],), -1)))


def neighbours_paired(rope, keys):
    """features turned in pairs (0, 1), (2, 3), …; our checkpoints pair feature i with feature i + d/2,
    as `rotate` does"""
    apart = lambda x: torch.cat((x[..., ::2], x[..., 1::2]), -1)  # noqa: E731
    return torch.stack(right_turn_back(rope, apart(keys)).chunk(2, -1), -1).flatten(-2)


def probe_turn_back(answer, draw):
    keys = draw(2, 3, 8).requires_grad_()
    turned = answer(RoPE(8), keys)
    yield "the turned keys (G, K, d)", turned
    yield "the keys' gradient (G, K, d)", gradients(turned, keys)[0]
    yield "a longer prefix's turned keys (G, K, d)", answer(RoPE(8), draw(2, 5, 8))


def layer_of(wrapper):
    """A wrapper of the attention as the function that the exercise asks for; the module is kept as long as the layer
    stays the same, so that whatever it wrongly keeps shows in the next call."""
    made = {}

    def function(attention, x, positions, keys, values, cache=None):
        if made.get("attention") is not attention:
            made.update(attention=attention, module=wrapper(attention, keys.shape[1]))
        return torch.func.functional_call(made["module"], {"keys": keys, "values": values}, (x, positions, None, cache))

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def joined(attention, x, positions, keys, values, cache, turn=right_turn_back, behind=False):
    """Right, in pieces that the mistakes below replace."""
    q, k, v = attention.project(x, positions)
    if cache is not None:
        k, v = cache.append(k, v)
    pk, pv = (z.to(x.dtype).expand(len(x), -1, -1, -1) for z in (turn(attention.rope, keys), values))
    k, v = (torch.cat((b, a) if behind else (a, b), 2) for a, b in ((pk, k), (pv, v)))
    return attention.output(attention.attend(q, k, v))


def prefix_behind_the_words(attention, x, positions, keys, values, cache=None):
    """the prefix put behind the tokens in the list of keys, where the causal mask hides tokens and shows later ones;
    it goes before them"""
    return joined(attention, x, positions, keys, values, cache, behind=True)


def keys_turned_forwards(attention, x, positions, keys, values, cache=None):
    """the prefix's keys turned on by K positions instead of back"""
    return joined(attention, x, positions, keys, values, cache, turned_forwards)


def keys_turned_to_own_places(attention, x, positions, keys, values, cache=None):
    """each key of the prefix turned to a place of its own, -K, …, -1; all go back by the same K positions"""
    return joined(attention, x, positions, keys, values, cache, turned_to_own_places)


def turned_and_moved(attention, x, positions, keys, values, cache=None):
    """the keys turned back by K and the tokens moved on by K as well: the gap is there twice; do one of the two"""
    return joined(attention, x, positions + keys.shape[1], keys, values, cache)


def values_turned_too(attention, x, positions, keys, values, cache=None):
    """the prefix's values turned like its keys; RoPE is for queries and keys alone"""
    return joined(attention, x, positions, keys, right_turn_back(attention.rope, values), cache)


def cache_forgotten(attention, x, positions, keys, values, cache=None):
    """the cache not used: later tokens do not see the earlier ones;
    cache.append(k, v) adds the new ones and returns all"""
    return joined(attention, x, positions, keys, values, None)


def prefix_detached(attention, x, positions, keys, values, cache=None):
    """the prefix detached from the graph: it never learns"""
    return joined(attention, x, positions, keys.detach(), values.detach(), cache)


def prefix_left_out(attention, x, positions, keys, values, cache=None):
    """no prefix at all: the frozen layer's own output"""
    return attention(x, positions, None, cache) + 0 * (keys.sum() + values.sum()).to(x.dtype)


def keys_for_values(attention, x, positions, keys, values, cache=None):
    """keys and values of the prefix in each other's place"""
    q, k, v = attention.project(x, positions)
    if cache is not None:
        k, v = cache.append(k, v)
    pk, pv = (z.to(x.dtype).expand(len(x), -1, -1, -1) for z in (right_turn_back(attention.rope, keys), values))
    return attention.output(attention.attend(q, torch.cat((pv, k), 2), torch.cat((pk, v), 2)))


def heads_repeated_in_turn(attention, x, positions, keys, values, cache=None):
    """key heads repeated as a b a b a b instead of a a a b b b; `attend` repeats them itself, so leave them G"""
    q, k, v = attention.project(x, positions)
    if cache is not None:
        k, v = cache.append(k, v)
    pk, pv = (z.to(x.dtype).expand(len(x), -1, -1, -1) for z in (right_turn_back(attention.rope, keys), values))
    k, v = (torch.cat(pair, 2).repeat(1, q.shape[1] // z.shape[1], 1, 1) for pair, z in (((pk, k), k), ((pv, v), v)))
    T, S = q.shape[2], k.shape[2]
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)
    return attention.output(scores.softmax(-1) @ v)


def prefix_in_the_first_call_only(attention, x, positions, keys, values, cache=None):
    """the prefix put in front in the first call alone; every call of a generation puts it in front,
    for the cache holds the tokens"""
    if cache is not None and cache.k is not None:
        return attention(x, positions, None, cache) + 0 * (keys.sum() + values.sum()).to(x.dtype)
    return joined(attention, x, positions, keys, values, cache)


def positions_counted_anew(attention, x, positions, keys, values, cache=None):
    """positions counted from 0 in every call; take the ones that are given, which go on behind the cached tokens"""
    return joined(attention, x, torch.arange(x.shape[1]), keys, values, cache)


def words_cached_twice(attention, x, positions, keys, values, cache=None):
    """the tokens appended to the cache, and then prefix and tokens handed to `attend` together with the cache,
    which appends them once more"""
    q, k, v = attention.project(x, positions)
    if cache is not None:
        k, v = cache.append(k, v)
    pk, pv = (z.to(x.dtype).expand(len(x), -1, -1, -1) for z in (right_turn_back(attention.rope, keys), values))
    return attention.output(attention.attend(q, torch.cat((pk, k), 2), torch.cat((pv, v), 2), None, cache))


def probe_prefix_attention(answer, draw):
    # grouped queries, biases, H·d wider than D: nothing can hide
    attention = filled(Attention(40, 6, 2, 8, RoPE(8), bias=True), draw)
    x, positions = draw(2, 6, 40), torch.arange(6)
    keys, values = draw(2, 3, 8).requires_grad_(), draw(2, 3, 8).requires_grad_()
    out = answer(attention, x, positions, keys, values)
    yield "the output (B, T, D)", out
    for what, gradient in zip(("keys", "values"), gradients(out, keys, values)):
        yield f"the gradient of the {what} (G, K, d)", gradient
    yield "the output after the prefix has changed (B, T, D)", answer(attention, x, positions, keys + 1, values - 1)
    cache = LayerCache()
    steps = [answer(attention, x[:, a:b], positions[a:b], keys, values, cache) for a, b in ((0, 3), (3, 5), (5, 6))]
    for step, size in zip(steps, (3, 2, 1)):
        yield f"the output for the next {size} of the tokens, with a cache (B, T, D)", step
    yield "the output in bfloat16 (B, T, D)", answer(attention.bfloat16(), x.bfloat16(), positions, keys, values)


# ── the share, and the softmax as two ─────────────────────────────────────────────────────────────────────────────────


def scores_of(q, k, prefix_keys, causal=True, scale=None):
    """Scores on the prefix (B, H, T, K) and on the tokens (B, H, T, T), those of tokens yet to come at -∞."""
    scale = scale or q.shape[-1] ** 0.5
    on_words = q @ k.mT / scale
    if causal:
        on_words = on_words.masked_fill(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1), -torch.inf)
    return q @ prefix_keys.mT / scale, on_words


def right_share(q, k, prefix_keys, **options):
    return torch.cat(scores_of(q, k, prefix_keys, **options), -1).softmax(-1)[..., : prefix_keys.shape[1]].sum(-1)


def later_words_counted(q, k, prefix_keys):
    """no causal mask: tokens yet to come are counted among those the prefix takes from; token t sees tokens 0 to t"""
    return right_share(q, k, prefix_keys, causal=False)


def prefix_under_the_mask(q, k, prefix_keys):
    """the causal mask laid over prefix and tokens together, so that the first tokens see a part of the prefix only;
    every token sees all of it"""
    scores = torch.cat(scores_of(q, k, prefix_keys, causal=False), -1)
    T, S = scores.shape[-2:]
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)[..., : S - T].sum(-1)


def word_hidden_from_itself(q, k, prefix_keys):
    """the mask one token too strict: token t does not see itself; it sees tokens 0 to t
    (torch.triu(1) marks what is hidden)"""
    on_prefix, _ = scores_of(q, k, prefix_keys)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu()
    on_words = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    return torch.cat((on_prefix, on_words), -1).softmax(-1)[..., : prefix_keys.shape[1]].sum(-1)


def hidden_with_zero(q, k, prefix_keys):
    """hidden tokens given the score 0, which still weighs e^0 = 1; a hidden token has the score -∞"""
    on_prefix, on_words = scores_of(q, k, prefix_keys)
    on_words = on_words.masked_fill(on_words == -torch.inf, 0)
    return torch.cat((on_prefix, on_words), -1).softmax(-1)[..., : prefix_keys.shape[1]].sum(-1)


def share_unscaled(q, k, prefix_keys):
    """scores not divided by √d"""
    return right_share(q, k, prefix_keys, scale=1.0)


def share_by_model_width(q, k, prefix_keys):
    """scores divided by √(H·d), the model's width; the heads' own √d is right"""
    return right_share(q, k, prefix_keys, scale=(q.shape[1] * q.shape[-1]) ** 0.5)


def share_by_head_width(q, k, prefix_keys):
    """scores divided by d instead of √d"""
    return right_share(q, k, prefix_keys, scale=q.shape[-1])


def softmax_over_queries(q, k, prefix_keys):
    """the softmax taken along the tokens that look, axis -2, instead of along what they look at, axis -1"""
    return torch.cat(scores_of(q, k, prefix_keys), -1).softmax(-2)[..., : prefix_keys.shape[1]].sum(-1)


def softmax_of_the_prefix_alone(q, k, prefix_keys):
    """a softmax over the prefix alone, which always sums to 1; the share is taken of prefix and tokens together"""
    return scores_of(q, k, prefix_keys)[0].softmax(-1).sum(-1)


def first_columns_of_the_words(q, k, prefix_keys):
    """the tokens joined before the prefix, and the first K columns taken, which are then tokens"""
    on_prefix, on_words = scores_of(q, k, prefix_keys)
    return torch.cat((on_words, on_prefix), -1).softmax(-1)[..., : prefix_keys.shape[1]].sum(-1)


def earlier_words_hidden(q, k, prefix_keys):
    """the mask on the wrong side: token t sees those from t on, and not those before it;
    torch.triu(1) marks what is hidden"""
    on_prefix, _ = scores_of(q, k, prefix_keys)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(-1)
    on_words = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    return torch.cat((on_prefix, on_words), -1).softmax(-1)[..., : prefix_keys.shape[1]].sum(-1)


def share_of_the_words(q, k, prefix_keys):
    """the tokens' share, 1 - λ, instead of the prefix's"""
    return 1 - right_share(q, k, prefix_keys)


def odds(q, k, prefix_keys):
    """the prefix's sum divided by the tokens' sum, λ / (1 - λ); a share divides by the sum of both"""
    on_prefix, on_words = scores_of(q, k, prefix_keys)
    return (on_prefix.logsumexp(-1) - on_words.logsumexp(-1)).exp()


def mean_of_the_weights(q, k, prefix_keys):
    """the mean of the prefix's weights instead of their sum"""
    return right_share(q, k, prefix_keys) / prefix_keys.shape[1]


def largest_weight(q, k, prefix_keys):
    """the largest of the prefix's weights instead of their sum"""
    return torch.cat(scores_of(q, k, prefix_keys), -1).softmax(-1)[..., : prefix_keys.shape[1]].amax(-1)


def share_by_counting(q, k, prefix_keys):
    """K / (K + n) for a token that sees n tokens: right for equal scores only"""
    K = prefix_keys.shape[1]
    return (K / (K + torch.arange(1, q.shape[2] + 1))).expand(q.shape[:-1])


def share_averaged_over_heads(q, k, prefix_keys):
    """one share for all heads, their mean; each head has its own"""
    return right_share(q, k, prefix_keys).mean(1)


def share_that_overflows(q, k, prefix_keys):
    """exp of the scores themselves, which becomes infinite above 88;
    softmax and logsumexp take the largest score off first"""
    on_prefix, on_words = (scores.exp().sum(-1) for scores in scores_of(q, k, prefix_keys))
    return on_prefix / (on_prefix + on_words)


def probe_share(answer, draw):
    q, k, prefix_keys = draw(2, 4, 5, 8), draw(2, 4, 5, 8), draw(4, 3, 8).requires_grad_()
    share = answer(q, k, prefix_keys)
    yield "the share (B, H, T)", share
    yield "the gradient of the prefix's keys (H, K, d)", gradients(share, prefix_keys)[0]
    yield "the share where scores go up to hundreds (B, H, T)", answer(30 * q, k, 10 * prefix_keys)


def right_split(q, k, v, prefix_keys, prefix_values, **options):
    on_prefix, on_words = scores_of(q, k, prefix_keys, **options)
    return right_share(q, k, prefix_keys, **options), on_words.softmax(-1) @ v, on_prefix.softmax(-1) @ prefix_values


def parts_weighted_already(q, k, v, prefix_keys, prefix_values):
    """parts of the one softmax, which carry their share already; each part is an average of its own,
    its weights sum to 1"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return share, (1 - share[..., None]) * tokens, share[..., None] * prefix


def words_weighted_already(q, k, v, prefix_keys, prefix_values):
    """the tokens' part taken from the one softmax, so that it carries 1 - λ already; its own softmax sums to 1"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return share, (1 - share[..., None]) * tokens, prefix


def prefix_weighted_already(q, k, v, prefix_keys, prefix_values):
    """the prefix's part taken from the one softmax, so that it carries λ already; its own softmax sums to 1"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return share, tokens, share[..., None] * prefix


def words_unscaled(q, k, v, prefix_keys, prefix_values):
    """the tokens' scores not divided by √d in their own softmax"""
    share, _, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return share, scores_of(q, k, prefix_keys, scale=1.0)[1].softmax(-1) @ v, prefix


def prefix_unscaled(q, k, v, prefix_keys, prefix_values):
    """the prefix's scores not divided by √d in their own softmax"""
    share, tokens, _ = right_split(q, k, v, prefix_keys, prefix_values)
    return share, tokens, scores_of(q, k, prefix_keys, scale=1.0)[0].softmax(-1) @ prefix_values


def whole_in_the_place_of_prefix(q, k, v, prefix_keys, prefix_values):
    """the whole output, tokens included, in the place of the prefix's part; that is attention over the prefix alone"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return share, tokens, torch.lerp(tokens, prefix, share[..., None])


def share_turned_round(q, k, v, prefix_keys, prefix_values):
    """1 - λ, what the tokens keep, in the place of λ, the prefix's share"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return 1 - share, tokens, prefix


def parts_in_the_wrong_order(q, k, v, prefix_keys, prefix_values):
    """the prefix's part before the tokens'; asked are share, tokens, prefix"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return share, prefix, tokens


def all_turned_round(q, k, v, prefix_keys, prefix_values):
    """prefix and tokens exchanged throughout: 1 - λ, what the tokens keep, for λ,
    and the prefix's part before the tokens'; asked are λ, tokens, prefix"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return 1 - share, prefix, tokens


def share_of_a_count(q, k, v, prefix_keys, prefix_values):
    """a share that does not look at the scores, K / (K + n)"""
    return share_by_counting(q, k, prefix_keys), *right_split(q, k, v, prefix_keys, prefix_values)[1:]


def words_not_causal(q, k, v, prefix_keys, prefix_values):
    """no causal mask: tokens see those yet to come"""
    return right_split(q, k, v, prefix_keys, prefix_values, causal=False)


def plain_mean_of_values(q, k, v, prefix_keys, prefix_values):
    """the plain mean of the prefix's values; its own softmax weighs them"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return share, tokens, prefix_values.mean(-2, keepdim=True).expand(prefix.shape)


def whole_in_the_place_of_words(q, k, v, prefix_keys, prefix_values):
    """the whole output, prefix included, in the place of the tokens' part; that is attention over the tokens alone,
    the frozen layer's"""
    share, tokens, prefix = right_split(q, k, v, prefix_keys, prefix_values)
    return share, torch.lerp(tokens, prefix, share[..., None]), prefix


def split_unscaled(q, k, v, prefix_keys, prefix_values):
    """scores not divided by √d"""
    return right_split(q, k, v, prefix_keys, prefix_values, scale=1.0)


def probe_split(answer, draw):
    q, k, v = draw(2, 4, 5, 8), draw(2, 4, 5, 8), draw(2, 4, 5, 8)
    prefix_keys, prefix_values = draw(4, 3, 8), draw(4, 3, 8)
    names = ("the share (B, H, T)", "the tokens' part (B, H, T, d)", "the prefix's part (B, H, T, d)")
    pieces = named(names, answer(q, k, v, prefix_keys, prefix_values))
    yield from pieces
    share, tokens, prefix = (piece for _, piece in pieces)
    blend = (1 - share[..., None]) * tokens + share[..., None] * prefix
    yield "the blend (1 - share) · tokens + share · prefix (B, H, T, d)", blend


# ── predictions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def zero_share(token):
    """What 5 zero keys take of the softmax of a token that sees this many tokens, itself among them,
    each with score 0."""

    def truth():
        q, k = torch.zeros(1, 1, token, 8), torch.zeros(1, 1, token, 8)
        return right_share(q, k, torch.zeros(1, 5, 8))[0, 0, -1].item()

    return truth


def zero_prefix_makes():
    """What twenty tokens of zero keys and values do to the output of attention, where ten stood."""
    torch.manual_seed(0)
    attention = Attention(16, 2, rope=RoPE(8)).requires_grad_(False)
    x = torch.randn(1, 6, 16)
    lengths = (joined(attention, x, torch.arange(6), *torch.zeros(2, 2, K, 8), None).norm() for K in (10, 20))
    ten, twenty = (length.item() for length in lengths)
    return "same" if abs(twenty - ten) < 1e-6 * ten else "smaller" if twenty < ten else "larger"


def tokens_after_zeros():
    """How many different tokens a prefix of five has after five steps,
    where three began at zero and two from N(0, 1)."""
    torch.manual_seed(0)
    model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), "prefix_tuning", prefix_length=5)
    own = list(minillama.adapters.adapter_parameters(model).values())  # (G, K, d) each
    with torch.no_grad():
        for p in own:
            p[:, :3] = 0
    ids, optimizer = torch.randint(0, 31, (2, 6)), torch.optim.AdamW(own, lr=0.1)
    for _ in range(5):
        model.zero_grad()
        minillama.answer_loss(model, ids, ids).backward()
        optimizer.step()
    tokens = torch.cat([p.detach().transpose(0, 1).flatten(1) for p in own], 1)  # (K, everything of a token)
    return len({tuple(row) for row in tokens.mul(1e4).round().tolist()})


EXERCISES = {
    "soft_prompt": Exercise(
        "soft_prompt(embedding, ids, prompt, past=0, active=True) -> (B, K + T, D), "
        "or (B, T, D) where past > 0 or not active", right_soft_prompt,
        (*map(embedding_of, PromptEmbedding.__subclasses__()), prompt_at_every_step, prompt_behind_the_words,
         prompt_over_the_words, prompt_in_its_own_dtype, prompt_as_tokens_of_a_row, and_for_or, rows_cut_from_copies,
         copies_cut_into_rows), probe_soft_prompt,
    ),
    "turn_back": Exercise(
        "turn_back(rope, keys) -> (G, K, d)", right_turn_back,
        (not_turned, turned_by_heads, turned_one_too_far, turned_in_reverse_order, cos_and_sin_exchanged,
         turned_forwards, turned_to_own_places, turned_from_zero, turned_by_one, neighbours_paired), probe_turn_back,
    ),
    "prefix_attention": Exercise(
        "prefix_attention(attention, x, positions, keys, values, cache=None) -> (B, T, D)", layer_of(PrefixAttention),
        (*map(layer_of, PrefixAttention.__subclasses__()), prefix_behind_the_words, keys_turned_forwards,
         keys_turned_to_own_places, turned_and_moved, values_turned_too, keys_for_values, prefix_left_out,
         cache_forgotten, words_cached_twice, heads_repeated_in_turn, prefix_in_the_first_call_only,
         positions_counted_anew, prefix_detached), probe_prefix_attention,
    ),
    "prefix_share": Exercise(
        "prefix_share(q, k, prefix_keys) -> (B, H, T)", right_share,
        (later_words_counted, word_hidden_from_itself, hidden_with_zero, prefix_under_the_mask, share_unscaled,
         share_by_model_width, share_by_head_width, softmax_over_queries, softmax_of_the_prefix_alone,
         first_columns_of_the_words, earlier_words_hidden, share_of_the_words, odds, mean_of_the_weights,
         largest_weight, share_by_counting, share_averaged_over_heads, share_that_overflows), probe_share,
    ),
    "split_softmax": Exercise(
        "split_softmax(q, k, v, prefix_keys, prefix_values) -> share (B, H, T), tokens (B, H, T, d), "
        "prefix (B, H, T, d)", right_split,
        (parts_weighted_already, words_weighted_already, prefix_weighted_already, words_unscaled, prefix_unscaled,
         whole_in_the_place_of_prefix, share_turned_round, parts_in_the_wrong_order, all_turned_round, share_of_a_count,
         words_not_causal, plain_mean_of_values, whole_in_the_place_of_words, split_unscaled), probe_split,
    ),
    "share_of_ten": Question(
        zero_share(10), "Each of the 15 scores is 0, each weight e^0 / (15 · e^0); five of them are the prefix's.",
        {0: "a score of 0 is not a weight of 0: e^0 is 1, as for every token.",
         1: "the tokens have score 0 too: nobody is ahead.",
         0.5: "that is five against five; how many tokens does the tenth see?", 2 / 3: "that is what the tokens keep.",
         5 / 14: "nine tokens stand before the tenth; it sees itself as well.",
         5 / 16: "nine tokens stand before the tenth, and it sees itself: ten in all.",
         1 / 15: "that is one key of the prefix; how many are there?"},
        nudge="How many scores are in this token's softmax, what weight has each, "
              "and how many of them are the prefix's?",
    ),
    "share_of_the_first": Question(
        zero_share(1),
        "The first token sees itself and the five: 5 / (5 + 1). The fewer tokens there are, the more a prefix takes.",
        {0: "a score of 0 is not a weight of 0: e^0 is 1.",
         0.5: "it sees one token and five keys of the prefix, and all six weigh the same.",
         1 / 3: "the tokens behind the first one are hidden from it: it sees itself alone.",
         1 / 6: "that is what the token keeps for itself.", 1: "the token sees itself too."},
        nudge="Which tokens does the first one see? How many scores does that make, "
              "and how many of them are the prefix's?",
    ),
    "longer_zero_prefix": Question(
        zero_prefix_makes,
        "Zero values add nothing, but their keys take: the tokens' part is multiplied by 1 - λ, and λ grows with K.",
        {"same": "the values add nothing; but what do the keys take from the tokens' weights?",
         "larger": "nothing is added, since the values are 0; what happens to the tokens' weights?"},
    ),
    "tokens_after_zeros": Question(
        tokens_after_zeros,
        "The three equal tokens get equal gradients and stay equal, one token counted three times; "
        "the other two began apart.",
        {5: "what could make the three that began at zero differ? They are equal, and each token weighs them equally.",
         1: "what could make tokens equal that began apart?", 2: "do the two from N(0, 1) begin equal?",
         4: "three began equal: what could make one of them differ from the other two?"},
        nudge="Which tokens begin equal, and what gradients do equal tokens get?",
    ),
}  # fmt: skip
