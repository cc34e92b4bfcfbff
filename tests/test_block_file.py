"""The file tier: blocks are found and read again, moved with few calls, and never another model's."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.blocks import BLOCK, SIZES, Calls, block, content, opened, pages_of, read_all, write
from wicore.errors import ConfigError
from wicore.hmt.moves import Fault
from wicore.tiers import journal as journal_module
from wicore.tiers.block_file import BlockFile
from wicore.tiers.slot import PAGE, slot_bytes

# --- what is written is read --------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("aligned", [True, False])
def test_blocks_are_read_as_they_were_written(block_folder: Path, size: int, aligned: bool) -> None:
    with opened(block_folder, size=size) as file:
        numbers = [1, 2, 3, 4, 5]
        rows = pages_of(5, size, aligned)
        for row, number in zip(rows, numbers, strict=True):
            row[:] = block(content(number), size)
        contents = [content(number) for number in numbers]
        assert file.write([6, 0, 1, 2, 4], contents, contents, rows) == {}
        rows[:] = 0
        assert file.read([6, 0, 1, 2, 4], contents, rows) == {}
        for row, each in zip(rows, contents, strict=True):
            assert np.array_equal(row, block(each, size))


@pytest.mark.parametrize(("size", "pages"), list(zip(SIZES, [3, 2, 3, 1], strict=True)))
def test_a_trailer_takes_a_page_only_where_the_padding_has_no_room(size: int, pages: int) -> None:
    assert slot_bytes(size) == pages * PAGE


@pytest.mark.parametrize("size", SIZES)
def test_entries_outlive_closing_in_the_order_of_writing(block_folder: Path, size: int) -> None:
    with opened(block_folder, size=size) as file:
        write(file, {3: 30, 1: 10})
        write(file, {2: 20})
        write(file, {3: 31})
        file.discard([1])
        assert [entry.slot for entry in file.entries()] == [2, 3]
    with opened(block_folder, size=size) as file:
        found = [(entry.slot, entry.content, entry.parent) for entry in file.entries()]
        assert found == [(2, content(20), content(21)), (3, content(31), content(32))]
        assert read_all(file) == ({2: 20, 3: 31}, {})


def test_a_slot_of_another_block_is_foreign(block_folder: Path) -> None:
    with opened(block_folder) as file:
        write(file, {0: 1})
        assert file.read([0], [content(2)], pages_of(1, BLOCK)) == {0: Fault.FOREIGN}


def test_a_slot_never_written_is_a_fault(block_folder: Path) -> None:
    with opened(block_folder) as file:
        assert file.read([0], [content(1)], pages_of(1, BLOCK)) == {0: Fault.CHECKSUM}


def test_of_one_content_in_two_slots_the_later_is_found_again(block_folder: Path) -> None:
    with opened(block_folder) as file:
        write(file, {1: 5})
        write(file, {0: 5})
    with opened(block_folder) as file:
        assert read_all(file) == ({0: 5}, {})


def test_one_thread_reads_while_another_writes(block_folder: Path) -> None:
    with opened(block_folder, slots=32) as file:
        write(file, {slot: slot for slot in range(16)})
        faults: list[Any] = []

        def rewrite() -> None:
            for turn in range(20):
                faults.append(write(file, {slot: 100 * turn + slot for slot in range(16, 32)}))

        writer = threading.Thread(target=rewrite)
        writer.start()
        rows = pages_of(16, BLOCK)
        for _ in range(20):
            assert file.read(range(16), [content(slot) for slot in range(16)], rows) == {}
            assert all(np.array_equal(rows[slot], block(content(slot), BLOCK)) for slot in range(16))
        writer.join()
        assert faults == [{}] * 20
        assert read_all(file) == ({slot: slot if slot < 16 else 1900 + slot for slot in range(32)}, {})


@pytest.mark.parametrize(
    ("slots", "contents", "rows"),
    [
        ([8], [content(1)], pages_of(1, BLOCK)),
        ([-1], [content(1)], pages_of(1, BLOCK)),
        ([0], [b"short"], pages_of(1, BLOCK)),
        ([0], [content(1)], pages_of(1, BLOCK - 1)),
        ([0], [content(1)], pages_of(1, 2 * BLOCK)[:, ::2]),
        ([0], [content(1)], pages_of(1, BLOCK).view(np.int8)),
        ([0, 1], [content(1)], pages_of(1, BLOCK)),
    ],
)
def test_what_breaks_the_contract_raises(
    tmp_path: Path, slots: list[int], contents: list[bytes], rows: np.ndarray
) -> None:
    with opened(tmp_path) as file:
        with pytest.raises(ValueError):  # noqa: PT011
            file.read(slots, contents, rows)
        with pytest.raises(ValueError):  # noqa: PT011
            file.write(slots, contents, contents, rows)


def test_a_parent_is_a_hash(tmp_path: Path) -> None:
    with opened(tmp_path) as file, pytest.raises(ValueError, match="a hash of 5 bytes instead of 16"):
        file.write([0], [content(1)], [b"short"], pages_of(1, BLOCK))


# --- how it is moved ----------------------------------------------------------------------------------


def test_neighbouring_slots_are_moved_by_one_call(block_folder: Path, calls: Calls) -> None:
    with opened(block_folder) as file:
        calls.made.clear()
        write(file, {slot: slot for slot in (5, 0, 2, 1, 6)})
        assert [offset // slot_bytes(BLOCK) for offset, _ in calls.made] == [0, 5]
        calls.made.clear()
        read_all(file)
        assert len(calls.made) == 2


def test_aligned_rows_are_moved_without_a_copy(block_folder: Path, calls: Calls) -> None:
    rows = pages_of(2, BLOCK)
    with opened(block_folder) as file:
        calls.made.clear()
        file.write([0, 1], [content(0)] * 2, [content(0)] * 2, rows)
        file.read([0, 1], [content(0)] * 2, rows)
    for _, buffers in calls.made:
        assert [len(buffer) for buffer in buffers] == [BLOCK, PAGE] * 2
        addresses = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers]
        assert addresses[::2] == [row.ctypes.data for row in rows]
        assert all(address % PAGE == 0 for address in addresses)


def test_direct_access_is_always_aligned(block_folder: Path, calls: Calls) -> None:
    with opened(block_folder, size=SIZES[2]) as file:
        if not file.direct:
            pytest.skip("of direct access only")
        rows = pages_of(3, SIZES[2], aligned=False)
        file.write([0, 1, 4], [content(0)] * 3, [content(0)] * 3, rows)
    for offset, buffers in calls.made:
        for buffer in buffers:
            assert len(buffer) % PAGE == offset % PAGE == 0
            assert np.frombuffer(buffer, np.uint8).ctypes.data % PAGE == 0


def test_long_runs_are_cut_to_what_one_call_takes(tmp_path: Path) -> None:
    with opened(tmp_path, size=PAGE, slots=1300) as file:
        numbers = {slot: slot % 7 for slot in range(1300)}
        assert write(file, numbers) == {}
        rows = pages_of(1300, PAGE)
        assert file.read(range(1300), [content(n) for n in numbers.values()], rows) == {}
        assert all(
            np.array_equal(row, block(content(n), PAGE))
            for row, n in zip(rows, numbers.values(), strict=True)
        )


def test_transfers_that_stop_halfway_go_on(block_folder: Path, calls: Calls) -> None:
    with opened(block_folder) as file:
        step = PAGE if file.direct else 1000
        calls.effect = lambda buffers, offset: [buffers[0][:step]]
        assert write(file, {1: 1, 2: 2, 3: 3}) == {}
        assert read_all(file) == ({1: 1, 2: 2, 3: 3}, {})


# --- another model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", [{"fingerprint": b"other"}, {"size": BLOCK - 200}, {"slots": 9}, {"slots": 7}]
)
def test_a_file_of_another_model_or_size_is_empty(block_folder: Path, other: dict[str, Any]) -> None:
    with opened(block_folder) as file:
        write(file, {0: 1})
    with opened(block_folder, **other) as file:
        assert file.entries() == []
        assert write(file, {1: 5}) == {}
        assert read_all(file) == ({1: 5}, {})
        size = (block_folder / "global.blocks").stat().st_size
        assert size == file.slots * slot_bytes(file.block_bytes)
    with opened(block_folder) as file:
        assert file.entries() == []


def test_blocks_of_another_model_are_foreign_whatever_the_journal_says(block_folder: Path) -> None:
    with opened(block_folder) as file:
        write(file, {0: 1})
    with opened(block_folder, fingerprint=b"other") as file:
        assert file.read([0], [content(1)], pages_of(1, BLOCK)) == {0: Fault.FOREIGN}
    (block_folder / "global.journal").unlink()
    with opened(block_folder, fingerprint=b"other") as file:
        assert file.entries() == []


# --- the journal's size -------------------------------------------------------------------------------


def test_the_journal_is_written_anew_when_it_has_grown(
    block_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_SLACK", 4)
    largest = 0
    with opened(block_folder) as file:
        for turn in range(40):
            write(file, {0: turn, 1: turn + 100})
            largest = max(largest, (block_folder / "global.journal").stat().st_size)
    assert largest < 1500
    with opened(block_folder) as file:
        assert read_all(file) == ({0: 39, 1: 139}, {})
    assert sorted(path.name for path in block_folder.iterdir()) == [
        "global.blocks",
        "global.journal",
        "probe",
    ]


# --- opening ------------------------------------------------------------------------------------------


def error_of(folder: Path, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught, opened(folder, **options):
        pass
    return caught.value


def test_a_disk_without_room_is_named_at_opening(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    err = error_of(tmp_path, slots=2 * disk.f_blocks * disk.f_frsize // slot_bytes(BLOCK))
    assert err.param == "hmt.nvme_bytes"
    assert f"no room for {tmp_path}/global.blocks of " in err.message
    assert "bytes more are needed" in err.message
    assert err.message.endswith("lower it, or choose another disk by hmt.nvme_path")
    assert (tmp_path / "global.blocks").stat().st_size == 0


def test_a_limit_on_file_size_is_named_at_opening(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * PAGE, hard))
    try:
        err = error_of(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert err.param == "hmt.nvme_bytes"
    assert "(File too large); lower it" in err.message


def test_a_disk_that_cannot_preallocate_is_named_at_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    err = error_of(tmp_path)
    assert err.param == "hmt.nvme_bytes"
    assert (
        "cannot be preallocated on this system (it has no posix_fallocate); set hmt.nvme_bytes to 0"
        in err.message
    )


def test_a_file_of_no_slot_is_refused(tmp_path: Path) -> None:
    err = error_of(tmp_path, slots=0)
    assert err.message == "hmt.nvme_bytes: has no room for a block of 12,288 bytes; raise it, or set 0"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^hmt.nvme_path: .*/away/global.blocks cannot be used \(No such"
    ) as caught:
        BlockFile(tmp_path / "away", "global", 8, BLOCK, b"model")
    assert caught.value.param == "hmt.nvme_path"


def test_a_journal_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "global.journal").mkdir()
    assert "hmt.nvme_path" in error_of(tmp_path).message
