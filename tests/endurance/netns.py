"""Hosts for tests on one machine: network namespaces on a bridge, each with its own host name and shaped bandwidth.

Holds their making, commands that run in them, and their end. Must not know longspan. Needs root, `ip`, `tc` and
`unshare`; `why_not()` says what is missing. All names begin with a prefix, and whatever an earlier run left is removed
first. Nothing is mounted but what `ip netns` mounts.

    driver (root namespace, 10.77.0.254) -- bridge -- host-0 (10.77.0.1), host-1 (10.77.0.2), ...

By hand: `sudo python tests/endurance/netns.py up --hosts 2 --mbit-per-s 1000`, then `ip netns exec longspan-0 ...`,
then `down`. Latency is not simulated here: not every kernel has netem. The option `simulated_links` of longspan holds
messages back.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PREFIX = "longspan-"
BRIDGE = f"{PREFIX}br"
NETWORK = "10.77.0"
DRIVER_ADDRESS = f"{NETWORK}.254"
NETNS_FILES = Path("/etc/netns")
"""Where `ip netns exec` looks for files that a namespace has in place of those in /etc."""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def must(*command: str) -> str:
    done = _run(*command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str | None:
    """Why there can be no such network here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            return f"network namespaces need the command {tool}"
    probe = f"{PREFIX}probe"
    try:
        must("ip", "netns", "add", probe)
        must("ip", "link", "add", probe, "type", "bridge")
    except RuntimeError as error:
        return f"no network namespaces here: {error}"
    finally:
        _run("ip", "link", "del", probe)
        _run("ip", "netns", "del", probe)
    return None


class Host:
    """One namespace."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.namespace, self.name = f"{PREFIX}{index}", f"host-{index}"
        self.address = f"{NETWORK}.{index + 1}"

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], directory: Path | None = None
    ) -> "subprocess.Popen[str]":
        """Start a command here, in a session of its own; standard output and error come together."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh", *command]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *named],
            env=dict(environment),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def name_addresses(self, addresses: Mapping[str, str] | None) -> None:
        """Let commands that start here from now on resolve names by a file of their own; None: by the machine's.

        `ip netns exec` puts /etc/netns/NAME/hosts in the place of /etc/hosts.
        """
        directory = NETNS_FILES / self.namespace
        shutil.rmtree(directory, ignore_errors=True)
        if addresses is not None:
            directory.mkdir(parents=True)
            lines = [f"{address} {name}\n" for name, address in addresses.items()]
            (directory / "hosts").write_text("".join(lines))

    def pids(self) -> list[int]:
        """Processes that run here."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace).stdout.split()]

    def cut_off(self) -> None:
        """Pull the cable."""
        must("ip", "-n", self.namespace, "link", "set", "eth0", "down")


def up(num_hosts: int, mbit_per_s: int | None) -> list[Host]:
    """Make the hosts. Args: `mbit_per_s` is what each may send; None is as much as it can."""
    down()
    must("ip", "link", "add", BRIDGE, "type", "bridge")
    must("ip", "address", "add", f"{DRIVER_ADDRESS}/24", "dev", BRIDGE)
    must("ip", "link", "set", BRIDGE, "up")
    hosts = [Host(index) for index in range(num_hosts)]
    for host in hosts:
        port = f"{PREFIX}p{host.index}"
        must("ip", "netns", "add", host.namespace)
        must("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        must("ip", "link", "set", port, "master", BRIDGE, "up")
        inside = ("ip", "-n", host.namespace)
        must(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
        must(*inside, "link", "set", "lo", "up")
        must(*inside, "link", "set", "eth0", "up")
        if mbit_per_s is not None:
            shaping = ("rate", f"{mbit_per_s}mbit", "burst", "256kb", "latency", "100ms")
            must("ip", "netns", "exec", host.namespace, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *shaping)
    return hosts


def down() -> None:
    """Remove all hosts, and end what runs in them."""
    for line in _run("ip", "netns", "list").stdout.splitlines():
        if line.startswith(PREFIX):
            namespace = line.split()[0]
            for pid in _run("ip", "netns", "pids", namespace).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "del", namespace)
    for directory in NETNS_FILES.glob(f"{PREFIX}*"):
        shutil.rmtree(directory, ignore_errors=True)
    for line in _run("ip", "-o", "link", "show").stdout.splitlines():
        name = line.split(": ")[1].partition("@")[0]
        if name.startswith(PREFIX):
            _run("ip", "link", "del", name)


@contextlib.contextmanager
def network(num_hosts: int, mbit_per_s: int | None = None) -> Iterator[list[Host]]:
    """Hosts that are gone afterwards, with all that runs in them. One network at a time: others wait."""
    with (Path(tempfile.gettempdir()) / f"{PREFIX}network.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield up(num_hosts, mbit_per_s)
        finally:
            down()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make or remove a network of pretended hosts.")
    parser.add_argument("what", choices=["up", "down"])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--mbit-per-s", type=int)
    arguments = parser.parse_args()
    if (reason := why_not()) is not None:
        sys.exit(reason)
    if arguments.what == "down":
        down()
        return
    for host in up(arguments.hosts, arguments.mbit_per_s):
        print(f"{host.namespace}: {host.name}, {host.address}")


if __name__ == "__main__":
    main()
