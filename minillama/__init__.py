"""A small LLaMA and GPT-2 in plain PyTorch, and adapters that start as the identity, bit for bit."""

from .adapters import activate, adapt, detach, disabled, load_adapter, merge, mixed, save_adapter, trainable_parameters, unmerge
from .attention import Cache
from .data import ByteTokenizer
from .files import FileError
from .generate import generate, left_pad
from .gpt2 import GPT2, GPT2Config
from .llama import LLaMA, LLaMAConfig
from .pretrained import load, save
from .train import answer_loss
