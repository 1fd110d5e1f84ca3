"""What is for speed and memory alone computes what the plain way does: compiled layers, the head's loss in parts, and
matrices in fewer bits, held to the matrix that they amount to."""

import copy
import functools
import json
import types

import gguf
import pytest
import torch
from methods import CASES, LENGTHS, builder
from small import left_padded, make, open_gates, rotated
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import minillama
from minillama import (
    Cache,
    adapt,
    answer_loss,
    data,
    disabled,
    generate,
    load_adapter,
    merge,
    mixed,
    save,
    save_adapter,
    speed,
)
from minillama.__main__ import main
from minillama.decode import Decoder
from minillama.speed import BlockLinear, Float8Linear, quantize
from minillama.train import head_loss, train

KINDS = {"8bit": gguf.GGMLQuantizationType.Q8_0, "4bit": gguf.GGMLQuantizationType.Q4_0}


@pytest.fixture
def on_any_device(monkeypatch):
    """torch multiplies 8-bit floats on a CPU too, slowly: enough to see what comes out."""
    monkeypatch.setattr(speed, "multiplies_float8", lambda device: True)


def base(how=None):
    return minillama.load("dates-llama", quantize=how)


@torch.no_grad()
def filled(small, linear):
    small.fill(linear.weight)
    return small


IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


# ── the loss in parts, layers compiled ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("most", [1, 7 * 11, 10**9])
def test_a_loss_in_parts_is_the_loss(most):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(5, 11), torch.randn(23, 5, requires_grad=True)
    targets = torch.randint(0, 11, (23,))
    model = types.SimpleNamespace(lm_head=head, config=types.SimpleNamespace(vocab_size=11))
    loss, wrong = head_loss(model, hidden, targets, most)
    logits = head(hidden)
    expected = F.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(wrong, logits.argmax(-1) != targets)
    got, needed = (torch.autograd.grad(value, [hidden, *head.parameters()]) for value in (loss, expected))
    for one, other in zip(got, needed):
        torch.testing.assert_close(one, other)


