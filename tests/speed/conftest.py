"""The benchmarks' own modules, which are no package of ours."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "speed"))
