"""Lesson 05: bottleneck adapters, with the wrong versions that one writes easily."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

import minillama

from ...adapters import bottleneck
from ...adapters.bottleneck import Adapted, Bottleneck
from ...attention import RoPE
from ...llama import Layer, LLaMAConfig
from . import Exercise, Question, Wrong, close, filled, gradients, named

right_attach = bottleneck.attach


# ── the catalogue ─────────────────────────────────────────────────────────────────────────────────────────────────────
# What derives from Bottleneck or Adapted directly is planted in the models by tests/mistakes.py too.


class UpNotZero(Bottleneck):
    """the up-projection drawn near zero instead of zeroed: the model starts near the base and not as the base"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.up.weight, std=0.02)


class AllZero(Bottleneck):
    """both matrices at 0: then the features are 0 and so is the way back to them, and only the last bias ever learns;
    draw down at random"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.down.weight)


class NoActivation(Bottleneck):
    """no non-linearity between down and up: two matrices in a row are one matrix of rank m; put GELU between them"""

    def forward(self, x):
        narrow = F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype))
        return F.linear(narrow, self.up.weight.to(x.dtype), self.up.bias.to(x.dtype))


class WrongActivation(Bottleneck):
    """ReLU for GELU"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.activation = "relu"


class ActivationLast(Bottleneck):
    """the non-linearity behind up instead of between down and up"""

    def forward(self, x):
        return F.gelu(NoActivation.forward(self, x))


class NoBias(Bottleneck):
    """biases left out: each of the two projections adds its own"""

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self.down.weight.to(x.dtype))), self.up.weight.to(x.dtype))


class NoInnerResidual(Adapted):
    """the sublayer's output replaced by the bottleneck's, the inner skip connection left out: add the two"""

    def forward(self, x):
        return self.bottleneck(self.base(x))


class ReadsInput(Adapted):
    """the sequential bottleneck fed with the sublayer's input, as a parallel one is; it reads the sublayer's output"""

    def forward(self, x):
        fed = F.pad(x, (0, max(0, self.out_features - x.shape[-1])))[..., : self.out_features]
        return self.base(x) + self.bottleneck(fed)


class AddedTwice(Adapted):
    """the sublayer's output added once inside the bottleneck and once outside: y + y + bottleneck(y); once is enough"""

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


# ── the network itself ────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = ("down_weight", "down_bias", "up_weight", "up_bias")


def as_bottleneck(network):
    """A network class as a function of its input and its four tensors."""

    def function(x, *tensors):
        own = {name.replace("_", "."): tensor for name, tensor in zip(NAMES, tensors)}
        return torch.func.functional_call(network(x.shape[-1], len(tensors[1])), own, (x,))

    function.__name__, function.__doc__ = network.__name__, network.__doc__
    return function


right_bottleneck = as_bottleneck(Bottleneck)


def skip_inside(x, down_weight, down_bias, up_weight, up_bias):
    """x added here already; asked is what the network adds, and the sublayer's output comes to it outside"""
    return x + right_bottleneck(x, down_weight, down_bias, up_weight, up_bias)


def activated_twice(x, down_weight, down_bias, up_weight, up_bias):
    """the non-linearity used twice, between down and up and behind up too; between them alone is right"""
    return F.gelu(right_bottleneck(x, down_weight, down_bias, up_weight, up_bias))


def activated_first(x, down_weight, down_bias, up_weight, up_bias):
    """the non-linearity in front of down instead of between down and up"""
    narrow = F.linear(F.gelu(x), down_weight.to(x.dtype), down_bias.to(x.dtype))
    return F.linear(narrow, up_weight.to(x.dtype), up_bias.to(x.dtype))


def up_bias_forgotten(x, down_weight, down_bias, up_weight, up_bias):
    """the up-projection's bias left out"""
    return right_bottleneck(x, down_weight, down_bias, up_weight, up_bias * 0)


def down_bias_forgotten(x, down_weight, down_bias, up_weight, up_bias):
    """the down-projection's bias left out"""
    return right_bottleneck(x, down_weight, down_bias * 0, up_weight, up_bias)


def tanh_gelu(x, down_weight, down_bias, up_weight, up_bias):
    """GELU in its tanh approximation; asked is the exact one, F.gelu(x) with no further argument"""
    narrow = F.gelu(F.linear(x, down_weight.to(x.dtype), down_bias.to(x.dtype)), approximate="tanh")
    return F.linear(narrow, up_weight.to(x.dtype), up_bias.to(x.dtype))


def silu_for_gelu(x, down_weight, down_bias, up_weight, up_bias):
    """SiLU (swish) for GELU, as the AdapterHub library has it in its Houlsby configuration; asked is GELU"""
    narrow = F.silu(F.linear(x, down_weight.to(x.dtype), down_bias.to(x.dtype)))
    return F.linear(narrow, up_weight.to(x.dtype), up_bias.to(x.dtype))


