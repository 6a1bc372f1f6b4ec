"""The loads, by name: which model, how many callers, what is sent. A group is what `--only` selects."""

from __future__ import annotations

from dataclasses import dataclass

from perf import models
from perf.load import Load

MIB_16 = 4_194_304  # FP32 numbers
PAYLOADS = {64: 16, 4_096: 1024, 65_536: 16_384, 1_048_576: 262_144, 16_777_216: MIB_16}  # bytes: FP32 numbers


@dataclass(frozen=True, slots=True)
class Scenario:
    """model: as Triton calls it."""

    name: str
    title: str
    model: str
    load: Load


def _tiny(clients: int) -> Scenario:
    return Scenario(f"tiny-{clients}", f"Tiny tensors, {_many(clients)}", models.TINY_A, Load(clients))


def _large(clients: int) -> list[Scenario]:
    many = _many(clients)
    requests = 16 if clients == 1 else 32
    return [
        Scenario(f"in-{clients}", f"602 KB in, tiny out, {many}", models.WIDE_IN, Load(clients)),
        Scenario(f"out-{clients}", f"tiny in, 602 KB out, {many}", models.WIDE_OUT, Load(clients)),
        Scenario(
            f"both-{clients}",
            f"16 MiB in and out, {many}",
            models.ECHO,
            Load(clients, shape=MIB_16, requests=requests),
        ),
    ]


def _payload(size: int, numbers: int) -> Scenario:
    requests = 32 if size > 4_000_000 else None
    load = Load(4, shape=numbers, requests=requests)
    return Scenario(f"payload-{size}", f"{size:,} bytes in and out, 4 clients", models.ECHO, load)


def _connections(count: int) -> Scenario:
    clients = max(64, count)
    load = Load(clients, per_connection=clients // count)
    return Scenario(
        f"connections-{count}",
        f"{clients} clients on {count} connection{'s' if count > 1 else ''}",
        models.TINY_A,
        load,
    )


def _many(clients: int) -> str:
    return "1 client" if clients == 1 else f"{clients} clients"


TINY = tuple(_tiny(clients) for clients in (1, 4, 16, 64))
LARGE = (*_large(1), *_large(8))
SMALL = Scenario("small", "Tiny tensors, 16 clients, with shared memory or not", models.TINY_A, Load(16))
STREAM = (Scenario("stream-16", "One ModelStreamInfer, 16 messages in flight", models.TINY_A, Load(16, stream=True)),)
BUSY = tuple(each for each in TINY if each.load.concurrency in (16, 64))
SINGLE = Scenario("single", "Tiny tensors, 1 client, merging or not", models.TINY_A, Load(1))
EFFICIENTNET = Scenario("efficientnet-8", "EfficientNet-Lite0 FP32, 8 clients", models.EFFICIENTNET, Load(8, length=2))
PAYLOAD = tuple(_payload(size, numbers) for size, numbers in PAYLOADS.items())
CONNECTIONS = tuple(_connections(count) for count in (1, 4, 16, 64, 256))
ROUTES = (5, 64, 1000)  # 5 are those that every config here has
VARIANTS = (2, 16, 64)


def open_loop(rate: float, title: str) -> Scenario:
    """Tiny tensors, `rate` requests a second whether they are answered or not. title: what that rate is."""
    # On two busy cores 12 to 20 % of the requests left late from 4 threads, 3 to 8 % from 16.
    load = Load(16, rate=rate, length=2)
    return Scenario("open-loop", f"Tiny tensors, {rate:,.0f} requests/s in an open loop: {title}", models.TINY_A, load)


def growing(what: str, count: int) -> Scenario:
    """Tiny tensors at 16 clients, on a gateway that has many of something."""
    return Scenario(f"{what}-{count}", f"{count} {what}, 16 clients", models.TINY_A, Load(16))
