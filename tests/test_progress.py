"""Runs that are interrupted: kept, gone on with, and the same in the end."""

import json
import os
import signal

import pytest
import torch

import minillama
from minillama import adapt, data
from minillama.adapters import adapter_parameters
from minillama.checkpoints import progress
from minillama.checkpoints.progress import CHECKPOINT, Keeper, Stopped
from minillama.train import train

STEPS = 9


def begin(method="llama_adapter"):
    torch.manual_seed(0)
    model, tokenizer = minillama.load("dates-llama")
    if method == "full":
        model.requires_grad_(True)
    else:
        adapt(model, method)
    return model, tokenizer, data.examples("fr", data.split_dates()[0], STEPS * 4)


def run(model, tokenizer, pairs, keeper=None, watch=None, **options):
    return train(
        model, tokenizer, pairs, steps=STEPS, batch_size=4, progress=False, keeper=keeper, watch=watch, **options
    )


def numbers(history):
    return [{key: record[key] for key in ("step", "loss", "accuracy", "gradient_norm")} for record in history]


class Killed(BaseException):
    """Stands for a SIGKILL, after which nothing of this process runs."""


def dying(steps):
    left = [steps]

    def watch(model):
        torch.rand(1)  # another training step might draw: the state is part of what is kept
        left[0] -= 1
        if not left[0]:
            raise Killed
        return {"drawn": torch.rand(1).item()}

    return watch


@pytest.mark.parametrize("method, after", [
    pytest.param(method, after, marks=() if (method, after) == ("llama_adapter", 2) else pytest.mark.slow)
    for method in ("llama_adapter", "dora", "full")
    for after in (1, 2, STEPS - 1, STEPS)
])  # fmt: skip
def test_a_killed_run_ends_as_the_uninterrupted_one(method, after, tmp_path):
    whole = begin(method)
    expected = run(*whole, watch=dying(99))
    with pytest.raises(Killed), Keeper(tmp_path, {"seed": 0}, every=0) as keeper:
        run(*begin(method), keeper, dying(after))
    assert (tmp_path / CHECKPOINT).exists() == (after > 1)  # nothing is kept before a step has ended
    model, tokenizer, pairs = begin(method)
    torch.rand(3)  # elsewhere in the sequence
    with Keeper(tmp_path, {"seed": 0}, every=0, resume=True) as keeper:
        history = run(model, tokenizer, pairs, keeper, dying(99))
    if after > 1:  # else it began anew, elsewhere in the sequence of random numbers, which only `watch` draws here
        assert [record["drawn"] for record in history] == [record["drawn"] for record in expected]
    assert numbers(history) == numbers(expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole[0].parameters()))
    seconds = [record["seconds"] for record in history]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("number", [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")])
def test_a_signal_ends_the_run_after_the_step(number, tmp_path, capsys):
    before = signal.getsignal(number)

    def watch(model):
        os.kill(os.getpid(), number)
        return {}

    with pytest.raises(Stopped) as stopped, Keeper(tmp_path, go_on="minillama adapt --resume here") as keeper:
        run(*begin(), keeper, watch)
    assert stopped.value.code == 128 + number and signal.getsignal(number) == before
    assert "after step 1" in str(stopped.value) and "go on with: minillama adapt --resume here" in str(stopped.value)
    assert "once more ends at once" in capsys.readouterr().err
    assert progress.read_run(tmp_path / CHECKPOINT)[1]["history"][0]["step"] == 1


def test_what_does_not_fit_is_refused(tmp_path):
    with Keeper(tmp_path, {"seed": 0, "steps": STEPS}, every=0) as keeper:
        run(*begin("ia3"), keeper)
    for settings, method, words in (
        ({"seed": 1, "steps": STEPS}, "ia3", "seed = 0, and now it is 1"),
        ({"seed": 0}, "ia3", f"steps = {STEPS}, and now it is None"),
        ({"seed": 0, "steps": STEPS}, "lora", "does not fit this run"),
    ):
        with pytest.raises(minillama.FileError, match=words):
            run(*begin(method), Keeper(tmp_path, settings, resume=True))
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(minillama.FileError, match="cut short"):
        run(*begin("ia3"), Keeper(tmp_path, {"seed": 0, "steps": STEPS}, resume=True))
    with pytest.raises(minillama.FileError, match="no run to go on with"):
        progress.read_settings(tmp_path / "nowhere")


def test_a_keeper_that_is_not_asked_to_resume_begins_anew(tmp_path):
    with Keeper(tmp_path, every=0) as keeper:
        first = run(*begin("ia3"), keeper)
        assert len(json.dumps(first)) < (tmp_path / CHECKPOINT).stat().st_size
    with Keeper(tmp_path) as keeper:
        assert numbers(run(*begin("ia3"), keeper)) == numbers(first) and not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("what, step", [("parameters", 1), ("loss", 4), ("gradient", 4)])
def test_a_number_that_is_none_stops_the_run_and_is_not_kept(what, step, tmp_path):
    """With step, batch and the last state that is good."""
    model, tokenizer, pairs = begin("ia3")
    first, steps = next(iter(adapter_parameters(model).values())), []

    def watch(model):
        steps.append(1)
        if len(steps) == 3 and what == "loss":
            first.data.mul_(float("nan"))
        if len(steps) == 3 and what == "gradient":
            first.register_hook(lambda gradient: gradient * float("inf"))
        return {}

    rate = 1e39 if what == "parameters" else 1e-3
    with Keeper(tmp_path, every=0) as keeper, pytest.raises(ValueError) as stopped:
        run(model, tokenizer, pairs, keeper, watch, learning_rate=rate)
    said = str(stopped.value)
    assert f"the {what} became NaN or infinite at step {step} of {STEPS}, on a batch that begins with '" in said
    assert ("nothing was kept yet" if step == 1 else "holds step 3") in said
    if what == "gradient":
        run(*begin("ia3"), Keeper(tmp_path, resume=True))  # goes on from there