def computed_in_float32(x, down_weight, down_bias, up_weight, up_bias):
    """x cast to the weights' float32 and left there, so that a bfloat16 model gets float32 back; cast the weights to
    x.dtype instead"""
    return right_bottleneck(x.float(), down_weight, down_bias, up_weight, up_bias)


def weights_not_cast(x, down_weight, down_bias, up_weight, up_bias):
    """float32 weights not cast to the dtype of x: a bfloat16 model stops here;
    write down_weight.to(x.dtype), and so for all four"""
    return F.linear(F.gelu(F.linear(x, down_weight, down_bias)), up_weight, up_bias)


def features_detached(x, down_weight, down_bias, up_weight, up_bias):
    """the narrow features detached from the graph: down never learns"""
    narrow = F.gelu(F.linear(x, down_weight.to(x.dtype), down_bias.to(x.dtype))).detach()
    return F.linear(narrow, up_weight.to(x.dtype), up_bias.to(x.dtype))


def matrices_not_cast(x, down_weight, down_bias, up_weight, up_bias):
    """float32 weights not cast to the dtype of x: a bfloat16 model stops here;
    write down_weight.to(x.dtype), and so for all four"""
    return F.gelu(x @ down_weight.T + down_bias) @ up_weight.T + up_bias


def biases_not_cast(x, down_weight, down_bias, up_weight, up_bias):
    """the weights cast to the dtype of x, the biases not: a bfloat16 model stops here;
    cast the biases too, down_bias.to(x.dtype)"""
    return F.linear(F.gelu(F.linear(x, down_weight.to(x.dtype), down_bias)), up_weight.to(x.dtype), up_bias)


def added_biases_not_cast(x, down_weight, down_bias, up_weight, up_bias):
    """the weights cast to the dtype of x, the biases not: a bfloat16 model stops here;
    cast the biases too, down_bias.to(x.dtype)"""
    return F.gelu(x @ down_weight.to(x.dtype).T + down_bias) @ up_weight.to(x.dtype).T + up_bias


def down_bias_behind_gelu(x, down_weight, down_bias, up_weight, up_bias):
    """the down-projection's bias added behind GELU; it belongs to down, in front of it: GELU(down x + bias)"""
    narrow = F.gelu(F.linear(x, down_weight.to(x.dtype))) + down_bias.to(x.dtype)
    return F.linear(narrow, up_weight.to(x.dtype), up_bias.to(x.dtype))


def sigmoid_for_gelu(x, down_weight, down_bias, up_weight, up_bias):
    """a sigmoid for GELU: it squashes what should be bent"""
    narrow = F.linear(x, down_weight.to(x.dtype), down_bias.to(x.dtype)).sigmoid()
    return F.linear(narrow, up_weight.to(x.dtype), up_bias.to(x.dtype))


def tanh_for_gelu(x, down_weight, down_bias, up_weight, up_bias):
    """tanh for GELU: it squashes what should be bent"""
    narrow = F.linear(x, down_weight.to(x.dtype), down_bias.to(x.dtype)).tanh()
    return F.linear(narrow, up_weight.to(x.dtype), up_bias.to(x.dtype))


def input_detached(x, down_weight, down_bias, up_weight, up_bias):
    """the input detached from the graph: the adapters below learn less than they should"""
    return right_bottleneck(x.detach(), down_weight, down_bias, up_weight, up_bias)


def tensors_of(draw, width=10, size=4):
    """down_weight (m, D), down_bias (m), up_weight (D, m), up_bias (D), all away from 0."""
    return [draw(size, width) / width**0.5, draw(size), draw(width, size), draw(width)]


def probe_bottleneck(answer, draw):
    x, tensors = draw(2, 5, 10).requires_grad_(), [tensor.requires_grad_() for tensor in tensors_of(draw)]
    out = answer(x, *tensors)
    yield "the output (B, T, D)", out
    names = ("x (B, T, D)", "down_weight (m, D)", "down_bias (m)", "up_weight (D, m)", "up_bias (D)")
    for name, gradient in zip(names, gradients(out, x, *tensors)):
        yield f"the gradient of {name}", gradient
    yield "the output in bfloat16 (B, T, D)", answer(x.bfloat16(), *tensors)
    out = answer(x, tensors[0], tensors[1], tensors[2] * 0, tensors[3])
    yield "the output with up_weight at 0: up_bias for every token (B, T, D)", out


# ── where it starts ───────────────────────────────────────────────────────────────────────────────────────────────────


