"""The dates task and the training loop."""

import contextlib
import datetime
import json
import random
import re
import subprocess
import sys

import pytest
import torch
from methods import CASES, adapted, builder
from small import KINDS, SHAPE, make, open_gates, rotated

import minillama
from minillama import ByteTokenizer, adapt, data
from minillama.adapters import METHODS
from minillama.checkpoints.pairs import read_pairs
from minillama.device import AdamW
from minillama.train import answer_loss, answers, checkpointed, exact_match, learning_rate_at, mean_loss, train

TOKENIZER = ByteTokenizer()


def test_train_and_test_dates_are_disjoint_and_fixed():
    train_days, test_days = data.split_dates()
    assert not set(train_days) & set(test_days)
    assert len(train_days) + len(test_days) == 73_049 and len(test_days) == 7_304
    assert data.split_dates() == (train_days, test_days) != data.split_dates(seed=1)


@pytest.mark.parametrize("language", ["en", *data.LANGUAGES])
def test_every_language_is_real_and_can_be_read(language):
    """The year and the day stand in every text, the answer is the ISO form of the same day, and the seed fixes both."""
    _, test_days = data.split_dates()
    pairs = data.examples(language, test_days, 300, seed=3)
    assert pairs == data.examples(language, test_days, 300, seed=3) != data.examples(language, test_days, 300, seed=4)
    known = set(test_days)
    for prompt, answer in pairs:
        day = datetime.date.fromisoformat(answer.strip())
        assert day in known and answer == f"{day.isoformat()}\n" and prompt.endswith(" = ")
        numbers = [int(number) for number in re.findall(r"\d+", prompt)]
        assert day.year in numbers and day.day in numbers
    assert len({prompt for prompt, _ in pairs}) > 280


def test_known_texts():
    day = [datetime.date(2021, 3, 3)]
    texts = {language: {prompt for prompt, _ in data.examples(language, day, 60)} for language in ("en", "fr", "hu")}
    assert texts["en"] == {
        "Mar 3, 2021 = ", "March 3, 2021 = ", "Wednesday, March 3, 2021 = ",
        "3 Mar 2021 = ", "3 March 2021 = ", "Wednesday, 3 March 2021 = ",
    }  # fmt: skip
    assert texts["fr"] == {"3 mars 2021 = ", "mercredi 3 mars 2021 = "}
    assert "2021. március 3., szerda = " in texts["hu"]


def test_several_languages_take_turns():
    days = data.split_dates()[0]
    pairs = data.examples(["en", "fr", "fi"], days, 300, seed=5)
    months = {
        "fr": "janv|févr|mars|avr|mai|juin|juil|août|sept|oct|nov|déc",
        "fi": "kuuta|\\d+\\.\\d+\\.",
        "en": "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec",
    }
    for i, language in enumerate(("en", "fr", "fi")):
        assert all(re.search(months[language], prompt) for prompt, _ in pairs[i::3])
    assert data.examples(["fr"], days, 50, seed=5) == data.examples("fr", days, 50, seed=5)


def test_the_form_for_words():
    words = type("Words", (), {})()
    assert data.form(TOKENIZER) is data.LINE and data.form(words) is data.LABELLED
    line, said = (data.examples("fr", data.split_dates()[0], 20, 6, form) for form in (data.LINE, data.LABELLED))
    for (prompt, answer), (longer, spaced) in zip(line, said):
        assert longer == f"Date: {prompt.removesuffix(' = ')} ISO:" and spaced == f" {answer.removesuffix(chr(10))}"


def test_unknown_language_is_explained():
    with pytest.raises(ValueError, match=r"no language 'frr_XX'.*fr"):
        data.locales("frr_XX")
    for name in ("", "klingon", "en-US-x", "../fr"):
        with pytest.raises(ValueError, match="CLDR knows no language"):
            data.locales(name)
    assert data.locales("ca") == ("ca",)


def test_byte_tokenizer():
    for text in ("", "3 März 2021\n", "środa </s> 🙂 \x00"):
        assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert max(TOKENIZER.encode("é")) < TOKENIZER.vocab_size == 256


