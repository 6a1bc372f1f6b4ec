"""The images' recipe and the compose file: as far as can be told without an engine to build and run them."""

from __future__ import annotations

import asyncio
import fnmatch
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyOptions
from deployment_files import KUBERNETES, ROOT, tool

from gateway.admin import Admin
from gateway.cli import _parser
from gateway.config import load, split_endpoint
from gateway.models.releases import CHECKED, DEPLOYED

DOCKER = ROOT / "deploy" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")


def stages() -> dict[str, list[str]]:
    """The instructions of each stage of the Dockerfile, by the stage's name."""
    found: dict[str, list[str]] = {}
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("FROM "):
            name = line.rpartition(" AS ")[2]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def of(stage: str, instruction: str) -> list[str]:
    """What the instructions of a kind say in a stage."""
    return [line.partition(" ")[2].strip() for line in stages()[stage] if line.startswith(instruction + " ")]


# The Dockerfile


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("stage", ["gateway", "models", "tensorrt"])
def test_no_image_runs_as_root(stage: str) -> None:
    (user,) = of(stage, "USER")
    uid, _, gid = user.partition(":")
    assert int(uid) > 0, "a number: Kubernetes can't tell whether a name is root"
    assert int(gid) > 0


def test_the_gateways_user_is_the_one_that_kubernetes_gives_it() -> None:
    deployment = next(yaml.safe_load_all((KUBERNETES / "base" / "deployment.yaml").read_text().split("---\n", 1)[1]))
    pod = deployment["spec"]["template"]["spec"]["securityContext"]
    assert of("gateway", "USER") == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]


def test_packages_are_those_of_the_constraints() -> None:
    installs = [line for lines in stages().values() for line in lines if re.search(r"\bpip\b.* install ", line)]
    assert len(installs) == 4
    assert all("-c constraints.txt" in line for line in installs)


def test_the_image_says_what_is_in_it() -> None:
    """By a tool that is pinned, over the very environment that is copied, and that is not left in it."""
    (told,) = [line for line in of("build", "RUN") if "cyclonedx-py environment" in line]
    assert re.search(r"cyclonedx-bom==\d", told)
    assert "/opt/gateway/share/inference-gateway.cdx.json /opt/gateway/bin/python" in re.sub(r"\s+", " ", told)
    assert told.endswith("rm -rf /opt/sbom")
    assert "--from=build /opt/gateway /opt/gateway" in of("gateway", "COPY")


def test_base_images_are_pinned_to_a_version() -> None:
    images = re.findall(r"^(?:ARG \w+=|FROM )([^$\s]+:\S+)", DOCKERFILE, re.MULTILINE)
    assert len(images) == 4
    assert all(re.search(r":\d+(\.\d+)+", image) for image in images), images


def test_every_image_of_nvidia_is_of_the_release_that_the_table_deploys() -> None:
    """And plans are built with the TensorRT that runs them."""
    files = [*DOCKER.rglob("*"), *KUBERNETES.rglob("*.yaml")]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    assert set(re.findall(r"tritonserver:(\S+)", text)) == {f"{DEPLOYED.container}-py3"}
    assert set(re.findall(r"nvidia/tensorrt:(\S+)", text)) == {f"{DEPLOYED.builder}-py3"}
    assert set(re.findall(r"runtimeVersion: (\S+)", text)) == {f"{DEPLOYED.container}-py3"}
    tags = set(re.findall(r"inference-gateway-tensorrt:(\S+)", text))
    assert {tag.partition("-")[2] for tag in tags} == {DEPLOYED.builder}


def test_the_deployed_release_was_at_most_half_a_year_old_when_the_table_was_looked_over() -> None:
    year, month = map(int, DEPLOYED.container.split("."))
    assert (CHECKED.year - 2000 - year) * 12 + CHECKED.month - month <= 6


def test_an_environment_in_a_foreign_image_needs_no_venv_of_its_python() -> None:
    """NVIDIA's images and Debian's python3 lack ensurepip, without which a plain `venv` ends with an error."""
    made = [line for lines in stages().values() for line in lines if "-m venv" in line]
    assert len(made) == 3
    assert all("-m venv --without-pip " in line for line in made)


def test_the_images_command_is_one_that_the_program_has() -> None:
    (entrypoint,) = of("gateway", "ENTRYPOINT")
    (command,) = of("gateway", "CMD")
    assert json.loads(entrypoint) == ["inference-gateway"]
    _parser().parse_args(json.loads(command))


class Alive:
    """Says that it lives, or not."""

    def __init__(self, live: bool) -> None:
        self.live = live

    def is_live(self) -> bool:
        return self.live

    def readiness(self) -> tuple[bool, Sequence[str]]:
        return False, ["no Triton"]

    def state(self) -> Mapping[str, object]:
        return {}

    config = state


@pytest.mark.parametrize("live", [True, False])
async def test_the_health_check_tells_a_process_that_lives_whatever_is_behind_it(live: bool) -> None:
    check = re.search(r"HEALTHCHECK .*?CMD (\[.*\])", DOCKERFILE.replace("\\\n", ""))
    assert check
    async with Admin(Alive(live), "127.0.0.1:0", lambda _: (b"", "")) as admin:
        _, *arguments = (each.replace("127.0.0.1:9002", admin.address) for each in json.loads(check[1]))
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=asyncio.subprocess.DEVNULL)
        assert (await process.wait() == 0) is live


