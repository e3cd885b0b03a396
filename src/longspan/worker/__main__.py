"""`python -m longspan.worker`: one process of a group, started by torchrun or anything that sets the same variables.

Holds the command line. Must not know what a worker does.
Read next: `longspan.worker.remote`.
"""

import os
import sys

import click

from longspan.comm.secret import require_secret
from longspan.errors import LongspanError
from longspan.group.heartbeat import say_last
from longspan.quantities import check_driver_address
from longspan.worker.remote import read_place, run_remote


@click.command()
@click.option("--driver", required=True, metavar="tcp://HOST:PORT", help="Where the driver listens.")
@click.option("--secret-file", metavar="FILE", help="Holds the secret; default: the variable LONGSPAN_SECRET.")
@click.option("--interface", metavar="NAME", help="Network interface for messages between ranks, such as eth0.")
@click.option("--connect-timeout-s", type=click.FloatRange(0, 10**6, min_open=True), default=120.0, show_default=True)
def main(driver: str, secret_file: str | None, interface: str | None, connect_timeout_s: float) -> None:
    """Run one rank of a group of several hosts.

    RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment, as torchrun sets them.
    """
    try:
        check_driver_address(driver)
        place = read_place(os.environ)
        secret = require_secret(secret_file, "the driver admits nobody without it")
    except LongspanError as error:
        say_last(str(error))
        sys.exit(2)
    status = run_remote(place, driver, secret, interface, connect_timeout_s)
    # Not sys.exit: gloo's threads may still wait for a peer that is gone, and would keep the process alive.
    os._exit(status)


if __name__ == "__main__":
    main()
