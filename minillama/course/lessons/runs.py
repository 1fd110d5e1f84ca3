"""A short adaptation with its result, alone or from several seeds, and how far a fresh adapter stands from the base."""

import contextlib
import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ... import data
from ...adapters import adapt, adapter_parameters, gates
from ...adapters import learning_rate as suits
from ...checkpoints import load
from ...device import pick_dtype
from ...train import exact_match, train

DRAWING = threading.Lock()  # PyTorch's random numbers are one sequence for all threads


@dataclass(frozen=True)
class Adaptation:
    """One run: the model as it was left, train's history, exact match on unseen dates (0 to 1), trained parameters."""

    model: torch.nn.Module
    history: list
    match: float
    parameters: int


@functools.cache
def base(name="dates-llama", dtype=None):
    """(model, tokenizer) of a bundled base, loaded once; in bfloat16 where the machine multiplies it natively.
    Copy before changing."""
    return load(name, dtype or pick_dtype("auto", torch.device("cpu")))


def copied():
    """A copy of dates-llama in float32, to change."""
    return copy.deepcopy(base()[0]).float()


def adaptation(
    method, language="fr", *, of="dates-llama", steps=100, batch_size=8, learning_rate=None, seed=0, prepare=None,
    test_dates=200, **options,
):  # fmt: skip
    """Adapts a copy of a base to a language and measures it; seconds, not minutes, at these defaults.

    method: one of adapters.METHODS, with its options; or "full", which trains every weight, in float32.
    prepare: called with the adapted model before the first step.  learning_rate: None takes the method's own.
    """
    model, tokenizer = base(of)
    model = copy.deepcopy(model)
    with DRAWING:
        torch.manual_seed(seed)
        if method == "full":
            model.float().requires_grad_(True)
        else:
            adapt(model, method, **options)
        if prepare is not None:
            with torch.no_grad():
                prepare(model)
    train_days, test_days = data.split_dates()
    pairs = data.examples(language, train_days, steps * batch_size, seed)
    rate = suits(method) if learning_rate is None else learning_rate
    how = dict(batch_size=batch_size, learning_rate=rate, seed=seed, watch=gates, progress=False)
    history = train(model, tokenizer, pairs, steps=steps, **how)
    match = exact_match(model, tokenizer, data.examples(language, test_days, test_dates, seed=1))
    return Adaptation(model, history, match, sum(p.numel() for p in model.parameters() if p.requires_grad))


@contextlib.contextmanager
def one_thread_each():
    """A pool for runs side by side, each on one thread, since two threads cannot help one another with models as small
    as these; on two cores that takes about two thirds of the time."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def over_seeds(method, language="fr", *, seeds=(0, 1), **options):
    """`adaptation` from each seed, side by side: a list."""
    base(options.get("of", "dates-llama"))  # opened once, before there are threads
    with one_thread_each() as pool:
        return list(pool.map(lambda seed: adaptation(method, language, seed=seed, **options), seeds))


def mean_match(runs):
    """Exact match averaged over the runs' seeds."""
    return sum(run.match for run in runs) / len(runs)


def distances(build, ids):
    """How far adapted models stand from the base at the start:
    rows (name, largest difference of logits, bit for bit or not).

    build: {name: function that adapts the fresh copy it is given}.  ids (B, T).
    """
    rows = []
    for name, adapted in build.items():
        model = copied()
        with torch.no_grad():
            expected = model(ids)
            torch.manual_seed(0)
            adapted(model)
            logits = model(ids)
        rows.append((name, (logits - expected).abs().max().item(), torch.equal(logits, expected)))
    return rows


def judged(starts, exact="exact"):
    """Rows of `distances` with a verdict in the place of bit for bit or not; exact: the one on what is."""
    said = [exact if same else "only near" if distance < 0.5 else "another model" for _, distance, same in starts]
    return [(name, distance, verdict) for (name, distance, _), verdict in zip(starts, said)]


def begun(method, change=None, **options):
    """A way to adapt a model and change its fresh adapter."""
    return lambda model: (adapt(model, method, **options), change and change(model))


def scaled(factor, own=""):
    """A change of a fresh adapter: its parameters whose names end in `own`, times factor."""
    return lambda model: [p.mul_(factor) for name, p in adapter_parameters(model).items() if name.endswith(own)]