def start_of(network):
    """What a network's four tensors start from, as a function of D and m."""

    def function(D, m):
        module = network(D, m)
        tensors = module.down.weight, module.down.bias, module.up.weight, module.up.bias
        return tuple(tensor.detach() for tensor in tensors)

    function.__name__, function.__doc__ = network.__name__, network.__doc__
    return function


def as_linear_draws_them(D, m):
    """two nn.Linear as they come, nothing zeroed: the model begins as another model"""
    down, up = nn.Linear(D, m), nn.Linear(m, D)
    return down.weight.data, down.bias.data, up.weight.data, up.bias.data


def up_bias_kept(D, m):
    """up's weight zeroed and its bias not: the bias is added to every token"""
    down, up = nn.Linear(D, m), nn.Linear(m, D)
    return down.weight.data, down.bias.data * 0, up.weight.data * 0, up.bias.data


def down_bias_kept(D, m):
    """down's bias drawn at random: the identity still, for up is 0; but both biases are asked to start at 0"""
    down = nn.Linear(D, m)
    return down.weight.data, down.bias.data, torch.zeros(D, m), torch.zeros(D)


def down_zero(D, m):
    """down at 0 and up random, the wrong way round: it is the identity, but it learns by GELU's slope at 0 alone; with
    ReLU, whose slope there is taken as 0, only the last bias would ever learn"""
    return torch.zeros(m, D), torch.zeros(m), torch.randn(D, m) / m**0.5, torch.zeros(D)


def units_alike(D, m):
    """every unit of down the same: each gets the same gradient for ever, and m units learn what one would;
    draw them at random"""
    return torch.full((m, D), 0.01), torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


def down_too_large(D, m):
    """down drawn from N(0, 1): its features then come out √D times as large as what goes in;
    a standard deviation of 0.01, or of 1/√D, is what one takes"""
    return torch.randn(m, D), torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


def down_too_small(D, m):
    """down so near 0 that its features vanish, and with them up's gradient;
    a standard deviation of 0.01, or of 1/√D, is what one takes"""
    return 1e-6 * torch.randn(m, D), torch.zeros(m), torch.zeros(D, m), torch.zeros(D)


def shapes_swapped(D, m):
    """the two matrices in the shape (in, out); nn.Linear and F.linear keep them as (out, in): down (m, D), up (D, m)"""
    return torch.randn(D, m) / D**0.5, torch.zeros(m), torch.zeros(m, D), torch.zeros(D)


def probe_start(answer, draw):
    D, m = 240, 12
    shapes = ((m, D), (m,), (D, m), (D,))
    names = ("down_weight (m, D)", "down_bias (m)", "up_weight (D, m)", "up_bias (D)")
    tensors = []
    for (what, value), shape in zip(named(names, answer(D, m)), shapes):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise Wrong("shape", f"{what} should be a tensor of float32")
        if value.shape != shape:
            raise Wrong("shape", f"{what} has shape {tuple(value.shape)}; needed is {shape} for D = 240 and m = 12")
        tensors.append(value.detach().clone().requires_grad_())
    x = draw(2, 5, D)
    out = right_bottleneck(x, *tensors)
    yield "whether a fresh bottleneck adds exactly 0 (1: yes)", (out == 0).all().long()
    yield "which of the four start at 0 (1: yes)", torch.stack([(tensor == 0).all().long() for tensor in tensors])
    yield "how many different units down has", torch.tensor(len(torch.unique(tensors[0].detach(), dim=0)))
    std = tensors[0].std().item()
    yield "down's scale (-1: too small, 0: fit, 1: too large)", torch.tensor(int(std > 0.3) - int(0 < std < 0.0005))
    changed = torch.zeros(4, dtype=torch.long)
    for _ in range(3):  # three steps of gradient descent towards anything
        found = gradients(right_bottleneck(x, *tensors), *tensors)
        tensors = [(tensor - 0.1 * gradient).detach().requires_grad_() for tensor, gradient in zip(tensors, found)]
        changed |= torch.stack([(gradient != 0).any().long() for gradient in found])
    yield "which of the four learn within three steps (1: yes)", changed


# ── around a sublayer ─────────────────────────────────────────────────────────────────────────────────────────────────


def as_sublayer(wrapper):
    """A wrapper class as a function of the sublayer, its input and the bottleneck."""

    def function(sublayer, x, network):
        return wrapper(sublayer, network)(x)

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def input_for_output(sublayer, x, network):
    """the input added instead of the sublayer's output:
    the inner skip goes around the bottleneck and not around both"""
    return x + network(sublayer(x))


def block_residual_too(sublayer, x, network):
    """the block's residual added as well; the block itself adds it, behind this function:
    return y + bottleneck(y) and no more"""
    y = sublayer(x)
    return x + y + network(y)


def in_front(sublayer, x, network):
    """the bottleneck in front of the sublayer; it stands behind it and reads its output"""
    return sublayer(x + network(x))


