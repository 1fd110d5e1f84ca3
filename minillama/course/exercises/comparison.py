"""Lesson 07: predictions about all methods at once."""

import copy

import torch

import minillama

from .predictions import Question


def start_as_the_base():
    """The methods that, at their defaults, leave a small LLaMA's logits bit for bit as they were."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        base, ids = minillama.LLaMA(minillama.LLaMAConfig(31, 16, 32, 2, 2)), torch.arange(6)[None]
        adapted = {m: minillama.adapt(copy.deepcopy(base), m) for m in minillama.adapters.METHODS}
        return frozenset(m for m, model in adapted.items() if torch.equal(model(ids), base(ids)))


METHODS = tuple(minillama.adapters.METHODS)
SAME = frozenset(METHODS) - {"prefix_tuning", "prompt_tuning"}

EXERCISES = {
    "starts_as_base": Question(
        start_as_the_base,
        "A gate at 0, a scale of 1, an up-projection or a B of zeros adds exactly nothing. Learned tokens without a "
        "gate take their share of the softmax before the first step.",
        {frozenset(METHODS): "two methods put learned vectors into the tokens' own softmax; what do these take there?",
         frozenset(): "remember the gate at 0, and LoRA's B of zeros.",
         frozenset(METHODS) - SAME: "these two are those that do not: they take a share of the tokens' softmax.",
         SAME - {"ia3"}: "IA3's vectors start at 1, and x · 1 is x.",
         SAME - {"lora"}: "LoRA's B starts at 0: what is added is exactly nothing.",
         SAME - {"llama_adapter"}: "LLaMA-Adapter's gate starts at 0.",
         SAME - {"dora"}: "DoRA starts with LoRA's B of zeros and with each row's own length.",
         SAME - {"llama_adapter_v2"}: "V2's scales start at 1 and its biases at 0.",
         SAME - {"bottleneck"}: "a bottleneck's up-projection starts at 0 here.",
         SAME | {"prefix_tuning"}: "the prefix stands in the tokens' own softmax and takes a share of it.",
         SAME | {"prompt_tuning"}: "the prompt's tokens stand in the tokens' own softmax and take a share of it."},
        METHODS, "For each method: what is added to, or multiplied with, what the base computes before the first step?",
    ),
    # Two minutes of training, so not run here: lesson 07 trains them all and asserts it.
    "most_finnish": Question(
        lambda: "lora",
        "It changes matrices, and so what every token asks for and says; each step goes far at its rate.",
        {"bottleneck": "it trains more than twice as many numbers as LoRA, and yet comes second.",
         "ia3": "the paper's figure has it in front; here it can only scale what the base has: third or fourth.",
         "prefix_tuning": "the base must find its Finnish in what the prefix adds to its attention; four learn more.",
         "llama_adapter": "its ten prompts a layer only add to what the tokens say to one another: second to last.",
         "llama_adapter_v2": "it scales and shifts what the base has, as IA3 does, and comes near IA3.",
         "prompt_tuning": "it trains the fewest numbers, all of them at the input, and comes last."},
        tuple(m for m in METHODS if m != "dora"),
        "Which of them can change what the base's matrices compute, not only scale it or add to it?",
    ),
    "what_helps": Question(
        lambda: "steps",
        "What is missing is neither rate nor gate nor numbers: these 5,136 do hold Finnish, and are slow to find it.",
        {"rate": "from half to four times its rate nothing changes beyond the spread of the seeds.",
         "gate": "gates that learn ten times as fast open twice as far, and the result stays where it was."},
        ("rate", "gate", "steps"), "What is left to explain, if faster gates open twice as far and change nothing?",
    ),
}  # fmt: skip
PLANTED = ()
HARMLESS = {}
