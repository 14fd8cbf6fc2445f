"""Prediction of many images: parts that join to the whole, bad images, streams."""

from __future__ import annotations

import json
import os
import signal
import string
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torch.distributed import HashStore
from typer.testing import CliRunner

import eqcvt
from eqcvt.cli import app
from eqcvt.data import load, read_image
from eqcvt.predict import Images, Parts, Prediction, fit_image, predict, read, write_predictions
from eqcvt.predict.ahead import ahead as work_ahead
from eqcvt.predict.crew import Crew
from tests.cli.conftest import COUNT, SIZE, invoke, rows
from tests.train.rings import TINY


@pytest.mark.parametrize("number", [1, 2, 3, COUNT + 2])
def test_parts_join_to_the_whole(model: Path, survey: Path, tmp_path: Path, number: int) -> None:
    invoke("predict", model, survey, "--out", tmp_path / "whole.csv")
    out = tmp_path / "joined.csv"
    arguments = ("predict", model, survey, "--out", out, "--batch-size", 3)
    for i in reversed(range(number)):
        text = invoke(*arguments, "--shard", f"{i}/{number}").output
        assert f"part {i} of {number}, " in text
    assert not out.exists()
    assert invoke("merge", out).output == f"wrote {out}: {COUNT} images\n"
    whole, joined = rows(tmp_path / "whole.csv"), rows(out)
    assert [row["file"] for row in joined] == [row["file"] for row in whole]
    assert [Path(row["file"]).name for row in whole] == [
        *(f"{i}.png" for i in range(4)), *(f"seven.npz[{i}]" for i in range(7)),
        "one.npz", "real.npy", "wide.npy",
    ]  # fmt: skip
    for a, b in zip(joined, whole, strict=True):
        assert (a["class"], a["note"]) == (b["class"], b["note"])
        assert float(a["sub"]) == pytest.approx(float(b["sub"]), abs=1e-6)
    sizes = [len(rows(part)) for part in sorted((tmp_path / "joined.csv.parts").glob("*.csv"))]
    assert sum(sizes) == COUNT
    assert max(sizes) - min(sizes) <= 1


def test_json_parts_join_too(model: Path, survey: Path, tmp_path: Path) -> None:
    invoke("predict", model, survey, "--out", tmp_path / "whole.json", "--batch-size", 1)
    out = tmp_path / "joined.json"
    for i in range(20):  # some are empty
        invoke("predict", model, survey, "--out", out, "--shard", f"{i}/20", "--batch-size", 1)
    invoke("merge", out)
    assert json.loads(out.read_text()) == json.loads((tmp_path / "whole.json").read_text())


def test_classes_named_as_other_columns_have_columns_of_their_own(tmp_path: Path) -> None:
    row = Prediction("a.png", "note", {"note": 0.75, "file": 0.25})
    table = rows(write_predictions([row], tmp_path / "out.csv", ["note", "file"]))
    values = {"probability of note": "0.75", "probability of file": "0.25"}
    assert table == [{"file": "a.png", "class": "note", **values, "note": ""}]


