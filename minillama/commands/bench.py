"""Times training and generation beside transformers and the PEFT library: one process, the same weights, batch and
dtype, in turns. Needs transformers and peft, which the tests need too.

    python -m minillama bench                                            SmolLM2's shape on the CPU, random weights
    python -m minillama bench --shape llama-7b --tokens 512 --answers 511 --compile
    python -m minillama bench --shape llama-7b --alpaca --compile
    torchrun --nproc-per-node 2 -m minillama bench --shape llama-65b --shard

The floor is what no library can go below: the matrix products of a step at the speed of the machine's fastest one.
"""

import contextlib
import gc
import itertools
import statistics
import time
from pathlib import Path

import torch

from .. import data, distributed
from ..adapters import METHODS, adapt, disabled
from ..checkpoints import load
from ..checkpoints.files import write_json
from ..course.sides import ROW, SHAPES, alpaca, alpaca_rate, our_figures, ours, random_base, their_figures, theirs
from ..device import peak_memory, pick_device, pick_dtype
from ..llama import LLaMA
from ..speed import compile_layers, multiplies_float8
from . import count, table
from .arguments import add_machine, given, positive, whole

COMPARED = ["llama_adapter", "ia3", "lora", "prefix_tuning", "bottleneck"]
FIGURES = ("step", "forward", "prefill", "decode")


def add_arguments(parser):
    def listed(kind):
        return lambda text: [kind(part) for part in text.split(",")]

    parser.add_argument("--shape", choices=SHAPES, help="a base of that shape with random weights (smollm2)")
    parser.add_argument("--base", metavar="NAME", help="instead: whatever minillama.load opens that is a LLaMA")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=COMPARED, metavar="NAMES",
        help=f"({','.join(COMPARED)})",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, metavar="N", help="rows (8, on a CPU 4)")
    parser.add_argument("--tokens", type=listed(whole(2)), default=[48], metavar="N,…", help="tokens of a row (48)")
    parser.add_argument("--new", type=positive, default=8, metavar="N", help="tokens that decoding writes (8)")
    parser.add_argument("--answers", type=positive, default=14, metavar="N", help="of which carry loss (14)")
    parser.add_argument(
        "--prompts", type=listed(positive), default=[10], metavar="K,…", help="prompt or prefix tokens (10)"
    )
    parser.add_argument(
        "--figures", type=lambda text: text.split(","), default=list(FIGURES), metavar="NAMES", help="(all)"
    )
    parser.add_argument("--compile", action="store_true", help="time our layers through torch.compile too")
    parser.add_argument(
        "--shard", action="store_true", help="cut the weights among the processes that torchrun started"
    )
    parser.add_argument(
        "--alpaca", action="store_true", help="instead: how long our adapters take for 5 epochs of Alpaca's 52,002 "
        "lengths, packed into rows of 512 tokens, from so many --steps"
    )  # fmt: skip
    parser.add_argument("--steps", type=positive, default=200, metavar="N", help="of --alpaca (200)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="measurements of each, in turns (3)")
    parser.add_argument("--out", type=given, metavar="FOLDER", help="for bench.json and bench.png")
    add_machine(parser)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work, device):
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(works, device, rounds):
    """{name: [seconds of each round]} of several pieces of work, one after the other in each round; the first round
    warms up and does not count."""
    seconds = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            seconds[name].append(timed(work, device))
    return {name: times[1:] for name, times in seconds.items()}


def limits(dtype, device):
    """(operations per second of the machine's fastest matrix product, a multiplication and an addition each; bytes per
    second that a copy reads and writes), the best of several sizes and tries."""
    best, fastest = 0.0, 0.0
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(6):
            best = max(best, 2 * size**3 / timed(lambda: a @ b, device))  # noqa: B023
    many = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    other = torch.empty_like(many)
    for _ in range(6):
        fastest = max(fastest, 2 * len(many) / timed(lambda: other.copy_(many), device))
    return best, fastest


def products(model, rows, tokens, answers):
    """Operations of a training step's matrix products: forward and back through every frozen matrix, the head at the
    answers alone; attention's own products, a few in a hundred, left out."""
    c = model.config
    layers = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers."))
    return 4 * rows * (layers * (tokens - 1) + c.vocab_size * c.hidden_size * answers)


