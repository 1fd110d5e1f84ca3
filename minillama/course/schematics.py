"""The schematics: how each method stands in the frozen model, drawn of boxes.py."""

from .boxes import OVER, arrow, box, cells, chain, frame, funnel, joint, note, point, sheet, strip, zoom


def block_schematic():
    """A LLaMA from ids to logits (Touvron et al. 2023), one of its layers,
    and what stands in the layer's two sublayers."""
    axes = sheet(11, 5.4, "LLaMA: from ids to logits", kinds=())
    for x, kind, text in ((8.35, "frozen", "has weights"), (9.75, "flow", "has none")):
        box(axes, x, 5.08, 0.3, 0.2, kind=kind)
        note(axes, x + 0.23, 5.08, text, 10)

    names, heights = ("embed_tokens", "layer 0", "layer $L-1$", "norm", "lm_head"), (1.08, 1.72, 2.64, 3.28, 3.86)
    inner, ends = dict(width=1.45, height=0.36, kind="frozen"), dict(width=0.75, height=0.36)
    stack = [box(axes, 1.05, 0.5, text="ids", **ends)]
    stack += [box(axes, 1.05, y, text=name, **inner) for name, y in zip(names, heights)]
    stack += [box(axes, 1.05, 4.44, text="logits", **ends)]
    chain(axes, "up", *stack[:3])
    chain(axes, "up", *stack[3:])
    note(axes, 1.05, 2.18, "⋮", 12, ha="center")

    frame(axes, 2.35, 0.3, 5.35, 4.7, "a layer", of=stack[3])
    first, second = joint(axes, 3.3, 2.3, "+"), joint(axes, 3.3, 4.05, "+")
    chain(axes, "up", point(3.3, 0.5), first, second, point(3.3, 4.62))
    sublayers = []
    for below, plus, name in ((0.72, first, "self_attn"), (2.62, second, "mlp")):
        norm = box(axes, 4.4, below + 0.4, 1.2, 0.36, "RMSNorm", "frozen")
        sublayer = box(axes, 4.4, below + 1.0, 1.2, 0.36, name, "frozen")
        arrow(axes, (3.3, below), (4.4, below), norm.bottom)
        chain(axes, "up", norm, sublayer)
        arrow(axes, sublayer.top, (4.4, plus.right[1]), plus.right)
        sublayers.append(sublayer)
    note(axes, 3.02, 0.52, "$x$", 11)
    note(axes, 3.45, 4.42, "the residual stream")

    frame(axes, 5.85, 2.95, 10.75, 4.7, "mlp: SwiGLU", of=sublayers[1])
    gate = box(axes, 7.0, 4.05, 1.1, 0.36, "gate_proj", "frozen")
    up = box(axes, 7.0, 3.35, 1.1, 0.36, "up_proj", "frozen")
    silu, times = box(axes, 8.2, 4.05, 0.7, 0.36, "SiLU"), joint(axes, 9.05, 4.05, "x")
    down = box(axes, 9.95, 4.05, 1.1, 0.36, "down_proj", "frozen")
    chain(axes, "right", gate, silu, times, down, point(10.7, 4.05))
    arrow(axes, up.right, (9.05, 3.35), times.bottom)
    arrow(axes, (6.0, 4.05), gate.left)
    arrow(axes, (6.2, 4.05), (6.2, 3.35), up.left)

    frame(axes, 5.85, 0.3, 10.75, 2.7, "self_attn: three verbs", of=sublayers[0])
    attend = box(axes, 9.0, 1.57, 0.95, 1.5, "softmax\n$(q k^{\\top}\\!/\\sqrt{d})$\n$\\cdot\\ v$", size=10)
    output = box(axes, 10.15, 1.57, 0.75, 0.36, "o_proj", "frozen")
    for y, name in ((2.1, "q"), (1.57, "k"), (1.04, "v")):
        projection = box(axes, 6.85, y, 0.85, 0.36, f"{name}_proj", "frozen")
        if y == 1.57:
            arrow(axes, (6.0, y), projection.left)
        else:
            arrow(axes, (6.2, 1.57), (6.2, y), projection.left)
        turned = () if name == "v" else (box(axes, 7.85, y, 0.65, 0.36, "RoPE"),)
        chain(axes, "right", projection, *turned, point(attend.left[0], y))
    chain(axes, "right", attend, output, point(10.7, 1.57))
    for x, verb in ((7.3, "project"), (9.0, "attend"), (10.15, "output")):
        note(axes, x, 0.56, verb, 10.5, ha="center", style="italic")
    return axes.figure


