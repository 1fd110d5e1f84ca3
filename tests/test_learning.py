"""Every method teaches the frozen base French, in fewer and smaller steps than `python -m minillama compare` takes."""

import pytest
import torch

import minillama
from minillama import data
from minillama.adapters import TEXT_METHODS, learning_rate
from minillama.train import exact_match, train


@pytest.mark.slow
@pytest.mark.parametrize("method", TEXT_METHODS)
def test_method_learns_french(method):
    model, tokenizer = minillama.load("dates-llama")
    size = sum(parameter.numel() for parameter in model.parameters())
    train_days, test_days = data.split_dates()
    torch.manual_seed(0)
    minillama.adapt(model, method)
    trained = sum(parameter.numel() for parameter in minillama.trainable_parameters(model).values())
    pairs = data.examples("fr", train_days, 100 * 8)
    train(model, tokenizer, pairs, steps=100, batch_size=8, learning_rate=learning_rate(method), progress=False)
    assert trained <= 0.05 * size
    assert exact_match(model, tokenizer, data.examples("fr", test_days, 200, seed=1)) >= 0.8  # the base: 0.46
