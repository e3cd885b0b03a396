"""What tests of the link between driver and workers share: a secret, a worker's introduction, and a wait."""

import time

from longspan.comm.secret import Secret
from longspan.group.messages import Hello, Versions

SECRET = Secret(b"correct horse battery staple")
VERSIONS = Versions("1", "3.11", "2.11.0", "5.16.0")


def a_hello(**options):
    return Hello(
        **{"number": 1, "world_size": 2, "host": "b", "pid": 7, "versions": VERSIONS, "memory_bytes": 2**40, **options}
    )


def receive_one(link):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if received := link.receive(100):
            return received[0]
    raise AssertionError("nothing came")
