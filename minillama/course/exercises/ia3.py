"""Lesson 04: IA3, with the wrong versions that one writes easily."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from ...adapters import ia3
from ...adapters.ia3 import SIDES, IA3Linear
from ...attention import RoPE, rotate
from ...gpt2 import GPT2, GPT2Config
from ...llama import Layer as LLaMALayer
from ...llama import LLaMA, LLaMAConfig
from . import Exercise, Question, Wrong, close, filled, gradients, named, planted

# ── the catalogue ─────────────────────────────────────────────────────────────────────────────────────────────────────


class OutputOfDown(IA3Linear):
    """l_ff, side "input", on the output of down_proj instead of its input;
    it multiplies the hidden features before down_proj mixes them"""

    def forward(self, x):
        return self.base(x) * self.scale[: self.out_features] if self.side == "input" else super().forward(x)


class ZeroScale(IA3Linear):
    """vectors that start at 0: keys, values and hidden features all silenced; x · 1 is x, so they start at 1"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.scale)


class OnePlusScale(IA3Linear):
    """1 + l instead of l, from l = 0; IA3's vector is itself the factor and starts at 1"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.scale)

    def forward(self, x):
        scale = (1 + self.scale).to(x.dtype)
        return self.base(x) * scale if self.side == "output" else self.base(x * scale)


class BiasUnscaled(IA3Linear):
    """l · (W x) + b: the bias left out of the scaling; l multiplies all that leaves the projection, l · (W x + b)"""

    harmless_for = ("llama",)

    def forward(self, x):
        if self.side == "input" or self.base.bias is None:
            return super().forward(x)
        return F.linear(x, self.base.weight) * self.scale.to(x.dtype) + self.base.bias


class MergeForgetsBias(IA3Linear):
    """a merge that scales the weight and not the bias; l · (W x + b) = diag(l) W x + l · b"""

    harmless_for = ("llama",)

    @property
    def bias(self):
        return self.base.bias


class MergeWrongAxis(IA3Linear):
    """a merge that scales rows for columns; a row of the weight makes an output feature (scale[:, None]),
    a column meets an input feature (scale)"""

    @property
    def weight(self):
        scale = self.scale.detach()
        wrong = scale.repeat(8)[: self.in_features] if self.side == "output" else scale[: self.out_features, None]
        return self.base.weight * wrong


class MergeInPlace(IA3Linear):
    """a merge that writes into the base's own weight, which a scale of 0 destroys; make a new weight"""

    @property
    def weight(self):
        self.base.weight.data.copy_(super().weight)
        return self.base.weight


class SoftmaxScale(IA3Linear):
    """the vector squashed before it multiplies; it is a plain factor, which may grow beyond 2 or fall below 0"""

    def forward(self, x):
        scale = (2 * torch.sigmoid(self.scale - 1)).to(x.dtype)
        return self.base(x) * scale if self.side == "output" else self.base(x * scale)


def attach_before_activation(model, outputs=("k_proj", "v_proj"), inputs=("down_proj",)):
    """l_ff before the non-linearity (on LLaMA: on the branch that goes through it);
    it multiplies the hidden activation, behind it"""
    for layer in model.layers:
        layer.self_attn.k_proj = IA3Linear(layer.self_attn.k_proj)
        layer.self_attn.v_proj = IA3Linear(layer.self_attn.v_proj)
        name = "gate_proj" if hasattr(layer.mlp, "gate_proj") else "up_proj"
        setattr(layer.mlp, name, IA3Linear(getattr(layer.mlp, name)))


def attach_to_queries(model, outputs=("k_proj", "v_proj"), inputs=("down_proj",)):
    """queries scaled where keys should be; with RoPE between projection and score the two differ"""
    for layer in model.layers:
        layer.self_attn.q_proj = IA3Linear(layer.self_attn.q_proj)
        layer.self_attn.v_proj = IA3Linear(layer.self_attn.v_proj)
        layer.mlp.down_proj = IA3Linear(layer.mlp.down_proj, "input")


attach_to_queries.harmless_for = ("gpt2",)  # (l · q) kᵀ = q (l · k)ᵀ where no RoPE turns one against the other


# ── what is asked ─────────────────────────────────────────────────────────────────────────────────────────────────────


def right_linear(linear, x, scale, side):
    scale = scale.to(x.dtype)
    return linear(x) * scale if side == "output" else linear(x * scale)


def linear_by(wrapper):
    """A wrapper as a function (linear, x, scale, side)."""

    def function(linear, x, scale, side):
        return torch.func.functional_call(wrapper(linear, side), {"scale": scale}, (x,))

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def sides_swapped(linear, x, scale, side):
    """the sides swapped: "output" multiplies what comes out of the projection, "input" what goes into it"""
    return right_linear(linear, x, scale, "input" if side == "output" else "output")


def always_the_input(linear, x, scale, side):
    """the input multiplied on both sides;
    with side "output" it is what comes out of the projection that is multiplied"""
    return linear(x * scale.to(x.dtype))


def always_the_output(linear, x, scale, side):
    """what comes out multiplied on both sides;
    with side "input" it is what goes into the projection that is multiplied"""
    return linear(x) * scale.to(x.dtype)


