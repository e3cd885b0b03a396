"""One engine in a process group of its own: started, asked, held still while others run, ended.

Holds the parent's end of `drivers/protocol.py`. Must not know which engine it is.

An idle engine is stopped by SIGSTOP, because some spin while they wait. The group shares the parent's session on
purpose: if the parent dies, the kernel sends stopped groups that lost it SIGHUP and SIGCONT, and nothing stays behind.
"""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 900.0
"""Longest start: loading, compiling, warming up."""
RUN_S = 7200.0
"""Longest answer."""
STOP_S = 20.0
"""Patience at the end."""
GROUP_IDX = 2
"""Where /proc/PID/stat has the process group, after the name: state, parent, group."""


class EngineError(Exception):
    """The engine died, or did not answer in time."""


@dataclass(frozen=True)
class Command:
    """How to start an engine."""

    python: Path
    driver: Path
    options: dict[str, Any]
    environment: dict[str, str]


class EngineProcess:
    """A driver and everything that it starts."""

    def __init__(self, name: str, command: Command, log: Path) -> None:
        """Start the engine and wait until it is warm. It is running then, not stopped.

        Raises:
            EngineError: it did not come up.
        """
        self.name = name
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(command.python), str(command.driver), json.dumps(command.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **command.environment},
                process_group=0,
            )
        self._received = b""
        try:
            self.facts: dict[str, Any] = self._read_line(START_S)["facts"]
        except BaseException:
            self.kill()
            raise

    def ask(self, prompt: list[int], num_tokens: int) -> dict[str, Any]:
        """Run a prompt. Raises: EngineError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"prompt": prompt, "num_tokens": num_tokens}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EngineError(self._why("died")) from error
        return self._read_line(RUN_S)

    def stop(self) -> None:
        """Let it use no core until `go_on`."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Undo `stop`."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def peaks_bytes(self, pattern: str) -> list[int]:
        """Peak resident memory of every process of the group whose command matches."""
        peaks = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                group = int((entry / "stat").read_text().rpartition(")")[2].split()[GROUP_IDX])
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                status = (entry / "status").read_text()
            except (OSError, ValueError):
                continue  # it has just ended
            if group == self._process.pid and re.search(pattern, command):
                peaks += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
        return peaks

    def close(self) -> None:
        """End it, stopped or not."""
        if self._process.poll() is None:
            self.go_on()
            assert self._process.stdin is not None
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # `kill` ends what is left
                self._process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        """End it at once, and whatever it has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read_line(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise EngineError(self._why(f"gave no answer in {timeout_s:g} s"))
                part = os.read(self._process.stdout.fileno(), 2**20)
                if not part:
                    raise EngineError(self._why("died"))
                self._received += part
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _why(self, what: str) -> str:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        return f"{self.name} {what}; the end of its log:\n{tail}"


def imports_bytes(command: Command) -> int:
    """What a process holds that has imported all that the engine's ranks import, and loaded nothing."""
    done = subprocess.run(
        [str(command.python), str(command.driver), "imports"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **command.environment},
        check=True,
    )
    num_bytes: int = json.loads(done.stdout)["rss_bytes"]
    return num_bytes
