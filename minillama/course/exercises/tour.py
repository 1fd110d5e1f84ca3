"""Lessons 00 and 08: which parameters train, whom an adapter changes, and what a guess costs."""

import math

import torch
from torch import nn

import minillama

from .catalogue import catalogue, tables
from .observing import Exercise, Piece, fact
from .predictions import Question

TABLES = tables(__file__)  # the mistakes, in the Markdown file beside this one


def right_freeze(model, words):
    count = 0
    for name, parameter in model.named_parameters():
        train = any(word in name.split(".") for word in words)
        parameter.requires_grad_(train)
        if train:
            count += parameter.numel()
    return count


def shared_twice(model, words):
    """a matrix at two places, as GPT-2's embedding is its head, is counted twice; named_parameters() has it once"""
    every, _ = dict(model.named_parameters(remove_duplicate=False)), model.requires_grad_(False)
    return sum(p.requires_grad_(True).numel() for name, p in every.items() if set(words) & set(name.split(".")))


FREEZE = catalogue(right_freeze, TABLES["freeze"], shared_twice)


def probe_freeze(answer, draw):
    adapted, linear = minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), nn.Linear(5, 3)
    minillama.adapters.llama_adapter.attach(adapted, prompt_length=3)  # which freezes nothing
    tied = minillama.GPT2(minillama.GPT2Config(31, 16, 24, 2, 2))
    odd = nn.Sequential(nn.Conv1d(2, 3, 5), nn.BatchNorm1d(3), nn.ModuleDict({"gate": nn.Linear(2, 2)}))
    odd[2]["gate-proj"], odd.scale, odd.Gate = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.0)), nn.Linear(1, 7)
    for model, words in ((adapted, ["prompt", "gate"]), (adapted, ["down_proj", "norm"]), (linear, ["bias"]),
                         (linear, []), (tied, ["embed_tokens", "lm_head"]), (tied, ["mlp", "bias"]),
                         (tied, ["embed_tokens"]), (odd, ["0"]), (odd, ["1", "scale"]), (odd, ["gate"])):  # fmt: skip
        model.may_train = True
        names = list(dict(model.named_parameters()))
        count, where = answer(model, words), "" if words[:1] == ["prompt"] else f"for words = {words}"
        lost = names != list(dict(model.named_parameters()))
        yield fact(lost, "parameters_lost", "parameters were taken out of the model or put into it: only freeze them.")
        for name, p in model.named_parameters():
            train = any(word in name.split(".") for word in words)
            why = ("named_frozen", "is frozen: one") if train else ("others_train", "still trains: none")
            yield fact(p.requires_grad == train, why[0], f"{name} {why[1]} of {words} is a part of its name.")
        yield Piece("how many numbers train", count, where)


PLANTED, HARMLESS = (), {}
EXERCISES = {
    "freeze_all_but": Exercise("freeze_all_but(model, words) -> a whole number", right_freeze, FREEZE, probe_freeze),
    "languages_changed": Question(  # the lesson's own run shows the truth
        lambda: frozenset(("en", "fr", "fi")), "Gates and prompts are there for every token, of whatever language.",
        {frozenset(["fr"]): "it was trained on French; but what in the layer asks for the language of a token?",
         **dict.fromkeys((frozenset(["en"]), frozenset(["fi"]), frozenset(["en", "fi"])),
                         "French itself is what it was trained on: that changes first of all."),
         frozenset(["fr", "en"]): "it has never seen Finnish; but what in the layer asks for a token's language?",
         frozenset(["fr", "fi"]): "English is mastered already, and its tokens pass the open gates none the less.",
         frozenset(): "that is so at gate 0; training opens the gates."},
        nudge="Of y + gate · z: which of the two factors is 0 for a text in another language?"),
    "guess": Question(
        lambda: math.log(49152), "-ln(1 / 49,152) nats a token; whoever does worse is sure of what is wrong.",
        {1 / 49152: "that is the probability of the right token; the loss is minus its logarithm.",
         math.log2(49152): "that is in bits; nats come of the natural logarithm.",
         -math.log(49152): "the size is right; the loss is minus the logarithm of a number below 1, and so above 0.",
         math.log10(49152): "that is the decimal logarithm; nats come of the natural one."},
        nudge="Each token has the probability 1 / 49,152. What is the cross-entropy of one token that has it?"),
}  # fmt: skip