def in_front_alone(sublayer, x, network):
    """the bottleneck in front of the sublayer and no skip around it; it stands behind: y + bottleneck(y)"""
    return sublayer(network(x))


def bottleneck_alone(sublayer, x, network):
    """the sublayer left out: bottleneck(x) alone"""
    return network(x)


def reads_the_sum(sublayer, x, network):
    """the bottleneck fed with the residual sum x + y; it reads the sublayer's output y, before the residual is added"""
    y = sublayer(x)
    return y + network(x + y)


def sublayer_forgotten(sublayer, x, network):
    """the sublayer left out: x + bottleneck(x); the bottleneck reads what the sublayer returns, and is added to it"""
    return x + network(x)


def subtracted(sublayer, x, network):
    """the bottleneck's output subtracted; it is added, y + bottleneck(y)"""
    y = sublayer(x)
    return y - network(y)


def bottleneck_detached(sublayer, x, network):
    """the bottleneck's output detached from the graph: it never learns"""
    y = sublayer(x)
    return y + network(y).detach()


def run_twice(sublayer, x, network):
    """right in its numbers, but the sublayer runs twice: keep its output in a variable"""
    return sublayer(x) + network(sublayer(x))


def sublayer_detached(sublayer, x, network):
    """the sublayer's output detached from the graph: the adapters below never learn;
    the base is frozen, its graph is needed all the same"""
    y = sublayer(x).detach()
    return y + network(y)


def no_bottleneck(sublayer, x, network):
    """the sublayer alone: the bottleneck's output is not added"""
    return sublayer(x)


def network_of(draw, width=8, size=3, activation="gelu"):
    """A bottleneck with random numbers everywhere, which requires gradients;
    the number after `activation` is never 0."""
    return filled(Bottleneck(width, size, activation), draw).requires_grad_(True)


right_sublayer = as_sublayer(Adapted)


def probe_sublayer(answer, draw, right=right_sublayer, more=((),)):
    """more: what else the answer is given, once for each output that is compared."""
    sublayer, network, runs = filled(nn.Linear(8, 8), draw).eval(), network_of(draw), []
    x = draw(2, 5, 8).requires_grad_()
    outs = [answer(sublayer, x, network, *options) for options in more]
    for out, options in zip(outs, more):
        yield f"the output{' with scale ' if options else ''}{', '.join(map(str, options))} (B, T, D)", out
    if not all(close(out, right(sublayer, x, network, *options)) for out, options in zip(outs, more)):
        return
    handle = sublayer.register_forward_hook(lambda *_: runs.append(1))
    out = answer(sublayer, x, network, *more[0])
    handle.remove()
    of_x, of_down, of_up = gradients(out, x, network.down.weight, network.up.weight)
    yield "the gradient of x (B, T, D)", of_x
    yield "the gradient of down's weight (m, D)", of_down
    yield "the gradient of up's weight (D, m)", of_up
    yield "how often the sublayer ran", torch.tensor(len(runs))
    with torch.no_grad():
        network.up.weight.zero_(), network.up.bias.zero_()
    yield "the output with up at 0: the sublayer's (B, T, D)", answer(sublayer, x, network, *more[0])
    yield "the output in bfloat16 (B, T, D)", answer(sublayer.bfloat16(), x.bfloat16(), network, *more[0])


def right_parallel(sublayer, x, network, scale):
    return Adapted(sublayer, network, True, scale)(x)


def parallel_reads_output(sublayer, x, network, scale):
    """the bottleneck fed with the sublayer's output, which is the sequential form; beside it, it reads x"""
    y = sublayer(x)
    return y + scale * network(y)


def scale_forgotten(sublayer, x, network, scale):
    """the scale left out"""
    return sublayer(x) + network(x)


def scale_on_the_sum(sublayer, x, network, scale):
    """the scale on the whole sum; it multiplies what the bottleneck adds and nothing else"""
    return scale * (sublayer(x) + network(x))


def scale_on_the_sublayer(sublayer, x, network, scale):
    """the scale on the sublayer's output; it multiplies what the bottleneck adds"""
    return scale * sublayer(x) + network(x)


def scale_inside(sublayer, x, network, scale):
    """the scale on the bottleneck's input; behind a non-linearity and biases that is another function:
    multiply its output"""
    return sublayer(x) + network(scale * x)


def parallel_with_skip(sublayer, x, network, scale):
    """an inner skip in the parallel form: x is added by the block's own residual already"""
    return sublayer(x) + scale * network(x) + x


def divided_by_the_scale(sublayer, x, network, scale):
    """divided by the scale instead of multiplied"""
    return sublayer(x) + network(x) / scale


def scale_written_as_a_number(sublayer, x, network, scale):
    """4 written for the scale, which is given: multiply by `scale`"""
    return sublayer(x) + 4.0 * network(x)