def llama_adapter_schematic():
    """LLaMA-Adapter (Zhang et al. 2023, after its figure 2): the top N layers get prompts;
    inside, two softmaxes and a gate."""
    axes = sheet(11, 5.2, "LLaMA-Adapter: zero-init gated prefix attention", ("frozen", "trained", "gate"))
    frame(axes, 0.25, 2.14, 3.35, 4.4, "the top $N$ of $L$ layers")
    names = ("token embeddings", "layer 0", "layer $L-N-1$", "layer $L-N$", "layer $L-2$", "layer $L-1$")
    heights = (0.48, 1.03, 1.84, 2.45, 3.26, 3.8)
    stack = [box(axes, 2.45, y, 1.45, 0.36, name, "frozen") for name, y in zip(names, heights)]
    for part in (stack[:2], stack[2:4], [*stack[4:], point(2.45, 4.62)]):
        chain(axes, "up", *part)
    for y in (1.435, 2.855):
        note(axes, 2.45, y, "⋮", 12, ha="center")
    for layer in stack[3:]:
        chain(axes, "right", box(axes, 0.88, layer.left[1], 0.95, 0.36, "$K$ prompts", "trained"), layer)
    note(axes, 2.58, 4.54, "to the head")

    frame(axes, 3.85, 0.3, 10.75, 4.55, "inside an adapted layer's attention", of=stack[-1])
    tokens = box(axes, 4.6, 2.8, 1.0, 0.62, "tokens ($T$)")
    prompts = box(axes, 4.6, 1.65, 1.0, 0.62, "prompts\n($K$ tokens)", "trained")
    q_proj = box(axes, 6.1, 3.75, 1.0, 0.4, "q_proj", "frozen")
    o_proj = box(axes, 10.15, 2.8, 0.75, 0.4, "o_proj", "frozen")
    box(axes, 6.1, 2.225, 1.0, 1.85, "k_proj\nv_proj\n\nthe same\nfor both", "frozen")
    over_tokens = box(axes, 8.0, 2.8, 1.5, 0.7, "softmax$(S_T)\\,V_T$\nover $T$ tokens")
    over_prompts = box(axes, 8.0, 1.65, 1.5, 0.7, "softmax$(S_K)\\,V_K$\nover $K$ prompts")
    plus, times = joint(axes, 9.25, 2.8, "+"), joint(axes, 9.25, 1.65, "x")
    gate = box(axes, 9.25, 0.95, 0.85, 0.36, "tanh $g$", "gate")
    for y, source, softmax in ((2.8, tokens, over_tokens), (1.65, prompts, over_prompts)):
        arrow(axes, source.right, (5.6, y))
        arrow(axes, (6.6, y), softmax.left)
    arrow(axes, tokens.top, (4.6, 3.75), q_proj.left)
    arrow(axes, (6.98, 3.75), (6.98, 1.83), (7.25, 1.83), path_effects=OVER)
    arrow(axes, q_proj.right, (8.0, 3.75), over_tokens.top)
    chain(axes, "right", over_tokens, plus, o_proj)
    chain(axes, "right", over_prompts, times)
    chain(axes, "up", gate, times, plus)
    chain(axes, "up", o_proj, point(10.15, 3.55))
    note(axes, 10.15, 3.77, "to the\nresidual sum", ha="center")
    note(axes, 7.1, 3.9, "$q$")
    note(axes, 6.68, 2.94, "$k, v$")
    note(axes, 6.68, 1.48, "$k, v$")
    note(axes, 4.1, 1.03, "$S = q\\,k^{\\top}/\\sqrt{d}$; the prompts' keys carry no rotary position.")
    closed = "One $g$ a head, $0$ at first: the prompts then add $0$,\nand the layer is the base's, bit for bit."
    note(axes, 4.1, 0.68, closed)
    return axes.figure


