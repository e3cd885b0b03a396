"""What the driver and the processes that it works with say to each other.

Holds message types and their encoding (MessagePack, never pickle). Must not know sockets, or how a process is started.
Read next: `longspan.group.shape`, who is meant; `longspan.group.worker_link` and `longspan.group.driver_link`.

A worker is a process of a rank. It has two connections. One, its voice, says `Hello` first and carries plans and
answers. The other, its heartbeat, says `Alive` every second, and hears `Heartbeat`, or that all is over, whatever the
worker is busy with. `Hello` and `Alive` name a process by its number, since what it belongs to is the driver's to say;
what is about a rank's work names the rank, and the rank's first process says it.
"""

from typing import Literal

import msgspec

from longspan.config import EngineConfig
from longspan.costmodel.measured import RankMeasurement
from longspan.group.shape import ProcessId
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

    number: int
    """Of this process among all of the group, from 0: RANK, where something like torchrun has started it."""
    world_size: int
    """Number of processes in the group, as the worker was told when it was started."""
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
    """Where processes on the driver's machine meet, theirs alone; None: they meet as their environment says."""
    generation: int = 0
    """How often ranks were started before for the same engine: they are started again after a loss."""


class RunPlan(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver to worker: run a plan that names its rank."""

    plan: Plan


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: measure kernels and links. All processes get it, and nothing else until all ranks have
    answered."""

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


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker, twice a second: the driver runs."""


class Files(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: the model's files as this host has them."""

    process: ProcessId
    fingerprint: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: weights are loaded, the group is joined, pools are there."""

    process: ProcessId


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver, every second: the process runs, whatever it is busy with."""

    number: int
    """As in the worker's `Hello`."""
    host: str
    """As in the worker's `Hello`: host and process id tell it from one that was not admitted."""
    pid: int
    """As in the worker's `Hello`."""
    progress: int
    """Layers and plans that it has begun since it started."""


class Answer(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Worker to driver, once per rank: a plan is done."""

    result: RankResult


class Measured(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver, once per rank: answer to `Measure`."""

    measurement: RankMeasurement


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: the worker cannot go on and ends."""

    process: ProcessId
    reason: str
    """One line for the user."""
    details: str
    """Traceback."""
    blames: Literal["user", "peer", "process"]
    """Where the reason lies: in what the user asked for (ConfigError), another process (CommunicationError), or this
    one."""


class ForkWorkers(msgspec.Struct, frozen=True, tag=True):
    """The driver to the parent of workers, a line of JSON: fork so many. None of those before may run."""

    world_size: int
    """Number of processes; each is told its own, from 0."""
    address: str
    """Where they find the driver."""


class KillWorkers(msgspec.Struct, frozen=True, tag=True):
    """The driver to the parent of workers, a line of JSON: end those that run, at once, whatever they do."""


class ForkedWorker(msgspec.Struct, frozen=True):
    """The parent of workers to the driver, a line of JSON: a process has started or ended."""

    number: int
    pid: int
    returncode: int | None = None
    """How it ended, as `subprocess` counts; None when it has just started."""


Order = ForkWorkers | KillWorkers

ToWorker = Start | RunPlan | Measure | Stop | Refused | Heartbeat
ToDriver = Hello | Files | Ready | Alive | Answer | Measured | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_driver = msgspec.msgpack.Decoder(ToDriver).decode