def vector_unused(linear, x, scale, side):
    """the projection alone: the vector multiplies nothing"""
    return linear(x)


def projection_left_out(linear, x, scale, side):
    """x multiplied and not projected: linear(…) is called on both sides,
    and the side says whether what goes in or what comes out is multiplied"""
    return x * scale.to(x.dtype)


def bias_dropped(linear, x, scale, side):
    """the projection's bias dropped on the input side: W (l · x) + b keeps it;
    call linear(…), which adds it, not its weight alone"""
    scale = scale.to(x.dtype)
    return linear(x) * scale if side == "output" else F.linear(x * scale, linear.weight)


def biases_dropped(linear, x, scale, side):
    """the projection's bias dropped on both sides; call linear(…), which adds it, not its weight alone"""
    scale = scale.to(x.dtype)
    return F.linear(x, linear.weight) * scale if side == "output" else F.linear(x * scale, linear.weight)


def weight_scaled_in_place(linear, x, scale, side):
    """the projection's own weight multiplied in place: the base is frozen, and the next call would multiply it again;
    multiply what goes in or what comes out, and leave weight and bias as they are"""
    linear.weight.data.mul_(scale[:, None] if side == "output" else scale)
    return linear(x)


def scale_added(linear, x, scale, side):
    """the vector added; IA3 multiplies"""
    return linear(x) + scale.to(x.dtype) if side == "output" else linear(x + scale.to(x.dtype))


def weight_not_transposed(linear, x, scale, side):
    """x @ weight; torch's Linear keeps its weight as (out, in) and computes x @ weight.T"""
    scale = scale.to(x.dtype)
    return (x @ linear.weight + linear.bias) * scale if side == "output" else (x * scale) @ linear.weight + linear.bias


def vector_squashed(linear, x, scale, side):
    """the vector squashed by tanh; IA3's may grow beyond 1 and fall below 0, and 1 must stay 1"""
    return right_linear(linear, x, torch.tanh(scale), side)


def scaled_twice(linear, x, scale, side):
    """input and output both multiplied; the side says which of the two"""
    return linear(x * scale.to(x.dtype)) * scale.to(x.dtype)


def not_cast(linear, x, scale, side):
    """the float32 vector multiplied as it is, so that a bfloat16 model's activations become float32:
    cast it to the dtype of x first"""
    return linear(x) * scale if side == "output" else linear(x * scale)


def detached_vector(linear, x, scale, side):
    """the vector detached from the graph: it never gets a gradient, and nothing is learned"""
    return right_linear(linear, x, scale.detach(), side)


def leaving(answer, module, *arguments):
    """The answer called on a frozen module, whose own weights it must leave as they are."""
    before = copy.deepcopy(module.state_dict())
    out = answer(module, *arguments)
    if not all(torch.equal(value, before[name]) for name, value in module.state_dict().items()):
        changes = "it changes the base's own weights, which are frozen"
        raise Wrong("in place", f"{changes}: multiply what flows and leave the weights as they are.")
    return out


def probe_linear(answer, draw):
    # as many in as out: what is on the wrong side runs too
    square, x, scale = filled(nn.Linear(10, 10), draw), draw(2, 5, 10), draw(10)
    outs = [leaving(answer, square, x, scale, side) for side in SIDES]
    for side, out in zip(SIDES, outs):
        yield f'the output with side "{side}" (B, T, out)', out
    if not all(close(out, right_linear(square, x, scale, side)) for side, out in zip(SIDES, outs)):
        return
    linear = filled(nn.Linear(10, 7), draw)
    for side, features in (("output", 7), ("input", 10)):
        scale = draw(features).requires_grad_()
        out = answer(linear, x, scale, side)
        yield "the output of 10 features in and 7 out (B, T, out)", out
        yield "the gradient of scale (features)", gradients(out, scale)[0]
        yield "the output at a scale of 1: the base's (B, T, out)", answer(linear, x, torch.ones(features), side)
        half = filled(nn.Linear(10, 7), draw).bfloat16()
        yield "the output in bfloat16 (B, T, out)", answer(half, x.bfloat16(), scale, side)
        linear = filled(nn.Linear(10, 7), draw)


def right_start(linear, side):
    return IA3Linear(linear, side).scale.detach()


def start_by(wrapper):
    """What a wrapper's vector starts from, as a function (linear, side)."""

    def function(linear, side):
        return wrapper(linear, side).scale.detach()

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def start_near_one(linear, side):
    """1 with a little noise, N(1, 0.02): near the base, not the base; exact ones cost nothing"""
    return 1 + 0.02 * torch.randn(linear.out_features if side == "output" else linear.in_features)


def start_normal(linear, side):
    """N(0, 1), as a weight would start: the model is wrecked before the first step; x · 1 is x, so start at 1"""
    return torch.randn(linear.out_features if side == "output" else linear.in_features)


def start_other_side(linear, side):
    """as many numbers as the other side has features: out_features for "output", in_features for "input\""""
    return torch.ones(linear.in_features if side == "output" else linear.out_features)


def start_one_number(linear, side):
    """a single number for the whole projection; IA3 has one for each feature"""
    return torch.ones(1)


