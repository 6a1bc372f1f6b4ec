"""shadowing: copies of a share of a model's requests go to another variant, whose answers only the gateway sees.

`shadows` sends them, `comparison` compares their answers with the callers', `glance` those that are small and agree,
`parity` whether the variant may stand in for others.
"""

from gateway.forwarding.shadowing.comparison import Compared, Pair, compare
from gateway.forwarding.shadowing.parity import Parity, ParitySettings
from gateway.forwarding.shadowing.shadows import ModelShadow, Shadows, ShadowSettings

__all__ = ["Compared", "ModelShadow", "Pair", "Parity", "ParitySettings", "ShadowSettings", "Shadows", "compare"]
