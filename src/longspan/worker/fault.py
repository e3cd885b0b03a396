"""Faults on demand, for tests: a rank that dies, stalls, raises or damages a message at a certain plan and layer.

Holds the switch and its meaning. Must not know what a layer does.
Read next: `longspan.worker.runner`, which asks before every layer; docs/reliability.md.

    LONGSPAN_FAULT="rank=1,plan=5,layer=2,kind=die,generation=0"

`plan` counts the plans that the rank has run, from 0, since its process started, and -1 is its start; `layer` the
model's layers. The fault comes once in the life of the rank's process. Ranks that replace it are a generation of their
own, and have the fault too: each generation fails at its own plan 5, unless `generation` names the only one to fail
(the first is 0), or `since` the first one. Of a rank of several processes all have the fault, unless `process` names
one by its `tp_index`. Only ranks that are processes read the variable.
"""

import os
import signal
import time
from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from longspan.comm.checking import DamagingCommunicator
from longspan.errors import ConfigError
from longspan.group.shape import ProcessId

VARIABLE = "LONGSPAN_FAULT"

START = -1
"""Value of `plan` that stands for the start of the rank."""

Kind = Literal["die", "stall", "raise", "corrupt"]
"""Kinds of faults: killed as by the kernel; alive but never done; an exception; a bit of the next message flipped."""


class InjectedFaultError(RuntimeError):
    """Error that a rank raises for `kind=raise`."""


class Fault(msgspec.Struct, frozen=True):
    """Place and kind of a fault."""

    rank: int
    plan: int
    kind: Kind
    layer: int = 0
    generation: int | None = None
    """Only generation that has the fault; None: all."""
    since: int = 0
    """First generation that has the fault."""
    process: int | None = None
    """Position in its rank of the only process that has the fault; None: all of the rank's processes."""


class Injector:
    """Switch that triggers a rank's fault."""

    def __init__(self, fault: Fault | None, comm: DamagingCommunicator | None = None) -> None:
        """Arm a fault.

        Args:
            fault: fault of this rank, or None.
            comm: communicator that damages messages, for `kind=corrupt`.
        """
        self._fault, self._comm = fault, comm

    def before_layer(self, num_plans: int, layer: int) -> None:
        """Trigger the fault if it is due before a layer.

        Args:
            num_plans: plans that the rank has run before this one.
            layer: layer that the rank is about to compute.
        """
        fault = self._fault
        if fault is not None and (fault.plan, fault.layer) == (num_plans, layer):
            self._strike(fault)

    def at_start(self) -> None:
        """Trigger the fault if it is due at the start, before the rank reports that it is ready."""
        self.before_layer(START, 0)

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "corrupt" and self._comm is not None:
            self._comm.damage_next()
            return
        if fault.kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault.kind == "stall":
            time.sleep(3600)
        raise InjectedFaultError(f"injected before layer {fault.layer} ({VARIABLE})")


def read_fault(environment: Mapping[str, str], process: ProcessId, generation: int) -> Fault | None:
    """Read a process's fault from the environment; None if it has none.

    Raises:
        ConfigError: the variable is malformed.
    """
    text = environment.get(VARIABLE)
    if not text:
        return None
    words = [word.partition("=") for word in text.split(",")]
    fields = {name.strip(): value.strip() for name, _, value in words}
    try:
        if len(fields) != len(words) or not fields.keys() <= {*Fault.__struct_fields__}:
            raise ValueError
        fault = msgspec.convert(fields, Fault, strict=False)
    except ValueError:  # a ValidationError is one
        raise ConfigError(
            f"{VARIABLE}: got {text!r}, legal is like rank=1,plan=5,layer=2,kind={'|'.join(get_args(Kind))} and "
            "perhaps generation=0, since=1 or process=1"
        ) from None
    is_now = generation >= fault.since and fault.generation in (None, generation)
    is_here = fault.rank == process.rank and fault.process in (None, process.tp_index)
    return fault if is_here and is_now else None