def start_in_the_bases_dtype(linear, side):
    """ones in the base's bfloat16, whose next number above 1 is 1.0078: small steps are rounded away;
    keep the vector in float32"""
    return torch.ones(linear.out_features if side == "output" else linear.in_features, dtype=linear.weight.dtype)


def probe_start(answer, draw):
    linear = filled(nn.Linear(10, 7), draw).bfloat16()
    for side in SIDES:
        scale = answer(linear, side)
        yield f'the vector for side "{side}" (features)', scale


def right_merge(linear, scale, side):
    module = IA3Linear(linear, side)
    module.scale.data.copy_(scale)
    return module.weight.detach(), module.bias.detach()


def merge_by(wrapper):
    """A wrapper's merge as a function (linear, scale, side) that returns weight and bias."""

    def function(linear, scale, side):
        module = wrapper(linear, side)
        module.scale.data.copy_(scale)
        return module.weight.detach(), module.bias.detach()

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def merge_scales_both_biases(linear, scale, side):
    """the bias scaled on the input side too; W (l · x) + b has its b outside"""
    weight, _ = right_merge(linear, scale, side)
    return weight, linear.bias * scale


def merge_columns_always(linear, scale, side):
    """columns scaled on both sides; a row of the weight makes an output feature, so side "output" scales rows:
    scale[:, None]"""
    return linear.weight * scale, linear.bias * scale if side == "output" else linear.bias


def merge_rows_always(linear, scale, side):
    """rows scaled on both sides; a column of the weight meets an input feature, so side "input" scales columns"""
    return linear.weight * scale[:, None], linear.bias * scale if side == "output" else linear.bias


def merge_side_ignored(linear, scale, side):
    """rows scaled on both sides, and the bias on neither; side "output" scales rows and bias,
    side "input" columns and no bias"""
    return linear.weight * scale[:, None], linear.bias


def merge_biases_swapped(linear, scale, side):
    """the bias scaled on the wrong side: l · (W x + b) holds it, W (l · x) + b does not"""
    weight, _ = right_merge(linear, scale, side)
    return weight, linear.bias if side == "output" else linear.bias * scale


def merge_sides_swapped(linear, scale, side):
    """the sides swapped: "output" scales rows (scale[:, None]) and the bias,
    "input" scales columns (scale) and no bias"""
    return right_merge(linear, scale, "input" if side == "output" else "output")


def merge_one_plus(linear, scale, side):
    """1 + l instead of l; IA3's vector is itself the factor and starts at 1"""
    return right_merge(linear, 1 + scale, side)


def merge_divided(linear, scale, side):
    """divided by the vector, which undoes a merge; to merge, multiply"""
    return right_merge(linear, 1 / scale, side)


def merge_divided_bias_kept(linear, scale, side):
    """divided by the vector, which undoes a merge; to merge, multiply, and on the output side the bias too"""
    weight, _ = right_merge(linear, 1 / scale, side)
    return weight, linear.bias


def merge_added(linear, scale, side):
    """the vector added to weight and bias; IA3 multiplies"""
    return linear.weight + (scale[:, None] if side == "output" else scale), linear.bias + scale


def merge_added_bias_kept(linear, scale, side):
    """the vector added to the weight; IA3 multiplies, on the output side the bias too"""
    return linear.weight + (scale[:, None] if side == "output" else scale), linear.bias


def merge_added_on_the_output_side(linear, scale, side):
    """the vector added to the weight, and on the output side to the bias; IA3 multiplies"""
    if side == "output":
        return linear.weight + scale[:, None], linear.bias + scale
    return linear.weight + scale, linear.bias


def merge_bias_added(linear, scale, side):
    """the vector added to the bias on the output side; l · (W x + b) multiplies it"""
    weight, bias = right_merge(linear, scale, side)
    return weight, linear.bias + scale if side == "output" else bias


def merge_transposed(linear, scale, side):
    """the weight transposed, (in, out); torch's Linear keeps (out, in)"""
    weight, bias = right_merge(linear, scale, side)
    return weight.T, bias


def merge_by_multiplying_in_place(linear, scale, side):
    """the base's own weight and bias multiplied in place: the adapter is off and the base is gone,
    and dividing again does not bring back a row that met a 0"""
    linear.weight *= scale[:, None] if side == "output" else scale
    if side == "output":
        linear.bias *= scale
    return linear.weight, linear.bias


def probe_merge(answer, draw):
    names, fits = ("the merged weight (out, in)", "the merged bias (out)"), True
    for side in SIDES:
        linear, scale = filled(nn.Linear(9, 9), draw), draw(9)  # as many in as out: what is on the wrong axis runs too
        wanted, own = right_merge(linear, scale, side), [p.clone() for p in (linear.weight, linear.bias)]
        with torch.no_grad():
            pieces = named(names, answer(linear, scale, side))
        for (what, value), right in zip(pieces, wanted):
            yield f'{what}, side "{side}"', value
            fits = fits and close(value, right)
        changed = sum(int((value != before).sum()) for value, before in zip((linear.weight, linear.bias), own))
        yield "how many numbers of the base's own weight and bias the merge changed", torch.tensor(changed)
        fits = fits and not changed
    if not fits:
        return
    for side, features in (("output", 7), ("input", 10)):
        for what, value in named(names, answer(filled(nn.Linear(10, 7), draw), draw(features), side)):
            yield f"{what} of 10 features in and 7 out", value


