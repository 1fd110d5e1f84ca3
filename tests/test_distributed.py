"""Two processes over gloo, as torchrun starts them: the loss, the adapter and the ends of a run are those of one."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from minillama import distributed
from minillama.__main__ import main
from minillama.checkpoints.progress import CHECKPOINT, read_run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
RUN = ["-m", "minillama", "adapt", "--dtype", "float32", "--test-dates", "4", "--batch-size", "5"]


def several(*options, cwd, **how):
    command = [*TORCHRUN, *RUN, *map(str, options)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def losses(folder):
    return torch.tensor([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])


def test_alone_everything_comes_back_as_it_was():
    batch, gradient = list("abc"), torch.ones(2)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = gradient
    assert distributed.share(batch) == batch and distributed.weight(batch, 7) == 1.0
    assert distributed.summed([parameter], gradient) == (gradient,) and parameter.grad is gradient
    assert distributed.same("x") == "x" and distributed.agreed(15) == 15 and distributed.size() == 1


def test_shard_alone_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["adapt", "--steps", "1", "--test-dates", "2", "--shard"]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, pack, more", [("llama_adapter", (), ("--shard",)), ("lora", ("--pack", 24), ())], ids=("shard", "pack")
)
def test_two_processes_do_what_one_does(method, pack, more, tmp_path, monkeypatch):
    """Batches of 5 and a last one of 1 row: shares differ in rows and tokens, and one process has none."""
    lines = [json.dumps({"prompt": f"{'x' * (i % 7)}{i}: ", "response": "y" * (1 + i % 4)}) for i in range(12)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    options = ("--method", method, "--steps", 8, "--data", "own.jsonl", *pack)
    monkeypatch.chdir(tmp_path)
    assert main([*RUN[2:], *map(str, options), "--out", "one"]) == 0
    done = several(*options, "--out", "two", *more, cwd=tmp_path)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert out.count("2 processes") == 1 and out.count("Exact match") == 1  # the first alone speaks
    assert "logits bit-identical" in out
    assert (losses(tmp_path / "two") - losses(tmp_path / "one")).abs().max() < 1e-5
    ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).abs().max() < 1e-3 for key in ours)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def children(process):
    """The process ids of torchrun's two processes, once they are there."""
    for _ in range(600):
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            if len(found := file.read().split()) == 2:
                return [int(pid) for pid in found]
        time.sleep(0.1)


def wait_for(path):
    for _ in range(900):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="the processes are found in Linux's /proc")
def test_a_process_that_dies_ends_the_run_and_one_that_is_stopped_keeps_it(tmp_path):
    options = ("--method", "ia3", "--steps", 5000, "--checkpoint-every", "0.5")
    for signals, words in (([signal.SIGKILL], "lost the others"), ([signal.SIGTERM] * 2, "--resume 2")):
        out = str(len(signals))
        run = several(*options, "--out", out, cwd=tmp_path)
        workers = children(run)
        wait_for(tmp_path / out / CHECKPOINT)
        for worker, number in zip(reversed(workers), signals):
            os.kill(worker, number)
        _, err = run.communicate(timeout=120)
        sentences = [line for line in err.splitlines() if line.startswith("minillama: ")]
        assert run.returncode and sentences and all(words in line for line in sentences), err
        assert not re.search(r'File ".*minillama', err), err  # torchrun's own account may stand there
        assert read_run(tmp_path / out / CHECKPOINT)[1]["history"]
