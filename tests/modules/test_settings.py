"""Every constructor argument of every module, and what it refuses by name."""

import inspect
import math

import pytest
import torch
from tensordict import TensorDict

import ppo_kit.modules as modules
from ppo_kit.modules import (
    GAE,
    PIKL,
    AdaptiveKL,
    FixedKL,
    KLLoss,
    KLPenalty,
    PlaceScore,
    ScoreClip,
    SumScores,
    micro_batches,
    minibatches,
)

NO_NUMBER = [math.nan, None, "0.95", True, torch.tensor(0.5)]
FINITE = [*NO_NUMBER, math.inf, -math.inf]
NOT_NEGATIVE = [*FINITE, -0.1]
POSITIVE = [*NOT_NEGATIVE, 0]
UNIT = [*FINITE, -0.1, 1.1]
OPEN_ABOVE = [*NO_NUMBER, -0.1]
WHOLE = [*POSITIVE, 2.5]
FLAG = [None, 1, "yes", 0.0]
FUNCTION = [3, "sum", torch.zeros(())]
KEYS = ["score", [3], [("a", 1)], ["a"] * 9]


def without(values, *allowed):
    """``values`` but for those that the argument takes (None is a choice of some)."""
    return [value for value in values if not any(value is one for one in allowed)]


EVERY = {"in_keys": KEYS, "out_keys": KEYS}
LOSS = EVERY | {"weight": NOT_NEGATIVE, "aggregate": ["mean", 3]}
CLIP = {"clip_low": UNIT, "clip_high": OPEN_ABOVE}
BAD = {
    "GAE": EVERY | {
        "gamma": UNIT, "lam": UNIT, "critic_lam": without(UNIT, None), "bootstrap": FLAG,
    },
    "MonteCarlo": EVERY | {"gamma": UNIT, "baseline": FLAG},
    "RLOO": EVERY,
    "OPO": EVERY,
    "ReMax": EVERY,
    "GRPO": EVERY | {"scale": FLAG, "eps": NOT_NEGATIVE},
    "ScoreNormalize": EVERY | {"eps": POSITIVE, "reduce": [None, *FUNCTION]},
    "ScoreScale": EVERY | {"eps": POSITIVE, "reduce": [None, *FUNCTION]},
    "ScoreClip": EVERY | {"delta": POSITIVE},
    "PlaceScore": EVERY,
    "SumScores": EVERY | {"weights": [{}, None, 3, *({"a": bad} for bad in FINITE)]},
    "ScoreWhiten": EVERY | {"shift_mean": FLAG, "eps": NOT_NEGATIVE},
    "LengthPenalty": EVERY | {"per_token": NOT_NEGATIVE, "free": without([*NOT_NEGATIVE, 2.5])},
    "OverlongPenalty": EVERY | {"max_length": WHOLE, "buffer": [*WHOLE, 9], "weight": NOT_NEGATIVE},
    "MissingEndPenalty": EVERY | {"penalty": NOT_NEGATIVE},
    "DropTruncated": EVERY,
    "KLPenalty": EVERY | {
        "controller": NOT_NEGATIVE, "kind": ["k4", "k3_weighted", None], "cap": without(POSITIVE, None),
        "reduce": [None, *FUNCTION],
    },
    "Whiten": EVERY | {
        "key": [3, None], "shift_mean": FLAG, "eps": NOT_NEGATIVE, "reduce": FUNCTION,
    },
    "Clip": EVERY | {"delta": POSITIVE, "key": [3, None]},
    "TruncatedImportance": EVERY | {"cap": POSITIVE},
    "ClippedSurrogate": LOSS | {
        "clip": UNIT, "clip_high": without(OPEN_ABOVE, None), "dual_clip": without([*OPEN_ABOVE, 1.0], None),
    },
    "SquaredValueLoss": LOSS,
    "ClippedValueLoss": LOSS | {"clip": POSITIVE},
    "HuberValueLoss": LOSS | {"delta": POSITIVE},
    "EntropyBonus": LOSS | {"target": without(NOT_NEGATIVE, None)},
    "LanguageModelLoss": LOSS,
    "KLLoss": LOSS | {"kind": ["k1", "k4", None], "cap": without(POSITIVE, None)},
    "PolicyGradient": LOSS,
    "ImportanceSampling": LOSS,
    "PPOPenalty": LOSS | {"beta": NOT_NEGATIVE},
    "KLCov": LOSS | {"fraction": [*UNIT, 0], "beta": NOT_NEGATIVE},
    "CISPO": LOSS | CLIP,
    "GSPO": LOSS | CLIP,
    "GMPO": LOSS | {"log_clip_low": OPEN_ABOVE, "log_clip_high": OPEN_ABOVE},
    "PairwiseLoss": EVERY | {"lm_weight": NOT_NEGATIVE, "margin": NOT_NEGATIVE},
    "FixedKL": {"coef": NOT_NEGATIVE},
    "AdaptiveKL": {"init": POSITIVE, "target": POSITIVE, "horizon": POSITIVE},
    "PIKL": {"init": POSITIVE, "target": POSITIVE, "horizon": POSITIVE, "gain": NOT_NEGATIVE},
    "ConstantMean": {"length": WHOLE},
}  # fmt: skip
"""Class -> argument -> values that it has to refuse."""
GOOD = {
    "ScoreClip": {"delta": 0.5}, "SumScores": {"weights": {"a": 1.0, "b": 2.0}}, "Clip": {"delta": 0.5},
    "LengthPenalty": {"per_token": 0.1}, "OverlongPenalty": {"max_length": 8, "buffer": 2},
    "KLPenalty": {"controller": 0.1},
    "EntropyBonus": {"weight": 0.1}, "KLLoss": {"weight": 0.1}, "PPOPenalty": {"beta": 0.1},
    "FixedKL": {"coef": 0.1}, "AdaptiveKL": {"init": 0.1, "target": 0.1, "horizon": 10},
    "PIKL": {"init": 0.1, "target": 0.1, "horizon": 10}, "ConstantMean": {"length": 5},
}  # fmt: skip
ABSTRACT = {"BatchModule", "BatchLoss", "ResponseAdvantage", "KLController", "Counts", "Objective", "Shaping"}
ABSTRACT |= {"Float64Buffers"}


