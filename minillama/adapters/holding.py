"""The adapters of a model held by one thread: while it switches or mixes them, no other thread's pass is bent."""

import contextlib
import threading
import weakref

import torch

from . import wrappers

HOLDERS = weakref.WeakKeyDictionary()  # {model: the lock of the thread that is in a block on it}


@contextlib.contextmanager
def held(model):
    """Within the block the adapters are this thread's alone: another's pass through them is refused. Gives the hook
    that refuses. A pass that was on its way through one of them already ends as it began: what this thread does to a
    wrapper's `active` no other sees. Raises ValueError where another thread holds them.
    """
    thread, lock = threading.get_ident(), HOLDERS.setdefault(model, threading.RLock())
    sentence = (
        "another thread is in a block of disabled() or mixed() on this model, which switches its adapters for all: "
        "wait until it ends, or give each thread a model of its own (copy.deepcopy)"
    )

    def mine():
        recomputing = torch._C._current_graph_task_id() != -1  # checkpointing on a GPU does, on autograd's own thread
        return threading.get_ident() == thread or recomputing

    def refuse(*_):
        if not mine():
            raise ValueError(sentence)

    if not lock.acquire(blocking=False):
        raise ValueError(sentence)
    hooks, plain = [], []
    try:
        for _, wrapper in wrappers(model):
            hooks.append(wrapper.register_forward_pre_hook(refuse))
            if not isinstance(vars(type(wrapper)).get("active"), property):  # not by a block around this one
                plain.append((wrapper, type(wrapper)))
                wrapper.__class__ = with_a_switch_of_its_own(type(wrapper), mine, wrapper.active)
        yield refuse
    finally:
        for wrapper, kind in plain:
            wrapper.__class__ = kind
        for hook in hooks:
            hook.remove()
        lock.release()


def with_a_switch_of_its_own(kind, mine, state):
    """A subclass whose `active` is one thing to whoever is `mine()`, at first the state, and what it was to others."""
    own = {"active": state}

    def places(wrapper):
        return own if mine() else vars(wrapper)

    switch = property(
        lambda wrapper: places(wrapper)["active"], lambda wrapper, new: places(wrapper).update(active=new)
    )
    return type(kind.__name__, (kind,), {"active": switch, "__module__": kind.__module__})


@contextlib.contextmanager
def disabled(model):
    """Within the block the model is its base again, bit for bit; also one that is merged, or within `mixed`.

    The block is its thread's alone: a pass of another thread through the adapters raises ValueError.
    """
    with held(model):
        states = [(wrapper, wrapper.active) for _, wrapper in wrappers(model)]
        try:
            for wrapper, _ in states:
                wrapper.active = False
            yield model
        finally:
            for wrapper, state in states:
                wrapper.active = state
