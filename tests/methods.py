"""What every adapter method is held to: the checks, and the formula of the whole adapted model written out in float64.

A check takes `build`, a way to make the model, so that the checks which the right implementation passes can be asked of
each planted mistake too (mistakes.py), and one of them must fail.
"""

import functools
import math

import torch
import torch.nn.functional as F
from small import left_padded, make, open_gates, seed

import minillama
from minillama import Cache, adapt
from minillama.adapters import adapter_parameters, base_tensors, outermost, wrappers
from minillama.adapters.merging import Merged

LENGTHS = [9, 4, 6]  # of the rows of `ids`, when padded on the left

OUTPUTS = ("q_proj", "k_proj", "up_proj")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
# Every method, by a name for the test's title: the arguments of `adapt`,
# and the parameters that move at the first step.
CASES = {
    "llama_adapter": (dict(method="llama_adapter", prompt_length=4), ("gate",)),
    "v2": (dict(method="llama_adapter_v2"), ("scale", "adapter_bias", "weight", "bias")),
    "v2, head": (dict(method="llama_adapter_v2", head=True), ("scale", "adapter_bias", "weight", "bias")),
    "v2, official": (dict(method="llama_adapter_v2", order="input"), ("scale", "adapter_bias", "weight", "bias")),
    "prefix_tuning": (dict(method="prefix_tuning", prefix_length=4), ("keys", "values")),
    "prompt_tuning": (dict(method="prompt_tuning", prompt_length=4), ("prompt",)),
    "ia3": (dict(method="ia3"), ("scale",)),
    "ia3 everywhere": (dict(method="ia3", outputs=OUTPUTS, inputs=("o_proj", "down_proj")), ("scale",)),
    "lora": (dict(method="lora", rank=3, alpha=5.0), ("B",)),
    "lora everywhere": (dict(method="lora", rank=2, alpha=3.0, targets=EVERY), ("B",)),
    "dora": (dict(method="dora", rank=3, alpha=5.0), ("B", "magnitude")),
    "image_prompt": (dict(method="image_prompt", tokens=4, features=6), ("gate",)),
    "image_prompt, global": (
        dict(method="image_prompt", tokens=2, features=6, way="global", prompt_length=3),
        ("gate",),
    ),
    "houlsby": (dict(method="bottleneck", size=5), ("up.weight", "up.bias")),
    "pfeiffer": (dict(method="bottleneck", reduction=8, place="pfeiffer"), ("up.weight", "up.bias")),
    "seq_bn": (
        dict(method="bottleneck", reduction=8, place="pfeiffer", reads="stream", layers=2),
        ("up.weight", "up.bias"),
    ),
    "par_bn": (
        dict(method="bottleneck", size=5, place="parallel", reads="stream", scale=4.0, layers=[0, 2]),
        ("up.weight", "up.bias"),
    ),
    "parallel": (dict(method="bottleneck", size=5, place="parallel", scale=4.0), ("up.weight", "up.bias")),
}


def show(model, rows=slice(0, 3)):
    """Shows every adapter that takes pictures one for each row but the second, which is text alone; the model."""
    for _, wrapper in wrappers(model):
        if hasattr(wrapper, "seen"):
            features = wrapper.projection.in_features // (1 if wrapper.way == "places" else wrapper.tokens)
            drawn = torch.randn(3, wrapper.tokens, features, generator=torch.Generator().manual_seed(3))
            shown = torch.tensor([1.0, 0.0, 1.0])[:, None, None, None]
            wrapper.seen = (drawn * shown[..., 0])[rows], shown[rows]
    return model


def adapted(model, case, name="default"):
    """The model with the adapter of a case, and pictures before its eyes where it takes them."""
    arguments = CASES[case][0] if isinstance(case, str) else case
    return show(adapt(model, **arguments, name=name))


def builder(kind, case, **changes):
    """build(state): the same random base each time, plain (None), freshly adapted,
    or with every adapter number random."""
    arguments, first = CASES[case]

    def build(state, dtype=torch.float32):
        seed(0)
        model = make(kind).to(dtype)
        if state is None:
            return model
        seed(1)
        adapted(model, {**arguments, **changes})
        return open_gates(model) if state == "open" else model

    build.first = first
    build.identity = arguments["method"] not in ("prefix_tuning", "prompt_tuning")
    # angles are float32: turning keys back rounds otherwise than turning queries on
    build.tolerance = 1e-10 if build.identity else 1e-6
    build.mergeable = arguments["method"] in ("ia3", "lora", "dora", "llama_adapter_v2")
    build.base = lambda ids, *how: base_logits(kind, tuple(map(tuple, ids.tolist())), *how)
    build.reference = lambda ids, real: reference(
        kind, case, tuple(changes.items()), tuple(ids.flatten().tolist()), tuple(map(tuple, real.tolist()))
    )
    return build


