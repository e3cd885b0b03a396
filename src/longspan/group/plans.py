"""Plans as messages: what the driver sends to each rank, and how a rank puts a plan together again.

Holds the memory of each model's last plan at both ends, so that a decode step that goes on from it is a few bytes. Must
not know sockets, or what a plan does.
Read next: `longspan.plan.parts`, what a rank gets; `longspan.plan.advance`; `longspan.group.messages`.
"""

import msgspec

from longspan.group.messages import RunNext, RunPlan, decode_to_worker, encode
from longspan.plan.advance import advance
from longspan.plan.parts import SharedPart, join, split
from longspan.plan.types import Literals, Plan, SampledBy, Tokens, is_draft_plan

_encode_part = msgspec.msgpack.Encoder().encode
_decode_shared = msgspec.msgpack.Decoder(SharedPart).decode


class PlanSender:
    """The driver's end: makes the messages of every plan, in the order of plans."""

    def __init__(self) -> None:
        self._last: tuple[dict[int, int], dict[int, int]] = ({}, {})  # per model, rank to its last plan's number

    def messages(self, plan: Plan) -> dict[int, bytes]:
        """Make the message of each rank of a plan."""
        last, follows = self._last[is_draft_plan(plan.plan_id)], plan.follows
        found: dict[int, bytes] = {}
        if follows is not None and {last.get(rank) for rank in plan.ranks} == {follows}:
            token_ids: dict[int, list[int]] = {}
            for run in plan.query_runs:
                if isinstance(run.tokens, Literals):
                    token_ids.setdefault(run.compute_rank, []).extend(run.tokens.token_ids)
            nothing = encode(RunNext(plan.plan_id, follows, (), plan.graph))
            for rank in plan.ranks:
                own = token_ids.get(rank)
                found[rank] = nothing if own is None else encode(RunNext(plan.plan_id, follows, tuple(own), plan.graph))
        else:
            shared, own_parts = split(plan)
            raw = msgspec.Raw(_encode_part(shared))
            found = {rank: encode(RunPlan(raw, own_part)) for rank, own_part in own_parts.items()}
        last.update(dict.fromkeys(plan.ranks, plan.plan_id))
        return found


class PlanReceiver:
    """A rank's end."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._last: list[Plan | None] = [None, None]  # per model

    def take(self, message: RunPlan | RunNext | bytes) -> Plan:
        """Put together the plan that a message tells, decoded or not, as this rank knows it."""
        if isinstance(message, bytes):
            found = decode_to_worker(message)
            assert isinstance(found, RunPlan | RunNext), found
            message = found
        if isinstance(message, RunPlan):
            plan = join(_decode_shared(message.shared), message.own, self._rank)
        else:
            last = self._last[is_draft_plan(message.plan_id)]
            assert last is not None, "a plan follows none"
            assert last.plan_id == message.follows, f"plan {message.plan_id} follows {message.follows}"
            plan = advance(last, message.plan_id, self._tokens(last, message), message.graph)
        self._last[is_draft_plan(plan.plan_id)] = plan
        return plan

    def _tokens(self, last: Plan, message: RunNext) -> list[Tokens | None]:
        """Input tokens of this rank's runs, in plan order among all runs."""
        is_own = [run.compute_rank == self._rank for run in last.query_runs]
        if not message.token_ids:  # sampled by the plan before
            return [SampledBy(message.follows) if own else None for own in is_own]
        token_ids = iter(message.token_ids)
        return [Literals((next(token_ids),)) if own else None for own in is_own]
