"""shadowing: copies of a share of a model's requests go to another variant, whose answers only the gateway sees.

`shadows` sends them, `judge` says what an answer is worth beside the caller's, `parity` whether the variant may stand
in for others.
"""

from gateway.forwarding.shadowing.judge import Judged, Pair, judge
from gateway.forwarding.shadowing.parity import Parity, ParitySettings
from gateway.forwarding.shadowing.shadows import ModelShadow, Shadows, ShadowSettings

__all__ = ["Judged", "ModelShadow", "Pair", "Parity", "ParitySettings", "ShadowSettings", "Shadows", "judge"]