def scale_plus_one(sublayer, x, network, scale):
    """1 + scale for the scale: it is itself the factor"""
    return sublayer(x) + (1 + scale) * network(x)


def scale_subtracted(sublayer, x, network, scale):
    """the bottleneck's output subtracted; it is added, sublayer(x) + scale · bottleneck(x)"""
    return sublayer(x) - scale * network(x)


def sequential_without_scale(sublayer, x, network, scale):
    """the sequential form of 5.4, and without the scale; beside the sublayer, the bottleneck reads x,
    and `scale` multiplies what it adds"""
    y = sublayer(x)
    return y + network(y)


def input_for_sublayer(sublayer, x, network, scale):
    """x in the place of the sublayer's output, so that the sublayer is left out: sublayer(x) + scale · bottleneck(x)"""
    return x + scale * network(x)


def parallel_alone(sublayer, x, network, scale):
    """the sublayer left out: the bottleneck's scaled output is added to sublayer(x)"""
    return scale * network(x)


def parallel_in_front(sublayer, x, network, scale):
    """the bottleneck in front of the sublayer; beside it, the sublayer reads x as it is"""
    return sublayer(x + scale * network(x))


def parallel_detached(sublayer, x, network, scale):
    """the bottleneck's input detached from the graph: the adapters below learn less than they should"""
    return sublayer(x) + scale * network(x.detach())


def probe_parallel(answer, draw):
    yield from probe_sublayer(answer, draw, right_parallel, ((4.0,), (0.5,)))


# ── in a block ────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_layer(attach):
    """A way to attach as a function of one layer of a LLaMA, its input, positions,
    and the two bottlenecks it is given."""

    def function(layer, x, positions, first, second):
        parts = {id(module): (module, dict(module.named_children())) for module in (layer.self_attn, layer.mlp)}
        attach(layer, len(first.down.bias))
        for parent, name, network in ((layer.self_attn, "o_proj", first), (layer.mlp, "down_proj", second)):
            if isinstance(getattr(parent, name), Adapted):
                getattr(parent, name).bottleneck = network
        out = layer(x, positions)
        for parent, children in parts.values():
            for name, child in children.items():
                setattr(parent, name, child)
        return out

    function.__name__, function.__doc__ = attach.__name__, attach.__doc__
    return function


def sublayers(layer, positions):
    """The two sublayers with their norms in front, as functions of the residual stream."""
    return (
        (lambda x: layer.self_attn(layer.input_layernorm(x), positions)),
        (lambda x: layer.mlp(layer.post_attention_layernorm(x))),
    )


def attention_only(layer, x, positions, first, second):
    """a bottleneck behind attention alone, where Houlsby's has one behind the feed-forward too"""
    attention, forward = sublayers(layer, positions)
    y = attention(x)
    x = x + y + first(y)
    return x + forward(x)


def behind_the_residual(layer, x, positions, first, second):
    """the bottlenecks behind the residual sum: each reads the whole stream instead of its sublayer's output;
    adapt the output before it is added"""
    attention, forward = sublayers(layer, positions)
    x = x + attention(x)
    x = x + first(x)
    x = x + forward(x)
    return x + second(x)


def in_front_of_the_sublayers(layer, x, positions, first, second):
    """the bottlenecks in front of their sublayers, on the norm's output; they stand behind them"""
    a = layer.input_layernorm(x)
    x = x + layer.self_attn(a + first(a), positions)
    b = layer.post_attention_layernorm(x)
    return x + layer.mlp(b + second(b))


def beside_the_sublayers(layer, x, positions, first, second):
    """the parallel form: the bottlenecks read what their sublayers read; the sequential ones read what they return"""
    a = layer.input_layernorm(x)
    x = x + layer.self_attn(a, positions) + first(a)
    b = layer.post_attention_layernorm(x)
    return x + layer.mlp(b) + second(b)


def bottlenecks_swapped(layer, x, positions, first, second):
    """the two bottlenecks swapped: the first stands behind attention, the second behind the feed-forward"""
    return right_layer(layer, x, positions, second, first)


def residuals_replaced(layer, x, positions, first, second):
    """the inner skips left out: what the sublayers return is lost,
    and only the bottlenecks' outputs reach the stream"""
    attention, forward = sublayers(layer, positions)
    x = x + first(attention(x))
    return x + second(forward(x))


def no_residual(layer, x, positions, first, second):
    """the block's own residuals left out: x has to be added back around attention and around the feed-forward"""
    attention, forward = sublayers(layer, positions)
    y = attention(x)
    z = forward(y + first(y))
    return z + second(z)


def norms_forgotten(layer, x, positions, first, second):
    """the norms in front of the sublayers left out"""
    y = layer.self_attn(x, positions)
    x = x + y + first(y)
    z = layer.mlp(x)
    return x + z + second(z)


