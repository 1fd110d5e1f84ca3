"""The command line: as a process, the way a reader runs it, where that matters;
else inside this one, which saves seconds."""

import contextlib
import io
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small import SHAPE

from minillama.__main__ import COMMANDS, main
from minillama.adapters import TEXT_METHODS
from minillama.checkpoints import BASES, load, save


def minillama(*arguments, cwd, timeout=300):
    """(exit status, stdout, stderr) of python -m minillama."""
    command = [sys.executable, "-m", "minillama", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def inside(*arguments, cwd):
    """The same without starting a process."""
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as leaving:  # argparse's way out
            code = leaving.code
    return code or 0, out.getvalue(), err.getvalue()


def sentence(stderr):
    """The one line that a refused command prints; a traceback fails here."""
    assert "Traceback" not in stderr
    return stderr.strip().splitlines()[-1]


def report(stdout, language="fr"):
    matches = re.search(rf"^ *{language} +([\d.]+)% +([\d.]+)%", stdout, re.M).groups()
    base, adapted = (float(number) / 100 for number in matches)
    share = float(re.search(r"\(([\d.]+)% of the base", stdout).group(1)) / 100
    return base, adapted, share


@pytest.mark.slow
def test_the_default_run_learns_french(tmp_path):
    """The first promise of the README: at most 50 % before, at least 95 % after, at most 1 % of the parameters."""
    code, out, err = minillama(cwd=tmp_path)
    assert code == 0, err
    base, adapted, share = report(out)
    assert base <= 0.50 and adapted >= 0.95 and share <= 0.01
    assert "bit-identical" in out
    folder = tmp_path / "runs/dates-llama-llama_adapter-fr"
    written = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "training.png"}
    assert {path.name for path in folder.iterdir()} == written
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == 300 and all(max(map(abs, gates)) > 0.05 for gates in history[-1]["gates"].values())
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = inside("generate", "--adapter", folder, "--prompt", "mercredi 14 juillet 2021 = ", cwd=tmp_path)
    assert code == 0 and out.splitlines()[-1] == "mercredi 14 juillet 2021 = 2021-07-14", err


@pytest.mark.slow
def test_gpt2_learns_french_too(tmp_path):
    code, out, err = inside("--base", "dates-gpt2", cwd=tmp_path)
    assert code == 0, err
    base, adapted, _ = report(out)
    assert base <= 0.55 and adapted >= 0.85 and "bit-identical" in out  # 49.0 and 90.6 %, or near it on another machine


@pytest.mark.slow
def test_a_short_run_in_float32(tmp_path):
    options = "--steps 3 --test-dates 20 --option layers=2 --language fi --dtype float32 --out here"
    code, out, err = inside("adapt", *options.split(), cwd=tmp_path)
    assert code == 0, err
    (part,) = json.loads((tmp_path / "here/adapter_config.json").read_text())["parts"]
    assert part["method"] == "llama_adapter" and part["layers"] == 2 and "bit-identical" in out


@pytest.mark.slow
def test_several_languages_and_their_mean(tmp_path):
    options = "--steps 2 --batch-size 8 --test-dates 10 --languages fr,en,fi --checkpointing --out here"
    code, out, err = inside("adapt", *options.split(), cwd=tmp_path)
    assert code == 0, err
    after = [report(out, language)[1] for language in ("fr", "en", "fi", "mean of 3")]
    assert sum(after[:3]) / 3 == pytest.approx(after[3], abs=1e-3)
    assert re.search(r"^ *en .*bit-identical", out, re.M) and re.search(r"peak memory +\d\.\d\d GB", out)


