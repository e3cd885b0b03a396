"""Handover: the state of one layer before and behind one piece, which comes and goes in parts.

Holds the messages of a state between two ranks. Must not know models, plans or slots.
Read next: `longspan.cp.relay`, which makes one for every piece; `longspan.models.recurrent`, which waits for its parts.

Note [Parts of a state]
    Heads of a recurrence are independent. So the rank of a run need not wait for the whole state of the run before: it
    computes the first heads as soon as theirs has come, and sends theirs on while it computes the next.
    Two ranks, the four runs of Note [Relay], one and four parts (a to d) of equal heads:

        whole    rank 0   aabbccdd                        aabbccdd
                 rank 1           aabbccdd aabbccdd

        parts    rank 0   aabbccdd        aabbccdd
                 rank 1     aabbccdd aabbccdd

    Ranks compute at the same time but for the first part of the first run and the last part of the last. Nothing is
    computed twice and as many bytes are sent, in more messages; every head's arithmetic is what it was, to the bit.

    What a convolution keeps is known before the recurrence begins and sent at once. In order: tensors of convolutions,
    whole; then the recurrence's heads, part by part. Both ranks follow this order, whether or not what computes there
    takes parts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import Tensor

from longspan.comm.base import Pending
from longspan.kv.state_layout import StateComponent

State: TypeAlias = list[Tensor]
"""State of B requests in one layer: [B, *shape] per component."""

Exchange: TypeAlias = Callable[[list[tuple[int, Tensor]], list[tuple[int, Tensor]]], Pending]
"""Function that starts to send and to receive (peer, tensor) pairs."""


class _Message(NamedTuple):
    """Heads of one component that travel together."""

    component: int
    heads: range
    """Along the component's first dimension."""
    tensor: Tensor
    """View of the state, contiguous."""


class Handover:
    """State of one request in one layer, around one piece of its tokens."""

    def __init__(
        self,
        state: State,
        components: Sequence[StateComponent],
        num_parts: int,
        *,
        before: int | None,
        after: int | None,
        exchange: Exchange,
    ) -> None:
        """Start to receive.

        Args:
            state: [1, *shape] per component, to be changed to the state behind the piece. Of a rank before, it is
                written as parts arrive.
            components: their layouts.
            num_parts: parts of every component that has heads; one with fewer heads has a part for each.
            before: rank that the state comes from; None if it is here.
            after: rank that it goes to; None if it stays.
            exchange: starts messages.

        Collective: the ranks before and behind make one with the same `num_parts`; a component without heads is one
        message, and each part of another one.
        """
        self._state, self._after, self._exchange = state, after, exchange
        self._messages = [
            message
            for i, (component, tensor) in enumerate(zip(components, state, strict=True))
            for message in _cut(i, component, tensor, num_parts)
        ]
        self._written = [False] * len(components)
        self._num_sent = 0
        self._sent: list[Pending] = []
        self._arriving: list[Pending] = []  # in the order of messages; emptied from the front
        if before is not None:
            self._arriving = [exchange([], [(before, message.tensor)]) for message in self._messages]

    def arrive(self, component: int | None = None) -> None:
        """Wait until the messages of a component, and of all components before it, have arrived; None: all messages."""
        last = len(self._state) - 1 if component is None else component
        self._arrive(sum(message.component <= last for message in self._messages))

    def note_written(self, component: int) -> None:
        """Say that a component is what lies behind the piece already; it is sent when all components before it are."""
        self._written[component] = True
        end = self._num_sent
        while end < len(self._messages) and self._written[self._messages[end].component]:
            end += 1
        self._hand_on(end)

    def heads(self, component: int) -> Iterator[range]:
        """Yield heads of a component as they arrive; they are handed on when the next are asked for.

        Components before it must not change any more.
        """
        first = sum(message.component < component for message in self._messages)
        self._hand_on(first)
        for i, message in enumerate(self._messages[first:], start=first):
            if message.component != component:
                break
            self._arrive(i + 1)
            yield message.heads
            self._hand_on(i + 1)
        self._written[component] = True

    def finish(self) -> list[Pending]:
        """Hand on what has not gone yet, behind the piece.

        Returns:
            What to wait for before the step ends.
        """
        assert not self._arriving, "a state came and was not read"
        self._hand_on(len(self._messages))
        return self._sent

    def _arrive(self, end: int) -> None:
        """Wait for the messages before `end`."""
        num_left = len(self._messages) - end
        while len(self._arriving) > num_left:
            self._arriving.pop(0).wait()

    def _hand_on(self, end: int) -> None:
        """Send the messages before `end` that were not sent. What travels is a copy: a slot may be received into."""
        for message in self._messages[self._num_sent : end] if self._after is not None else ():
            assert self._after is not None
            self._sent.append(self._exchange([(self._after, message.tensor.clone())], []))
        self._num_sent = max(self._num_sent, end)


@dataclass(frozen=True, slots=True)
class StateByHeads:
    """State of a recurrence that may not be there yet, for what computes it."""

    tensor: Tensor
    """[1, heads, ...], to be changed in place."""
    handover: Handover
    component: int

    def whole(self) -> Tensor:
        """Return the tensor when all of it is there."""
        self.handover.arrive(self.component)
        return self.tensor

    def heads(self) -> Iterator[range]:
        """Ranges of heads, for which see `Handover.heads`."""
        return self.handover.heads(self.component)


def _cut(idx: int, component: StateComponent, tensor: Tensor, num_parts: int) -> Iterator[_Message]:
    if component.num_heads == 1:
        yield _Message(idx, range(1), tensor)
        return
    for heads in component.parts(num_parts):
        yield _Message(idx, heads, tensor[:, heads.start : heads.stop])
