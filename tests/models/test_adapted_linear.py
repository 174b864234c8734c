"""The fused layer against peft's own forward: values, gradients, precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="peft is not installed")

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear

from ppo_kit.models.adapted_linear import AdaptedProduct, fuse


def adapted(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), model)
    for weight in model.parameters():
        nn.init.normal_(weight) if weight.ndim > 1 else None
    return model[0]


def outputs_and_gradients(layer, x, dtype):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        out = layer(x)
    weights = [w for w in layer.parameters() if w.requires_grad]
    assert len(weights) == 2
    return [out, *torch.autograd.grad(out.float().square().sum(), [x, *weights])]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_peft_computes(bias, dtype):
    layer, x = adapted(bias), torch.randn(2, 4, 6)
    theirs = outputs_and_gradients(layer, x, dtype)
    fuse(layer)
    assert isinstance(layer, Linear)
    assert type(layer) is not Linear
    ours = outputs_and_gradients(layer, x, dtype)
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == two.dtype
        size = two.abs().max().item()
        torch.testing.assert_close(one, two, rtol=0, atol=16 * torch.finfo(dtype).eps * size)


def test_off_it_is_the_layer_itself():
    layer, x = adapted(True), torch.randn(2, 6)
    fuse(layer)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 6), (5, 6), (5,), (2, 6), (5, 2))
    )
    assert torch.autograd.gradcheck(
        lambda x, a, b: AdaptedProduct.apply(x, weight, bias, a, b, 0.7),
        [each.requires_grad_() for each in (x, a, b)],
    )