def first_norm_forgotten(layer, x, positions, first, second):
    """attention's norm left out: self_attn reads input_layernorm(x)"""
    y = layer.self_attn(x, positions)
    x = x + y + first(y)
    z = layer.mlp(layer.post_attention_layernorm(x))
    return x + z + second(z)


def second_norm_forgotten(layer, x, positions, first, second):
    """the feed-forward's norm left out: mlp reads post_attention_layernorm(x), where x is the sum behind attention"""
    y = layer.self_attn(layer.input_layernorm(x), positions)
    x = x + y + first(y)
    z = layer.mlp(x)
    return x + z + second(z)


def norms_swapped(layer, x, positions, first, second):
    """the two norms swapped: input_layernorm stands in front of attention,
    post_attention_layernorm in front of the feed-forward"""
    y = layer.self_attn(layer.post_attention_layernorm(x), positions)
    x = x + y + first(y)
    z = layer.mlp(layer.input_layernorm(x))
    return x + z + second(z)


def residual_from_the_norm(layer, x, positions, first, second):
    """the residuals taken from what the norms return;
    what is added back is the stream as it was in front of the norm"""
    x = layer.input_layernorm(x)
    y = layer.self_attn(x, positions)
    x = layer.post_attention_layernorm(x + y + first(y))
    z = layer.mlp(x)
    return x + z + second(z)


def first_norm_twice(layer, x, positions, first, second):
    """the attention's norm used for the feed-forward too, which has its own: post_attention_layernorm"""
    y = layer.self_attn(layer.input_layernorm(x), positions)
    x = x + y + first(y)
    z = layer.mlp(layer.input_layernorm(x))
    return x + z + second(z)


def first_used_twice(layer, x, positions, first, second):
    """the first bottleneck used for the feed-forward too, which has its own: second"""
    return right_layer(layer, x, positions, first, first)


def attention_not_passed_on(layer, x, positions, first, second):
    """what attention adds not passed on: the sum behind attention is the stream that the second residual adds to"""
    attention, forward = sublayers(layer, positions)
    y = attention(x)
    z = forward(x + y + first(y))
    return x + z + second(z)


def last_residual_left_out(layer, x, positions, first, second):
    """the residual around the feed-forward left out"""
    attention, forward = sublayers(layer, positions)
    y = attention(x)
    z = forward(x + y + first(y))
    return z + second(z)


def second_reads_the_norm(layer, x, positions, first, second):
    """the second bottleneck beside the feed-forward, reading the norm's output;
    it stands behind and reads what the feed-forward returns"""
    y = layer.self_attn(layer.input_layernorm(x), positions)
    x = x + y + first(y)
    b = layer.post_attention_layernorm(x)
    return x + layer.mlp(b) + second(b)


def forward_before_first(layer, x, positions, first, second):
    """the feed-forward fed with the stream as it was before the first bottleneck's output joined it"""
    attention, forward = sublayers(layer, positions)
    y = attention(x)
    z = forward(x + y)
    return x + y + first(y) + z + second(z)


def beside_each_other(layer, x, positions, first, second):
    """attention and feed-forward both fed with x; the feed-forward reads the sum of x,
    attention and the first bottleneck"""
    attention, forward = sublayers(layer, positions)
    y, z = attention(x), forward(x)
    return x + y + first(y) + z + second(z)


def both_at_the_end(layer, x, positions, first, second):
    """both bottlenecks behind the feed-forward, and both fed with its output;
    the first reads what attention returns and is added there"""
    attention, forward = sublayers(layer, positions)
    x = x + attention(x)
    z = forward(x)
    return x + z + first(z) + second(z)


def first_residual_left_out(layer, x, positions, first, second):
    """the residual around attention left out"""
    attention, forward = sublayers(layer, positions)
    y = attention(x)
    x = y + first(y)
    z = forward(x)
    return x + z + second(z)


def positions_forgotten(layer, x, positions, first, second):
    """positions not given to self_attn: without them queries and keys are not rotated"""
    return right_layer(layer, x, None, first, second)


def not_adapted(layer, x, positions, first, second):
    """the layer as it is, without its bottlenecks"""
    return layer(x, positions)


right_layer = as_layer(right_attach)


def probe_layer(answer, draw):
    config = LLaMAConfig(16, 24, 40, 1, 4, 2, attention_bias=True, mlp_bias=True)
    layer, first, second = filled(Layer(config, RoPE(6)), draw), network_of(draw, 24), network_of(draw, 24, 5)
    x, positions = draw(2, 5, 24).requires_grad_(), torch.arange(3, 8)
    out = answer(layer, x, positions, first, second)
    yield "the output (B, T, D)", out
    names = ("x (B, T, D)", "the first bottleneck's up (D, m)", "the second bottleneck's up (D, m)")
    for what, gradient in zip(names, gradients(out, x, first.up.weight, second.up.weight)):
        yield f"the gradient of {what}", gradient
    with torch.no_grad():
        for network in (first, second):
            network.up.weight.zero_(), network.up.bias.zero_()
    yield "the output with both ups at 0: the layer's (B, T, D)", answer(layer, x, positions, first, second)


