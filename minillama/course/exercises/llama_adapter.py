"""Lesson 03: zero-init gated prefix attention, and V2's scales and shifts,
with the wrong versions that one writes easily."""

import torch
import torch.nn.functional as F
from torch import nn

from ...adapters import llama_adapter
from ...adapters.llama_adapter import AdaptedAttention
from ...adapters.llama_adapter_v2 import ScaledLinear, TrainedNorm
from ...attention import Attention, RoPE, rotate
from . import Exercise, Question, Wrong, as_function, filled, gradients, moved, named

# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────────────────────


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
    """one softmax over tokens and prompts, the gate outside"""

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
        y = self.output(self.base.attend(q, k, v, mask, cache))
        return y + self.output(self.opened(q) * self.attention(q, *self.prefix(q.dtype)))


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
    """(1 - g) · tokens + g · prompts: the tokens fade as the gate opens"""

    def attend(self, q, k, v, mask=None, cache=None):
        g, y = self.opened(q), self.base.attend(q, k, v, mask, cache)
        return (1 - g) * y + g * self.attention(q, *self.prefix(q.dtype))


class CausalPrefix(Prefix):
    """a causal mask between tokens and prompts"""

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
        y = self.base.attend(q, k, v, mask, cache)
        return self.output(y + self.opened(q) * self.attention(plain, *self.prefix(q.dtype)))


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


class NoGate(Prefix):
    """the prompts' part added whole, without its gate"""

    def opened(self, y):
        return torch.ones_like(self.gate).to(y.dtype) + 0 * self.gate.to(y.dtype)