def test_collate_puts_labels_on_answers_alone():
    ids, labels = data.collate([("ab", "c\n"), ("a", "bcd\n")], TOKENIZER)
    assert ids.tolist() == [[97, 98, 99, 10, 0], [97, 98, 99, 100, 10]]
    assert labels.tolist() == [[-100, -100, 99, 10, -100], [-100, 98, 99, 100, 10]]


def test_encode_adds_the_end_and_cuts_what_is_too_long():
    def cut(prompt, answer, max_length):
        (row,) = data.encode([(prompt, answer)], TOKENIZER, max_length)
        assert data.encode([row], TOKENIZER) == [row]  # ids stay as they are: a cut answer gets no end
        return tuple(map(TOKENIZER.decode, row))

    assert cut("abc", "xyz", None) == cut("abc", "xyz\n", None) == cut("abc", "xyz", 7) == ("abc", "xyz\n")
    assert cut("abc", "xyz", 6) == ("bc", "xyz\n")  # the prompt loses its beginning
    assert cut("abc", "xyz", 4) == ("c", "xyz")  # the answer its end
    endless = type("Endless", (ByteTokenizer,), {"eos_id": None})()
    assert data.encode([("a", "b")], endless) == [([97], [98])]


def test_chat_puts_the_prompt_into_the_template():
    class Chatty(ByteTokenizer):
        def encode(self, text, special=False):
            return super().encode(text.replace("<user>", "\1") if special else text)

        def question(self, text):
            return self.encode(f"<user>{text}<", special=True)

    pair = [("Who?", "<user>")]
    assert data.encode(pair, Chatty(), chat=True) == [([1, *b"Who?<"], [*b"<user>\n"])]
    assert data.encode(pair, Chatty()) == [([*b"Who?"], [*b"<user>\n"])]


def write_lines(path, *records):
    lines = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_pairs_are_read_from_a_file_or_a_folder(tmp_path):
    one = write_lines(
        tmp_path / "a.jsonl",
        {"prompt": "p\u2028q", "response": "r\n", "more": 1},
        "",
        {"prompt": "x", "response": "  "},
        {"prompt": "", "response": "y"},
    )
    assert read_pairs(one) == ([("p\u2028q", "r\n")], 2)
    write_lines(tmp_path / "b.jsonl", "\ufeff" + json.dumps({"prompt": "ä", "response": "ö"}))
    write_lines(tmp_path / "c.txt", "not this")
    assert read_pairs(tmp_path) == ([("p\u2028q", "r\n"), ("ä", "ö")], 2)


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"prompt": "a", "response": ', "not valid JSON"),
        ('{"prompt": "a"}', 'has no "response"'),
        ('["prompt", "response"]', 'has no "prompt"'),
        ('{"prompt": 3, "response": "a"}', '"prompt" is of type int'),
        ('{"prompt": "a", "response": null}', '"response" is of type NoneType'),
    ],
)
def test_a_bad_line_is_named(line, named, tmp_path):
    file = write_lines(tmp_path / "bad.jsonl", {"prompt": "a", "response": "b"}, "", line)
    with pytest.raises(minillama.FileError, match=re.escape(f"{file}:3") + ".*" + named):
        read_pairs(tmp_path)


def test_folders_without_pairs_are_refused(tmp_path):
    with pytest.raises(minillama.FileError, match=r"has no \*.jsonl"):
        read_pairs(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "response": "x"}'.encode("latin-1"))
    with pytest.raises(minillama.FileError, match="latin.jsonl cannot be read as UTF-8"):
        read_pairs(tmp_path)


def test_held_out_prompts_are_not_trained_on():
    pairs = [(f"prompt {i % 50}", str(i)) for i in range(100)]
    kept, held = data.hold_out(pairs, most=200)
    assert sorted(kept + held) == sorted(pairs) and len(held) == 10 and not {p for p, _ in kept} & {p for p, _ in held}
    assert data.hold_out(pairs, most=200) == (kept, held) != data.hold_out(pairs, most=200, seed=1)
    assert len(data.hold_out(pairs, most=2)[1]) == 4 and len(data.hold_out(pairs[:2], most=200)[1]) == 1
    with pytest.raises(ValueError, match="1 prompts"):
        data.hold_out(pairs[:1], most=200)