def prefix_cross_attention_schematic():
    """Prefix cross-attention beside a layer's self-attention: on the left where its result goes,
    on the right how it is made."""
    axes = sheet(10.5, 4.9, "Prefix cross-attention, let in by a gating factor", ("frozen", "trained", "gate"))
    frame(axes, 0.25, 0.3, 5.35, 4.35, "the layer")
    x, attention = box(axes, 1.25, 3.65, 0.7, 0.4, "$x$"), box(axes, 1.25, 2.85, 1.4, 0.46, "self-attention", "frozen")
    plus, times = joint(axes, 1.25, 1.85, "+"), joint(axes, 2.5, 1.85, "x")
    cross = box(axes, 4.1, 1.85, 2.0, 0.46, "prefix cross-attention")
    gate = box(axes, 2.5, 1.05, 1.4, 0.46, "gating factor", "gate")
    chain(axes, "down", x, attention, plus, box(axes, 1.25, 1.05, 0.75, 0.46, "o_proj", "frozen"), point(1.25, 0.42))
    chain(axes, "left", cross, times, plus)
    chain(axes, "up", gate, times)
    note(axes, 1.4, 2.3, "$y$")
    note(axes, 3.3, 1.05, "$0$ at first: the sum is\nthen $y$, bit for bit")

    frame(axes, 5.65, 0.3, 10.25, 4.35, "inside prefix cross-attention", of=cross)
    prefix = box(axes, 8.6, 3.65, 1.3, 0.4, "prefix ($K$, $D$)", "trained")
    project = box(axes, 8.6, 2.85, 2.6, 0.5, "linear projection: the layer's\nown k_proj and v_proj", "frozen")
    places = ((6.4, "query"), (7.8, "prefix key"), (9.4, "prefix value"))
    query, key, value = (box(axes, at, 1.85, 1.15, 0.4, text) for at, text in places)
    scaled = box(axes, 7.8, 1.05, 2.5, 0.46, "scaled dot-product attention")
    chain(axes, "down", prefix, project)
    chain(axes, "down", point(7.8, 2.6), key, scaled, point(7.8, 0.5))
    chain(axes, "down", point(9.4, 2.6), value)
    arrow(axes, attention.right, (6.4, 2.85), query.top)
    arrow(axes, query.bottom, (6.4, 1.05), scaled.left)
    arrow(axes, value.bottom, (9.4, 1.05), scaled.right)
    note(axes, 3.1, 3.02, "the tokens' $q$, used again")
    note(axes, 7.95, 0.56, "to the gating factor")
    return axes.figure


