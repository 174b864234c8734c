"""Modules together: the report's two chains against plain loops, torch.compile, state_dict, devices."""

import io

import pytest
import torch
from hypothesis import given, settings
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential

from ppo_kit.modules import (
    GAE,
    GMPO,
    AdaptiveKL,
    BatchLoss,
    Clip,
    ClippedSurrogate,
    ClippedValueLoss,
    ConstantMean,
    EntropyBonus,
    KLLoss,
    KLPenalty,
    LanguageModelLoss,
    Objective,
    PairwiseLoss,
    PlaceScore,
    ScoreClip,
    ScoreNormalize,
    SquaredValueLoss,
    Whiten,
    averaged_over,
    total_loss,
    with_counts,
)
from ppo_kit.testing import batches, check_padding_invariance, check_split_invariance, check_state_roundtrip


def ppo_max() -> TensorDictSequential:
    return TensorDictSequential(
        ScoreNormalize(),
        ScoreClip(0.8),
        PlaceScore(),
        KLPenalty(AdaptiveKL(0.1, 0.05, 100)),
        GAE(1.0, 0.9),
        Whiten(),
        Clip(0.5),
    )


def learn(chain, batch):
    chain[0].update(batch)
    chain[3].update(chain(batch))


def objective() -> Objective:
    return Objective(
        ClippedSurrogate(), ClippedValueLoss(weight=0.5), EntropyBonus(0.01), KLLoss(0.1), LanguageModelLoss()
    )


@settings(deadline=None, max_examples=25)
@given(batches(min_length=1))
def test_ppo_max_against_a_loop_over_tokens(batch):
    chain = ppo_max()
    chain[0].update(batch)
    lengths = batch["response_mask"].sum(1).tolist()
    score = batch["score"].double()
    score = (score - score.mean()) / (score.std() if len(score) > 1 else 1.0)
    found = {}
    for row, length in enumerate(lengths):
        later = 0.0
        for t in reversed(range(length)):
            kl = float(batch["old_log_probs"][row, t] - batch["ref_log_probs"][row, t])
            reward = -0.1 * kl + (float(score[row].clamp(-0.8, 0.8)) if t == length - 1 else 0.0)
            after = float(batch["old_values"][row, t + 1]) if t + 1 < length else 0.0
            later = reward + after - float(batch["old_values"][row, t]) + 0.9 * later
            found[row, t] = later
    values = torch.tensor(list(found.values()), dtype=torch.float64)
    spread = values.std() if len(values) > 1 else torch.tensor(0.0)
    out = chain(batch)
    assert torch.equal(out["advantages"] != 0, out["advantages"].ne(0) & out["response_mask"])
    for (row, t), value in zip(found, values, strict=True):
        expected = ((value - values.mean()) / (spread.square() + 1e-8).sqrt()).clamp(-0.5, 0.5)
        assert float(out["advantages"][row, t]) == pytest.approx(float(expected), abs=2e-3)


def test_chains_keep_the_promises_of_their_parts():
    check_padding_invariance(ppo_max(), max_examples=10)
    check_padding_invariance(objective(), max_examples=10)
    check_split_invariance(objective(), max_examples=10)
    check_state_roundtrip(ppo_max, update=learn, max_examples=10)


def some_batch(rows: int = 4, tokens: int = 5) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    keys = ("old_log_probs", "ref_log_probs", "log_probs", "old_values", "values", "entropy", "returns")
    values = {key: -torch.rand(rows, tokens, generator=generator) for key in keys}
    mask = torch.arange(tokens) < torch.tensor([5, 1, 0, 3])[:, None]
    score = torch.randn(rows, generator=generator)
    advantages = torch.randn(rows, tokens, generator=generator)
    return TensorDict({**values, "score": score, "response_mask": mask, "advantages": advantages}, [rows])