def one_case(model, method, rows, tokens, answers, prompts, args, device):
    """{figure: {"ours": [seconds], "compiled": …, "peft": …}} and {"ours": peak bytes, …} of a step, on a GPU."""
    draw = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=draw).to(device)
    labels = torch.where(torch.arange(tokens, device=device) >= tokens - answers, ids, -100)
    models = {"ours": ours(model, method, prompts)}
    if args.compile:
        models["compiled"] = ours(model, method, prompts)
        if multiplies_float8(device):
            models["float8"] = ours(model, method, prompts, "float8")
    for side in models.keys() & {"compiled", "float8"}:
        compile_layers(models[side])
    sides = {side: our_figures(model, ids, labels, args.new) for side, model in models.items()}
    if (other := theirs(model, method, prompts)) is not None:
        models["peft"], sides["peft"] = other, their_figures(other, ids, labels, args.new)
    measured, peaks = {}, {}
    for figure in args.figures:
        plain = figure in ("prefill", "decode")  # a cache that grows is another shape with every token
        works = {side: figures[figure] for side, figures in sides.items() if not plain or side in ("ours", "peft")}
        if figure == "decode" and device.type == "cuda":  # elsewhere no step is recorded
            works["static"] = sides["ours"]["recorded"]
        if figure in ("forward", "decode"):
            works["off"] = off(models["ours"], works["ours"])
        measured[figure] = in_turns(works, device, args.rounds)
    if device.type == "cuda" and "step" in args.figures:
        for side, figures in sides.items():
            peaks[side] = own_peak(models[side], figures["step"], device)
    return measured, peaks


def own_peak(model, work, device):
    """The most bytes of the GPU that the work needs, the model's own included and no other's."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    tensors = {tensor.data_ptr(): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return peak_memory(device) - before + sum(tensor.nbytes for tensor in tensors.values())


def off(model, work):
    def unadapted():
        with disabled(model):
            work()

    return unadapted


def milliseconds(times):
    return f"{1000 * statistics.median(times):.1f}"


def ratio(one, other):
    """The median of the rounds' ratios, and their spread."""
    ratios = sorted(a / b for a, b in zip(one, other))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def run(args):
    for wrong, known, what in ((args.methods, METHODS, "method"), (args.figures, FIGURES, "figure")):
        if unknown := [name for name in wrong if name not in known]:
            raise ValueError(f"there is no {what} {unknown[0]!r}; it can be {', '.join(known)}")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    args.batch_size = args.batch_size or (4 if device.type == "cpu" else 8)
    torch.manual_seed(args.seed)
    if distributed.size() > 1:
        return several(args, dtype, device)
    if args.base:
        model, _ = load(args.base, dtype, device)
        if not isinstance(model, LLaMA):
            raise ValueError(f"{args.base} is a {type(model).__name__}; PEFT's counterpart is built for a LLaMA alone")
    else:
        model = random_base(SHAPES[args.shape or "smollm2"], dtype, device)
    if args.alpaca:
        return alpaca_hour(args, model)
    ceiling, bandwidth = limits(dtype, device)
    name = args.base or args.shape or "smollm2"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{name}: {count(model.parameters()):,} parameters · {device}, {card} · {str(dtype).removeprefix('torch.')} · "
        f"torch {torch.__version__}"
    )
    print(f"matrix products at {ceiling / 1e12:.2f} TFLOP/s, copies at {bandwidth / 1e9:.0f} GB/s\n", flush=True)
    cases = []
    for tokens, prompts, method in itertools.product(args.tokens, args.prompts, args.methods):
        answers = min(args.answers, tokens - 1)
        measured, peaks = one_case(model, method, args.batch_size, tokens, answers, prompts, args, device)
        floor = products(model, args.batch_size, tokens, answers) / ceiling
        case = {"method": method, "rows": args.batch_size, "tokens": tokens, "answers": answers, "prompts": prompts}
        cases.append(case | {"floor": floor, "seconds": measured, "peak_bytes": peaks})
        report(cases[-1])
        gc.collect()
    if args.out:
        settings = {"base": name, "device": card, "dtype": str(dtype), "torch": torch.__version__}
        settings |= {"ceiling": ceiling, "bandwidth": bandwidth, "rounds": args.rounds}
        write_json(Path(args.out) / "bench.json", {"settings": settings, "cases": cases})
        from ..course.plots import bench_figure  # late: matplotlib is slow to import
        from ..course.style import save_figure

        save_figure(bench_figure(settings, cases), Path(args.out) / "bench.png")
        print(f"numbers and figure: {Path(args.out) / 'bench.json'}, {Path(args.out) / 'bench.png'}")


