"""The `longspan` command, with a file of when it got how far: `benchmarks/startup.py` runs it.

    python benchmarks/timed_command.py FILE ZERO generate recall ...

Times are seconds since ZERO, which is a reading of the system's monotonic clock.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from longspan.cli.main import main
from longspan.engine.watch import Watch
from longspan.engine.workers import WorkerExecutor
from longspan.group.messages import Hello, Ready, decode_to_driver


def watch(path: Path, zero_s: float) -> None:
    """Wrap what the driver does on its way to the first token; the file is written when it ends its ranks."""
    times: dict[str, float] = {}

    def note(name: str) -> None:
        times[name] = time.monotonic() - zero_s

    start, take_in = WorkerExecutor.__init__, Watch.take_in
    submit, close = WorkerExecutor.submit, WorkerExecutor.close

    def noted_start(self: Any, *arguments: Any) -> None:
        note("imported_s")
        start(self, *arguments)

    def noted_take_in(self: Any, peer: bytes, frame: bytes) -> None:
        message = decode_to_driver(frame)
        if isinstance(message, (Hello, Ready)):
            note("introduced_s" if isinstance(message, Hello) else "ready_s")  # the last of all ranks counts
        take_in(self, peer, frame)

    def noted_submit(self: Any, plan: Any) -> Any:
        future = submit(self, plan)
        if "first_token_s" not in times:
            future.add_done_callback(lambda _: times.setdefault("first_token_s", time.monotonic() - zero_s))
        return future

    def noted_close(self: Any) -> None:
        path.write_text(json.dumps(times))
        close(self)

    WorkerExecutor.__init__, Watch.take_in = noted_start, noted_take_in  # type: ignore[method-assign]
    WorkerExecutor.submit, WorkerExecutor.close = noted_submit, noted_close  # type: ignore[method-assign]


if __name__ == "__main__":
    file, zero, *sys.argv[1:] = sys.argv[1:]
    watch(Path(file), float(zero))
    main()
