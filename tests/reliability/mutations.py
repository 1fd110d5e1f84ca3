"""Damaged and hostile files, each opened in a process of its own: refused in one sentence, or opened to the same
numbers as an independent reader gives. Nothing else.

    python tests/reliability/mutations.py --number 1500 --seed 0
"""

import argparse
import collections
import contextlib
import json
import os
import pickle
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import hypothesis
import peft
import torch
import transformers
from gguf import GGUFWriter
from hypothesis import strategies as st

import minillama
from minillama.checkpoints.pairs import read_pairs

SECONDS, MEGABYTES = 10, 300  # of a child: the promise is 2 s and 200 MB on a machine that does nothing else
SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
IDS = torch.arange(1, 11)[None]
WORDS = json.dumps({"prompt": "a b", "response": "c"}) + "\n"


# ── what is mutated ──────────────────────────────────────────────────────────────────────────────────────────────────


def make(folder):
    """The whole files: a base of transformers', the same as shards and as .gguf, adapters of ours and of PEFT's."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    theirs.save_pretrained(folder / "base")
    shutil.copy(Path(__file__).parent / "tokenizer.json", folder / "base/tokenizer.json")
    (folder / "base/tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}</s>"})
    )
    theirs.save_pretrained(folder / "shards", max_shard_size="20KB")
    model, _ = minillama.load(folder / "base")
    write_gguf(model, folder / "base.gguf")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    opened(peft.get_peft_model(theirs, config)).save_pretrained(folder / "peft")
    for method, options in (("llama_adapter", dict(prompt_length=3)), ("lora", dict(rank=2))):
        adapted = opened(minillama.adapt(minillama.load(folder / "base")[0], method, **options))
        minillama.save_adapter(adapted, folder / method)
    (folder / "pairs.jsonl").write_text(WORDS * 3)


@torch.no_grad()
def opened(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(0, 0.3)
    return model


def write_gguf(model, path):
    c, names = model.config, {"self_attn": "attn", "mlp": "ffn"}
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    writer.add_token_scores([float(-i) for i in range(c.vocab_size)])
    table = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    table["lm_head.weight"] = "output.weight"
    for name, tensor in model.state_dict().items():
        theirs = table.get(name)
        if theirs is None:
            _, i, *rest = name.split(".")
            short = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "o_proj": "attn_output"}
            words = [short.get(word, word) for word in rest if word not in names or word == rest[-2]]
            part = words[0] if words[0].startswith(("attn", "ffn")) else f"{names[rest[0]]}_{words[0].split('_')[0]}"
            theirs = f"blk.{i}.{part}.weight"
            if rest[1] in ("q_proj", "k_proj"):
                heads = c.num_attention_heads if rest[1] == "q_proj" else c.num_key_value_heads
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(theirs, tensor.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ── mutations, drawn by hypothesis ───────────────────────────────────────────────────────────────────────────────────

NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 10**30, 0.0, -0.5, 1e-30, 1e30, 1.5])
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.just("/dev/zero")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=4,
)


@st.composite
def json_text(draw, text):
    """A JSON object's text with one thing changed."""
    content = json.loads(text)
    keys = list(content)
    how = draw(st.sampled_from("value value value missing key cut deep digits nan twice byte".split()))
    key = draw(st.sampled_from(keys))
    if how in ("value", "missing", "key"):
        if how == "value":
            content[key] = draw(JSON)
        elif how == "missing":
            del content[key]
        else:
            content[draw(st.text(max_size=8))] = draw(JSON)
        return json.dumps(content).encode()
    value = json.dumps(content[key])
    if how == "cut":
        return text.encode()[: draw(st.integers(0, len(text)))]
    if how == "byte":
        data = bytearray(text.encode())
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data)
    new = {"deep": "[" * 100_000, "digits": "9" * 5000, "nan": "NaN", "twice": f'{value}, "{key}": 7'}[how]
    return json.dumps(content).replace(f'"{key}": {value}', f'"{key}": {new}', 1).encode()


