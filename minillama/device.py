"""Which device and which dtype: chosen by name, or by what the machine multiplies natively; never a silent fallback.
How much memory was needed. And what PyTorch would load its compiler for, two seconds, without it."""

import contextlib
import inspect
import re
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name="auto"):
    """The device of that name. "auto" takes CUDA, then the CPU (Apple's "mps" by name only); any other must exist here,
    else ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "meta":
        raise ValueError("device 'meta' holds shapes and no numbers: take 'auto' or 'cpu'")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} cannot be used here ({str(error).splitlines()[0]}): take 'auto' or 'cpu'"
        ) from None
    return device


class Undrawn(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), named=None):
        if function in (torch.nn.init.normal_, torch.Tensor.normal_):
            return named["tensor"] if named else arguments[0]
        return function(*arguments, **(named or {}))


@contextlib.contextmanager
def shapes_only():
    """Within the block modules are made on the meta device: shapes without numbers. Nothing is drawn, since torch loads
    its compiler, for two seconds, before it draws normal numbers that are none."""
    with torch.device("meta"), Undrawn():
        yield


class AdamW(torch.optim.AdamW):
    """PyTorch's, to the bit, without what is wrapped around its methods: at the first call that loads PyTorch's
    compiler, for two seconds, whether anything is compiled or not."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


def native_bfloat16(device):
    """Whether matrix products in bfloat16 run on the hardware: AMX or AVX512-BF16 on a CPU, Ampere or later on CUDA."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def pick_dtype(name, device):
    """ "auto" takes bfloat16 where it is native, else float32; or one of the two by name."""
    if name == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it can be auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def peak_memory(device):
    """The most bytes that this process has held at once: on CUDA of the GPU's memory, elsewhere of the machine's, the
    weights that are mapped from a file included; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage would begin with what the parent process held
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(found[1]) * 1024 if found else None
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
