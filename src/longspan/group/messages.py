"""Messages between the driver and the workers, and between the driver and the workers' parent.

Holds message types and their encoding (MessagePack, never pickle). Must not know sockets, or how a process is started.
Read next: `longspan.group.shape`, ranks and processes; `longspan.group.worker_link` and `longspan.group.driver_link`.

A worker is a process of a rank. It has two connections. One, its voice, sends `Hello` first and carries plans and
answers. The other, its heartbeat, sends `Alive` every second, and receives `Heartbeat`, `Stop` and `Refused` even while
the worker computes. `Hello` and `Alive` name a process by its number, since only the driver knows how many processes a
rank has; messages about a rank's work name the rank, and the rank's first process sends them.
"""

from typing import Literal

import msgspec

from longspan.config import EngineConfig
from longspan.costmodel.measured import RankMeasurement
from longspan.group.shape import ProcessId
from longspan.plan.moves import Move, Moved
from longspan.plan.parts import OwnPart
from longspan.plan.types import GraphStep, RankResult
from longspan.types import Adapter, ModelSpec


class Versions(msgspec.Struct, frozen=True):
    """Versions that must be equal in all processes; each without the part after a plus sign."""

    longspan: str
    python: str
    """Major and minor version of Python."""
    torch: str
    transformers: str


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver, first message."""

    number: int
    """Number of this process in the group, from 0: RANK, where torchrun or a similar launcher has started it."""
    world_size: int
    """Number of processes in the group, as the worker was told when it was started."""
    host: str
    pid: int
    versions: Versions
    memory_bytes: int
    """Memory that the processes of this host may use."""
    address: str | None = None
    """IPv4 address where processes on other hosts find this one; None where all are on the driver's machine."""
    master: str | None = None
    """MASTER_ADDR, if it is this host's loopback here, as seen by this process; None if it is not, or is not used."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker, the answer to `Hello`."""

    config: EngineConfig
    spec: ModelSpec
    num_pages: tuple[tuple[int, ...], ...]
    """Pages of every pool, [rank][KV group]; behind a rank's groups slots of states, if the model has recurrent
    layers."""
    directory: str | None
    """Directory where processes on the driver's machine meet, theirs alone; None: their environment says where."""
    kv_fingerprint: bytes | None = None
    """All that KV depends on beside tokens, where pages are kept on disk."""
    adapters: tuple[Adapter, ...] = ()
    """LoRA adapters that requests may name when the ranks are ready."""
    generation: int = 0
    """Number of earlier starts of this engine's ranks, which are started again after a loss."""
    draft: "Start | None" = None
    """The same for the model that makes drafts, on the same ranks: its options, facts and pages; None for none."""


class RunPlan(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver to worker: run a plan that names its rank (`longspan.group.plans`)."""

    shared: msgspec.Raw
    """`SharedPart`, encoded once for all ranks."""
    own: OwnPart


class RunNext(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Driver to worker: run the last plan again, one token further."""

    plan_id: int
    follows: int
    """Number of the last plan."""
    token_ids: tuple[int, ...]
    """Input tokens of the rank's query runs; none if it has no run, or has sampled them itself in the last plan."""
    graph: GraphStep | None = None
    """See `Plan.graph`."""


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: measure kernels and links. All processes get this, and no other message until all ranks have
    answered."""

    nodes: tuple[int, ...]
    """Node of every rank."""
    machines: tuple[int, ...]
    """Machine of every rank; ranks on one machine share its cores."""
    are_bound: bool = False
    """Whether every process has cores of its own all the same."""


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: load an adapter, before the plans that come behind this."""

    adapter: Adapter


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: let go of an adapter, which no later plan names. One that could not be loaded is meant too."""

    adapter_id: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: end, without an error."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker: end, because the group has failed or this worker cannot be in it."""

    reason: str
    """One line for the user."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Driver to worker, twice a second: the driver is alive."""


class Files(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: fingerprint of the model's files on this host."""

    process: ProcessId
    fingerprint: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: weights are loaded, the group is joined, pools are allocated."""

    process: ProcessId


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver, every second, even while it computes: the process is alive."""

    number: int
    """Number of the process, equal to `Hello.number`."""
    host: str
    """Host, equal to `Hello.host`; it tells the process from one that was not admitted."""
    pid: int
    """Operating-system id, equal to `Hello.pid`."""
    progress: int
    """Layers and plans that the process has begun since it started."""


class Answer(msgspec.Struct, frozen=True, gc=False, tag=True):
    """Worker to driver, once per rank: result of a plan."""

    result: RankResult


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: answer to `LoadAdapter`."""

    process: ProcessId
    adapter_id: int
    error: str | None = None
    """Why the adapter cannot be loaded, in one line for the user; the worker goes on without it."""


class Measured(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver, once per rank: answer to `Measure`."""

    measurement: RankMeasurement


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Worker to driver: the worker cannot go on, and ends."""

    process: ProcessId
    reason: str
    """One line for the user."""
    details: str
    """Traceback."""
    blames: Literal["user", "peer", "process"]
    """Origin of the failure: the user's request (ConfigError), another process (CommunicationError), or this one."""


class ForkWorkers(msgspec.Struct, frozen=True, tag=True):
    """Driver to the parent of workers, a line of JSON: fork workers. No earlier worker may still run."""

    world_size: int
    """Number of processes to fork; they are numbered from 0."""
    address: str
    """Address of the driver's link."""


class KillWorkers(msgspec.Struct, frozen=True, tag=True):
    """Driver to the parent of workers, a line of JSON: kill all running workers."""


class ForkedWorker(msgspec.Struct, frozen=True):
    """Parent of workers to the driver, a line of JSON: a worker has started or ended."""

    number: int
    pid: int
    returncode: int | None = None
    """Return code of the worker, as in `subprocess`; None when it has just started."""


Order = ForkWorkers | KillWorkers

ToWorker = Start | RunPlan | RunNext | Move | Measure | LoadAdapter | UnloadAdapter | Stop | Refused | Heartbeat
ToDriver = Hello | Files | Ready | Alive | Answer | Moved | Measured | AdapterLoaded | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_driver = msgspec.msgpack.Decoder(ToDriver).decode