@st.composite
def safetensors_bytes(draw, data):
    """A safetensors file with its header, its length or its numbers changed."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = draw(st.sampled_from(names))
    hows = "name dtype shape offsets missing extra cut byte size nan flip metadata"
    how = draw(st.sampled_from(hows.split()))
    if how == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    if how == "size":
        return struct.pack("<Q", draw(st.sampled_from([0, 1, size + 1, 10**9, 2**63]))) + data[8:]
    if how == "byte":
        at = 8 + draw(st.integers(0, size - 1))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    first, last = header[name]["data_offsets"]
    if how == "nan":
        at = first + 4 * draw(st.integers(0, (last - first) // 4 - 1))
        body = body[:at] + struct.pack("<f", draw(st.sampled_from([float("nan"), float("inf")]))) + body[at + 4 :]
    elif how == "flip":  # a bit of a number: what is hashed must say so, what is not is another number
        at = draw(st.integers(0, len(body) - 1))
        body = body[:at] + bytes([body[at] ^ 1 << draw(st.integers(0, 7))]) + body[at + 1 :]
    elif how == "name":
        header[draw(st.sampled_from([f"x.{name}", name.upper(), name.removeprefix("model."), ""]))] = header.pop(name)
    elif how == "dtype":
        header[name]["dtype"] = draw(st.sampled_from("I32 U8 F16 BF16 F64 BOOL X F8_E4M3 C64".split()))
    elif how == "shape":
        header[name]["shape"] = draw(st.lists(NUMBERS, max_size=3))
    elif how == "offsets":
        header[name]["data_offsets"] = [first + draw(st.integers(-8, 8)), last + draw(st.integers(-8, 8))]
    elif how == "missing":
        del header[name]
    elif how == "metadata":
        header["__metadata__"] = draw(JSON)
    else:
        header[draw(st.sampled_from(["norm.weight", "model.norm.weight", "extra", "lm_head.weight"]))] = header[name]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@st.composite
def gguf_bytes(draw, data, table):
    """A .gguf file with something in its header changed. table: where the tensors' infos begin."""
    how = draw(st.sampled_from(["cut", "byte", "byte", "word", "infos", "infos", "swap", "head"]))
    if how == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    end = data.index(b"\0" * 4, data.rindex(b"blk.")) if how != "head" else 24
    begin = table if how in ("infos", "swap") else 0 if how == "head" else 4
    at = draw(st.integers(begin, max(begin, end - 1)))
    if how == "swap":  # two tensors' names
        one, two = b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"
        return data.replace(one, draw(st.sampled_from([one, two])), 1).replace(two, one, 1)
    if how in ("word", "infos"):
        number = draw(st.sampled_from([0, 1, 2, 8, 24, 26, 27, 28, 31, 32, 64, 100, 2**31, 2**32 - 1]))
        return data[:at] + struct.pack("<I", number) + data[at + 4 :]
    return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]


TEMPLATES = st.sampled_from([
    "{{ 1/0 }}",
    "{{ 'a' * 2000000000 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ messages.x.y }}",
    "{{ [].pop() }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{{ 'x'.center(10**10) }}",
    "{% set n = namespace(n=7) %}{% for i in range(99) %}{% set n.n = n.n * n.n %}{% endfor %}{{ n.n }}",
    "{{ messages | map('upper') | list }}",
    "{{ cycler() }}",
    "{{ lipsum(n=10**6) }}",
    "{% raise %}",
    "{{ raise_exception(1) }}",
    "{{ strftime_now(1) }}",
    "{{ [0] * 10**9 }}",
    "{{ messages[9]['content'] }}",
    "{{ 10 ** (10 ** 9) }}",
])  # fmt: skip


class Files:
    """The whole files, and a strategy for each kind of what may be wrong with them: (kind, folder to lay, changes)."""

    def __init__(self, folder):
        self.folder = folder
        make(folder)

    def cases(self):
        def changed(kind, source, name, strategy):
            return strategy.map(lambda data: (kind, source, name, data))

        def text(path):
            return (self.folder / path).read_text()

        index = "model.safetensors.index.json"
        weights = (self.folder / "base/model.safetensors").read_bytes()
        gguf = (self.folder / "base.gguf").read_bytes()
        kinds = [
            changed("config", "base", "config.json", json_text(text("base/config.json"))),
            changed("weights", "base", "model.safetensors", safetensors_bytes(weights)),
            changed("index", "shards", index, json_text(text(f"shards/{index}"))),
            changed("index", "shards", index, self.moved(text(f"shards/{index}"))),
            changed("gguf", "", "base.gguf", gguf_bytes(gguf, gguf.index(b"token_embd.weight") - 8)),
            changed("tokenizer", "base", "tokenizer.json", json_text(text("base/tokenizer.json"))),
            changed("tokenizer", "base", "tokenizer_config.json", json_text(text("base/tokenizer_config.json"))),
            changed("template", "base", "chat_template.jinja", TEMPLATES.map(str.encode)),
            changed("pairs", "", "pairs.jsonl", json_text(WORDS.strip())),
        ]
        for name in ("peft", "llama_adapter", "lora"):
            data = (self.folder / name / "adapter_model.safetensors").read_bytes()
            config = text(f"{name}/adapter_config.json")
            kinds.append(changed("adapter", name, "adapter_config.json", json_text(config)))
            kinds.append(changed("adapter", name, "adapter_model.safetensors", safetensors_bytes(data)))
        return st.one_of(kinds)

    def moved(self, text):
        """The index with one tensor placed elsewhere."""
        content = json.loads(text)
        placed = content["weight_map"]
        where = st.sampled_from(["/etc/passwd", "../base/model.safetensors", "", ".", 3, None, *placed.values()])
        return st.tuples(st.sampled_from(list(placed)), where).map(
            lambda pair: json.dumps(content | {"weight_map": placed | {pair[0]: pair[1]}}).encode()
        )


# ── opening one, in a child ──────────────────────────────────────────────────────────────────────────────────────────


