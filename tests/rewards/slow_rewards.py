"""Rewards for worker processes, which have to be importable: a process does not know a test's functions."""

from __future__ import annotations

import os
import time


def words(prompts, responses, batch):
    return [float(len(response.split()) + batch["truncated"].sum()) for response in responses]


def hangs_on_rice(prompts, responses, batch):
    if "rice" in prompts[0]:
        time.sleep(60)
    return [1.0]


def dies_on_rice(prompts, responses, batch):
    if "rice" in prompts[0]:
        os._exit(3)
    return [float(os.getpid())]


def leaves_on_rice(prompts, responses, batch):
    if "rice" in prompts[0]:
        os._exit(0)
    return [1.0]


class Counting:
    """How often this very object was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, responses, batch):
        self.calls += 1
        return [float(self.calls)]
