"""Looks whether everything is in place: versions, device, bundled files, and a ten-second self-test."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from .. import data
from ..adapters import adapt, adapter_parameters
from ..checkpoints import BASES, load
from ..device import pick_device, pick_dtype
from ..train import exact_match, train
from .arguments import add_machine

PACKAGES = (
    "torch", "numpy", "safetensors", "tokenizers", "gguf", "huggingface_hub", "Jinja2", "Babel", "tqdm", "matplotlib"
)  # fmt: skip


def add_arguments(parser):
    add_machine(parser, seed=False)


def run(args):
    """Prints one line per part, 'ok' or what is wrong and how to mend it; exit status 1 when anything is wrong."""
    problems = 0

    def report(part, verdict, remedy=None):
        nonlocal problems
        problems += remedy is not None
        state, ending = ("ok     ", "") if remedy is None else ("PROBLEM", f". {remedy}")
        print(f"  {state}  {part}: {verdict}{ending}", flush=True)

    report("python", platform.python_version(), None if sys.version_info >= (3, 11) else "Needed is 3.11 or later")
    for package in PACKAGES:
        try:
            report(package, version(package))
        except PackageNotFoundError:
            report(package, "not installed", "Run: pip install -r requirements.txt")
    device = pick_device(args.device)
    report("device", f"{device}, {torch.get_num_threads()} threads")
    report("dtype", f"{pick_dtype(args.dtype, device)} (--dtype {args.dtype})".replace("torch.", ""))
    _, test_days = data.split_dates()
    for name in ("dates-llama", "dates-gpt2"):
        try:
            model, tokenizer = load(name, device=device)
        except (ValueError, OSError) as error:
            report(name, str(error), f"Restore {BASES / name} from the repository")
            continue
        match = exact_match(model, tokenizer, data.examples("en", test_days, 200, seed=1))
        restore = None if match >= 0.99 else f"Restore {BASES / name} from the repository"
        report(name, f"{match:.1%} of 200 unseen English dates", restore)
        pairs = data.examples("fr", test_days, 64)
        ids = data.collate(pairs, tokenizer)[0].to(device)
        with torch.no_grad():
            closed = torch.equal(model(ids), adapt(model, "llama_adapter")(ids))
        train(model, tokenizer, pairs, steps=2, batch_size=32, learning_rate=0.1, progress=False)
        own = adapter_parameters(model).items()
        moved = all(parameter.abs().sum() > 0 for key, parameter in own if key.endswith("gate"))
        start = f"gate 0 {'is' if closed else 'IS NOT'} the base bit for bit"
        steps = f"two steps {'open' if moved else 'DO NOT open'} every gate"
        report(f"{name} adapted", f"{start}, {steps}", None if closed and moved else "Please report this")
    print("everything works" if not problems else f"{problems} problem{'s' * (problems > 1)}")
    return 1 if problems else 0
