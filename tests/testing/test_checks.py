"""Every check catches a planted bug, passes the component without it, and says briefly what is wrong."""

import re

import pytest
import torch
from tensordict import TensorDict

from ppo_kit.functional import masked_mean, place_score, token_mean
from ppo_kit.modules import (
    GAE,
    BatchModule,
    ClippedSurrogate,
    KLPenalty,
    ScoreNormalize,
    SquaredValueLoss,
    Whiten,
)
from ppo_kit.testing import (
    batches,
    check_against_loop,
    check_gradients,
    check_padding_invariance,
    check_row_order,
    check_split_invariance,
    check_state_roundtrip,
)


def fails(text: str):
    return pytest.raises(AssertionError, match=re.escape(text))


class TestPaddingInvariance:
    def test_multiplying_by_the_mask_leaks_nan(self):
        def component(rewards, mask):
            return (rewards * mask).sum(1)

        with fails(
            "component: 'output' depends on masked slots: nan in 'rewards'; at row 0: nan instead of 0"
        ):
            check_padding_invariance(component, inputs=["rewards", "response_mask"])

    def test_infinity_alone_is_found(self):
        def component(rewards, mask):
            return (torch.nan_to_num(rewards, posinf=torch.inf) * mask).nan_to_num(7.0).sum(1)

        with fails("inf in 'rewards'"):
            check_padding_invariance(component, inputs=["rewards", "response_mask"])

    def test_selecting_after_the_arithmetic_leaks_into_the_gradient(self):
        def component(log_probs, old_log_probs, mask):
            return token_mean((log_probs - old_log_probs).exp(), mask)

        with fails("the gradient for 'log_probs' depends on masked slots"):
            check_padding_invariance(component, inputs=["log_probs", "old_log_probs", "response_mask"])

    def test_dividing_by_the_padded_length_is_found(self):
        def component(batch):
            return torch.where(batch["response_mask"], batch["rewards"], 0.0).mean(1)

        with fails("depends on the amount of padding"):
            check_padding_invariance(component)

    def test_mean_over_padding_names_the_slot(self):
        def component(batch):
            return {
                "advantages": torch.where(
                    batch["response_mask"], batch["rewards"] - batch["rewards"].mean(), 0
                )
            }

        with fails("'advantages' depends on the amount of padding; at row 0, token 0:"):
            check_padding_invariance(component)

    def test_what_the_schema_zeroes_must_be_zero(self):
        def component(batch):
            return {"advantages": batch["rewards"] + 1}

        with fails(
            "component: 'advantages' is not 0 in a masked slot\nsmallest batch found: 1 row(s) of 1 token(s)"
        ):
            check_padding_invariance(component)

    def test_prompt_padding_counts(self):
        with fails("depends on masked slots: another id in 'prompt_ids'"):
            check_padding_invariance(lambda batch: batch["prompt_ids"].float().sum(1))

    def test_own_key_is_fuzzed(self):
        def component(token_weight, mask):
            return (token_weight * mask).sum(1)

        with fails("in 'token_weight'"):
            check_padding_invariance(
                component, inputs=["token_weight", "response_mask"], on=batches(extra={"token_weight": "BT"})
            )

    def test_good_components_pass(self):
        check_padding_invariance(masked_mean, inputs=["rewards", "response_mask"])
        check_padding_invariance(GAE(bootstrap=True))

    def test_a_function_without_a_mask_may_leave_garbage_where_masked(self):
        check_padding_invariance(lambda values: values + 1, inputs=["values"])


class TestSplitInvariance:
    def test_local_denominator(self):
        def component(batch):
            return {"loss_value": masked_mean(batch["values"] ** 2, batch["response_mask"])}

        with fails("component: 'loss_value' is not the sum over micro-batches of [1, 1] rows"):
            check_split_invariance(component)

    def test_gradient_alone(self):
        class Cheat(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, rows):
                ctx.rows = rows
                return x.sum()

            @staticmethod
            def backward(ctx, grad):
                return grad * torch.ones(ctx.rows[0]) / ctx.rows[1], None

        def component(batch):
            return Cheat.apply(batch["score"], (batch["score"].shape, len(batch)))

        with fails(
            "the gradient for 'score' changes with micro-batches of [1, 1] rows; at row 0: 1 instead of 0.5"
        ):
            check_split_invariance(component)

    def test_a_tensor_per_row_cannot_add_up(self):
        with fails("only scalars can add up"):
            check_split_invariance(lambda batch: batch["score"])

    def test_whitening_inside_a_loss(self):
        def component(batch):
            return ClippedSurrogate()(Whiten()(batch))

        with fails("is not the sum over micro-batches"):
            check_split_invariance(component)


