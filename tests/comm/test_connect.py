"""The handshake between ranks: over which sockets they meet, and who is passed over."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch.distributed as dist

from longspan.comm import connect
from longspan.comm.connect import (
    Meeting,
    address_towards,
    connect_all,
    interface_address,
    interface_with,
    is_loopback,
    local_meeting,
    reachable_address,
    receive_exactly,
)
from longspan.errors import CommunicationError, ConfigError


def connect_ranks(size, meetings):
    """Connects threads; returns each rank's sockets, or raises what a rank raised."""
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(connect_all, rank, size, store, meetings[rank], timeout_s=2.0) for rank in range(size)]
        return [future.result() for future in futures]


def test_ranks_of_a_host_meet_over_unix_sockets_and_others_over_tcp_without_delay(monkeypatch):
    meetings = [Meeting("unused", None, "127.0.0.1", b"k")] * 3
    near = connect_ranks(3, meetings)
    assert {s.family for sockets in near for s in sockets.values()} == {socket.AF_UNIX}
    monkeypatch.setattr(connect, "own_host_id", lambda: f"host {threading.get_ident()}")
    far = connect_ranks(3, meetings)
    for rank, sockets in enumerate(far):
        assert sorted(sockets) == [peer for peer in range(3) if peer != rank]
        for connection in sockets.values():
            assert connection.family == socket.AF_INET
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            # Four messages of 32 KiB fit, as Note [No deadlock] has it; Linux counts its own overhead as well.
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= 2 * 4 * 32 * 1024
    far[0][2].send(b"hello")
    assert far[2][0].recv(5) == b"hello" or not far[2][0].setblocking(True)
    for sockets in (*near, *far):
        for connection in sockets.values():
            connection.close()


@pytest.mark.cover
def test_rejects_a_rank_that_does_not_know_the_secret(monkeypatch):
    monkeypatch.setattr(connect, "own_host_id", lambda: f"host {threading.get_ident()}")
    meetings = [Meeting("unused", None, "127.0.0.1", key) for key in (b"k", b"other")]
    with pytest.raises(OSError, match=r"ranks \[1\] did not connect|rank 0 does not know the secret"):
        connect_ranks(2, meetings)


def test_strangers_are_passed_over_and_ranks_still_meet(monkeypatch):
    monkeypatch.setattr(connect, "own_host_id", lambda: f"host {threading.get_ident()}")
    monkeypatch.setattr(connect, "STRANGER_S", 0.2)
    store = dist.HashStore()
    meeting = Meeting("unused", None, "127.0.0.1", b"k")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect_all, 0, 2, store, meeting, timeout_s=20.0)
        address = msgspec.msgpack.decode(store.get("longspan-address-0"))["tcp"]
        strangers = [socket.create_connection(address) for _ in range(3)]
        strangers[0].sendall(os.urandom(100))  # nonsense
        strangers[1].close()  # and one says nothing
        second = pool.submit(connect_all, 1, 2, store, meeting, timeout_s=20.0)
        connections = [first.result()[1], second.result()[0]]
    connections[0].send(b"x")
    connections[1].setblocking(True)
    assert connections[1].recv(1) == b"x"
    for connection in (*connections, *strangers):
        connection.close()


def test_silent_strangers_do_not_move_the_deadline(monkeypatch):
    """Each of them was once heard to the end before the deadline was looked at."""
    monkeypatch.setattr(connect, "STRANGER_S", 60.0)
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connect_all, 0, 2, store, Meeting("unused", None, "127.0.0.1", b"k"), timeout_s=0.5)
        address = msgspec.msgpack.decode(store.get("longspan-address-0"))["tcp"]
        strangers = [socket.create_connection(address) for _ in range(3)]
        with pytest.raises(OSError, match=r"ranks \[1\] did not connect"):
            waiting.result(timeout=20)
    for stranger in strangers:
        stranger.close()


def test_a_message_of_the_handshake_may_come_in_pieces():
    near, far = socket.socketpair()
    with near, far:
        near.sendall(b"abc")
        threading.Timer(0.05, lambda: near.sendall(b"defgh")).start()
        assert receive_exactly(far, 6, time.monotonic() + 10) == b"abcdef"
        with pytest.raises(TimeoutError):
            receive_exactly(far, 6, time.monotonic() + 0.05)


def test_addresses_are_found_by_interface_and_by_route():
    assert interface_address("lo") == "127.0.0.1"
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"^interface: got 'nothing0', legal is one of this host's .*lo"):
        interface_address("nothing0")
    assert local_meeting(Path("/x")) == Meeting("file:///x/rendezvous", Path("/x"), None, b"")


def test_an_address_that_others_reach_comes_before_loopback(monkeypatch):
    routes = {"localhost": "127.0.0.1", "me": "127.0.0.1", "10.0.0.9": "10.0.0.1"}

    def towards(host):
        if host not in routes:
            raise CommunicationError(f"no way to {host}")
        return routes[host]

    monkeypatch.setattr(connect, "address_towards", towards)
    assert reachable_address(["10.0.0.9", "localhost"]) == "10.0.0.1"
    assert reachable_address(["me", "10.0.0.9"]) == "10.0.0.1"
    assert reachable_address(["nowhere", "10.0.0.9"]) == "10.0.0.1"
    assert reachable_address(["localhost", "me"]) == "127.0.0.1", "all on one host"
    with pytest.raises(CommunicationError, match="no way to nowhere"):
        reachable_address(["nowhere"])


def test_interfaces_are_found_by_their_addresses_and_loopback_by_name():
    assert interface_with("127.0.0.1") == "lo"
    assert interface_with("192.0.2.1") is None
    assert is_loopback("127.0.1.1")
    assert is_loopback("localhost")
    assert not is_loopback("192.0.2.1")
    assert not is_loopback("no.such.host.invalid")
