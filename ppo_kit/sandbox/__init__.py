"""A small dialogue world with a gold reward, in which over-optimization of a reward model can be seen."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.sandbox.build import sandbox_models, sandbox_policy, sandbox_reward_model
    from ppo_kit.sandbox.corpus import (
        sandbox_config,
        sandbox_dialogues,
        sandbox_gold,
        sandbox_pairs,
        sandbox_prompts,
    )
    from ppo_kit.sandbox.gold import gold_reward
    from ppo_kit.sandbox.tokenizer import sandbox_tokenizer
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = [
    "gold_reward",
    "sandbox_config",
    "sandbox_dialogues",
    "sandbox_gold",
    "sandbox_models",
    "sandbox_pairs",
    "sandbox_policy",
    "sandbox_prompts",
    "sandbox_reward_model",
    "sandbox_tokenizer",
]
