"""access (pure): which models, by which RPCs and with which parameters, a caller may use.

Grants only add. A caller for whom none holds may use nothing, and a model that he may not use does not exist for him.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from gateway.access.principal import NOBODY, Principal
from gateway.access.rpcs import HEALTH
from gateway.errors import BadRequest
from gateway.types import Parameter

ALL: Final = "all"
SHARED_MEMORY: Final = "shared_memory"
SEQUENCES: Final = "sequences"
PRIORITY: Final = "priority"
TIMEOUT: Final = "timeout"
RESERVED: Final = "reserved"
ALLOWANCES: Final = (ALL, SHARED_MEMORY, SEQUENCES, PRIORITY, TIMEOUT, RESERVED)

_HARMLESS: Final = frozenset({"triton_enable_empty_final_response"})  # tritonclient's own, for decoupled models
_OF_SEQUENCES: Final = ("sequence_id", "sequence_start", "sequence_end")
_UNLOADS_OTHERS: Final = "unload_dependents"
_MOST_SHOWN: Final = 100  # characters of a parameter's name in an error


@dataclass(frozen=True, slots=True)
class Names:
    """Names of models, some by how they begin."""

    exact: frozenset[str] = frozenset()
    beginnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, patterns: Iterable[str]) -> Names:
        """patterns: names; one that ends with `*` stands for every name that begins so."""
        all_of_them = tuple(patterns)
        return cls(
            frozenset(name for name in all_of_them if not name.endswith("*")),
            tuple(name[:-1] for name in all_of_them if name.endswith("*")),
        )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.exact or name.startswith(self.beginnings))


@dataclass(frozen=True, slots=True)
class Grant:
    """What some callers may do."""

    callers: frozenset[str] = frozenset()  # by name
    groups: frozenset[str] = frozenset()
    everybody: bool = False  # all who have shown who they are
    anonymous: bool = False  # everybody, and those who have not
    public: Names = Names()
    direct: Names = Names()  # Triton's own names
    rpcs: frozenset[str] = frozenset()
    allow: frozenset[str] = frozenset()  # of `ALLOWANCES`
    most_bytes: int | None = None  # of one message; None: as the server's limit

    def holds_for(self, principal: Principal) -> bool:
        if self.anonymous:
            return True
        if principal is NOBODY:
            return False
        return self.everybody or principal.name in self.callers or not self.groups.isdisjoint(principal.groups)

    def covers(self, model: str, is_public: bool) -> bool:
        if is_public:
            return model in self.public
        return model in self.direct and not is_path(model)


def is_path(name: str) -> bool:
    """Would a name lead elsewhere as the name of a model's folder?"""
    return "/" in name or "\\" in name or name in (".", "..") or "\0" in name


@dataclass(frozen=True, slots=True, eq=False)
class Scope:
    """What one caller may do by one RPC. Callers with the same grants share it, so views may be kept by it."""

    grants: tuple[Grant, ...]

    def covers(self, model: str, is_public: bool) -> bool:
        """May the model be used? This is the one place where that is decided."""
        for grant in self.grants:  # a loop and not any(): no generator on the hot path  # noqa: SIM110
            if grant.covers(model, is_public):
                return True
        return False

    def allowed(self, model: str, is_public: bool) -> frozenset[str]:
        """What may be in requests for a model."""
        found: frozenset[str] = frozenset()
        for grant in self.grants:
            if grant.covers(model, is_public):
                found |= grant.allow
        return found

    @property
    def most_bytes(self) -> int | None:
        """Of one message: the largest of the grants' limits; None if one has none."""
        limits = [grant.most_bytes for grant in self.grants]
        return None if not limits or None in limits else max(limit for limit in limits if limit is not None)

    @property
    def allows_all(self) -> bool:
        """May requests for every model have anything in them?"""
        return all(ALL in grant.allow for grant in self.grants)


NOTHING: Final = Scope(())


class Policy:
    """The grants in force."""

    def __init__(self, grants: Sequence[Grant], groups: Mapping[str, frozenset[str]]) -> None:
        """groups: of callers by their names, beside those that a token says."""
        self.grants = tuple(grants)
        self._groups = groups
        self._scope = lru_cache(4096)(Scope)  # equal grants, one scope

    def known(self, principal: Principal) -> Principal:
        """The caller with the groups that the config gives him."""
        return principal.with_groups(self._groups.get(principal.name, frozenset()))

    def maybe_scope(self, principal: Principal, rpc: str) -> Scope | None:
        """What a caller may do by one RPC; None if he may not call it at all."""
        mine = [grant for grant in self.grants if grant.holds_for(principal)]
        if rpc == HEALTH:  # who may use a model in any way may ask for its health
            return self._scope(tuple(mine))
        mine = [grant for grant in mine if rpc in grant.rpcs]
        return self._scope(tuple(mine)) if mine else None


def check_parameters(names: Mapping[str, Parameter], allowed: frozenset[str]) -> None:
    """Refuse parameters that Triton itself acts on and that this caller may not set.

    :raises BadRequest: with the name of the parameter.
    """
    if not names or ALL in allowed:
        return
    for name in names:
        word = _allowance_for(name)
        if word and word not in allowed:
            raise not_allowed(f"parameter '{name[:_MOST_SHOWN]}'", word)


def check_change(parameters: Mapping[str, Any], allowed: frozenset[str]) -> None:
    """Refuse parameters of a load or unload that reach beyond the model that it names.

    `config` and `file:…` make any model of it, also an ensemble of models that this caller may not use;
    `unload_dependents` unloads others.

    parameters: of RepositoryModelLoad or -Unload, ModelRepositoryParameter by name.
    :raises BadRequest: with the name of the parameter.
    """
    if ALL in allowed:
        return
    for name, value in parameters.items():
        asks_for_nothing = name == _UNLOADS_OTHERS and not value.bool_param  # tritonclient always sends it
        if not asks_for_nothing:
            raise not_allowed(f"parameter '{name[:_MOST_SHOWN]}'", ALL)


def not_allowed(what: str, word: str) -> BadRequest:
    return BadRequest(f"{what} is not for this caller; a grant with `allow: [{word}]` in the gateway's config lets it")


def _allowance_for(parameter: str) -> str:
    """What a caller needs to set a parameter; "" if that is open to all."""
    if parameter in _OF_SEQUENCES:
        return SEQUENCES
    if parameter in (PRIORITY, TIMEOUT):
        return parameter
    if parameter.startswith(SHARED_MEMORY):
        return SHARED_MEMORY
    if (parameter.startswith("triton_") and parameter not in _HARMLESS) or parameter == "headers":
        return RESERVED
    return ""