def test_a_finished_part_is_kept(model: Path, survey: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    arguments = ("predict", model, survey, "--out", out, "--shard", "1/2")
    invoke(*arguments)
    part = tmp_path / "out.csv.parts" / "out-00001-of-00002.csv"
    made = part.stat().st_mtime_ns
    assert f"part 1 of 2, 7 images, is finished: {part}" in invoke(*arguments).output
    assert part.stat().st_mtime_ns == made
    refusal = "made by another model, of other images or with other options"
    assert refusal in invoke(*arguments, "--fit", "resize", code=2).stderr
    file = next(p for p in survey.rglob("*.png"))
    seconds = file.stat().st_mtime
    os.utime(file, (seconds, seconds + 1))
    assert refusal in invoke(*arguments, code=2).stderr
    assert part.stat().st_mtime_ns == made
    invoke(*arguments, "--fit", "resize", "--overwrite")
    assert "resized" in rows(part)[-1]["note"]
    (survey / "0.png").unlink()
    assert "of other images" in invoke(*arguments, "--fit", "resize", code=2).stderr


def test_a_file_that_is_there_is_kept(model: Path, survey: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("of yesterday")
    arguments = ("predict", model, survey, "--out", out)
    assert "--overwrite to replace it" in invoke(*arguments, code=2).stderr
    assert out.read_text() == "of yesterday"
    invoke(*arguments, "--overwrite")
    assert len(rows(out)) == COUNT


def test_merging_keeps_a_file_of_something_else(model: Path, survey: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    for i in range(2):
        invoke("predict", model, survey, "--out", out, "--shard", f"{i}/2")
    out.write_text("of yesterday")
    message = invoke("merge", out, code=2).stderr
    assert f"{out} exists and is not what the parts in {out}.parts give" in message
    assert f"eqcvt merge {out} --overwrite replaces it" in message
    assert out.read_text() == "of yesterday"
    invoke("merge", out, "--overwrite")
    assert len(rows(out)) == COUNT
    invoke("merge", out)  # holds what the parts give


def test_parts_that_are_missing_or_of_several_runs(
    model: Path, survey: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    arguments = ("predict", model, survey, "--out", out)
    for i in (0, 3):
        invoke(*arguments, "--shard", f"{i}/4")
    assert "lacks part 1, 2 of 4" in invoke("merge", out, code=2).stderr
    invoke(*arguments, "--shard", "0/2")
    assert "parts of runs with 2, 4 parts" in invoke("merge", out, code=2).stderr
    for path in (tmp_path / "out.csv.parts").glob("*-of-00004*"):
        path.unlink()
    invoke(*arguments, "--shard", "1/2", "--fit", "resize")
    assert "are not of one run" in invoke("merge", out, code=2).stderr
    (tmp_path / "out.csv.parts" / "out-00001-of-00002.csv.run.json").unlink()
    for command in (("merge", out), (*arguments, "--shard", "1/2")):
        message = invoke(*command, code=2).stderr
        assert "says what out-00001-of-00002.csv was made of" in message
        assert "--overwrite does that part again" in message
    assert not out.exists()


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_parts_that_are_not_whole_are_no_parts(
    model: Path, survey: Path, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"out.{ending}"
    arguments = ("predict", model, survey, "--out", out, "--shard")
    for i in range(2):
        invoke(*arguments, f"{i}/2")
    part = Parts(out).path(1, 2)
    whole = part.read_bytes()
    for text in (b"", whole[: len(whole) // 2], whole[: whole.rindex(b"\n", 0, -3) + 1]):
        part.write_bytes(text)
        for command in (("merge", out), (*arguments, "1/2")):
            message = invoke(*command, code=2).stderr
            assert f"{part} has {len(text)} bytes, and had {len(whole)} once written" in message
        assert not out.exists()
    invoke(*arguments, "1/2", "--overwrite")
    assert part.read_bytes() == whole
    invoke("merge", out)


def test_an_older_part_stays_until_the_new_one_is_whole(
    model: Path, survey: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    arguments = ("predict", model, survey, "--out", out, "--shard", "0/2")
    invoke(*arguments)
    before = {path: path.read_bytes() for path in Parts(out).folder.iterdir()}
    (survey / "0.png").write_bytes(b"no picture")
    assert "cannot read" in invoke(*arguments, "--overwrite", code=2).stderr
    assert {path: path.read_bytes() for path in Parts(out).folder.iterdir()} == before


def test_archives_of_every_kind_are_read_alike(survey: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(1).random((70, 2, 5, 5)).astype(np.float32)
    kinds: dict[str, Any] = {
        "float32": images,
        "float64": images.astype(np.float64),
        "bigendian": images.astype(">f4"),
        "fortran": np.asfortranarray(images),
    }
    for name, array in kinds.items():
        path = tmp_path / f"{name}.npz"
        np.savez_compressed(path, images=array)
        assert read.count_images(path) == 70
        for start, stop in ((0, 70), (33, 65), (69, 70)):
            blocks = list(read._rows(path, start, stop))
            assert np.array_equal(np.concatenate(blocks), images[start:stop])
            assert name == "fortran" or max(map(len, blocks)) <= read.ROWS


@pytest.mark.parametrize("dtype", ["f2", ">f2", ">f4", ">f8", "g", "u1", "u2", ">u2"])
def test_images_of_every_type_are_read_alike(model: Path, tmp_path: Path, dtype: str) -> None:
    images = np.random.default_rng(1).integers(0, 99, (2, SIZE, SIZE)).astype(np.uint8)
    kept = images if dtype == "u1" else images.astype(np.float32)
    np.savez(tmp_path / "a.npz", images=images.astype(dtype), labels=np.arange(2))
    np.save(tmp_path / "b.npy", images[0].astype(dtype))
    for found in (load(tmp_path / "a.npz").images, read_image(tmp_path / "b.npy")[None]):
        assert found.dtype == kept.dtype
        assert np.array_equal(found, kept[: len(found)])
    first, _, alone = predict(eqcvt.load_model(model), [tmp_path / "a.npz", tmp_path / "b.npy"])
    assert alone.probabilities == pytest.approx(first.probabilities, abs=1e-6)


def test_images_are_scaled_by_what_the_model_sees() -> None:
    flux = 5 + torch.rand(2, 1, 40, 20, dtype=torch.float64)
    for how, size, left in (("crop", 8, 0), ("pad", 32, 6), ("resize", 8, 0)):
        image, _ = fit_image(flux, size, how)
        assert image.dtype == torch.float32
        for one in image[..., left : size - left]:
            assert (one.min(), one.max()) == (0, 1)
        assert not image[..., :left].any()
    grey = torch.full((1, 1, 9, 9), 51, dtype=torch.uint8)
    for how, size in (("crop", 5), ("resize", 5), ("refuse", 9)):
        image, _ = fit_image(grey, size, how)
        torch.testing.assert_close(image, torch.full((1, 1, size, size), 0.2))


def test_what_is_hidden_and_folders_named_as_images_are_passed_over(
    model: Path, survey: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    (survey / "b" / "dir.png").mkdir()
    Image.new("L", (SIZE, SIZE)).save(survey / "b" / "dir.png" / "z.png")
    for folder in (".x.npz.parts", "b/.ipynb_checkpoints"):
        (survey / folder).mkdir()
        np.savez(survey / folder / "000.npz", images=np.zeros((1, SIZE, SIZE), np.uint8))
    (survey / "._0.png").write_bytes(b"of another system")
    root = survey.rename(tmp_path / ".survey")  # a folder that is named may be hidden itself
    invoke("predict", model, root, "--out", out)
    names = [row["file"] for row in rows(out)]
    assert len(names) == COUNT + 1
    assert str(root / "b" / "dir.png" / "z.png") in names
    (root / "lost.png").symlink_to("nowhere.png")  # not passed over without a word
    assert "lost.png" in invoke("predict", model, root, code=2).stderr


def test_folders_that_link_each_other_are_searched_once(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(6)]
    for folder in folders:
        folder.mkdir()
        np.save(folder / "a.npy", np.zeros((SIZE, SIZE)))
        for other in folders:
            if other != folder:
                (folder / f"to{other.name}").symlink_to(other)
    assert Images.find([tmp_path]).files == [folder / "a.npy" for folder in folders]


def test_linked_folders_are_searched_and_files_that_are_no_images_are_said(
    model: Path, survey: Path, tmp_path: Path
) -> None:
    far, out = tmp_path / "far", tmp_path / "out.csv"
    (far / "deep").mkdir(parents=True)
    np.save(far / "deep" / "z.npy", np.eye(SIZE))
    (far / "around").symlink_to(survey)
    (survey / "linked").symlink_to(far)
    (survey / "b" / "back").symlink_to(survey)
    assert "not read" not in invoke("predict", model, survey, "--out", out).stderr
    names = [row["file"] for row in rows(out)]
    assert len(names) == len(set(names)) == COUNT + 1
    assert str(survey / "linked" / "deep" / "z.npy") in names
    for name in ("x.tif", "b/x.fits.fz", "far/y.txt", "Thumbs.db", ".hidden"):
        (survey / name.replace("far", "linked")).touch()
    message = invoke("predict", model, survey, "--out", out, "--overwrite").stderr
    assert f"warning: {survey}: 3 of its 12 files are not read, such as b/x.fits.fz" in message
    assert [row["file"] for row in rows(out)] == names


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eqcvt.EqCvT(in_channels=1, image_size=SIZE, **TINY).save_pretrained(tmp_path)
    classes = ["[/red]", "[bold]sub[/bold]"]
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    path = tmp_path / ("a" * 200) / "[b]y.npy"
    path.parent.mkdir()
    np.save(path, np.eye(SIZE))
    for columns in ("80", "200"):  # pipes and files have no width
        result = CliRunner().invoke(
            app, ["predict", str(tmp_path), str(path)], env={"COLUMNS": columns}
        )
        assert result.exit_code == 0, result.stderr
        assert str(path) in result.output
        assert all(name in result.output.splitlines()[1] for name in classes)


def test_names_that_are_no_text_are_printed(model: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.npy")
    np.save(path, np.eye(SIZE))
    for charset, name in (("utf-8", r"\udcff.npy"), ("ascii", r"\udcff.npy")):
        arguments = ["predict", str(model), str(path)]
        result = CliRunner(charset=charset).invoke(app, arguments)
        assert result.exit_code == 0, result.stderr
        assert name in result.output


def test_a_request_to_end_leaves_nothing_half_done(
    model: Path, survey: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def image(*_: object, **__: object) -> Any:
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("too late")

    def too_early(*_: object) -> None:
        raise ValueError("in the test's own handler")

    monkeypatch.setattr(read, "read_image", image)
    before = signal.signal(signal.SIGTERM, too_early)
    try:
        result = invoke("predict", model, survey, "--out", tmp_path / "out.csv", code=130)
        assert signal.getsignal(signal.SIGTERM) is too_early
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == [survey]


def test_names_are_folded_on_a_terminal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = string.ascii_letters * 2
    np.save(tmp_path / f"{names}.npy", np.eye(SIZE))
    monkeypatch.setattr(
        "eqcvt.cli.predict.console",
        lambda **options: Console(file=sys.stdout, force_terminal=not options, width=60),
    )
    output = invoke("predict", model, tmp_path).output
    column = "".join(line.split("│")[1].strip() for line in output.splitlines() if "│" in line)
    assert column.endswith(f"{names}.npy")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 30))
def test_parts_are_all_images_in_order(counts: list[int], number: int) -> None:
    files = [Path(str(i)) for i in range(len(counts))]
    ends = np.cumsum(counts)
    everything = Images(files, ends, 0, int(ends[-1]))
    expected = [(str(i), k, n) for i, n in enumerate(counts) for k in range(n)]
    found = [
        (str(path), k, count)
        for index in range(number)
        for group in everything.part(index, number)._groups()
        for path, count, start, stop in group
        for k in range(start, stop)
    ]
    assert found == expected
    sizes = [len(everything.part(index, number)) for index in range(number)]
    assert max(sizes) - min(sizes) <= 1


def test_only_a_few_images_are_in_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(300):
        (tmp_path / f"{i:03d}.png").touch()
    opened: list[Path] = []

    def image(path: Path, *, finite: bool) -> Any:
        opened.append(path)
        return np.zeros((SIZE, SIZE), np.uint8)

    monkeypatch.setattr(read, "read_image", image)
    stream = predict(eqcvt.load_model(model), [tmp_path], batch_size=8, readers=2)
    next(stream)
    time.sleep(0.3)
    assert len(opened) < 150
    stream.close()  # type: ignore[attr-defined]
    assert sum(1 for _ in predict(eqcvt.load_model(model), [tmp_path], batch_size=8)) == 300
    assert sorted(set(opened)) == sorted(tmp_path.glob("*.png"))


def test_low_precision_is_close(model: Path, survey: Path) -> None:
    net = eqcvt.load_model(model)
    exact, low = ([p.probabilities["no_sub"] for p in predict(net, [survey], amp=a)]
                  for a in ("off", "bf16"))  # fmt: skip
    assert low == pytest.approx(exact, abs=0.02)
    assert low != exact


def test_threads_keep_the_order_and_pass_errors_on() -> None:
    def task(number: int) -> Iterator[int]:
        for i in range(20):
            time.sleep(0.002 if number % 2 else 0)
            if (number, i) == (5, 7):
                raise ValueError("at 5, 7")
            yield 20 * number + i

    stream = work_ahead((task(n) for n in range(9)), threads=3, depth=2)
    assert [next(stream) for _ in range(107)] == list(range(107))
    with pytest.raises(ValueError, match="at 5, 7"):
        next(stream)


def test_threads_end_when_nobody_asks_any_more() -> None:
    closed = threading.Event()

    def task() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    before = threading.active_count()
    stream = work_ahead([task()], threads=2)
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert closed.is_set()
    assert threading.active_count() == before


def test_the_first_process_waits_for_the_others() -> None:
    first, second = crew_of_two()

    def work() -> None:
        with second.work():
            time.sleep(0.2)

    thread = threading.Thread(target=work)
    begun = time.perf_counter()
    with first.work():
        thread.start()
    first.wait(0.01)
    assert time.perf_counter() - begun >= 0.2
    thread.join()


def test_the_first_process_hears_of_a_failure() -> None:
    first, second = crew_of_two()
    with first.work():
        pass
    with pytest.raises(KeyboardInterrupt), second.work():
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="another process failed: the same command does only"):
        first.wait(0.01)


def crew_of_two() -> tuple[Crew, Crew]:
    """Two processes' crews over one store."""
    first, second, store = Crew(), Crew(), HashStore()
    for rank, crew in enumerate((first, second)):
        crew.rank, crew.size, crew.store = rank, 2, store
    return first, second
