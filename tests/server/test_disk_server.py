"""`longspan serve --kv-disk`: a text that one server has read costs the next one nothing, whatever its ranks."""

import json
import re
import signal
import subprocess
import sys

import httpx
import pytest
from served_command import FACT, FILLER, QUESTION, command

pytestmark = pytest.mark.processes

PROMPT = FACT + FILLER + QUESTION


def ask(url: str, prompt: str = PROMPT) -> tuple[str, dict]:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"], answer.json()["usage"]


def longspan(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "longspan", *words], capture_output=True, text=True, timeout=120)


def test_a_restart_with_other_ranks_goes_on_from_the_disk(tmp_path):
    disk = ("--kv-disk", str(tmp_path / "kv"), "--min-striped-len", "1000")
    with command("--context-parallel-size", "2", *disk) as served:
        first, usage = ask(served.url)
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        assert served.end() == 0
    num_tokens = usage["prompt_tokens"]
    assert first.startswith("4711")
    for num_ranks in (3, 1):
        with command("--context-parallel-size", str(num_ranks), *disk) as served:
            again, usage = ask(served.url)
            assert again == first
            assert usage["prompt_tokens_details"]["cached_tokens"] == (num_tokens - 1) // 16 * 16
            metrics = httpx.get(f"{served.url}/metrics").text
            assert re.search(r'longspan:kv_tier_hits_total{.*tier="disk"} 1.0', metrics)
            assert re.search(r'longspan:kv_tier_damaged_pages_total{.*tier="disk"} 0.0', metrics)
            assert served.end() == 0
    listed = json.loads(longspan("cache", str(tmp_path / "kv"), "--json").stdout)
    (model,) = listed["models"]
    assert model["model"] == "recall"
    assert num_tokens - 16 < model["tokens"] < num_tokens + 16
    assert longspan("cache", str(tmp_path / "kv"), "--clear").returncode == 0
    assert longspan("cache", str(tmp_path / "kv")).stdout == "no pages\n"


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_what_it_had_written(tmp_path):
    disk = ("--kv-disk", str(tmp_path), "--context-parallel-size", "2")
    with command(*disk) as served:
        first, _ = ask(served.url)
        served.process.send_signal(signal.SIGKILL)
        served.process.wait()
    with command(*disk) as served:
        again, usage = ask(served.url)
        assert again == first
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0
        assert served.end() == 0


def test_rejects_a_directory_before_ranks_start(tmp_path):
    (tmp_path / "letter.txt").write_text("")
    for directory in (tmp_path, tmp_path / "letter.txt"):
        for words in (("serve", "recall", "--port", "0"), ("generate", "recall", "--prompt", "a")):
            done = longspan(*words, "--kv-disk", str(directory))
            assert done.returncode == 2
            assert re.fullmatch(
                r"longspan: --kv-disk: got .*, legal is a directory that can be written.*\n", done.stderr
            )
    assert longspan("cache", str(tmp_path)).returncode == 2
