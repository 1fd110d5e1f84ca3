"""Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): K learned vectors before the tokens'
embeddings.

    prompt (K, D) ◀ trained ──┐
                              ├─▶ [prompt; tokens] (K + T, D) ─▶ all layers, frozen ─▶ logits of the T tokens
    ids ─▶ embed_tokens ──────┘

The vectors go through the model as K more tokens in front, which every token sees. It is not the identity at the start,
whatever the numbers: the tokens attend to the prompt and stand K places further on. With a cache the prompt goes in
once, before the first tokens; a padded row's padding lies behind it and stays unseen.

Lester et al. found that it pays to begin with embeddings of real tokens: init "vocabulary" draws them at random, and
`init_ids` names them, the ids of a text, repeated or cut to K. init "normal" draws from N(0, 1), as PEFT does.

Trained parameters: K · D.
"""

import torch
from torch import nn

INITS = ("vocabulary", "normal")
LEARNING_RATES = (0.3, 0.1)  # on the bundled bases, and on a real model
PEFT_TYPE = "PROMPT_TUNING"


class PromptEmbedding(nn.Module):
    """Wraps the token embedding; the model puts `soft_prompt` before the first tokens it embeds.

    Parameters: prompt (K, D), float32. With `active` set to False there is no prompt: the base again, bit for bit.
    """

    own = ("prompt",)

    def __init__(self, base, prompt_length=10, init="vocabulary", init_ids=None):
        super().__init__()
        if not isinstance(prompt_length, int) or prompt_length < 1:
            raise ValueError(f"prompt_length is {prompt_length!r}; needed is a whole number from 1 on")
        if init not in INITS:
            raise ValueError(f"init is {init!r}; it can be 'vocabulary' or 'normal'")
        inner = base
        while hasattr(inner, "base"):  # under another adapter: the embedding itself
            inner = inner.base
        V, D = inner.weight.shape
        if init_ids is not None:
            init_ids = torch.as_tensor(init_ids).flatten().tolist()
            if not init_ids or not all(isinstance(i, int) and 0 <= i < V for i in init_ids):
                raise ValueError(f"init_ids are {init_ids}; needed are one or more ids below {V}")
        self.base, self.active = base, True
        if init_ids is None:
            init_ids = torch.randint(V, (prompt_length,)).tolist()
        chosen = (init_ids * -(-prompt_length // len(init_ids)))[:prompt_length]
        start = torch.randn(prompt_length, D) if init == "normal" else inner.weight.detach()[chosen].float()
        self.prompt = nn.Parameter(start.clone().to(inner.weight.device))

    @property
    def soft_prompt(self):
        """The vectors that stand before the tokens, (K, D), or None."""
        inner = getattr(self.base, "soft_prompt", None)
        if not self.active:
            return inner
        return self.prompt if inner is None else torch.cat((inner, self.prompt))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, ids):
        return self.base(ids)


def attach(model, prompt_length: int = 10, init: str = "vocabulary", init_ids: list[int] | None = None):
    """Wraps the model's `embed_tokens`. Freezes nothing."""
    if not hasattr(model, "embed_tokens") or not hasattr(model, "hidden"):
        raise ValueError(
            "the model does not ask its `embed_tokens` for a soft prompt, so that one would be without effect: "
            "minillama's models do (attention.embed)"
        )
    model.embed_tokens = PromptEmbedding(model.embed_tokens, prompt_length, init, init_ids)


# ── the PEFT library's files (peft.py says what `layout` knows) ──────────────────────────────────────────────────────


def to_peft(options, tensors, layout):
    (prompt,) = tensors.values()  # (K, D)
    config = {"peft_type": PEFT_TYPE, "num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1]}
    config |= {
        "num_layers": layout.num_layers,
        "num_attention_heads": layout.num_heads,
        "num_transformer_submodules": 1,
    }
    return config, {"prompt_embeddings": prompt * layout.prompt_scale}


def from_peft(config, tensors, layout):
    """(options, tensors) of ours."""
    prompt = tensors["prompt_embeddings"] / layout.prompt_scale
    return {"prompt_length": config["num_virtual_tokens"]}, {"embed_tokens.prompt": prompt}
