"""Unequal ranks: one of two ranks has half the speed, and the parts of a prompt follow the ranks' weights, or not.

    python benchmarks/unequal.py [--length 16384] [--repeats 3] [--quotas 1,0.5] [--json] [--save]

The model of `common.py` on two worker processes, each on a core of its own, of which a control group (version 1, so
root) gives it a quota, in periods of 5 ms; with quotas well below a core, other programs hardly matter. Weights are
none, those of the quotas, and `auto`, which measures. What is compared is the time that each rank computes in a prompt:
its time on a core, and the time that it wanted one beyond its quota; waiting for messages is not in it. Each kind of
weights has workers of its own, which idle while others run; runs are interleaved, numbers are medians. `balance` is the
larger compute time over the mean.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import median, parser, random_model, random_prompt, report, run_request
from longspan.config import EngineConfig
from longspan.engine.engine import Engine

CPU, ACCOUNTS = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/cpuacct")
PERIOD_US = 5000
MOST_SHARES = 2**18
"""Of a core, where a program outside has 1,024: what else runs takes little from the ranks."""
FIRST_PORT = 7310


class Group:
    """Control group of one worker."""

    def __init__(self, name: str, quota: float) -> None:
        """Make the group. Args: `quota` is its part of a core; 1 is no limit."""
        self._paths = [directory / name for directory in (CPU, ACCOUNTS)]
        for path in self._paths:
            path.mkdir(exist_ok=True)
        (self._paths[0] / "cpu.shares").write_text(str(MOST_SHARES))
        if quota < 1:
            (self._paths[0] / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._paths[0] / "cpu.cfs_quota_us").write_text(str(round(PERIOD_US * quota)))

    def command(self, core: int, command: list[str]) -> list[str]:
        """A command, to be run in this group on one core."""
        joins = "".join(f"echo $$ > {path}/tasks; " for path in self._paths)
        return ["sh", "-c", f'{joins}exec taskset -c {core} "$@"', "sh", *command]

    def compute_s(self) -> float:
        """Seconds on a core, and seconds held back by the quota, since the group was made."""
        throttled = dict(line.split() for line in (self._paths[0] / "cpu.stat").read_text().splitlines())
        return (int((self._paths[1] / "cpuacct.usage").read_text()) + int(throttled["throttled_time"])) / 1e9

    def remove(self) -> None:
        for path in self._paths:
            path.rmdir()


class UnequalRanks:
    """Two ranks of which each has a part of its core."""

    def __init__(self, model: Path, weights: Any, quotas: Sequence[float], place: int) -> None:
        listen, meeting = f"127.0.0.1:{FIRST_PORT + 2 * place}", FIRST_PORT + 2 * place + 1
        self.groups = [Group(f"longspan-{place}-{rank}", part) for rank, part in enumerate(quotas)]
        worker = [sys.executable, "-m", "longspan.worker", "--driver", f"tcp://{listen}", "--interface", "lo"]
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting)}
        self._workers = [
            subprocess.Popen(group.command(rank, worker), env={**os.environ, **shared, "RANK": str(rank)})
            for rank, group in enumerate(self.groups)
        ]
        config = EngineConfig(
            model=str(model),
            context_parallel_size=2,
            executor="external",
            listen=listen,
            threads_per_rank=1,
            rank_weights=weights,
            measure="again" if weights == "auto" else "auto",
            placement="striped",
            kv_cache_memory=2**30,
            enable_prefix_caching=False,
        )
        self.engine = Engine(config)
        self.run(random_prompt(1024, 99))

    def run(self, prompt: list[int]) -> tuple[float, list[float]]:
        """First token, and what each rank computed for it, in seconds."""
        before = [group.compute_s() for group in self.groups]
        ttft_s = run_request(self.engine, prompt, 1).ttft_s
        time.sleep(0.05)  # until the ranks are idle, and the kernel has counted
        return ttft_s, [group.compute_s() - earlier for group, earlier in zip(self.groups, before, strict=True)]

    def close(self) -> None:
        self.engine.close()
        for worker in self._workers:
            worker.wait()
        for group in self.groups:
            group.remove()


@contextmanager
def started(model: Path, kinds: dict[str, Any], quotas: Sequence[float]) -> Iterator[dict[str, UnequalRanks]]:
    ranks: dict[str, UnequalRanks] = {}
    try:
        for place, (name, weights) in enumerate(kinds.items()):
            ranks[name] = UnequalRanks(model, weights, quotas, place)
        yield ranks
    finally:
        for one in ranks.values():
            one.close()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quotas", default="1,0.5", help="of a core, for either rank")
    chosen = options.parse_args()
    quotas = tuple(map(float, chosen.quotas.split(",")))
    os.environ["LONGSPAN_SECRET"] = secrets.token_hex(16)
    kinds = {"none": None, "of the quotas": quotas, "auto": "auto"}
    rows = []
    with random_model() as model, started(model, kinds, quotas) as ranks:
        runs: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in kinds}
        for repeat in range(chosen.repeats):
            prompt = random_prompt(chosen.length, repeat)
            for name, one in ranks.items():
                runs[name].append(one.run(prompt))
        for name, of_kind in runs.items():
            computed = [median(parts[rank] for _, parts in of_kind) for rank in range(2)]
            row = {"weights": name, "ttft_s": median(ttft_s for ttft_s, _ in of_kind)}
            row |= {f"rank {rank} computes, s": seconds for rank, seconds in enumerate(computed)}
            rows.append(row | {"balance": median(max(parts) / (sum(parts) / 2) for _, parts in of_kind)})
    report("unequal", rows, {"prompt tokens": chosen.length, "parts of a core": chosen.quotas}, chosen)


if __name__ == "__main__":
    main()
