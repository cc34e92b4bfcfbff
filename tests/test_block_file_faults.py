"""The file tier under faults: what is read is what was written, or a fault, whatever happened in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.blocks import BLOCK, SIZES, Calls, content, opened, pages_of, read_all, write
from wicore.hmt.moves import Fault
from wicore.tiers import journal as journal_module
from wicore.tiers.block_file import BlockFile
from wicore.tiers.slot import PAGE, slot_bytes

# --- faults of the disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_costs_its_own_blocks_only(block_folder: Path, calls: Calls, number: int) -> None:
    with opened(block_folder) as file:
        write(file, {slot: slot for slot in range(4)})
        calls.fail(number, slots=[2])
        assert write(file, {slot: 10 + slot for slot in range(4)}) == {2: Fault.IO}
        assert read_all(file)[0] == {0: 10, 1: 11, 3: 13}
    with opened(block_folder) as file:
        assert [entry.slot for entry in file.entries()] == [0, 1, 3]


def test_a_failed_read_costs_its_own_blocks_only(block_folder: Path, calls: Calls) -> None:
    with opened(block_folder) as file:
        write(file, {slot: slot for slot in range(4)})
        calls.fail(errno.EIO, slots=[1])
        assert read_all(file) == ({0: 0, 2: 2, 3: 3}, {1: Fault.IO})


def test_a_disk_that_takes_nothing_faults_every_block(block_folder: Path, calls: Calls) -> None:
    with opened(block_folder) as file:
        calls.effect = lambda buffers, offset: []
        assert write(file, {0: 0, 1: 1}) == {0: Fault.IO, 1: Fault.IO}
        assert file.entries() == []


def test_a_closed_file_faults(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        write(file, {0: 1})
        file.close()
        assert write(file, {0: 2, 1: 1}) == {0: Fault.IO, 1: Fault.IO}
        assert file.read([0], [content(1)], pages_of(1, BLOCK)) == {0: Fault.IO}


def test_a_journal_that_cannot_grow_costs_a_miss_after_the_restart(
    block_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(block_folder) as file:
        write(file, {0: 0, 1: 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            assert write(file, {0: 2, 2: 2}) == {}
            assert read_all(file) == ({0: 2, 1: 1, 2: 2}, {})
        write(file, {3: 3})
    with opened(block_folder) as file:
        assert read_all(file) == ({1: 1, 3: 3}, {0: Fault.FOREIGN})


# --- damage -------------------------------------------------------------------------------------------


def test_no_flipped_bit_gives_wrong_bytes(block_folder: Path) -> None:
    with opened(block_folder, size=SIZES[1]) as file:
        numbers = {slot: slot for slot in range(8)}
        write(file, numbers)
        path = block_folder / "global.blocks"

        @given(st.integers(0, 8 * slot_bytes(SIZES[1]) * 8 - 1))
        @settings(max_examples=150)
        def flip(bit: int) -> None:
            with path.open("r+b", buffering=0) as raw:
                before = os.pread(raw.fileno(), 1, bit // 8)[0]
                os.pwrite(raw.fileno(), bytes([before ^ 1 << bit % 8]), bit // 8)
                found, faults = read_all(file)  # compares the bytes
                os.pwrite(raw.fileno(), bytes([before]), bit // 8)
            assert found == {slot: slot for slot in numbers if slot not in faults}
            assert set(faults) <= {bit // 8 // slot_bytes(SIZES[1])}
            within = bit // 8 % slot_bytes(SIZES[1])
            if within < SIZES[1] or PAGE * 2 - 128 <= within < PAGE * 2 - 40:
                assert set(faults.values()) == {Fault.CHECKSUM}

        flip()


def test_a_file_cut_short_is_truncated_where_it_ends(block_folder: Path) -> None:
    with opened(block_folder) as file:
        write(file, {slot: slot for slot in range(8)})
        os.truncate(block_folder / "global.blocks", 3 * slot_bytes(BLOCK) + 700)
        found, faults = read_all(file)
        assert found == {0: 0, 1: 1, 2: 2}
        assert faults == dict.fromkeys(range(3, 8), Fault.TRUNCATED)
    with opened(block_folder) as file:
        assert read_all(file) == ({0: 0, 1: 1, 2: 2}, {})
        assert write(file, {7: 70}) == {}
        assert read_all(file) == ({0: 0, 1: 1, 2: 2, 7: 70}, {})


def test_without_its_file_a_journal_promises_nothing(block_folder: Path) -> None:
    with opened(block_folder) as file:
        write(file, {0: 0})
    (block_folder / "global.blocks").unlink()
    with opened(block_folder) as file:
        assert file.entries() == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
        lambda path: path.write_bytes(os.urandom(5000)),
    ],
    ids=["missing", "empty", "cut", "flipped", "garbage"],
)
def test_without_a_journal_the_blocks_are_found_by_their_trailers(
    block_folder: Path, size: int, damage: Callable[[Path], None]
) -> None:
    with opened(block_folder, size=size) as file:
        write(file, {3: 30, 1: 10})
        write(file, {2: 20, 3: 31})
    damage(block_folder / "global.journal")
    with opened(block_folder, size=size) as file:
        assert [entry.slot for entry in file.entries()] == [1, 2, 3]
        assert read_all(file) == ({1: 10, 2: 20, 3: 31}, {})
        write(file, {1: 11})
    with opened(block_folder, size=size) as file:
        assert [entry.slot for entry in file.entries()] == [2, 3, 1]


@given(cut=st.integers(0, 8 * 56 - 1), garbage=st.binary(max_size=150))
@settings(max_examples=30)
def test_a_torn_journal_is_cut_off_where_it_is_torn(cut: int, garbage: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "global.journal"
        with opened(Path(name)) as file:
            head = path.stat().st_size
            write(file, {slot: slot for slot in range(8)})
        path.write_bytes(path.read_bytes()[: head + cut] + garbage)
        whole = {slot: slot for slot in range(cut // 56)}
        for _ in range(2):
            with opened(Path(name)) as file:
                found, faults = read_all(file)
                assert not faults
                assert whole.items() <= found.items()
                write(file, {7: 70})
                whole[7] = 70


def test_a_flipped_record_promises_nothing(block_folder: Path) -> None:
    with opened(block_folder) as file:
        write(file, {slot: slot for slot in range(8)})
    path = block_folder / "global.journal"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with opened(block_folder) as file:
        assert [entry.slot for entry in file.entries()] == list(range(7))


def test_a_journal_that_lies_gives_faults(block_folder: Path) -> None:
    with opened(block_folder) as file:
        write(file, {0: 1})
        kept = (block_folder / "global.journal").read_bytes()
        write(file, {0: 2})
    (block_folder / "global.journal").write_bytes(kept)
    with opened(block_folder) as file:
        assert read_all(file) == ({}, {0: Fault.FOREIGN})


def test_a_journal_that_cannot_be_written_anew_goes_on(
    block_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(journal_module, "_SLACK", 4)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with opened(block_folder) as file, monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        for turn in range(40):
            assert write(file, {0: turn}) == {}
    assert 1 <= len(caplog.records) <= 8
    assert not (block_folder / "global.journal.new").exists()
    with opened(block_folder) as file:
        assert read_all(file) == ({0: 39}, {})


# --- killed -------------------------------------------------------------------------------------------

WRITER = """
import itertools, random, sys
from pathlib import Path
from tests.blocks import opened, write

