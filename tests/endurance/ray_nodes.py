"""A Ray cluster for tests on one machine: its head beside the driver, and a raylet in each of some network namespaces.

Holds the start of nodes, their loss and their return. Must not know longspan. Read next: `netns.py`, which makes the
hosts.

Every node has a temporary directory of its own, as on machines of their own: raylets that share one take each other's
sockets. The head has no CPU, so that no actor runs on it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import netns
import process_tree
import ray

PORT = 6389
ADDRESS = f"{netns.DRIVER_ADDRESS}:{PORT}"
START_S = 60.0
"""All nodes are there within this time."""

_COMMON = ("--object-store-memory", "80000000", "--disable-usage-stats", "--block")
_ON_A_HOST = 'mount -t tmpfs tmpfs "$0" && exec "$@" > "$0/node.log" 2>&1'
"""In the mount namespace that `ip netns exec` makes."""


class RayNodes:
    """Nodes of one cluster; node i is on host i."""

    def __init__(self, hosts: Sequence[netns.Host], num_cpus: int) -> None:
        """Start nothing yet. Args: `num_cpus` is what every node offers."""
        self.hosts, self._num_cpus = hosts, num_cpus
        self._directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, as names of sockets are
        # Ray asks a proxy for other nodes, if there is one.
        self._environment = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
        self._head: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the head and all nodes."""
        at = ("--head", "--node-ip-address", netns.DRIVER_ADDRESS, "--port", str(PORT), "--num-cpus", "0")
        command = [*_ray_start(), *at, "--include-dashboard", "false", "--temp-dir", self._directory, *_COMMON]
        with (Path(self._directory) / "head.log").open("wb") as log:
            self._head = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection((netns.DRIVER_ADDRESS, PORT), timeout=1).close()
                break
            except OSError:
                assert self._head.poll() is None, (Path(self._directory) / "head.log").read_text()
                assert time.monotonic() < deadline, "no head"
                time.sleep(0.1)
        for host in self.hosts:
            self.start_node(host)
        self.wait_for(len(self.hosts))

    def start_node(self, host: netns.Host) -> None:
        """Start the node of a host, also again after it was lost."""
        at = ("--address", ADDRESS, "--node-ip-address", host.address, "--num-cpus", str(self._num_cpus))
        host.start(["sh", "-c", _ON_A_HOST, self._directory, *_ray_start(), *at, *_COMMON], self._environment)

    def wait_for(self, num_nodes: int) -> None:
        """Wait until so many nodes beside the head are alive. Asks from a process of its own, as a driver would."""
        script = (
            "import ray, sys, time\n"
            f"ray.init(address={ADDRESS!r}, logging_level='ERROR', log_to_driver=False)\n"
            f"while sum(bool(node['Alive']) for node in ray.nodes()) != {num_nodes + 1}: time.sleep(0.1)\n"
        )
        subprocess.run([sys.executable, "-c", script], env=self._environment, timeout=START_S, check=True)

    def lose_node(self, host: netns.Host) -> None:
        """Kill a host's raylet, and what watches it; the actors are left to notice it themselves."""
        for pid in host.pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"/raylet" in words.partition(b"\0")[0] or b"start\0--address" in words:
                    os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill everything."""
        ray.shutdown()
        for host in self.hosts:
            for pid in host.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self._head is not None:
            for pid, _ in [*process_tree.children(self._head.pid), (self._head.pid, "ray")]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._head.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def _ray_start() -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", "start"]


@contextlib.contextmanager
def ray_nodes(hosts: Sequence[netns.Host], num_cpus: int) -> Iterator[RayNodes]:
    """Nodes that are gone afterwards."""
    nodes = RayNodes(hosts, num_cpus)
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.end()
