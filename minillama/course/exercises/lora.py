"""Lesson 06: LoRA, with the wrong versions that one writes easily."""

import torch
import torch.nn.functional as F
from torch import nn

import minillama

from ...adapters.lora import LoRALinear
from . import Exercise, Question, Wrong, describe, filled, gradients, moved, named

# ── the catalogue ─────────────────────────────────────────────────────────────────────────────────────────────────────


class ScaledByAlpha(LoRALinear):
    """the path multiplied by α instead of α / r; r is the number of A's rows"""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.scaling = alpha


class ScaledByRoot(LoRALinear):
    """the path multiplied by α / √r, which is another method (rsLoRA); here it is α / r"""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha, dropout)
        self.scaling = alpha / rank**0.5


class BothZero(LoRALinear):
    """A and B both at 0: the identity, but neither ever gets a gradient; A is drawn at random"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.A)


class BothRandom(LoRALinear):
    """A and B both random: the model is not the base at the start; B is 0"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.B, std=0.02)


class WrongOneZero(LoRALinear):
    """A at 0 and B random: the identity, but not the paper's start, which is A random and B at 0"""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.A), nn.init.normal_(self.B)


class ReadsOutput(LoRALinear):
    """the path fed with the projection's output; it stands beside the projection and reads the same x"""

    def forward(self, x):
        y = self.base(x)
        fed = F.pad(y, (0, max(0, self.in_features - self.out_features)))[..., : self.in_features]
        return y + F.linear(F.linear(fed, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scaling


class LoRADropoutInEval(LoRALinear):
    """dropout in front of A in eval mode too; ask for it only while `self.training`, here not at all"""

    def forward(self, x):
        narrow = F.linear(F.dropout(x, 0.1), self.A.to(x.dtype))
        return self.base(x) + F.linear(narrow, self.B.to(x.dtype)) * self.scaling


class MergeUnscaled(LoRALinear):
    """a merge that forgets α / r"""

    @property
    def weight(self):
        return self.base.weight + self.B @ self.A


class DetachedA(LoRALinear):
    """A detached from the graph (detach, .data or no_grad): only B ever learns"""

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.A.detach().to(x.dtype)), self.B.to(x.dtype)) * self.scaling


# ── what is asked ─────────────────────────────────────────────────────────────────────────────────────────────────────


def start_of(wrapper):
    """What a wrapper's parameters start from, as a function of their sizes."""

    def function(in_features, out_features, rank):
        module = wrapper(nn.Linear(in_features, out_features), rank, 16.0)
        return module.A.detach(), module.B.detach()

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def turned_round(in_features, out_features, rank):
    """A and B turned round; A has a row for each direction it reads, (r, in), and B a column for each, (out, r)"""
    A, B = start_of(LoRALinear)(in_features, out_features, rank)
    return A.T, B.T


def deviation_of_one(in_features, out_features, rank):
    """A from N(0, 1): √(3 · in) times as wide as nn.Linear draws it, so that the first steps are too long"""
    return torch.randn(rank, in_features), torch.zeros(out_features, rank)


def kaiming_without_a(in_features, out_features, rank):
    """kaiming_uniform_ without a=√5: √6 times as wide as nn.Linear draws its weight"""
    return nn.init.kaiming_uniform_(torch.empty(rank, in_features)), torch.zeros(out_features, rank)


def probe_start(answer, draw):
    (_, A), (_, B) = named(("A (r, in)", "B (out, r)"), answer(480, 360, 24))
    for what, value, shape in (("A (r, in)", A, (24, 480)), ("B (out, r)", B, (360, 24))):
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            found = f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            needed = f"needed is a tensor of shape {shape} for in = 480, out = 360 and r = 24"
            raise Wrong("shape", f"{what} is {found}; {needed}")
    yield "B (out, r)", B.detach()
    mean, deviation = A.detach().float().mean(), A.detach().float().std()
    yield "A's standard deviation · √(3 · in), to one digit", (deviation * (3 * 480) ** 0.5).mul(10).round() / 10
    yield "A's mean · √(3 · in), to one digit", (mean * (3 * 480) ** 0.5).mul(10).round().abs() / 10


def path_of(wrapper):
    """A wrapper as a function of the projection, the input, A, B and α."""

    def function(linear, x, A, B, alpha):
        return torch.func.functional_call(wrapper(linear, A.shape[0], alpha).eval(), {"A": A, "B": B}, (x,))

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def path_alone(linear, x, A, B, alpha):
    """the path alone, without the frozen projection it is added to"""
    return path_of(LoRALinear)(linear, x, A, B, alpha) - linear(x)


