"""Right answers to lesson 02's exercises, written differently from the reference: the checker must pass every one."""

import torch
import torch.nn.functional as F

from minillama.attention import rotate


def soft_prompt_row_by_row(embedding, ids, prompt, past=0, active=True):
    x = embedding(ids)
    if past or not active:
        return x
    return torch.stack([torch.cat((prompt.type_as(x), row)) for row in x])


def soft_prompt_filled_in(embedding, ids, prompt, past=0, active=True):
    words, K = embedding(ids), len(prompt) if active and past == 0 else 0
    x = words.new_zeros(len(ids), K + ids.shape[1], words.shape[-1])
    x[:, K:] = words
    if K:
        x[:, :K] = prompt.to(words.dtype)
    return x


def turn_back_as_complex(rope, keys):
    left, right = keys.chunk(2, -1)
    turned = torch.complex(left, right) * torch.exp(-1j * keys.shape[1] * rope.frequencies())
    return torch.cat((turned.real, turned.imag), -1)


def turn_back_pair_by_pair(rope, keys):
    angle, half = keys.shape[1] * rope.frequencies(), keys.shape[-1] // 2
    a, b = keys[..., :half], keys[..., half:]
    return torch.cat((a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()), -1)


def prefix_attention_words_moved(attention, x, positions, keys, values, cache=None):
    """The words' positions begin at K and the prefix is used as it is."""
    K = keys.shape[1]
    q, k, v = attention.project(x, positions + K)
    if cache is not None:
        k, v = cache.append(k, v)
    k, v = (torch.cat((p.to(x.dtype)[None].repeat(len(x), 1, 1, 1), w), 2) for p, w in ((keys, k), (values, v)))
    return attention.output(attention.attend(q, k, v))


def prefix_attention_kept_in_the_cache(attention, x, positions, keys, values, cache=None):
    """The prefix goes into the cache once, before the first words."""
    K = keys.shape[1]
    q, k, v = attention.project(x, positions)
    if cache is None or cache.k is None:
        turned = rotate(keys, *attention.rope(torch.full((K,), -K)))
        k, v = (torch.cat((p.to(x.dtype).expand(len(x), -1, -1, -1), w), 2) for p, w in ((turned, k), (values, v)))
    return attention.output(attention.attend(q, k, v, cache=cache))


def prefix_attention_head_by_head(attention, x, positions, keys, values, cache=None):
    """The softmax written out for each head, words and prefix scored apart."""
    K, d, share = keys.shape[1], attention.head_dim, attention.num_heads // attention.num_kv_heads
    q, k, v = attention.project(x, positions)
    if cache is not None:
        k, v = cache.append(k, v)
    T, S, turned = q.shape[2], k.shape[2], rotate(keys, *attention.rope(torch.full((K,), -K))).to(x.dtype)
    later, heads = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), []
    for h in range(attention.num_heads):
        g = h // share
        on_words = (q[:, h] @ k[:, g].mT / d**0.5).masked_fill(later, -torch.inf)
        weights = torch.cat((q[:, h] @ turned[g].T / d**0.5, on_words), -1).softmax(-1)
        heads.append(weights[..., :K] @ values[g].to(x.dtype) + weights[..., K:] @ v[:, g])
    return attention.output(torch.stack(heads, 1))


def share_by_logsumexp(q, k, prefix_keys):
    scale, future = q.shape[-1] ** -0.5, torch.full((q.shape[2], q.shape[2]), -torch.inf).triu(1)
    on_prefix = torch.einsum("bhtd,hkd->bhtk", q, prefix_keys).mul(scale).logsumexp(-1)
    on_words = (torch.einsum("bhtd,bhsd->bhts", q, k).mul(scale) + future).logsumexp(-1)
    return torch.sigmoid(on_prefix - on_words)


def share_by_attention(q, k, prefix_keys):
    """What attention returns where the prefix's values are 1 and the words' 0."""
    B, (_, K, _), T = len(q), prefix_keys.shape, q.shape[2]
    keys = torch.cat((prefix_keys.expand(B, -1, -1, -1), k), 2)
    values = (torch.arange(K + T) < K).float()[:, None].expand(B, q.shape[1], -1, q.shape[-1])
    seen = torch.ones(T, K + T, dtype=torch.bool).tril(K)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)[..., 0]


def split_by_attention(q, k, v, prefix_keys, prefix_values):
    words = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    pk, pv = (z.expand(len(q), -1, -1, -1) for z in (prefix_keys, prefix_values))
    prefix = F.scaled_dot_product_attention(q, pk, pv)
    return share_by_logsumexp(q, k, prefix_keys), words, prefix


def split_from_one_softmax(q, k, v, prefix_keys, prefix_values):
    """The one softmax cut in two, each part divided by what it sums to; word by word."""
    K, rows = prefix_keys.shape[1], []
    for t in range(q.shape[2]):
        word = q[:, :, t : t + 1] / q.shape[-1] ** 0.5
        weights = torch.cat((word @ prefix_keys.mT, word @ k[:, :, : t + 1].mT), -1).softmax(-1)
        share = weights[..., :K].sum(-1, keepdim=True)
        of_words, of_prefix = weights[..., K:] @ v[:, :, : t + 1], weights[..., :K] @ prefix_values
        rows.append((share[..., 0], of_words / (1 - share), of_prefix / share))
    return tuple(torch.cat(parts, 2) for parts in zip(*rows))


ALTERNATIVES = {
    "soft_prompt": [soft_prompt_row_by_row, soft_prompt_filled_in],
    "turn_back": [turn_back_as_complex, turn_back_pair_by_pair],
    "prefix_attention": [
        prefix_attention_words_moved,
        prefix_attention_kept_in_the_cache,
        prefix_attention_head_by_head,
    ],
    "prefix_share": [share_by_logsumexp, share_by_attention],
    "split_softmax": [split_by_attention, split_from_one_softmax],
}