def report(case):
    """Prints one case's table."""
    said = (
        f"{case['rows']} × {case['tokens']} tokens, {case['answers']} of each row's carry loss, K = {case['prompts']}"
    )
    print(f"{case['method']}, {said}")
    measured = set().union(*case["seconds"].values())
    sides = [side for side in ("peft", "ours", "compiled", "float8", "static") if side in measured]
    rows = [("", *sides, *(f"peft / {side}" for side in sides if side != "peft"), "adapted / not")]
    for figure, seconds in case["seconds"].items():
        shown = [milliseconds(seconds[side]) if side in seconds else "" for side in sides]
        peft = seconds.get("peft")
        over = [ratio(peft, seconds[side]) if peft and side in seconds else "" for side in sides if side != "peft"]
        rows.append(
            (f"{figure}, ms", *shown, *over, ratio(seconds["ours"], seconds["off"]) if "off" in seconds else "")
        )
    empty = [""] * (len(rows[0]) - 1 - len(sides))
    if peaks := case["peak_bytes"]:
        rows.append(("step, GiB", *(f"{peaks[side] / 2**30:.1f}" if side in peaks else "" for side in sides), *empty))
    print(table(rows))
    if "step" in case["seconds"]:
        steps = case["seconds"]["step"]
        share = case["floor"] / statistics.median(steps["compiled" if "compiled" in steps else "ours"])
        print(f"  a step's matrix products at the machine's best: {1000 * case['floor']:.1f} ms, {share:.0%} of ours")
    print(flush=True)


def alpaca_hour(args, model):
    """How long 5 epochs of Alpaca take: the paper's adapters, on packed rows."""
    pairs = alpaca(model.config.vocab_size, 1.0, args.seed)
    tokens = sum(map(data.tokens, pairs))
    mean = tokens / len(pairs)
    print(f"{len(pairs):,} texts of {mean:.0f} tokens on average; a step is {args.batch_size} rows of {ROW}")
    can = args.compile and multiplies_float8(model.embed_tokens.weight.device)
    for how in (None, "float8") if can else (None,):
        adapted = ours(model, "llama_adapter", args.prompts[0], how)
        texts, rate = alpaca_rate(adapted, pairs, args.batch_size, args.steps, args.compile)
        name = ", ".join(["gated prefix attention", *(["compiled"] if args.compile else []), *([how] if how else [])])
        minutes = 5 * len(pairs) / texts / 60
        print(f"{name}: {rate:,.0f} tokens/s that are no padding; 5 epochs take {minutes:.1f} minutes", flush=True)


def several(args, dtype, device):
    """Under torchrun: our training step on all processes, every one with a batch of its own."""
    config = SHAPES[args.shape or "smollm2"]
    for method, tokens in itertools.product(args.methods, args.tokens):
        model = random_base(config, dtype, device, args.shard)
        adapt(model, method)
        if args.compile:
            compile_layers(model)
        model.train()
        ids = torch.randint(0, config.vocab_size, (args.batch_size, tokens), device=device)
        labels = torch.where(torch.arange(tokens, device=device) >= tokens - args.answers, ids, -100)
        step = our_figures(model, ids, labels)["step"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = in_turns({"step": step}, device, args.rounds)["step"]
        middle, peak = statistics.median(seconds), peak_memory(device)
        print(
            f"{args.shape or 'smollm2'}, {method}{', sharded' if args.shard else ''}, {distributed.size()} processes, "
            f"{args.batch_size} × {tokens} tokens each: {1000 * middle:.1f} ms a step, "
            f"{distributed.size() * args.batch_size * tokens / middle:,.0f} tokens/s, "
            f"{(peak or 0) / 2**30:.1f} GiB a process",
            flush=True,
        )
        del model, step
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
