"""What lesson 09 calls right is what torch counts, what the modules hold and what they compute."""

import copy

import pytest
import torch

import minillama
from minillama import answer_loss
from minillama.attention import Cache
from minillama.course import lessons
from minillama.course.exercises import scaling_out
from minillama.course.exercises.scaling_out import right_combined, right_decoding, right_forward, right_step
from minillama.speed import BlockLinear

SHAPES = [
    minillama.LLaMAConfig(61, 32, 48, 3, 4, 2, head_dim=8),
    minillama.LLaMAConfig(40, 24, 56, 2, 3, 1, head_dim=16),
]
each = pytest.mark.parametrize("config", SHAPES)


@each
def test_a_forward_pass_has_the_operations_that_torch_counts(config):
    model, ids = minillama.LLaMA(config), torch.randint(0, 40, (3, 11))
    with torch.no_grad():
        assert lessons.operations(lambda: model(ids)) == 3 * right_forward(config, 11)


@each
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_has_them_and_what_the_task_leaves_out(config, layers):
    """Left out: attention's own products, the adapters', and that the lowest adapted layer's q, k and v tell nobody
    their gradient."""
    model, T, answers, K = minillama.LLaMA(config), 10, 4, 3
    ids = torch.randint(0, 40, (1, T + 1))
    labels = torch.where(torch.arange(T + 1) > T - answers, ids, -100)
    first, L, width = model.layers[0].self_attn, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    layer = sum(p.numel() for p in model.layers[0].parameters() if p.dim() == 2)
    q, k, v = (projection.weight.numel() for projection in (first.q_proj, first.k_proj, first.v_proj))
    for frozen in (True, False):
        one, others = copy.deepcopy(model).train(), 14 * L * width * T * T
        if frozen:
            minillama.adapt(one, "llama_adapter", layers=layers, prompt_length=K)
            others -= 10 * (L - layers + 1) * width * T * T + 2 * T * (q + k + v)
            others += 4 * layers * K * (k + v) + (12 * layers - 2) * T * width * K
        counted = lessons.operations(lambda: answer_loss(one, ids, labels).backward())  # noqa: B023
        asked = (layer, L, config.vocab_size * config.hidden_size, layers, T, answers, frozen)
        assert counted == right_step(*asked) + others


@each
def test_decoding_reads_the_matrices_and_the_cache(config):
    model, cache = minillama.LLaMA(config), Cache()
    ids = torch.randint(0, 40, (3, 7))
    with torch.no_grad():
        model(ids, cache=cache)
    matrices = sum(p.nbytes for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    kept = sum(
        z.nbytes
        for i in range(config.num_hidden_layers)
        for z in vars(cache.layer(i)).values()
        if isinstance(z, torch.Tensor)
    )
    assert right_decoding(config, 3, 7, 4) == matrices + kept


def test_blocks_are_the_modules():
    linear = torch.nn.Linear(96, 40)
    codes, scales = scaling_out.right_quantise(linear.weight.detach())
    small = BlockLinear(linear, 8, "cpu")
    small.fill(linear.weight.detach())
    assert torch.equal(codes, small.codes.flatten(1))
    assert torch.equal(scales, small.scales.view(torch.float16).squeeze(-1))
    assert torch.equal(scaling_out.right_dequantise(codes, scales), small.weight)


def test_weighed_gradients_are_the_whole_batchs():
    torch.manual_seed(0)
    linear, x, y = torch.nn.Linear(5, 3, bias=False), torch.randn(9, 5), torch.randint(0, 3, (9,))

    def gradient(rows):
        loss = torch.nn.functional.cross_entropy(linear(x[rows]), y[rows])
        return torch.autograd.grad(loss, linear.weight)[0].flatten()

    parts = [slice(0, 2), slice(2, 3), slice(3, 9)]
    found = right_combined([gradient(rows) for rows in parts], [2, 1, 6])
    torch.testing.assert_close(found, gradient(slice(None)))


def test_rows_read_counts_each_projection():
    model, ids = minillama.LLaMA(SHAPES[0]), torch.randint(0, 40, (2, 5))
    assert lessons.rows_read(model, lambda: model(ids)) == dict.fromkeys(lessons.scaling_out.PROJECTIONS, 10)


@pytest.mark.slow
def test_processes_that_fail_are_a_sentence():
    assert lessons.torchrun("import os; print('rank', os.environ['RANK'])").count("rank") == 2
    with pytest.raises(ValueError, match="(?s)ended with 1.*no such thing"):
        lessons.torchrun("raise RuntimeError('no such thing')")
