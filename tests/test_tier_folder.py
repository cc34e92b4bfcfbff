"""Workers of one host and their folders."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from wicore.errors import ConfigError
from wicore.tiers.folder import claim

HOLDER = """
import signal, sys
from pathlib import Path
from wicore.tiers.folder import claim
held = claim(Path(sys.argv[1]))
print(held.path.name, flush=True)
signal.pause()
"""


def test_each_claim_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    with claim(tmp_path / "kv") as first, claim(tmp_path / "kv") as second:
        assert (first.path, second.path) == (tmp_path / "kv" / "0", tmp_path / "kv" / "1")


def test_a_folder_that_was_given_up_is_taken_again(tmp_path: Path) -> None:
    first, second = claim(tmp_path), claim(tmp_path)
    first.close()
    first.close()
    with claim(tmp_path) as third:
        assert third.path == tmp_path / "0"
    second.close()


def test_the_folder_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"0\n"
        with claim(tmp_path) as other:
            assert other.path.name == "1"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with claim(tmp_path) as again:
        assert again.path.name == "0"


def test_a_folder_is_for_its_owner_only(tmp_path: Path) -> None:
    with claim(tmp_path) as held:
        assert stat.S_IMODE(held.path.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made_is_named_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        claim(tmp_path / "file")
    assert caught.value.param == "hmt.nvme_path"
    assert caught.value.message == (
        f"hmt.nvme_path: {tmp_path}/file/0 cannot be used (Not a directory); let this user write there, or"
        " choose another folder"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        claim(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ConfigError, match="No locks available"):
        claim(tmp_path)
