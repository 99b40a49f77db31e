from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfeval.errors import StorageError
from selfeval.store import code_of, is_own


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "selfeval"


def test_only_the_code_of_the_same_content_and_user_is_accepted(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_own("a", "0" * 64)
    code = code_of("a")
    assert is_own("a", code)
    assert not is_own("b", code)
    assert not is_own("a", None)
    assert not is_own("a", "é")
    monkeypatch.setenv("XDG_STATE_HOME", str(state.parent.parent / "other"))
    assert not is_own("a", code)
    assert code_of("a") != code


def test_the_key_can_be_read_by_its_owner_only_and_a_damaged_one_is_replaced(state: Path) -> None:
    code = code_of("a")
    [key] = state.iterdir()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    key.write_bytes(b"short")
    assert not is_own("a", code)
    again = code_of("a")
    assert again != code
    assert is_own("a", again)


def test_all_who_create_the_key_at_once_use_the_same(state: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(code_of, ["a"] * 64))) == 1
    assert len(list(state.iterdir())) == 1


def test_a_state_folder_that_cannot_be_written_is_an_error(state: Path) -> None:
    state.parent.write_text("a file")
    with pytest.raises(StorageError):
        code_of("a")
    assert not is_own("a", "b")
