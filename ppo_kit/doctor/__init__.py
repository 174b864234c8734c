"""Preflight on a user's own models, prompts and settings (``docs/doctor.md``)."""

from ppo_kit.doctor.examine import CHECKS, examine
from ppo_kit.doctor.finding import Finding
from ppo_kit.doctor.subject import Subject

__all__ = ["CHECKS", "Finding", "Subject", "examine"]
