"""What a signal that asks to stop means."""

from __future__ import annotations

import pytest

from gateway.process.stopping import Stop, StopSignals

DRAIN, AGAIN, NOW = Stop.DRAIN, Stop.AGAIN, Stop.NOW


@pytest.mark.parametrize(
    ("moments", "meanings"),
    [
        pytest.param([5.0], [DRAIN], id="the first one drains"),
        pytest.param([5.0, 5.0], [DRAIN, AGAIN], id="the second one of a pair asks for nothing new"),
        pytest.param([5.0, 15.0], [DRAIN, AGAIN], id="also at the end of the grace"),
        pytest.param([5.0, 15.1], [DRAIN, NOW], id="after the grace it cuts"),
        pytest.param([5.0, 5.0, 6.0, 7.0], [DRAIN, AGAIN, NOW, NOW], id="a third one cuts"),
    ],
)
def test_only_a_third_signal_or_one_after_the_grace_means_now(moments: list[float], meanings: list[Stop]) -> None:
    signals = StopSignals(grace=10.0)
    assert [signals.arrived(moment) for moment in moments] == meanings
