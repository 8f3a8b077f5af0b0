"""The file of a snapshot: what a crash, a full disk, damage, and what others wrote do to it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from concurrent_kv import (
    DropLazily,
    KeysValues,
    KVPool,
    SnapshotDamagedError,
    SnapshotError,
    SnapshotVersionError,
    SnapshotWriteError,
)
from concurrent_kv.snapshots import contents, describe, form, writing
from tests.conftest import MakePool
from tests.snapshot_crashes import CASES, ENTRIES, NAME
from tests.support import LAYOUT, append, assert_same, bits, slots_in_use, stacked, tokens
from tests.support import snapshot as state_of
from tests.test_snapshots import Codec, steps_of, tree
from tests.threading_support import run_threads

SECONDS = 120
OWED = DropLazily(7, 2, steps_of(1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool.snapshot"


# Crashes and full disks ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Where processes were killed while they saved, and how each ended."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    folder = tmp_path_factory.mktemp("crashes")
    done = subprocess.run(
        [sys.executable, "-m", "tests.snapshot_crashes", str(folder)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_whenever_a_process_ends_there_is_the_old_file_or_the_new_one(
    crashed: tuple[Path, dict[str, int]], make_pool: MakePool, case: str
) -> None:
    folder, ended = crashed[0] / case, crashed[1][case]
    if case.startswith("limit"):
        assert ended == 10
        assert os.listdir(folder) == [NAME]
    else:
        assert ended == -9
    pool = make_pool(ENTRIES)
    assert pool.load(folder / NAME).entries == ENTRIES
    for number in range(ENTRIES):
        assert_same(pool.get(number), tokens(2 if case == "fsync of the folder" else 1, 4))
    # The next save takes away what was left.
    pool.save(folder / NAME)
    assert os.listdir(folder) == [NAME]


def full_at(monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    """The system says that the disk is full at the `nth` call of a function of `writing`, or of `os` there."""
    where: Any = writing if name == "_write_all" else os
    real, calls = getattr(where, name), 0

    def full(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)

    monkeypatch.setattr(where, name, full)


@pytest.mark.parametrize(
    ("name", "nth"), [*(("_write_all", nth) for nth in range(1, 9)), ("fsync", 1), ("replace", 1), ("listdir", 1)]
)
def test_a_full_disk_is_a_clear_error_and_leaves_the_old_file_and_nothing_else(
    pool: KVPool, path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    tree(pool)
    pool.save(path)
    before, state = path.read_bytes(), state_of(pool.storage)
    full_at(monkeypatch, name, nth)
    with pytest.raises(SnapshotWriteError, match="No space left") as raised:
        pool.save(path)
    assert (raised.value.errno, raised.value.path) == (errno.ENOSPC, str(path))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    assert state_of(pool.storage) == state


def test_a_folder_that_is_not_there_is_a_clear_error(pool: KVPool, path: Path) -> None:
    with pytest.raises(SnapshotWriteError, match="No such file"):
        pool.save(path / "in" / "nothing")
    with pytest.raises(FileNotFoundError):
        pool.load(path)


def test_a_save_leaves_the_unfinished_file_of_another_save_alone(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, other = make_pool(), make_pool()
    entries = tree(pool)
    other.put("key", tokens(1, 2))
    real = os.fsync

    def then_another(opened: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        other.save(path)
        real(opened)

    monkeypatch.setattr(os, "fsync", then_another)
    pool.save(path)
    assert os.listdir(path.parent) == [path.name]
    assert other.load(path).entries == 4
    assert_same(other.get("leaf"), entries["leaf"])


def test_what_is_loaded_is_one_file_however_often_its_name_is_given_to_another(make_pool: MakePool, path: Path) -> None:
    pools = [make_pool(), make_pool()]
    for number, pool in enumerate(pools):
        pool.put_many(["a", "b"], _both(number))
        pool.save(path)
    stop = threading.Event()

    def save(pool: KVPool) -> None:
        while not stop.is_set():
            pool.save(path)

    def load() -> None:
        try:
            for _ in range(80):
                other = make_pool()
                assert other.load(path).entries == 2
                first = other.get("a")
                assert first is not None
                assert_same(other.get("b"), first)
        finally:
            stop.set()

    run_threads(*(partial(save, pool) for pool in pools), load)


def test_where_the_name_goes_to_another_file_between_two_looks_that_one_is_loaded(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, later, other = make_pool(), make_pool(), make_pool()
    tree(pool)
    pool.save(path)
    later.put("later", tokens(5, 2))
    opened = 0

    def and_another(name: str) -> FileIO:
        nonlocal opened
        opened += 1
        file = FileIO(name)
        if opened == 1:
            later.save(path)
        return file

    monkeypatch.setattr("concurrent_kv.snapshots.reading.FileIO", and_another)
    assert other.load(path).entries == 1
    assert_same(other.get("later"), tokens(5, 2))


def test_a_new_file_that_another_save_takes_for_a_left_over_is_made_again(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, other = make_pool(), make_pool()
    tree(pool)
    flock, calls = fcntl.flock, 0

    def after_another(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # between the making of the file and its lock
            other.save(path)
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", after_another)
    assert pool.save(path).entries == 4
    assert describe(path).entries == 4
    assert os.listdir(path.parent) == [path.name]


def _both(value: int) -> KeysValues:
    return stacked(tokens(value, 3), tokens(value, 3))


# Damage --------------------------------------------------------------------------------------------------------------


def filled(pool: KVPool) -> None:
    """Something of everything that a file can have."""
    tree(pool)
    pool.put(("numpy", np.int64(3), 2**70, b"x"), tokens(7, 2), side=[1, "two"], priority=0.5)
    scope = pool.scope("episode")
    pool.put("moved", tokens(8, 6), scope=scope)
    batch = pool.gather(["moved"], scope=scope)
    append(batch, [9], 1)
    pool.commit(["moved"], batch, overflow=OWED)


def contents_of(pool: KVPool) -> dict[Any, Any]:
    """Every entry by scope and key: its tokens as they read, and its side data."""
    found = {}
    for scope in pool.scopes():
        name = None if scope is pool.default_scope else scope.name
        for key in pool.keys(scope=scope):
            kv = pool.get(key, scope=scope)
            assert kv is not None
            where = (name, type(key), key)
            found[where] = (
                bits(kv.keys).numpy().tobytes(),
                bits(kv.values).numpy().tobytes(),
                pool.side(key, scope=scope),
            )
    return found


class Trial:
    """Bytes that are given to a pool as a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trial"
        self._pool = KVPool(LAYOUT, 8)
        filled(self._pool)
        self._pool.save(self.path, side=Codec())
        self.data = self.path.read_bytes()
        self._expected = contents_of(self._pool)
        self.other = KVPool(LAYOUT, 8)
        self.other.put("mine", tokens(1, 2))

    def of(self, data: bytes) -> bool:
        """Whether it loads, and then as what was saved; else the error is one of a snapshot's."""
        # A new file each time, as a save makes one.
        self.path.unlink()
        self.path.write_bytes(data)
        try:
            self.other.load(self.path, side=Codec(), overflow=OWED, replace=True)
        except SnapshotError:
            assert "mine" in self.other
            return False
        assert contents_of(self.other) == self._expected
        self.other.clear()
        self.other.put("mine", tokens(1, 2))
        return True

    def close(self) -> None:
        for pool in (self._pool, self.other):
            pool.check_integrity()
            pool.close()


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Trial(tmp_path_factory.mktemp("trials"))
    yield made
    made.close()


