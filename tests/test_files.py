"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eqcvt import _files


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with _files.replacing(path) as new:
        new.write_text("old")

    def interrupted() -> None:
        with _files.replacing(path) as new:
            new.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def test_tensors_are_written_as_others_may_read_them(tmp_path: Path) -> None:
    path, given = tmp_path / "a.safetensors", {"a": torch.arange(3.0)}
    before = os.umask(0o027)
    try:
        _files.write_tensors(path, given, {"format": "pt"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert torch.equal(load_file(path)["a"], given["a"])


def test_a_disk_without_room_is_named_as_an_oserror(tmp_path: Path) -> None:
    path, (soft, hard) = tmp_path / "a.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}: File too large") as caught:
            _files.write_tensors(path, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for content in ("first", "second"):
        with _files.replacing_folder(folder) as new:
            (new / content).write_text(content)
    assert _names(folder) == ["second"]
    assert _names(tmp_path) == ["run"]


def test_what_a_killed_process_left_is_put_back_or_removed(tmp_path: Path) -> None:
    folder, left = tmp_path / "a[1]", tmp_path / ".a[1].abcdefgh"
    for parts, expected in ((("old", "new"), "new"), (("old",), "old"), (("new",), None)):
        for part in parts:
            (left / part).mkdir(parents=True)
            (left / part / part).touch()
        _files.take_back(folder)
        assert not left.exists()
        if expected is None:  # the new one may be half written
            assert not folder.exists()
        else:
            assert _names(folder) == [expected]
            (left / "old").mkdir(parents=True)
            _files.take_back(folder)
            assert not left.exists()
            assert _names(folder) == [expected]
            shutil.rmtree(folder)
    (left / "mine").mkdir(parents=True)
    _files.take_back(folder)
    assert _names(left) == ["mine"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupt_between_the_renames_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    folder = tmp_path / "run"
    with _files.replacing_folder(folder) as new:
        (new / "old").write_text("")
    calls = 0
    rename = os.replace

    def interrupted(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), _files.replacing_folder(folder) as new:
        (new / "new").write_text("")
    assert _names(folder) == ["old"]
    assert _names(tmp_path) == ["run"]