def test_batches_are_of_like_length_and_lose_nothing():
    _, days = data.split_dates()
    pairs = data.examples("fr", days, 1000)
    stream = data.batches(pairs, 10, seed=0)
    once = [next(stream) for _ in range(100)]
    assert sorted(pair for batch in once for pair in batch) == sorted(pairs)

    def spread(batches):
        lengths = [[len(prompt) for prompt, _ in batch] for batch in batches]
        return sum(max(row) - min(row) for row in lengths) / len(lengths)

    assert spread(once) < 4
    again = data.batches(pairs, 10, seed=0)
    assert [next(again) for _ in range(5)] == once[:5]
    assert next(data.batches(pairs, 10, seed=1)) != once[0]
    stream = data.batches(pairs, 10, seed=0, bucket=1)
    mixed = [next(stream) for _ in range(100)]
    assert sorted(pair for batch in mixed for pair in batch) == sorted(pairs)
    assert spread(mixed) > 10


def test_typos_change_letters_only():
    pairs = data.examples("en", data.split_dates()[0], 400)
    smudged = data.with_typos(pairs, 0.1)
    changed = [(old, new) for (old, _), (new, _) in zip(pairs, smudged) if old != new]
    assert 80 < len(changed) < 200
    for old, new in changed:
        assert len(old) == len(new) and all(a == b or a.isalpha() for a, b in zip(old, new))
    assert data.with_typos(pairs, 0.0) == pairs


def test_answer_loss_is_transformers_loss(tmp_path):
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = minillama.load(tmp_path)
    ids = torch.randint(0, 101, (4, 9))
    labels = ids.masked_fill(torch.rand(4, 9) < 0.5, -100)
    torch.testing.assert_close(answer_loss(ours, ids, labels), theirs(ids, labels=labels).loss)
    with pytest.raises(ValueError, match="carries loss"):
        answer_loss(ours, ids, torch.full_like(ids, -100))


def test_padding_on_the_right_does_not_change_the_loss(model):
    ids = torch.randint(1, 101, (1, 6))
    padded = torch.cat((ids, torch.zeros(1, 3, dtype=torch.int64)), 1)
    labels = torch.cat((ids, torch.full((1, 3), -100)), 1)
    torch.testing.assert_close(answer_loss(model, padded, labels), answer_loss(model, ids, ids))


def test_mean_loss_weighs_every_answer_token_alike(model):
    pairs = [([1, 2], [3, 4]), ([5], [6, 7, 8, 9, 10]), ([11, 12, 13], [14])]
    words = type("Ids", (), {"eos_id": None})()
    losses = [answer_loss(model, *data.collate([pair], words)) for pair in pairs]
    expected = sum(loss * len(answer) for loss, (_, answer) in zip(losses, pairs)) / 8
    assert mean_loss(model, words, pairs, batch_size=2) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ("grouped", "gpt2"))
def test_checkpointing_gives_the_same_gradients_and_keeps_less(kind, method, ids):
    torch.manual_seed(0)
    model = open_gates(adapted(make(kind), dict(method=method)))
    measured, hooks = [], torch.autograd.graph.saved_tensors_hooks
    for block in (contextlib.nullcontext, lambda: checkpointed(model)):
        kept = []
        with block(), hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            loss = answer_loss(model, ids, ids)
        model.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        measured.append((loss, gradients, sum(kept)))
    (plain, gradients, much), (again, same, little) = measured
    assert torch.equal(plain, again) and all(map(torch.equal, gradients, same))
    assert little < much / 2
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_training_with_checkpointing_ends_where_training_without_ends():
    def once(checkpointing):
        torch.manual_seed(0)
        model = adapt(small(), "llama_adapter")
        train(model, TOKENIZER, some_pairs(), steps=5, batch_size=8, checkpointing=checkpointing, progress=False)
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    assert all(map(torch.equal, once(False), once(True)))


