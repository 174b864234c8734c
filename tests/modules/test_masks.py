"""Which mask each part reads, what is read where one is absent, and what a mask may look like."""

import pytest
import torch
from tensordict import TensorDict

import ppo_kit.modules as modules
from ppo_kit.batch import check_batch
from ppo_kit.modules import (
    GAE,
    GRPO,
    OPO,
    RLOO,
    BatchLoss,
    BatchModule,
    ClippedSurrogate,
    DropTruncated,
    KLPenalty,
    LengthPenalty,
    PlaceScore,
    SquaredValueLoss,
    Whiten,
    with_counts,
)

YES = torch.ones(1, 3, dtype=torch.bool)
HOLE = torch.tensor([[True, False, True]])


def batch_of(**values) -> TensorDict:
    held = {
        key: value if isinstance(value, torch.Tensor) else torch.tensor(value)
        for key, value in values.items()
    }
    return TensorDict({"response_mask": YES, **held}, [1])


def test_each_part_reads_the_mask_of_its_kind():
    public = [getattr(modules, name) for name in modules.__all__]
    roles = {
        part.__name__: [key for key in part.IN if str(key).endswith("_mask")]
        for part in public
        if isinstance(part, type) and issubclass(part, BatchModule)
    }
    lengths = {"LengthPenalty", "OverlongPenalty"}
    for name, masks in roles.items():
        part = getattr(modules, name)
        if name == "BatchLoss" or not masks:
            continue
        trained = issubclass(part, BatchLoss) or name == "DropTruncated"
        expected = "loss_mask" if trained else "response_mask" if name in lengths else "action_mask"
        assert masks == [expected], name


def test_the_narrowest_mask_there_is_is_read():
    batch = batch_of(values=[[1.0, 2.0, 3.0]], returns=[[0.0, 0.0, 0.0]])
    loss = SquaredValueLoss()
    found = [float(loss(batch)["loss_value"])]
    for key in ("action_mask", "loss_mask"):
        batch[key] = HOLE if key == "action_mask" else torch.tensor([[False, False, True]])
        found.append(float(loss(batch)["loss_value"]))
    assert found == pytest.approx([14 / 6, 10 / 4, 9 / 2])
    assert with_counts(batch)["num_tokens"].tolist() == [1]
    assert with_counts(batch, mask_key="response_mask")["num_tokens"].tolist() == [3]
    renamed = SquaredValueLoss(in_keys=["values", "returns", "response_mask"])
    assert float(renamed(batch.exclude("num_tokens"))["loss_value"]) == pytest.approx(14 / 6)
    mine = SquaredValueLoss(in_keys=["values", "returns", "my_mask"])
    with pytest.raises(KeyError, match="SquaredValueLoss needs 'my_mask'; the batch holds"):
        mine(batch)


def test_rewards_land_on_the_last_action_and_lengths_are_of_the_response():
    batch = batch_of(score=[2.0], shaped_score=[2.0], action_mask=[[True, True, False]])
    assert PlaceScore()(batch)["rewards"].tolist() == [[0.0, 2.0, 0.0]]
    assert LengthPenalty(0.5)(batch)["shaped_score"].tolist() == [0.5]


def test_kl_and_whitening_are_over_actions():
    batch = batch_of(
        rewards=[[0.0, 0.0, 0.0]],
        old_log_probs=[[-1.0, -9.0, -1.0]],
        ref_log_probs=[[-2.0, -1.0, -2.0]],
        advantages=[[1.0, 100.0, 3.0]],
        action_mask=HOLE,
    )
    assert KLPenalty(1.0)(batch)["kl"].tolist() == [[1.0, 0.0, 1.0]]
    white = Whiten()(batch)["advantages"][0].tolist()
    assert white == pytest.approx([-(0.5**0.5), 0.0, 0.5**0.5])


