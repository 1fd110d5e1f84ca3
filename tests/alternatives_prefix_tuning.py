"""Right answers to lesson 02's exercises, written differently from the reference: the checker must pass every one."""

import numpy as np
import torch
import torch.nn.functional as F

import minillama
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


def prefix_attention_cached_first(attention, x, positions, keys, values, cache=None):
    """The tokens go into the cache before anything else is done with them, the prefix is turned feature by feature."""
    q, *kv = attention.project(x, positions)
    kv = kv if cache is None else cache.append(*kv)
    cos, sin = attention.rope(torch.tensor([keys.shape[1]]))
    left, right = keys.chunk(2, -1)
    turned = keys * cos + torch.cat((right, -left), -1) * sin
    kv = [torch.cat((p.to(x).expand(len(x), -1, -1, -1), z), 2) for p, z in zip((turned, values), kv)]
    return attention.output(attention.attend(q, *kv))


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


def soft_prompt_from_the_table(embedding, ids, prompt, past=0, active=True):
    """The prompt as rows behind the vocabulary's, looked up by ids of their own."""
    V, K = embedding.weight.shape[0], len(prompt)
    table = torch.cat((embedding.weight, prompt.to(embedding.weight.dtype)))
    if active and past < 1:
        ids = torch.cat((torch.arange(V, V + K).repeat(len(ids), 1), ids), 1)
    return F.embedding(ids, table)


def soft_prompt_by_broadcasting(embedding, ids, prompt, past=0, active=True):
    x = embedding(ids)
    p = prompt.to(x) + x.new_zeros(len(x), 1, 1)
    return torch.hstack([p, x]) if not (past > 0 or active is False) else x