def layer_of(draw, kv_heads, inner):
    """A frozen LLaMA block of width 24 with 3 heads of width 8, biases everywhere."""
    config = LLaMAConfig(31, 24, inner, 1, 3, kv_heads, attention_bias=True, mlp_bias=True)
    return filled(LLaMALayer(config, RoPE(8)), draw)


def by_attaching(attach, wrapper=IA3Linear):
    """A function (layer, x, positions, l_k, l_v, l_ff) that attaches wrappers to a block and sets their vectors."""

    def function(layer, x, positions, l_k, l_v, l_ff):
        block = nn.Module()
        block.layers = nn.ModuleList([copy.deepcopy(layer)])
        with planted(ia3, "IA3Linear", wrapper):
            attach(block)
        vectors = {"q_proj": l_k, "k_proj": l_k, "v_proj": l_v}
        scaled = [name for name, module in block.layers[0].named_modules() if hasattr(module, "scale")]
        own = {f"{name}.scale": vectors.get(name.rpartition(".")[2], l_ff) for name in scaled}
        return torch.func.functional_call(block.layers[0], own, (x, positions))

    named_by = attach if wrapper is IA3Linear else wrapper
    function.__name__, function.__doc__ = named_by.__name__, named_by.__doc__
    return function


right_layer = by_attaching(ia3.attach)


class Block:
    """The block written out, in pieces that the mistakes below replace; l_k, l_v, l_ff in the dtype of x."""

    def __init__(self, layer, l_k, l_v, l_ff):
        self.layer, self.attention, self.mlp = layer, layer.self_attn, layer.mlp
        self.l_k, self.l_v, self.l_ff = l_k, l_v, l_ff

    def rotate(self, heads, positions):
        return rotate(heads, *self.attention.rope(positions))

    def queries(self, h, positions):
        return self.rotate(self.attention.heads(self.attention.q_proj(h)), positions)

    def keys(self, h, positions):
        return self.rotate(self.attention.heads(self.l_k * self.attention.k_proj(h)), positions)

    def values(self, h, positions):
        return self.attention.heads(self.l_v * self.attention.v_proj(h))

    def attend(self, h, positions):
        q, k, v = (part(h, positions) for part in (self.queries, self.keys, self.values))
        return self.attention.output(self.attention.attend(q, k, v))

    def hidden(self, h):
        return self.l_ff * F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h)

    def feed(self, h):
        return self.mlp.down_proj(self.hidden(h))

    def forward(self, x, positions):
        x = x + self.attend(self.layer.input_layernorm(x), positions)
        return x + self.feed(self.layer.post_attention_layernorm(x))

    @classmethod
    def function(cls):
        def function(layer, x, positions, l_k, l_v, l_ff):
            return cls(layer, *(vector.to(x.dtype) for vector in (l_k, l_v, l_ff))).forward(x, positions)

        function.__name__, function.__doc__ = cls.__name__, cls.__doc__
        return function


class PlainLayer(Block):
    """the layer as it is: none of the three vectors is used"""

    def forward(self, x, positions):
        return self.layer(x, positions)


class ScaledAfterRoPE(Block):
    """l_k on the keys after their rotation; it belongs on the output of k_proj, before RoPE,
    where it can be merged into W_k"""

    def keys(self, h, positions):
        k = self.rotate(self.attention.heads(self.attention.k_proj(h)), positions)
        return k * self.l_k.view(self.attention.num_kv_heads, 1, -1)


class KeysNotRotated(Block):
    """keys scaled but no longer rotated by RoPE, while the queries are;
    rotate(k, *attention.rope(positions)) after the scaling"""

    def keys(self, h, positions):
        return self.attention.heads(self.l_k * self.attention.k_proj(h))


class QueriesNotRotated(Block):
    """queries not rotated by RoPE, while the keys are: rotate(q, *attention.rope(positions)) after the heads are cut"""

    def queries(self, h, positions):
        return self.attention.heads(self.attention.q_proj(h))


class NoPositions(Block):
    """no rotary positions at all: turn queries and keys both, by rotate(z, *attention.rope(positions)),
    after their heads are cut"""

    def rotate(self, heads, positions):
        return heads


class ValuesRotated(Block):
    """the values rotated by RoPE too; it turns queries and keys alone"""

    def values(self, h, positions):
        return self.rotate(super().values(h, positions), positions)


class KeysLeftAlone(Block):
    """l_k used nowhere: the keys are still the base's; it multiplies what comes out of k_proj"""

    def keys(self, h, positions):
        return self.rotate(self.attention.heads(self.attention.k_proj(h)), positions)


class ValuesLeftAlone(Block):
    """l_v used nowhere: the values are still the base's; it multiplies what comes out of v_proj"""

    def values(self, h, positions):
        return self.attention.heads(self.attention.v_proj(h))


class AttentionLeftAlone(Block):
    """l_k and l_v used nowhere: attention is still the base's; they multiply what comes out of k_proj and of v_proj"""

    def attend(self, h, positions):
        return self.attention(h, positions)


