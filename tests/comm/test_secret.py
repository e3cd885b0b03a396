"""The secret of a group: where it comes from, and what is refused."""

import pytest
from links import SECRET

from longspan.comm.secret import read_secret, require_secret
from longspan.errors import ConfigError


def test_a_secret_comes_from_a_file_or_the_environment_and_is_never_shown(tmp_path, monkeypatch):
    monkeypatch.delenv("LONGSPAN_SECRET", raising=False)
    assert read_secret(None) is None
    monkeypatch.setenv("LONGSPAN_SECRET", " correct horse battery staple\n")
    path = tmp_path / "secret"
    path.write_text("correct horse battery staple\n")
    keys = [secret.key("x") for secret in (SECRET, read_secret(None), read_secret(str(path)))]
    assert len(set(keys)) == 1
    assert SECRET.key("x") != SECRET.key("y")
    assert "horse" not in f"{SECRET} {SECRET!r}"


def test_rejects_secrets_that_are_missing_unreadable_or_short(tmp_path, monkeypatch):
    monkeypatch.delenv("LONGSPAN_SECRET", raising=False)
    with pytest.raises(ConfigError, match=r"^LONGSPAN_SECRET: not set, legal is a secret of at least 16 bytes.*: why$"):
        require_secret(None, "why")
    with pytest.raises(ConfigError, match=r"^secret_file: got .*nowhere', legal is a file that can be read"):
        read_secret(str(tmp_path / "nowhere"))
    monkeypatch.setenv("LONGSPAN_SECRET", "hunter2")
    with pytest.raises(ConfigError, match=r"^LONGSPAN_SECRET: got a secret of 7 bytes") as caught:
        read_secret(None)
    assert "hunter2" not in str(caught.value)
