"""Decoding without waste: a cache of a fixed size, and on a GPU the whole step recorded once and replayed.

The cache of attention.py grows: every token copies all keys and values into tensors of another shape. Here they stand
in tensors with room for all that will come, each token writes into its place, and what lies beyond is masked. Nothing
changes shape or address from step to step, so a GPU can record a step's few hundred small kernels (a CUDA graph) and be
sent them as one; sent one by one, they wait for Python. The logits are the plain cache's but for rounding: sums over
masked places round otherwise.

    for id in stream(model, ids, 100, static=True): ...
"""

import torch

from .attention import Cache, LayerCache


class StaticLayer(LayerCache):
    """One layer's keys and values, (B, G, room, d) each, written at the cache's `place`."""

    def append(self, k, v):
        """Writes k, v (B, G, T, d); gives all there is room for, or to a prompt, which comes first, its own alone."""
        if self.k is None:
            self.k, self.v = (new.new_zeros(*new.shape[:2], self.cache.room, new.shape[3]) for new in (k, v))
            self.k[:, :, : k.shape[2]], self.v[:, :, : v.shape[2]] = k, v
            return k, v
        self.k.index_copy_(2, self.cache.place, k)
        self.v.index_copy_(2, self.cache.place, v)
        return self.k, self.v


class StaticCache(Cache):
    """room: how many tokens it can hold, a soft prompt's included."""

    of_a_layer = StaticLayer

    def __init__(self, room):
        super().__init__()
        self.room = room

    def follow(self, device):
        """After the prompt: where the next token is written, its position, and the mask of what it may see."""
        S, real = self.length, self.attention_mask
        self.place = torch.tensor([S], device=device)
        self.positions = self.place.clone() if real is None else real.bool().sum(1, keepdim=True)  # (1,) or (B, 1)
        self.mask = torch.zeros(1 if real is None else len(real), 1, 1, self.room, dtype=torch.bool, device=device)
        self.mask[..., :S] = True if real is None else real.bool()[:, None, None]
        self.length = self.room - 1  # what the model is asked to be long enough for


class Decoder:
    """decoder(ids, attention_mask) -> the logits (B, V) behind the last token: first of a prompt (B, T), then of one
    token (B, 1) each time, `new` times at most.

    On a GPU the third token's step is recorded, and replayed for all that follow. The model must not change meanwhile.
    """

    def __init__(self, model, new):
        self.model, self.new, self.cache, self.graph, self.steps = model, new, None, None, 0

    def __call__(self, ids, attention_mask=None):
        if self.cache is None:
            prompt = getattr(self.model.embed_tokens, "soft_prompt", ())
            self.cache = StaticCache(ids.shape[1] + len(prompt) + self.new)
            logits = last_logits(self.model, ids, attention_mask, self.cache)
            self.cache.follow(ids.device)
            self.ids = ids.new_zeros(len(ids), 1)
            return logits
        self.ids.copy_(ids)
        self.steps += 1
        if ids.device.type != "cuda":
            return self.step()
        if self.steps <= 2:  # what a kernel does only at its first call must not be recorded
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                logits = self.step()
            torch.cuda.current_stream().wait_stream(side)
            return logits
        if self.graph is None:
            self.graph = self.recorded()
        self.graph.replay()
        return self.logits

    def recorded(self):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.logits = self.step()
        except RuntimeError as error:
            why = str(error).splitlines()[0][:120]
            raise ValueError(f"a step of this model cannot be recorded ({why}): generate without static") from None
        return graph

    def step(self):
        cache = self.cache
        cache.mask.index_fill_(3, cache.place, True)
        logits = last_logits(self.model, self.ids, None, cache)
        cache.place += 1
        cache.positions += 1
        return logits


def last_logits(model, ids, attention_mask, cache):
    """The logits (B, V) behind the last token of ids (B, T)."""
    last = model.hidden(ids, attention_mask, cache)[:, -1:].contiguous()  # (B, 1, D)
    return model.lm_head(last)[:, 0]