class VectorsSwapped(Block):
    """l_k and l_v the wrong way round: l_k belongs to the keys, l_v to the values"""

    def __init__(self, layer, l_k, l_v, l_ff):
        super().__init__(layer, l_v, l_k, l_ff)


class InputsOfKeysAndValues(Block):
    """l_k and l_v on what goes into k_proj and v_proj; they multiply what comes out"""

    def keys(self, h, positions):
        return self.rotate(self.attention.heads(self.attention.k_proj(self.l_k * h)), positions)

    def values(self, h, positions):
        return self.attention.heads(self.attention.v_proj(self.l_v * h))


class ByHandCopied(Block):
    """the GPT-2 block of "By hand", and this is a LLaMA: queries and keys are rotated after their heads are cut, and
    the hidden activation is silu(gate_proj(h)) · up_proj(h)"""

    def rotate(self, heads, positions):
        return heads

    def hidden(self, h):
        return self.l_ff * F.gelu(self.mlp.up_proj(h), approximate="tanh")


class FeedForwardOfGPT2(Block):
    """attention is right, the feed-forward is still GPT-2's;
    a LLaMA's hidden activation is silu(gate_proj(h)) · up_proj(h)"""

    def hidden(self, h):
        return self.l_ff * F.gelu(self.mlp.up_proj(h), approximate="tanh")


class GELUKept(Block):
    """GELU where a LLaMA has SiLU: the hidden activation is silu(gate_proj(h)) · up_proj(h)"""

    def hidden(self, h):
        return self.l_ff * F.gelu(self.mlp.gate_proj(h), approximate="tanh") * self.mlp.up_proj(h)


class GateForgotten(Block):
    """gate_proj forgotten: the hidden activation is a product of two branches, silu(gate_proj(h)) · up_proj(h)"""

    def hidden(self, h):
        return self.l_ff * F.silu(self.mlp.up_proj(h))


class NoSiLU(Block):
    """the SiLU left out: the hidden activation is silu(gate_proj(h)) · up_proj(h)"""

    def hidden(self, h):
        return self.l_ff * self.mlp.gate_proj(h) * self.mlp.up_proj(h)


class SiLUOfTheProduct(Block):
    """the SiLU around the product of both branches; it bends gate_proj's branch alone,
    silu(gate_proj(h)) · up_proj(h)"""

    def hidden(self, h):
        return self.l_ff * F.silu(self.mlp.gate_proj(h) * self.mlp.up_proj(h))


class SumOfTheBranches(Block):
    """the two branches added; the hidden activation is their product, silu(gate_proj(h)) · up_proj(h)"""

    def hidden(self, h):
        return self.l_ff * (F.silu(self.mlp.gate_proj(h)) + self.mlp.up_proj(h))


class GateWithoutSiLU(Block):
    """the SiLU on the wrong branch; the hidden activation is silu(gate_proj(h)) · up_proj(h)"""

    def hidden(self, h):
        return self.l_ff * self.mlp.gate_proj(h) * F.silu(self.mlp.up_proj(h))


class BothBranches(Block):
    """l_ff on both branches of the SwiGLU; it multiplies the hidden activation once,
    after the branches have met or on up_proj's branch alone"""

    def hidden(self, h):
        return F.silu(self.l_ff * self.mlp.gate_proj(h)) * (self.l_ff * self.mlp.up_proj(h))


class BothFactors(Block):
    """l_ff on both factors of the hidden activation, and so squared; it multiplies the product once"""

    def hidden(self, h):
        return self.l_ff * F.silu(self.mlp.gate_proj(h)) * (self.l_ff * self.mlp.up_proj(h))


class FeedForwardLeftAlone(Block):
    """l_ff used nowhere: the feed-forward is still the base's"""

    def hidden(self, h):
        return F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h)


class AttentionAlone(Block):
    """attention alone: the feed-forward, with its norm and its residual, has still to follow"""

    def forward(self, x, positions):
        return x + self.attend(self.layer.input_layernorm(x), positions)


class NormsLeftOut(Block):
    """the sublayers fed without their norms, input_layernorm and post_attention_layernorm"""

    def forward(self, x, positions):
        x = x + self.attend(x, positions)
        return x + self.feed(x)


class FirstNormLeftOut(Block):
    """attention fed without its norm: q_proj, k_proj and v_proj read input_layernorm(x)"""

    def forward(self, x, positions):
        x = x + self.attend(x, positions)
        return x + self.feed(self.layer.post_attention_layernorm(x))


class SecondNormLeftOut(Block):
    """the feed-forward fed without its norm: it reads post_attention_layernorm(x),
    where x is the sum behind attention"""

    def forward(self, x, positions):
        x = x + self.attend(self.layer.input_layernorm(x), positions)
        return x + self.feed(x)


class NormsSwapped(Block):
    """the two norms swapped: input_layernorm stands in front of attention,
    post_attention_layernorm in front of the feed-forward"""

    def forward(self, x, positions):
        x = x + self.attend(self.layer.post_attention_layernorm(x), positions)
        return x + self.feed(self.layer.input_layernorm(x))


class FirstNormTwice(Block):
    """input_layernorm used for the feed-forward too, which has its own: post_attention_layernorm"""

    def forward(self, x, positions):
        x = x + self.attend(self.layer.input_layernorm(x), positions)
        return x + self.feed(self.layer.input_layernorm(x))