def divided_by_width(linear, x, A, B, alpha):
    """α divided by the number of features instead of the rank: the rank is A.shape[0], or B.shape[1]"""
    return path_of(LoRALinear)(linear, x, A, B, alpha * A.shape[0] / A.shape[1])


def bias_twice(linear, x, A, B, alpha):
    """the projection's bias added twice: linear(x) holds it already"""
    return path_of(LoRALinear)(linear, x, A, B, alpha) + linear.bias


def path_subtracted(linear, x, A, B, alpha):
    """the path subtracted instead of added"""
    return path_of(LoRALinear)(linear, x, A, B, -alpha)


def not_in_the_dtype_of_x(linear, x, A, B, alpha):
    """the path computed in A's dtype: on a bfloat16 base that gives a float32 output; cast A and B to x.dtype"""
    return linear(x) + (x.to(A.dtype) @ A.T @ B.T) * (alpha / A.shape[0])


def probe_path(answer, draw):
    linear = filled(nn.Linear(10, 7), draw)
    x, A, B = draw(2, 5, 10), draw(3, 10).requires_grad_(), draw(7, 3).requires_grad_()
    out = answer(linear, x, A, B, 5.0)
    if not isinstance(out, torch.Tensor) or out.shape != (2, 5, 7):
        needed = "needed is a tensor of shape (2, 5, 7) for an x of shape (2, 5, 10) and a Linear(10, 7)"
        raise Wrong("shape", f"the output (B, T, out) is {describe(out)}; {needed}")
    yield "what is added to linear(x) (B, T, out)", out - linear(x)
    of_A, of_B = gradients(out, A, B)
    yield "A's gradient (r, in)", of_A
    yield "B's gradient (out, r)", of_B
    yield "the output at another rank and α (B, T, out)", answer(linear, x, draw(2, 10), draw(7, 2), 3.0)
    yield "the output at B = 0: the base's (B, T, out)", answer(linear, x, A, B * 0, 5.0)
    try:
        yield "the output in bfloat16 (B, T, out)", answer(linear.bfloat16(), x.bfloat16(), A, B, 5.0)
    except RuntimeError as error:
        stopped = f"right in float32; with linear and x in bfloat16 it stopped ({error})"
        raise Wrong("dtype", f"{stopped}: A and B are float32 there, cast them to x.dtype") from None


def merged_by(wrapper):
    """A wrapper's merge as a function that returns the weight."""

    def function(linear, A, B, alpha):
        module = wrapper(linear, A.shape[0], alpha)
        module.A.data, module.B.data = A, B
        return module.weight.detach()

    function.__name__, function.__doc__ = wrapper.__name__, wrapper.__doc__
    return function


def change_alone(linear, A, B, alpha):
    """the change (α / r) B A alone, without the weight it is added to"""
    return (merged_by(LoRALinear)(linear, A, B, alpha) - linear.weight).detach()


def wrong_order(linear, A, B, alpha):
    """Aᵀ Bᵀ, the product turned round; only where in = out does it fit at all: (out, r) @ (r, in) is B @ A"""
    return linear.weight + alpha / A.shape[0] * (A.T @ B.T)


def base_overwritten(linear, A, B, alpha):
    """the sum written into the base's own weight; return a new one, so that the base can be had back bit for bit"""
    linear.weight.copy_(merged_by(LoRALinear)(linear, A, B, alpha))
    return linear.weight


def not_in_the_dtype_of_the_weight(linear, A, B, alpha):
    """the merged weight in A's dtype: a bfloat16 layer needs it back in linear.weight.dtype"""
    return linear.weight + alpha / A.shape[0] * (B @ A)


def probe_merge(answer, draw):
    for size in ((6, 6), (10, 7)):
        linear, A, B = filled(nn.Linear(*size), draw), draw(3, size[0]), draw(size[1], 3)
        before = linear.weight.clone()
        merged = answer(linear, A, B, 5.0)
        if not isinstance(merged, torch.Tensor) or merged.shape != before.shape:
            needed = f"needed is a tensor of shape {tuple(before.shape)} for a Linear{size}"
            raise Wrong("shape", f"the merged weight (out, in) is {describe(merged)}; {needed}")
        yield f"what the merge of a Linear{size} adds to its weight (out, in)", merged - before
        yield "the number of the base's own weights that were overwritten", (linear.weight != before).sum().clamp(max=1)
    linear = linear.bfloat16()
    yield "the merged weight of a bfloat16 layer (out, in)", answer(linear, A, B, 5.0)


