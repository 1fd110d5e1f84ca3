"""The catalogue of mistakes: for every method, wrong versions that one writes easily, each named in a sentence.

A mistake is a subclass that takes the place of the method's wrapper (or, for `attach_…`, a function in place of
`attach`); where it makes no difference to a kind of model, `harmless_for` says so. MISTAKES lists them all.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minillama.adapters import bottleneck, ia3, llama_adapter, llama_adapter_v2, lora, prefix_tuning, prompt_tuning
from minillama.adapters.bottleneck import Adapted, Bottleneck
from minillama.adapters.ia3 import IA3Linear
from minillama.adapters.llama_adapter import AdaptedAttention
from minillama.adapters.llama_adapter_v2 import ScaledLinear, TrainedNorm
from minillama.adapters.lora import LoRALinear
from minillama.adapters.prefix_tuning import PrefixAttention
from minillama.adapters.prompt_tuning import PromptEmbedding
from minillama.attention import rotate

# ── zero-init gated prefix attention ────────────────────────────────────────────────────────────────────────────────


class Prefix(AdaptedAttention):
    """Right, in pieces that the mistakes below replace."""

    def attention(self, q, k, v):
        return llama_adapter.prefix_attention(q, k, v)

    def opened(self, y):
        return llama_adapter.opening(self.gate, self.tanh).to(y.dtype)

    def attend(self, q, k, v, mask=None, cache=None):
        y = self.base.attend(q, k, v, mask, cache)
        if not self.active:
            return y
        return y + self.opened(y) * self.attention(q, *self.prefix(q.dtype))


class ScaledByModelWidth(Prefix):
    """scores divided by √D instead of √d"""

    def attention(self, q, k, v):
        return super().attention(q * (self.head_dim / self.width) ** 0.5, k, v)


class Unscaled(Prefix):
    """scores not divided at all"""

    def attention(self, q, k, v):
        return super().attention(q * self.head_dim**0.5, k, v)


class RotatedPrefix(Prefix):
    """RoPE on the prompts' keys"""

    def prefix(self, dtype):
        k, v = super().prefix(dtype)
        rope = self.base.rope
        if rope is None:  # a GPT-2 has none: there the mistake is to shift the keys by a position embedding
            return k + 0.1 * torch.arange(k.shape[1], dtype=dtype)[:, None], v
        return rotate(k, *rope(torch.arange(k.shape[1]))), v


