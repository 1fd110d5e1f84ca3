"""Lessons 00 and 08: which parameters train, whom an adapter changes, and what a guess costs."""

import functools
import math

import torch
from torch import nn

import minillama

from .catalogue import catalogue, tables
from .observing import Exercise, Piece, fact
from .predictions import questions


def right_freeze(model, words):
    count = 0
    for name, parameter in model.named_parameters():
        train = any(word in name.split(".") for word in words)
        parameter.requires_grad_(train)
        if train:
            count += parameter.numel()
    return count


def probe_freeze(answer, draw):
    adapted, linear = minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), nn.Linear(5, 3)
    minillama.adapters.llama_adapter.attach(adapted, prompt_length=3)  # which freezes nothing
    tied = minillama.GPT2(minillama.GPT2Config(31, 16, 24, 2, 2))
    odd = nn.Sequential(nn.Conv1d(2, 3, 5), nn.BatchNorm1d(3), nn.ModuleDict({"gate": nn.Linear(2, 2)}))
    odd[2]["gate-proj"], odd.scale, odd.Gate = nn.Linear(3, 2), nn.Parameter(torch.tensor(1.0)), nn.Linear(1, 7)
    odd[2]["base"], deep = nn.Linear(4, 2), functools.reduce(lambda inner, _: nn.Sequential(inner), range(9), linear)
    for i, (model, words) in enumerate((
        (adapted, ["prompt", "gate"]), (adapted, ["prompt", "gate"]), (adapted, ["down_proj", "norm"]),
        (linear, ["bias"]), (linear, []), (tied, ["embed_tokens", "lm_head"]), (tied, ["mlp", "bias"]),
        (tied, ["embed_tokens"]), (tied, ["lm_head"]), (odd, ["0"]), (odd, ["1", "scale"]), (odd, ["gate"]),
        (odd, ["base"]), (odd, ["gate+", "gat.", "weight_norm", "model"]), (deep, ["bias"]),
        (nn.Linear(3, 2, device="meta"), ["weight", "bias"]),
    )):  # fmt: skip
        model.may_train = True
        names, given = list(dict(model.named_parameters())), list(words)
        count, where = answer(model, given), f"for words = {words}" + " again" * (i == 1) if i else ""
        lost = names != list(dict(model.named_parameters()))
        yield fact(lost, "parameters_lost", "parameters were taken out of the model or put into it: only freeze them.")
        yield fact(given != words, "in place", "your function changes the list of words that it was given; leave it.")
        for name, p in model.named_parameters():
            train = any(word in name.split(".") for word in words)
            why = ("named_frozen", "is frozen: one") if train else ("others_train", "still trains: none")
            yield fact(p.requires_grad == train, why[0], f"{name} {why[1]} of {words} is a part of its name.")
        yield Piece("how many numbers train", count, where)


EXERCISES = {
    "freeze_all_but": Exercise(
        "freeze_all_but(model, words) -> a whole number", right_freeze,
        catalogue(right_freeze, tables(__file__)["freeze"]), probe_freeze,
    ),
    **questions(
        languages_changed=lambda: frozenset(("en", "fr", "fi")),  # the lesson's own run shows it
        guess=lambda: math.log(49152),
    ),
}  # fmt: skip
