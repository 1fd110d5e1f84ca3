"""Prompts that carry a picture: zero-init gated prefix attention, conditioned on an image (Zhang et al. 2023,
https://arxiv.org/abs/2303.16199, section 3.3, and the authors' later multi-modal code).

A frozen encoder has made N vectors of F features of a row's picture. One projection, shared by all layers, brings them
to the model's width and adds them to the layer's K learned prompts; the rest is llama_adapter.py, with a prefix of its
own for each row of the batch:

    picture ─▶ encoder (frozen) ─▶ features (B, N, F)
                                       │ projection  ◀ trained, one for all layers
                prompt (K, D)  ───────▶ +                             P_l + f(picture), (B, K, D)
                  ▲ trained            │ k_proj, v_proj (frozen)
                                   k_prompt, v_prompt (B, G, K, d) ─▶ attend, × tanh(gate), + y   as in llama_adapter

    way="global"   the paper's: the features as one long vector, projected once and added to all K prompts alike
    way="places"   a visual token for each prompt (K = N), as the authors' query tokens: prompt k gets what stands at k

The picture comes in through `minillama.seeing(model, features)`. With the gate at 0, in a row without a picture and
outside of the block the model returns what its base returns, bit for bit.

Trained parameters: L · (K·D + H) + F·D + D for "places", L · (K·D + H) + N·F·D + D for "global".
Shapes: B batch, T tokens, D model width, G key/value heads, d head width, K prompts, N visual tokens, F features.
"""

from torch import nn

from .llama_adapter import AdaptedAttention, top_layers

WAYS = ("places", "global")
LEARNING_RATES = (0.1, 2e-2)  # on the bundled bases, and on a real model, where it was not measured


class ImageAttention(AdaptedAttention):
    """AdaptedAttention whose prompts are P_l + f(picture), a picture for each row; text alone passes as in the base.

    projection: nn.Linear from F features ("global": N·F) to D, the same module in every layer.  tokens: N.
    seen: what `seeing` shows, (features (B, N, F), shown (B, 1, 1, 1), 0 in rows without a picture), or None.
    """

    own, seen = ("prompt", "gate", "projection"), None

    def __init__(self, base, projection, tokens=8, way="places", prompt_length=8, gate="head", tanh=True):
        super().__init__(base, prompt_length, gate, tanh)
        self.projection, self.tokens, self.way = projection, tokens, way

    def attend(self, q, k, v, mask=None, cache=None):
        """The base's `attend` plus, in rows that see something, the gated term: (B, H, T, d)."""
        return (self.base if self.seen is None else super()).attend(q, k, v, mask, cache)

    def term(self, q, cache=None):
        """The gated prefix attention, 0 in rows without a picture, (B, H, T, d)."""
        features, shown = self.seen
        if len(q) != len(features):
            raise ValueError(
                f"the batch has {len(q)} rows and {len(features)} were shown pictures, or None: one for each"
            )
        return shown.to(q.dtype) * super().term(q, cache)

    def prefix(self, dtype):
        """The prompts' keys and values, each row's own: (B, G, K, d) each."""
        features = self.seen[0].to(self.projection.weight.dtype)  # (B, N, F)
        N, F = self.tokens, self.projection.in_features // (1 if self.way == "places" else self.tokens)
        if features.shape[1:] != (N, F):
            raise ValueError(
                f"a picture is {tuple(features.shape[1:])} features here; the adapter was made for ({N}, {F})"
            )
        if self.way == "global":
            features = features.flatten(1)[:, None]  # (B, 1, N·F)
        return self.base.keys_values((self.prompt + self.projection(features)).to(dtype))


def attach(
    model, features: int = 64, tokens: int = 8, way: str = "places", prompt_length: int | None = None,
    layers: int | None = None, gate: str = "head", tanh: bool = True, spread: float = 0.3, encoder: str = "handwriting",
):  # fmt: skip
    """Wraps `self_attn` of the top `layers` (None: of all). Freezes nothing.

    features F and tokens N: what the encoder gives of a picture.  way: see above.  prompt_length: K, for "global" alone
    (None: 10), for "places" it is N.  spread: prompts are drawn from N(0, spread²); held-out training
    dates do not tell 0.1, 0.3 and 1 (llama_adapter's own) apart by more than their seeds do (docs/results.md).
    encoder: the name of what made the features, kept for whoever opens the adapter.
    """
    if way not in WAYS:
        raise ValueError(f"way is {way!r}; it can be {' or '.join(map(repr, WAYS))}")
    if features < 1 or tokens < 1:
        raise ValueError(f"features is {features} and tokens {tokens}; needed are whole numbers from 1 on")
    if way == "places" and prompt_length not in (None, tokens):
        raise ValueError(
            f"prompt_length is {prompt_length} and tokens {tokens}; by places each prompt has its own token"
        )
    K = tokens if way == "places" else 10 if prompt_length is None else prompt_length
    chosen, inputs = top_layers(model, layers), features if way == "places" else tokens * features
    D, device = chosen[0].self_attn.width, next(chosen[0].parameters()).device
    projection = nn.Linear(inputs, D, device=device)
    nn.init.normal_(projection.weight, std=inputs**-0.5)  # visual tokens of unit variance
    nn.init.zeros_(projection.bias)
    for layer in chosen:
        layer.self_attn = ImageAttention(layer.self_attn, projection, tokens, way, K, gate, tanh)
        layer.self_attn.prompt.data *= spread