class OneSoftmax(Prefix):
    """one softmax over words and prompts, the gate outside"""

    def attend(self, q, k, v, mask=None, cache=None):
        y = self.base.attend(q, k, v, mask, cache)
        pk, pv = self.prefix(q.dtype)
        pk, pv = (z.repeat_interleave(self.num_heads // z.shape[0], 0).expand(len(q), -1, -1, -1) for z in (pk, pv))
        if cache is not None:
            k = cache.k
        k = k.repeat_interleave(self.num_heads // k.shape[1], 1)
        scores = q @ torch.cat((pk, k), 2).transpose(-1, -2) / self.head_dim**0.5
        return y + self.opened(y) * (scores.softmax(-1)[..., : pk.shape[2]] @ pv)


class GateAfterOutput(Prefix):
    """the gated term added behind the output projection, never projected (seeds of this kind abound)"""

    def forward(self, x, positions=None, mask=None, cache=None):
        q, k, v = self.project(x, positions)
        term = self.opened(q) * self.attention(q, *self.prefix(q.dtype))  # (B, H, T, d)
        term = term.transpose(1, 2).flatten(2)
        return self.output(self.base.attend(q, k, v, mask, cache)) + F.pad(term, (0, self.width))[..., : self.width]


class BiasTwice(Prefix):
    """the term sent through the output projection by itself, so that its bias is added twice"""

    harmless_for = ("llama",)  # no bias there

    def forward(self, x, positions=None, mask=None, cache=None):
        q, k, v = self.project(x, positions)
        return self.output(self.base.attend(q, k, v, mask, cache)) + self.output(self.opened(q) * self.attention(q, *self.prefix(q.dtype)))


class HeadsInTheWrongOrder(Prefix):
    """grouped key heads repeated as a b a b a b instead of a a a b b b"""

    harmless_for = ("llama", "gpt2")  # nothing is repeated there

    def attention(self, q, k, v):
        repeat = self.num_heads // k.shape[0]
        return super().attention(q, k.repeat(repeat, 1, 1), v.repeat(repeat, 1, 1))


class StalePrefix(Prefix):
    """prompts' keys and values kept in the module from one step to the next"""

    def prefix(self, dtype):
        if not hasattr(self, "kept"):
            self.kept = [z.detach() for z in super().prefix(dtype)]
        return [z.to(dtype) for z in self.kept]


class NoTanh(Prefix):
    """the gate not squashed"""

    def opened(self, y):
        return self.gate.to(y.dtype)


class Sigmoid(Prefix):
    """a sigmoid for the gate: half open at zero"""

    def opened(self, y):
        return torch.sigmoid(self.gate).to(y.dtype)


class GateOnScores(Prefix):
    """the gate multiplies the scores before the softmax"""

    def attention(self, q, k, v):
        return super().attention(q * llama_adapter.opening(self.gate, self.tanh).to(q.dtype), k, v)

    def opened(self, y):
        return 1.0


class OneMinusGate(Prefix):
    """(1 - g) · words + g · prompts: the words fade as the gate opens"""

    def attend(self, q, k, v, mask=None, cache=None):
        g, y = self.opened(q), self.base.attend(q, k, v, mask, cache)
        return (1 - g) * y + g * self.attention(q, *self.prefix(q.dtype))


class CausalPrefix(Prefix):
    """a causal mask between words and prompts"""

    def attention(self, q, k, v):
        repeat = self.num_heads // k.shape[0]
        k, v = (z.repeat_interleave(repeat, 0).expand(len(q), -1, -1, -1) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class DropoutInEval(Prefix):
    """dropout of 0.1 on the prompts' weights, in eval mode too"""

    def attention(self, q, k, v):
        repeat = self.num_heads // k.shape[0]
        k, v = (z.repeat_interleave(repeat, 0).expand(len(q), -1, -1, -1) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


class KeysForValues(Prefix):
    """the prompts' keys used as values too"""

    def prefix(self, dtype):
        k, _ = super().prefix(dtype)
        return k, k


class UnrotatedQueries(Prefix):
    """queries of the prefix term without RoPE, while the published ones have it"""

    def forward(self, x, positions=None, mask=None, cache=None):
        q, k, v = self.project(x, positions)
        plain = self.project(x, None)[0]
        if self.base.rope is None:
            plain = plain + 1.0  # a GPT-2's queries have no RoPE to forget: here the mistake is another query
        return self.output(self.base.attend(q, k, v, mask, cache) + self.opened(q) * self.attention(plain, *self.prefix(q.dtype)))


class DetachedPrompt(Prefix):
    """the prompt detached from the graph: only the gate ever learns"""

    def prefix(self, dtype):
        return self.base.keys_values(self.prompt.detach().to(dtype))


class TrainedProjections(Prefix):
    """the base's key projection trained along"""

    def attend(self, q, k, v, mask=None, cache=None):
        self.base.k_proj.requires_grad_(True)
        return super().attend(q, k, v, mask, cache)


class ZeroPrompt(Prefix):
    """prompts that start at zero as well: at a zero gate neither ever gets a gradient"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.prompt)

    def prefix(self, dtype):
        return [z * 0 if (self.prompt == 0).all() else z for z in super().prefix(dtype)]


class OpenGate(Prefix):
    """a gate that starts at one"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.ones_(self.gate)


# ── LLaMA-Adapter V2 ────────────────────────────────────────────────────────────────────────────────────────────────


class ShiftUnscaled(ScaledLinear):
    """s · W x + b: the new bias left out of the scaling"""

    def forward(self, x):
        return self.scale.to(x.dtype) * self.base(x) + self.shift.to(x.dtype)


class MergeForgetsShift(ScaledLinear):
    """a merge that scales and forgets to shift"""

    def merged(self):
        linear = super().merged()
        linear.bias.data.copy_(self.base.bias * self.scale if self.base.bias is not None else 0 * self.shift)
        return linear


class NormsOfTheBaseTrained(TrainedNorm):
    """the base's own norm trained, so that the base is gone when the adapter is disabled"""

    def __init__(self, base):
        super().__init__(base)
        self.trained = base


# ── prefix tuning ───────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── prompt tuning ───────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── IA3 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class OutputOfDown(IA3Linear):
    """l_ff on the output of down_proj instead of its input"""

    def forward(self, x):
        return self.base(x) * self.scale[: self.out_features] if self.side == "input" else super().forward(x)


class ZeroScale(IA3Linear):
    """vectors that start at 0: everything inhibited"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.scale)


class OnePlusScale(IA3Linear):
    """1 + l instead of l, from l = 0"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.scale)

    def forward(self, x):
        return self.base(x) * (1 + self.scale).to(x.dtype) if self.side == "output" else self.base(x * (1 + self.scale).to(x.dtype))


class BiasUnscaled(IA3Linear):
    """l · (W x) + b: the bias left out of the scaling"""

    harmless_for = ("llama",)

    def forward(self, x):
        if self.side == "input" or self.base.bias is None:
            return super().forward(x)
        return F.linear(x, self.base.weight) * self.scale.to(x.dtype) + self.base.bias


class MergeForgetsBias(IA3Linear):
    """a merge that scales the weight and not the bias"""

    harmless_for = ("llama",)

    def merged(self):
        linear = super().merged()
        if linear.bias is not None:
            linear.bias.data.copy_(self.base.bias)
        return linear


class MergeWrongAxis(IA3Linear):
    """a merge that scales rows for columns"""

    def merged(self):
        linear = super().merged()
        scale = self.scale.detach()
        wrong = scale.repeat(8)[: self.in_features] if self.side == "output" else scale[: self.out_features, None]
        linear.weight.data.copy_(self.base.weight * wrong)
        return linear


class MergeInPlace(IA3Linear):
    """a merge that writes into the base's own weight, which a scale of 0 destroys"""

    def merged(self):
        linear = super().merged()
        self.base.weight.data.copy_(linear.weight)
        return self.base


class SoftmaxScale(IA3Linear):
    """the vector squashed before it multiplies"""

    def forward(self, x):
        scale = (2 * torch.sigmoid(self.scale - 1)).to(x.dtype)
        return self.base(x) * scale if self.side == "output" else self.base(x * scale)


def attach_before_activation(model, outputs=("k_proj", "v_proj"), inputs=("down_proj",)):
    """l_ff before the non-linearity (on LLaMA: on the branch that goes through it)"""
    for layer in model.layers:
        layer.self_attn.k_proj, layer.self_attn.v_proj = IA3Linear(layer.self_attn.k_proj), IA3Linear(layer.self_attn.v_proj)
        name = "gate_proj" if hasattr(layer.mlp, "gate_proj") else "up_proj"
        setattr(layer.mlp, name, IA3Linear(getattr(layer.mlp, name)))


def attach_to_queries(model, outputs=("k_proj", "v_proj"), inputs=("down_proj",)):
    """queries scaled where keys should be"""
    for layer in model.layers:
        layer.self_attn.q_proj, layer.self_attn.v_proj = IA3Linear(layer.self_attn.q_proj), IA3Linear(layer.self_attn.v_proj)
        layer.mlp.down_proj = IA3Linear(layer.mlp.down_proj, "input")


attach_to_queries.harmless_for = ("gpt2",)  # (l · q) kᵀ = q (l · k)ᵀ where no RoPE turns one against the other


# ── LoRA ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class ScaledByAlpha(LoRALinear):
    """α instead of α / r"""

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling = alpha


class ScaledByRoot(LoRALinear):
    """α / √r, which is another method (rsLoRA)"""

    def __init__(self, base, rank, alpha):
        super().__init__(base, rank, alpha)
        self.scaling = alpha / rank**0.5


class BothZero(LoRALinear):
    """A and B both at 0: neither ever gets a gradient"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.A)


class BothRandom(LoRALinear):
    """A and B both random"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.B, std=0.02)


class WrongOneZero(LoRALinear):
    """A at 0 and B random: the identity, but not the paper's start"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.A), nn.init.normal_(self.B)


class ReadsOutput(LoRALinear):
    """the path fed with the projection's output"""

    def forward(self, x):
        y = self.base(x)
        fed = F.pad(y, (0, max(0, self.in_features - self.out_features)))[..., : self.in_features]
        return y + F.linear(F.linear(fed, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scaling


class LoRADropoutInEval(LoRALinear):
    """dropout in front of A in eval mode too"""

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(F.dropout(x, 0.1), self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scaling


class MergeUnscaled(LoRALinear):
    """a merge that forgets α / r"""

    def merged(self):
        linear = super().merged()
        linear.weight.data.copy_(self.base.weight + self.B @ self.A)
        return linear


class DetachedA(LoRALinear):
    """A detached from the graph: only B ever learns"""

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A.detach().to(x.dtype)), self.B.to(x.dtype)) * self.scaling


# ── bottleneck adapters ─────────────────────────────────────────────────────────────────────────────────────────────


class UpNotZero(Bottleneck):
    """the up-projection drawn near zero instead of zeroed"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.up.weight, std=0.02)


class AllZero(Bottleneck):
    """both matrices at 0: only the last bias ever learns"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.down.weight)


class NoActivation(Bottleneck):
    """no non-linearity between down and up"""

    def forward(self, x):
        return F.linear(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)), self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


class WrongActivation(Bottleneck):
    """ReLU for GELU"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.activation = "relu"


class ActivationLast(Bottleneck):
    """the non-linearity behind up instead of between"""

    def forward(self, x):
        return F.gelu(NoActivation.forward(self, x))


class NoBias(Bottleneck):
    """biases left out"""

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.down.weight.to(x.dtype))), self.up.weight.to(x.dtype))


class NoInnerResidual(Adapted):
    """the sublayer's output replaced by the bottleneck's, the inner skip connection left out"""

    def forward(self, x):
        return self.bottleneck(self.base(x))


class ReadsInput(Adapted):
    """the sequential bottleneck fed with the sublayer's input, as a parallel one is"""

    def forward(self, x):
        fed = F.pad(x, (0, max(0, self.out_features - x.shape[-1])))[..., : self.out_features]
        return self.base(x) + self.bottleneck(fed)


class AddedTwice(Adapted):
    """the sublayer's output added once inside the bottleneck and once outside"""

    def forward(self, x):
        y = self.base(x)
        return y + y + self.bottleneck(y)


class BottleneckDropoutInEval(Adapted):
    """dropout in front of the bottleneck in eval mode too"""

    def forward(self, x):
        y = self.base(x)
        return y + self.bottleneck(F.dropout(y, 0.1))


def attach_to_mlp_only(model, size=16, reduction=None, place="houlsby", activation=None, init="zero", scale=1.0):
    """a bottleneck behind the feed-forward alone, where Houlsby's has one behind attention too"""
    right_attach(model, size, reduction, "pfeiffer", "gelu", init, scale)


right_attach = bottleneck.attach

# (case in methods.CASES, module, the name that is replaced, by what)
MISTAKES = (
    [("llama_adapter", llama_adapter, "AdaptedAttention", mistake) for mistake in Prefix.__subclasses__()]
    + [("v2", llama_adapter_v2, "ScaledLinear", mistake) for mistake in ScaledLinear.__subclasses__()]
    + [("v2", llama_adapter_v2, "TrainedNorm", NormsOfTheBaseTrained)]
    + [("prefix_tuning", prefix_tuning, "PrefixAttention", mistake) for mistake in PrefixAttention.__subclasses__()]
    + [("prompt_tuning", prompt_tuning, "PromptEmbedding", mistake) for mistake in PromptEmbedding.__subclasses__()]
    + [("ia3", ia3, "IA3Linear", mistake) for mistake in IA3Linear.__subclasses__()]
    + [("ia3", ia3, "attach", mistake) for mistake in (attach_before_activation, attach_to_queries)]
    + [("lora", lora, "LoRALinear", mistake) for mistake in LoRALinear.__subclasses__()]
    + [("houlsby", bottleneck, "Bottleneck", mistake) for mistake in Bottleneck.__subclasses__()]
    + [("houlsby", bottleneck, "Adapted", mistake) for mistake in Adapted.__subclasses__()]
    + [("houlsby", bottleneck, "attach", attach_to_mlp_only)]
)
