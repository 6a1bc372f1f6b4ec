"""access (pure): the RPCs that there are, by path, and the words that stand for several of them in a grant.

A path that is not in this table does not exist for callers whose access is checked, so a new RPC is closed until it has
a place here (tests/integration/test_access.py compares the table with what the gateway serves).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

HEALTH: Final = "Health"
REFLECTION: Final = "Reflection"

_TYPED: Final = {
    "Classify": "ClassificationService",
    "StreamClassify": "ClassificationService",
    "Predict": "PredictionService",
    "StreamPredict": "PredictionService",
    "Rank": "RankingService",
    "Read": "ReadingService",
    "Converse": "SpeechService",
    "Speak": "SpeechService",
    "Translate": "TextService",
    "TranslateStream": "TextService",
}

_REPORTS: Final = {"Report": "OutcomeService", "ReportStream": "OutcomeService"}

INFERENCE: Final = ("ModelInfer", "ModelStreamInfer", *_TYPED)
OUTCOMES: Final = tuple(_REPORTS)
METADATA: Final = ("ServerMetadata", "ModelReady", "ModelMetadata")
DETAILS: Final = ("RepositoryIndex", "ModelConfig", "ModelStatistics")
CONTROL: Final = (
    "RepositoryModelLoad", "RepositoryModelUnload",
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister",
    "TraceSetting", "LogSettings",
)  # fmt: skip
PROBES: Final = ("ServerLive", "ServerReady", HEALTH)
"""What load balancers and Kubernetes ask, and what tells nothing of models."""

STREAMING: Final = frozenset(
    {
        "ModelStreamInfer",
        "StreamClassify",
        "StreamPredict",
        "Converse",
        "Speak",
        "TranslateStream",
        "ReportStream",
        REFLECTION,
    }
)

WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "inference": INFERENCE,
    "outcomes": OUTCOMES,
    "metadata": METADATA,
    "details": DETAILS,
    "control": CONTROL,
}
"""Words for several RPCs. `control` has those that change a server, and those that read its memory's layout."""

NAMED: Final = (*INFERENCE, *OUTCOMES, *METADATA, *DETAILS, *CONTROL, REFLECTION)
"""The RPCs that a grant may name."""


def _paths() -> dict[bytes, str]:
    typed = {**_TYPED, **_REPORTS}
    every = [*INFERENCE, *OUTCOMES, *METADATA, *DETAILS, *CONTROL, *PROBES]
    v2 = [name for name in every if name not in typed and name != HEALTH]
    paths = {f"/inference.GRPCInferenceService/{name}": name for name in v2}
    paths.update({f"/gateway.v1.{service}/{name}": name for name, service in typed.items()})
    paths.update({f"/grpc.health.v1.Health/{name}": HEALTH for name in ("Check", "List", "Watch")})
    for version in ("v1", "v1alpha"):
        paths[f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"] = REFLECTION
    return {path.encode(): name for path, name in paths.items()}


PATHS: Final = _paths()
"""The RPC of each path. Paths are compared byte for byte, as everywhere behind this."""


def named_by(words: Iterable[str]) -> frozenset[str]:
    """The RPCs that these words and names stand for."""
    return frozenset(name for word in words for name in WORDS.get(word, (word,)))
