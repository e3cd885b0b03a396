"""Worker processes on a Ray cluster: one actor per process.

Holds all use of Ray, and is the only file that imports it. Must not know messages or plans.
Read next: `longspan.worker.remote`, what every actor runs.

Ray starts the actors, says on which node each is, brings their standard error to the driver's, and reports their
death. Plans and answers go over the driver's own link, as for all workers.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from longspan.comm.connect import interface_address
from longspan.comm.secret import Secret, read_secret
from longspan.config import EngineConfig
from longspan.cpu_binding import num_cores
from longspan.engine.external import tcp_address
from longspan.errors import ConfigError, WorkerError
from longspan.group.shape import GroupShape, ProcessId
from longspan.worker.remote import Place, run_remote

RAY_ADDRESS = "RAY_ADDRESS"
"""Environment variable in which Ray itself looks for a cluster's address."""

OWN_CLUSTER = "local"
"""Ray's address of a new cluster on this machine alone, which ends with the driver."""


class _WorkerActor:
    """Ray actor that is one process of the group."""

    def __init__(self, name: str) -> None:
        """Send what the process prints to standard error.

        Args:
            name: the process's name in messages to the user.
        """
        self._name = name
        os.dup2(2, 1)  # the driver's standard output is the user's alone

    def __repr__(self) -> str:
        return self._name  # Ray puts this before every line that the actor writes

    def node(self) -> str:
        """Return the address of the node that this actor is on."""
        return str(ray.util.get_node_ip_address())

    def meeting_point(self, interface: str | None) -> tuple[str, int]:
        """Return the address of this node's interface, and a port that is free on it."""
        address = self.node() if interface is None else interface_address(interface)
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def run(self, place: Place, port: int, driver: str, secret: Secret, interface: str | None, timeout_s: float) -> int:
        """Run as a worker until the driver ends the group; return the exit code."""
        os.environ.update(
            RANK=str(place.number),
            WORLD_SIZE=str(place.world_size),
            MASTER_ADDR=place.master_address,
            MASTER_PORT=str(port),
        )
        return run_remote(place, driver, secret, interface, timeout_s)


class RayLauncher:
    """Launcher of one Ray actor per process, in a placement group with one bundle for each rank."""

    is_remote = True
    directory: str | None = None

    def __init__(self, config: EngineConfig) -> None:
        """Connect to the cluster, or start one on this machine.

        Raises:
            ConfigError: the cluster is not there, or cannot reach this driver.
        """
        self._config = config
        self._shape = GroupShape.of(config)
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._nodes: list[str] = []
        self._runs: list[Any] = []  # per process, the future of its exit code
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            self._connect()
        # Ray carries the secret to the actors, so it may be a new one where the user gave none.
        self.secret: Secret | None = read_secret(config.secret_file) or Secret(secrets.token_bytes(32))
        try:
            self.bind_address = self._bind_address()
        except ConfigError:
            self.release(0.0)
            raise

    def _connect(self) -> None:
        address = self._config.ray_address or os.environ.get(RAY_ADDRESS) or OWN_CLUSTER
        options: dict[str, Any] = {}
        if address == OWN_CLUSTER:
            # The cluster must hold all processes, however few cores the machine has.
            cpus = max(num_cores(), self._shape.world_size * self._config.num_threads)
            options = {"num_cpus": cpus, "include_dashboard": False}
        try:
            host, colon, port = address.rpartition(":")
            if colon and port.isdecimal() and "/" not in host:  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), timeout=self._config.connect_timeout_s).close()
            with _own_sigterm():
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"ray_address: got {address!r}, legal is the address of a Ray cluster that runs, or none: {error}"
            ) from error

    def _bind_address(self) -> str:
        """Return where the driver listens: the option `listen`, or loopback on a cluster of one node."""
        if self._config.listen is not None:
            return tcp_address(self._config.listen)
        num_nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        if num_nodes > 1:
            raise ConfigError(
                f"listen: got none with a Ray cluster of {num_nodes} nodes, legal is HOST:PORT where they find it"
            )
        return "tcp://127.0.0.1:*"

    def start(self, address: str, shape: GroupShape) -> None:
        assert shape == self._shape, "known before, as the cluster may be made for it"
        assert self.secret is not None
        config, threads, size = self._config, self._config.num_threads, shape.processes_per_rank
        gpus = int(config.device == "cuda")
        needs = {"CPU": size * threads, **({"GPU": size} if gpus else {})}  # a bundle is on one node
        group = self._group = placement_group([needs] * shape.num_ranks, strategy=config.ray_placement.upper())
        if not group.wait(config.connect_timeout_s):
            raise WorkerError(
                f"the Ray cluster has no room for {shape} of {threads} CPUs{' and a GPU' * gpus} within "
                f"{config.connect_timeout_s:g} s (connect_timeout_s); it has {ray.cluster_resources().get('CPU', 0):g} "
                f"CPUs on {sum(bool(node['Alive']) for node in ray.nodes())} nodes"
            )
        actor = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0)(_WorkerActor)
        for process in shape.processes:
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=process.rank)
            self._actors.append(actor.options(scheduling_strategy=where).remote(shape.name(process)))
        try:
            waiting = [one.node.remote() for one in self._actors]
            self._nodes = ray.get(waiting, timeout=config.connect_timeout_s)
            master, port = ray.get(
                self._actors[0].meeting_point.remote(config.interface), timeout=config.connect_timeout_s
            )
        except RayError as error:
            raise WorkerError(f"Ray could not start the ranks: {_first_line(error)}") from error
        for number, one in enumerate(self._actors):
            place = Place(number, shape.world_size, self._nodes.count(self._nodes[number]), master)
            self._runs.append(
                one.run.remote(place, port, address, self.secret, config.interface, config.connect_timeout_s)
            )

    def name(self, process: ProcessId) -> str | None:
        return None

    def ended(self, process: ProcessId) -> str | None:
        number = self._shape.number(process)
        done, _ = ray.wait([self._runs[number]], timeout=0)
        if not done:
            return None
        try:
            return f"ended on node {self._nodes[number]} with exit code {ray.get(done[0])}"
        except RayError as error:
            return f"died on node {self._nodes[number]}: {_first_line(error)}"

    def kill(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayError, ConnectionError):  # the cluster may be gone, and its actors with it
                ray.kill(actor)

    def renew(self) -> bool:
        return False

    def release(self, patience_s: float) -> None:
        with contextlib.suppress(RayError):
            if self._runs and patience_s:
                ray.wait(self._runs, num_returns=len(self._runs), timeout=patience_s)
        self.kill()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._is_ours and ray.is_initialized():
            ray.shutdown()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Restore the program's own SIGTERM handler, which `ray.init` replaces."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _first_line(error: RayError) -> str:
    """Return the first line of Ray's message, without the remote traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
