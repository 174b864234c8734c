"""What every module owes: invariance to padding, order and split, constants, renamed keys, clear errors."""

from functools import cache
from functools import partial as part

import pytest
import torch
from hypothesis import find, settings
from tensordict import TensorDict

import ppo_kit.modules
from ppo_kit.batch import FALLBACK, present_key
from ppo_kit.functional import length_adaptive_lambda
from ppo_kit.modules import (
    CISPO,
    GAE,
    GMPO,
    GRPO,
    GSPO,
    OPO,
    RLOO,
    BatchLoss,
    BatchModule,
    Clip,
    ClippedSurrogate,
    ClippedValueLoss,
    ConstantMean,
    DropTruncated,
    EntropyBonus,
    HuberValueLoss,
    ImportanceSampling,
    KLCov,
    KLLoss,
    KLPenalty,
    LanguageModelLoss,
    LengthPenalty,
    MissingEndPenalty,
    MonteCarlo,
    OverlongPenalty,
    PlaceScore,
    PolicyGradient,
    PPOPenalty,
    ReMax,
    ResponseAdvantage,
    ScoreClip,
    ScoreNormalize,
    ScoreScale,
    ScoreWhiten,
    SquaredValueLoss,
    SumScores,
    TruncatedImportance,
    Whiten,
    with_counts,
)
from ppo_kit.testing import (
    batches,
    check_gradients,
    check_holes,
    check_padding_invariance,
    check_row_order,
    check_split_invariance,
)

SHAPING = [
    part(ScoreNormalize),
    part(ScoreScale),
    part(ScoreClip, 0.5),
    part(ScoreWhiten),
    part(SumScores, {"score": 0.5, "shaped_score": 2.0}),
    part(LengthPenalty, 0.1, free=2),
    part(OverlongPenalty, max_length=5, buffer=3),
    part(MissingEndPenalty, 0.5),
    part(DropTruncated),
    part(PlaceScore),
    part(KLPenalty, 0.1),
    part(KLPenalty, 0.1, kind="k3"),
    part(GAE, 0.9, 0.8),
    part(GAE, bootstrap=True),
    part(GAE, lam=length_adaptive_lambda, critic_lam=1.0),
    part(MonteCarlo, 0.9),
    part(MonteCarlo, baseline=True),
    part(RLOO),
    part(GRPO),
    part(GRPO, scale=False),
    part(OPO),
    part(ReMax),
    part(Whiten),
    part(Whiten, "returns", shift_mean=False),
    part(Whiten, reduce=lambda sums: sums),
    part(Clip, 0.5),
    part(TruncatedImportance),
]
POLICY = [
    part(ClippedSurrogate),
    part(ClippedSurrogate, clip=0.1, clip_high=0.3, dual_clip=1.5),
    part(ClippedSurrogate, aggregate="sequence_mean"),
    part(ClippedSurrogate, aggregate=ConstantMean(7), weight=0.5),
    part(PolicyGradient),
    part(ImportanceSampling),
    part(PPOPenalty, 0.5),
    part(CISPO),
    part(GSPO, clip=0.1, clip_high=0.1),
    part(GMPO),
    part(KLLoss, 0.1),
    part(KLLoss, 0.1, kind="k3", aggregate="sequence_mean"),
    part(KLLoss, 0.1, kind="k3_weighted"),
    part(LanguageModelLoss, weight=0.3),
]
CRITIC = [part(SquaredValueLoss), part(ClippedValueLoss), part(HuberValueLoss, delta=0.5)]
ENTROPY = [part(EntropyBonus, 0.01), part(EntropyBonus, 0.01, 0.7)]
LOSSES = POLICY + CRITIC + ENTROPY
EXTRA = {"greedy_score": "B", "sampler_log_probs": "BT"}


def every(makes):
    return pytest.mark.parametrize("make", makes, ids=lambda make: make.func.__name__)


def test_no_module_is_forgotten():
    public = {getattr(ppo_kit.modules, name) for name in ppo_kit.modules.__all__}
    classes = {
        c for c in public if isinstance(c, type) and issubclass(c, BatchModule) and hasattr(c, "compute")
    }
    tested = {make.func for make in [*SHAPING, *LOSSES, part(KLCov)]}
    assert classes - {ResponseAdvantage} == tested


@every([*SHAPING, *LOSSES, part(KLCov, fraction=0.3)])
def test_padding_changes_nothing(make):
    module = make()
    check_padding_invariance(module, on=batches(extra=EXTRA), max_examples=8)


@every([*SHAPING, *LOSSES])
def test_order_of_rows_changes_nothing(make):
    module = make()
    check_row_order(module, on=batches(extra=EXTRA), max_examples=8)


@every([*SHAPING, *LOSSES])
def test_a_mask_with_holes_gives_what_the_compacted_sequence_gives(make):
    module = make()
    check_holes(module, on=batches(extra=EXTRA, holes=True), max_examples=12)


@every([*SHAPING, *LOSSES])
def test_garbage_in_the_holes_changes_nothing(make):
    module = make()
    check_padding_invariance(module, on=batches(extra=EXTRA, holes=True), max_examples=8)


@every(LOSSES)
def test_micro_batches_add_up(make):
    module = make()
    check_split_invariance(module, max_examples=8)
    check_split_invariance(module, on=batches(holes=True), max_examples=4)


@every(LOSSES)
def test_its_own_counts_change_nothing(make):
    batch = _one()
    batch["response_mask"][1, 1:] = False
    batch["response_mask"][2] = False
    module = make()
    counted, alone = module(with_counts(batch.copy())), module(batch)
    torch.testing.assert_close(counted.to_dict(), alone.to_dict())


