"""The dates task and the training loop."""

import datetime
import json
import re

import pytest
import torch
from conftest import SHAPE

import minillama
from minillama import ByteTokenizer, adapt, data
from minillama.train import answer_loss, answers, exact_match, learning_rate_at, train

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
    assert texts["en"] == {"Mar 3, 2021 = ", "March 3, 2021 = ", "Wednesday, March 3, 2021 = ", "3 Mar 2021 = ", "3 March 2021 = ", "Wednesday, 3 March 2021 = "}
    assert texts["fr"] == {"3 mars 2021 = ", "mercredi 3 mars 2021 = "}
    assert "2021. március 3., szerda = " in texts["hu"]


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


def test_batches_are_of_like_length_and_lose_nothing():
    _, days = data.split_dates()
    pairs = data.examples("fr", days, 1000)
    stream = data.batches(pairs, 10, seed=0)
    once = [next(stream) for _ in range(100)]
    assert sorted(pair for batch in once for pair in batch) == sorted(pairs)
    spread = [max(map(len, prompts)) - min(map(len, prompts)) for batch in once for prompts in [[prompt for prompt, _ in batch]]]
    assert sum(spread) / len(spread) < 4
    again = data.batches(pairs, 10, seed=0)
    assert [next(again) for _ in range(5)] == once[:5]
    assert next(data.batches(pairs, 10, seed=1)) != once[0]


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


def test_training_learns_logs_and_repeats_bit_for_bit(tmp_path):
    def once(seed):
        model = small()
        file = tmp_path / "m.jsonl"
        history = train(model, TOKENIZER, some_pairs(), steps=20, batch_size=8, learning_rate=1e-2, seed=seed, metrics_file=file, progress=False)
        assert [json.loads(line) for line in file.read_text().splitlines()] == history
        return model, history

    (one, history), (two, _), (other, _) = once(0), once(0), once(1)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"] and len(history) == 20
    assert set(history[0]) >= {"step", "loss", "accuracy", "learning_rate", "examples_per_second"}
    weights = [torch.cat([parameter.flatten() for parameter in model.parameters()]) for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_only_what_requires_gradients_reaches_the_optimizer(monkeypatch):
    model, given = adapt(small(), "llama_adapter", layers=1), []
    original = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **settings: given.append(list(parameters)) or original(given[0], **settings))
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    train(model, TOKENIZER, some_pairs(), steps=3, batch_size=8, progress=False)
    assert {id(parameter) for parameter in given[0]} == {id(model.layers[1].self_attn.prompt), id(model.layers[1].self_attn.gate)}
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.named_parameters() if name in frozen)


def test_training_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="requires gradients"):
        train(small().requires_grad_(False), TOKENIZER, some_pairs(), progress=False)
    with pytest.raises(ValueError, match="steps is 0"):
        train(small(), TOKENIZER, some_pairs(), steps=0, progress=False)
    with pytest.raises(ValueError, match="lower the learning rate"):
        train(small(), TOKENIZER, some_pairs(), steps=20, batch_size=8, learning_rate=1e18, warmup=0, clip=1e30, progress=False)


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
    assert exact_match(Echo(), TOKENIZER, [("x=", "bcd\n"), ("long =", "bce\n"), ("y=", "bc\n"), ("y=", "bcde")]) == 0.25


@pytest.mark.parametrize("name, least", [("dates-llama", 0.995), ("dates-gpt2", 0.995)])
def test_bundled_bases(name, least):
    """Small, complete with a card that tells how they were made, and right on English dates they never saw."""
    from minillama.pretrained import BASES

    assert (BASES / name / "model.safetensors").stat().st_size <= 4_000_000
    assert f"pretrain --model {name.removeprefix('dates-')}" in (BASES / name / "README.md").read_text()
    model, tokenizer = minillama.load(name)
    _, test_days = data.split_dates()
    assert exact_match(model, tokenizer, data.examples("en", test_days, 1000, seed=1)) >= least
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

    for features, native in (({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert native_bfloat16(torch.device("cpu")) == native
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not native_bfloat16(torch.device("cuda"))