# ── how many ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parameters(D, m, L, places):
    return L * places * (2 * m * D + D + m)


def no_biases(D, m, L, places):
    """the biases not counted: m for down and D for up"""
    return L * places * 2 * m * D


def one_bias(D, m, L, places):
    """one of the two biases not counted: down has m, up has D"""
    return L * places * (2 * m * D + D)


def one_place(D, m, L, places):
    """one bottleneck a layer counted, whatever `places` says"""
    return L * (2 * m * D + D + m)


def one_matrix(D, m, L, places):
    """one matrix counted; there are two, down and up"""
    return L * places * (m * D + D + m)


def biases_swapped(D, m, L, places):
    """2·m for the biases; down's has m numbers and up's has D"""
    return L * places * (2 * m * D + 2 * m)


def biases_once(D, m, L, places):
    """the biases counted once for the whole model; every bottleneck has its own"""
    return L * places * 2 * m * D + D + m


def down_bias_alone(D, m, L, places):
    """up's bias not counted, D numbers; down has one of m, up one of D"""
    return L * places * (2 * m * D + m)


def biases_of_width(D, m, L, places):
    """2·D for the biases; down's has m numbers, one for each feature it returns, and up's has D"""
    return L * places * (2 * m * D + 2 * D)


def biases_twice(D, m, L, places):
    """the biases counted twice: two matrices of m·D, and two biases, m of down and D of up, once each"""
    return L * places * 2 * (m * D + D + m)


def squares(D, m, L, places):
    """D·D for a matrix; down is (m, D) and up (D, m), m·D numbers each"""
    return L * places * (2 * D * D + D + m)


def one_layer(D, m, L, places):
    """one layer counted; there are L"""
    return places * (2 * m * D + D + m)


def one_bottleneck(D, m, L, places):
    """one bottleneck counted; there are `places` in each of L layers"""
    return 2 * m * D + D + m


def two_places(D, m, L, places):
    """two places a layer counted, whatever `places` says"""
    return L * 2 * (2 * m * D + D + m)


def places_added(D, m, L, places):
    """L + places bottlenecks counted; there are `places` in each of L layers"""
    return (L + places) * (2 * m * D + D + m)


def probe_parameters(answer, draw):
    for D, m, L, places in ((128, 16, 1, 1), (128, 16, 4, 1), (128, 16, 1, 2), (768, 64, 12, 2)):
        yield f"the number for D = {D}, m = {m}, L = {L}, places = {places}", torch.tensor(answer(D, m, L, places))


def learned(steps, start="zero", activation="gelu"):
    """Which of a fresh adapter's tensors have moved after so many steps of gradient descent, as names."""

    def truth():
        torch.manual_seed(0)
        model = minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2))
        model = minillama.adapt(model, "bottleneck", size=3, activation=activation)
        ids, own = torch.randint(0, 31, (2, 6)), minillama.adapters.adapter_parameters(model)
        if start == "all zero":
            for p in own.values():
                nn.init.zeros_(p)
        before = {name: p.detach().clone() for name, p in own.items()}
        for _ in range(steps):
            model.zero_grad()
            minillama.answer_loss(model, ids, ids).backward()
            for p in own.values():
                p.data -= 0.1 * p.grad
        return frozenset(".".join(name.split(".")[-2:]) for name, p in own.items() if not torch.equal(p, before[name]))

    return truth


NAMED = ("down.weight", "down.bias", "up.weight", "up.bias")
DOWN, UP = frozenset(NAMED[:2]), frozenset(NAMED[2:])


def nudges(truth, wrongly, missing):
    """A sentence for every wrong set of names: on the first name that it wrongly has,
    else on the first that is missing."""
    subsets = [frozenset(names) for count in range(5) for names in itertools.combinations(NAMED, count)]

    def said(found):
        held = [sentence for name, sentence in wrongly.items() if name in found - truth]
        return next(iter(held), None) or next(missing[name] for name in missing if name not in found)

    return {found: said(found) for found in subsets if found != truth}


