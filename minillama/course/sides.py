"""The two sides that `minillama bench` times: a model of ours and PEFT's on the same weights, and what each does.

Alpaca's lengths stand here too: how long the paper's fine-tuning takes (Zhang et al. 2023, LLaMA-Adapter, table 1: one
hour on eight A100) is a matter of how many tokens there are.
"""

import random
import warnings

import torch

from .. import data, distributed
from ..adapters import adapt
from ..attention import Cache
from ..checkpoints.architectures import architecture_of, write_config
from ..checkpoints.tensors import to_hf
from ..device import shapes_only
from ..generate import stream
from ..llama import LLaMA, LLaMAConfig
from ..speed import quantize
from ..train import answer_loss, train

SHAPES = {
    "smollm2": LLaMAConfig(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "llama-7b": LLaMAConfig(),
    "llama-13b": LLaMAConfig(32000, 5120, 13824, 40, 40),
    "llama-65b": LLaMAConfig(32000, 8192, 22016, 80, 64),
    "llama3-8b": LLaMAConfig(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5),
    "llama3-70b": LLaMAConfig(128256, 8192, 28672, 80, 64, 8, rope_theta=5e5),
}
# How many of Alpaca's 52,002 texts have a length in each tenth from 60 to 1,305 tokens: LLaMA's tokenizer, prompt and
# answer (https://github.com/tloen/alpaca-lora, lengths.ipynb). Within a tenth lengths are drawn evenly.
ALPACA, SHORTEST, LONGEST, ROW = (42516, 8250, 983, 191, 35, 16, 9, 0, 1, 1), 60, 1305, 512


@torch.no_grad()
def random_base(config, dtype, device, shard=False):
    """A LLaMA of random weights, made on the device; cut among the processes before any of it is made."""
    with shapes_only():
        model = LLaMA(config).to(dtype).requires_grad_(False)
    if shard:
        distributed.shard(model)
    model.to_empty(device=device)
    if config.tie_word_embeddings and not shard:
        model.lm_head.weight = model.embed_tokens.weight
    for parameter in model.parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        own.fill_(1.0) if parameter.dim() == 1 else own.normal_(std=0.02)
    return model


def ours(model, method, prompts, how=None):
    """A model of ours on the same weights, or on them in fewer bits, adapted."""
    with shapes_only():
        other = LLaMA(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    if model.config.tie_word_embeddings:
        other.lm_head.weight = other.embed_tokens.weight
    if how is not None:
        quantize(other, how)
    own = {"llama_adapter": {"prompt_length": prompts}, "prefix_tuning": {"prefix_length": prompts}}.get(method, {})
    return adapt(other, method, **own).train()


def theirs(model, method, prompts):
    """transformers' model on the same weights, adapted by PEFT; None where PEFT does not have the method."""
    import peft
    import transformers

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # transformers and PEFT among themselves
    configs = {
        "llama_adapter": lambda: peft.AdaptionPromptConfig(
            adapter_len=prompts, adapter_layers=model.config.num_hidden_layers, task_type="CAUSAL_LM"
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
        "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prefix_tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=prompts, task_type="CAUSAL_LM"),
    }
    if method not in configs:
        return None
    device = model.embed_tokens.weight.device
    config = transformers.LlamaConfig(**write_config(model.config))
    with shapes_only():
        other = transformers.LlamaForCausalLM(config)
    other.load_state_dict(to_hf(architecture_of(model.config), model.state_dict()), strict=False, assign=True)
    other.tie_weights()
    with torch.device(device):
        other.model.rotary_emb = type(other.model.rotary_emb)(config)  # its buffers are in no file
    return peft.get_peft_model(other, configs[method]()).to(device).train()


def stepper(model, loss):
    """A function of (ids, labels) that makes one step of AdamW and returns the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(ids, labels):
        optimizer.zero_grad()
        value = loss(ids, labels)
        value.backward()
        distributed.summed(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return value.item()  # waits for a GPU

    return step


def our_figures(model, ids, labels, new=16):
    """{figure: a function that does it once}; decoding writes so many new tokens."""
    step = stepper(model, lambda ids, labels: answer_loss(model, ids, labels))

    @torch.no_grad()
    def prefill():
        return model.lm_head(model.hidden(ids, cache=Cache())[:, -1])

    return {
        "step": lambda: step(ids, labels),
        "forward": lambda: torch.no_grad()(model)(ids),
        "prefill": prefill,
        "decode": lambda: list(stream(model, ids[:, :16], new)),
        "recorded": lambda: list(stream(model, ids[:, :16], new, static=True)),
    }


def their_figures(model, ids, labels, new=16):
    step = stepper(model, lambda ids, labels: model(input_ids=ids, labels=labels).loss)
    mask = torch.ones_like(ids[:, :16])
    fixed = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
    return {
        "step": lambda: step(ids, labels),
        "forward": lambda: torch.no_grad()(model)(input_ids=ids),
        "prefill": lambda: torch.no_grad()(model)(input_ids=ids, use_cache=True, logits_to_keep=1),
        "decode": lambda: model.generate(input_ids=ids[:, :16], attention_mask=mask, **fixed),
    }


# ── Alpaca ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def alpaca(vocab_size, share=1.0, seed=0):
    """Pairs of random ids as long as Alpaca's texts, cut to 512 tokens as the paper does, half of each an answer; or a
    share of them."""
    draw, width = random.Random(seed), (LONGEST - SHORTEST) / len(ALPACA)
    tenths = [tenth for tenth, number in enumerate(ALPACA) for _ in range(number)]
    lengths = [min(ROW, round(SHORTEST + width * (tenth + draw.random()))) for tenth in tenths]
    chosen = draw.sample(lengths, round(share * len(lengths)))
    return [
        tuple([draw.randrange(vocab_size) for _ in range(n)] for n in (length // 2, length - length // 2))
        for length in chosen
    ]


def alpaca_rate(model, pairs, rows, steps, compiled):
    """Trains on packed rows; (texts per second, tokens per second that are no padding), without the first tenth of the
    steps, in which kernels are compiled."""
    words = type("Ids", (), {"eos_id": None})()
    history = train(model, words, pairs, steps=steps, batch_size=rows, pack=ROW, compiled=compiled, learning_rate=1e-4)
    done = [round(now["examples_per_second"] * now["seconds"]) for now in (history[steps // 10], history[-1])]
    texts = (done[1] - done[0]) / (history[-1]["seconds"] - history[steps // 10]["seconds"])
    return texts, texts * sum(map(data.tokens, pairs)) / len(pairs)