@every(POLICY)
def test_only_the_policy_gets_a_policy_gradient(make):
    module = make()
    if isinstance(module, GSPO | GMPO | CISPO):  # their gradient is by design not that of their value
        batch = _one()
        leaves = {key: batch[key].requires_grad_() for key in module.in_keys if key != "loss_mask"}
        module(batch)["loss_policy"].backward()
        assert [key for key, leaf in leaves.items() if leaf.grad is not None] == ["log_probs"]
        return
    check_gradients(module, ["log_probs"], max_examples=4)


@every(CRITIC)
def test_only_the_critic_gets_a_value_gradient(make):
    module = make()
    check_gradients(module, ["values"], max_examples=4)


@every(ENTROPY)
def test_entropy_gradient(make):
    module = make()
    check_gradients(module, ["entropy"], max_examples=4)


@cache
def _found() -> TensorDict:
    return find(
        batches(extra=EXTRA),
        lambda batch: batch["response_mask"].shape == (3, 3) and bool(batch["response_mask"].all()),
        settings=settings(database=None, deadline=None, derandomize=True, max_examples=5000),
    )


def _one() -> TensorDict:
    return _found().clone()


@every([*SHAPING, *LOSSES, part(KLCov, fraction=0.5)])
def test_half_precision_inputs_are_computed_in_float32(make):
    """Values whose squares and sums no float16 holds give what the same numbers give in float32."""
    batch = _one()
    for key in ("rewards", "values", "old_values", "returns", "advantages", "score", "shaped_score"):
        batch[key] = 250.0 + 100 * batch[key]
    half = batch.apply(lambda x: x.half() if x.is_floating_point() else x)
    full = half.apply(lambda x: x.float() if x.is_floating_point() else x)
    module = make()
    got, expected = module(half), module(full)
    for key in module.out_keys:
        assert got[key].dtype in (expected[key].dtype, torch.float16)
        rounding = torch.finfo(torch.float16).eps if got[key].dtype == torch.float16 else 1e-6
        torch.testing.assert_close(got[key].float(), expected[key].float(), rtol=2 * rounding, atol=rounding)


@every([*SHAPING, *LOSSES, part(KLCov)])
def test_renamed_and_nested_keys(make):
    module = make()
    batch = _one()
    expected = module(batch.clone())
    held = {("deep", f"my_{key}"): batch[present_key(batch, key)] for key in module.in_keys}
    moved = TensorDict(held, batch.batch_size)
    in_keys = [("deep", f"my_{key}") for key in module.in_keys]
    out_keys = [("out", f"my_{key}") for key in module.out_keys]
    out = make(in_keys=in_keys, out_keys=out_keys)(moved)
    for key in module.out_keys:
        assert torch.equal(out["out", f"my_{key}"], expected[key]), key


@every([*SHAPING, *LOSSES, part(KLCov)])
def test_missing_keys_are_named(make):
    module = make()
    batch = _one()
    for key in module.in_keys:
        names = [key]
        while names[-1] in FALLBACK:
            names.append(FALLBACK[names[-1]])
        with pytest.raises(KeyError) as error:
            module(batch.exclude(*names))
        needs = " or ".join(map(repr, names))
        # The score may be read by another role of the same module, which is then named first.
        assert (
            f"{make.func.__name__} needs {needs}; the batch holds [" in str(error.value) or "score" in names
        )
        assert "prompt_ids" in str(error.value)


@every(LOSSES)
def test_losses_return_a_scalar_tensordict(make):
    module = make()
    batch = _one()
    keys = set(batch.keys())
    out = module(batch)
    assert isinstance(module, BatchLoss)
    assert out.batch_size == torch.Size([])
    assert list(out.keys()) == module.out_keys
    assert all(value.shape == () and value.dtype == torch.float32 for value in out.values())
    assert str(module.out_keys[0]).startswith("loss_")
    assert set(batch.keys()) == keys


@every([part(GAE), part(KLPenalty, 0.1), part(ClippedSurrogate), part(Whiten)])
def test_wrong_batches_are_named(make):
    module = make()
    batch = _one()
    mask = batch["response_mask"].clone()
    who = make.func.__name__
    first = module.in_keys[0]

    mask[1] = torch.arange(mask.shape[1]) > 0 if mask.shape[1] > 1 else mask[1]
    wide = torch.cat([mask, mask], 1) & (torch.arange(2 * mask.shape[1]) > 0)
    with pytest.raises(ValueError, match=f"{who}: 'response_mask' has shape .* needs T="):
        module(batch.clone().set("response_mask", wide))
    with pytest.raises(ValueError, match=f"{who}: 'response_mask' is torch.int64, needs torch.bool"):
        module(batch.clone().set("response_mask", batch["response_mask"].long()))
    with pytest.raises(ValueError, match=rf"{who}: '{first}' has shape \[3, \d, 1\], needs \[B,T\]"):
        module(batch.clone().set(first, batch[first][..., None]))
    unbatched = TensorDict(batch.to_dict(), [])
    with pytest.raises(ValueError, match=rf"{who}: batch_size is \[\], needs one dimension"):
        module(unbatched)
    two = batch.clone().apply(lambda x: torch.cat([x, x], 1) if x.ndim == 2 else x)
    two["response_mask"][1, 0] = False
    with pytest.raises(
        ValueError, match=rf"{who}: 'response_mask' row 1 is not right-padded \(valid slots \[1"
    ):
        module(two)