def image_prompt_schematic():
    """Prompts that carry a picture (Zhang et al. 2023, section 3.3): two frozen models, and what is trained between."""
    axes = sheet(11, 4.5, "A picture in the prompts", ("frozen", "trained", "gate"))
    frame(axes, 0.25, 0.3, 4.1, 3.95, "once for each picture")
    picture, eye = box(axes, 1.0, 2.6, 0.95, 0.5, "picture"), box(axes, 2.9, 2.6, 1.5, 0.5, "vision encoder", "frozen")
    features = box(axes, 2.9, 1.75, 1.9, 0.42, "features ($N$, $F$)")
    projection = box(axes, 2.9, 0.9, 1.5, 0.46, "projection $f$", "trained")
    chain(axes, "right", picture, eye)
    chain(axes, "down", eye, features, projection)
    frame(axes, 4.4, 0.3, 10.75, 3.95, "in each layer")
    plus, prompt = joint(axes, 5.35, 0.9, "+"), box(axes, 5.35, 1.85, 1.45, 0.46, "prompts $P_l$", "trained")
    chain(axes, "right", projection, plus)
    chain(axes, "down", prompt, plus)
    project = box(axes, 6.95, 0.9, 1.5, 0.46, "k_proj, v_proj", "frozen")
    attend = box(axes, 6.95, 1.85, 1.5, 0.46, "softmax of its own")
    chain(axes, "right", plus, project)
    chain(axes, "up", project, attend)
    base = box(axes, 6.95, 3.05, 1.7, 0.46, "self-attention", "frozen")
    times, total = joint(axes, 8.55, 1.85, "x"), joint(axes, 9.4, 3.05, "+")
    gate = box(axes, 8.55, 0.9, 1.1, 0.46, "tanh($g$)", "gate")
    chain(axes, "right", point(5.35, 3.05), base, total, point(10.6, 3.05))
    chain(axes, "right", attend, times)
    chain(axes, "up", gate, times)
    arrow(axes, times.right, (9.4, 1.85), total.bottom)
    arrow(axes, base.bottom, attend.top)
    note(axes, 7.05, 2.45, "the tokens' $q$")
    note(axes, 5.05, 3.25, "text")
    note(axes, 9.65, 2.8, "o_proj")
    note(axes, 9.22, 0.9, "$0$ at first; the term is $0$\nwithout a picture too", 8.5)
    return axes.figure


def ia3_schematic():
    """IA3 (Liu et al. 2022, after its figure 1): vectors on keys, values and the hidden activation,
    each feature less or more."""
    axes = sheet(10.5, 5.5, "IA3: three vectors inhibit and amplify, feature by feature")
    frame(axes, 0.25, 0.75, 6.15, 4.95, "attention")
    scaled = box(axes, 2.6, 3.8, 4.2, 0.4, "scaled dot-product attention")
    output = box(axes, 2.6, 4.42, 0.9, 0.38, "o_proj", "frozen")
    chain(axes, "up", scaled, output)
    chain(axes, "right", output, point(3.6, 4.42))
    k_values, v_values = (0.6, -0.5, 0.1, -0.8, 0.75, 0.3, -0.2), (-0.3, 0.7, -0.75, 0.2, -0.1, 0.6, 0.4)
    for name, at, values in (("k", 2.3, k_values), ("v", 4.2, v_values), ("q", 0.95, None)):
        projection, top = box(axes, at, 1.75, 0.9, 0.38, f"{name}_proj", "frozen"), point(at, 3.6)
        arrow(axes, (2.3, 1.0 if name == "k" else 1.27), (at, 1.27), projection.bottom)
        turned = () if name == "v" else (box(axes, at, 3.02, 0.8, 0.34, "RoPE"),)
        if values:
            times = joint(axes, at, 2.42, "x")
            chain(axes, "up", projection, times, *turned, top)
            chain(axes, "left", strip(axes, at + 0.98, 2.42, 1.0, values), times)
            note(axes, at + 0.98, 2.0, f"$l_{name}$", 12, ha="center")
        else:
            chain(axes, "up", projection, *turned, top)
        note(axes, at + 0.1, 3.4, {"q": "$q$, turned", "k": "$l_k \\odot k$, turned", "v": "$l_v \\odot v$"}[name], 10)

    frame(axes, 6.45, 0.75, 10.25, 4.95, "feed-forward")
    up, curve = box(axes, 7.4, 1.75, 1.1, 0.38, "up_proj", "frozen"), box(axes, 7.4, 2.5, 1.5, 0.38, "non-linearity")
    times, down = joint(axes, 7.4, 3.25, "x"), box(axes, 7.4, 4.0, 1.1, 0.38, "down_proj", "frozen")
    chain(axes, "up", point(7.4, 1.0), up, curve, times, down)
    chain(axes, "left", strip(axes, 9.0, 3.25, 1.3, (0.5, -0.7, 0.2, 0.7, -0.15, -0.5, 0.35, -0.8, 0.6)), times)
    chain(axes, "right", down, point(8.4, 4.0))
    note(axes, 9.0, 2.83, "$l_{ff}$", 12, ha="center")
    note(axes, 8.4, 2.1, "in LLaMA (SwiGLU):\nsilu(gate_proj $x$)\n$\\odot$ up_proj $x$")
    for at in (2.42, 7.52):
        note(axes, at, 0.98, "$x$", 11)
    for at in ((3.7, 4.42), (8.5, 4.0)):
        note(axes, *at, "to the residual sum")
    note(axes, 0.25, 0.42, "Bars: a feature above the middle line is amplified (factor > 1), below it inhibited (< 1). "
         "A LLaMA has RoPE, a GPT-2 has not.")  # fmt: skip
    return axes.figure


