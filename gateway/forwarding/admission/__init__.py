"""Admission: no more calls at a model's servers than these can do. Pure; `call` acts."""

from gateway.forwarding.admission.gate import FULL, TOO_LATE, Gate, Refused
from gateway.forwarding.admission.gates import AUTO, NONE, AdmissionSettings, GateKey, Gates
from gateway.forwarding.admission.limit import AdaptiveLimit
from gateway.forwarding.admission.turn import Place, Turn, found_full

__all__ = [
    "AUTO",
    "FULL",
    "NONE",
    "TOO_LATE",
    "AdaptiveLimit",
    "AdmissionSettings",
    "Gate",
    "GateKey",
    "Gates",
    "Place",
    "Refused",
    "Turn",
    "found_full",
]