def test_a_loss_in_parts_has_the_gradients_of_the_dropout_that_it_drew():
    """A part is made again for the backward pass: with another mask its gradient would be another loss's."""
    model = adapt(make("llama"), "lora", targets=("lm_head",), dropout=0.5).train()
    open_gates(model)
    hidden, targets = torch.randn(12, model.config.hidden_size), torch.randint(0, model.config.vocab_size, (12,))
    losses = []
    for most in (4 * model.config.vocab_size, None):
        torch.manual_seed(1)
        if most:
            losses.append(head_loss(model, hidden, targets, most)[0])
        else:  # the same parts, each kept whole
            parts = [F.cross_entropy(model.lm_head(hidden[i : i + 4]), targets[i : i + 4]) for i in (0, 4, 8)]
            losses.append(torch.stack(parts).mean())
    torch.testing.assert_close(*losses)
    parameters = list(minillama.trainable_parameters(model).values())
    for mine, other in zip(*(torch.autograd.grad(loss, parameters) for loss in losses)):
        assert mine.norm() > 0
        torch.testing.assert_close(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind, case", [("llama", "llama_adapter"), ("gpt2", "lora")])
def test_compiled_layers_are_the_plain_ones(kind, case, ids, monkeypatch):
    """Loss, gradients, and the disabled model at another length, by the graphs that the compiler traces; kernels are
    made of such graphs below. The first layer has one, for its input needs no gradient, and the others share one."""
    counted = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counted))
    torch.manual_seed(0)
    model = open_gates(adapt(make(kind), **CASES[case][0])).train()
    faster = copy.deepcopy(model)
    speed.compile_layers(faster)
    grads = []
    for one in (model, faster):
        loss = answer_loss(one, ids[:, :9], ids[:, :9])
        loss.backward()
        trained = minillama.trainable_parameters(one).values()
        grads.append([loss.detach(), *(parameter.grad for parameter in trained)])
    assert counted.frame_count == 2 < len(model.layers)
    for mine, other in zip(*grads):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), disabled(faster), disabled(model):
        torch.testing.assert_close(faster(ids[:, :6]), model(ids[:, :6]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_float8_has_the_plain_ones_gradients(on_any_device):
    """A compiler once laid the numbers out column by column: the loss was right, the gradients 0. Kernels are compiled
    here, for one MLP, since each costs a second."""
    torch.manual_seed(0)
    model = minillama.LLaMA(minillama.LLaMAConfig(256, 64, 128, 1, 4)).bfloat16().requires_grad_(False)
    plain, x = quantize(model, "float8").layers[0].mlp, torch.randn(4, 32, 64, dtype=torch.bfloat16)
    faster, gradients = copy.deepcopy(plain), []
    speed.compile_layers(types.SimpleNamespace(layers=[faster]))
    for mlp in (plain, faster):
        given = x.transpose(0, 1).requires_grad_()  # laid out as what attention returns may be
        mlp(given).square().sum().backward()
        gradients.append(given.grad)
    assert 0 < gradients[1].norm() and (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()


@torch.no_grad()
@pytest.mark.parametrize("kind, case", rotated(("llama", "grouped", "gpt2"), CASES))
def test_a_static_cache_gives_the_plain_ones_logits(kind, case, ids):
    model = builder(kind, case)("open")
    for prompt, mask in ((ids, None), left_padded(ids, LENGTHS)):
        cache, decoder, chosen, greedy = Cache(), Decoder(model, 5), prompt, []
        for step in range(5):
            logits = decoder(chosen, mask if step == 0 else None).clone()
            expected = model(chosen, mask if step == 0 else None, cache)[:, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            chosen = expected.argmax(-1)[:, None]
            greedy.append(chosen)
        static = generate(model, prompt, 5, attention_mask=mask, static=True)
        assert torch.equal(static[:, prompt.shape[1] :], torch.cat(greedy, 1))


def test_a_static_cache_for_mixed_rows_and_for_more_than_the_model_takes(ids):
    model = open_gates(adapt(adapt(make("llama"), "ia3", name="one"), "llama_adapter", name="two", prompt_length=4))
    with mixed(model, ["one", None, "two"]):
        assert torch.equal(generate(model, ids, 12, static=True), generate(model, ids, 12))
    assert generate(make("gpt2"), ids, 55, static=True).shape == (3, 64)
    with pytest.raises(ValueError, match=r"65 tokens and the model takes 64 \(max_position_embeddings"):
        generate(make("gpt2"), ids, 56, static=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a step is recorded on a GPU, and there is none")
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_gives_the_plain_ones_tokens(case, ids):
    model, prompt = builder("llama", case)("open").cuda(), ids.cuda()
    assert torch.equal(generate(model, prompt, 30, static=True), generate(model, prompt, 30))


def test_rows_are_padded_to_a_multiple_where_layers_are_compiled():
    ids, labels = data.collate([("a", "bc"), ("abc", "d\n")], data.ByteTokenizer(), 64)
    plain, marked = data.collate([("a", "bc"), ("abc", "d\n")], data.ByteTokenizer())
    assert ids.shape == labels.shape == (2, 64) and (labels[:, plain.shape[1] :] == data.IGNORED).all()
    assert torch.equal(ids[:, : plain.shape[1]], plain) and torch.equal(labels[:, : plain.shape[1]], marked)


# ── fewer bits ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", KINDS)
def test_blocks_are_ggufs(how):
    """The same numbers as llama.cpp's own quantisation, a row of zeros and ties included; its bytes too, but for the
    order in which scale and codes lie."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40)
    with torch.no_grad():
        linear.weight[0] = 0
        linear.weight[1] = torch.tensor([-1.0, 1.0]).repeat(48)
    small = filled(BlockLinear(linear, int(how[0]), "cpu"), linear)
    theirs = gguf.quants.quantize(linear.weight.detach().numpy(), KINDS[how])
    assert torch.equal(small.weight, torch.from_numpy(gguf.quants.dequantize(theirs, KINDS[how])))
    assert small.codes.nbytes + small.scales.nbytes == theirs.nbytes
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(small.to(dtype).codes, small.codes) and small.scales.dtype == torch.int16


@pytest.mark.parametrize("how", KINDS)
def test_a_product_and_its_gradient_are_the_whole_matrixs(how):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    small = filled(BlockLinear(linear, int(how[0]), "cpu"), linear)
    x = torch.randn(3, 5, 64, requires_grad=True)
    y, expected = small(x), F.linear(x, small.weight, small.bias)
    assert torch.equal(y, expected) or torch.allclose(y, expected, atol=1e-6)
    up = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(value, x, up)[0] for value in (y, expected)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda kept: kept):
        small(x)
    assert not kept  # neither the whole matrix nor the input waits for the backward pass


def test_float8_products_are_near_the_plain_ones(on_any_device):
    """3 bits behind the point: 2 to 4 % of a product's size, forward and back."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    small = filled(Float8Linear(linear, "cpu"), linear)
    x = torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(64, 128, dtype=torch.bfloat16)
    for mine, plain in (
        (small(x), linear(x)),
        (torch.autograd.grad(small(x), x, up)[0], torch.autograd.grad(linear(x), x, up)[0]),
        (small.weight, linear.weight),
    ):
        assert 0.005 < ((mine - plain).float().norm() / plain.float().norm()) < 0.05
    rows = torch.stack([x[0], 1000 * x[1]]).detach()  # a large row does not spoil another
    assert torch.equal(small(rows)[0], small(x)[0])


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("how", [*KINDS, "float8"])
def test_adapters_stand_on_a_quantised_base(how, on_any_device, tmp_path):
    """Closed it is that base bit for bit, it learns, its file comes back, and it says what it cannot do."""
    plain, tokenizer = base()
    expected = (quantize(copy.deepcopy(plain), how))(IDS)
    assert 0 < (expected - plain(IDS)).abs().max() < (4 if how == "4bit" else 1.5)
    pairs = data.examples("fr", data.split_dates()[0], 8)
    for method in ("llama_adapter", "llama_adapter_v2", "ia3", "bottleneck", "lora", "dora", "prefix_tuning"):
        model, _ = base(how)
        torch.manual_seed(0)
        adapt(model, method)
        if method != "prefix_tuning":
            assert torch.equal(model(IDS), expected), method
        with torch.enable_grad():
            train(model, tokenizer, pairs, steps=2, batch_size=4, learning_rate=0.1, progress=False)
        assert not torch.equal(model(IDS), expected), method
        with disabled(model):
            assert torch.equal(model(IDS), expected), method
        save_adapter(model, tmp_path / method)
        assert torch.equal(load_adapter(base(how)[0], tmp_path / method)(IDS), model(IDS)), method
        load_adapter(base()[0], tmp_path / method)  # whose fingerprint is the same
        if method in ("ia3", "lora", "dora"):
            with pytest.raises(ValueError, match="is quantised, and a merge needs the plain weight"):
                merge(model)
    with pytest.raises(ValueError, match="is quantised, which no file"):
        save(quantize(plain, how), tmp_path / "base")


def test_what_cannot_be_quantised_is_refused(capsys):
    assert main(["compare", "--quantize", "8bit"]) == 2
    assert "compare trains all weights too, which must then be whole: leave --quantize out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="quantize is '3bit'; it can be 8bit, 4bit, float8"):
        quantize(base()[0], "3bit")
    with pytest.raises(ValueError, match="adapted already"):
        quantize(adapt(base()[0], "ia3"), "8bit")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="multiplied by NVIDIA cards .* this is cpu: take 8bit or 4bit"):
            quantize(base()[0], "float8")


@pytest.mark.slow
def test_the_command_quantises_and_the_adapter_goes_to_the_whole_base(tmp_path, monkeypatch, capsys):
    """The fingerprint is of the base as it was, so that what was trained in few bits runs without them too."""
    monkeypatch.chdir(tmp_path)
    assert main("adapt --steps 2 --test-dates 4 --quantize 8bit --out here".split()) == 0
    out = capsys.readouterr().out
    assert "layers in 8bit" in out and "bit-identical" in out and "of the base's 791,680" in out
    for more in ([], ["--quantize", "8bit"]):
        assert main(["generate", "--adapter", "here", "--prompt", "March 3, 2021 = ", *more]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "March 3, 2021 = 2021-03-03"


@pytest.mark.slow
def test_the_bench_runs_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    methods = "llama_adapter,bottleneck"
    options = f"--base dates-llama --dtype float32 --batch-size 2 --tokens 20,30 --answers 4 --methods {methods}"
    assert main(["bench", *options.split(), "--rounds", "1", "--out", "here"]) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "here/bench.json").read_text())
    assert len(content["cases"]) == 4 and content["settings"]["ceiling"] > 0 and "peft / ours" in out
    for case in content["cases"]:
        assert case["seconds"].keys() == {"step", "forward", "prefill", "decode"}
        assert ("peft" in case["seconds"]["step"]) == (case["method"] != "bottleneck") and case["floor"] > 0
    assert (tmp_path / "here/bench.png").read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "--methods", "lama"]) == 2 and "there is no method 'lama'" in capsys.readouterr().err