@functools.cache
@torch.no_grad()
def base_logits(kind, ids, dtype, padded, cached):
    """What `run` gives for the base that every `builder(kind, case)` adapts."""
    return run(builder(kind, "ia3")(None, dtype), torch.tensor(ids), padded, cached)


# ── the formula ─────────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def reference(kind, case, changes, ids, real):
    """The formula's logits for what `builder(kind, case, **changes)` opens; the same for every planted mistake."""
    real = torch.tensor(real)
    model = builder(kind, case, **dict(changes))("open").double()
    return reference_logits(model, torch.tensor(ids).view(real.shape), real)


def reference_logits(model, ids, real):
    """Logits of an adapted model, its parameters read by name and every adapter term written out."""
    (part,) = model.adapters["default"]
    own = {name.replace(f".{part['method']}.", "."): tensor for name, tensor in adapter_parameters(model).items()}
    weight = base_tensors(model) | own
    llama = isinstance(model, minillama.LLaMA)
    before = part.get("prefix_length", 0)  # tokens that stand before the words
    seen = next((wrapper.seen for _, wrapper in wrappers(model) if hasattr(wrapper, "seen")), None)

    def bottleneck(place, x):
        gelu, relu = lambda z: z / 2 * (1 + torch.erf(z / math.sqrt(2))), lambda z: z.clamp(min=0)
        act = gelu if part["place"] == "houlsby" else relu
        narrow = act(x @ own[f"{place}.bottleneck.down.weight"].T + own[f"{place}.bottleneck.down.bias"])
        return part["scale"] * (narrow @ own[f"{place}.bottleneck.up.weight"].T + own[f"{place}.bottleneck.up.bias"])

    def linear(place, x):
        if f"{place}.adapter_bias" in own:
            x = x * own[f"{place}.scale"] if part["order"] == "input" else x
            y = x @ weight[f"{place}.weight"].T + weight.get(f"{place}.bias", 0) + own[f"{place}.adapter_bias"]
            return y * own[f"{place}.scale"] if part["order"] == "output" else y
        scaled = f"{place}.scale" in own and place.rpartition(".")[2]
        y = (x * own[f"{place}.scale"] if scaled and scaled in part["inputs"] else x) @ weight[f"{place}.weight"].T
        y = y + weight[f"{place}.bias"] if f"{place}.bias" in weight else y
        if scaled and scaled in part["outputs"]:
            y = y * own[f"{place}.scale"]
        if f"{place}.magnitude" in own:
            W = weight[f"{place}.weight"] + part["alpha"] / part["rank"] * own[f"{place}.B"] @ own[f"{place}.A"]
            length = W.pow(2).sum(1).sqrt()
            y = own[f"{place}.magnitude"] * (x @ (W / length[:, None]).T) + weight.get(f"{place}.bias", 0)
        elif f"{place}.A" in own:
            y = y + part["alpha"] / part["rank"] * (x @ own[f"{place}.A"].T @ own[f"{place}.B"].T)
        if f"{place}.bottleneck.up.weight" in own:
            y = y + bottleneck(place, y + stream[-1] if part["reads"] == "stream" else y)
        return y

    def norm(place, x):
        place = f"{place}.trained" if f"{place}.trained.weight" in own else place
        if not llama:
            given = weight[f"{place}.weight"], weight[f"{place}.bias"]
            return F.layer_norm(x, x.shape[-1:], *given, model.config.layer_norm_eps)
        if f"{place}.weight" not in weight:  # no norm there
            return x
        factor = weight[f"{place}.weight"] + model.config.norm_offset
        x = x.unflatten(-1, (-1, len(factor)))  # several heads, each by itself
        return (x / (x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt() * factor).flatten(-2)

    def attention(place, x):
        H = model.config.num_attention_heads
        G = llama and model.config.num_key_value_heads or H
        q, k, v = (linear(f"{place}.{name}", x) for name in ("q_proj", "k_proj", "v_proj"))
        rope, window = model.config.kind(int(place.split(".")[1])) if llama else (None, None)
        d = q.shape[-1] // H
        scale = llama and model.config.attention_multiplier or 1 / math.sqrt(d)
        if llama:
            q, k = norm(f"{place}.q_norm", q), norm(f"{place}.k_norm", k)
        if f"{place}.prompt" in own:
            prompts = [own[f"{place}.prompt"]] * len(x)
            if seen:
                w, b = (own[f"layers.0.self_attn.projection.{n}"] for n in ("weight", "bias"))  # all layers' own
                one = part["way"] == "global"  # one vector for all prompts
                prompts = [p + (f.reshape(1, -1) if one else f).double() @ w.T + b for p, f in zip(prompts, seen[0])]
            gate = own[f"{place}.gate"].tanh() if part["tanh"] else own[f"{place}.gate"]
            gate = gate.expand(H, 1, d)
        y = torch.zeros_like(q)
        for b in range(len(x)):
            words = real[b].nonzero()[:, 0]  # n places
            every = torch.ones(len(words), before + len(words)).bool()
            hidden = every.triu(before + 1)  # the future, and what lies further back than the window
            hidden = hidden if window is None else hidden | every.tril(before - window)
            for h in range(H):
                group = h // (H // G)
                of_q, of_k = slice(h * d, h * d + d), slice(group * d, group * d + d)
                query, key = q[b, words, of_q], k[b, words, of_k]  # (n, d)
                if rope:
                    query, key = rotated(query, rope, before), rotated(key, rope, before)
                value = v[b, words, of_k]
                if before:
                    key, value = (
                        torch.cat((own[f"{place}.{kind}"][group], mine))
                        for kind, mine in (("keys", key), ("values", value))
                    )
                y[b, words, of_q] = (scale * query @ key.T).masked_fill(hidden, -math.inf).softmax(-1) @ value
                if f"{place}.prompt" in own:
                    pk, pv = (linear(f"{place}.{name}", prompts[b]) for name in ("k_proj", "v_proj"))
                    pk = norm(f"{place}.k_norm", pk) if llama else pk
                    on_prompts = (scale * query @ pk[:, of_k].T).softmax(-1) @ pv[:, of_k]
                    y[b, words, of_q] += gate[h] * on_prompts * (float(seen[1][b]) if seen else 1)
        return linear(f"{place}.o_proj", y)

    def mlp(place, x):
        u = linear(f"{place}.up_proj", x)
        if llama:
            g = linear(f"{place}.gate_proj", x)
            u = u * (g / (1 + (-g).exp()) if model.config.hidden_act == "silu" else gelu_by_tanh(g))
        else:
            u = gelu_by_tanh(u)
        y = linear(f"{place}.down_proj", u)
        read = stream[-1] if part.get("reads") == "stream" else x
        return y + bottleneck(place, read) if f"{place}.bottleneck.up.weight" in own else y

    def gelu_by_tanh(u):
        return u / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))

    x, words = weight["embed_tokens.weight"][ids], ids.shape[1]
    if "embed_tokens.prompt" in own:
        prompt = own["embed_tokens.prompt"]
        x, real = torch.cat((prompt.expand(len(x), -1, -1), x), 1), F.pad(real, (len(prompt), 0), value=True)
    if not llama:
        x = x + weight["embed_positions.weight"][before + (real.cumsum(1) - 1).clamp(min=0)]
    by, stream = model.config.residual_multiplier if llama else 1, []  # what enters the norms of feed-forwards
    x = x * (model.config.embedding_multiplier if llama else 1)
    for i in range(len(model.layers)):
        y = attention(f"layers.{i}.self_attn", norm(f"layers.{i}.input_layernorm", x))
        x = x + by * (norm(f"layers.{i}.behind_attention", y) if llama else y)
        stream.append(x)
        y = mlp(f"layers.{i}.mlp", norm(f"layers.{i}.post_attention_layernorm", x))
        x = x + by * (norm(f"layers.{i}.behind_mlp", y) if llama else y)
    return linear("lm_head", norm("norm", x[:, -words:]) / (model.config.logits_scaling if llama else 1))


