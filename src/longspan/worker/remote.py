"""Worker that the driver did not start: on another host, or started by another program.

Holds the settings of such a worker, its life and its end. Must not know the program that started it, schedulers or
requests.
Read next: `longspan.worker.process`, workers on the driver's machine; `longspan.worker.__main__`.
"""

import os
import signal
import threading
import warnings
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from longspan.comm.connect import Meeting, interface_address, interface_with, is_loopback, reachable_address
from longspan.comm.secret import Secret
from longspan.cpu_binding import num_cores
from longspan.errors import ConfigError, LongspanError
from longspan.group.heartbeat import HeartbeatThread, ProcessProgress, say_last, silence_limit_s
from longspan.group.shape import GroupShape
from longspan.group.worker_link import WorkerLink
from longspan.worker.process import own_hello, run


class Place(NamedTuple):
    """Place of a worker in its group, from the environment variables of torchrun and similar launchers."""

    number: int
    """Number of this process in the group (RANK)."""
    world_size: int
    """Number of processes in the group (WORLD_SIZE)."""
    processes_on_host: int
    """Number of the group's processes on this host (LOCAL_WORLD_SIZE)."""
    master_address: str
    """Host of process 0, where torch.distributed meets (MASTER_ADDR)."""


def read_place(environment: Mapping[str, str]) -> Place:
    """Read RANK, WORLD_SIZE, LOCAL_WORLD_SIZE (1 if not set), MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: a variable is missing, or is not a number.
    """
    number = _number(environment, "RANK", 0)
    world_size = _number(environment, "WORLD_SIZE", 1)
    if number >= world_size:
        raise ConfigError(f"RANK: got {number}, legal is a number from 0 and below WORLD_SIZE, {world_size}")
    _number(environment, "MASTER_PORT", 1)
    processes_on_host = _number(environment, "LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in environment else 1
    return Place(number, world_size, processes_on_host, _text(environment, "MASTER_ADDR"))


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ConfigError(f"{name}: not set, legal is what torchrun sets, which starts this command on every host")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    text = _text(environment, name)
    if not text.isdecimal() or not least <= int(text) < 2**31:
        raise ConfigError(f"{name}: got {text!r}, legal is a whole number from {least}")
    return int(text)


def run_remote(place: Place, driver: str, secret: Secret, interface: str | None, connect_timeout_s: float) -> int:
    """Run a worker until the driver ends the group; report errors on standard error.

    Args:
        place: this worker's place in the group.
        driver: address of the driver's link.
        secret: the group's secret.
        interface: network interface for messages between ranks; None takes the one towards process 0's host, or, where
            that is this host, towards the driver's.
        connect_timeout_s: longest wait for the driver.

    Returns:
        The exit code: 0 for success, 1 for a failure, 2 for an impossible request of the user.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this
    if not os.environ.get("LONGSPAN_DEBUG"):  # torch has not been imported yet
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        warnings.simplefilter("ignore")
    link, progress = WorkerLink(driver, secret), ProcessProgress()
    try:
        address = _choose_interface(interface, place.master_address, driver)
        master = place.master_address if is_loopback(place.master_address) else None
        hello = own_hello(place.number, place.world_size, address, master)
        start = link.introduce(hello, connect_timeout_s)
    except LongspanError as error:
        link.close(linger_ms=0)
        say_last(str(error))
        return 2 if isinstance(error, ConfigError) else 1
    shape = GroupShape.of(start.config)
    process = shape.process(place.number)
    who, limit_s = shape.name(process), silence_limit_s(start.config.exchange_timeout_s)
    HeartbeatThread(hello, who, progress, driver, secret, limit_s).start()
    meeting = Meeting("env://", None, address, secret.key("ranks 1"))
    num_threads = start.config.threads_per_rank or max(1, num_cores() // place.processes_on_host)
    failed = run(process, start, link, meeting, num_threads, progress)
    if failed is None:
        return 0
    say_last(f"{who}: {failed.reason.removeprefix(f'{who}: ')}")
    return 2 if failed.blames == "user" else 1


def _choose_interface(interface: str | None, master_address: str, driver: str) -> str:
    """Choose this process's address, and tell gloo, which else takes what the host's name resolves to: often loopback.

    Args:
        interface: network interface that the user names, or None.
        master_address: host of process 0.
        driver: address of the driver's link.

    Raises:
        ConfigError: the interface does not exist, or has no IPv4 address.
        CommunicationError: there is no way to either host.
    """
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        return interface_address(interface)
    address = reachable_address([master_address, urlsplit(driver).hostname or master_address])
    if (found := interface_with(address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
    return address