class ResidualsLeftOut(Block):
    """the residual sums left out: each sublayer's output is added to what went in"""

    def forward(self, x, positions):
        return self.feed(self.layer.post_attention_layernorm(self.attend(self.layer.input_layernorm(x), positions)))


class FirstResidualLeftOut(Block):
    """the first residual left out: attention's output is added to x, and the sum goes on to the feed-forward"""

    def forward(self, x, positions):
        x = self.attend(self.layer.input_layernorm(x), positions)
        return x + self.feed(self.layer.post_attention_layernorm(x))


class SecondResidualLeftOut(Block):
    """the second residual left out: the feed-forward's output is added to the sum behind attention"""

    def forward(self, x, positions):
        x = x + self.attend(self.layer.input_layernorm(x), positions)
        return self.feed(self.layer.post_attention_layernorm(x))


class SecondAddedToX(Block):
    """the feed-forward's output added to the block's input x, so that what attention adds is lost;
    it is added to the sum behind attention"""

    def forward(self, x, positions):
        y = x + self.attend(self.layer.input_layernorm(x), positions)
        return x + self.feed(self.layer.post_attention_layernorm(y))


class BesideEachOther(Block):
    """attention and feed-forward both fed with x; the feed-forward reads the sum of x and attention's output"""

    def forward(self, x, positions):
        attended = self.attend(self.layer.input_layernorm(x), positions)
        return x + attended + self.feed(self.layer.post_attention_layernorm(x))


def layer_detached(layer, x, positions, l_k, l_v, l_ff):
    """the vectors detached from the graph: none of them ever gets a gradient"""
    return right_layer(layer, x, positions, l_k.detach(), l_v.detach(), l_ff.detach())


def layer_in_float32(layer, x, positions, l_k, l_v, l_ff):
    """float32 vectors multiplied as they are, so that a bfloat16 layer meets float32 activations:
    cast each to the dtype of x first"""
    return Block(layer, l_k, l_v, l_ff).forward(x, positions)


def layer_weights_in_place(layer, x, positions, l_k, l_v, l_ff):
    """the layer's own weights multiplied in place: the base is frozen, and the next call would multiply them again;
    multiply what comes out of k_proj and v_proj and what goes into down_proj"""
    layer.self_attn.k_proj.weight.data.mul_(l_k[:, None])
    return layer(x, positions)


def probe_layer(answer, draw):
    layer, positions = layer_of(draw, 3, 24), torch.arange(4, 9)
    # all widths alike: a vector in the wrong place runs too
    x, vectors = draw(2, 5, 24), [draw(24) for _ in range(3)]
    silent = copy.deepcopy(layer)
    for parameter in silent.mlp.down_proj.parameters():
        nn.init.zeros_(parameter)
    blocks = {
        "x and what attention adds to it: the output where down_proj is 0 (B, T, D)": silent,
        "the output (B, T, D)": layer,
    }
    outs = [leaving(answer, block, x, positions, *vectors) for block in blocks.values()]
    yield from zip(blocks, outs)
    if not all(close(out, right_layer(block, x, positions, *vectors)) for out, block in zip(outs, blocks.values())):
        return
    layer = layer_of(draw, 1, 40)
    vectors = [draw(size).requires_grad_() for size in (8, 8, 40)]
    out = answer(layer, x, positions, *vectors)
    yield "the output with one key head for three query heads (B, T, D)", out
    for what, gradient in zip(("l_k (G·d)", "l_v (G·d)", "l_ff (F)"), gradients(out, *vectors)):
        yield f"the gradient of {what}", gradient
    yield "the base's weights that train (none should)", torch.tensor(sum(p.requires_grad for p in layer.parameters()))
    out = answer(layer, x, positions, *map(torch.ones_like, vectors))
    yield "the output at vectors of 1: the base's (B, T, D)", out
    yield "the output in bfloat16 (B, T, D)", answer(layer.bfloat16(), x.bfloat16(), positions, *vectors)


def right_mixed(linear, x, scales, rows, side):
    scale = scales[rows][:, None].to(x.dtype)  # (B, 1, features)
    return linear(x) * scale if side == "output" else linear(x * scale)


def mixed_along_tokens(linear, x, scales, rows, side):
    """the vectors laid along the tokens: scales[rows] is (B, features) and meets (B, T, features),
    whose rows it needs an axis for: scales[rows][:, None]"""
    scale = scales[rows].to(x.dtype)
    return linear(x) * scale if side == "output" else linear(x * scale)


def mixed_along_tokens_always(linear, x, scales, rows, side):
    """the vectors laid along the tokens, on the output whatever the side: scales[rows][:, None] is (B, 1, features),
    and the side says what it multiplies"""
    return linear(x) * scales[rows].to(x.dtype)


def mixed_first_for_all(linear, x, scales, rows, side):
    """the first row's vector used for the whole batch"""
    return right_linear(linear, x, scales[rows[0]], side)


def mixed_in_order(linear, x, scales, rows, side):
    """row b given the vector number b; which one it uses stands in rows[b]"""
    return right_mixed(linear, x, scales, torch.arange(len(x)), side)