@pytest.mark.parametrize("counted", [False, True])
def test_compiles_to_one_graph(counted):
    torch._dynamo.reset()
    for make in (ppo_max, objective):
        batch = with_counts(some_batch()) if counted else some_batch()
        module = make()
        expected = module(batch.clone())
        compiled = torch.compile(module, fullgraph=True, backend="eager")(batch.clone())
        for key in module.out_keys:
            torch.testing.assert_close(compiled[key], expected[key])


def test_state_dict_names_what_is_learned():
    chain = ppo_max()
    learn(chain, some_batch())
    state = chain.state_dict()
    assert sorted(state) == ["module.0.count", "module.0.m2", "module.0.mean", "module.3.controller.coef"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = ppo_max()
    other.load_state_dict(torch.load(file, weights_only=True))
    learn(other, some_batch())
    learn(chain, some_batch())
    assert all(
        torch.equal(a, b)
        for a, b in zip(chain.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device to move to")
def test_moves_to_a_device():
    batch, chain = some_batch(), ppo_max()
    learn(chain, batch.copy())
    moved = objective()(chain.to("cuda")(batch.to("cuda")))
    stayed = objective()(chain.to("cpu")(batch))
    assert total_loss(moved).device.type == "cuda"
    torch.testing.assert_close(moved.to("cpu").to_dict(), stayed.to_dict())


def test_objective_refuses_two_losses_of_one_name():
    with pytest.raises(ValueError, match=r"\['loss_value'\].*more than one"):
        Objective(SquaredValueLoss(), ClippedValueLoss())
    Objective(SquaredValueLoss(), SquaredValueLoss(out_keys=["loss_value_2"]))
    with pytest.raises(KeyError, match=r"total_loss .*'loss_\*'.*\['ratio'\]"):
        total_loss(TensorDict({"ratio": torch.zeros(())}))


def test_an_objective_sets_the_aggregate_of_losses_without_their_own():
    batch = some_batch()
    objective = Objective(
        ClippedSurrogate(), KLLoss(0.1, aggregate="token_mean"), GMPO(out_keys=["loss_b", "b", "c", "d"]),
        aggregate="sequence_mean",
    )  # fmt: skip
    assert averaged_over(objective) == {
        "loss_policy": "sequences",
        "loss_kl": "tokens",
        "loss_b": "sequences",
    }
    out = objective(batch)
    assert out["loss_policy"] == ClippedSurrogate(aggregate="sequence_mean")(batch)["loss_policy"]
    assert out["loss_kl"] == KLLoss(0.1)(batch)["loss_kl"]
    # Its own sequence mean is the class's default, not a choice of the user.
    assert averaged_over(Objective(GMPO(), aggregate="token_mean")) == {"loss_policy": "tokens"}
    constant = Objective(SquaredValueLoss(), aggregate=ConstantMean(3))
    assert constant(batch)["loss_value"] == SquaredValueLoss(aggregate=ConstantMean(3))(batch)["loss_value"]
    for bad in ("mean", 3):
        with pytest.raises(ValueError, match=f"Objective: aggregate got {bad!r}, needs one of"):
            Objective(SquaredValueLoss(), aggregate=bad)


def test_diagnostics_carry_no_gradient():
    batch = some_batch()
    batch["log_probs"].requires_grad_()
    out = ClippedSurrogate()(batch)
    assert [key for key, value in out.items() if value.requires_grad] == ["loss_policy"]

    class Careless(BatchLoss):
        IN, OUT = ("log_probs", "loss_mask"), ("loss_mine", "mean")

        def compute(self, log_probs, mask):
            return log_probs, log_probs

    out = Careless()(batch)
    assert [key for key, value in out.items() if value.requires_grad] == ["loss_mine"]

    class Maskless(BatchLoss):
        IN, OUT = ("log_probs", "response_mask"), ("loss_mine",)

    with pytest.raises(ValueError, match=r"Maskless: IN is .*, needs 'loss_mask'"):
        Maskless()


def test_clip_fraction_counts_where_the_gradient_stops():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]])
    batch = TensorDict({"log_probs": ratio.log().requires_grad_(), "old_log_probs": torch.zeros(1, 5)}, [1])
    batch["advantages"] = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])
    batch["response_mask"] = torch.ones(1, 5, dtype=torch.bool)
    out = ClippedSurrogate()(batch)
    (grad,) = torch.autograd.grad(out["loss_policy"], batch["log_probs"])
    assert (grad == 0).tolist() == [[True, False, False, True, False]]
    assert float(out["clip_fraction"]) == pytest.approx(0.4)
    assert float(out["ratio"]) == pytest.approx(1.0)


