"""`longspan serve` as people run it, for tests and programs: the command in a process of its own, with its output."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from process_tree import is_alive, parents_of_ranks, ranks

FACT = "The magic number is 4711. "
QUESTION = "Once more: The magic number is "
FILLER = "".join(f"Line {i} says nothing of interest to anybody; its sum is {i * i % 97}.\n" for i in range(350))


@dataclass
class Command:
    """A server process and what it says."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str]

    def end(self, number=signal.SIGTERM, seconds=30):
        self.process.send_signal(number)
        return self.process.wait(timeout=seconds)

    def workers(self):
        """Process ids of the ranks."""
        return ranks(self.process.pid)

    def said(self):
        return "".join(self.lines)


@contextlib.contextmanager
def command(*options, model="recall"):
    """A server that is ready; it and its workers are gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan", "serve", str(model), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines, ready, url = [], threading.Event(), []

    def read():
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"ready at (http://\S+)", line):
                url.append(found[1])
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    workers = []
    try:
        assert ready.wait(timeout=120)
        assert url, lines
        served = Command(process, url[0], lines)
        workers = served.workers() + parents_of_ranks(process.pid)
        yield served
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=10)
        deadline = time.monotonic() + 10
        while any(map(is_alive, workers)):
            assert time.monotonic() < deadline, "workers outlive their server"
            time.sleep(0.05)
