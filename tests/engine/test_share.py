"""The rows of a batch that one rank works on."""

import torch
from tensordict import TensorDict

from ppo_kit.batch import MASKS
from ppo_kit.engine import ranks


def test_a_repeated_row_of_a_rank_has_no_token_in_any_mask(monkeypatch):
    """Three rows over two ranks: rank 1 repeats row 0, which may count in no loss and no statistic."""
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    batch = TensorDict({key: torch.ones(3, 2, dtype=torch.bool) for key in MASKS}, [3])
    mine = ranks.share(batch)
    for key in MASKS:
        assert mine[key].any(1).tolist() == [True, False]
        assert batch[key].all()
