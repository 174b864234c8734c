"""Policy, reference, critic and reward models: transformers' models that read and write the batch."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.models.cache import cache_folder, cached, settings_key
    from ppo_kit.models.load import (
        freeze_below,
        load_causal_lm,
        load_scalar_model,
        load_tokenizer,
    )
    from ppo_kit.models.lora import LoRA
    from ppo_kit.models.policy import Policy, Reference
    from ppo_kit.models.probe import check_policy, check_positions, check_scalar
    from ppo_kit.models.save import save_model
    from ppo_kit.models.scoring import Bootstrap, Critic, RewardModel
    from ppo_kit.models.source import model_source
    from ppo_kit.models.vocabulary import (
        check_embeddings,
        check_same_vocabulary,
        ids_with_token,
        text_difference,
    )
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = [
    "Bootstrap",
    "Critic",
    "LoRA",
    "Policy",
    "Reference",
    "RewardModel",
    "cache_folder",
    "cached",
    "check_embeddings",
    "check_policy",
    "check_positions",
    "check_same_vocabulary",
    "check_scalar",
    "freeze_below",
    "ids_with_token",
    "load_causal_lm",
    "load_scalar_model",
    "load_tokenizer",
    "model_source",
    "save_model",
    "settings_key",
    "text_difference",
]