def mixed_mean(linear, x, scales, rows, side):
    """the mean of the batch's vectors used for every row"""
    return right_linear(linear, x, scales[rows].mean(0), side)


def mixed_sorted(linear, x, scales, rows, side):
    """the rows grouped by their vector and not put back in order"""
    order = rows.argsort(stable=True)
    return right_mixed(linear, x[order], scales, rows[order], side)


def mixed_swapped(linear, x, scales, rows, side):
    """the sides swapped: "output" multiplies what comes out of the projection, "input" what goes into it"""
    return right_mixed(linear, x, scales, rows, "input" if side == "output" else "output")


def mixed_always_the_output(linear, x, scales, rows, side):
    """what comes out multiplied on both sides;
    with side "input" it is what goes into the projection that is multiplied"""
    return right_mixed(linear, x, scales, rows, "output")


def mixed_always_the_input(linear, x, scales, rows, side):
    """what goes in multiplied on both sides;
    with side "output" it is what comes out of the projection that is multiplied"""
    return right_mixed(linear, x, scales, rows, "input")


def mixed_bias_unscaled(linear, x, scales, rows, side):
    """l · (W x) + b: the bias left out of the scaling; l multiplies all that leaves the projection, l · (W x + b)"""
    scale = scales[rows][:, None].to(x.dtype)
    return F.linear(x, linear.weight) * scale + linear.bias if side == "output" else linear(x * scale)


def mixed_bias_dropped(linear, x, scales, rows, side):
    """the projection's bias dropped on the input side: W (l · x) + b keeps it;
    call linear(…), which adds it, not its weight alone"""
    scale = scales[rows][:, None].to(x.dtype)
    return linear(x) * scale if side == "output" else F.linear(x * scale, linear.weight)


def mixed_biases_dropped(linear, x, scales, rows, side):
    """the projection's bias dropped on both sides; call linear(…), which adds it, not its weight alone"""
    scale = scales[rows][:, None].to(x.dtype)
    return F.linear(x, linear.weight) * scale if side == "output" else F.linear(x * scale, linear.weight)


def mixed_not_cast(linear, x, scales, rows, side):
    """the float32 vectors multiplied as they are, so that a bfloat16 model's activations become float32:
    cast them to the dtype of x first"""
    scale = scales[rows][:, None]
    return linear(x) * scale if side == "output" else linear(x * scale)


def probe_mixed(answer, draw):
    square, scales, rows = filled(nn.Linear(6, 6), draw), draw(5, 6), torch.tensor([2, 0, 2, 4])
    x = draw(4, 4, 6)  # as many tokens as rows: vectors along the wrong axis run too
    outs = [leaving(answer, square, x, scales, rows, side) for side in SIDES]
    for side, out in zip(SIDES, outs):
        yield f'the output with side "{side}" (B, T, out)', out
    if not all(close(out, right_mixed(square, x, scales, rows, side)) for side, out in zip(SIDES, outs)):
        return
    for side, features in (("output", 7), ("input", 10)):
        linear, x, scales = filled(nn.Linear(10, 7), draw), draw(4, 3, 10), draw(5, features).requires_grad_()
        out = answer(linear, x, scales, rows, side)
        yield "the output of 10 features in and 7 out (B, T, out)", out
        yield "the gradient of scales (N, features)", gradients(out, scales)[0]
        yield "the output in bfloat16 (B, T, out)", answer(linear.bfloat16(), x.bfloat16(), scales, rows, side)


def moved_to_queries(model_class, config, paired=False):
    """Whether a model answers the same, to rounding, when l_k stands on the queries instead of the keys."""

    def truth():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(config).double()
            draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
            filled(model, draw)
            ids, width = torch.randint(0, config.vocab_size, (2, 6)), config.hidden_size
            vectors = [draw(width) for _ in model.layers]
            if paired:  # features i and i + d/2 of a head turn together, and share their factor
                half = width // config.num_attention_heads // 2
                vectors = [vector.view(-1, 2, half)[:, :1].expand(-1, 2, -1).reshape(-1) for vector in vectors]
            logits = []
            for name in ("k_proj", "q_proj"):
                scaled = copy.deepcopy(model)
                ia3.attach(scaled, outputs=(name,), inputs=())
                for layer, vector in zip(scaled.layers, vectors):
                    getattr(layer.self_attn, name).scale.data = vector.clone()
                logits.append(scaled(ids))
        return "the same" if torch.allclose(*logits, atol=1e-5) else "different"

    return truth


