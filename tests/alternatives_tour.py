"""Other right answers to lesson 00's exercise, written differently: each must pass."""

import numpy as np
import torch


def freeze_all_then_some(model, words):
    model.requires_grad_(False)
    trained = [p for name, p in model.named_parameters() if set(words) & set(name.split("."))]
    for p in trained:
        p.requires_grad = True
    return sum(p.numel() for p in trained)


def count_afterwards(model, words):
    for name, p in model.named_parameters():
        p.requires_grad = not set(words).isdisjoint(name.split("."))
    return torch.tensor([p.numel() for p in model.parameters() if p.requires_grad]).sum()


def with_dots_around(model, words):
    for name, p in model.named_parameters():
        p.requires_grad_(any(f".{word}." in f".{name}." for word in words))
    return np.sum([np.prod(p.shape) for p in model.parameters() if p.requires_grad])


def module_by_module(model, words):
    seen, count = set(), 0
    for place, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if p not in seen:
                seen.add(p)
                p.requires_grad_(bool({*place.split("."), name} & {*words}))
                count += p.nelement() * p.requires_grad
    return count


def word_by_word(model, words):
    for p in model.parameters():
        p.requires_grad = False
    for word in words:
        for name, p in model.named_parameters():
            if word in name.split("."):
                p.requires_grad = True
    return sum(len(p.flatten()) for p in model.parameters() if p.requires_grad)


ALTERNATIVES = {
    "freeze_all_but": [freeze_all_then_some, count_afterwards, with_dots_around, module_by_module, word_by_word],
}
