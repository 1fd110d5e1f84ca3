"""Lesson 09: operations counted by torch, rows that each projection reads, processes that torchrun starts."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from .shown import ROOT

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def attention_forward(q, k, v, *more, **how):
    """Operations of q kᵀ and of the weights with v, every query with every key; q, k: shapes (…, T, d)."""
    *many, T, d = q
    return 4 * torch.Size(many).numel() * T * k[-2] * d


def attention_backward(gradient, q, k, *more, **how):
    """q kᵀ once more, then the gradients of v, weights, q and k: five products in the place of two."""
    return attention_forward(q, k, None) * 5 // 2


def operations(work):
    """Operations (a multiplication or an addition each) of the matrix products that work() runs, counted by torch,
    which leaves its CPU's own attention kernel out: that is told here."""
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    told = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=told) as counter:
        work()
    return counter.get_total_flops()


def rows_read(model, work, names=PROJECTIONS):
    """{name: how many rows the linear layers of that name read, on average over them, while work() runs}."""
    rows, count = Counter(), Counter()

    def read(name):
        def hook(module, inputs, output):
            rows[name] += inputs[0].shape[:-1].numel()

        return hook

    handles = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in names:
            count[name] += 1
            handles.append(module.register_forward_hook(read(name)))
    work()
    for handle in handles:
        handle.remove()
    return {name: rows[name] // count[name] for name in names}


def torchrun(script, processes=2, timeout=500):
    """What a script prints that torchrun runs in so many processes of one thread each, side by side on this machine.

    Raises ValueError with the first of what it said where it fails or takes longer than `timeout` seconds.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "script.py"
        path.write_text(script, encoding="utf-8")
        how = dict(cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
        try:
            done = subprocess.run([*command, path], **how)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{processes} processes were not done after {timeout} seconds") from None
    if done.returncode:
        raise ValueError(f"the processes ended with {done.returncode}: {done.stderr[:1500]}")
    return done.stdout
