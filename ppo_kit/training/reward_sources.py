"""What a run is made of, by name, before anything is loaded: policy, rewards with their weights, prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tensordict.nn import TensorDictModuleBase

from ppo_kit.rewards import RewardSpec, parse_rewards

RewardSource: TypeAlias = "str | Callable[..., Any] | TensorDictModuleBase"
"""One reward: a specification as for ``--reward``, a function of texts, or a module that writes ``score``."""
RewardSources: TypeAlias = "RewardSource | Sequence[RewardSource] | Mapping[str, RewardSource]"


def reward_sources(rewards: RewardSources) -> dict[str, tuple[Any, float]]:
    """{name: (what scores, its weight)}: specifications are parsed, and nothing is loaded.

    Raises:
        ValueError: there is none, two have one name, or a specification is none.
    """
    if isinstance(rewards, Mapping):
        named = [(str(name), source) for name, source in rewards.items()]
    else:
        many = [rewards] if isinstance(rewards, str) or not isinstance(rewards, Sequence) else rewards
        named = [("", source) for source in many]
    found: dict[str, tuple[Any, float]] = {}
    for name, source in named:
        for each in parse_rewards([source]) if isinstance(source, str) else [source]:
            spec = isinstance(each, RewardSpec)
            own = each.name if spec else getattr(each, "__name__", type(each).__name__)
            key = name or re.sub(r"\W", "_", own)
            if key in found:
                raise ValueError(
                    f"reward: got two of the name {key!r}; name them: {{name: reward}} or NAME=TARGET"
                )
            found[key] = (each, each.weight if spec else 1.0)
    if not found:
        raise ValueError("reward: got none, needs at least one")
    return found


def inputs_of(policy: Any, rewards: Mapping[str, tuple[Any, float]], prompts: Any) -> dict[str, Any]:
    """What a run reads, by name or path: a resumed run has to find the same again."""
    targets = {
        f"reward {name}": source.target
        for name, (source, _) in rewards.items()
        if isinstance(source, RewardSpec) and source.kind != "sandbox"
    }
    named = {"policy": policy, "prompts": prompts, **targets}
    return {
        key: value for key, value in named.items() if isinstance(value, str | Path) and value != "sandbox"
    }


def described(policy: Any, rewards: Mapping[str, tuple[Any, float]], prompts: Any) -> dict[str, str]:
    """What a run is made of, in words for the model card."""
    base = policy if isinstance(policy, str) else f"a {type(policy).__name__} given in Python"
    scores = []
    for name, (source, weight) in rewards.items():
        target = source.target if isinstance(source, RewardSpec) else "given in Python"
        scores.append(f"{name} ({target}), weight {weight:g}")
    listed = prompts if isinstance(prompts, str | Path) else f"{len(prompts or ())} given in Python"
    from_sandbox = "the sandbox's" if prompts is None and policy == "sandbox" else str(listed)
    return {"policy": base, "rewards": "; ".join(scores), "prompts": from_sandbox}


def reward_models(rewards: Mapping[str, tuple[Any, float]]) -> dict[str, str]:
    """{name of a reward that is a model of the user's own: its folder or Hub id}."""
    return {
        name: source.target
        for name, (source, _) in rewards.items()
        if isinstance(source, RewardSpec) and source.kind == "model"
    }