class JointSoftmax(Prefix):
    """one softmax over prompts and tokens together, as in prefix tuning,
    so that the prompts take a share from the tokens"""

    def attend(self, q, k, v, mask=None, cache=None):
        pk, pv = self.prefix(q.dtype)
        pk, pv = (z.repeat_interleave(self.num_heads // z.shape[0], 0).expand(len(q), -1, -1, -1) for z in (pk, pv))
        if cache is not None:
            k, v = cache.append(k, v)
        k, v = (z.repeat_interleave(self.num_heads // z.shape[1], 1) for z in (k, v))
        T, S = q.shape[2], k.shape[2]
        future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        scores = q @ torch.cat((pk, k), 2).mT / self.head_dim**0.5
        weights = scores.masked_fill(F.pad(future, (pk.shape[2], 0)), -torch.inf).softmax(-1)
        on_prompts, on_words = weights[..., : pk.shape[2]], weights[..., pk.shape[2] :]
        return on_words @ v + self.opened(q) * (on_prompts @ pv)


class SoftmaxOverWords(Prefix):
    """the prompts' softmax taken along the tokens instead of along the prompts"""

    def attention(self, q, k, v):
        k, v = (z.repeat_interleave(self.num_heads // z.shape[0], 0) for z in (k, v))
        return (q @ k.mT / self.head_dim**0.5).softmax(-2) @ v


class ScaledByHeadWidth(Prefix):
    """scores divided by d instead of √d"""

    def attention(self, q, k, v):
        return super().attention(q / self.head_dim**0.5, k, v)


class KeysAndValuesSwapped(Prefix):
    """the prompts' keys and values swapped"""

    def prefix(self, dtype):
        k, v = super().prefix(dtype)
        return v, k


class GateOnTheSum(Prefix):
    """the gate on the whole sum, so that a closed gate silences the tokens too"""

    def attend(self, q, k, v, mask=None, cache=None):
        return self.opened(q) * (self.base.attend(q, k, v, mask, cache) + self.attention(q, *self.prefix(q.dtype)))


class WordsForgotten(Prefix):
    """the tokens' own attention left out"""

    def attend(self, q, k, v, mask=None, cache=None):
        return 0 * self.base.attend(q, k, v, mask, cache) + self.opened(q) * self.attention(q, *self.prefix(q.dtype))


class OpenGate(Prefix):
    """a gate that does not start at 0, so that the model does not start as the base"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.ones_(self.gate)


# ── LLaMA-Adapter V2 ────────────────────────────────────────────────────────────────────────────────────────────────


class ShiftUnscaled(ScaledLinear):
    """s · (W x + b₀) + b: the new shift b left out of the scaling; s · (W x + b₀ + b) is asked"""

    def forward(self, x):
        return self.scale.to(x.dtype) * self.base(x) + self.adapter_bias.to(x.dtype)


class MergeForgetsShift(ScaledLinear):
    """a merge that scales and forgets to shift"""

    @property
    def bias(self):
        return self.base.bias * self.scale if self.base.bias is not None else 0 * self.adapter_bias


class NormsOfTheBaseTrained(TrainedNorm):
    """the base's own norm trained, so that the base is gone when the adapter is disabled"""

    def __init__(self, base):
        super().__init__(base)
        self.trained = base


# ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────────────


def attention_of(draw, heads=6, kv_heads=2, head_dim=8, width=40):
    """A frozen attention with grouped queries, RoPE and biases, heads wider together than the model:
    nothing can hide."""
    return filled(Attention(width, heads, kv_heads, head_dim, RoPE(head_dim), bias=True), draw)


def right_keys_values(attention, prompt):
    return attention.keys_values(prompt)


def keys_rotated(attention, prompt):
    """RoPE on the prompts' keys; prompts stand nowhere in the text, so the paper leaves them unrotated"""
    k, v = attention.keys_values(prompt)
    return rotate(k, *attention.rope(torch.arange(len(prompt)))), v


def heads_cut_wrongly(attention, prompt):
    """the features viewed as (G, K, d) at once, which mixes tokens and heads; view them as (K, G, d), then transpose"""
    k, v = attention.k_proj(prompt), attention.v_proj(prompt)
    return tuple(z.reshape(-1, len(prompt), attention.head_dim) for z in (k, v))


def heads_not_moved(attention, prompt):
    """heads cut but left behind the tokens, (K, G, d); attention wants (G, K, d)"""
    k, v = attention.k_proj(prompt), attention.v_proj(prompt)
    return tuple(z.unflatten(-1, (-1, attention.head_dim)) for z in (k, v))


def heads_not_cut(attention, prompt):
    """keys and values not cut into heads at all"""
    return attention.k_proj(prompt), attention.v_proj(prompt)


def values_from_keys(attention, prompt):
    """the keys' projection used for the values too"""
    k, _ = attention.keys_values(prompt)
    return k, k


def keys_repeated(attention, prompt):
    """the key heads repeated for every query head already here: correct attention later,
    but G heads are what is asked"""
    times = attention.num_heads // attention.num_kv_heads
    return tuple(z.repeat_interleave(times, 0) for z in attention.keys_values(prompt))


def bias_dropped(attention, prompt):
    """the projection's bias left out: call k_proj(prompt), or add its bias to prompt @ weight.T"""
    return tuple(attention.heads(prompt @ projection.weight.T) for projection in (attention.k_proj, attention.v_proj))


def heads_innermost(attention, prompt):
    """the features cut as (d, G) instead of (G, d): the features of one head lie side by side"""
    k, v = attention.k_proj(prompt), attention.v_proj(prompt)
    return tuple(z.unflatten(-1, (attention.head_dim, -1)).permute(2, 0, 1) for z in (k, v))


def probe_keys_values(answer, draw):
    attention, prompt = attention_of(draw), draw(3, 40).requires_grad_()
    pieces = named(("the keys (G, K, d)", "the values (G, K, d)"), answer(attention, prompt))
    yield from pieces
    (_, k), (_, v) = pieces
    yield "the prompt's gradient (K, D)", gradients(k.sum() + 2 * v.sum(), prompt)[0]


def start_of(wrapper):
    """What a wrapper's parameters start from, as a function of K, D and H."""

    def function(K, D, H):
        module = wrapper(Attention(D, H), K)
        return module.prompt.detach(), module.gate.detach()

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def probe_start(answer, draw):
    (_, prompt), (_, gate) = named(("the prompt (K, D)", "the gate (H, 1, 1)"), answer(50, 240, 6))
    for what, value in ("prompt", prompt), ("gate", gate):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise Wrong("shape", f"the {what} should be a tensor of float32")
    for what, value, shape in ("prompt (K, D)", prompt, (50, 240)), ("gate (H, 1, 1)", gate, (6, 1, 1)):
        if value.shape != shape:
            needed = f"needed is {shape} for K = 50, D = 240, H = 6"
            raise Wrong("shape", f"the {what} has shape {tuple(value.shape)}; {needed}")
    yield "the number of gates that are not 0", gate.count_nonzero()
    yield from drawn(prompt)


def drawn(prompt):
    """Pairs for a probe: mean and standard deviation of random numbers,
    exactly 0 and 1 where they are those of N(0, 1) to a tenth."""
    numbers = prompt.detach().double()
    mean, deviation = numbers.mean().item(), numbers.std().item()
    if deviation and ((numbers - mean) / deviation).pow(4).mean() < 2.1:  # 1.8 of uniform numbers, 3 of normal ones
        uniform = "the prompt's numbers are uniform, as torch.rand draws them"
        raise Wrong("value", f"{uniform}; needed are normal ones, N(0, 1), from torch.randn")
    for what, value, needed in (("the prompt's mean", mean, 0.0), ("the prompt's standard deviation", deviation, 1.0)):
        yield what, torch.tensor(needed if abs(value - needed) < 0.1 else round(value, 1 if abs(value) > 0.3 else 2))


def small_prompt(K, D, H):
    """a prompt drawn small, from N(0, 0.02²), where the paper's code and its peers draw from N(0, 1)"""
    return 0.02 * torch.randn(K, D), torch.zeros(H, 1, 1)


def uniform_prompt(K, D, H):
    """uniform numbers, as torch.rand draws them; needed are normal ones, N(0, 1), from torch.randn"""
    return torch.rand(K, D), torch.zeros(H, 1, 1)


def wrong_one_zero(K, D, H):
    """the prompt at 0 and the gate not: the other one is to be 0"""
    return torch.zeros(K, D), torch.ones(H, 1, 1)


def probe_prefix(answer, draw):
    attention, positions = attention_of(draw), torch.arange(4, 9)
    x, prompt, gate = draw(2, 5, 40), draw(3, 40).requires_grad_(), draw(6, 1, 1).requires_grad_()
    out = answer(attention, x, positions, prompt, gate)
    yield "the output (B, T, D)", out
    of_prompt, of_gate = gradients(out, prompt, gate)
    yield "the prompt's gradient (K, D)", of_prompt
    yield "the gate's gradient (H, 1, 1)", of_gate
    yield (
        "the base's weights that train (none should)",
        torch.tensor(sum(p.requires_grad for p in attention.parameters())),
    )
    attention.requires_grad_(False)
    yield "the output after the prompt has changed (B, T, D)", answer(attention, x, positions, prompt + 1, gate)
    yield "the output at gate 0 (B, T, D)", answer(attention, x, positions, prompt, gate * 0)
    yield "the output in bfloat16 (B, T, D)", answer(attention.bfloat16(), x.bfloat16(), positions, prompt, gate)


def right_circulating(attention, prompt_length):
    return AdaptedAttention(attention, prompt_length, gate="layer", tanh=False)


class Circulating(nn.Module):
    """Right, in pieces that the faults below replace: prompt tokens looked up in an embedding, one gate a layer,
    no tanh."""

    def __init__(self, attention, prompt_length):
        super().__init__()
        self.base, self.prompt_length = attention, prompt_length
        self.prompt = nn.Parameter(torch.randn(prompt_length, attention.width))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, positions=None):
        q, k, v = self.base.project(x, positions)
        return self.base.output(self.base.attend(q, k, v) + self.term(q))

    def term(self, q):
        k, v = self.base.keys_values(self.prompt.to(q.dtype))
        return self.gate.to(q.dtype) * llama_adapter.prefix_attention(q, k, v)


class KeysNotCut(Circulating):
    """the prompts' keys not cut into heads, so that queries and keys do not fit"""

    def term(self, q):
        k, v = self.base.k_proj(self.prompt), self.base.v_proj(self.prompt)
        return self.gate * ((q @ k.transpose(2, 3) / self.base.head_dim**0.5).softmax(-1) @ v)


class HeadsReadAtOnce(Circulating):
    """the features viewed as (G, K, d) at once, which mixes tokens and heads; view them as (K, G, d), then transpose"""

    def term(self, q):
        k, v = self.base.k_proj(self.prompt), self.base.v_proj(self.prompt)
        k, v = (z.reshape(-1, len(z), self.base.head_dim) for z in (k, v))
        return self.gate * llama_adapter.prefix_attention(q, k, v)


class NeverProjected(Circulating):
    """the prefix term added behind the output projection, which it never meets"""

    def forward(self, x, positions=None):
        q, k, v = self.base.project(x, positions)
        term = self.term(q).transpose(1, 2).flatten(2)
        return self.base.output(self.base.attend(q, k, v)) + F.pad(term, (0, x.shape[-1]))[..., : x.shape[-1]]


class LengthFromTheHeads(Circulating):
    """the number of tokens read from the axis of the heads"""

    def term(self, q):
        k, v = self.base.keys_values(self.prompt.to(q.dtype))
        tokens = q.shape[1]
        y = llama_adapter.prefix_attention(q[:, :, :tokens], k, v)[:, :, :tokens]
        return self.gate.to(q.dtype) * y.reshape(len(q), tokens, q.shape[1], -1).transpose(1, 2)


class ProjectedByItself(Circulating):
    """the term sent through the output projection by itself, so that its bias is added twice;
    add the term before one projection"""

    def forward(self, x, positions=None):
        return self.base(x, positions) + self.base.output(self.term(self.base.project(x, positions)[0]))


class Squashed(Circulating):
    """a tanh on the gate, which was asked for without"""

    def term(self, q):
        return super().term(q) * (self.gate.tanh() / self.gate.where(self.gate != 0, torch.ones(()))).to(q.dtype)


class RepeatedInTurn(Circulating):
    """grouped key heads repeated as a b a b a b instead of a a a b b b: repeat_interleave, not repeat"""

    def term(self, q):
        k, v = (z.repeat(q.shape[1] // z.shape[0], 1, 1) for z in self.base.keys_values(self.prompt))
        return self.gate * llama_adapter.prefix_attention(q, k, v)


class NotScaled(Circulating):
    """scores not divided by √d"""

    def term(self, q):
        return super().term(q * self.base.head_dim**0.5)


class Exchanged(Circulating):
    """the prompts' keys and values swapped"""

    def term(self, q):
        k, v = self.base.keys_values(self.prompt)
        return self.gate * llama_adapter.prefix_attention(q, v, k)


class StartsOpen(Circulating):
    """a gate that does not start at 0"""

    def __init__(self, attention, prompt_length):
        super().__init__(attention, prompt_length)
        nn.init.ones_(self.gate)


class BaseTrained(Circulating):
    """the base's weights trained along: they stay frozen"""

    def __init__(self, attention, prompt_length):
        super().__init__(attention, prompt_length)
        self.base.requires_grad_(True)


class BatchFixed(Circulating):
    """a batch size fixed at construction, so that another batch does not fit"""

    batch_size = 2

    def term(self, q):
        return super().term(q) * torch.ones(self.batch_size, 1, 1, 1)


class LeftBehind(Circulating):
    """the ids of the prompt tokens in a plain tensor, which stays behind when the module moves to another device;
    register_buffer takes it along"""

    def __init__(self, attention, prompt_length):
        super().__init__(attention, prompt_length)
        self.tokens = torch.arange(prompt_length)


def probe_circulating(answer, draw):
    attention, positions, x = attention_of(draw), torch.arange(5), draw(2, 5, 40)
    module = answer(attention, 50)
    theirs = set(map(id, attention.parameters()))
    every = module.named_parameters() if isinstance(module, nn.Module) else ()
    own = {name: p for name, p in every if id(p) not in theirs}
    prompts = [name for name, p in own.items() if tuple(p.shape) == (50, 40)]
    gates = [name for name, p in own.items() if p.numel() == 1]
    if len(prompts) != 1 or len(gates) != 1 or len(own) != 2:
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        raise Wrong(
            "shape",
            "needed is a module with two trained parameters of its own, a prompt of shape (50, 40) for prompt_length "
            f"50 and width 40, and a gate of one number; it has {shapes or 'none'}",
        )
    yield "the gate at the start (1)", own[gates[0]].detach().flatten()
    yield from drawn(own[prompts[0]])
    yield (
        "the base's weights that train (none should)",
        torch.tensor(sum(p.requires_grad for p in attention.parameters())),
    )
    attention.requires_grad_(False)
    yield "the fresh module's output: the base's (B, T, D)", module(x, positions)
    values = {prompts[0]: draw(50, 40).requires_grad_(), gates[0]: draw(1).view(own[gates[0]].shape).requires_grad_()}
    out = torch.func.functional_call(module, values, (x, positions))
    yield "the output with an open gate (B, T, D)", out
    yield "the prompt's gradient (K, D)", gradients(out, values[prompts[0]])[0]
    out = torch.func.functional_call(module, values, (draw(3, 5, 40), positions))
    yield "the output for a batch of three (B, T, D)", out
    plain = [name for part in module.modules() for name, value in vars(part).items() if isinstance(value, torch.Tensor)]
    yield "the number of tensors that a move to another device leaves behind", torch.tensor(len(plain))


class Flow(nn.Module):
    """Right, in pieces that the faults below replace: a whole layer of its own, query, key and value in one matrix."""

    gate_size = "feature"

    def __init__(self, width, num_heads, prompt_length):
        super().__init__()
        self.num_heads = num_heads
        self.prompt = nn.Parameter(torch.randn(prompt_length, width))
        self.gate = nn.Parameter(torch.zeros(1, width))
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def heads(self, z):
        return z.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def join(self, y):
        return y.transpose(1, 2).flatten(2)

    def tokens(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def prefix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1))

    def forward(self, x):
        q, k, v = map(self.heads, self.c_attn(x).chunk(3, -1))
        _, pk, pv = map(self.heads, self.c_attn(self.prompt).chunk(3, -1))
        return self.c_proj(self.join(self.tokens(q, k, v)) + self.gate * self.join(self.prefix(q, pk, pv)))


class NotInHeads(Flow):
    """nothing cut into heads: one attention over the whole width, divided by √D"""

    def heads(self, z):
        return z.unsqueeze(-3)


class MaskedPrefix(Flow):
    """the tokens' causal mask used for the prefix too, which every token should see whole"""

    def prefix(self, q, k, v):
        k, v = (z.expand(len(q), -1, -1, -1) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class DropoutAlways(Flow):
    """dropout of 0.1 in eval mode too; ask for it only while `self.training`"""

    def tokens(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)


class ProjectionThreeWide(Flow):
    """an output projection three times as wide as the model"""

    def __init__(self, width, num_heads, prompt_length):
        super().__init__(width, num_heads, prompt_length)
        self.c_proj = nn.Linear(width, 3 * width, bias=False)


class GateBehindProjection(Flow):
    """the gate behind the output projection instead of before it"""

    def forward(self, x):
        q, k, v = map(self.heads, self.c_attn(x).chunk(3, -1))
        _, pk, pv = map(self.heads, self.c_attn(self.prompt).chunk(3, -1))
        return self.c_proj(self.join(self.tokens(q, k, v))) + self.gate * self.c_proj(self.join(self.prefix(q, pk, pv)))


class MixedHeads(Flow):
    """the features viewed as (heads, T, d) at once, which mixes tokens and heads;
    view them as (T, heads, d), then transpose"""

    def heads(self, z):
        return z.reshape(*z.shape[:-2], self.num_heads, z.shape[-2], -1)


class JoinedWrongly(Flow):
    """the heads joined without moving them behind the tokens again first: transpose(1, 2), then flatten(2)"""

    def join(self, y):
        return y.reshape(y.shape[0], y.shape[2], -1)


class OtherOrder(Flow):
    """key, query and value for query, key and value: c_attn holds them in this last order"""

    def forward(self, x):
        k, q, v = map(self.heads, self.c_attn(x).chunk(3, -1))
        pk, _, pv = map(self.heads, self.c_attn(self.prompt).chunk(3, -1))
        return self.c_proj(self.join(self.tokens(q, k, v)) + self.gate * self.join(self.prefix(q, pk, pv)))


class QueryForKey(Flow):
    """the prompt's query taken for its key"""

    def forward(self, x):
        q, k, v = map(self.heads, self.c_attn(x).chunk(3, -1))
        pk, _, pv = map(self.heads, self.c_attn(self.prompt).chunk(3, -1))
        return self.c_proj(self.join(self.tokens(q, k, v)) + self.gate * self.join(self.prefix(q, pk, pv)))


class SquashedGate(Flow):
    """a tanh on the gate, which was asked for without"""

    def forward(self, x):
        q, k, v = map(self.heads, self.c_attn(x).chunk(3, -1))
        _, pk, pv = map(self.heads, self.c_attn(self.prompt).chunk(3, -1))
        return self.c_proj(self.join(self.tokens(q, k, v)) + self.gate.tanh() * self.join(self.prefix(q, pk, pv)))


class GateForgotten(Flow):
    """the gate left out: it never multiplies the prefix part"""

    def forward(self, x):
        q, k, v = map(self.heads, self.c_attn(x).chunk(3, -1))
        _, pk, pv = map(self.heads, self.c_attn(self.prompt).chunk(3, -1))
        return self.c_proj(self.join(self.tokens(q, k, v)) + self.join(self.prefix(q, pk, pv)))


class GateAtOne(Flow):
    """a gate that does not start at 0"""

    def __init__(self, width, num_heads, prompt_length):
        super().__init__(width, num_heads, prompt_length)
        nn.init.ones_(self.gate)


class PromptAtZero(Flow):
    """a prompt that starts at 0 behind a gate at 0: neither ever gets a gradient"""

    def __init__(self, width, num_heads, prompt_length):
        super().__init__(width, num_heads, prompt_length)
        nn.init.zeros_(self.prompt)


class PromptDetached(Flow):
    """the prompt cut off from the graph, so that it never learns"""

    def forward(self, x):
        q, k, v = map(self.heads, self.c_attn(x).chunk(3, -1))
        _, pk, pv = map(self.heads, self.c_attn(self.prompt.detach()).chunk(3, -1))
        return self.c_proj(self.join(self.tokens(q, k, v)) + self.gate * self.join(self.prefix(q, pk, pv)))


class NotCausal(Flow):
    """no causal mask between the tokens: each sees those behind it"""

    def tokens(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def probe_flow(answer, draw):
    module = answer(24, 4, 50)
    if not isinstance(module, nn.Module):
        raise Wrong("shape", f"needed is a module; it is a {type(module).__name__}")
    shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in module.named_parameters()}
    needed = {"prompt": (50, 24), "gate": (1, 24), "c_attn": (72, 24)}
    if set(shapes) != {*needed, "c_proj"} or any(shapes[name] != shape for name, shape in needed.items()):
        needs = f"needed are the parameters {needed} and c_proj, without biases, for width 24 and prompt_length 50"
        raise Wrong("shape", f"{needs}; it has {shapes}")
    module.eval()
    own = {name.removesuffix(".weight"): (name, p) for name, p in module.named_parameters()}
    yield "the number of gates that are not 0 at the start", own["gate"][1].count_nonzero()
    yield from drawn(own["prompt"][1])
    values = {
        name: (draw(*p.shape) * (24**-0.5 if short.startswith("c_") else 1)).requires_grad_()
        for short, (name, p) in sorted(own.items())
    }
    x = draw(2, 5, 24)
    out = torch.func.functional_call(module, values, (x,))
    yield "the output (B, T, D)", out
    names = [own[short][0] for short in ("prompt", "gate", "c_attn", "c_proj")]
    for name, gradient in zip(("prompt (K, D)", "gate", "c_attn", "c_proj"), gradients(out, *map(values.get, names))):
        yield f"the gradient of {name}", gradient
    closed = {**values, names[1]: values[names[1]] * 0}
    yield "the output at gate 0 (B, T, D)", torch.func.functional_call(module, closed, (x,))


def scale_plus_one(linear, x, scale, shift):
    """1 + s for s: the scale starts at 1, not at 0"""
    return (1 + scale).to(x.dtype) * (linear(x) + shift.to(x.dtype))


def own_bias_unscaled(linear, x, scale, shift):
    """s · (W x + b) + b₀: the layer's own bias b₀ left out of the scaling"""
    return scale.to(x.dtype) * (x @ linear.weight.T + shift.to(x.dtype)) + linear.bias


def own_bias_dropped(linear, x, scale, shift):
    """s · (W x + b): the layer's own bias b₀ left out; linear(x) has it"""
    return scale.to(x.dtype) * (x @ linear.weight.T + shift.to(x.dtype))


def own_bias_dropped_shift_unscaled(linear, x, scale, shift):
    """s · W x + b: the layer's own bias b₀ left out, and the shift b left out of the scaling"""
    return scale.to(x.dtype) * (x @ linear.weight.T) + shift.to(x.dtype)


def both_biases_unscaled(linear, x, scale, shift):
    """s · W x + b₀ + b: both biases left out of the scaling"""
    return scale.to(x.dtype) * (x @ linear.weight.T) + linear.bias + shift.to(x.dtype)


def shift_forgotten(linear, x, scale, shift):
    """s · (W x + b₀): the shift b left out"""
    return scale.to(x.dtype) * linear(x)


def merge_shift_unscaled(linear, scale, shift):
    """s · b₀ + b: the shift left out of the scaling"""
    return linear.weight * scale[:, None], linear.bias * scale + shift


def merge_in_place(linear, scale, shift):
    """the base's own weight and bias overwritten: make new ones"""
    with torch.no_grad():
        linear.weight.mul_(scale[:, None]), linear.bias.add_(shift).mul_(scale)
    return linear.weight, linear.bias


def base_norm_trained(norm):
    return NormsOfTheBaseTrained(norm).requires_grad_(True)


base_norm_trained.__doc__ = NormsOfTheBaseTrained.__doc__


def copy_stays_frozen(norm):
    """a copy as frozen as the original: call requires_grad_(True) on it"""
    return TrainedNorm(norm).requires_grad_(False)


def original_trained_too(norm):
    """the frozen norm's own two tensors made trainable along with the copy's: requires_grad_(True) on the copy alone"""
    return TrainedNorm(norm).requires_grad_(True)


class AlwaysTrained(TrainedNorm):
    """`active` not looked at: with it False the frozen norm is to answer"""

    def forward(self, x):
        return self.trained(x)


def probe_scaled(answer, draw):
    linear = filled(nn.Linear(10, 7), draw)
    x, scale, shift = draw(2, 5, 10), draw(7).requires_grad_(), draw(7).requires_grad_()
    out = answer(linear, x, scale, shift)
    yield "the output (B, T, D)", out
    for what, gradient in zip(("scale", "shift"), gradients(out, scale, shift)):
        yield f"the gradient of {what} (out)", gradient
    yield "the output in bfloat16 (B, T, D)", answer(linear.bfloat16(), x.bfloat16(), scale, shift)


def probe_merge(answer, draw):
    linear, scale, shift = filled(nn.Linear(10, 7), draw), draw(7), draw(7)
    pieces = named(("the merged weight (out, in)", "the merged bias (out)"), answer(linear, scale, shift))
    yield "the base's own weight, untouched (out, in)", linear.weight
    yield "the base's own bias, untouched (out)", linear.bias
    yield from pieces


def probe_norm(answer, draw):
    norm = filled(nn.LayerNorm(8), draw)
    x = draw(2, 5, 8)
    module = answer(norm)
    if not isinstance(module, nn.Module) or not hasattr(module, "active"):
        raise Wrong("shape", "needed is a module with an attribute `active`, True at first")
    yield "the fresh module's output (B, T, D)", module(x)
    trained = [p for p in module.parameters() if p.requires_grad]
    yield "the number of trained tensors", torch.tensor(len(trained))
    with torch.no_grad():
        for p in trained:
            p += 1
    yield "the trained module's output (B, T, D)", module(x)
    module.active = False
    yield "the output with `active` False: the base's (B, T, D)", module(x)
    yield "the frozen norm's own output, as before (B, T, D)", norm(x)


def merged_by(wrapper):
    """A wrapper's merge as a function that returns weight and bias."""

    def function(linear, scale, shift):
        module = wrapper(linear)
        module.scale.data.copy_(scale), module.adapter_bias.data.copy_(shift)
        return module.weight.detach(), module.bias.detach()

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


PREFIXES = tuple(mistake for mistake in Prefix.__subclasses__() if mistake not in (ZeroPrompt, OpenGate))
own_length = lambda prompt, gate: len(prompt)  # noqa: E731

EXERCISES = {
    "prefix_keys_values": Exercise(
        "prefix_keys_values(attention, prompt) -> keys (G, K, d), values (G, K, d)", right_keys_values,
        (keys_rotated, heads_cut_wrongly, heads_not_moved, heads_not_cut, heads_innermost, bias_dropped,
         values_from_keys, keys_repeated), probe_keys_values,
    ),
    "initial_values": Exercise(
        "initial_values(K, D, H) -> prompt (K, D), gate (H, 1, 1)", start_of(AdaptedAttention),
        (start_of(ZeroPrompt), start_of(OpenGate), small_prompt, uniform_prompt, wrong_one_zero), probe_start,
    ),
    "gated_prefix_attention": Exercise(
        "gated_prefix_attention(attention, x, positions, prompt, gate) -> (B, T, D)",
        as_function(AdaptedAttention, own_length, names=("prompt", "gate")),
        tuple(as_function(mistake, own_length, names=("prompt", "gate")) for mistake in PREFIXES), probe_prefix,
    ),
    "adaption_prompt_layer": Exercise(
        "a class: AdaptionPromptLayer(attention, prompt_length), called as layer(x, positions) -> (B, T, D)",
        right_circulating, tuple(Circulating.__subclasses__()), probe_circulating,
    ),
    "prefix_layer": Exercise(
        "a class: PrefixLayer(width, num_heads, prompt_length), called as layer(x) -> (B, T, D)", Flow,
        tuple(Flow.__subclasses__()), probe_flow,
    ),
    "scaled_linear": Exercise(
        "scaled_linear(linear, x, scale, shift) -> (B, T, out)",
        as_function(ScaledLinear, names=("scale", "adapter_bias")),
        (as_function(ShiftUnscaled, names=("scale", "adapter_bias")), scale_plus_one, own_bias_unscaled,
         own_bias_dropped, own_bias_dropped_shift_unscaled, both_biases_unscaled, shift_forgotten), probe_scaled,
    ),
    "scaled_merge": Exercise(
        "scaled_merge(linear, scale, shift) -> weight (out, in), bias (out)", merged_by(ScaledLinear),
        (merged_by(MergeForgetsShift), merge_shift_unscaled, merge_in_place), probe_merge,
    ),
    "trained_norm": Exercise(
        "a class: TrainedNorm(norm), a module with `active`, called as module(x) -> (B, T, D)", TrainedNorm,
        (base_norm_trained, original_trained_too, copy_stays_frozen, AlwaysTrained), probe_norm,
    ),
    "moves_first": Question(
        moved("llama_adapter", prompt_length=3, steps=1),
        "At gate 0 the prompt's gradient carries the factor tanh(0) = 0, the gate's does not.",
        {frozenset(["gate", "prompt"]): "look again at what multiplies the prompt's gradient: the gate, and it is 0.",
         frozenset(["prompt"]): "the other way round: the prompt's gradient carries the gate as a factor, and it is 0.",
         frozenset(): "one of the two does move: the gate's gradient does not carry the gate."},
        ("gate", "prompt"),
    ),
    "moves_second": Question(
        moved("llama_adapter", prompt_length=3, steps=2),
        "After one step the gate is open, and the prompt feels the loss.",
        {frozenset(["gate"]): "the gate is no longer 0: does the prompt's gradient still vanish?",
         frozenset(["prompt"]): "the gate moved in the first step; is there anything that holds it in the second?",
         frozenset(): "at least the gate moved in the first step, and what has moved counts."},
        ("gate", "prompt"),
    ),
}  # fmt: skip