def right_merge_turned(weight, A, B, alpha):
    return (weight + alpha / A.shape[0] * (B @ A).T).to(weight.dtype)


def not_turned(weight, A, B, alpha):
    """B A added as it is, (out, in), to a weight that is stored (in, out):
    only where in = out does it fit at all, and then it is wrong"""
    return weight + alpha / A.shape[0] * (B @ A)


def turned_and_returned(weight, A, B, alpha):
    """the merged weight returned as (out, in), which nn.Linear would want; a Conv1D wants it back as (in, out)"""
    return weight.T + alpha / A.shape[0] * (B @ A)


def turned_unscaled(weight, A, B, alpha):
    """turned rightly, and α / r forgotten"""
    return weight + (B @ A).T


def probe_merge_turned(answer, draw):
    for size in ((6, 6), (10, 7)):
        weight = draw(*size)
        merged = answer(weight, draw(3, size[0]), draw(size[1], 3), 5.0)
        if not isinstance(merged, torch.Tensor) or merged.shape != size:
            needed = f"needed is a tensor of shape {size} for {size[0]} inputs and {size[1]} outputs"
            raise Wrong("shape", f"the merged weight (in, out) is {describe(merged)}; {needed}")
        yield f"what the merge adds to the weight (in, out) of {size[0]} inputs and {size[1]} outputs", merged - weight


def right_fused(A_q, B_q, A_v, B_v, alpha):
    zero = torch.zeros_like(B_q)
    B = torch.cat((torch.cat((B_q, zero), 1), torch.cat((zero, zero), 1), torch.cat((zero, B_v), 1)))
    return torch.cat((A_q, A_v)), B, 2 * alpha


def alpha_as_it_was(A_q, B_q, A_v, B_v, alpha):
    """α as it was: the fused path has rank 2r, so α / rank is halved and with it the whole change; α must be doubled"""
    A, B, _ = right_fused(A_q, B_q, A_v, B_v, alpha)
    return A, B, alpha


def value_in_the_place_of_key(A_q, B_q, A_v, B_v, alpha):
    """the value's block in the key's rows; c_attn's outputs are queries, keys, values in this order"""
    A, B, alpha = right_fused(A_q, B_q, A_v, B_v, alpha)
    n = len(B_q)
    return A, torch.cat((B[:n], B[2 * n :], B[n : 2 * n])), alpha


def both_read_both(A_q, B_q, A_v, B_v, alpha):
    """no zeros beside the blocks, or one A, the sum, for both: the query's rows read A_v's directions too,
    and the value's A_q's"""
    B = torch.cat((torch.cat((B_q, B_q), 1), torch.zeros(len(B_q), 2 * len(A_q)), torch.cat((B_v, B_v), 1)))
    return torch.cat((A_q, A_v)), B, 2 * alpha


def blocks_crossed(A_q, B_q, A_v, B_v, alpha):
    """the blocks crossed: the query's rows read A_v's directions, and the value's A_q's"""
    return right_fused(A_v, B_q, A_q, B_v, alpha)


def probe_fused(answer, draw):
    paths = draw(3, 10), draw(6, 3), draw(3, 10), draw(6, 3)
    result = answer(*paths, 5.0)
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise Wrong("shape", "needed are three things: A, B and α")
    A, B, alpha = result
    tensors = isinstance(A, torch.Tensor) and isinstance(B, torch.Tensor)
    if not tensors or A.shape[-1] != 10 or B.shape[0] != 18 or A.shape[0] != B.shape[-1]:
        shapes = " and ".join(str(tuple(z.shape)) if isinstance(z, torch.Tensor) else type(z).__name__ for z in (A, B))
        needed = "for paths of rank 3 from 10 inputs to 6 outputs needed are (6, 10) and (18, 6)"
        raise Wrong("shape", f"A and B are {shapes}; {needed}, the rank being the axis they share")
    change = float(alpha) / len(A) * (B @ A)  # (3 · out, in)
    for i, name in enumerate(("query", "key", "value")):
        yield f"the change (α / rank) B A in the {name}'s rows (out, in)", change[6 * i : 6 * i + 6]


