"""Test a component of your own: strategies that make batches, and checks that fail with the smallest one.

>>> from ppo_kit.modules import GAE
>>> check_padding_invariance(GAE(gamma=0.9))

``docs/testing.md`` shows each check on a component with a planted bug.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("ppo_kit.testing needs hypothesis: pip install 'hypothesis>=6.100'") from error

from ppo_kit.testing.invariance import (
    check_holes,
    check_padding_invariance,
    check_row_order,
    check_split_invariance,
)
from ppo_kit.testing.oracles import check_against_loop, check_gradients, check_state_roundtrip
from ppo_kit.testing.strategies import batches

__all__ = [
    "batches",
    "check_against_loop",
    "check_gradients",
    "check_holes",
    "check_padding_invariance",
    "check_row_order",
    "check_split_invariance",
    "check_state_roundtrip",
]
