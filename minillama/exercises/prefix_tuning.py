"""Lesson 02: prompt tuning and prefix tuning, with the wrong versions that one writes easily."""

import torch
import torch.nn.functional as F

from ..adapters import llama_adapter
from ..adapters.prefix_tuning import PrefixAttention
from ..adapters.prompt_tuning import PromptEmbedding


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────────────────────────


# ── prefix tuning ───────────────────────────────────────────────────────────────────────────────────────────────────────


class PrefixAtTheWordsPlace(PrefixAttention):
    """keys of the prefix used as if the words began at position 0"""

    harmless_for = ("gpt2",)  # its positions are no part of the keys

    def prefix(self, dtype):
        return self.keys.to(dtype), self.values.to(dtype)


class PrefixHidden(PrefixAttention):
    """a causal mask that hides the prefix from the first words"""

    def attend(self, q, k, v, mask=None, cache=None):
        past = cache.k.shape[2] if cache is not None and cache.k is not None else 0
        T, S = q.shape[2], past + k.shape[2]
        seen = torch.arange(self.length + S) <= torch.arange(past, past + T)[:, None]
        if cache is not None:
            k, v = cache.append(k, v)
        pk, pv = (z.expand(len(q), -1, -1, -1) for z in self.prefix(q.dtype))
        return self.base.attend(q, torch.cat((pk, k), 2), torch.cat((pv, v), 2), seen[None, None])


class PrefixAsSecondSoftmax(PrefixAttention):
    """a softmax of its own for the prefix, added to the words': LLaMA-Adapter without its gate"""

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


# ── prompt tuning ───────────────────────────────────────────────────────────────────────────────────────────────────────


class AddedToTheWords(PromptEmbedding):
    """the prompt's mean added to every word instead of put before them"""

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


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────────


EXERCISES = {}