def context() -> list[Path]:
    """The files that the build sees, by the rules of Dockerfile.dockerignore: the last pattern that matches decides."""
    rules = [
        line.strip()
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [Path(name) for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    return [file for file in files if _is_seen(file, rules)]


def _is_seen(file: Path, rules: Sequence[str]) -> bool:
    names = [str(file), *(str(parent) for parent in file.parents if str(parent) != ".")]
    seen = True
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        if any(fnmatch.fnmatchcase(name, pattern) for name in (names if pattern != "*" else [names[-1]])):
            seen = rule.startswith("!")
    return seen


def test_everything_that_is_copied_is_in_the_context_and_tests_are_not() -> None:
    files = context()
    for stage in stages():
        for copied in of(stage, "COPY"):
            if copied.startswith("--from"):
                continue
            *sources, _ = shlex.split(copied)
            for source in sources:
                assert any(file == Path(source) or Path(source) in file.parents for file in files), source
    assert not [file for file in files if file.parts[0] in ("tests", "deploy", "docs", "perf")]


# compose


@pytest.fixture(scope="module")
def compose() -> Mapping[str, Any]:
    text = (DOCKER / "compose.yaml").read_text()
    options = PyOptions()
    options.apply_merge = True  # of `<<`, as Docker does
    options.from_yaml(text).validate()
    found: Mapping[str, Any] = yaml.safe_load(text)
    return found


def test_docker_would_read_the_compose_file(compose: Mapping[str, Any]) -> None:
    assert compose["services"].keys() >= {"gateway", "triton-cpu", "triton-gpu", "prometheus", "grafana"}


def test_every_service_is_pinned_and_what_is_built_is_a_target_of_the_dockerfile(compose: Mapping[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert re.search(r":v?\d", service["image"]), name
        if "build" in service:
            assert service["build"]["target"] in stages()
            assert (DOCKER / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_every_file_that_is_mounted_is_there(compose: Mapping[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in compose["volumes"], source


@pytest.mark.parametrize(("profile", "expected"), [("cpu", {"triton-cpu", "models"}), ("gpu", {"triton-gpu"})])
def test_a_profile_brings_its_triton_and_what_that_depends_on(
    compose: Mapping[str, Any], profile: str, expected: set[str]
) -> None:
    services = compose["services"]
    up = {name for name, service in services.items() if profile in service.get("profiles", [profile])}
    assert up >= expected | {"gateway", "otel-collector", "prometheus", "grafana"}
    assert {needed for name in up for needed in services[name].get("depends_on", ())} <= up


def test_only_this_host_reaches_what_has_no_password(compose: Mapping[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_gateway_cannot_write_to_its_file_system(compose: Mapping[str, Any]) -> None:
    gateway = compose["services"]["gateway"]
    assert gateway["read_only"] is True
    assert all(volume.endswith(":ro") for volume in gateway["volumes"])
    assert gateway["cap_drop"] == ["ALL"]


def test_the_composed_gateways_config_is_good_and_names_services_and_models_that_they_load(
    compose: Mapping[str, Any], tmp_path: Path
) -> None:
    gateway = compose["services"]["gateway"]
    for volume in gateway["volumes"]:
        source, target, _ = volume.split(":")
        (tmp_path / target[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / target[1:]).symlink_to((DOCKER / source).resolve())
    loaded = load(tmp_path / "etc/inference-gateway/config/gateway.yaml", {})
    assert not loaded.warnings
    server = loaded.config.server
    assert int(gateway["stop_grace_period"].removesuffix("s")) >= server.drain_delay + server.drain + 5
    for model in loaded.config.models.values():
        for variant in (model.variants or {}).values():
            host, port = split_endpoint(loaded.config.upstreams[variant.upstream].endpoints[0])
            assert port == 8001
            assert f"--load-model={variant.model}" in compose["services"][host]["command"]


def test_everybody_who_is_named_in_a_config_is_a_service(compose: Mapping[str, Any]) -> None:
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yaml").read_text())
    named = {
        target.partition(":")[0]
        for job in prometheus["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    }
    collector = yaml.safe_load((DOCKER / "config" / "otel-collector.yaml").read_text())
    named |= {exporter["endpoint"].partition(":")[0] for exporter in collector["exporters"].values()}
    text = json.dumps(compose)
    named |= set(re.findall(r"http://([a-z][\w-]*):", text)) - {"localhost"}
    assert named <= compose["services"].keys()


def test_the_collectors_pipelines_are_made_of_what_it_defines() -> None:
    collector = yaml.safe_load((DOCKER / "config" / "otel-collector.yaml").read_text())
    for pipeline in collector["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= collector[kind].keys()
        assert pipeline["processors"][0] == "memory_limiter", "it must refuse before anything is kept"


def test_the_image_has_what_its_features_need() -> None:
    """Without SciPy there would be no alarm of the sample ratio, and nothing would say so."""
    installed = re.search(r'"\.\[([a-z,]+)\]"', " ".join(stages()["build"]))
    assert installed is not None
    assert {"access", "experiments", "postgresql", "quotas"} <= set(installed[1].split(","))
