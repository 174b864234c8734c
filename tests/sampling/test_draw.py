"""The draw: the token of the float64 inversion, whatever the distribution and the uniform number."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_kit.functional import token_entropy, token_log_probs
from ppo_kit.sampling import draw as module
from ppo_kit.sampling.draw import FEW, draw, invert_float64

LAST = 1 - 2.0**-53
SIZES = (1, 17, FEW, FEW + 1, 8192, 49152)


def spelled_out(logits, uniform):
    """The first token whose cumulative float64 probability exceeds ``uniform``, a row at a time."""
    tokens = []
    for row, target in zip(logits.double(), uniform.tolist(), strict=True):
        cumulative = row.softmax(-1).cumsum(-1)
        tokens.append(min(int((cumulative <= target * cumulative[-1]).sum()), len(row) - 1))
    return torch.tensor(tokens)


def logits_of(kind: str, rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(rows, size, generator=generator)
    if kind == "even":
        return torch.zeros(rows, size)
    if kind == "one":
        one = torch.full((rows, size), -torch.inf)
        one[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] = 3.0
        return one
    if kind == "few":  # what top-k leaves
        return noise.masked_fill(noise < noise.topk(min(5, size)).values[:, -1:], -torch.inf)
    if kind == "holes":
        return noise.masked_fill(
            torch.rand(rows, size, generator=generator).argsort(1) > size // 2, -torch.inf
        )
    return noise * {"flat": 0.02, "wide": 4.0, "cold": 1e4}[kind]


@settings(max_examples=60)
@given(
    st.sampled_from(("even", "one", "few", "holes", "flat", "wide", "cold")),
    st.sampled_from(SIZES),
    st.integers(0, 2**31),
    st.lists(st.sampled_from((0.0, 2.0**-53, 1e-7, 0.5, LAST)), max_size=2),
)
def test_it_draws_the_token_of_the_float64_inversion(kind, size, seed, extremes):
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.cat([torch.tensor(extremes), torch.rand(4, generator=generator)]).double()
    logits = logits_of(kind, len(uniform), size, generator)
    drawn = draw(logits, uniform)
    assert drawn.token.tolist() == spelled_out(logits, uniform).tolist()
    assert torch.equal(drawn.log_prob, token_log_probs(logits, drawn.token))
    assert torch.equal(drawn.entropy, token_entropy(logits))
    shaped = draw(torch.zeros_like(logits), uniform, shaped=logits)
    assert torch.equal(shaped.token, drawn.token)
    assert torch.equal(shaped.log_prob, token_log_probs(torch.zeros_like(logits), drawn.token))


@pytest.mark.parametrize("size", [8192, 49152])
@pytest.mark.parametrize("kind", ["flat", "wide", "few"])
def test_at_a_boundary_float32_is_not_trusted(kind, size):
    """Uniform numbers a rounding of float64 from a boundary, on either side."""
    logits = logits_of(kind, 1, size, torch.Generator().manual_seed(3))
    cumulative = logits.double().softmax(-1).cumsum(-1)[0]
    inner = cumulative[(cumulative > 1e-6) & (cumulative < 1 - 1e-6)]
    uniform = torch.cat([inner[:: max(len(inner) // 8, 1)] + step for step in (-1e-13, 1e-13)])
    logits = logits.expand(len(uniform), -1)
    assert draw(logits, uniform).token.tolist() == spelled_out(logits, uniform).tolist()


def test_few_draws_of_a_language_model_need_float64_and_a_token_excluded_is_never_drawn():
    generator = torch.Generator().manual_seed(0)
    logits = logits_of("wide", 64, 49152, generator)
    logits[:, ::2] = -torch.inf
    with mock.patch.object(module, "invert_float64", side_effect=invert_float64) as exact:
        token = draw(logits, torch.rand(64, dtype=torch.float64, generator=generator)).token
    assert (token % 2 == 1).all()
    assert sum(len(call.args[0]) for call in exact.call_args_list) < 16


def test_without_a_uniform_number_it_is_the_first_of_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, -torch.inf]])
    assert draw(logits, None).token.tolist() == [1, 0]
    assert draw(logits, None, shaped=-logits.clamp(min=-9)).token.tolist() == [0, 2]