def test_a_hole_gives_the_advantages_of_the_compacted_sequence():
    """The middle token is a tool's: δ and λ skip it, at γ = 1, λ = 0.95."""
    batch = batch_of(rewards=[[0.0, 0.0, 1.0]], old_values=[[0.3, 9.0, 0.6]], action_mask=HOLE)
    for module in (GAE(1.0, 0.95), torch.compile(GAE(1.0, 0.95), fullgraph=True, backend="eager")):
        torch.testing.assert_close(module(batch.clone())["advantages"], torch.tensor([[0.68, 0.0, 0.4]]))


@pytest.mark.parametrize(
    "make", [LengthPenalty(0.1), PlaceScore(), SquaredValueLoss(), Whiten(), GAE(), RLOO()]
)
def test_a_response_mask_with_holes_is_refused_by_name(make):
    batch = batch_of(
        score=[1.0], rewards=[[0.0, 0.0, 1.0]], group_id=[0],
        **{key: [[1.0, 2.0, 3.0]] for key in ("values", "old_values", "returns", "advantages")},
    )  # fmt: skip
    batch["response_mask"] = HOLE
    name = type(make).__name__
    with pytest.raises(ValueError, match=f"{name}: 'response_mask' row 0 is not right-padded"):
        make(batch.clone())
    torch._dynamo.reset()
    compiled = torch.compile(make, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=f"{name}: 'response_mask' is not right-padded"):
        compiled(batch.clone())
    batch["response_mask"] = YES
    compiled(batch.clone())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mask", ["response_mask", "action_mask", "loss_mask"])
def test_masks_of_the_wrong_type_are_named(mask, compiled):
    batch = batch_of(**{key: [[1.0, 2.0, 3.0]] for key in ("log_probs", "old_log_probs", "advantages")})
    batch[mask] = torch.ones(1, 3)
    loss = ClippedSurrogate()
    with pytest.raises(ValueError, match=f"ClippedSurrogate: '{mask}' is torch.float32, needs torch.bool"):
        loss(batch)
    if compiled:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=f"'{mask}' is torch.float32"):
            torch.compile(loss, fullgraph=True, backend="eager")(batch)


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [("response_mask", "action_mask"), ("response_mask", "loss_mask"), ("action_mask", "loss_mask")],
)
def test_each_mask_is_a_subset_of_the_one_above(wide, narrow):
    batch = batch_of(response_mask=[[True, True, False]])
    batch[wide] = torch.tensor([[True, False, False]])
    batch[narrow] = torch.tensor([[True, False, False]])
    check_batch(batch)
    batch[narrow] = torch.tensor([[False, True, False]])
    with pytest.raises(ValueError, match=f"{narrow}: row 0, slot 1 is True and False in {wide}"):
        check_batch(batch)


@pytest.mark.parametrize("ids", [[7, -1, -1], [-1, -1, 7], [-2, -1, -1], [5, 5, 5], [3, 4, 4]])
@pytest.mark.parametrize("module", [RLOO(), GRPO(scale=False), OPO()], ids=lambda m: type(m).__name__)
def test_a_row_without_an_action_belongs_to_no_group(module, ids):
    """Whatever the ids, −1 among them: the other rows get what they get in a batch without it."""
    mask = torch.tensor([[False], [True], [True]])
    batch = TensorDict(
        {
            "rewards": torch.tensor([[9.0], [1.0], [3.0]]),
            "group_id": torch.tensor(ids),
            "response_mask": mask,
        },
        [3],
    )
    alone = module(batch[1:].clone())["advantages"].flatten().tolist()
    assert module(batch)["advantages"].flatten().tolist() == [0.0, *alone]
    if isinstance(module, RLOO) and ids[1] == ids[2]:
        assert alone == [-2.0, 2.0]


def test_a_dropped_row_counts_in_the_baseline_of_its_group():
    batch = TensorDict(
        {
            "rewards": torch.tensor([[1.0], [3.0]]),
            "group_id": torch.tensor([0, 0]),
            "response_mask": torch.ones(2, 1, dtype=torch.bool),
            "truncated": torch.tensor([False, True]),
        },
        [2],
    )
    assert RLOO()(DropTruncated()(batch))["advantages"].flatten().tolist() == [-2.0, 2.0]