@pytest.mark.slow
def test_a_task_of_the_readers_own(tmp_path):
    """Words spelt backwards: what is wrong with the lines is counted, and the loss on held-out ones falls."""
    words = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "lmnr"]
    lines = [json.dumps({"prompt": f"{word}: ", "response": word[::-1]}) for word in words]
    (tmp_path / "data").mkdir()
    lines += [json.dumps({"prompt": "x" * 600, "response": "y"}), '{"prompt": "z", "response": ""}']
    (tmp_path / "data/words.jsonl").write_text("\n".join(lines))
    options = "--data data --method lora --steps 40 --batch-size 16 --out here"
    code, out, err = inside("adapt", *options.split(), cwd=tmp_path)
    assert code == 0, err
    assert "81 pairs, 8 of them held out; median 9 tokens, longest 602; 1 cut to 512 tokens; 1 left out" in out
    before, after = map(float, re.search(r"answer loss +([\d.]+) nats per token before, ([\d.]+) after", out).groups())
    assert after < before - 1 and "bit-identical" in out and (tmp_path / "here/adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_same_seed_repeats_a_run(tmp_path):
    """In another process, too."""
    files = []
    for name, run in (("one", minillama), ("two", inside)):
        assert run("--steps", 4, "--test-dates", 5, "--out", name, cwd=tmp_path)[0] == 0
        files.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_compare_prints_the_papers_counts(tmp_path, monkeypatch):
    """The numbers themselves are those of test_methods.py::test_counts_are_the_papers."""
    rows = [("llama_adapter", "layers=30", "llama_7b", 1_229_760, "1.2M"), ("ia3", "", "smollm2", 57_600, "not there")]
    monkeypatch.setattr("minillama.course.papers.counts", lambda: rows)
    code, out, err = inside("compare", "--papers", cwd=tmp_path)
    assert code == 0, err
    shown = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    assert ["llama_adapter", "layers=30", "llama_7b", "1,229,760", "1.2M"] in shown
    assert ["ia3", "smollm2", "57,600", "not there"] in shown


@pytest.mark.slow
def test_compare_draws_and_prints(tmp_path):
    code, out, err = inside("compare", "--steps", 3, "--seeds", 1, "--test-dates", 10, "--out", "here", cwd=tmp_path)
    assert code == 0, err
    assert all(word in out for word in ("llama_adapter", "full", "base"))
    assert (tmp_path / "here/comparison.png").exists()
    rows = json.loads((tmp_path / "here/comparison.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["base", *TEXT_METHODS, "full"]
    assert all(len(row["matches"]) == 1 for row in rows)


@pytest.mark.slow
def test_pretrain_writes_a_base_that_opens(tmp_path):
    for model in ("llama", "gpt2"):
        options = f"--model {model} --out {model} --steps 2 --batch-size 4 --test-dates 5"
        code, out, err = inside("pretrain", *options.split(), cwd=tmp_path)
        assert code == 0, err
        assert f"--model {model} --out {model} --steps 2" in (tmp_path / model / "README.md").read_text()
        assert inside("generate", "--base", model, "--prompt", "x", "--max-new-tokens", 2, cwd=tmp_path)[0] == 0


@pytest.mark.slow
def test_check(tmp_path):
    code, out, err = minillama("check", cwd=tmp_path)
    assert code == 0 and "everything works" in out and "PROBLEM" not in out, out + err


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("adapt", "--method", "lama"), "llama_adapter"),
        (("adapt", "--languages", "fr,xx"), "CLDR knows no language 'xx'"),
        (("adapt", "--base", "dates-lama"), "dates-llama"),
        (("adapt", "--base", "/nowhere/at/all"), "neither a folder"),
        (("adapt", "--option", "layers=9"), "layers is 9"),
        (("adapt", "--option", "prompt_length=0"), "prompt_length is 0"),
        (("adapt", "--option", "rank"), "NAME=VALUE"),
        (("adapt", "--option", "rank=3"), "no option 'rank'"),
        (("adapt", "--steps", "0"), "--steps: 0 is too small"),
        (("adapt", "--test-dates", "0"), "--test-dates: 0 is too small"),
        (("adapt", "--data", "nowhere.jsonl"), "nowhere.jsonl is missing"),
        (("adapt", "--chat"), "there is no --data"),
        (("adapt", "--chat", "--data", __file__), "dates-llama has none"),
        (("adapt", "--data", __file__), "test_command_line.py:1 is not valid JSON"),
        (("adapt", "--max-length", "1"), "--max-length: 1 is too small"),
        (("adapt", "--option", "init=zero"), "init is 'zero'"),
        (("adapt", "--learning-rate", "0"), "--learning-rate: 0 is out of range"),
        (("adapt", "--method", "lora", "--option", "rank=8.0"), "rank is 8.0"),
        (("generate", "--prompt", "x", "--temperature", "nan"), "temperature is nan"),
        (("adapt", "--language", ""), "CLDR knows no language ''"),
        (("adapt", "--device", "cuda:77"), "cuda:77"),
        (("adapt", "--dtype", "int3"), "int3"),
        (("pretrain",), "--out"),
        (("generate", "--prompt", ""), "empty"),
        (("generate", "--prompt", "x", "--adapter", "nowhere"), "nowhere holds no adapter"),
        (("generate", "--prompt", "x", "--top-p", "3"), "top_p"),
        (("fly",), "fly"),
    ],
)
def test_bad_values_end_in_one_sentence(arguments, named, tmp_path):
    code, _, err = inside(*arguments, cwd=tmp_path)
    assert code == 2 and named in sentence(err) and not list(tmp_path.iterdir())


