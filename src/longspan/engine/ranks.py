"""Ranks of one engine: their start, and their replacement after a loss, by fewer ranks if need be.

Holds the means to start ranks, and whether they may be started again. Must not know requests or plans.
Read next: `longspan.engine.start`, which starts one generation; `longspan.engine.recovery`, the budget of restarts.
"""

import threading
from collections.abc import Callable

import torch
from msgspec import structs

from longspan.config import EngineConfig
from longspan.costmodel.parameters import Costs
from longspan.engine.cost_parameters import file_costs, find_costs
from longspan.engine.drafts import fewer_for_draft
from longspan.engine.executor import Executor
from longspan.engine.interrupts import deferred_interrupt
from longspan.engine.launcher import Launcher
from longspan.engine.recovery import STARTS, Restarts, fewer_ranks
from longspan.engine.start import start_executor
from longspan.errors import LongspanError
from longspan.group.messages import Start
from longspan.types import Adapter


class Ranks:
    """Successive generations of ranks. Any thread may call `give_up`; one thread calls the rest."""

    def __init__(
        self,
        start: Start,
        model: torch.nn.Module | None,
        launcher: Launcher | None,
        use_costs: Callable[[Costs], None],
        known: Costs | None = None,
    ) -> None:
        """Prepare the first generation, and start nothing yet.

        Args:
            start: message that the first generation is told.
            model: a loaded module, for ranks that are threads; else None.
            launcher: launcher of ranks that are starting, as `early_ranks` yields it; None starts them here.
            use_costs: called with the costs of the ranks, where they are known, once the ranks have started.
            known: costs of the ranks by published figures; None where they are not known, or will be measured.
        """
        self.told = start
        """Message that the ranks are told: options, model, pages."""
        self._model, self._use_costs = model, use_costs
        self._launcher = launcher  # for the next start, until an executor takes it
        self._given_up = threading.Event()
        self._executor: Executor | None = None
        self.costs = file_costs(start.config, start.spec) or known
        """Costs of ranks and links; None where they are unknown."""
        self.restarts = Restarts(start.config.max_restarts)
        """Record of the replacements of lost ranks."""
        self.failure: BaseException | None = None
        """Why lost ranks are not replaced any more; None while they may be."""

    def start(self, lose_rank: Callable[[EngineConfig], None] | None = None) -> Executor:
        """Start ranks, and try again if the start fails.

        Args:
            lose_rank: called with the options of one rank less, where starts have failed so often that fewer are tried
                from now on; None keeps trying with all of them.

        Raises:
            LongspanError: the ranks cannot be started, and no try is left.
        """
        num_failed = 0
        while True:
            launcher, self._launcher = self._launcher, None
            try:
                return self._start_once(launcher)
            except LongspanError as error:
                if self._given_up.is_set():
                    self.failure = error
                    raise
                self.take_restart(error)
            self._next_generation()
            num_failed += 1
            if lose_rank is None or num_failed % STARTS:
                continue
            if (config := fewer_ranks(self.told.config)) is not None:
                with deferred_interrupt():
                    num_pages = self.told.num_pages[: config.context_parallel_size]
                    draft = fewer_for_draft(self.told.draft, config)
                    self.told = structs.replace(self.told, config=config, num_pages=num_pages, draft=draft)
                    self.costs = None
                    lose_rank(config)

    def _start_once(self, launcher: Launcher | None) -> Executor:
        told, costs = self.told, self.costs
        executor = start_executor(told, self._model, launcher, self._given_up)
        try:
            if costs is None:
                costs = find_costs(told.config, told.spec, executor, executor.hosts)
            if costs is not None:
                self._use_costs(costs)
        except BaseException:
            executor.close()
            raise
        self._executor, self.costs = executor, costs
        return executor

    def _next_generation(self) -> None:
        self.told = structs.replace(self.told, generation=self.told.generation + 1)

    def tell_adapters(self, adapters: tuple[Adapter, ...]) -> None:
        """Let ranks that replace lost ones load these adapters, and no others."""
        self.told = structs.replace(self.told, adapters=adapters)

    def take_restart(self, cause: BaseException) -> None:
        """Use up one restart.

        Raises:
            BaseException: no restart is left, as in `Restarts.take`; also the `failure` from now on.
        """
        try:
            self.restarts.take(cause)
        except BaseException as final:
            self.failure = final
            raise

    def end_lost(self) -> None:
        """End what is left of lost ranks, before the next `start`."""
        assert self._executor is not None
        self._launcher = self._executor.replace() or self._launcher
        self._next_generation()

    def check_wanted(self, cause: BaseException) -> None:
        """Raise the cause of a loss, if lost ranks are not replaced or the caller has given up waiting."""
        if self.failure is not None or self._given_up.is_set():
            raise cause

    def fail(self, cause: BaseException) -> None:
        """Replace the ranks no more, whatever happens: from now on the cause is the `failure`."""
        self.failure = cause

    def give_up(self) -> None:
        """Stop waiting for new ranks."""
        self._given_up.set()

    def close(self) -> None:
        """End the ranks. May be called twice."""
        self.give_up()
        if self._executor is not None:
            self._executor.close()
        if self._launcher is not None:
            self._launcher.release(0.0)
