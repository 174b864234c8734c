"""Where the time of a step goes, and what to change: ``ppo-kit profile`` (docs/speed.md)."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.profile.advise import Machine, advice
    from ppo_kit.profile.findings import Operator, Part, Profile
    from ppo_kit.profile.recorder import Recorder
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = ["Machine", "Operator", "Part", "Profile", "Recorder", "advice"]
