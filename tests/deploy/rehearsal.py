"""A cluster without one: the objects that kustomize builds, as processes of this host.

A container's command runs as the manifests have it, with its environment, its arguments, and its volumes as folders;
the kubelet's part is played by `Pod` (init containers, probes, preStop hook, SIGTERM, grace period), the controllers'
by `Cluster` (Deployments roll, Jobs run, Services list the pods that are ready, names answer with them). A claimed
volume is one folder for all pods. Time is not scaled.

Three things differ from containers, since processes share one network and one file system. A pod's address is one of
127.0.0.0/8, and its servers are told to listen there, on the manifests' ports. Paths of mounts lie under the pod's own
folder, so they are rewritten where arguments and environment name them. And names of Services are answered by a file
that a `sitecustomize` reads in place of a name server, which only root could set up.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from balancing import Service
from deployment_files import ROOT, Object
from manifests import of_kind, only, resolved, selects

from gateway.models.catalogue import build
from gateway.triton import install

BACK_OFF_SECONDS = 10.0
"""Before a container that ended is started again, the first time."""

REMOVAL_SECONDS = 1.0
"""From a pod's end until Services and names have left it out: endpoint controller, kube-proxy, CoreDNS' watch."""

NAMES = """
import json, os, socket

_ask = socket.getaddrinfo

def getaddrinfo(host, port, *args, **kwargs):
    with open(os.environ["REHEARSAL_NAMES"]) as file:
        names = json.load(file)
    if host in names and not names[host]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    found = names.get(host, [host])
    return [entry for each in found for entry in _ask(each, port, *args, **kwargs)]

