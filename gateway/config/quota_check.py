"""Config: findings about quotas that need more than one field. Pure: a config in, problems out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from urllib.parse import urlsplit

from gateway.access.door import CALLER
from gateway.config.findings import Path, Problem, Severity, known
from gateway.config.quotas import CallerLimits, QuotaLimits, SharedQuotas
from gateway.config.schema import Config
from gateway.config.units import duration_text
from gateway.quotas import OTHERS

_RATES = ("requests", "bytes", "rows")


def check_quotas(config: Config) -> Iterator[Problem]:
    quotas = config.quotas
    if quotas.caller is None and config.checked_access is None and quotas.callers:
        wrong = "names callers, and nothing says by what they are known"
        yield Problem(("quotas", "callers"), wrong, "set access, or quotas.caller")
    if quotas.caller not in (None, CALLER) and config.checked_access is not None:
        wrong = f"lets each caller choose whose quota he uses, since clients themselves say '{quotas.caller}'"
        right = "leave it out, so that a caller is who access knows him to be; keep it if a proxy sets it"
        yield Problem(("quotas", "caller"), wrong, right, Severity.WARNING)
    if OTHERS in quotas.callers:
        wrong = "is what metrics call all callers together who are not named here, whose numbers it would share"
        yield Problem(("quotas", "callers", OTHERS), wrong, "another name", Severity.WARNING)
    callers: dict[Path, CallerLimits] = {("quotas", "default"): quotas.default}
    callers |= {("quotas", "callers", name): caller for name, caller in quotas.callers.items()}
    for path, caller in callers.items():
        yield from _quota(path, caller, config)
        for name, limits in caller.models.items():
            yield from _model((*path, "models", name), name, config)
            yield from _quota((*path, "models", name), limits, config)
        yield from _beside(path, caller)
    for name, limits in quotas.models.items():
        yield from _model(("quotas", "models", name), name, config)
        yield from _quota(("quotas", "models", name), limits, config)
    if quotas.shared is not None:
        yield from _shared(quotas.shared, config)


def _model(path: Path, name: str, config: Config) -> Iterator[Problem]:
    """Triton's own names may be called too, as `direct.models` says."""
    own = {variant.model for model in config.models.values() for variant in (model.variants or {}).values()}
    if name in config.models or config.direct.models == "all" or (config.direct.models == "variants" and name in own):
        return
    yield Problem(path, f"no model '{name}'", known(tuple(config.models), name))


def _quota(path: Path, quota: QuotaLimits, config: Config) -> Iterator[Problem]:
    """Problems of one quota by itself."""
    says = [name for name in _RATES if getattr(quota, name) is not None]
    if "burst" in quota.model_fields_set and not says:
        yield Problem((*path, "burst"), "has no effect without a rate", "requests, bytes or rows", Severity.WARNING)
    if quota.concurrent is not None and quota.concurrent < config.workers:
        wrong = f"is {quota.concurrent}, and each of {config.workers} workers lets in at least one"
        yield Problem((*path, "concurrent"), wrong, f"at least {config.workers}, or fewer workers", Severity.WARNING)
    if quota.requests is not None and quota.requests * quota.burst < config.workers and config.quotas.shared is None:
        wrong = (
            f"gives less than one request at once to each of {config.workers} workers, which lets in one all the same"
        )
        if config.workers > 1:
            yield Problem((*path, "requests"), wrong, "a longer burst, or fewer workers", Severity.WARNING)


def _beside(path: Path, caller: CallerLimits) -> Iterator[Problem]:
    """A caller's quota for a model that is above the one for all models never counts."""
    for name, limits in caller.models.items():
        for what in (*_RATES, "concurrent"):
            of_model, of_all = getattr(limits, what), getattr(caller, what)
            if of_model is not None and of_all is not None and of_model > of_all:
                wrong = f"is {of_model:.15g}, above the {of_all:.15g} of this caller for all models together"
                yield Problem((*path, "models", name, what), wrong, f"at most {of_all:.15g}", Severity.WARNING)


def _shared(shared: SharedQuotas, config: Config) -> Iterator[Problem]:
    path = ("quotas", "shared")
    if importlib.util.find_spec("redis") is None:
        yield Problem(path, "needs the extra `quotas`", "pip install 'inference-gateway[quotas]'")
    if shared.password_file is not None and urlsplit(shared.url).password:
        yield Problem((*path, "password_file"), "there is a password in 'url' too", "one of the two")
    if shared.timeout < shared.period:
        wrong = f"is {duration_text(shared.timeout)}, below 'period' ({duration_text(shared.period)})"
        yield Problem((*path, "timeout"), wrong, "at least as long", Severity.WARNING)
    quotas = config.quotas
    callers = (quotas.default, *quotas.callers.values())
    limits = [*callers, *quotas.models.values(), *(each for caller in callers for each in caller.models.values())]
    if not any(getattr(each, what) is not None for each in limits for what in _RATES):
        yield Problem(path, "has no effect: no quota has a rate", "requests, bytes or rows", Severity.WARNING)
