"""The same training on several processes, each with its share of every batch, through torch.distributed:

    torchrun --nproc-per-node 2 -m minillama adapt            one process a GPU (NCCL), or a core (gloo)

                        ┌─ process 0: rows 0, 2, … ─▶ loss, gradients ─┐
    a batch of B rows ──┤                                              ├─▶ summed ─▶ the same step everywhere
                        └─ process 1: rows 1, 3, … ─▶ loss, gradients ─┘

The base is frozen, so nothing but the adapter's gradients travels: a few hundred kilobytes a step. Each process holds
the whole base (data parallel), or with `shard` a part of every layer's weights, which are gathered while the layer runs
and let go behind it (FSDP2; Zhao et al. 2023, https://arxiv.org/abs/2304.11277).

Alone, a process is a world of one: every function here then gives back what it was given, bit for bit.
"""

import contextlib
import os

import torch
from torch import distributed


def rank():
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def size():
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextlib.contextmanager
def joined(device):
    """Within the block this process is one of those that torchrun started, where it did; gives its device: the GPU of
    its own number for a plain "auto" or "cuda", else the one it was given."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        yield device
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    with together():
        distributed.init_process_group("nccl" if on_gpu else "gloo", device_id=torch.device(device) if on_gpu else None)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def together():
    """Around what all processes do at once: where one of them is gone, the others say so."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip().splitlines()[0][:120]
        raise ValueError(
            f"process {rank()} of {size()} lost the others ({said}): one of them has ended, see what it said; "
            "a run that was kept goes on with --resume"
        ) from None


def share(batch):
    """The rows of a batch that are this process's; where there are fewer rows than processes, some get one that does
    not count (`weight`)."""
    return batch[rank() :: size()] or batch[:1]


def weight(batch, number):
    """What this process's mean over `number` tokens counts in the mean over all processes' tokens."""
    if size() == 1:
        return 1.0
    mine = number if rank() < len(batch) else 0
    everywhere = torch.tensor(float(mine), device=place())
    with together():
        distributed.all_reduce(everywhere)
    return mine / everywhere.item()


def summed(parameters, *scalars):
    """Sums the parameters' gradients over all processes, and gives the sums of some scalars (0-d tensors), all in one
    message."""
    if size() == 1:
        return scalars
    gradients = [parameter.grad for parameter in parameters]
    parts = [*gradients, *scalars]
    message = torch.cat([part.detach().float().flatten() for part in parts])
    with together():
        distributed.all_reduce(message)
    sums = [part.view_as(old) for part, old in zip(message.split([part.numel() for part in parts]), parts)]
    for gradient, new in zip(gradients, sums):
        gradient.copy_(new)
    return sums[len(gradients) :]


def agreed(number):
    """The largest of the numbers that the processes have."""
    if size() == 1:
        return number
    largest = torch.tensor(number, device=place())
    with together():
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return largest.item()


def same(value):
    """The value that process 0 has, in all of them."""
    if size() == 1:
        return value
    values = [value]
    with together():
        distributed.broadcast_object_list(values, device=place())
    return values[0]


def place():
    """The device that messages travel from."""
    return torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"


def shard(model):
    """Cuts every frozen weight of an adapted model into as many parts as there are processes; the adapter's stay whole.
    Returns the model. Raises ValueError where this process is alone."""
    if size() == 1:
        raise ValueError(
            "--shard cuts the weights among processes, and this one is alone: "
            "torchrun --nproc-per-node N -m minillama … starts N"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    mesh = init_device_mesh(torch.device(place()).type, (size(),))  # also of a model that is built on "meta"
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole & set(layer.parameters()))
    fully_shard(model, mesh=mesh, ignored_params=whole)
    register_fsdp_forward_method(model, "hidden")
    return model
