"""Kills training at random moments, goes on with it, and looks at what is left: nothing wrong, nothing unreadable,
nothing left over, and in the end bit for bit what the uninterrupted run wrote.

    python tests/reliability/kills.py --kills 100 --command adapt
    python tests/reliability/kills.py --kills 30 --command pretrain
"""

import argparse
import collections
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

import minillama
import minillama.course.plots  # here, and not in each child: it takes seconds
from minillama.__main__ import main
from minillama.adapters import storage
from minillama.checkpoints import progress
from minillama.checkpoints.files import read_safetensors

RUNS = {
    "adapt": ("adapt", "--steps", "25", "--batch-size", "4", "--test-dates", "1", "--method", "ia3"),
    "pretrain": ("pretrain", "--steps", "12", "--batch-size", "4", "--test-dates", "1"),
}
WEIGHTS = {"adapt": "adapter_model.safetensors", "pretrain": "model.safetensors"}
WRITTEN = {
    "adapt": {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "training.png"},
    "pretrain": {"README.md", "config.json", "metrics.jsonl", "model.safetensors"},
}
EVERY = ("--checkpoint-every", "0.001")  # after each step, so that many a kill falls into a saving


def started(arguments):
    """The process id of a child that runs a command, without the seconds that an interpreter needs to begin."""
    if child := os.fork():
        return child
    try:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            code = main(list(map(str, arguments)))
    except BaseException:
        code = 1
    os._exit(code)


def ended(child):
    """The exit status of a child, 0 where all went well."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stamp(out):
    with contextlib.suppress(FileNotFoundError):
        return (out / progress.CHECKPOINT).stat().st_mtime_ns


def looked_at(command, out, expected, counts):
    """What a killed run has left must be read, or be absent."""
    if (out / WEIGHTS[command]).exists():
        if command == "adapt":
            model, _ = minillama.load("dates-llama")
            minillama.load_adapter(model, out)
            found = storage.read_adapter(out)[1]
        else:
            found = read_safetensors(out / WEIGHTS[command])[0]
            if (out / "config.json").exists():  # else it is absent for whoever reads
                minillama.load(out)
        same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
        counts["wrong"] += not same
        counts["whole"] += same
    if (out / progress.CHECKPOINT).exists():
        read_safetensors(out / progress.CHECKPOINT)[0]
        counts["kept"] += 1


def bench(command, kills, seed=0, folder=None):
    """{what was seen: how often} after so many kills of a command."""
    draw, counts = random.Random(seed), collections.Counter()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole, out = Path(place) / "whole", Path(place) / "out"
        start = time.perf_counter()
        assert ended(started((*RUNS[command], "--out", whole))) == 0, "the uninterrupted run failed"
        seconds = time.perf_counter() - start
        expected = read_safetensors(whole / WEIGHTS[command])[0]
        while counts["kills"] < kills:
            resume = (out / progress.CHECKPOINT).exists()
            begin = (command, "--resume", out) if resume else (*RUNS[command], "--out", out, "--overwrite")
            child = started((*begin, *EVERY))
            patience = time.perf_counter() + seconds
            if draw.random() < 0.8:  # else perhaps before anything is kept
                before = stamp(out)
                while stamp(out) == before and time.perf_counter() < patience:
                    time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.5 * seconds) ** draw.choice((1, 2)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            code = ended(child)
            counts["kills"] += code == -signal.SIGKILL
            counts["failed"] += code > 0
            counts["resumed"] += resume
            try:
                looked_at(command, out, expected, counts)
            except minillama.FileError:
                counts["unreadable"] += 1
            if code == 0:  # it ended before it was killed
                names = {path.name for path in out.iterdir()}
                if odd := names ^ WRITTEN[command]:
                    print("left over or missing:", *odd)
                counts["ended"] += 1
                counts["left over"] += len(names - WRITTEN[command])
                counts["missing"] += len(WRITTEN[command] - names)
                shutil.rmtree(out)
    return counts


def told(counts):
    order = ("kills", "resumed", "ended", "whole", "kept", "wrong", "unreadable", "failed", "left over", "missing")
    return ", ".join(f"{name} {counts[name]}" for name in order)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--command", default="adapt", choices=RUNS)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = bench(arguments.command, arguments.kills, arguments.seed)
    print(told(counts))
    sys.exit(any(counts[what] for what in ("wrong", "unreadable", "failed", "left over", "missing")))