def rotated(z, rope, first=0):
    """Row n of z (n, d) turned by first + n times the frequencies."""
    a, b = z.chunk(2, -1)
    angle = torch.arange(first, first + len(z))[:, None] * rope.frequencies()
    # float32 as in the model: test_models.py holds it to transformers'
    cos, sin = ((turn * rope.attention_factor).double() for turn in (angle.cos(), angle.sin()))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# ── the checks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run(model, ids, padded=False, cached=False):
    """Logits (B, T, V) of the model by one of the four ways to call it."""
    mask = left_padded(ids, LENGTHS)[1] if padded else None
    if not cached:
        return model(ids, mask)
    cache, parts, seen = Cache(), [], 0
    for part in ids.split([4, 1, 1, 3], dim=1):
        seen += part.shape[1]
        parts.append(model(part, mask[:, :seen] if padded else None, cache))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def check_closed(build, ids):
    """At the start: the base's logits bit for bit, both dtypes, with and without cache and padding.

    A method without an identity start must say so by its distance, and be the base when disabled."""
    for dtype in (torch.float32, torch.bfloat16):
        adapted = build("closed", dtype)
        for padded in (False, True):
            for cached in (False, True):
                expected = build.base(ids, dtype, padded, cached)
                assert torch.equal(run(adapted, ids, padded, cached), expected) == build.identity
                with minillama.disabled(adapted):
                    assert torch.equal(run(adapted, ids, padded, cached), expected)


