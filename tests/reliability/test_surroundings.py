"""Commands in poor surroundings: a terminal that knows ASCII alone, a full disk, no home, a reader who leaves, Ctrl-C.
One sentence each time, and nothing half done."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import types

import pytest
import torch

import minillama
from minillama import __main__ as command_line
from minillama import adapt, load_adapter, save_adapter
from minillama.checkpoints.files import printable
from minillama.checkpoints.progress import CHECKPOINT

RUN = [sys.executable, "-m", "minillama"]
GENERATE = [*RUN, "generate", "--prompt", "3 mars 2021 = ", "--max-new-tokens", "4"]


def ended(command, **options):
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, **options)


def one_sentence(stderr):
    assert "Traceback" not in stderr and "Exception ignored" not in stderr, stderr
    return stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_ascii_and_no_home(tmp_path):
    """Fault F8: the first "·" was a traceback."""
    nowhere = {name: "/proc/nowhere" for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")}
    surroundings = os.environ | nowhere | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    for command in (GENERATE, [*RUN, "adapt", "--steps", "2", "--test-dates", "2", "--language", "uk"]):
        done = ended(command, cwd=tmp_path, env=surroundings)
        assert done.returncode == 0 and r"\xb7 cpu \xb7" in done.stdout, done.stderr
        assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "runs/dates-llama-llama_adapter-uk").iterdir())) == 4


@pytest.mark.slow
def test_nobody_reads_or_the_disk_is_full():
    done = ended(["bash", "-c", f"{' '.join(RUN)} compare --papers > /dev/full"])
    assert done.returncode == 2 and "No space left on device" in one_sentence(done.stderr)
    done = ended(["bash", "-c", f"{' '.join(RUN)} --help | head -0; echo ${{PIPESTATUS[0]}}"])
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_a_disk_that_fills_at_any_moment(tmp_path):
    """A limit on the size of files stands for the end of the disk: what is written is whole or absent, and the run goes
    on from there."""
    whole = ("--method", "ia3", "--steps", "3", "--batch-size", "4", "--test-dates", "2", "--checkpoint-every", "0.001")
    sizes = {}
    for most in (None, 9_000, 500):
        out = tmp_path / str(most)
        limit = None if most is None else lambda most=most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        done = ended([*RUN, "adapt", *whole, "--out", out], preexec_fn=limit)
        if most is None:
            assert done.returncode == 0, done.stderr
            sizes = {path.name: path.stat().st_size for path in out.iterdir()}
            continue
        assert done.returncode == 2 and "cannot be written" in one_sentence(done.stderr), (most, done.stderr)
        left = {path.name: path.stat().st_size for path in out.iterdir()} if out.exists() else {}
        assert left.keys() <= sizes.keys() | {CHECKPOINT}
        assert all(sizes[name] == size for name, size in left.items() if name in sizes and name != "metrics.jsonl")
        if CHECKPOINT in left:
            assert ended([*RUN, "adapt", "--resume", out]).returncode == 0
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                assert (out / name).read_bytes() == (tmp_path / "None" / name).read_bytes()


@pytest.mark.slow
def test_ctrl_c_at_any_moment_shows_no_traceback(tmp_path):
    """Fault F4: while it was being imported it did."""
    codes = []
    for seconds in (0.4, 1.5, 5):
        command = [*RUN, "adapt", "--out", str(tmp_path / str(seconds))]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        err = child.communicate(timeout=60)[1]
        assert "minillama" not in err or "Traceback" not in err, err  # the interpreter's own beginning is its own
        codes.append(child.returncode)
    assert set(codes) <= {-signal.SIGINT, 130, 1} and codes[-1] in (-signal.SIGINT, 130), codes


@pytest.mark.parametrize(
    "error, code, words",
    [
        (MemoryError(), 2, "not enough memory (MemoryError): take a smaller --batch-size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), 2, "not enough memory ("),
        (KeyError("x"), 1, "KeyError: 'x'; this is a fault of minillama's: --debug shows where"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "this needs the package 'peft'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("said \x1b[31min red"), 2, r"said \x1b[31min red"),
    ],
)
def test_whatever_goes_wrong_ends_in_one_sentence(error, code, words, monkeypatch, capsys):
    def failing(name):
        def run(args):
            raise error

        return types.SimpleNamespace(add_arguments=lambda parser: None, run=run, __doc__="")

    monkeypatch.setattr(command_line.importlib, "import_module", failing)
    assert command_line.main(["check"]) == code
    assert words in one_sentence(capsys.readouterr().err)
    for argv in (["check", "--debug"], ["--debug", "check"]):
        with pytest.raises(type(error)):
            command_line.main(argv)


def test_a_strangers_text_does_not_move_the_terminals_cursor(tmp_path):
    """Fault F10: escape codes of a file went to the terminal as they were; accents, emoji and narrow spaces stay."""
    assert printable("a\x1b[2Jb\x9bc\u202ed\re\tf\n") == r"a\x1b[2Jb\x9bc\u202ed\re" + "\tf\n"
    assert printable("3\u202fmars né 👩\u200d🔬") == "3\u202fmars né 👩\u200d🔬"
    model, _ = minillama.load("dates-llama")
    save_adapter(adapt(model, "ia3"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "\x1b[31mX\x1b]0;title\x07"}))
    with pytest.raises(minillama.FileError) as refused:
        load_adapter(minillama.load("dates-llama")[0], tmp_path)
    assert "\x1b" not in str(refused.value) and "\x07" not in str(refused.value)


def test_what_a_slider_shows_is_text(tmp_path):
    """Fault F10: prompt and answer went into the page as markup."""
    from minillama.course.lessons import looking

    torch.manual_seed(0)
    model, tokenizer = minillama.load("dates-llama")
    box = looking.gate_slider(adapt(model, "llama_adapter"), tokenizer, "<img src=x onerror=alert(1)> & ")
    shown = box.children[1].value
    assert "&lt;img src=x onerror=alert(1)&gt; &amp; " in shown and "<img" not in shown