def turn_back_by_a_matrix(rope, keys):
    G, K, d = keys.shape
    cos, sin = (z.diag() for z in rope(torch.tensor(-K)))
    swap = torch.eye(d).roll(d // 2, 0)  # feature i from i + d/2, with a sign for the left half
    swap[:, : d // 2], swap[:, d // 2 :] = swap[:, : d // 2].clone(), -swap[:, d // 2 :].clone()
    return torch.einsum("gkd,ed->gke", keys, cos + sin @ swap)


def turn_back_key_by_key(rope, keys):
    cos, sin = rope(torch.tensor([-keys.size(1)]))
    return torch.stack([torch.cat([rotate(key[None], cos, sin) for key in head]) for head in keys])


def prefix_attention_masked_by_hand(attention, x, positions, keys, values, cache=None):
    """Tokens before the prefix in the list, and a mask that says who sees what."""
    K, (q, k, v) = keys.shape[1], attention.project(x, positions)
    if cache is not None:
        k, v = cache.append(k, v)
    T, S = q.shape[2], k.shape[2]
    turned = rotate(keys, *attention.rope(torch.tensor([-K])))
    k, v = (torch.cat((a, p.to(a.dtype).repeat(len(x), 1, 1, 1)), 2) for a, p in ((k, turned), (v, values)))
    seen = torch.cat((torch.arange(S) <= torch.arange(S - T, S)[:, None], torch.ones(T, K, dtype=torch.bool)), 1)
    return attention.output(attention.attend(q, k, v, seen))


def prefix_attention_as_a_blend(attention, x, positions, keys, values, cache=None):
    """Two softmaxes, blended by the share."""
    q, k, v = attention.project(x, positions)
    k, v = (k, v) if cache is None else cache.append(k, v)
    share_of, K = q.shape[1] // k.shape[1], keys.shape[1]
    pk, pv = rotate(keys, *attention.rope(torch.full((K,), -K))).to(q.dtype), values.to(q.dtype)
    k, v, pk, pv = (z.repeat_interleave(share_of, -3) for z in (k, v, pk, pv))
    T, S, d = q.shape[2], k.shape[2], q.shape[3]
    on_tokens = (q @ k.mT / d**0.5).masked_fill(~torch.ones(T, S, dtype=torch.bool).tril(S - T), -torch.inf)
    on_prefix = torch.einsum("bhtd,hkd->bhtk", q, pk) / d**0.5
    lam = torch.sigmoid(on_prefix.logsumexp(-1, True) - on_tokens.logsumexp(-1, True))
    return attention.output((1 - lam) * (on_tokens.softmax(-1) @ v) + lam * (on_prefix.softmax(-1) @ pv))


def share_token_by_token(q, k, prefix_keys):
    share = torch.zeros(q.shape[:-1])
    for t in range(q.shape[2]):
        scores = torch.cat((q[:, :, t, None] @ prefix_keys.mT, q[:, :, t, None] @ k[:, :, : t + 1].mT), -1)
        weights = torch.softmax(scores / np.sqrt(q.shape[-1]), -1)[:, :, 0]
        share[:, :, t] = 1 - weights[..., prefix_keys.shape[1] :].sum(-1)
    return share


def share_with_the_largest_taken_off(q, k, prefix_keys):
    scores = torch.cat((q @ k.mT, q @ prefix_keys.mT), -1) * q.shape[-1] ** -0.5
    T = q.shape[2]
    scores = torch.where(
        torch.ones(T, scores.shape[-1]).triu(1).bool() & (torch.arange(scores.shape[-1]) < T), -1e30, scores
    )
    e = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return e[..., T:].sum(-1) / e.sum(-1)


def split_by_einsum(q, k, v, prefix_keys, prefix_values):
    q, T = q * q.shape[-1] ** -0.5, q.shape[2]
    a, b = torch.einsum("bhtd,hkd->bhtk", q, prefix_keys), torch.einsum("bhtd,bhsd->bhts", q, k)
    b = b - 1e9 * torch.ones(T, T).triu(1)
    share = torch.cat((b, a), -1).softmax(-1)[..., T:].sum(-1)
    return [
        share,
        torch.einsum("bhts,bhsd->bhtd", b.softmax(-1), v),
        torch.einsum("bhtk,hkd->bhtd", a.softmax(-1), prefix_values),
    ]


def step_with_a_closure(model, optimizer, ids, labels):
    def closure():
        optimizer.zero_grad()
        loss = minillama.answer_loss(model, ids, labels)
        loss.backward()
        return loss

    return optimizer.step(closure).item()


def step_zeroed_at_both_ends(model, optimizer, ids, labels):
    model.train()
    model.zero_grad(set_to_none=False)
    loss = minillama.answer_loss(model, ids, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss.detach().numpy().astype(np.float64)[()]


def step_by_cross_entropy(model, optimizer, ids, labels):
    logits = model(ids)[:, :-1]
    loss = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100)
    for p in model.parameters():
        p.grad = None
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.tolist()


def step_row_by_row(model, optimizer, ids, labels):
    """Gradients added up over the rows, each by its share of the answer's tokens."""
    optimizer.zero_grad()
    answered, total = (labels[:, 1:] != -100).sum(1), 0.0
    for row, label, n in zip(ids, labels, answered):
        loss = minillama.answer_loss(model, row[None], label[None]) * n / answered.sum()
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


ALTERNATIVES = {
    "soft_prompt": [
        soft_prompt_row_by_row, soft_prompt_filled_in, soft_prompt_from_the_table, soft_prompt_by_broadcasting,
    ],
    "turn_back": [turn_back_as_complex, turn_back_pair_by_pair, turn_back_by_a_matrix, turn_back_key_by_key],
    "prefix_attention": [
        prefix_attention_words_moved, prefix_attention_cached_first, prefix_attention_head_by_head,
        prefix_attention_masked_by_hand, prefix_attention_as_a_blend,
    ],
    "prefix_share": [
        share_by_logsumexp, share_by_attention, share_token_by_token, share_with_the_largest_taken_off,
    ],
    "split_softmax": [split_by_attention, split_from_one_softmax, split_by_einsum],
    "training_step": [step_with_a_closure, step_zeroed_at_both_ends, step_by_cross_entropy, step_row_by_row],
}  # fmt: skip
