"""One loop for pre-training and adaptation, and the two measures: the loss on answers, exact match by generation."""

import contextlib
import functools
import math
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from . import distributed
from .data import IGNORED, batches, collate, collate_packed, encode, packed_batches
from .device import AdamW
from .generate import generate, left_pad
from .speed import compile_layers

LEARNING_RATES = (1e-3, 1e-4)  # when all weights are trained: on the bundled bases, and on a real model (SmolLM2-135M)


def answer_hidden(model, ids, labels, texts=None):
    """What the head reads where a label carries loss: (N, D), the labels there (N,), and each one's row (N,), or its
    text's number where several texts stand in a row (data.collate_packed)."""
    targets = labels[:, 1:]  # the token at t is predicted from those up to t - 1
    scored = targets != IGNORED
    if not scored.any():
        raise ValueError(
            f"no label among {tuple(labels.shape)} carries loss: all are {IGNORED}, or stand on a row's first token"
        )
    if texts is None:
        return model.hidden(ids[:, :-1])[scored], targets[scored], scored.nonzero()[:, 0]
    return model.hidden(ids[:, :-1], texts[:, :-1])[scored], targets[scored], texts[:, 1:][scored] - 1


def head_loss(model, hidden, targets, most=2**25):
    """(mean cross-entropy in nats, which targets (N,) are not the likeliest) of what the model's head reads, (N, D).

    Logits (N, V) are the largest tensor of a step: where there are more than `most`, they are made in parts, never all
    at once, and each part once more for the backward pass.
    """

    def part(hidden, targets, reduction="sum"):
        logits = model.lm_head(hidden).float()
        return F.cross_entropy(logits, targets, reduction=reduction), logits.argmax(-1) != targets

    rows = max(1, most // model.config.vocab_size)
    if len(hidden) <= rows:
        return part(hidden, targets, "mean")
    pairs = zip(hidden.split(rows), targets.split(rows))
    parts = [checkpoint(part, *some, use_reentrant=False) for some in pairs]  # again with the same dropout
    return torch.stack([loss for loss, _ in parts]).sum() / len(hidden), torch.cat([wrong for _, wrong in parts])


def answer_loss(model, ids, labels, texts=None):
    """Mean cross-entropy in nats over the labels that carry loss: a scalar.

    ids and labels (B, T); a label is the id at its own place, or -100 where no loss falls; shifted inside, as in
    transformers. Rows are padded on the right, or hold several texts each (data.collate_packed).
    """
    hidden, targets, _ = answer_hidden(model, ids, labels, texts)
    return head_loss(model, hidden, targets)[0]


@contextlib.contextmanager
def checkpointed(model):
    """Within the block a layer keeps nothing but its input for the backward pass, which computes the rest once more
    (Chen et al. 2016, https://arxiv.org/abs/1604.06174): the same gradients, less memory, about a third more time."""
    plain = [layer for layer in model.layers if "forward" not in vars(layer)]  # not those of a block around this one
    for layer in plain:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield model
    finally:
        for layer in plain:
            del layer.forward  # the class's own again


def learning_rate_at(step, steps, peak, warmup):
    """Linear warm-up over the first `warmup` share of the steps, then half a cosine down to 0
    (Loshchilov & Hutter 2017)."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train(
    model, tokenizer, pairs, *, steps=300, batch_size=16, learning_rate=1e-2, warmup=0.1, weight_decay=0.0, clip=1.0,
    seed=0, autocast=None, checkpointing=False, compiled=False, bucket=16, pack=None, watch=None, progress=True,
    keeper=None, around=contextlib.nullcontext,
):  # fmt: skip
    """Trains whatever requires gradients on pairs (prompt, answer) and returns the history: a dict of numbers per step.

    AdamW (betas 0.9, 0.99) with warm-up and cosine, gradients clipped to norm `clip`, batches of like length. The same
    seed repeats a run bit for bit on one CPU machine.
    autocast: a dtype for the arithmetic of weights kept in float32.  checkpointing: less memory for more time, see
    `checkpointed`.  compiled: each layer by torch.compile, its rows padded to a multiple of 64, so that few lengths are
    compiled for.  bucket: see data.batches.  pack: tokens of a row into which several examples are put, none of which
    sees another; batch_size counts rows then.  watch: called as watch(model) -> dict after every step, its entries join
    the history.  keeper: of a run that may be killed and go on, checkpoints/progress.py.  around: around(rows) gives
    the context in which these pairs are computed, such as one that shows them pictures (adapters/seeing.py).
    Raises ValueError where nothing can be trained, and where the loss, a gradient or a parameter is no number any more.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = list(named.values())
    if not trained:
        raise ValueError("no parameter requires gradients: adapt the model first, or unfreeze it to train it whole")
    if steps < 1 or batch_size < 1 or not pairs:
        raise ValueError(
            f"steps is {steps}, batch_size {batch_size}, and there are {len(pairs)} examples; each must be at least 1"
        )
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; needed is a number above 0")
    if pack is not None and any(hasattr(part, "soft_prompt") or hasattr(part, "seen") for part in model.modules()):
        raise ValueError("a soft prompt, or a picture, is a row's and not a text's: train without pack")
    device = trained[0].device
    optimizer = AdamW(trained, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    arithmetic = torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext()
    history, seen = keeper.restore(named, optimizer) if keeper else [], 0
    multiple = 64 if compiled else 1
    if compiled:
        compile_layers(model)
    start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    model.train()
    if pack is None:
        stream, count = batches(pairs, batch_size, seed, bucket), len
    else:
        stream, count = (
            packed_batches(encode(pairs, tokenizer), batch_size, pack, seed),
            lambda rows: sum(map(len, rows)),
        )
    numbered = zip(range(steps), stream)
    bar = tqdm(numbered, total=steps, disable=not progress or distributed.rank() > 0, unit="step", dynamic_ncols=True)
    for step, batch in bar:
        seen += count(batch)
        if step < len(history):
            continue  # done before the run was interrupted
        mine = distributed.share(batch)
        made = collate(mine, tokenizer, multiple) if pack is None else collate_packed(mine, pack)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, learning_rate, warmup)
        with around(mine):
            with arithmetic, checkpointed(model) if checkpointing else contextlib.nullcontext():
                hidden, targets, which = answer_hidden(model, *(tensor.to(device) for tensor in made))
                loss, wrong = head_loss(model, hidden, targets)
            if not loss.requires_grad:
                raise ValueError("the loss depends on nothing that is trained: pictures come in by `around`")
            weight = distributed.weight(batch, len(targets))  # 1 where this process is alone
            optimizer.zero_grad()
            (loss * weight).backward()  # within `around`, since checkpointed layers are computed again here
        whole = torch.zeros(count(mine), device=device).index_add_(0, which, wrong.float()) == 0
        loss, right = distributed.summed(trained, loss.detach() * weight, whole.sum().float() * (weight > 0))
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()

        finite = torch.stack([loss, norm, torch.nn.utils.get_total_norm(trained)]).isfinite()
        if not finite.all():
            what = ("loss", "gradient", "parameters")[finite.int().argmin()]
            raise ValueError(
                f"the {what} became NaN or infinite at step {step + 1} of {steps}, on a batch that begins with "
                f"{str(batch[0][0])[:40]!r}: lower the learning rate, now {learning_rate}"
                + (f"; {keeper}" if keeper else "")
            )
        seconds = time.perf_counter() - start
        history.append({
            "step": step + 1,
            "loss": loss.item(),
            "accuracy": right.item() / count(batch),  # examples whose every answer token is the likeliest one
            "learning_rate": optimizer.param_groups[0]["lr"],
            "gradient_norm": norm.item(),  # before it was clipped
            "examples_per_second": seen / seconds,
            "seconds": seconds,
            **(watch(model) if watch else {}),
        })  # fmt: skip
        now = history[-1]
        shown = f"loss {now['loss']:.3f} · accuracy {now['accuracy']:.0%} · {now['examples_per_second']:.0f} examples/s"
        bar.set_postfix_str(shown, refresh=False)
        if keeper:
            keeper.after(named, optimizer, history)
    model.eval()
    return history


def answers(model, tokenizer, prompts, max_new_tokens=16, batch_size=128, around=contextlib.nullcontext):
    """What the model writes behind each prompt, greedily, up to and with the end token: strings.

    A prompt is a text, its ids, or a row (prompt, answer, ...) of data; around(rows): as in `train`."""
    device, written = next(model.parameters()).device, []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        texts = [row[0] if isinstance(row, tuple) else row for row in some]
        ids, mask = left_pad([tokenizer.encode(text) if isinstance(text, str) else text for text in texts])
        with around(some):
            out = generate(model, ids.to(device), max_new_tokens, stop=tokenizer.eos_id, attention_mask=mask.to(device))
        for row in out[:, ids.shape[1] :].tolist():
            end = row.index(tokenizer.eos_id) + 1 if tokenizer.eos_id in row else len(row)
            written.append(tokenizer.decode(row[:end]))
    return written


def exact_match(model, tokenizer, pairs, batch_size=128, around=contextlib.nullcontext):
    """The share of pairs (prompt, answer) that the model answers to the letter, generating; around: as in `train`."""
    rows = sorted(encode(pairs, tokenizer), key=lambda row: len(row[0]))
    longest = max(len(row[1]) for row in rows)
    written = answers(model, tokenizer, rows, longest, batch_size, around)
    return sum(text.startswith(tokenizer.decode(row[1])) for row, text in zip(rows, written)) / len(rows)


@torch.no_grad()
def mean_loss(model, tokenizer, pairs, batch_size=64):
    """`answer_loss` over all the pairs: nats per answer token."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    for start in range(0, len(pairs), batch_size):
        ids, labels = (tensor.to(device) for tensor in collate(pairs[start : start + batch_size], tokenizer))
        hidden, targets, _ = answer_hidden(model, ids, labels)
        total += head_loss(model, hidden, targets)[0].item() * len(targets)
        count += len(targets)
    return total / count