def test_the_file_as_it_is_loads(trial: Trial) -> None:
    assert trial.of(trial.data)
    assert slots_in_use(trial.other) == 2


@pytest.mark.parametrize("change", [0x01, 0x04, 0x20, 0x80, 0xFF], ids=hex)
def test_a_byte_of_the_header_that_was_changed_is_refused_or_says_the_same(trial: Trial, change: int) -> None:
    size = 8 + int.from_bytes(trial.data[:8], "little")
    loaded = []
    for at in range(size):
        data = bytearray(trial.data)
        data[at] ^= change
        if trial.of(bytes(data)):
            loaded.append(at)
    # Padding, at most: what follows the JSON.
    assert all(trial.data[at : at + 1] == b" " for at in loaded)


def test_a_byte_of_the_tensors_that_was_changed_is_refused(trial: Trial) -> None:
    size = 8 + int.from_bytes(trial.data[:8], "little")
    for at in range(size, len(trial.data)):
        data = bytearray(trial.data)
        data[at] ^= 1 << at % 8
        assert not trial.of(bytes(data)), at


def test_a_file_that_is_cut_short_or_goes_on_is_refused(trial: Trial) -> None:
    for size in range(0, len(trial.data), 7):
        assert not trial.of(trial.data[:size]), size
    assert not trial.of(trial.data[:-1])
    assert not trial.of(trial.data + b"\0")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_that_were_changed_anyhow_are_refused_or_say_the_same(trial: Trial, data: st.DataObject) -> None:
    changed = bytearray(trial.data)
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(changed)))
        end = min(len(changed), begin + data.draw(st.integers(0, 40)))
        changed[begin:end] = data.draw(st.binary(max_size=40))
    trial.of(bytes(changed))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_that_were_never_a_snapshot_are_refused(trial: Trial, data: bytes) -> None:
    assert not trial.of(data)
    assert not trial.of(len(data).to_bytes(8, "little") + data)