def ours(kind, source, place):
    """What we make of a mutated file: logits, or for text None."""
    if kind == "pairs":
        read_pairs(place / "pairs.jsonl")
        return None
    if kind in ("tokenizer", "template"):
        _, tokenizer = minillama.load(place / source)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("a b c </s>"))
            if getattr(tokenizer, "template", None) is not None:
                with contextlib.suppress(ValueError):  # the sentence for what a template refuses
                    tokenizer.chat([{"role": "user", "content": "a"}])
        return None
    model, _ = minillama.load(place / ("base.gguf" if kind == "gguf" else source if kind != "adapter" else "base"))
    if kind == "adapter":
        minillama.load_adapter(model, place / source)
    with torch.no_grad():
        return model(IDS)


def theirs(kind, source, place):
    """What an independent reader makes of it."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    if kind == "gguf":
        model = transformers.AutoModelForCausalLM.from_pretrained(place, gguf_file="base.gguf")
    elif kind == "adapter":
        model = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
        model = peft.PeftModel.from_pretrained(model, place / source)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(place / source)
    with torch.no_grad():
        return model.eval()(IDS).logits


def in_child(function, *arguments):
    """(what it returned or raised, None or "hung" or "grew"): in a process of its own, with limits."""
    read, write = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if not child:
        os.close(read)
        try:
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)
            os.dup2(2, 1)
            result = ("returned", function(*arguments))
        except minillama.FileError as error:
            result = ("refused", str(error))
        except BaseException as error:
            result = ("raised", f"{type(error).__name__}: {str(error)[:200]}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with contextlib.suppress(BaseException), open(write, "wb") as file:
            pickle.dump((*result, peak), file)
        os._exit(0)
    os.close(write)
    data = b""
    with open(read, "rb") as file:
        while select.select([file], [], [], max(0, SECONDS + start - time.perf_counter()))[0]:
            if not (part := os.read(file.fileno(), 2**16)):
                break
            data += part
        else:
            os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return pickle.loads(data) if data else ("hung", "", 0)


def judged(kind, source, place, whole):
    """One of refused, equal, wrong, NaN, foreign, hung, grew; and what was said."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    how, value, peak = in_child(ours, kind, source, place)
    if how == "refused":
        return ("refused", value) if "\n" not in value else ("foreign", value)
    if how in ("raised", "hung"):
        return {"raised": "foreign", "hung": "hung"}[how], value
    if peak > before + MEGABYTES:
        return "grew", f"{peak - before:.0f} MB"
    if value is None:
        return "equal", ""
    if not value.isfinite().all():
        return "NaN", ""
    if whole is not None and torch.equal(value, whole):
        return "equal", ""
    how, other, _ = in_child(theirs, kind, source, place)
    same = how == "returned" and other.shape == value.shape and torch.allclose(other, value, atol=1e-4)
    return ("equal", "") if same else ("wrong", f"theirs: {how} {other if how != 'returned' else ''}"[:120])


def bench(number, seed=0):
    """{kind: {outcome: how often}}, and [(kind, file, outcome, what was said, data)] of what must not be."""
    counts, bad = collections.defaultdict(collections.Counter), []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        files = Files(folder / "whole")
        wholes = {
            (kind, source): ours(kind, source, files.folder)
            for kind, source in (
                ("config", "base"), ("weights", "base"), ("index", "shards"), ("gguf", ""), ("adapter", "peft"),
                ("adapter", "llama_adapter"), ("adapter", "lora"),
            )
        }  # fmt: skip

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=number, database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(files.cases())
        def each(case):
            kind, source, file, data = case
            place = folder / "place"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(files.folder, place)
            (place / source / file).write_bytes(data)
            outcome, said = judged(kind, source, place, wholes.get((kind, source)))
            counts[kind][outcome] += 1
            if outcome not in ("refused", "equal"):
                bad.append((kind, f"{source}/{file}", outcome, said, data))

        each()
    return dict(counts), bad


OUTCOMES = ("refused", "equal", "wrong", "NaN", "foreign", "hung", "grew")


def told(counts):
    rows = [f"{'':10}{'tried':>8}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)]
    for kind, found in sorted(counts.items()):
        rows.append(f"{kind:10}{found.total():8}" + "".join(f"{found[outcome]:9}" for outcome in OUTCOMES))
    return "\n".join(rows)


def side_by_side(number, seed, jobs):
    """`bench`, its number divided among processes with seeds of their own."""
    shares = [number * (job + 1) // jobs - number * job // jobs for job in range(jobs)]
    counts, bad = collections.defaultdict(collections.Counter), []
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for found, odd in pool.map(bench, shares, [f"{seed}.{job}" for job in range(jobs)]):
            bad += odd
            for kind, outcomes in found.items():
                counts[kind] += outcomes
    return counts, bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=1500, help="files to try (1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (one a core)")
    arguments = parser.parse_args()
    counts, bad = side_by_side(arguments.number, arguments.seed, arguments.jobs)
    for kind, file, outcome, said, data in bad:
        print(f"{kind} {file} {outcome}: {said}\n    {data[:300] if len(data) < 4000 else len(data)}")
    print(told(counts))
    sys.exit(bool(bad))
