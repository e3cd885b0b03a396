"""`longspan generate --kv-disk` and `longspan cache`."""

import json

import pytest

from longspan.worker import page_mover

GENERATE = ("generate", "recall", "--executor", "threads", "--page-size", "4", "--stripe-size", "8", "--json")
PROMPT = "The magic number is 4711. " + "Nothing else is of interest. " * 8 + "Once more: The magic number is "


@pytest.mark.cover
def test_a_second_question_about_a_text_is_answered_from_the_disk(longspan, cache_home, tmp_path, monkeypatch):
    monkeypatch.setattr(page_mover, "NICENESS", 0)  # on a busy machine the end would wait for long
    disk = str(tmp_path / "kv")
    reports = []
    for num_ranks in ("2", "3"):
        done = longspan(*GENERATE, "--prompt", PROMPT, "--kv-disk", disk, "--context-parallel-size", num_ranks)
        assert done.code == 0, done.err
        reports.append(json.loads(done.out))
    assert reports[0]["text"] == reports[1]["text"]
    assert reports[0]["usage"]["cached_tokens"] == 0
    num_tokens = reports[0]["usage"]["prompt_tokens"]
    assert reports[1]["usage"]["cached_tokens"] in ((num_tokens - 1) // 4 * 4, 0), "0: computing was sooner"
    listed = json.loads(longspan("cache", disk, "--json").out)
    assert listed["models"][0]["tokens"] > num_tokens
    assert listed["models"][0]["page_size"] == 4
    assert "recall (float32, pages of 4): " in longspan("cache", disk).out
    cleared = longspan("cache", disk, "--clear")
    assert "removed" in cleared.out
    assert longspan("cache", disk).out == "no pages\n"


def test_rejects_a_directory_that_holds_no_pages(longspan, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        done = longspan("cache", str(path))
        assert done.code == 2
        assert done.err == (
            f"longspan: directory: got {str(path)!r}, legal is a directory that --kv-disk made, with a file "
            "longspan-kv.json\n"
        )


def test_rejects_a_size_without_a_disk(longspan):
    done = longspan(*GENERATE, "--prompt", "a", "--kv-disk-size", "1G")
    assert (done.code, done.err) == (
        2,
        "longspan: --kv-disk-size: got 1000000000 without --kv-disk, legal is none there\n",
    )