def test_a_file_of_another_make_is_refused_as_that(pool: KVPool, path: Path) -> None:
    safetensors.numpy.save_file({"weights": np.zeros((3, 4), dtype=np.float32)}, path)
    with pytest.raises(SnapshotDamagedError, match="no snapshot of a pool or manager") as raised:
        pool.load(path)
    assert raised.value.path == str(path)


def test_a_file_of_a_later_format_is_refused_by_its_number(
    pool: KVPool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "VERSION", form.VERSION + 1)
    pool.save(path)
    for call in (pool.load, describe):
        with pytest.raises(
            SnapshotVersionError, match="is of version 2 of the format, and this package reads up to 1"
        ) as raised:
            call(path)
        assert (raised.value.version, raised.value.readable) == (2, 1)


def test_a_claim_of_more_bytes_than_the_file_has_allocates_nothing(pool: KVPool, path: Path) -> None:
    tree(pool)
    pool.save(path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + size])
    said["slots"]["shape"][0] = 2**40
    said["slots"]["data_offsets"][1] = 2**40 * LAYOUT.bytes_per_token
    header = json.dumps(said).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with pytest.raises(SnapshotDamagedError):
        pool.load(path)
    path.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    with pytest.raises(SnapshotDamagedError):
        pool.load(path)


# What contradicts itself, under checksums that are right -------------------------------------------------------------