def bottleneck_schematic():
    """Bottleneck adapters (Houlsby et al. 2019, after their figure 2) in a block with its norms in front,
    and the parallel form."""
    axes = sheet(11, 5.3, "Bottleneck adapters: behind each sublayer, or beside one")
    y, left, parts = 3.75, 1.05, [point(0.55, 3.75)]
    for sublayer, wide in (("attention", 1.1), ("feed-forward", 1.2)):
        branch = left - 0.195
        three = ("norm", 0.72, "frozen"), (sublayer, wide, "frozen"), ("bottleneck", 1.15, "trained")
        for name, width, kind in three:
            parts.append(box(axes, left + width / 2, y, width, 0.5, name, kind))
            left += width + 0.33
        parts.append(joint(axes, left + 0.16, y, "+"))
        arrow(axes, (branch, y), (branch, y + 0.62), (left + 0.16, y + 0.62), parts[-1].top)
        note(axes, (branch + left) / 2, y + 0.75, "residual", ha="center")
        left += 0.65
    chain(axes, "right", *parts, point(left, y))
    note(axes, 0.35, y, "$x$", 11)
    note(axes, 6.35, 3.2, "Our models have their norms in front of the sublayers;\n"
         "in the paper's BERT they stand behind the residual sum.")  # fmt: skip

    frame(axes, 0.25, 0.3, 6.05, 2.95, "inside a bottleneck")
    zoom(axes, [(parts[3].left[0], y - 0.25), (0.25, 2.95)], [(parts[3].right[0], y - 0.25), (6.05, 2.95)])
    down = funnel(axes, 1.6, 1.45, 0.95, 1.4, 0.6, "down\n$D \\to m$")
    up = funnel(axes, 4.1, 1.45, 0.95, 0.6, 1.4, "up\n$m \\to D$")
    curve, plus = box(axes, 2.85, 1.45, 0.9, 0.52, "non-\nlinearity"), joint(axes, 5.15, 1.45, "+")
    chain(axes, "right", point(0.45, 1.45), down, curve, up, plus, point(5.85, 1.45))
    arrow(axes, (0.72, 1.45), (0.72, 2.4), (5.15, 2.4), plus.top)
    note(axes, 2.94, 2.53, "skip", ha="center")
    note(axes, 5.9, 0.52, "what is added starts at $0$, bit for bit", ha="right")

    frame(axes, 6.35, 0.3, 10.75, 2.95, "the parallel form (He et al. 2022)")
    norm = box(axes, 7.25, 1.65, 0.72, 0.5, "norm", "frozen")
    forward = box(axes, 8.75, 1.65, 1.2, 0.5, "feed-forward", "frozen")
    beside, plus = box(axes, 8.75, 1.02, 1.15, 0.42, "bottleneck", "trained"), joint(axes, 10.0, 1.65, "+")
    chain(axes, "right", point(6.5, 1.65), norm, forward, plus, point(10.6, 1.65))
    arrow(axes, (7.88, 1.65), (7.88, 1.02), beside.left)
    arrow(axes, beside.right, (10.0, 1.02), plus.bottom)
    arrow(axes, (6.68, 1.65), (6.68, 2.3), (10.0, 2.3), plus.top)
    note(axes, 8.34, 2.43, "residual", ha="center")
    note(axes, 9.45, 0.87, "$\\times$ scale")
    note(axes, 10.6, 0.52, "reads what the feed-forward reads; without the inner skip", ha="right")
    return axes.figure


