"""Preflight on a user's own models, prompts and settings (``docs/doctor.md``)."""

from typing import TYPE_CHECKING

from ppo_kit.lazy import load_on_first_use

if TYPE_CHECKING:
    from ppo_kit.doctor.checks import CHECKS, examine
    from ppo_kit.doctor.finding import Finding
    from ppo_kit.doctor.subject import Subject
else:
    __getattr__, __dir__ = load_on_first_use(__name__)

__all__ = ["CHECKS", "Finding", "Subject", "examine"]
