"""SmolLM2-135M, a real pre-trained LLaMA, on the CPU: what the command says of an adaptation, what PEFT makes of the
file, and how much a step multiplies beside PEFT's. Lesson 08, which test_lessons.py executes, trains in full and
asserts what is learned."""

import json
import re

import peft
import pytest
import torch
import transformers
from test_command_line import minillama as command
from torch.utils.flop_counter import FlopCounterMode

import minillama
from minillama import data
from minillama.course import sides
from minillama.device import native_bfloat16
from minillama.train import answer_loss, answers

LANGUAGES = ("en", "fr")


@pytest.mark.slow
def test_the_command_adapts_in_little_memory_and_peft_agrees(smollm2, tmp_path):
    code, out, err = command(
        "adapt", "--base", smollm2, "--languages", ",".join(LANGUAGES), "--steps", 8, "--batch-size", 4,
        "--test-dates", 2, "--option", "gate=layer", "--option", "tanh=False", "--out", "adapter",
        cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert code == 0, err
    losses = [json.loads(line)["loss"] for line in (tmp_path / "adapter/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2 and "bit-identical" in out
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size <= 750_000
    peak = float(re.search(r"peak memory +([\d.]+) GB", out).group(1))
    assert peak <= (1.2 if native_bfloat16(torch.device("cpu")) else 2.0)

    model, tokenizer = minillama.load(smollm2, torch.float32)
    minillama.save(model, tmp_path / "base")
    minillama.load_adapter(model, tmp_path / "adapter")
    days = data.split_dates()[1]
    pairs = [pair for language in LANGUAGES for pair in data.examples(language, days, 1, 7, data.LABELLED)]
    prompts = [prompt for prompt, _ in pairs]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    greedy = dict(max_new_tokens=16, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0)
    for prompt, answer in zip(prompts, answers(model, tokenizer, prompts)):
        ids = torch.tensor([tokenizer.encode(prompt)])
        written = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy)
        assert tokenizer.decode(written[0, ids.shape[1] :].tolist()) == answer


@pytest.mark.slow
def test_a_step_multiplies_less_than_pefts(smollm2):
    """The same batch, weights and method, gates at 0: the same loss, with 1.37 times as many multiplications on PEFT's
    side, which writes logits for the question too. Counted, since a busy machine cannot bend a count; `bench` has the
    seconds."""
    base, tokenizer = minillama.load(smollm2, torch.float32)
    model, theirs = sides.ours(base, "llama_adapter", 10), sides.theirs(base, "llama_adapter", 10)
    pairs = data.examples(LANGUAGES, data.split_dates()[0], 8, 0, data.form(tokenizer))
    ids, labels = data.collate(pairs, tokenizer)
    losses, counts = [], []
    for loss in (lambda: answer_loss(model, ids, labels), lambda: theirs(input_ids=ids, labels=labels).loss):
        with FlopCounterMode(display=False) as counter:
            losses.append(loss())
            losses[-1].backward()
        counts.append(counter.get_total_flops())
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)
    assert counts[1] >= 1.3 * counts[0]
