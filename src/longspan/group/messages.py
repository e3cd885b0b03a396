"""What driver and worker processes say to each other.

Holds message types and their encoding (MessagePack, never pickle). Must not know sockets or processes.
Read next: `longspan.group.worker_link`; `longspan.engine.workers`, the other end.

A worker has two connections. One, its voice, says `Hello` first and carries plans and answers. The other, its pulse,
says `Alive` every second, and hears `Pulse`, or that all is over, whatever the worker is busy with.
"""

from typing import Literal

import msgspec

from longspan.config import EngineConfig
from longspan.costmodel.measured import RankMeasurement
from longspan.plan.types import Plan, RankResult
from longspan.types import ModelSpec


class Versions(msgspec.Struct, frozen=True):
    """What must be the same in all processes; each without what follows a plus sign."""

    longspan: str
    python: str
    """Major and minor."""
    torch: str
    transformers: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver, first message."""

    rank: int
    world_size: int
    """Ranks that whoever started the worker speaks of."""
    host: str
    pid: int
    versions: Versions


class Start(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker, the answer to `Hello`."""

    config: EngineConfig
    spec: ModelSpec
    num_pages: tuple[int, ...]
    """Per KV group."""
    directory: str | None
    """Where ranks on the driver's machine meet, theirs alone; None: they meet as their environment says."""
    generation: int = 0
    """How often ranks were started before for the same engine: they are started again after a loss."""


class RunPlan(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver to worker."""

    plan: Plan


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: measure kernels and links. All ranks get it, and nothing else until all have answered."""

    nodes: tuple[int, ...]
    """Per rank, its node."""
    machines: tuple[int, ...]
    """Per rank, the machine whose cores it shares."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: end now, all is well."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: end now, the group has failed, or this worker cannot be in it."""

    reason: str
    """One line for the user."""


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker, twice a second: the driver runs."""


class Files(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: the model's files as this host has them."""

    rank: int
    fingerprint: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: weights are loaded, the group is joined, pools are there."""

    rank: int


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver, every second: the process runs, whatever it is busy with."""

    rank: int
    host: str
    """As in the worker's `Hello`, to tell it from one that was not admitted,"""
    pid: int
    """and this too."""
    progress: int
    """Layers and plans that it has begun since it started."""


class Answer(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Worker to driver: a plan is done."""

    result: RankResult


class Measured(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: answer to `Measure`."""

    measurement: RankMeasurement


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: the worker cannot go on and ends."""

    rank: int
    reason: str
    """One line for the user."""
    details: str
    """Traceback."""
    blames: Literal["user", "peer", "rank"]
    """Where the reason lies: in what the user asked for (ConfigError), another rank (CommunicationError), or here."""


class ForkRanks(msgspec.Struct, frozen=True, tag=True):
    """The driver to the parent of ranks, a line of JSON: fork ranks. None of those before may run."""

    size: int
    address: str
    """Where they find the driver."""


class KillRanks(msgspec.Struct, frozen=True, tag=True):
    """The driver to the parent of ranks, a line of JSON: end those that run, at once, whatever they do."""


class RankProcess(msgspec.Struct, frozen=True):
    """The parent of ranks to the driver, a line of JSON: a rank's process has started or ended."""

    rank: int
    pid: int
    returncode: int | None = None
    """How it ended, as `subprocess` counts; None when it has just started."""


Order = ForkRanks | KillRanks

ToWorker = Start | RunPlan | Measure | Stop | Refused | Pulse
ToDriver = Hello | Files | Ready | Alive | Answer | Measured | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_driver = msgspec.msgpack.Decoder(ToDriver).decode