def trained_numbers():
    """How many numbers IA3 trains on a LLaMA of SmolLM2-360M's shape."""
    with torch.device("meta"):
        model = LLaMA(LLaMAConfig(49152, 960, 2560, 32, 15, 5)).requires_grad_(False)
        ia3.attach(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


SMALL = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SAME = ("the same", "different")

EXERCISES = {
    "ia3_linear": Exercise(
        "ia3_linear(linear, x, scale, side) -> (B, T, out), side \"output\" or \"input\"", right_linear,
        (*(linear_by(mistake) for mistake in (OnePlusScale, BiasUnscaled, SoftmaxScale)), sides_swapped,
         always_the_input, always_the_output, vector_unused, projection_left_out, bias_dropped, biases_dropped,
         weight_scaled_in_place, scale_added, weight_not_transposed, vector_squashed, scaled_twice, not_cast,
         detached_vector), probe_linear,
    ),
    "ia3_start": Exercise(
        "ia3_start(linear, side) -> the vector (features) that training begins with", right_start,
        (start_by(ZeroScale), start_near_one, start_normal, start_other_side, start_one_number,
         start_in_the_bases_dtype), probe_start,
    ),
    "ia3_merge": Exercise(
        "ia3_merge(linear, scale, side) -> weight (out, in), bias (out)", right_merge,
        (*(merge_by(mistake) for mistake in (MergeForgetsBias, MergeWrongAxis, MergeInPlace)), merge_scales_both_biases,
         merge_columns_always, merge_rows_always, merge_side_ignored, merge_biases_swapped, merge_sides_swapped,
         merge_one_plus, merge_divided, merge_divided_bias_kept, merge_added, merge_added_bias_kept,
         merge_added_on_the_output_side, merge_bias_added, merge_transposed, merge_by_multiplying_in_place),
        probe_merge,
    ),
    "ia3_layer": Exercise(
        "ia3_layer(layer, x, positions, l_k, l_v, l_ff) -> (B, T, D)", right_layer,
        (by_attaching(attach_before_activation), by_attaching(attach_to_queries),
         *(by_attaching(ia3.attach, mistake) for mistake in (OutputOfDown, OnePlusScale, BiasUnscaled, SoftmaxScale)),
         *(mistake.function() for mistake in Block.__subclasses__()), layer_detached, layer_in_float32,
         layer_weights_in_place), probe_layer,
    ),
    "ia3_mixed": Exercise(
        "ia3_mixed(linear, x, scales, rows, side) -> (B, T, out); scales (N, features), rows (B,)", right_mixed,
        (mixed_along_tokens, mixed_along_tokens_always, mixed_first_for_all, mixed_in_order, mixed_mean, mixed_sorted,
         mixed_swapped, mixed_always_the_output, mixed_always_the_input, mixed_bias_unscaled, mixed_bias_dropped,
         mixed_biases_dropped, mixed_not_cast), probe_mixed,
    ),
    "ia3_queries_gpt2": Question(
        moved_to_queries(GPT2, GPT2Config(**SMALL)),
        "A score is Σ qᵢ kᵢ: lᵢ may stand with either. A GPT-2 adds its positions at the embedding, "
        "so nothing comes between.",
        {"different": "write out one score, Σ lᵢ qᵢ kᵢ, and look where lᵢ may stand; "
                      "what comes between a GPT-2's projection and its score?"}, SAME,
    ),
    "ia3_queries_llama": Question(
        moved_to_queries(LLaMA, LLaMAConfig(**SMALL)),
        "RoPE turns feature i into feature i + d/2 between the scaling and the score, by another angle for query and "
        "key: l no longer meets the same features.",
        {"the same": "that holds where the scaled features meet in the score as they are; "
                     "RoPE turns them first, a query by its position and a key by its own."}, SAME,
    ),
    "ia3_queries_paired": Question(
        moved_to_queries(LLaMA, LLaMAConfig(**SMALL), paired=True),
        "RoPE turns the pair (i, i + d/2) in its plane. One factor for both lengthens the pair, "
        "and lengthening and turning may change places.",
        {"different": "look at one pair in its plane: it is turned by an angle and lengthened by one factor; "
                      "does the order of the two matter?"}, SAME,
    ),
    "ia3_parameters": Question(
        trained_numbers, "L · (2 · G · d + F) = 32 · (2 · 5 · 64 + 2,560).",
        {32 * (2 * 960 + 2560): "look at two widths: keys and values have G · d = 320 features here, not D, "
                                "and F is 2,560, not 4 · D.",
         32 * (320 + 2560): "keys and values have a vector each, of G · d numbers, and l_ff is as long as the hidden "
                            "activation, F.",
         32 * (2 * 320 + 960): "l_ff multiplies what goes into down_proj, F = 2,560 features, not the D that come out.",
         32 * (960 + 2 * 320 + 2560): "the queries have no vector: keys, values and the hidden activation have.",
         32 * (15 * 64 + 5 * 64 + 2560): "l_k and l_v are both as long as the keys, 5 heads of 64; "
                                         "the 15 query heads have no vector.",
         32 * (2 * 320 + 2 * 2560): "one l_ff a layer: it multiplies the hidden activation once, "
                                    "where gate_proj and up_proj have met.",
         32 * (2 * 5 + 2560): "a vector has one number a feature, G · d of them for the keys, not one a head.",
         32 * (2 * 64 + 2560): "that is one key head of 64 features; l_k and l_v cover all 5.",
         32 * 2 * 320: "the feed-forward part has a vector too: l_ff, one number for each of its F hidden features.",
         32 * 2560: "attention has vectors too: l_k and l_v, one number for each of the G · d features of keys and of "
                    "values.",
         4 * 32 * (2 * 320 + 2560): "those are bytes in float32; asked is how many numbers.",
         2 * 320 + 2560: "that is one layer; there are 32."},
    ),
}  # fmt: skip
