"""A worker that another program starts: its place in the group, and what its command lacks."""

import os
import subprocess
import sys

import pytest

from longspan.errors import ConfigError
from longspan.worker.remote import Place, _choose_interface, read_place

PLACE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def test_a_place_is_what_torchrun_sets():
    assert read_place(PLACE) == Place(1, 2, 1, "a")
    assert read_place({**PLACE, "LOCAL_WORLD_SIZE": "2"}) == Place(1, 2, 2, "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "RANK: not set, legal is what torchrun sets"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE: not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT: not set"),
        ({"RANK": "2"}, "RANK: got 2, legal is a number from 0 and below WORLD_SIZE, 2"),
        ({"RANK": "-1"}, "RANK: got '-1', legal is a whole number from 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two', legal is a whole number from 1"),
    ],
)
def test_rejects_places_that_are_none(change, message):
    environment = {name: value for name, value in {**PLACE, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_place(environment)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--driver", "10.0.0.1:7000"], {}, "driver: got '10.0.0.1:7000', legal is tcp://HOST:PORT"),
        (["--driver", "tcp://a:7000"], {}, "RANK: not set, legal is what torchrun sets"),
        (["--driver", "tcp://a:7000"], PLACE, "LONGSPAN_SECRET: not set, legal is a secret"),
    ],
)
def test_rejects_worker_commands_that_lack_something(arguments, environment, message):
    clean = {name: value for name, value in os.environ.items() if name not in {*PLACE, "LONGSPAN_SECRET"}}
    command = [sys.executable, "-m", "longspan.worker", *arguments]
    done = subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"longspan: {message}")
    assert done.stderr.count("\n") == 1


def test_gloo_is_told_the_interface_of_the_address_unless_the_user_has(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert _choose_interface(None, "127.0.0.1", "tcp://127.0.0.1:7000") == "127.0.0.1"
    assert os.environ == {"GLOO_SOCKET_IFNAME": "lo"}
    monkeypatch.setattr(os, "environ", {"GLOO_SOCKET_IFNAME": "eth7"})
    assert _choose_interface(None, "127.0.0.1", "tcp://127.0.0.1:7000") == "127.0.0.1"
    assert os.environ == {"GLOO_SOCKET_IFNAME": "eth7"}
    assert _choose_interface("lo", "nowhere.invalid", "tcp://nowhere.invalid:7000") == "127.0.0.1"
    assert os.environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