def prefix_and_prompt_schematic():
    """Prompt tuning (Lester et al. 2021): vectors at the input, once. Prefix tuning (Li & Liang 2021):
    keys and values in each layer."""
    axes = sheet(10.5, 5.1, "Prompt tuning at the input, prefix tuning in every layer")
    frame(axes, 0.25, 0.7, 4.75, 4.5, "prompt tuning")
    frame(axes, 5.05, 0.7, 10.25, 4.5, "prefix tuning")
    rows = {"layer 0": 2.0, "layer 1": 2.7, "layer $L-1$": 3.65}
    left = [box(axes, 2.5, y, 3.6, 0.44, f"{name}: sees $K + T$ positions", "frozen") for name, y in rows.items()]
    right = [box(axes, 8.73, y, 2.5, 0.44, f"{name}: softmax over $K + T$", "frozen") for name, y in rows.items()]
    for start, kind, layers in ((0.8, "trained", left), (2.15, "flow", left), (7.72, "flow", right)):
        row = cells(axes, start, 1.3, 8 if kind == "flow" else 4, kind)
        at = row.top[0]
        note(axes, at, 1.0, "$T$ token embeddings" if kind == "flow" else "$K$ prompts", ha="center")
        note(axes, at, 3.175, "⋮", 12, ha="center")
        arrow(axes, row.top, (at, layers[0].bottom[1]))
        arrow(axes, (at, layers[0].top[1]), (at, layers[1].bottom[1]))
        if kind == "flow":
            arrow(axes, (at, layers[2].top[1]), (at, 4.25))
    for layer in right:
        y = layer.left[1]
        for up, what in ((0.13, "keys"), (-0.13, "values")):
            note(axes, 5.87, y + up, f"$K$ {what}", ha="right")
            cells(axes, 5.97, y + up, 4, "trained")
        arrow(axes, (7.04, y - 0.24), (7.04, y + 0.24), head=False)  # a bracket around both rows
        arrow(axes, (7.04, y), layer.left)
    note(axes, 0.25, 0.4, "Both take their share of the tokens' softmax from the first step on: "
         "neither starts as the base. A gate of $0$ mends that.")  # fmt: skip
    return axes.figure


def lora_schematic():
    """LoRA (Hu et al. 2021, equation 3): a path of rank r beside a frozen matrix.
    Heights and widths are in proportion."""
    axes = sheet(10.5, 4.9, "LoRA: a low-rank path beside a frozen matrix")
    frame(axes, 0.25, 0.3, 6.5, 4.35, "while training")
    x, W = box(axes, 0.75, 2.2, 0.45, 0.4, "$x$"), box(axes, 2.6, 3.1, 1.5, 1.5, "$W$\nout $\\times$ in", "frozen")
    A, B = box(axes, 2.6, 1.25, 1.5, 0.25, "$A$", "trained"), box(axes, 4.1, 1.25, 0.25, 1.5, "$B$", "trained")
    times, plus = joint(axes, 5.0, 1.25, "x"), joint(axes, 5.6, 2.2, "+")
    arrow(axes, x.right, (1.4, 2.2), (1.4, 3.1), W.left)
    arrow(axes, (1.4, 2.2), (1.4, 1.25), A.left)
    chain(axes, "right", A, B, times)
    arrow(axes, W.right, (5.6, 3.1), plus.top)
    arrow(axes, times.right, (5.6, 1.25), plus.bottom)
    chain(axes, "right", plus, point(6.25, 2.2))
    note(axes, 2.6, 0.9, "$r$ $\\times$ in, Kaiming uniform", ha="center")
    note(axes, 4.35, 0.7, "out $\\times$ $r$,\n$0$ at first")
    note(axes, 5.0, 1.58, "$\\alpha / r$", 11, ha="center")
    note(axes, 4.4, 3.25, "$W x$", 11, ha="center")

    frame(axes, 6.8, 0.3, 10.25, 4.35, "afterwards, folded into the weight")
    box(axes, 7.5, 3.2, 0.96, 0.96, "$W$", "frozen")
    note(axes, 8.36, 3.2, "$+\\ \\alpha / r\\ \\cdot$", 11, ha="center")
    box(axes, 8.83, 3.2, 0.16, 0.96, kind="trained")
    box(axes, 9.54, 3.2, 0.96, 0.16, kind="trained")
    note(axes, 8.83, 2.55, "$B$", ha="center")
    note(axes, 9.54, 2.95, "$A$", ha="center")
    note(axes, 7.5, 2.4, "=", 13, ha="center")
    box(axes, 7.5, 1.6, 0.96, 0.96, "$W'$")
    note(axes, 8.15, 1.6, "one matrix of $W$'s shape,\nas fast as the base")
    note(axes, 7.02, 0.7, "in = out = 4,096 and $r$ = 8: 65,536\ntrained beside 16,777,216 frozen")
    return axes.figure