def test_bad_folders_end_in_one_sentence(tmp_path):
    base = tmp_path / "base"

    def refused(named):
        code, _, err = inside("adapt", "--base", base, cwd=tmp_path)
        assert code == 2 and named in sentence(err)

    base.mkdir()
    refused("config.json is missing")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(base)
    refused("tokenizer.json")
    (base / "config.json").write_text((BASES / "dates-llama/config.json").read_text())
    refused("do not belong together")
    (base / "model.safetensors").write_bytes((BASES / "dates-llama/model.safetensors").read_bytes()[:100_000])
    refused("cut short")


@pytest.mark.slow
def test_a_trained_adapter_is_not_overwritten_by_chance(tmp_path):
    """Without --out the next free folder is taken; with it, --overwrite must be said before any work."""
    short = ("adapt", "--steps", 1, "--test-dates", 2)
    for _ in range(2):
        assert inside(*short, cwd=tmp_path)[0] == 0
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert names == {"dates-llama-llama_adapter-fr", "dates-llama-llama_adapter-fr-2"}
    folder = tmp_path / "runs/dates-llama-llama_adapter-fr"
    before = (folder / "adapter_model.safetensors").read_bytes()
    code, _, err = inside(*short, "--out", folder, "--seed", 1, cwd=tmp_path)
    assert code == 2 and "--overwrite" in sentence(err)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert inside(*short, "--out", folder, "--seed", 1, "--overwrite", cwd=tmp_path)[0] == 0
    assert (folder / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.slow
def test_an_adapter_of_another_base_is_opened_when_asked(tmp_path):
    assert inside("adapt", "--steps", 1, "--test-dates", 2, "--out", "here", cwd=tmp_path)[0] == 0
    other, tokenizer = load("dates-llama")
    with torch.no_grad():
        other.norm.weight += 0.5
    save(other, tmp_path / "other", tokenizer)
    generate = ("generate", "--base", "other", "--adapter", "here", "--prompt", "3 mars 2021 = ")
    code, _, err = inside(*generate, cwd=tmp_path)
    assert code == 2 and "--any-base" in sentence(err)
    assert inside(*generate, "--any-base", cwd=tmp_path)[0] == 0


def test_metrics_are_the_history_and_stand_beside_the_adapter(tmp_path):
    assert inside("adapt", "--steps", 3, "--test-dates", 2, "--out", "here", cwd=tmp_path)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "here/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and set(lines[0]) >= {"loss", "accuracy", "gates"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_none(command, tmp_path):
    code, out, _ = inside(command, "--help", cwd=tmp_path)
    assert code == 0 and "None" not in out and "{'" not in out and "usage: minillama" in out
    assert out.count("(") >= out.count("--device")


@pytest.mark.slow
def test_version_and_what_the_light_commands_import(tmp_path):
    """`check` looks whether matplotlib is there, so it must start without it; and no command imports another's room."""
    code = (
        "import sys; import minillama; assert not any(name.startswith('minillama.course') for name in sys.modules); "
        "import minillama.commands.check, minillama.commands.generate, minillama.commands.adapt; "
        "assert not {'matplotlib', 'transformers', 'peft', 'minillama.course', 'nbformat'} & sys.modules.keys(); "
        "from minillama.__main__ import main; "
        "assert main('adapt --steps 1 --batch-size 2 --test-dates 2 --out here'.split()) == 0; "
        "assert 'torch._dynamo' not in sys.modules  # PyTorch's compiler, two seconds to load"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    code, out, _ = inside("--version", cwd=tmp_path)
    assert code == 0 and re.fullmatch(r"minillama \d+\.\d+\.\d+\n", out)


def test_help_helps(tmp_path):
    code, out, _ = inside("--help", cwd=tmp_path)
    assert code == 0 and all(word in out for word in ("adapt", "pretrain", "generate", "compare", "check"))
    code, out, _ = inside("adapt", "--help", cwd=tmp_path)
    assert code == 0 and "prompt_length" in out and "(dates-llama)" in out