class Layer(nn.Module):
    """Right, in pieces that the faults below replace: a layer that merges and unmerges itself."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scaling, self.kept = linear.requires_grad_(False), alpha / rank, None
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def path(self, x):
        return x @ self.A.T @ self.B.T * self.scaling

    def forward(self, x):
        return self.linear(x) if self.kept is not None else self.linear(x) + self.path(x)

    @torch.no_grad()
    def merge(self):
        if self.kept is None:
            self.kept = self.linear.weight.clone()
            self.linear.weight += self.scaling * self.B @ self.A

    @torch.no_grad()
    def unmerge(self):
        if self.kept is not None:
            self.linear.weight.copy_(self.kept)
            self.kept = None


class BaseStillTrains(Layer):
    """the base's weight and bias still train: requires_grad_(False) freezes them"""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        linear.requires_grad_(True)


class PathTimesAlpha(Layer):
    """α instead of α / rank"""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        self.scaling = alpha


class RandomB(Layer):
    """B random at the start: the fresh layer is not the base's"""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        nn.init.normal_(self.B, std=0.02)


class DropoutStays(Layer):
    """dropout in eval mode too; ask for it only while `self.training`"""

    def path(self, x):
        return super().path(F.dropout(x, 0.1))


class PathOnTop(Layer):
    """the path added on top of the merged weight, so that it counts twice"""

    def forward(self, x):
        return self.linear(x) + self.path(x)


class MergesTwice(Layer):
    """a second merge() that adds the path a second time; remember whether it is merged"""

    @torch.no_grad()
    def merge(self):
        kept = self.linear.weight.clone() if self.kept is None else self.kept
        self.linear.weight += self.scaling * self.B @ self.A
        self.kept = kept


class UnmergeSubtracts(Layer):
    """an unmerge() that subtracts what was added: (w + d) - d is not w in floating point;
    keep a copy of the weight, or leave it alone"""

    @torch.no_grad()
    def unmerge(self):
        if self.kept is not None:
            self.linear.weight -= self.scaling * self.B @ self.A
            self.kept = None


class UnmergesUnmerged(Layer):
    """an unmerge() of a layer that is not merged changes its weight"""

    @torch.no_grad()
    def unmerge(self):
        if self.kept is None:
            self.linear.weight -= self.scaling * self.B @ self.A
        super().unmerge()


def probe_layer(answer, draw):
    linear, x = filled(nn.Linear(10, 7), draw).requires_grad_(True), draw(2, 5, 10)
    before, expected = linear.weight.detach().clone(), linear(x).detach()
    module = answer(linear, 3, 5.0)
    if not isinstance(module, nn.Module):
        raise Wrong("shape", f"needed is a module; it is a {type(module).__name__}")
    for name, shape in (("A", (3, 10)), ("B", (7, 3))):
        if not isinstance(getattr(module, name, None), nn.Parameter) or getattr(module, name).shape != shape:
            found = {own: tuple(p.shape) for own, p in module.named_parameters()}
            needed = f"needed is a parameter {name} of shape {shape} for a Linear(10, 7) and rank 3"
            raise Wrong("shape", f"{needed}; the module has {found}")
    for name in ("merge", "unmerge"):
        if not callable(getattr(module, name, None)):
            raise Wrong("shape", f"needed is a method {name}()")
    module.eval()
    if module(x) is None:
        raise NotImplementedError
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    yield "the number of numbers that train", torch.tensor(trained)
    yield "the fresh layer's output, less the base's (B, T, out)", module(x) - expected
    yield "whether A is all 0 (then nothing ever learns)", (module.A == 0).all()
    module.A.data, module.B.data = draw(3, 10), draw(7, 3)
    yield "the output with an open path (B, T, out)", module(x)
    module.unmerge()
    yield "the output after unmerge() without a merge, which should change nothing (B, T, out)", module(x)
    module.merge()
    yield "the output after merge() (B, T, out)", module(x)
    module.merge()
    yield "the output after a second merge(), which should change nothing (B, T, out)", module(x)
    module.unmerge()
    yield "the output after unmerge() (B, T, out)", module(x)
    yield "whether unmerge() gave the base's weight back bit for bit", torch.tensor(torch.equal(linear.weight, before))


def trained_on_llama_7b():
    """What LoRA of rank 8 on query and value trains in LLaMA-7B's shape."""
    with torch.device("meta"):
        model = minillama.adapt(minillama.LLaMA(minillama.LLaMAConfig()), "lora", rank=8)
    return sum(p.numel() for p in minillama.adapters.adapter_parameters(model).values())


