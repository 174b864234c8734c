"""``check_holes`` finds what takes a hole for a token, and batches with holes find what leaks from one."""

import re

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.modules import GAE, SquaredValueLoss, Whiten
from ppo_kit.testing import batches, check_holes, check_padding_invariance


def fails(text: str):
    return pytest.raises(AssertionError, match=re.escape(text))


def test_the_next_slot_is_not_the_next_token():
    def component(values, mask):
        after = torch.cat([values[:, 1:], values[:, :1] * 0], 1)
        return torch.where(mask, after - values, 0.0)

    with fails("component: 'output' is not that of the compacted sequence; at row 0, token 0"):
        check_holes(component, inputs=["values", "action_mask"])


def test_the_last_slot_is_not_the_last_token():
    def component(batch):
        return batch["rewards"][:, -1]

    component.in_keys = ["rewards", "action_mask"]
    with fails("'output' is not that of the compacted sequence"):
        check_holes(component)


def test_a_gradient_that_leaks_from_a_hole_is_found_by_the_padding_check():
    def component(values, mask):
        between = (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
        return torch.where(between, values - values.detach(), 0.0).sum(1)

    inputs = ["values", "action_mask"]
    check_padding_invariance(component, inputs=inputs)
    with fails("the gradient for 'values' depends on the amount of padding; not 0 where masked"):
        check_padding_invariance(component, inputs=inputs, on=batches(holes=True))


def test_a_refusal_by_name_passes_and_another_error_does_not():
    def refuses(values, mask):
        raise ValueError("action_mask: row 0 has a hole, needs none")

    check_holes(refuses, inputs=["values", "action_mask"])

    def fails_otherwise(values, mask):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        check_holes(fails_otherwise, inputs=["values", "action_mask"])


def test_the_widest_mask_that_is_read_counts():
    check_holes(GAE())
    check_holes(SquaredValueLoss())
    check_padding_invariance(SquaredValueLoss(), on=batches(holes=True))


def test_one_batch_of_your_own():
    batch = TensorDict({"advantages": torch.tensor([[1.0, 50.0, 3.0]])}, [1])
    batch["response_mask"] = torch.ones(1, 3, dtype=torch.bool)
    batch["action_mask"] = torch.tensor([[True, False, True]])
    check_holes(Whiten(), on=batch)