def scaling_out_schematic():
    """Two processes: each with the whole base and half of the batch, or with half of every layer (Zhao et al. 2023)."""
    axes = sheet(11, 4.7, "One training step on two processes")
    frame(axes, 0.25, 0.3, 5.75, 4.15, "data parallel: the base whole in each")
    frame(axes, 6.05, 0.3, 10.75, 4.15, "sharded: half of every layer in each")
    plus = joint(axes, 4.72, 2.1, "+")
    for number, y in ((0, 2.95), (1, 1.25)):
        rows = box(axes, 1.05, y, 1.1, 0.5, f"rows {number}, {number + 2}, …")
        base = box(axes, 2.45, y, 0.95, 0.9, "base", "frozen")
        adapter = box(axes, 3.5, y, 0.85, 0.5, "adapter", "trained")
        note(axes, 0.5, y + 0.65, f"process {number}", style="italic")
        chain(axes, "right", rows, base, adapter)
        arrow(axes, adapter.right, (4.72, y), plus.top if number == 0 else plus.bottom)
        note(axes, 4.05, y + 0.2, "gradient")
    arrow(axes, plus.right, (5.4, 2.1))
    note(axes, 4.9, 2.55, "the same\nstep", 9)
    note(axes, 0.5, 0.52, "nothing but the adapter's gradients travels")

    halves, wholes = [], []
    for number, y in ((0, 2.95), (1, 1.25)):
        note(axes, 6.3, y + 0.65, f"process {number}", style="italic")
        for x, name in ((6.6, "$0$"), (7.25, "$i$"), (7.9, "$L-1$")):
            half = box(axes, x, y, 0.55, 0.45, name, "frozen", 9.5)
            halves += [half] if name == "$i$" else []
        wholes.append(box(axes, 9.75, y, 1.15, 0.9, "layer $i$,\nwhole", "frozen"))
    for half, level in zip(halves, (2.35, 1.85)):
        start = half.bottom if level > 2 else half.top
        arrow(axes, start, (start[0], level), (8.6, level))
    arrow(axes, (8.6, 2.35), (8.6, 1.85), head=False)
    for whole in wholes:
        arrow(axes, (8.6, 2.1), (8.6, whole.left[1]), whole.left)
    note(axes, 6.3, 0.52, "a layer is gathered, runs, and is let go again")
    return axes.figure


SCHEMATICS = {
    "block": block_schematic,
    "llama_adapter": llama_adapter_schematic,
    "prefix_cross_attention": prefix_cross_attention_schematic,
    "prefix_and_prompt": prefix_and_prompt_schematic,
    "ia3": ia3_schematic,
    "bottleneck": bottleneck_schematic,
    "lora": lora_schematic,
    "scaling_out": scaling_out_schematic,
}
