"""I/O: `explain`: which variant a call would get, by a config and by what its store knows, and why."""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from gateway.commands.arguments import Commands, add_command, draw, pair, say
from gateway.errors import CommandFailed

if TYPE_CHECKING:
    from gateway.config import Config
    from gateway.experiments.epochs import Epochs
    from gateway.experiments.rollout import RolloutKey, State


def add(commands: Commands) -> None:
    explain = add_command(commands, "explain", _explain, "say which variant a call would get, and why; exit 1 if none")
    explain.add_argument("file", metavar="FILE")
    explain.add_argument("--model", required=True, help="public model that the call names")
    explain.add_argument("--version", default="", help="model version that the call asks for")
    explain.add_argument(
        "--metadata", nargs="+", default=[], metavar="K=V", action="extend", type=pair, help="of the call"
    )
    explain.add_argument(
        "--parameter", nargs="+", default=[], metavar="K=V", action="extend", type=pair, help="of the V2 request"
    )
    explain.add_argument(
        "--admin", metavar="HOST:PORT", help="of a running gateway: also say its breakers, limits and retries now"
    )
    explain.add_argument(
        "--as", dest="caller", metavar="CALLER", help="also say what this caller may do with the model"
    )
    explain.add_argument("--draw", type=draw, metavar="X", help="the number in [0, 1) to draw by (default: random)")


def _explain(arguments: argparse.Namespace) -> int:
    from gateway.access.door import CALLER  # noqa: PLC0415
    from gateway.assemble import policy_of, quotas_of, routes_of  # noqa: PLC0415
    from gateway.config import load  # noqa: PLC0415
    from gateway.explain import explain_access, explain_call, explain_quotas, finds_model  # noqa: PLC0415
    from gateway.forwarding.metadata import first_values  # noqa: PLC0415
    from gateway.quotas import Quotas  # noqa: PLC0415
    from gateway.types import Facts  # noqa: PLC0415

    loaded = load(arguments.file, os.environ)
    metadata = first_values((key.lower(), value) for key, value in arguments.metadata)  # as in a call
    facts = Facts(metadata, dict(arguments.parameter), arguments.version)
    drawn = random.random() if arguments.draw is None else arguments.draw  # noqa: S311
    states, lines = _rollout_states(loaded.config, arguments)
    stopped, epochs, told = _experiments(loaded.config, arguments)
    lines += told
    routes = routes_of(loaded.config, stopped, states, epochs)
    if arguments.caller is not None:
        facts.metadata = {**metadata, CALLER: arguments.caller}
        if loaded.config.checked_access is None:
            lines.append("access is not checked: everybody may call everything")
        else:
            policy = policy_of(loaded.config.checked_access)
            lines += explain_access(policy, routes, loaded.pipelines, arguments.caller, arguments.model)
    lines += explain_call(routes, loaded.pipelines, arguments.model, facts, draw=drawn)
    quotas = Quotas()
    quotas.apply(replace(quotas_of(loaded.config), workers=1), None)  # as the file has them, and not a worker's share
    if quotas.is_on:
        lines += explain_quotas(quotas, loaded.pipelines, arguments.model, facts)
    say("\n".join(lines))
    code = 0 if finds_model(routes, loaded.pipelines, arguments.model, facts) else 1
    if arguments.admin:
        code = _explain_now(arguments.admin, arguments.model, quotas.name_of(metadata)) or code
    return code


def _rollout_states(config: Config, arguments: argparse.Namespace) -> tuple[Mapping[RolloutKey, State], list[str]]:
    """How far the rollout of the model is, as the store says, and a line about that."""
    model = config.models.get(arguments.model)
    if model is None or model.rollout is None:
        return {}, []
    from gateway.experimentation.rollout_commands import RolloutCommands  # noqa: PLC0415

    name, key = model.rollout.name, model.rollout.plan(arguments.model).key
    try:
        states = RolloutCommands.of(config).states()
    except CommandFailed as error:
        return {}, [f"rollout {name}: {error}; as long as nothing is known it has moved nobody"]
    state = states[key]
    why = f", since {state.reason}" if state.reason else ""
    return states, [f"rollout {name} is {state.phase.value} at a share of {state.share:.4g}, says the store{why}"]


def _experiments(
    config: Config, arguments: argparse.Namespace
) -> tuple[Mapping[str, str], Mapping[str, Epochs], list[str]]:
    """Of the model's experiments, as the store says: the arms of those that were stopped, the epochs of bandits, and
    lines about both."""
    from gateway.config.experiment_file import plans_of  # noqa: PLC0415

    plans = {name: plan for name, plan in plans_of(config).items() if plan.model == arguments.model}
    if not plans:
        return {}, {}, []
    from gateway.experimentation.reports import Source  # noqa: PLC0415
    from gateway.experimentation.store_settings import store_settings_of  # noqa: PLC0415

    settings = store_settings_of(config)
    try:
        with Source(plans, settings.url, settings.unit_key).store() as store:
            stops, found = store.stops(), store.epochs(list(plans))
    except CommandFailed as error:
        unknown = {True: "all units have the baseline", False: "it counts as not stopped"}
        whys = {name: unknown[plan.bandit is not None] for name, plan in plans.items()}
        return {}, {}, [f"experiment {name}: {error}; as long as nothing is known {why}" for name, why in whys.items()]
    stopped, lines = {name: stop.arm for name, stop in stops.items()}, []
    for name, plan in plans.items():
        epochs = found.get(name)
        if name in stopped:
            lines.append(f"experiment {name} was stopped, and everybody gets '{stopped[name]}', says the store")
        elif plan.bandit is not None and (epochs is None or not epochs.is_of(plan)):
            lines.append(f"experiment {name} is a bandit of which no epoch has begun, says the store")
        elif plan.bandit is not None and epochs is not None:
            where = f"epoch {len(epochs.so_far)} of {epochs.slices}, by {epochs.so_far[-1].units} rewards"
            lines.append(f"experiment {name} is a bandit in {where}, says the store")
    return stopped, found, lines


def _explain_now(admin: str, model: str, caller: str) -> int:
    import json  # noqa: PLC0415
    from urllib.request import urlopen  # noqa: PLC0415

    from gateway.explain import explain_now, quotas_now  # noqa: PLC0415

    try:
        with urlopen(f"http://{admin.removeprefix('http://').rstrip('/')}/state", timeout=5) as answer:
            state = json.load(answer)
    except (OSError, ValueError) as error:
        print(f"{admin} does not say how it stands: {error}", file=sys.stderr)  # noqa: T201
        return 1
    say("\n".join([*explain_now(state, model), *quotas_now(state, caller, model)]))
    return 0 if model in state["models"] or model in state["pipelines"] else 1
