"""Our models compute what transformers' do, from the same files, both ways;
and the cache and padding change nothing."""

import dataclasses
import json

import pytest
import torch
import transformers
from small import KINDS, SHAPE, left_padded, rotated

import minillama
from minillama import Cache
from minillama.checkpoints.architectures import ARCHITECTURES

# fmt: off
GPT2_SHAPE = dict(vocab_size=101, n_embd=48, n_layer=3, n_head=6, n_positions=64)


def rope(kind, **numbers):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


LONG = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=8)
GROUPED = dict(num_key_value_heads=2)
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
# Small random models of transformers, each with what sets its kind apart: (its class, its configuration).
THEIRS = {
    "all heads": ("Llama", {}),
    "grouped": ("Llama", GROUPED),
    "single key head": ("Llama", dict(num_key_value_heads=1)),
    "tied": ("Llama", dict(tie_word_embeddings=True)),
    "odd head_dim": ("Llama", dict(head_dim=10, num_key_value_heads=3)),
    "theta": ("Llama", rope("default", rope_theta=500.0)),
    "llama3": ("Llama", rope("llama3", **LLAMA3)),
    "biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "mistral": ("Mistral", GROUPED),
    "mistral, window": ("Mistral", GROUPED | dict(sliding_window=4)),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2, tied": ("Qwen2", GROUPED | dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", GROUPED | dict(head_dim=10)),
    "qwen2, window": ("Qwen2", GROUPED | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3, biases": ("Qwen3", GROUPED | dict(attention_bias=True, head_dim=8)),
    "qwen3, window": (
        "Qwen3", GROUPED | dict(use_sliding_window=True, sliding_window=4, max_window_layers=2, head_dim=8)
    ),
    "smollm3, window": (
        "SmolLM3", GROUPED | dict(use_sliding_window=True, sliding_window=4, no_rope_layers=[1, 0, 1])
    ),
    "smollm3": ("SmolLM3", GROUPED | dict(no_rope_layers=[1, 0, 1])),
    "olmo2": ("Olmo2", GROUPED),
    "phi3": ("Phi3", GROUPED),
    "phi3, long": ("Phi3", GROUPED | dict(original_max_position_embeddings=6) | rope(
        "longrope", short_factor=[1.0, 1.1, 1.2, 1.5], long_factor=[1.0, 2.0, 3.0, 4.0],
    )),
    "granite": ("Granite", GROUPED | dict(
        embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.1, logits_scaling=8.0,
    )),
    "gemma3": ("Gemma3Text", GROUPED | dict(
        head_dim=10, query_pre_attn_scalar=7, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )),
    "gemma": ("Gemma", GROUPED | dict(head_dim=10)),
    "linear": ("Llama", rope("linear", factor=3.0)),
    "dynamic": ("Llama", rope("dynamic", factor=3.0) | dict(max_position_embeddings=6)),
    "yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "yarn, every number": ("Llama", rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=20.0, beta_slow=2.0, truncate=False,
        mscale=0.7, mscale_all_dim=0.4,
    )),
    "gpt2": ("GPT2", GPT2_SHAPE),
    "gpt2, narrow mlp": ("GPT2", GPT2_SHAPE | dict(n_inner=50)),
}


# fmt: on


def build(kind, **changes):
    """A model of transformers by its name in THEIRS, or by (class, configuration)."""
    name, config = THEIRS[kind] if isinstance(kind, str) else kind
    known = {} if name == "GPT2" else dict(SHAPE, pad_token_id=None)
    config = getattr(transformers, f"{name}Config")(**{**known, **config, **changes})
    return getattr(
        transformers, {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}.get(name, f"{name}ForCausalLM")
    )(config)


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes}))


def faithful(kind):
    """The model of transformers in eval mode, with numbers that hide nothing: its initialisation leaves biases at 0 and
    norms at 1, which would hide a missing one."""
    torch.manual_seed(0)
    model = build(kind).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=list(THEIRS))
def theirs(request):
    return faithful(request.param)


LATER = list(THEIRS)[list(THEIRS).index("mistral, window") :]
FIRST = ("qwen2", "qwen3", "smollm3", "gpt2", "gpt2, narrow mlp")  # of these, in the fast suite
BOTH_WAYS = [pytest.param(k, marks=pytest.mark.slow if k in LATER and k not in FIRST else ()) for k in THEIRS]


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}"