socket.getaddrinfo = getaddrinfo
"""

Folders = Mapping[str, Path]
"""Path in an image → the folder that stands for it, of images that are only copied from."""


def models_image(folder: Path) -> Folders:
    """What the image `models` has, as far as a CPU pool loads it, built as its Dockerfile does."""
    repository = folder / "models"
    shutil.copytree(ROOT / "model_repository", repository)
    build(["efficientnet_lite0_onnx", "efficientnet_lite0_onnx_int8"], repository)
    return {"/models": repository}


class Pod:
    """One pod, from its first init container to its end."""

    def __init__(self, cluster: Cluster, name: str, template: Mapping[str, Any]) -> None:
        self.cluster = cluster
        self.name = name
        self.labels: Mapping[str, str] = template["metadata"]["labels"]
        self.spec: Mapping[str, Any] = template["spec"]
        self.template = template
        self.ip = cluster.next_ip()
        self.folder = cluster.folder / name
        self.is_ready = False
        self.is_ending = False
        self.restarts = 0  # for the sake of a liveness probe; counted, not played
        self.crashes = 0
        self.exit_code: int | None = None
        self._volumes: dict[str, Path] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._kubelet: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Of the container's process; 0 if none runs."""
        return self._process.pid if self._process and self._process.returncode is None else 0

    @property
    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log")))

    async def start(self) -> None:
        """Volumes, init containers, the container. Readiness comes later."""
        await self._prepare()
        (container,) = self.spec["containers"]
        self._process = await self._run(container)
        self._kubelet = asyncio.ensure_future(self._look_after(container))

    async def run_to_end(self) -> int:
        """The same of a Job's pod; its exit code."""
        await self._prepare()
        (container,) = self.spec["containers"]
        return await (await self._run(container)).wait()

    async def _prepare(self) -> None:
        self.folder.mkdir()
        for volume in self.spec.get("volumes", ()):
            self._volumes[volume["name"]] = self._volume(volume)
        for container in self.spec.get("initContainers", ()):
            process = await self._run(container)
            assert await process.wait() == 0, self.log

    async def until_ready(self, within: float, *, may_crash: bool = False) -> None:
        end = time.monotonic() + within
        while not self.is_ready:
            assert time.monotonic() < end, self.log[-3000:]
            assert may_crash or not self.crashes, self.log[-3000:]
            await asyncio.sleep(0.05)

    async def until_crashed(self, within: float) -> None:
        end = time.monotonic() + within
        while not self.crashes:
            assert time.monotonic() < end, self.log[-3000:]
            await asyncio.sleep(0.05)

    async def delete(self) -> float:
        """As the kubelet ends a pod: preStop hook, SIGTERM, SIGKILL after the grace period; how long it took."""
        assert self._process is not None
        began = time.monotonic()
        self.is_ending = True
        self.cluster.changed()
        grace = self.spec["terminationGracePeriodSeconds"]
        (container,) = self.spec["containers"]
        hook = container.get("lifecycle", {}).get("preStop")
        if hook:
            assert hook.keys() == {"sleep"}, "only sleeping hooks are played"
            await asyncio.sleep(min(hook["sleep"]["seconds"], grace))
        self._process.send_signal(signal.SIGTERM)
        try:
            self.exit_code = await asyncio.wait_for(self._process.wait(), grace - (time.monotonic() - began))
        except (TimeoutError, asyncio.TimeoutError):
            self.exit_code = -signal.SIGKILL
        await self.kill()
        return time.monotonic() - began

    async def kill(self) -> None:
        """Leave nothing of it."""
        if self._kubelet:
            self._kubelet.cancel()
            await asyncio.gather(self._kubelet, return_exceptions=True)
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    # Containers

    def _volume(self, volume: Mapping[str, Any]) -> Path:
        if "persistentVolumeClaim" in volume:
            return self.cluster.claim(volume["persistentVolumeClaim"]["claimName"])
        folder = self.folder / "volumes" / volume["name"]
        folder.mkdir(parents=True)
        if "configMap" in volume:
            data = only(self.cluster.objects, "ConfigMap", volume["configMap"]["name"])["data"]
            self._lay_out(folder, data, "..turn-0")
        elif "secret" in volume:
            self._lay_out(folder, self.cluster.secrets[volume["secret"]["secretName"]], "..turn-0")
        else:
            assert "emptyDir" in volume, volume
        return folder

    def turn(self, config_map: str, generation: str) -> None:
        """Lay out a ConfigMap anew in the volumes that are made of it."""
        for volume in self.spec.get("volumes", ()):
            if volume.get("configMap", {}).get("name") == config_map:
                data = only(self.cluster.objects, "ConfigMap", config_map)["data"]
                self._lay_out(self._volumes[volume["name"]], data, generation)

    def _lay_out(self, folder: Path, data: Mapping[str, str], generation: str) -> None:
        """Links to `..data`, which is a link to a folder that is replaced as a whole."""
        (folder / generation).mkdir()
        for name, content in data.items():
            (folder / generation / name).write_text(content)
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(Path("..data") / name)
        (folder / "..new").symlink_to(generation)
        (folder / "..new").rename(folder / "..data")

    async def _run(self, container: Mapping[str, Any]) -> asyncio.subprocess.Process:
        root = self.folder / container["name"]
        mounts = {mount["mountPath"]: self._volumes[mount["name"]] for mount in container.get("volumeMounts", ())}
        for path, volume in mounts.items():
            _link(root / path[1:], volume)
        image = container["image"].rpartition(":")[0].rpartition("/")[2]
        for path, folder in self.cluster.images.get(image, {}).items():
            _link(root / path[1:], folder)
            mounts[path] = folder
        environment = self._environment(container)
        command = [*container.get("command", self.cluster.entry_points.get(image, ())), *container.get("args", ())]
        command = [_inside(root, mounts, _expanded(part, environment)) for part in command]
        environment = {name: _inside(root, mounts, value) for name, value in environment.items()}
        program, listening, more = self.cluster.program(command[0])
        if container in self.spec["containers"]:
            command += [argument.format(ip=self.ip, **self._ports()) for argument in listening]
        with (self.folder / f"{container['name']}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *program,
                *command[1:],
                env={**more, **environment, "REHEARSAL_NAMES": str(self.cluster.names)},
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )

    def _environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        fields = {"metadata.name": self.name, "status.podIP": self.ip}
        environment: dict[str, str] = {}
        for variable in container.get("env", ()):
            value = variable.get("value")
            if value is None:
                value = fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            environment[variable["name"]] = _expanded(value, environment)
        return environment

    def _ports(self) -> dict[str, int]:
        (container,) = self.spec["containers"]
        return {port["name"]: port["containerPort"] for port in container["ports"]}

    # Probes

    async def _look_after(self, container: Mapping[str, Any]) -> None:
        """Probe it while it runs; start it again when it ends by itself."""
        while True:
            assert self._process is not None
            probing = asyncio.ensure_future(self._probe(container))
            try:
                await self._process.wait()
            finally:
                probing.cancel()
                await asyncio.gather(probing, return_exceptions=True)
            if self.is_ending:
                return
            self.crashes += 1
            self._set_ready(False)
            await asyncio.sleep(BACK_OFF_SECONDS)
            self._process = await self._run(container)

    async def _probe(self, container: Mapping[str, Any]) -> None:
        startup = container["startupProbe"]
        for _ in range(startup["failureThreshold"]):
            if await self._asked(startup):
                break
            await asyncio.sleep(startup.get("periodSeconds", 10))
        else:
            raise AssertionError(f"{self.name} did not start: {self.log[-3000:]}")
        await asyncio.gather(
            self._repeatedly(container["readinessProbe"], self._set_ready),
            self._repeatedly(container["livenessProbe"], self._set_live),
        )

    async def _repeatedly(self, probe: Mapping[str, Any], tell: Callable[[bool], None]) -> None:
        failures = 0
        while True:
            failures = 0 if await self._asked(probe) else failures + 1
            if failures == 0:
                tell(True)
            elif failures >= probe.get("failureThreshold", 3):
                tell(False)
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _asked(self, probe: Mapping[str, Any]) -> bool:
        port = resolved(probe["httpGet"]["port"], self.template)
        timeout = aiohttp.ClientTimeout(total=probe.get("timeoutSeconds", 1))
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, asyncio.TimeoutError):
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"http://{self.ip}:{port}{probe['httpGet']['path']}") as answer,
            ):
                return 200 <= answer.status < 400
        return False

    def _set_ready(self, ready: bool) -> None:
        if ready is not self.is_ready:
            self.is_ready = ready
            self.cluster.changed()

    def _set_live(self, live: bool) -> None:
        self.restarts += not live and not self.is_ending


