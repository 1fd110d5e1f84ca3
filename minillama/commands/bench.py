"""Seconds per training step beside the PEFT library: the same base, gated prefix attention, batches, dtype and machine,
in turns. Needs transformers and peft, which the tests need too.

    python -m minillama bench --base smollm2 --dtype float32
"""

import statistics
import tempfile
import time

import torch

from .. import data
from ..adapters import adapt, save_adapter
from ..adapters.llama_adapter import PRESETS
from ..checkpoints import load, save
from ..device import pick_device, pick_dtype
from ..train import answer_loss
from .arguments import add_machine, positive


def both(base, dtype, device):
    """(our model, PEFT's on transformers' model, tokenizer), with the same weights and the same new adapter."""
    import peft
    import transformers

    model, tokenizer = load(base, dtype, device)
    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/base")
        save_adapter(adapt(model, "llama_adapter", **PRESETS["peft"] | {"join": "before"}), f"{folder}/adapter")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype).to(device)
        theirs = peft.PeftModel.from_pretrained(theirs, f"{folder}/adapter", is_trainable=True)
    return model.train(), theirs.train(), tokenizer


def stepper(model, loss):
    """A function of (ids, labels) that makes one step of AdamW and returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step(ids, labels):
        optimizer.zero_grad()
        value = loss(ids, labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return value.item()  # waits for a GPU

    return step


def measure(base="smollm2", dtype=None, device="cpu", batch_size=16, rounds=4, steps=3):
    """(ratio, rounds): PEFT's time over ours, the median, and [(our seconds per step, PEFT's, our loss, PEFT's)]."""
    model, theirs, tokenizer = both(base, dtype, device)
    languages, days = ("en", "fr", "de", "es", "fi"), data.split_dates()[0]
    pairs = data.examples(languages, days, steps * batch_size, 0, data.form(tokenizer))
    drawn = zip(data.batches(pairs, batch_size, bucket=1), range(steps))
    batches = [tuple(tensor.to(device) for tensor in data.collate(batch, tokenizer)) for batch, _ in drawn]
    ours = stepper(model, lambda ids, labels: answer_loss(model, ids, labels))
    peft = stepper(theirs, lambda ids, labels: theirs(input_ids=ids, labels=labels).loss)
    measured = []
    for _ in range(rounds + 1):
        seconds, losses = [], []
        for step in (ours, peft):
            start = time.perf_counter()
            losses.append(statistics.mean(step(*batch) for batch in batches))
            seconds.append((time.perf_counter() - start) / steps)
        measured.append((*seconds, *losses))
    measured = measured[1:]  # the first warms up
    return statistics.median(theirs / ours for ours, theirs, _, _ in measured), measured


def add_arguments(parser):
    parser.add_argument("--base", default="smollm2", metavar="NAME", help="whatever minillama.load opens (smollm2)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="dates per step (16)")
    add_machine(parser, seed=False)


def run(args):
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    ratio, rounds = measure(args.base, dtype, device, args.batch_size)
    print(
        f"{args.base}, {dtype}, {device}, {torch.get_num_threads()} threads, batches of {args.batch_size}; "
        "seconds per step and mean loss of each round:"
    )
    for ours, theirs, our_loss, their_loss in rounds:
        print(
            f"  minillama {ours:.3f} s, loss {our_loss:.4f}    PEFT {theirs:.3f} s, loss {their_loss:.4f}    "
            f"ratio {theirs / ours:.2f}"
        )
    print(f"PEFT takes {ratio:.2f} times as long (median)")