def test_learning_rate():
    rates = [learning_rate_at(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == rates[9] == pytest.approx(2.0) and rates[-1] < 0.001
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert learning_rate_at(0, 1, 2.0, 0.1) == 2.0


def small():
    torch.manual_seed(0)
    return minillama.LLaMA(minillama.LLaMAConfig(256, 32, 48, 2, 2))


def some_pairs():
    return data.examples("fr", data.split_dates()[0], 64)


def test_training_learns_logs_and_repeats_bit_for_bit():
    def once(seed):
        model = small()
        settings = dict(steps=20, batch_size=8, learning_rate=1e-2, seed=seed, progress=False)
        return model, train(model, TOKENIZER, some_pairs(), **settings)

    (one, history), (two, _), (other, _) = once(0), once(0), once(1)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"] and len(history) == 20
    assert set(history[0]) >= {"step", "loss", "accuracy", "learning_rate", "examples_per_second", "seconds"}
    weights = [torch.cat([parameter.flatten() for parameter in model.parameters()]) for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def by_hand(model, steps, batch_size, rate, warmup=0.1, weight_decay=0.0, clip=1.0):
    """The loop written out: what `train` must do to every trained parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    stream = data.batches(some_pairs(), batch_size, 0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, steps, rate, warmup)
        optimizer.zero_grad()
        answer_loss(model, *data.collate(next(stream), TOKENIZER)).backward()
        if clip is not None:
            norm = torch.stack([parameter.grad.norm() for parameter in trained]).norm()
            for parameter in trained:
                parameter.grad *= min(1.0, clip / (norm.item() + 1e-6))
        optimizer.step()
    return model


@pytest.mark.parametrize("settings", [{}, dict(clip=0.01), dict(weight_decay=0.3), dict(warmup=0.5)], ids=str)
def test_training_is_the_loop_written_out(settings):
    """Clipping, weight decay and warm-up each do what they say, and are what the defaults say."""
    rate = 1e-2
    model, expected = small(), by_hand(small(), 6, 8, rate, **settings)
    train(model, TOKENIZER, some_pairs(), steps=6, batch_size=8, learning_rate=rate, progress=False, **settings)
    plain = by_hand(small(), 6, 8, rate)
    far = max((a - b).abs().max().item() for a, b in zip(plain.parameters(), expected.parameters()))
    assert far > 1e-4 or not settings  # the setting matters here
    for mine, theirs in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_accuracy_counts_whole_answers(monkeypatch):
    """A row with one wrong token of its answer counts for nothing."""
    from minillama import train as module

    model, pairs = small(), [("a", "bcd\n"), ("a", "bcd\n"), ("a", "bcd\n"), ("a", "bcd\n")]
    real = module.head_loss

    def known(model, hidden, targets):
        loss, wrong = real(model, hidden, targets)
        rows = torch.arange(4).repeat_interleave(4)  # four tokens of answer each
        wrong = torch.zeros_like(wrong)
        wrong[(rows == 1).nonzero()[2]] = True  # one token of row 1, and two of row 3
        wrong[(rows == 3).nonzero()[:2]] = True
        return loss, wrong

    monkeypatch.setattr(module, "head_loss", known)
    assert train(model, TOKENIZER, pairs, steps=1, batch_size=4, progress=False)[0]["accuracy"] == 0.5


def test_autocast_computes_in_the_dtype_asked_for():
    heads = []
    for dtype in (None, torch.bfloat16):
        model = small()
        model.lm_head.register_forward_hook(lambda _, given, out: heads.append(out.dtype))
        train(model, TOKENIZER, some_pairs(), steps=1, batch_size=4, autocast=dtype, progress=False)
    assert heads == [torch.float32, torch.bfloat16]


def test_every_round_has_another_order():
    pairs = [(f"{i:03}", "x\n") for i in range(40)]  # all of one length
    stream = data.batches(pairs, 8, seed=0)
    rounds = [[tuple(next(stream)) for _ in range(5)] for _ in range(3)]
    orders = [[pair for batch in batches for pair in batch] for batches in rounds]
    assert pairs not in orders and orders[0] != orders[1] != orders[2]
    assert {frozenset(batch) for batch in rounds[0]} != {frozenset(batch) for batch in rounds[1]}


def test_short_batches_do_not_come_first():
    """Sorted by length within a bucket, but given out in any order."""
    pairs = [("x" * (1 + i), "y\n") for i in range(64)]
    stream = data.batches(pairs, 8, seed=0)
    longest = [max(len(prompt) for prompt, _ in next(stream)) for _ in range(8)]
    assert sorted(longest) == list(range(8, 65, 8)) and longest != sorted(longest)


def test_blocks_of_checkpointing_nest(model, ids):
    with checkpointed(model), checkpointed(model):
        answer_loss(model, ids, ids).backward()
    assert all("forward" not in vars(layer) for layer in model.layers)


def test_only_what_requires_gradients_reaches_the_optimizer(monkeypatch):
    model, given = adapt(small(), "llama_adapter", layers=1), []
    original = torch.optim.AdamW

    def watched(parameters, **settings):
        given.append(list(parameters))
        return original(given[0], **settings)

    monkeypatch.setattr("minillama.train.AdamW", watched)
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    train(model, TOKENIZER, some_pairs(), steps=3, batch_size=8, progress=False)
    top = model.layers[1].self_attn
    assert {id(parameter) for parameter in given[0]} == {id(top.prompt), id(top.gate)}
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)


def test_our_adamw_is_pytorchs_to_the_bit():
    """Over three steps, the second on what was saved and read again; hooks of PyTorch's are heard."""
    ends, heard, how = [], [], dict(lr=0.1, betas=(0.9, 0.99), weight_decay=0.3, fused=True)
    for kind in (torch.optim.AdamW, AdamW):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = kind([parameter], **how)
        for _ in range(3):
            optimizer.zero_grad()
            assert parameter.grad is None
            parameter.pow(3).sum().backward()
            optimizer.register_step_post_hook(lambda stepped, *_: heard.append(type(stepped)))
            optimizer.step()
            saved = optimizer.state_dict()
            optimizer = kind([parameter], **how)
            optimizer.load_state_dict(saved)
        ends.append(parameter.detach())
    assert torch.equal(*ends) and heard == 3 * [torch.optim.AdamW] + 3 * [AdamW]


def test_training_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="requires gradients"):
        train(small().requires_grad_(False), TOKENIZER, some_pairs(), progress=False)
    with pytest.raises(ValueError, match="steps is 0"):
        train(small(), TOKENIZER, some_pairs(), steps=0, progress=False)
    for rate in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="learning_rate is"):
            train(small(), TOKENIZER, some_pairs(), learning_rate=rate, progress=False)
    with pytest.raises(ValueError, match="lower the learning rate"):
        settings = dict(steps=20, batch_size=8, learning_rate=1e18, warmup=0, clip=1e30, progress=False)
        train(small(), TOKENIZER, some_pairs(), **settings)


def test_exact_match_is_by_generation_not_teacher_forcing():
    """A model that repeats its input wins under teacher forcing on "aaaa" and must not win here."""

    class Echo(torch.nn.Module):
        """Predicts 'b' after the prompt's '=', and after that whatever it saw last, plus one."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.lm_head = torch.nn.Identity()

        def hidden(self, ids, attention_mask=None, cache=None):
            following = torch.where(ids == ord("="), ord("b"), torch.where(ids == ord("d"), ord("\n"), ids + 1))
            return torch.nn.functional.one_hot(following, 256).float()

    assert answers(Echo(), TOKENIZER, ["x=", "long ="]) == ["bcd\n", "bcd\n"]
    pairs = [("x=", "bcd\n"), ("long =", "bce\n"), ("y=", "bc\n"), ("y=", "bcde")]
    assert exact_match(Echo(), TOKENIZER, pairs) == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ("dates-llama", "dates-gpt2"))
def test_bundled_bases(name):
    """Small, complete with a card that tells how they were made, and right on English dates they never saw:
    at most one of 300 is missed."""
    from minillama.checkpoints import BASES

    assert (BASES / name / "model.safetensors").stat().st_size <= 4_000_000
    assert f"pretrain --model {name.removeprefix('dates-')}" in (BASES / name / "README.md").read_text()
    model, tokenizer = minillama.load(name)
    _, test_days = data.split_dates()
    assert exact_match(model, tokenizer, data.examples("en", test_days, 300, seed=1)) >= 299 / 300
    assert name == "dates-gpt2" or model.config.num_key_value_heads < model.config.num_attention_heads


def test_device_and_dtype():
    from minillama.device import native_bfloat16, pick_device, pick_dtype

    cpu = pick_device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if native_bfloat16(cpu) else torch.float32)
    assert pick_dtype("float32", cpu) == torch.float32
    for bad in ("cuda:99", "abacus"):
        with pytest.raises(ValueError, match=bad):
            pick_device(bad)
    with pytest.raises(ValueError, match="float8"):
        pick_dtype("float8", cpu)


def test_native_bfloat16_by_features(monkeypatch):
    from minillama.device import native_bfloat16

    for features, native in (
        ({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert native_bfloat16(torch.device("cpu")) == native
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not native_bfloat16(torch.device("cuda"))


@pytest.mark.slow
def test_peak_memory_grows_with_what_is_held():
    """In a process of its own, which holds little."""
    code = (
        "import torch; from minillama.device import peak_memory; cpu = torch.device('cpu'); before = peak_memory(cpu); "
        "block = torch.ones(2**26); print(before, peak_memory(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 2**28 * 0.9 < after - before < 2**28 * 1.5


# ── several texts in one row ─────────────────────────────────────────────────────────────────────────────────────────


def some_rows(count=60, seed=0):
    """Pairs of ids of many lengths."""
    draw = random.Random(seed)
    lengths = [(draw.randint(1, 12), draw.randint(1, 9)) for _ in range(count)]
    return [tuple([draw.randrange(1, 100) for _ in range(n)] for n in pair) for pair in lengths]


def test_rows_are_filled_and_nothing_is_lost():
    pairs = some_rows(2500)
    stream = data.packed_batches(pairs, 8, 64, seed=3)
    rounds = [[], []]
    for each in rounds:
        while sum(map(len, each)) < len(pairs):
            each += next(stream)
        assert sorted(pair for row in each for pair in row) == sorted(pairs)
        assert max(sum(map(data.tokens, row)) for row in each) <= 64
        assert sum(map(data.tokens, pairs)) >= 0.97 * 64 * len(each)
    assert rounds[0] != rounds[1]
    assert next(data.packed_batches(pairs, 8, 64, seed=3)) == rounds[0][:8]
    with pytest.raises(ValueError, match="the longest example has 21 tokens, and a packed row 20: make rows longer"):
        next(data.packed_batches([*pairs, ([1] * 12, [1] * 9)], 8, 20))


def losses_and_gradients(model, batch):
    model.zero_grad()
    loss = answer_loss(model, *batch)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in minillama.trainable_parameters(model).values())]


PACKED = [case for case in CASES if case.partition(",")[0] not in ("prompt_tuning", "image_prompt")]


@pytest.mark.parametrize("kind, case", rotated(KINDS, PACKED))
def test_texts_in_one_row_do_not_see_one_another(kind, case):
    """The loss and the adapter's gradients are those of a row for each; without the mask they are others."""
    words = type("Ids", (), {"eos_id": None})()
    model, pairs = builder(kind, case)("open"), some_rows(20)
    rows = next(data.packed_batches(pairs, 100, 48))
    assert len(rows) < len(pairs) / 2
    ids, labels, texts = data.collate_packed(rows, 48)
    apart = losses_and_gradients(model, data.collate([pair for row in rows for pair in row], words))
    for mine, other in zip(losses_and_gradients(model, (ids, labels, texts)), apart):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)
    for wrong in (None, (texts > 0).long()):  # no mask, and one that tells padding alone
        found = losses_and_gradients(model, (ids, labels, wrong))
        assert max((mine - other).norm() / other.norm() for mine, other in zip(found, apart)) > 1e-3


@pytest.mark.slow
def test_a_packed_run_trains_as_the_batch_apart(monkeypatch):
    pairs = some_pairs()[:40]
    rows = next(data.packed_batches(data.encode(pairs, TOKENIZER), 100, 128))
    runs = []
    for pack in (128, None):
        model = minillama.adapt(minillama.load("dates-llama")[0], "ia3")
        monkeypatch.setattr("minillama.train.batches", lambda *_: iter([[pair for row in rows for pair in row]] * 3))
        monkeypatch.setattr("minillama.train.packed_batches", lambda *_: iter([rows] * 3))
        runs.append(train(model, TOKENIZER, pairs, steps=3, pack=pack, progress=False))
    for packed, apart in zip(*runs):
        assert packed["loss"] == pytest.approx(apart["loss"], rel=1e-5) and packed["accuracy"] == apart["accuracy"]
        assert packed["examples_per_second"] * packed["seconds"] == pytest.approx(40 * packed["step"])
    prompted = minillama.adapt(minillama.load("dates-llama")[0], "prompt_tuning")
    with pytest.raises(ValueError, match="a soft prompt, or a picture, is a row's"):
        train(prompted, TOKENIZER, pairs, pack=128)