class TestPairwise:
    batch = TensorDict({"score": torch.tensor([1.0, 0.0, 0.5, 2.0])}, [4])

    def test_against_the_equation(self):
        out = PairwiseLoss(margin=0.5)(self.batch)
        expected = [-torch.tensor(d - 0.5).sigmoid().log() for d in (0.5, -2.0)]
        torch.testing.assert_close(out["loss_pairwise"], torch.stack(expected).mean())
        assert out["accuracy"] == 0.5

    def test_language_model_term_reads_the_preferred_half(self):
        text = {"log_probs": torch.tensor([[-1.0, -3.0], [-1.0, torch.nan], [9.0, 9.0], [9.0, 9.0]])}
        text["response_mask"] = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
        batch = self.batch.copy().update(text)
        extra = PairwiseLoss(lm_weight=2.0)(batch)["loss_pairwise"] - PairwiseLoss()(batch)["loss_pairwise"]
        torch.testing.assert_close(extra, torch.tensor(2 * (2.0 + 1.0) / 2))

    def test_pieces_that_keep_pairs_together_add_up(self):
        batch = self.batch.copy().update({"num_sequences": torch.full((4,), 4)})
        pieces = [PairwiseLoss()(batch[[i, i + 2]]) for i in range(2)]
        for key, value in PairwiseLoss()(self.batch).items():
            torch.testing.assert_close(sum(piece[key] for piece in pieces), value)

    def test_a_tie_is_half_right(self):
        assert (
            PairwiseLoss()(TensorDict({"score": torch.tensor([1.0, 2.0, 1.0, 0.0])}, [4]))["accuracy"] == 0.75
        )

    @pytest.mark.parametrize("lm_weight", [0.0, 1.0])
    def test_a_pair_with_an_answer_of_no_token_is_left_out(self, lm_weight):
        """Its scores may be anything, NaN too, and no gradient reaches them."""
        score = torch.tensor([1.0, torch.nan, 0.5, 0.5, torch.nan, 2.0], requires_grad=True)
        mask = torch.tensor([[True, True], [False, False], [True, False]] * 2)
        log_probs = torch.tensor([[-1.0, -2.0], [torch.nan, torch.nan], [-3.0, torch.nan]] * 2)
        batch = TensorDict({"score": score, "response_mask": mask, "log_probs": log_probs}, [6])
        kept = batch[[0, 2, 3, 5]]
        for counts in ({}, {"num_sequences": 4}):
            own = [each.clone(False).update({k: torch.full((len(each),), v) for k, v in counts.items()})
                   for each in (batch, kept)]  # fmt: skip
            all_, alone = (PairwiseLoss(lm_weight=lm_weight)(each) for each in own)
            for key in ("loss_pairwise", "accuracy"):
                torch.testing.assert_close(all_[key], alone[key])
        all_["loss_pairwise"].backward()
        assert score.grad.isfinite().all()
        assert not score.grad[[1, 4]].any()

    def test_pieces_with_no_pair_at_all_add_nothing(self):
        batch = self.batch.copy().update({"response_mask": torch.zeros(4, 2, dtype=torch.bool)})
        batch["num_sequences"] = torch.full((4,), 4)
        assert PairwiseLoss()(batch)["loss_pairwise"] == PairwiseLoss()(batch)["accuracy"] == 0

    def test_odd_rows_are_refused(self):
        with pytest.raises(ValueError, match="PairwiseLoss: 'score' has 3 rows, needs two per pair"):
            PairwiseLoss()(self.batch[:3])