def _link(place: Path, folder: Path) -> None:
    if not place.is_symlink():  # a container that is started again has it
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder)


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    """`$(NAME)`, as the kubelet replaces it."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), text)


def _inside(root: Path, mounts: Iterable[str], text: str) -> str:
    """Paths of mounts, where they lie in the pod's folder."""
    paths = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True))
    return re.sub(rf"(?<![\w/.])(?:{paths})(?=/|$|\s)", lambda found: f"{root}{found[0]}", text)


@dataclass
class Cluster:
    """Runs Deployments and lists their pods. `objects` are what kustomize built."""

    objects: Sequence[Object]
    folder: Path
    images: dict[str, Folders]  # by the image's name
    secrets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)  # names of other namespaces' Services, and their addresses
    pods: dict[str, list[Pod]] = field(default_factory=dict)
    services: dict[str, Service] = field(default_factory=dict)
    entry_points: dict[str, Sequence[str]] = field(default_factory=dict)
    _number: int = 0
    _turns: int = 0
    _network: str = ""
    _told: set[asyncio.Task[None]] = field(default_factory=set)
    _leaving: list[Pod] = field(default_factory=list)

    @property
    def names(self) -> Path:
        return self.folder / "names.json"

    async def __aenter__(self) -> Cluster:
        self._network = f"127.{random.randrange(64, 128)}.{random.randrange(256)}"
        dockerfile = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
        (entry,) = re.findall(r'AS gateway\n.*?ENTRYPOINT (\["[^\n]+\])', dockerfile, re.DOTALL)
        self.entry_points["inference-gateway"] = json.loads(entry)
        (self.folder / "python").mkdir()
        (self.folder / "python" / "sitecustomize.py").write_text(NAMES)
        for service in of_kind(self.objects, "Service"):
            self.services[service["metadata"]["name"]] = Service()
        self._list()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._told:
            task.cancel()
        await asyncio.gather(*self._told, return_exceptions=True)
        await asyncio.gather(*(pod.kill() for pods in (*self.pods.values(), self._leaving) for pod in pods))

    def next_ip(self) -> str:
        self._number += 1
        return f"{self._network}.{self._number}"

    def program(self, name: str) -> tuple[list[str], Sequence[str], Mapping[str, str]]:
        """What runs as an image's program; how it is told to listen at the pod's address; its environment."""
        mine = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.folder / "python")}
        if name == "inference-gateway":
            return [sys.executable, "-m", "gateway"], ("--listen={ip}:{grpc}", "--admin-listen={ip}:{admin}"), mine
        if name == "tritonserver":
            triton = install()
            listening = [f"--{kind}-address={{ip}}" for kind in ("http", "grpc", "metrics")]
            here = [f"--backend-directory={triton.backends}", f"--cache-directory={triton.caches}"]
            here += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]  # there is no GPU
            return [str(triton.tritonserver)], [*listening, *here], triton.environment
        found = shutil.which(name)
        assert found, f"{name} is not here: {shlex.quote(name)}"
        return [found], (), mine

    def claim(self, name: str) -> Path:
        """The folder of a PersistentVolumeClaim."""
        assert only(self.objects, "PersistentVolumeClaim", name)
        folder = self.folder / "claims" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def connections(self) -> set[tuple[str, str, int]]:
        """Who holds a connection to whom at which port, as Linux lists them: names of pods, or of others."""
        pods = [pod for pods in self.pods.values() for pod in pods if pod.pid]
        names = {pod.ip: pod.name for pod in pods} | {ip: name for name, ip in self.elsewhere.items()}
        return {(pod.name, names[ip], port) for pod in pods for ip, port in _peers(pod.pid) if ip in names}

    # Controllers

    async def run_job(self, prefix: str) -> Pod:
        """A Job's pod from start to end; its name ends in its image's tag. It must succeed."""
        (job,) = [each for each in of_kind(self.objects, "Job") if each["metadata"]["name"].startswith(prefix)]
        pod = Pod(self, f"{prefix}-{self._number:03}", copy.deepcopy(job["spec"]["template"]))
        assert await pod.run_to_end() == 0, pod.log
        return pod

    async def evict(self, name: str) -> tuple[Pod, asyncio.Task[float]]:
        """One pod of a Deployment goes; the one in its place, and the other's end."""
        pod = self.pods[name].pop(0)
        self._leaving.append(pod)
        going = asyncio.ensure_future(pod.delete())
        return await self._new(name, only(self.objects, "Deployment", name)["spec"]["template"]), going

    def replicas(self, name: str) -> int:
        """As the Deployment says, or as its scaler begins."""
        deployment = only(self.objects, "Deployment", name)["spec"]
        return int(deployment.get("replicas") or only(self.objects, "ScaledObject", name)["spec"]["minReplicaCount"])

    async def deploy(self, name: str) -> None:
        """A Deployment from nothing."""
        deployment = only(self.objects, "Deployment", name)["spec"]
        for _ in range(self.replicas(name)):
            await self._new(name, deployment["template"])
        await asyncio.gather(*(pod.until_ready(60) for pod in self.pods[name]))

    async def settled(self) -> None:
        """Until Services and names have heard of everything."""
        await asyncio.gather(*self._told)

    async def roll(self, name: str, objects: Sequence[Object]) -> list[Pod]:
        """A rolling update to the Deployment that `objects` have, by its own strategy; the old pods."""
        self.objects = objects
        deployment = only(objects, "Deployment", name)["spec"]
        strategy = deployment["strategy"]["rollingUpdate"]
        old, ending = [*self.pods[name]], []
        assert strategy in ({"maxSurge": 1, "maxUnavailable": 0}, {"maxSurge": 0, "maxUnavailable": 1})
        for pod in old:
            if strategy["maxSurge"] == 0:
                ending.append(asyncio.ensure_future(pod.delete()))
            new = await self._new(name, deployment["template"])
            await new.until_ready(60)
            await asyncio.sleep(deployment.get("minReadySeconds", 0))
            if strategy["maxSurge"]:
                ending.append(asyncio.ensure_future(pod.delete()))
        await asyncio.gather(*ending)
        for pod in old:
            self.pods[name].remove(pod)
        return old

    async def drain(self, name: str) -> list[Pod]:
        """All pods of a Deployment are evicted from their node, as many at once as its budget lets go; the old pods.

        A ReplicaSet makes a new one when an old one begins to end, and not before.
        """
        deployment, budget = (
            only(self.objects, "Deployment", name)["spec"],
            only(self.objects, "PodDisruptionBudget", name),
        )
        wanted = self.replicas(name) - budget["spec"]["maxUnavailable"]
        old, ending = [*self.pods[name]], []
        for pod in old:
            end = time.monotonic() + 60
            while sum(each.is_ready and not each.is_ending for each in self.pods[name]) <= wanted:
                assert time.monotonic() < end, "the budget lets nobody go"
                await asyncio.sleep(0.1)
            ending.append(asyncio.ensure_future(pod.delete()))
            await self._new(name, deployment["template"])
        await asyncio.gather(*ending, *(pod.until_ready(60) for pod in self.pods[name] if pod not in old))
        for pod in old:
            self.pods[name].remove(pod)
        return old

    def apply(self, config_map: str, data: Mapping[str, str]) -> None:
        """Other content of a ConfigMap, in the volumes of every pod that mounts it, by one turn of a link."""
        only(self.objects, "ConfigMap", config_map)["data"].update(data)
        self._turns += 1
        for pod in (pod for pods in self.pods.values() for pod in pods):
            pod.turn(config_map, f"..turn-{self._turns}")

    async def _new(self, name: str, template: Mapping[str, Any]) -> Pod:
        pod = Pod(self, f"{name}-{self._number:03}", copy.deepcopy(template))
        self.pods.setdefault(name, []).append(pod)
        await pod.start()
        return pod

    def changed(self) -> None:
        """Pods became ready, or stopped being so, or end: Services and names follow a while later."""

        async def follow() -> None:
            await asyncio.sleep(REMOVAL_SECONDS)
            self._list()

        task = asyncio.ensure_future(follow())
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    def _list(self) -> None:
        names: dict[str, list[str]] = {name: [ip] for name, ip in self.elsewhere.items()}
        pods = [pod for pods in self.pods.values() for pod in pods]
        for service in of_kind(self.objects, "Service"):
            name, spec = service["metadata"]["name"], service["spec"]
            found = [pod for pod in pods if selects(spec["selector"], pod.labels)]
            if not spec.get("publishNotReadyAddresses"):
                found = [pod for pod in found if pod.is_ready and not pod.is_ending]
            port = spec["ports"][0]["targetPort"]
            self.services[name].listed[:] = [f"{pod.ip}:{resolved(port, pod.template)}" for pod in found]
            names[name] = [pod.ip for pod in found]
        partial = self.names.with_suffix(".partial")
        partial.write_text(json.dumps(names))
        partial.rename(self.names)


def _peers(pid: int) -> Iterator[tuple[str, int]]:
    """Address and port at the other end of each connection that a process has opened or accepted (proc(5))."""
    sockets, lines = set(), []
    with contextlib.suppress(OSError):  # it, or a descriptor of it, may be gone by now
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.update(re.findall(r"socket:\[(\d+)\]", os.readlink(descriptor)))
    for line in lines:
        _, _, remote, state, *_, inode = line.split()[:10]
        if state == "01" and inode in sockets:
            address, _, port = remote.partition(":")
            yield socket.inet_ntoa(int(address, 16).to_bytes(4, "little")), int(port, 16)


@contextlib.asynccontextmanager
async def calling(calls: Sequence[Callable[[], Awaitable[None]]], pause: float) -> AsyncIterator[None]:
    """Each of these again and again, one after the other, until the end."""
    going = True

    async def repeat(call: Callable[[], Awaitable[None]]) -> None:
        while going:
            await call()
            await asyncio.sleep(pause)

    tasks = [asyncio.ensure_future(repeat(call)) for call in calls]
    try:
        yield
    finally:
        going = False
        await asyncio.gather(*tasks)
