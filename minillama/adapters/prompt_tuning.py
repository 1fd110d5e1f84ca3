"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): K learned vectors before the words' embeddings.

    prompt (K, D) ◀ trained ──┐
                              ├─▶ [prompt; words] (K + T, D) ─▶ all layers, frozen ─▶ logits of the T words
    ids ─▶ embed_tokens ──────┘

The vectors go through the model as K more words in front, which every word sees. It is not the identity at the start,
whatever the numbers: the words attend to the prompt and stand K places further on. With a cache the prompt goes in once,
before the first words; a padded row's padding lies behind it and stays unseen.

Lester et al. found that it pays to begin with embeddings of real tokens: init "vocabulary" draws them at random, and
`init_ids` names them, the ids of a text, repeated or cut to K. init "normal" draws from N(0, 1), as PEFT does.

Trained parameters: K · D.
"""

import torch
from torch import nn

INITS = ("vocabulary", "normal")


class PromptEmbedding(nn.Module):
    """Wraps the token embedding; the model puts `soft_prompt` before the first words it embeds.

    Parameters: prompt (K, D), float32. With `active` set to False there is no prompt: the base again, bit for bit.
    """

    def __init__(self, base, prompt_length=10, init="vocabulary", init_ids=None):
        super().__init__()
        if prompt_length < 1:
            raise ValueError(f"prompt_length is {prompt_length}; at least 1 prompt token is needed")
        if init not in INITS:
            raise ValueError(f"init is {init!r}; it can be 'vocabulary' or 'normal'")
        inner = base
        while hasattr(inner, "base"):  # under another adapter: the embedding itself
            inner = inner.base
        V, D = inner.weight.shape
        if init_ids is not None and not (init_ids and all(0 <= i < V for i in init_ids)):
            raise ValueError(f"init_ids are {init_ids}; needed are one or more ids below {V}")
        self.base, self.active = base, True
        if init_ids is None:
            init_ids = torch.randint(V, (prompt_length,)).tolist()
        chosen = (init_ids * prompt_length)[:prompt_length]
        start = torch.randn(prompt_length, D) if init == "normal" else inner.weight.detach()[chosen].float()
        self.prompt = nn.Parameter(start.clone().to(inner.weight.device))

    @property
    def soft_prompt(self):
        """The vectors that stand before the words, (K, D), or None."""
        inner = getattr(self.base, "soft_prompt", None)
        if not self.active:
            return inner
        return self.prompt if inner is None else torch.cat((inner, self.prompt))

    def forward(self, ids):
        return self.base(ids)


def attach(model, prompt_length=10, init="vocabulary", init_ids=None):
    """Wraps the model's `embed_tokens`."""
    model.embed_tokens = PromptEmbedding(model.embed_tokens, prompt_length, init, init_ids)
