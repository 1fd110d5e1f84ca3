"""A training run that may be killed: what it needs to go on where it was, kept in one file.

    with Keeper(folder, settings) as keeper:
        history = train(model, tokenizer, pairs, keeper=keeper)

The file holds the trained parameters, the optimizer's state, the states of the random number generators and the
history; which batches come next follows from the seed and the number of steps done. It is written whole or not at all,
every so many seconds, and when the process is asked to end (Ctrl-C, SIGTERM, SIGHUP), after the step at hand. A run
that goes on from it ends bit for bit where the uninterrupted one ends, on one CPU machine.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from .. import distributed
from .files import FileError, parse_json, read_safetensors, remove, write_tensors

CHECKPOINT = "checkpoint.safetensors"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """The run was asked to end by a signal, and ended after a step: str() says where it stands."""

    def __init__(self, message, number):
        super().__init__(message)
        self.code = 128 + number  # what a shell calls a process that a signal ended


def read_settings(folder):
    """What the run in a folder was begun with. FileError where there is none that could go on."""
    path = Path(folder) / CHECKPOINT
    if not path.exists():
        raise FileError(f"{folder} holds no run to go on with: {CHECKPOINT} is missing, so it has ended or never saved")
    return read_run(path)[1]["settings"]


def read_run(path):
    """({name: tensor}, {"settings": ..., "history": ...}) of a kept run."""
    tensors, metadata = read_safetensors(path)
    if "run" not in metadata:
        raise FileError(f"{path} was not written by a training run of this project: name another folder")
    return tensors, parse_json(metadata["run"].encode(), f"{path}, its account of the run,")


class Keeper:
    """Keeps a run's state in `folder`, and listens to signals while it is entered.

    settings: a dict that describes the run, as JSON can hold it; a state kept under other settings is refused.
    every: seconds between two savings.  resume: whether to go on from a state that is there; else it is removed.
    go_on: the command that goes on with the run, for messages.
    """

    def __init__(self, folder, settings=None, every=60.0, resume=False, go_on=""):
        self.path, self.every, self.resume, self.go_on = Path(folder) / CHECKPOINT, every, resume, go_on
        self.settings = json.loads(json.dumps(settings or {}))
        self.signal, self.last, self.saved, self.handlers = None, time.monotonic(), 0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.heard) for number in SIGNALS}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def heard(self, number, frame):
        if self.signal == number:  # torchrun sends SIGTERM behind the terminal's SIGINT
            os._exit(128 + number)
        if self.signal is not None:
            return
        self.signal = number
        note = "\nfinishing the step and saving; once more ends at once"
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            print(note, file=sys.stderr, flush=True)

    def restore(self, trained, optimizer):
        """Puts a kept state into the parameters {name: parameter} and the optimizer; the history up to there."""
        if not self.resume:
            if distributed.rank() == 0:
                remove(self.path)
            return []
        if not self.path.exists():
            return []
        tensors, run = read_run(self.path)
        kept = run["settings"]
        if unlike := sorted(
            key for key in kept.keys() | self.settings.keys() if kept.get(key) != self.settings.get(key)
        ):
            key = unlike[0]
            raise FileError(
                f"{self.path} is of a run with {key} = {str(kept.get(key))[:40]}, and now it is "
                f"{str(self.settings.get(key))[:40]}: it cannot go on with that; begin it anew"
            )
        try:
            with torch.no_grad():
                for name, parameter in trained.items():
                    tensor = tensors[f"parameter.{name}"]
                    if tensor.shape != parameter.shape:
                        raise ValueError(f"{name} has another shape")
                    parameter.copy_(tensor)
            keys = [key for key in tensors if key.startswith("optimizer.")]
            state = {}
            for key in keys:
                _, number, what = key.split(".")
                state.setdefault(int(number), {})[what] = tensors[key]
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
            torch.set_rng_state(tensors["random"])
            if "random_cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random_cuda"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise FileError(f"{self.path} does not fit this run ({error}): begin it anew") from None
        self.saved = len(run["history"])
        return run["history"]

    def after(self, trained, optimizer, history):
        """Called after each step: saves where it is time. Raises Stopped where a signal has come."""
        number = distributed.agreed(self.signal or 0)  # all processes end behind the same step
        if not number and time.monotonic() - self.last < self.every:
            return
        if distributed.rank() == 0:
            self.save(trained, optimizer, history)
        if number:
            go_on = f"; go on with: {self.go_on}" if self.go_on else ""
            raise Stopped(f"stopped after step {len(history)}, kept in {self.path}{go_on}", number)

    def save(self, trained, optimizer, history):
        tensors = {f"parameter.{name}": parameter for name, parameter in trained.items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{what}": tensor for what, tensor in state.items()}
        tensors["random"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random_cuda"] = torch.cuda.get_rng_state()
        write_tensors(self.path, tensors, run=json.dumps({"settings": self.settings, "history": history}))
        self.saved, self.last = len(history), time.monotonic()

    def remove(self):
        """The run has ended and its result is written."""
        remove(self.path)

    def __str__(self):
        return f"{self.path} holds step {self.saved}" if self.saved else "nothing was kept yet"