def forged(pool: KVPool, path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """A file with changed parts, and checksums to match."""

    def changed(whole: contents.Contents) -> dict[str, Any]:
        parts: dict[str, Any] = dict(contents.to_parts(whole))
        parts["index"] = json.loads(parts["index"].tobytes())
        change(parts)
        if not isinstance(parts["index"], bytes):
            parts["index"] = json.dumps(parts["index"]).encode()
        parts["index"] = np.frombuffer(parts["index"], dtype=np.uint8)
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(writing, "to_parts", changed)
        pool.save(path, side=Codec())


def with_value(part: str, at: int, value: int) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        parts[part] = parts[part].copy()
        parts[part][at] = value

    return change


def of_pool(name: str, value: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        form = parts["index"]["pools"][0]
        form[name] = value(form[name])

    return change


def whole_index(value: bytes) -> Callable[[dict[str, Any]], None]:
    return lambda parts: parts.update(index=value)


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a table names no slot": (with_value("tables", 0, 10**6), "slot that is not there"),
    "a table names a slot below 0": (with_value("tables", 0, -1), "slot that is not there"),
    "a slot twice": (lambda parts: with_value("tables", 0, int(parts["tables"][1]))(parts), "names a slot twice"),
    "a length of 0": (with_value("lengths", 0, 0), "length is outside"),
    "a length beyond the window": (with_value("lengths", 0, 9), "length is outside"),
    "another length": (with_value("lengths", 0, 4), "another size"),
    "a position beyond the window": (with_value("positions", 0, 8), "position is outside"),
    "a position below 0": (with_value("positions", 0, -1), "position is outside"),
    "a token ahead of its position": (with_value("positions", 2, 0), "behind the position"),
    "a token that moved by half a drop": (lambda parts: with_value("positions", -1, 7)(parts), "whole drops"),
    "fewer slots": (lambda parts: parts.update(positions=parts["positions"][:-1]), "one position for each slot"),
    "a key twice": (of_pool("keys", lambda keys: [keys[1], *keys[1:]]), "twice"),
    "equal keys of two types": (of_pool("keys", lambda keys: [1, {"float": "0x1.0p+0"}, *keys[2:]]), "twice"),
    "no key": (of_pool("keys", lambda keys: [{"frozenset": []}, *keys[1:]]), "frozenset"),
    "a list": (of_pool("keys", lambda keys: [[1], *keys[1:]]), "is no key"),
    "an object of numpy": (of_pool("keys", lambda keys: [{"numpy": ["|O", "00" * 8]}, *keys[1:]]), "O"),
    "NaN": (of_pool("keys", lambda keys: [{"float": "nan"}, *keys[1:]]), "NaN"),
    "a key too few": (of_pool("keys", lambda keys: keys[1:]), "not as many"),
    "a scope that is not there": (of_pool("scope_of", lambda of: [9, *of[1:]]), "scope that is not there"),
    "a scope twice": (of_pool("scopes", lambda scopes: [*scopes, scopes[0]]), "same name"),
    "a priority that is none": (of_pool("priorities", lambda given: ["high", *given[1:]]), "priority"),
    "a priority of NaN": (of_pool("priorities", lambda given: [{"float": "nan"}, *given[1:]]), "NaN"),
    "a table of corrections that is not there": (of_pool("owed", lambda owed: [7, *owed[1:]]), "not there"),
    "too many bytes of side data": (of_pool("sides", lambda sides: [10**9, *sides[1:]]), "side data is missing"),
    "too few": (of_pool("sides", lambda sides: [-1] * len(sides)), "more bytes of side data"),
    "a size below 0": (of_pool("max_entries", lambda number: -1), "at least"),
    "a version that is none": (of_pool("version", lambda number: True), "at least"),
    "two pools of a role": (lambda parts: parts["index"]["pools"].append(empty_pool("pool")), "same role"),
    "no pools": (lambda parts: parts["index"].update(pools=[]), "more entries than keys"),
    "no JSON": (whole_index(b"{"), "."),
    "no object": (whole_index(b"3"), "."),
    "no text": (whole_index(b"\xff\xfe\x00"), "."),
    "lists without end": (whole_index(b"[" * 200_000), "."),
    "a number without end": (whole_index(b'{"pools": [], "marks": [["a", ' + b"9" * 100_000 + b', "b"]]}'), "."),
}  # fmt: skip


def empty_pool(role: str) -> dict[str, Any]:
    lists = {name: list[Any]() for name in ("scopes", "scope_of", "keys", "priorities", "owed", "sides")}
    return {"role": role, "max_entries": 1, "max_slots": 8, "policy": "FIFO", "version": 0, **lists}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused_and_nothing_is_stored(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    pool, other = make_pool(8), make_pool(8)
    filled(pool)
    change, said = CONTRADICTIONS[case]
    forged(pool, path, monkeypatch, change)
    before = state_of(other.storage)
    with pytest.raises(SnapshotDamagedError, match=said):
        other.load(path, side=Codec(), overflow=OWED)
    assert state_of(other.storage) == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.text(max_size=4) | st.just(2**80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["int", "numpy", "tuple"]), inner),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_an_index_with_anything_in_the_place_of_something_loads_soundly_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "forged"

    def change(parts: dict[str, Any]) -> None:
        node: Any = parts
        key: Any = "index"
        while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.integers(0, 5)):
            node = node[key]
            key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        node[key] = data.draw(json_values)

    with pytest.MonkeyPatch.context() as patch, KVPool(LAYOUT, 8) as pool, KVPool(LAYOUT, 8) as other:
        filled(pool)
        forged(pool, path, patch, change)
        try:
            other.load(path, side=Codec(), overflow=OWED)
        except (
            SnapshotError,
            json.JSONDecodeError,
            UnicodeDecodeError,
        ):  # the latter of the codec, which is the test's
            assert len(other) == 0
        contents_of(other)
        other.check_integrity()


def test_a_position_that_no_step_reaches_cannot_be_read_through(
    make_pool: MakePool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled loops look differences up by these numbers."""
    pool, other = make_pool(8), make_pool(8)
    filled(pool)
    for at in range(7):
        for value in (7, 8, 127, 2**31 - 1, -(2**31)):
            forged(pool, path, monkeypatch, with_value("positions", at, value))
            try:
                other.load(path, side=Codec(), overflow=OWED, replace=True)
            except SnapshotError:
                continue
            contents_of(other)
