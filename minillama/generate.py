"""Text from a model, token by token, with the key/value cache: greedy, or sampled with temperature, top-k and top-p."""

import math
from functools import partial

import torch

from .attention import Cache
from .decode import Decoder, last_logits

SMALLEST = 1e-4  # temperature above 0: below it the logits would overflow, and one token would always be drawn


def left_pad(prompts, pad=0):
    """Prompts of different lengths (lists of ids) -> ids (B, T) and attention_mask (B, T), padded on the left,
    so that every row's last token is its prompt's last."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt is empty; the model needs at least one token to continue")
    T = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (T - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def choose(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """Logits (B, V) -> the next ids (B,): the greatest at temperature 0, else drawn from softmax(logits / temperature),
    from the `top_k` likeliest only, and from the fewest likeliest whose probabilities reach `top_p` (Holtzman et al.
    2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits.float() / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probability = logits.softmax(-1)
    if top_p is not None:
        before = probability.cumsum(-1) - probability  # what the likelier ones sum to: the first one always stays
        probability = probability.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probability, 1, generator=generator)  # (B, 1), places in `order`
    return order.gather(-1, drawn)[:, 0]


def check_sampling(max_new_tokens, temperature, top_k, top_p):
    """Raises ValueError for what `generate` cannot take."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; needed is 0 or more")
    if temperature != 0 and not SMALLEST <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; needed is 0 for the likeliest token, or from {SMALLEST} on")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"top_k is {top_k} and top_p {top_p}; needed are top_k of at least 1 and top_p above 0 and at most 1"
        )


@torch.no_grad()
def stream(
    model, ids, max_new_tokens=20, temperature=0.0, top_k=None, top_p=None, stop=None, seed=None, attention_mask=None,
    static=False,
):  # fmt: skip
    """Yields the next ids, (B,), one step at a time; a row that met `stop` yields `stop` from then on.

    Arguments as in `generate`. Each step runs in eval mode, so that dropout is off; between steps the model is as it
    was.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"the prompt's ids have shape {tuple(ids.shape)}; needed is (B, T) with at least one token")
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    next_logits = Decoder(model, max_new_tokens) if static else partial(last_logits, model, cache=Cache())
    for step in range(max_new_tokens):
        was_training = model.training
        if was_training:
            model.eval()
        try:
            logits = next_logits(ids, attention_mask if step == 0 else None)  # (B, V)
        finally:
            if was_training:
                model.train()
        ids = choose(logits, temperature, top_k, top_p, generator)[:, None]  # (B, 1)
        if stop is not None:
            ids = ids.masked_fill(done[:, None], stop)
            done |= ids[:, 0] == stop
        yield ids[:, 0]
        if stop is not None and done.all():
            return


def generate(
    model, ids, max_new_tokens=20, temperature=0.0, top_k=None, top_p=None, stop=None, seed=None, attention_mask=None,
    static=False,
):  # fmt: skip
    """Continues each row of ids: (B, T) -> (B, T + new), new at most max_new_tokens.

    temperature: 0 takes the likeliest token; above it, tokens are drawn, and the same `seed` draws the same ones.
    top_k, top_p: see `choose`.  stop: the id that ends a row; behind it the row is filled with the same id.
    attention_mask: (B, T), 0 where prompts are padded on the left (`left_pad` makes both).
    static: a cache of fixed size, and on a GPU a step that is recorded once (decode.py): the same sooner.
    """
    steps = list(stream(model, ids, max_new_tokens, temperature, top_k, top_p, stop, seed, attention_mask, static))
    return torch.cat((ids, torch.stack(steps, dim=1)), dim=1) if steps else ids