def arguments(kind) -> set[str]:
    """The names that the constructor takes, those of ``Unpack`` included."""
    names = set()
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.add(name)
        elif "LossKeys" in str(parameter.annotation):
            names |= {"weight", "aggregate", "in_keys", "out_keys"}
        elif "AggregateKeys" in str(parameter.annotation):
            names |= {"aggregate", "in_keys", "out_keys"}
        else:
            names |= {"in_keys", "out_keys"}
    return names - {"self", "extra"}


def test_no_argument_is_forgotten():
    public = {name for name in modules.__all__ if inspect.isclass(getattr(modules, name))} - ABSTRACT
    assert public == set(BAD)
    for name in public:
        assert arguments(getattr(modules, name)) == set(BAD[name]), name


@pytest.mark.parametrize(
    ("kind", "argument"), [(kind, argument) for kind, table in BAD.items() for argument in table]
)
def test_what_is_out_of_range_is_refused_by_name(kind, argument):
    make = getattr(modules, kind)
    make(**GOOD.get(kind, {}))
    for bad in BAD[kind][argument]:
        named = "in_keys" if argument == "key" else "weight" if argument == "weights" else argument
        with pytest.raises(ValueError, match=f"^{kind}: {named}"):
            make(**GOOD.get(kind, {}) | {argument: bad})