EXERCISES = {
    "bottleneck_network": Exercise(
        "bottleneck_network(x, down_weight, down_bias, up_weight, up_bias) -> (B, T, D)", right_bottleneck,
        (*(as_bottleneck(mistake) for mistake in (NoActivation, WrongActivation, ActivationLast, NoBias)), skip_inside,
         activated_twice, activated_first, up_bias_forgotten, down_bias_forgotten, tanh_gelu, silu_for_gelu,
         computed_in_float32, weights_not_cast, matrices_not_cast, biases_not_cast, added_biases_not_cast,
         down_bias_behind_gelu, sigmoid_for_gelu, tanh_for_gelu, features_detached, input_detached), probe_bottleneck,
    ),
    "bottleneck_start": Exercise(
        "bottleneck_start(D, m) -> down_weight (m, D), down_bias (m), up_weight (D, m), up_bias (D)",
        start_of(Bottleneck),
        (start_of(UpNotZero), start_of(AllZero), as_linear_draws_them, up_bias_kept, down_bias_kept, down_zero,
         units_alike, down_too_large, down_too_small, shapes_swapped), probe_start,
    ),
    "bottleneck_moves_first": Question(
        learned(1),
        "The loss reaches down through up, and up is 0: the gradient of all that lies before it carries that factor.",
        {**nudges(UP,
                  dict.fromkeys(DOWN, "look again at what the gradient of down passes on its way: "
                                      "up's weight, and it is 0."),
                  {"up.weight": "not quite: the gradient of up's weight is the loss's, times the narrow features, "
                                "and these are not 0.",
                   "up.bias": "nearly: is there anything that stands between up's bias and the loss?"}),
         DOWN: "the other way round: what lies behind the zero feels the loss, what lies before it does not."}, NAMED,
    ),
    "bottleneck_moves_second": Question(
        learned(2), "After one step up is no longer 0, and down feels the loss.",
        nudges(DOWN | UP, {},
               {**dict.fromkeys(NAMED[2:], "what moved at the first step has moved: "
                                           "are both of up's tensors in your set?"),
                "down.weight": "up is no longer 0: does down's gradient still vanish?",
                "down.bias": "down's bias stands where down's weight does, in front of GELU: what holds for the one?"}),
        NAMED,
    ),
    "bottleneck_all_zero": Question(
        learned(20, "all zero"),
        "The features are GELU(0) = 0, so up's weight gets no gradient; up stays 0, so down gets none either. "
        "What is left adds one fixed vector to every token.",
        nudges(frozenset(["up.bias"]),
               {"up.weight": "the gradient of up's weight has the narrow features as a factor: "
                             "what are they when down is 0?",
                **dict.fromkeys(NAMED[:2], "down's gradient has up's weight as a factor, which starts at 0: "
                                           "does it ever leave it?")},
               {"up.bias": "one of the four reaches the loss without passing a zero."}), NAMED,
    ),
    "adapted_sublayer": Exercise(
        "adapted_sublayer(sublayer, x, bottleneck) -> (B, T, D)", right_sublayer,
        (*(as_sublayer(mistake) for mistake in (NoInnerResidual, ReadsInput, AddedTwice, BottleneckDropoutInEval)),
         input_for_output, block_residual_too, in_front, in_front_alone, bottleneck_alone, reads_the_sum,
         sublayer_forgotten, subtracted, bottleneck_detached, run_twice, sublayer_detached, no_bottleneck),
        probe_sublayer,
    ),
    "parallel_sublayer": Exercise(
        "parallel_sublayer(sublayer, x, bottleneck, scale) -> (B, T, D)", right_parallel,
        (parallel_reads_output, scale_forgotten, scale_on_the_sum, scale_on_the_sublayer, scale_inside,
         parallel_with_skip, divided_by_the_scale, scale_written_as_a_number, scale_plus_one, scale_subtracted,
         sequential_without_scale, input_for_sublayer, parallel_alone, parallel_in_front, parallel_detached),
        probe_parallel,
    ),
    "houlsby_layer": Exercise(
        "houlsby_layer(layer, x, positions, first, second) -> (B, T, D)", right_layer,
        (as_layer(attach_to_mlp_only), attention_only, behind_the_residual, in_front_of_the_sublayers,
         beside_the_sublayers, bottlenecks_swapped, residuals_replaced, no_residual, norms_forgotten,
         first_norm_forgotten, second_norm_forgotten, norms_swapped, residual_from_the_norm, beside_each_other,
         both_at_the_end, first_residual_left_out, first_norm_twice, first_used_twice, attention_not_passed_on,
         last_residual_left_out, second_reads_the_norm, forward_before_first, positions_forgotten, not_adapted),
        probe_layer,
    ),
    "bottleneck_parameters": Exercise(
        "bottleneck_parameters(D, m, L, places) -> a whole number", parameters,
        (no_biases, one_bias, one_place, one_matrix, biases_swapped, biases_once, down_bias_alone, biases_of_width,
         biases_twice, squares, one_layer, one_bottleneck, two_places, places_added), probe_parameters,
    ),
}  # fmt: skip