@torch.no_grad()
def test_logits_equal_transformers_reading_its_folder(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    close(ours(ids), theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("theirs", BOTH_WAYS, indirect=True)
def test_logits_equal_when_transformers_reads_ours(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = minillama.load(tmp_path / "theirs")
    minillama.save(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs)
    close(again(ids).logits, ours(ids))
    assert torch.equal(minillama.load(tmp_path / "ours")[0](ids), ours(ids))


@torch.no_grad()
@pytest.mark.parametrize("theirs", BOTH_WAYS, indirect=True)
def test_shards_with_an_index(theirs, ids, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    close(minillama.load(tmp_path)[0](ids), theirs(ids).logits)


@pytest.mark.slow
def test_greedy_tokens_equal_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    prompt = torch.randint(1, 101, (4, 7))  # no 0: their generate would take it for padding
    expected = theirs.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(minillama.generate(ours, prompt, max_new_tokens=30), expected)


@torch.no_grad()
def test_cache_changes_nothing(model, ids):
    whole = model(ids)
    for chunks in ([1] * 9, [4, 1, 4], [5, 4], [9]):
        cache = Cache()
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
        close(torch.cat(parts, dim=1), whole)
        assert cache.length == 9


@torch.no_grad()
@pytest.mark.parametrize("chunks", ([9], [1] * 9, [6, 3]))
def test_left_padding_changes_nothing(model, ids, chunks):
    lengths = [9, 4, 6]
    padded, mask = left_padded(ids, lengths)
    cache, parts, seen = Cache(), [], 0
    for part in padded.split(chunks, dim=1):
        seen += part.shape[1]
        parts.append(model(part, mask[:, :seen], cache))
    logits = torch.cat(parts, dim=1)
    assert logits.isfinite().all()
    for row, n in enumerate(lengths):
        close(logits[row, 9 - n :], model(ids[row : row + 1, 9 - n :])[0])


@torch.no_grad()
def test_padded_prompt_is_remembered_by_the_cache(model, ids):
    padded, mask = left_padded(ids, [9, 4, 6])
    cache, told = Cache(), Cache()
    model(padded, mask, cache), model(padded, mask, told)
    new = torch.tensor([[1], [2], [3]])
    assert torch.equal(model(new, cache=cache), model(new, torch.cat((mask, mask.new_ones(3, 1)), 1), told))


def test_batch_generates_what_each_prompt_alone_generates(model):
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
    ids, mask = minillama.left_pad(prompts)
    together = minillama.generate(model, ids, 12, attention_mask=mask)[:, ids.shape[1] :]
    for prompt, row in zip(prompts, together):
        alone = minillama.generate(model, torch.tensor([prompt]), 12)[0, len(prompt) :]
        assert torch.equal(row, alone)


def test_bfloat16_rope_keeps_its_precision(model, ids):
    """Angles are made in float32 whatever the weights' dtype: late positions stay apart."""
    if isinstance(model, minillama.LLaMA):
        before = model.layers[0].rope(torch.tensor([1000, 1001]))
        model.to(torch.bfloat16)
        after = model.layers[0].rope(torch.tensor([1000, 1001]))
        assert torch.equal(before[0], after[0]) and after[0].dtype == torch.float32
    assert model.to(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_rms_norm_takes_its_mean_in_float32():
    norm = minillama.llama.RMSNorm(4096, 1e-6).to(torch.bfloat16)
    x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (norm(x) - expected).abs().max() < 2**-7  # half a unit in the last place of numbers up to 4


SAMPLED = [
    dict(temperature=0.8),
    dict(temperature=1.5, top_k=5),
    dict(temperature=1.0, top_p=0.7),
    dict(temperature=2.0, top_k=20, top_p=0.9),
]


@pytest.mark.parametrize("model, settings", rotated(KINDS, SAMPLED), indirect=["model"], ids=str)
def test_sampling_repeats_with_its_seed(model, settings, ids):
    one, two, other = (minillama.generate(model, ids, 20, seed=seed, **settings) for seed in (7, 7, 8))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_sampling_frequencies():
    """Drawn tokens follow softmax(logits / temperature), cut as top_k and top_p say."""
    from minillama.generate import choose

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(20000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**settings):
        return torch.bincount(choose(logits, generator=generator, **settings), minlength=4) / 20000

    full = (logits[0] / 0.5).softmax(-1)
    assert (frequencies(temperature=0.5) - full).abs().max() < 0.015
    two = torch.tensor([1.0, torch.e**-1, 0, 0])
    assert (frequencies(temperature=1.0, top_k=2) - two / two.sum()).abs().max() < 0.015
    # probabilities 0.64, 0.24, 0.09, 0.03: 0.7 is reached by the first two, 0.6 by the first
    assert (frequencies(temperature=1.0, top_p=0.7) - two / two.sum()).abs().max() < 0.015
    assert frequencies(temperature=1.0, top_p=0.6)[0] == 1


def test_stop_token_ends_each_row(model):
    ids = torch.randint(0, 101, (8, 3))
    free = minillama.generate(model, ids, 15)
    stop = free[0, 6].item()
    stopped = minillama.generate(model, ids, 15, stop=stop)
    for row, whole in zip(stopped[:, 3:], free[:, 3:]):
        end = (whole == stop).nonzero()[:1].flatten().tolist()
        n = end[0] + 1 if end else len(row)
        assert torch.equal(row[:n], whole[: len(row)][:n]) and (row[n:] == stop).all()


def test_generation_leaves_the_mode_and_needs_no_gradients(model, ids):
    model.train()
    new = minillama.generate(model, ids, 2)
    assert model.training and not new.requires_grad


@pytest.mark.parametrize(
    "change, named",
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn' and factor is missing"),
        ({"rope_parameters": None, "rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"model_type": "qwen4"}, "qwen3"),
        ({"model_type": "mixtral"}, "chooses among experts"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
        ({"hidden_size": 50, "head_dim": None}, "hidden_size is 50"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": LONG | {"long_factor": [1.0, 2.0]}}, "long_factor has 2 numbers"),
        ({"rope_parameters": LONG | {"short_factor": 3.0}}, "short_factor is 3.0"),
        ({"rope_parameters": LONG | {"original_max_position_embeddings": 1}}, "original_max_position_embeddings is 1"),
        ({"intermediate_size": 81}, "shape"),
        ({"num_hidden_layers": 4}, "hold 3 layers .* asks for 4"),
        ({"num_hidden_layers": 2}, "hold 3 layers .* asks for 2"),
    ],
)
def test_config_that_cannot_be_honoured_is_refused_by_name(change, named, tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(minillama.FileError, match=named) as error:
        minillama.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "change, named",
    [({"activation_function": "relu"}, "relu"), ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx")],
)
def test_gpt2_config_that_cannot_be_honoured(change, named, tmp_path):
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2_SHAPE)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(minillama.FileError, match=named):
        minillama.load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind != "gpt2"])
def test_an_absent_key_means_what_it_means_to_transformers(kind, ids, tmp_path):
    """A configuration that says only the sizes: heads, window, theta and epsilon are transformers' own defaults."""
    sizes = {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 32}
    content = {"model_type": kind, **sizes}
    name = ARCHITECTURES[kind].theirs.replace("ForCausalLM", "TextConfig" if kind == "gemma3_text" else "Config")
    config = getattr(transformers, name)(**{key: value for key, value in content.items() if key != "model_type"})
    ours = minillama.checkpoints.read_config(content)[0]
    for key in ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, key) == getattr(config, key), key
    assert (ours.num_key_value_heads or 32) == config.num_key_value_heads
    assert (ours.head_dim or 2) == (getattr(config, "head_dim", None) or 2)
    rope = config.rope_parameters
    assert ours.rope_theta == rope.get("full_attention", rope)["rope_theta"]
    assert ours.sliding_window == (config.sliding_window if kind in ("mistral", "gemma3_text") else None)
    assert kind != "gemma3_text" or list(ours.layer_types) == config.layer_types
    assert kind != "smollm3" or list(ours.no_rope_layers) == config.no_rope_layers
    if kind == "mistral":
        assert minillama.checkpoints.read_config(content | {"sliding_window": None})[0].sliding_window is None


# What sets a relative apart from LLaMA, each with the fields of its configuration that make it so.
RELATIVES = {
    "mistral, window": ("sliding_window",),
    "qwen2": ("attention_bias",),
    "qwen2, window": ("sliding_window", "layer_types"),
    "qwen3": ("qk_norm",),
    "qwen3, window": ("qk_norm", "sliding_window", "layer_types"),
    "smollm3": ("no_rope_layers",),
    "smollm3, window": ("no_rope_layers", "sliding_window", "layer_types"),
    "olmo2": ("norms", "qk_norm"),
    "phi3": (),
    "phi3, long": ("rope_scaling",),
    "granite": ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    "gemma3": (
        "norms", "norm_offset", "qk_norm", "hidden_act", "embedding_multiplier", "attention_multiplier",
        "sliding_window", "layer_types", "rope_local_base_freq",
    ),
    "gemma": ("norm_offset", "hidden_act", "embedding_multiplier"),
    "linear": ("rope_scaling",),
    "dynamic": ("rope_scaling",),
    "yarn": ("rope_scaling",),
    "yarn, every number": ("rope_scaling",),
}  # fmt: skip


SOME = [
    pytest.param(kind, marks=() if kind in ("qwen3", "smollm3", "gemma3") else pytest.mark.slow) for kind in RELATIVES
]


@torch.no_grad()
@pytest.mark.parametrize("kind", SOME)
def test_a_relative_called_in_every_way(kind, ids, tmp_path):
    """Whole, padded, in pieces through a cache: as transformers called in the same way, and by `generate` the same
    tokens."""
    theirs = faithful(kind)
    theirs.save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    padded, mask = left_padded(ids, [9, 4, 6])
    real, places = mask.bool(), (mask.cumsum(1) - 1).clamp(min=0)
    close(ours(padded, mask)[real], theirs(padded, attention_mask=mask, position_ids=places).logits[real])
    for chunks in ([1] * 9, [4, 1, 4], [2, 7]):
        cache, kept = Cache(), transformers.DynamicCache(config=theirs.config)
        for part in ids.split(chunks, dim=1):
            close(ours(part, cache=cache), theirs(part, past_key_values=kept, use_cache=True).logits)
    prompt = ids.clamp(min=1)  # no 0: their generate would take it for padding
    if kind != "phi3, long":  # whose cache their generate throws away when the text grows past the original length
        expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(minillama.generate(ours, prompt, max_new_tokens=12), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", SOME)
def test_every_line_of_a_relatives_configuration_counts(kind, ids, tmp_path):
    """With the field as a LLaMA has it the logits differ, or the weights no longer fit."""
    faithful(kind).save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    plain = {own.name: own.default for own in dataclasses.fields(minillama.LLaMAConfig)}
    differing = {name for name, value in plain.items() if getattr(ours.config, name) != value}
    extra = list(plain)[list(plain).index("model_type") + 1 :] + ["rope_scaling"]
    assert set(RELATIVES[kind]) - {"attention_bias"} == differing & {*extra} - {"attention_output_bias"}
    for name in RELATIVES[kind]:
        other = minillama.LLaMA(dataclasses.replace(ours.config, **{name: plain[name]})).eval()
        if other.state_dict().keys() == ours.state_dict().keys():
            other.load_state_dict(ours.state_dict())
            assert (other(ids) - ours(ids)).abs().max() > 1e-3, name


@torch.no_grad()
def test_dynamic_rope_grows_past_the_length_it_was_trained_on(tmp_path):
    """Beyond max_position_embeddings in one pass, where the frequencies depend on the length; as transformers."""
    torch.manual_seed(0)
    theirs = faithful("dynamic")
    theirs.save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    for length in (5, 20, 40):  # growing, since theirs remembers the longest
        ids = torch.randint(0, 101, (1, length))
        close(ours(ids), theirs(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in RELATIVES if "window" in kind or kind == "gemma3"])
def test_text_longer_than_the_sliding_window(kind, ids, tmp_path):
    """The window is the reason for some difference, and for none while the text is no longer than it."""
    faithful(kind).save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    wider = minillama.LLaMA(dataclasses.replace(ours.config, sliding_window=100)).eval()
    wider.load_state_dict(ours.state_dict())
    assert torch.equal(wider(ids[:, :4]), ours(ids[:, :4])) and (wider(ids) - ours(ids)).abs().max() > 1e-3
    cache = Cache()
    whole, parts = ours(ids), [ours(part, cache=cache) for part in ids.split([6, 1, 2], dim=1)]
    close(torch.cat(parts, dim=1), whole)


def test_bad_files_are_named(tmp_path):
    def refused(match):
        with pytest.raises(minillama.FileError, match=match) as error:
            minillama.load(tmp_path)
        assert "\n" not in str(error.value)

    refused("config.json is missing")
    llama().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        weights.write_bytes(content[:length])
        refused("model.safetensors.*copy it again")
    weights.unlink()
    refused("has no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("pickle")
    for text in ("{", "[]", "\xff"):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        refused("config.json")
    with pytest.raises(ValueError, match="neither a folder"):
        minillama.load(tmp_path / "nowhere")


@pytest.mark.parametrize("bad, named", [(torch.zeros(3, dtype=torch.int64), "shape"), (torch.zeros(1, 3), "float32")])
def test_bad_ids_are_explained(model, bad, named):
    with pytest.raises(ValueError, match=named):
        model(bad)


def test_learned_positions_end_and_rotary_ones_do_not(model):
    long = torch.zeros(1, SHAPE["max_position_embeddings"] + 1, dtype=torch.int64)
    if isinstance(model, minillama.GPT2):
        with pytest.raises(ValueError, match="65 tokens and the model takes 64 .max_position_embeddings."):
            model(long)
    else:
        assert model(long).isfinite().all()


def test_bad_mask_and_prompts_are_explained(model, ids):
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, torch.ones(3, 8))
    with pytest.raises(ValueError, match="empty"):
        minillama.left_pad([[1], []])
    for bad in (dict(max_new_tokens=-1), dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0)):
        with pytest.raises(ValueError):
            minillama.generate(model, ids, **bad)


def test_tokenizer_of_a_folder(tmp_path):
    """A tokenizer.json is used as it is: nothing added, and text that looks like a special token stays text."""
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate("<>/s abc")}, merges=[]))
    inner.add_special_tokens(["</s>"])
    llama().save_pretrained(tmp_path)
    inner.save(str(tmp_path / "tokenizer.json"))
    model, tokenizer = minillama.load(tmp_path)
    assert tokenizer.encode("ab</s>") == [5, 6, 0, 2, 3, 1]
    minillama.save(model, tmp_path / "again", tokenizer)
    assert minillama.load(tmp_path / "again")[1].encode("cab") == [7, 5, 6]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(minillama.FileError, match="tokenizer.json"):
        minillama.load(tmp_path)


@pytest.mark.parametrize("temperature", (1e-45, 1e-46, float("nan"), float("inf"), -1.0))
def test_a_temperature_that_is_none_is_refused(model, ids, temperature):
    with pytest.raises(ValueError, match="temperature is"):
        minillama.generate(model, ids, 2, temperature=temperature)
    assert minillama.generate(model, ids, 2, temperature=1e-4, seed=0).shape == (3, 11)


def test_interleaved_streams_leave_the_mode_alone(model, ids):
    from minillama.generate import stream

    model.train()
    one, two = stream(model, ids, 3), stream(model, ids, 3)
    alone = [token.tolist() for token in stream(model, ids, 3)]
    assert [[next(one).tolist(), next(two).tolist()] for _ in range(3)] == [[token, token] for token in alone]
    assert model.training


@torch.no_grad()
@pytest.mark.parametrize("method", ("prompt_tuning", "prefix_tuning", "llama_adapter"))
def test_no_tokens_and_no_rows(model, method):
    minillama.adapt(model, method)
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 101)
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert model(none, none).shape == (0, 4, 101)


def test_an_end_id_of_the_configuration_is_kept(tmp_path):
    """It came from config.json, since tokenizer_config.json names no end token."""
    import tokenizers

    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "one")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    inner.save(str(tmp_path / "one/tokenizer.json"))
    path = tmp_path / "one/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 7}))
    model, tokenizer = minillama.load(tmp_path / "one")
    minillama.save(model, tmp_path / "two", tokenizer)
    assert tokenizer.eos_id == minillama.load(tmp_path / "two")[1].eos_id == 7


def test_files_are_as_open_as_the_umask_says(model, tmp_path):
    import os
    import stat

    before = os.umask(0o027)
    try:
        minillama.save(model, tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640