@pytest.mark.parametrize(
    ("kind", "old", "new", "value"),
    [
        ("EntropyBonus", "region", "target", 2.0),
        ("GSPO", "clip", "clip_low", 0.1),
        ("CISPO", "clip", "clip_low", 0.1),
        ("GMPO", "log_clip", "log_clip_low", 0.1),
    ],
)
def test_an_old_name_is_taken_for_a_release_with_a_warning(kind, old, new, value):
    make, good = getattr(modules, kind), GOOD.get(kind, {})
    with pytest.warns(DeprecationWarning, match=f"^{kind}: {old} is called {new} now"):
        assert getattr(make(**good, **{old: value}), new) == value
    with pytest.raises(TypeError, match=f"got both {old} and {new}"):
        make(**good, **{old: value, new: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScoreClip(0), "ScoreClip: delta got 0, needs a number in (0, inf)"),
        (lambda: GAE(gamma=1.1), "GAE: gamma got 1.1, needs a number in [0, 1]"),
        (lambda: SumScores({}), "SumScores: weights got {}"),
        (
            lambda: KLLoss(0.1, kind="k1"),
            "KLLoss: kind got 'k1', whose gradient does not depend on the reference",
        ),
        (lambda: KLPenalty(0.1, kind="k4"), "KLPenalty: kind got 'k4', needs one of ['k1', 'k2', 'k3']"),
        (lambda: GAE(in_keys=["rewards"]), "GAE: in_keys got ['rewards'], needs 3 in the order"),
        (lambda: PlaceScore(out_keys="rewards"), "PlaceScore: out_keys got 'rewards', needs a list of keys"),
    ],
)
def test_messages_say_what_was_got_and_what_is_needed(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared below
        make()
    assert message in str(error.value)


@pytest.mark.parametrize("controller", [AdaptiveKL(0.1, 0.05, 10), PIKL(0.1, 0.05, 10)])
def test_updates_are_checked(controller):
    name = type(controller).__name__
    for bad in [math.nan, math.inf, None, "1"]:
        with pytest.raises(ValueError, match=f"{name}: kl got {bad!r}"):
            controller.update(bad, 1)
    for bad in [-1, 2.5, None]:
        with pytest.raises(ValueError, match=f"{name}: num got {bad!r}"):
            controller.update(0.1, bad)
    assert float(controller.coef) == pytest.approx(0.1)


@pytest.mark.parametrize(("gain", "num"), [(1e6, 1), (0.5, 10**9), (0.0, 10**10)])
@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_a_controller_that_runs_away_says_so(gain, num, kl):
    """Not "math range error"; and it never becomes 0 or inf, from which it could not come back."""
    controller = PIKL(0.1, target=0.05, horizon=10, gain=gain)
    with pytest.raises(ValueError, match=r"PIKL: the coefficient became .*; needs a larger horizon"):
        controller.update(kl, num)
    assert float(controller.coef) == 0.1
    adaptive = AdaptiveKL(1.7e308, target=0.05, horizon=10)
    with pytest.raises(ValueError, match="AdaptiveKL: the coefficient became inf"):
        adaptive.update(1.0, 10)


@pytest.mark.parametrize("cut", [minibatches, micro_batches])
def test_cuts_are_checked(cut):
    batch = TensorDict({"response_mask": torch.ones(2, 3, dtype=torch.bool)}, [2])
    extra = {"generator": torch.Generator()} if cut is minibatches else {}
    for bad in [0, -1, 2.5, None, math.nan]:
        with pytest.raises(ValueError, match=f"{cut.__name__}: size: got {bad!r}"):
            list(cut(batch, bad, **extra))
    with pytest.raises(ValueError, match=f"{cut.__name__}: the batch has no row"):
        list(cut(batch[:0], 2, **extra))


@pytest.mark.parametrize(
    "make",
    [
        *(lambda name=name: getattr(modules, name)() for name in ("ScoreNormalize", "ScoreScale")),
        lambda: FixedKL(0.1),
        lambda: AdaptiveKL(0.1, 0.05, 10),
        lambda: PIKL(0.1, 0.05, 10),
        lambda: modules.KLPenalty(AdaptiveKL(0.1, 0.05, 10)),
        lambda: modules.Shaping(modules.ScoreNormalize(), modules.KLPenalty(PIKL(0.1, 0.05, 10))),
        lambda: torch.nn.Sequential(modules.ScoreScale()),
    ],
)
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: m.type(torch.float16),
        lambda m: m._apply(lambda x: x.half()),
        lambda m: m.to(torch.zeros((), dtype=torch.float16)),
    ],
)
def test_a_cast_narrows_no_state(make, cast):
    module = make()
    for buffer in module.buffers():
        buffer.fill_(1e5 + 1 / 3)
    assert list(module.buffers())
    cast(module)
    for name, buffer in module.named_buffers():
        assert buffer.dtype == torch.float64, name
        assert float(buffer) == 1e5 + 1 / 3


def test_every_buffer_of_a_module_is_float64():
    for name in BAD:
        module = getattr(modules, name)(**GOOD.get(name, {}))
        if isinstance(module, torch.nn.Module):
            assert all(buffer.dtype == torch.float64 for buffer in module.buffers()), name


def test_state_moves_between_devices():
    module = modules.ScoreNormalize().to("meta")
    assert all(buffer.device.type == "meta" and buffer.dtype == torch.float64 for buffer in module.buffers())


def test_a_cast_normalizer_goes_on_learning():
    """1,200 rollouts of 64 are more than float16 counts."""
    batch = TensorDict({"score": torch.randn(64, generator=torch.Generator().manual_seed(0))}, [64])
    cast, plain = modules.ScoreNormalize().half(), modules.ScoreNormalize()
    for _ in range(1200):
        cast.update(batch)
        plain.update(batch)
    assert torch.equal(cast(batch.clone())["shaped_score"], plain(batch.clone())["shaped_score"])
    adaptive = AdaptiveKL(0.1, 0.05, 100_000).bfloat16()
    adaptive.update(1.0, 1)
    assert float(adaptive.coef) == pytest.approx(0.1 * (1 + 0.2 / 100_000), rel=1e-12)
