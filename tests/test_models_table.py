"""docs/models.md: for every architecture what was seen to work, each mark made by a check that ran; what is refused
stands there with its reason. `python tests/test_models_table.py` writes the tables anew."""

import pathlib
import sys
import tempfile

import pytest
import torch
import transformers
from small import left_padded, open_gates
from test_adapter_files import SHARED, exchanged
from test_models import GROUPED, THEIRS, close, faithful

import minillama
from minillama import Cache, adapt, load_adapter, save_adapter
from minillama.__main__ import main
from minillama.adapters import TEXT_METHODS, delete_adapter
from minillama.checkpoints.architectures import ARCHITECTURES, REFUSED
from minillama.checkpoints.gguf import KNOWN
from minillama.commands import models

DOCS = pathlib.Path(__file__).parent.parent / "docs/models.md"
BEGIN, END = "<!-- tables, by tests/test_models_table.py -->", "<!-- end of tables -->"
# The model of each architecture that stands for it, in test_models.THEIRS, with grouped heads and its window.
MODELS = {
    "llama": "grouped", "mistral": "mistral, window", "qwen2": "qwen2, window", "qwen3": "qwen3, window",
    "smollm3": "smollm3, window", "olmo2": "olmo2", "phi3": "phi3", "granite": "granite", "gemma3_text": "gemma3",
    "gemma": "gemma", "gpt2": "gpt2",
}  # fmt: skip
NAMES = {
    "llama": "LLaMA 1 to 3.2, TinyLlama, SmolLM2", "mistral": "Mistral", "qwen2": "Qwen2, Qwen2.5", "qwen3": "Qwen3",
    "smollm3": "SmolLM3", "olmo2": "OLMo-2", "phi3": "Phi-3, Phi-3.5", "granite": "Granite 3",
    "gemma3_text": "Gemma 3 (text)", "gemma": "Gemma", "gpt2": "GPT-2",
}  # fmt: skip


def mark(check, *arguments):
    """A mark where the check passes, and the first words of the sentence where it is refused."""
    try:
        check(*arguments)
        return "✓"
    except ValueError as error:
        said = str(error)
        return "not in PEFT" if "Unsupported model type" in said else f"refused: {said.split(':')[0].split(';')[0]}"


def loaded(theirs, ours, ids):
    close(ours(ids), theirs(ids).logits)


def saved(theirs, ours, ids, folder):
    minillama.save(ours, folder / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "saved").eval()
    assert type(again) is type(theirs)
    close(again(ids).logits, ours(ids))


def cached(ours, ids):
    cache = Cache()
    close(torch.cat([ours(part, cache=cache) for part in ids.split([4, 1, 1, 3], dim=1)], dim=1), ours(ids))


def padded(theirs, ours, ids):
    ids, mask = left_padded(ids, [9, 4, 6])
    places, real = (mask.cumsum(1) - 1).clamp(min=0), mask.bool()
    close(ours(ids, mask)[real], theirs(ids, attention_mask=mask, position_ids=places).logits[real])


def adapted(ours, method, ids, folder):
    """Closed it is the base (where the method has that), open it is not, its file brings it back."""
    base = ours(ids)
    try:
        adapt(ours, method)
        assert torch.equal(ours(ids), base) == (method not in ("prefix_tuning", "prompt_tuning"))
        opened = open_gates(ours)(ids)
        assert (opened - base).abs().max() > 1e-3
        save_adapter(ours, folder / method)
        load_adapter(delete_adapter(ours), folder / method)
        close(ours(ids), opened, 1e-4 * opened.abs().max())
    finally:
        delete_adapter(ours)
    assert torch.equal(ours(ids), base)


def exchanged_and_off(theirs, ours, kind, method, ids, folder):
    try:
        exchanged(theirs, ours, kind, method, ids, folder)
    finally:
        delete_adapter(ours)


@torch.no_grad()
def cells(kind):
    """The rows of one architecture in the three tables."""
    ids = torch.randint(0, 101, (3, 9), generator=torch.Generator().manual_seed(1))
    theirs = faithful(MODELS[kind])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        theirs.save_pretrained(folder / "base")
        ours, _ = minillama.load(folder / "base")
        gguf = {"mistral": "✓, as `llama`", "gpt2": "refused: it has names of its own"}  # its files say llama
        gguf = gguf.get(kind, "✓" if kind in KNOWN.values() else "refused: transformers does not read it")
        ways = [mark(loaded, theirs, ours, ids), mark(saved, theirs, ours, ids, folder), mark(cached, ours, ids)]
        ways += [mark(padded, theirs, ours, ids), gguf]
        methods = [mark(adapted, ours, method, ids, folder) for method in TEXT_METHODS]
        files = []
        for method in list(SHARED)[:6]:
            (folder / method).mkdir(exist_ok=True)
            files.append(mark(exchanged_and_off, theirs, ours, kind, method, ids, folder / method))
    return ways, methods, files


def tables():
    rows = {kind: cells(kind) for kind in ARCHITECTURES}
    heads = (
        ("architecture", "models", "load", "save", "cache", "padding", "GGUF"),
        ("architecture", *(f"`{method}`" for method in TEXT_METHODS)),
        ("PEFT's files, both ways", *(name.replace("_", " ") for name in list(SHARED)[:6])),
    )
    text = []
    for i, head in enumerate(heads):
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for kind, found in rows.items():
            first = [f"`{kind}`", NAMES[kind]] if i == 0 else [f"`{kind}`"]
            lines.append(f"| {' | '.join([*first, *found[i]])} |")
        text.append("\n".join(lines))
    refused = [f"| `{kind}` | {reason} |" for kind, reason in REFUSED.items()]
    text.append("\n".join(["| refused | because |", "|---|---|", *refused]))
    return "\n\n".join(text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_tables_in_the_docs_are_what_is_seen():
    text = DOCS.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == tables()


def test_every_architecture_stands_in_the_docs():
    text = DOCS.read_text(encoding="utf-8")
    assert MODELS.keys() == NAMES.keys() == ARCHITECTURES.keys() and set(MODELS.values()) <= THEIRS.keys() and GROUPED
    assert all(text.count(f"\n| `{kind}` |") == 3 for kind in ARCHITECTURES)
    assert all(f"\n| `{kind}` | {reason} |" in text for kind, reason in REFUSED.items())


# What the models' own pages say they have.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008, "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768, "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400, "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736, "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "ibm-granite/granite-3.1-2b-instruct": 2_533_531_648, "google/gemma-3-1b-it": 999_885_952,
    "openai-community/gpt2": 124_439_808,
}  # fmt: skip


@pytest.mark.slow
def test_the_list_of_models(capsys, tmp_path, monkeypatch):
    """Sizes are the published ones; what lies in the cache is found, and said to open or why not."""
    cache = tmp_path / "hub"
    for name, kind in (("models--owner--one", "qwen3"), ("models--owner--two", "mixtral")):
        folder = cache / name / "snapshots" / "abc"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    monkeypatch.setattr(models, "cache_folder", lambda: cache)
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    for name, size in PUBLISHED.items():
        assert any(line.split()[:2] == [name, f"{size:,}"] for line in said.splitlines()), name
    assert "owner/one  Qwen3ForCausalLM: opens, once its weights are fetched" in said
    assert "owner/two  refused: model_type is 'mixtral'" in said


if __name__ == "__main__":
    text = DOCS.read_text(encoding="utf-8")
    DOCS.write_text(f"{text.split(BEGIN)[0]}{BEGIN}\n\n{tables()}\n\n{END}{text.split(END)[1]}", encoding="utf-8")
    sys.exit(0)