number = int(sys.argv[2])
with opened(Path(sys.argv[1]), slots=64) as file:
    for turn in itertools.count():
        slots = random.sample(range(64), 8)
        write(file, {slot: (number := number + 1) for slot in slots})
        file.discard(random.sample(range(64), 2))
        print(turn, flush=True)
"""


def test_a_writer_that_is_killed_leaves_no_wrong_block(tmp_path: Path) -> None:
    """Each time it goes on with what the one before it left."""
    found: dict[int, int] = {}
    for life in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(life * 1_000_000)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        ) as writer:
            assert writer.stdout
            for _ in range(20 + life):
                assert writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        if life % 3 == 2:
            (tmp_path / "global.journal").unlink()
        with opened(tmp_path, slots=64) as file:
            found, faults = read_all(file)
            # Its last call was under way: 8 slots may hold another block than their entry, or part of one.
            assert len(faults) <= 8
            assert len(found) > 20
            assert max(found.values()) > life * 1_000_000
            file.discard(list(faults))


# --- any order of everything --------------------------------------------------------------------------


class FileMachine(RuleBasedStateMachine):
    """Writes, discards, restarts and lost journals against a dict of what each slot holds."""

    size = BLOCK
    slots = st.integers(0, 7)

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.numbers = 0
        self.held: dict[int, int] = {}
        self.open()

    def open(self) -> None:
        self.file = BlockFile(self.folder, "global", 8, self.size, b"model")

    @rule(slots=st.lists(slots, min_size=1, max_size=8, unique=True))
    def write(self, slots: list[int]) -> None:
        self.numbers += len(slots)
        put = {slot: self.numbers - place for place, slot in enumerate(slots)}
        assert write(self.file, put) == {}
        self.held |= put

    @rule(slots=st.lists(slots, max_size=4))
    def discard(self, slots: list[int]) -> None:
        self.file.discard(slots)
        self.held = {slot: number for slot, number in self.held.items() if slot not in slots}

    @rule()
    def restart(self) -> None:
        self.file.close()
        self.open()

    @rule(cut=st.integers(0, 400))
    def lose_the_end_of_the_journal(self, cut: int) -> None:
        """Some blocks are missed, and some discarded ones are back; which ones, the file says."""
        self.file.close()
        journal = self.folder / "global.journal"
        os.truncate(journal, max(0, journal.stat().st_size - cut))
        self.open()
        found, faults = read_all(self.file)
        assert set(faults.values()) <= {Fault.FOREIGN}
        assert all(self.held.get(slot, number) == number for slot, number in found.items())
        self.file.discard(list(faults))
        self.held = found

    @rule()
    def lose_the_journal(self) -> None:
        self.file.close()
        (self.folder / "global.journal").unlink()
        self.open()
        found, faults = read_all(self.file)
        assert not faults
        assert self.held.items() <= found.items()
        self.held = found

    @invariant()
    def what_is_held_can_be_read(self) -> None:
        assert read_all(self.file) == (self.held, {})

    def teardown(self) -> None:
        self.file.close()
        self.temporary.cleanup()


@pytest.mark.parametrize("size", SIZES)
def test_any_order_of_writes_discards_and_restarts_keeps_the_blocks(block_folder: Path, size: int) -> None:
    machine = type("Machine", (FileMachine,), {"size": size})
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=25))