@torch.no_grad()
def check_open(build, ids):
    """With random numbers everywhere: every logit equals the formula in float64, all four ways to call the model."""
    model = build("open").double()
    for padded in (False, True):
        real = left_padded(ids, LENGTHS)[1].bool() if padded else torch.ones_like(ids).bool()
        expected = build.reference(ids, real)
        scale = expected[real].abs().max()
        for cached in (False, True):
            assert (run(model, ids, padded, cached) - expected)[real].abs().max() < build.tolerance * scale


def check_two_steps(build, ids):
    """The first step moves what starts at zero and nothing else, the second everything trainable;
    the base never moves."""
    model = build("closed").double().train()  # in float64 no step is too small to be seen
    own = adapter_parameters(model)
    every = base_tensors(model) | own
    before = {name: tensor.detach().clone() for name, tensor in every.items()}

    def step():
        model.zero_grad()
        minillama.answer_loss(model, ids, ids).backward()
        for parameter in model.parameters():  # also one that was unfrozen on the way
            if parameter.requires_grad and parameter.grad is not None:
                parameter.data -= 0.1 * parameter.grad
        return {name for name, tensor in every.items() if not torch.equal(tensor, before[name])}

    assert step() == {name for name in own if name.endswith(build.first)}
    assert step() == set(own)
    for name in own:
        moved = (own[name] != before[name]).float().mean()
        assert moved > 0.5 or "down" in name, f"most of {name} never moved"  # a ReLU may leave down rows dead


@torch.no_grad()
def check_nothing_stale(build, ids):
    """After the adapter changes, the next forward and the next generation use the new numbers."""
    model = build("open")
    model(ids), minillama.generate(model, ids, 2)
    fresh = build("open")
    for mine, theirs in zip(adapter_parameters(model).values(), adapter_parameters(fresh).values()):
        mine += 0.5
        theirs.copy_(mine)
    assert torch.equal(model(ids), fresh(ids))
    assert torch.equal(minillama.generate(model, ids, 4), minillama.generate(fresh, ids, 4))


@torch.no_grad()
def check_merge(build, ids):
    """Merged equals adapted, and unmerging restores both the adapted model and the base bit for bit,
    even from scale 0."""
    model, base = build("open").double(), build(None).double()(ids)
    for parameter in adapter_parameters(model).values():
        parameter.view(-1)[0] = 0.0
    adapted = model(ids)
    minillama.merge(model)
    assert all(isinstance(wrapper, Merged) for _, _, wrapper in outermost(model))
    assert (model(ids) - adapted).abs().max() < 1e-9 * adapted.abs().max()
    minillama.unmerge(model)
    assert torch.equal(model(ids), adapted)
    with minillama.disabled(model):
        assert torch.equal(model(ids), base)


CHECKS = [check_two_steps, check_open, check_merge, check_nothing_stale, check_closed]


def checks(case):
    """Those that apply to a case."""
    return [check for check in CHECKS if check is not check_merge or builder("llama", case).mergeable]


def fails(check, build, ids):
    try:
        check(build, ids)
    except Exception:  # a version that breaks is caught too
        return True
    return False
