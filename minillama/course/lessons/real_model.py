"""Lesson 08: SmolLM2, texts to try it on, the stored runs of the zero-init ablation, PEFT's answers."""

import contextlib
import copy
import functools
import io
import json
import tempfile

import torch

from ...adapters import adapt, delete_adapter, save_adapter
from ...checkpoints import load, save
from ...data import collate
from ...device import pick_dtype
from ...train import train
from .shown import ROOT

HELD_TEXTS = {
    "English": """The ferry was late again. On the quay an old man sold smoked fish out of the boot of his car,
and the gulls knew him by name. We bought two, ate them with our fingers, and watched the mainland fold itself
into the fog. Nobody asked when the boat would come; on the island a timetable is a kind of poem, read for its
sound.""",
    "French": """Le boulanger de notre rue ne parle presque pas. Chaque matin il pose le pain sur la table, compte
la monnaie sans regarder, et retourne à son four. Un jour de neige, pourtant, il m'a raconté toute sa vie, et
j'ai oublié mon pain.""",
    "Python": '''def longest_run(values):
    """The longest stretch of equal neighbours: (value, length)."""
    best, start = (None, 0), 0
    for i in range(1, len(values) + 1):
        if i == len(values) or values[i] != values[start]:
            if i - start > best[1]:
                best = (values[start], i - start)
            start = i
    return best
''',
}
GOOD = (
    "I love this song.", "Our team won the cup.", "The nurse was kind and patient.",
    "Grandmother's cake tastes like heaven.", "The sun came out for the wedding.", "You did a brilliant job.",
    "The library gave me a warm welcome.", "The view from the tower is splendid.",
)  # fmt: skip
BAD = (
    "The coffee was burnt.", "The heating broke in January.", "I have been waiting for two hours.",
    "The dog ate my homework and was sick.", "They lost the match and the bus home.", "My new shoes hurt.",
    "He forgot our birthday.", "The milk has gone sour.",
)  # fmt: skip


@functools.cache
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct, in bfloat16 where the machine multiplies it natively; says on the
    page where it comes from and under which licence. FileError, one sentence, where it cannot be had."""
    with contextlib.redirect_stderr(io.StringIO()) as notices:
        opened = load("smollm2", pick_dtype("auto", torch.device("cpu")))
    print(notices.getvalue().strip().splitlines()[-1])
    return opened


def zero_init_runs():
    """The stored runs of the zero-init ablation: {(how the prompts are drawn, gate): {learning rate: [a run a seed]}};
    to each run "match" is added, its exact match over all languages."""
    runs = {}
    with open(ROOT / "docs/smollm2_zero_init.jsonl", encoding="utf-8") as file:
        for run in map(json.loads, file):
            run["match"] = sum(run["matches"].values()) / len(run["matches"])
            runs.setdefault((run["init"], run["gate"]), {}).setdefault(run["learning_rate"], []).append(run)
    return runs


def peft_answers(base, adapted, tokenizer, prompts):
    """What PEFT makes of an adapter, on transformers' own model with the base's weights: its answers to the prompts."""
    import warnings

    import peft
    import transformers

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # transformers and PEFT among themselves
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save(copy.deepcopy(base).float(), f"{folder}/base")
        save_adapter(adapted, f"{folder}/adapter")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(theirs, f"{folder}/adapter").eval()
    how, written = dict(max_new_tokens=16, do_sample=False, eos_token_id=tokenizer.eos_id, pad_token_id=0), []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)])
        new = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)[0, ids.shape[1] :]
        written.append(tokenizer.decode(new.tolist()))
    return written


def sweep(model, tokenizer, pairs, method, rates, steps, **options):
    """{learning rate: the loss of each step} of short trainings from the same start; the model is its base afterwards.
    A rate at which the loss stops being a number has the losses up to there."""
    curves = {}
    for rate in rates:
        torch.manual_seed(0)
        adapt(model, method, **options)
        history = []
        try:
            how = dict(steps=steps, batch_size=len(pairs), learning_rate=rate, bucket=1, progress=False)
            history = [record["loss"] for record in train(model, tokenizer, pairs, **how)]
        except ValueError as error:
            print(f"rate {rate:g}: {error}")
        finally:
            delete_adapter(model)
        curves[rate] = history
    return curves


def scored_pieces(tokenizer, pair):
    """A pair (prompt, answer) as the model reads it: its tokens between bars, those that carry loss in brackets."""
    ids, labels = collate([pair], tokenizer)
    shown = (
        tokenizer.decode([i]) if label < 0 else f"[{tokenizer.decode([i])}]"
        for i, label in zip(ids[0].tolist(), labels[0].tolist())
    )
    return "|".join(repr(piece)[1:-1] for piece in shown)
