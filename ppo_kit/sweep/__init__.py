"""Many runs at once: recipes under several settings and seeds, cached, resumable, in parallel."""

from ppo_kit.sweep.job import Job
from ppo_kit.sweep.pool import FailedJobs, run_jobs

__all__ = ["FailedJobs", "Job", "run_jobs"]
