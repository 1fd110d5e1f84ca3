"""One model and several threads: each gets what it would get alone, or a sentence that says why not."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small import make, open_gates

import minillama
from minillama import adapt, disabled, generate, mixed
from minillama.adapters import wrappers

BLOCKS = {"disabled": disabled, "mixed": lambda model: mixed(model, ["default", None, "default"])}


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    model = make("llama")
    adapt(model, "llama_adapter")
    adapt(model, "lora")
    return open_gates(model)


def elsewhere(call, *arguments):
    """What a call gives in another thread; its error is raised here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *arguments).result()


@torch.no_grad()
def test_generations_side_by_side_are_what_each_is_alone(adapted, ids):
    prompts = [ids[:, : 2 + i] for i in range(4)]
    alone = [generate(adapted, prompt, 12) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: list(pool.map(lambda p: generate(adapted, p, 12), prompts[1:])), range(2)):
            assert all(torch.equal(a, b) for a, b in zip(together, alone[1:]))


@torch.no_grad()
@pytest.mark.parametrize("mine", BLOCKS)
@pytest.mark.parametrize("theirs", BLOCKS)
def test_while_one_thread_is_in_a_block_another_is_refused(mine, theirs, adapted, ids):
    """Fault F11: disabled() in one thread changed what another computed, 20 times of 20."""
    before, states = adapted(ids), [wrapper.active for _, wrapper in wrappers(adapted)]
    with BLOCKS[mine](adapted):
        inside = adapted(ids)
        with pytest.raises(ValueError, match="another thread is in a block of disabled"):
            elsewhere(lambda: adapted(ids))
        with pytest.raises(ValueError, match="give each thread a model of its own"):
            elsewhere(BLOCKS[theirs](adapted).__enter__)
        with disabled(adapted):  # its own blocks nest
            adapted(ids)
        assert torch.equal(adapted(ids), inside)
    assert torch.equal(elsewhere(lambda: adapted(ids)), before)
    assert [wrapper.active for _, wrapper in wrappers(adapted)] == states


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_that_comes_and_goes_never_changes_another_threads_numbers(block, adapted, ids):
    expected, over, seen = adapted(ids), threading.Event(), {"right": 0, "refused": 0}

    def coming_and_going():
        with torch.no_grad():
            for _ in range(150):
                with BLOCKS[block](adapted):
                    adapted(ids)
        over.set()

    thread = threading.Thread(target=coming_and_going)
    thread.start()
    while not over.is_set():
        try:
            assert torch.equal(adapted(ids), expected)
            seen["right"] += 1
        except ValueError as error:
            assert "another thread is in a block" in str(error)
            seen["refused"] += 1
    thread.join()
    assert torch.equal(adapted(ids), expected) and seen["refused"]


def test_a_copy_is_a_model_of_its_own(adapted, ids):
    other = copy.deepcopy(adapted)
    with disabled(adapted):
        elsewhere(lambda: other(ids))
    assert minillama.trainable_parameters(other).keys() == minillama.trainable_parameters(adapted).keys()