def test_row_order_catches_neighbours():
    def component(batch):
        return batch["score"] - batch["score"].roll(1)

    with fails("component: 'output' depends on the order of rows"):
        check_row_order(component)
    check_row_order(Whiten())


class TestAgainstLoop:
    def loop(self, score, mask):
        out = torch.zeros(mask.shape, dtype=torch.float64)
        for row, length in enumerate(mask.sum(1).tolist()):
            if length:
                out[row, length - 1] = score[row]
        return out

    def test_one_slot_late(self):
        def late(score, mask):
            return place_score(score, mask).roll(1, 1)

        with fails("late: 'output' is not what the loop gives: at row 0, token 0: 0 instead of"):
            check_against_loop(late, self.loop, inputs=["score", "response_mask"])

    def test_passes(self):
        check_against_loop(place_score, self.loop, inputs=["score", "response_mask"])

    def test_number_of_outputs(self):
        with fails("returns ['output'], the loop 2 tensor(s)"):
            check_against_loop(place_score, lambda s, m: (s, s), inputs=["score", "response_mask"])

    def test_inputs_are_needed_for_a_function(self):
        with pytest.raises(ValueError, match="place_score has no in_keys, so it needs inputs"):
            check_against_loop(place_score, self.loop)


class TestGradients:
    def test_missing_detach(self):
        def component(log_probs, advantages):
            return -(log_probs * advantages).sum()

        with fails("'advantages' gets a gradient, and only ['log_probs'] may"):
            check_gradients(component, ["log_probs"], inputs=["log_probs", "advantages"])

    def test_wrong_backward(self):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.exp()

            @staticmethod
            def backward(ctx, grad):
                return grad

        with fails("the gradient for 'log_probs' is not the finite difference"):
            check_gradients(lambda x: Wrong.apply(x).sum(), ["log_probs"], inputs=["log_probs"])

    def test_no_gradient_at_all(self):
        with fails("no output has a gradient for 'values'"):
            check_gradients(lambda x: x.detach().sum(), ["values"], inputs=["values"])

    def test_passes(self):
        check_gradients(SquaredValueLoss(), ["values"])


class Running(BatchModule):
    """Adds up scores; the flags plant a bug each."""

    IN, OUT = ("score",), ("shaped_score",)

    def __init__(self, *, buffer: bool = True, persistent: bool = True, learns_in_forward: bool = False):
        super().__init__()
        self.learns_in_forward = learns_in_forward
        if buffer:
            self.register_buffer("total", torch.zeros(()), persistent=persistent)
        else:
            self.total = torch.zeros(())

    def update(self, batch):
        self.total = self.total + batch["score"].sum()

    def compute(self, score):
        if self.learns_in_forward:
            self.total = self.total + 1
        return score + self.total


class TestStateRoundtrip:
    def test_state_outside_state_dict(self):
        with fails("Running: 'shaped_score' differs after a reload; at row 0:"):
            check_state_roundtrip(lambda: Running(buffer=False))
        with fails("differs after a reload"):
            check_state_roundtrip(lambda: Running(persistent=False))

    def test_forward_that_learns(self):
        with fails("forward changed its state 'total'"):
            check_state_roundtrip(lambda: Running(learns_in_forward=True))
        with fails("changes from one forward to the next"):
            check_state_roundtrip(lambda: Running(buffer=False, learns_in_forward=True))

    def test_passes(self):
        check_state_roundtrip(Running)
        check_state_roundtrip(ScoreNormalize)
        check_state_roundtrip(lambda: KLPenalty(0.1))


def test_writing_in_place_is_caught():
    def component(rewards):
        return rewards.mul_(2)

    with fails("component writes into 'rewards' in place"):
        check_padding_invariance(component, inputs=["rewards"])


def test_a_batch_of_ones_own():
    batch = TensorDict({"rewards": torch.tensor([[1.0, 2.0]])}, [1])
    batch["response_mask"] = torch.tensor([[True, False]])

    def component(rewards, mask):
        return rewards.sum(1)

    with fails("[[1, 0]]\n  rewards = [[1.0, 2.0]]"):
        check_padding_invariance(component, inputs=["rewards", "response_mask"], on=batch)
    check_padding_invariance(masked_mean, inputs=["rewards", "response_mask"], on=batch)
