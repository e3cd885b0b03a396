"""LoRA adapters of one engine: which there are, and how ranks come to have them.

Holds names, checks of files against the model, and the order of a load: files, ranks, requests. Must not know requests'
tokens, or how products are added.
Read next: `longspan.models.adapter_files`, the checks; `longspan.models.adapters`, the products;
docs/decisions/0087-adapters-per-request.md.

Note [Loads while requests run]
    Messages to a rank keep their order, so a plan that names an adapter comes behind the message that loads it, and one
    that lets it go behind all plans that name it:

        begin_load    all ranks read the files, between two plans, and answer
        end_load      requests may name it, and ranks that replace lost ones load it at their start
        retire        requests may not name it any more; those that run go on, also over a loss of ranks
        drop_unused   once none of its requests is left, the ranks let it go
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import NamedTuple

import torch

from longspan.adapter_names import ADAPTER_NAME_RULE, check_adapter_name
from longspan.config import EngineConfig
from longspan.engine.executor import Executor
from longspan.errors import ConfigError, LongspanError
from longspan.models.adapter_files import AdaptableModules, AdapterFiles, adaptable_modules
from longspan.models.loader import load_config, model_on_meta
from longspan.scheduler.request import Request
from longspan.types import Adapter


class AdapterLoad(NamedTuple):
    """An adapter that ranks are loading."""

    adapter: Adapter
    loaded: "Future[None]"
    """Ends when all ranks have loaded it; fails with the first error."""
    executor: Executor
    """Of these ranks: others, which have replaced them, were not told."""


class EngineAdapters:
    """Adapters that requests of one engine may name. Any thread may ask for them; one thread changes them."""

    def __init__(self, config: EngineConfig) -> None:
        """Read and check the adapters that options name.

        Raises:
            ConfigError: one of them is not an adapter of this model.
        """
        self._config = config
        self._lock = threading.Lock()
        self._modules: AdaptableModules | None = None
        self._next_id = 0
        self._named: dict[str, Adapter] = {}
        self._loading: set[str] = set()
        self._retired: list[Adapter] = []
        for name, directory in config.adapters.items():
            self._named[name] = self.read(name, directory, got=f"{name}={directory}")

    @property
    def named(self) -> list[Adapter]:
        """Adapters that requests may name, in the order of their loads."""
        return list(self._named.values())

    @property
    def told(self) -> tuple[Adapter, ...]:
        """Adapters that ranks must have: those that requests may name, and those that running ones still need."""
        return (*self._named.values(), *self._retired)

    def find(self, name: str) -> Adapter:
        """The adapter of a name.

        Raises:
            ConfigError: there is none.
        """
        found = self._named.get(name)
        if found is None:
            raise ConfigError(f"lora: got {name!r}, legal is {_one_of(self._named)}")
        return found

    def check(self, adapter: Adapter | None) -> None:
        """Refuse an adapter that was found, and is gone meanwhile.

        Raises:
            ConfigError: it is gone.
        """
        if adapter is not None and self._named.get(adapter.name) is not adapter:
            raise ConfigError(f"lora: got {adapter.name!r}, which was unloaded, legal is {_one_of(self._named)}")

    def read(
        self, name: str, directory: str, *, got: str | None = None, name_field: str = "lora", field: str = "lora"
    ) -> Adapter:
        """Read and check an adapter's files. Any thread may call it.

        Args:
            name: what requests will call it.
            directory: where its files are.
            got: what the user gave, for errors; None for the directory.
            name_field: option or field of a request that names the adapter, for errors.
            field: that which names the directory.

        Raises:
            ConfigError: the name is illegal, or the files are not those of an adapter of this model.
        """
        check_adapter_name(name, name, name_field)
        if name == self._config.model:
            raise ConfigError(f"{name_field}: got {name!r}, which is the model's name, legal is another one")
        config = self._config
        if config.tensor_parallel_size > 1 or config.compile_dense:
            option = "compile_dense" if config.compile_dense else f"tensor_parallel_size {config.tensor_parallel_size}"
            raise ConfigError(f"{field}: got {directory!r} with {option}, legal there is none")
        files = AdapterFiles(directory, field, got)
        with self._lock:
            if self._modules is None:
                model_config = load_config(config.model, config.hf_overrides)[0]
                self._modules = adaptable_modules(model_on_meta(model_config, torch.float32))
        files.products(self._modules, torch.float32, torch.device("cpu"))
        with self._lock:
            self._next_id += 1
            return Adapter(self._next_id - 1, name, directory, files.digest)

    def begin_load(self, adapter: Adapter, executor: Executor) -> AdapterLoad:
        """Let all ranks load an adapter; `end_load` comes behind it.

        Raises:
            ConfigError: its name is taken.
        """
        if adapter.name in self._named or adapter.name in self._loading:
            raise ConfigError(f"lora_name: got {adapter.name!r}, which is loaded, legal is {ADAPTER_NAME_RULE}")
        self._loading.add(adapter.name)
        return AdapterLoad(adapter, executor.load_adapter(adapter), executor)

    def end_load(self, load: AdapterLoad, executor: Executor) -> None:
        """Let requests name an adapter that all ranks have loaded.

        Args:
            load: whose `loaded` has ended.
            executor: of the ranks that run now.

        Raises:
            ConfigError: a rank could not load it; those that could let it go.
            LongspanError: the ranks were lost meanwhile.
        """
        adapter = load.adapter
        self._loading.discard(adapter.name)
        if load.executor is not executor:
            raise LongspanError(f"the ranks were lost while they loaded the adapter {adapter.name!r}; load it again")
        if load.loaded.exception() is not None:
            executor.unload_adapter(adapter.adapter_id)
            load.loaded.result()
        self._named = {**self._named, adapter.name: adapter}  # as other threads read

    def retire(self, name: str) -> None:
        """Let no more requests name an adapter.

        Raises:
            ConfigError: there is none of this name.
        """
        found = self._named.get(name)
        if found is None:
            raise ConfigError(f"lora_name: got {name!r}, legal is {_one_of(self._named)}")
        self._named = {name: adapter for name, adapter in self._named.items() if adapter is not found}
        self._retired.append(found)

    def drop_unused(self, requests: Callable[[], Iterable[Request]], executor: Executor) -> bool:
        """Let ranks go of retired adapters that no request needs; return whether there were any."""
        if not self._retired:
            return False
        used = {request.adapter.adapter_id for request in requests() if request.adapter is not None}
        gone = [adapter for adapter in self._retired if adapter.adapter_id not in used]
        for adapter in gone:
            self._retired.remove(adapter)
            executor.unload_adapter(adapter.adapter_id)
        return bool(gone)


def _one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(sorted(names))}" if names else "none: no adapter is loaded"