def rank_of_change():
    """The rank of (α / r) B A for r = 4."""
    torch.manual_seed(0)
    B, A = torch.randn(48, 4, dtype=torch.float64), torch.randn(4, 64, dtype=torch.float64)
    return int(torch.linalg.matrix_rank(16 / 4 * B @ A))


def rank_of_two():
    """The rank of the sum of two such changes."""
    torch.manual_seed(0)
    B, A = torch.randn(2, 48, 4, dtype=torch.float64), torch.randn(2, 4, 64, dtype=torch.float64)
    return int(torch.linalg.matrix_rank((B @ A).sum(0)))


EXERCISES = {
    "lora_start": Exercise(
        "lora_start(in_features, out_features, rank) -> A (r, in), B (out, r)", start_of(LoRALinear),
        (*map(start_of, (BothZero, BothRandom, WrongOneZero)), turned_round, deviation_of_one, kaiming_without_a),
        probe_start,
    ),
    "lora_moves_first": Question(
        moved("lora", rank=2, steps=1),
        "A's gradient carries B as a factor, and B is 0; B's carries A, which is random.",
        {frozenset(["A", "B"]): "look again at what multiplies A's gradient: B, and it is 0.",
         frozenset(["A"]): "the other way round: A's gradient carries B as a factor, and B is 0.",
         frozenset(): "one of the two does move: B's gradient carries A, which is not 0."},
        ("A", "B"),
    ),
    "lora_moves_second": Question(
        moved("lora", rank=2, steps=2), "After one step B is no longer 0, and A feels the loss.",
        {frozenset(["B"]): "B is no longer 0: does A's gradient still vanish?"}, ("A", "B"),
    ),
    "lora_parameters": Question(
        trained_on_llama_7b, "32 layers, two projections each, and each of them r · (in + out) = 8 · (4,096 + 4,096).",
        {32 * 2 * 8 * 4096: "that counts A or B alone; each projection has both.",
         32 * 8 * 8192: "that counts one projection a layer; query and value are two.",
         32 * 2 * 4096 * 4096: "that is what the two frozen projections have themselves; "
                               "the path has r · (in + out) each."},
    ),
    "lora_rank": Question(
        rank_of_change,
        "A maps onto r numbers, and no matrix B behind it makes more than r directions of them; "
        "α / r only stretches them.",
        {16: "16 is α, which stretches the change and adds no direction.",
         48: "48 is what a matrix of this shape could have; everything passes through r = 4 numbers.",
         64: "64 is the number of inputs; everything passes through r = 4 numbers."},
    ),
    "lora_rank_of_two": Question(
        rank_of_two,
        "The rank of a sum is at most the sum of the ranks, and with random directions it is reached: "
        "adding changes up may leave what rank 4 can hold.",
        {4: "the two have different directions; four of each are needed."},
    ),
    "lora_linear": Exercise(
        "lora_linear(linear, x, A, B, alpha) -> (B, T, out)", path_of(LoRALinear),
        (*map(path_of, (ScaledByAlpha, ScaledByRoot, ReadsOutput, LoRADropoutInEval, DetachedA)), path_alone,
         divided_by_width, bias_twice, path_subtracted, not_in_the_dtype_of_x), probe_path,
    ),
    "lora_merge": Exercise(
        "lora_merge(linear, A, B, alpha) -> weight (out, in)", merged_by(LoRALinear),
        (merged_by(MergeUnscaled), change_alone, wrong_order, base_overwritten, not_in_the_dtype_of_the_weight),
        probe_merge,
    ),
    "lora_merge_conv1d": Exercise(
        "lora_merge_conv1d(weight, A, B, alpha) -> weight (in, out)", right_merge_turned,
        (not_turned, turned_and_returned, turned_unscaled), probe_merge_turned,
    ),
    "lora_fused": Exercise(
        "lora_fused(A_q, B_q, A_v, B_v, alpha) -> A (2r, in), B (3 · out, 2r), alpha", right_fused,
        (alpha_as_it_was, value_in_the_place_of_key, both_read_both, blocks_crossed), probe_fused,
    ),
    "lora_layer": Exercise(
        "a class: LoRALayer(linear, rank, alpha) with merge() and unmerge(), called as layer(x) -> (B, T, out)", Layer,
        tuple(Layer.__subclasses__()), probe_layer,
    ),
}  # fmt: skip
