"""Whole sets: determinism, twins, shards, workers, interrupted runs, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from eqcvt.data import (
    PRESETS,
    Camera,
    Light,
    SimulationConfig,
    Subhalos,
    generate,
    load,
    resolve,
    simulate,
)


def same(first, second):
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.index, second.index)
    assert first.parameters.keys() == second.parameters.keys()
    for name, column in first.parameters.items():
        assert np.array_equal(column, second.parameters[name]), name
    assert (first.classes, first.config, first.seed) == (
        second.classes,
        second.config,
        second.seed,
    )


def quick(count, out, **changes):
    options = {"size": 33, "workers": 1, "progress": False} | changes
    preset = options.pop("preset", "deeplense")
    return simulate(preset, count, out=out, **options)


def test_images_depend_on_seed_and_index_alone():
    config = resolve("control", size=33)
    whole = generate(config, range(12), dtype="float32")
    same(generate(config, [7, 3], dtype="float32"), whole.subset([7, 3]))
    other = generate(config, range(12), seed=1338, dtype="float32")
    assert all(not np.array_equal(a, b) for a, b in zip(whole.images, other.images, strict=True))
    assert len({image.tobytes() for image in whole.images}) == 12
    assert whole.labels.tolist() == [0, 1] * 6


@pytest.mark.parametrize("preset", ["deeplense", "three_class"])
def test_twins_differ_through_the_subhalos_alone(preset):
    config = resolve(preset, size=33)
    shown = generate(config, range(1, 7), dtype="float32")
    twins = generate(config, range(1, 7), label=0, dtype="float32")
    sub = shown.labels > 0
    assert np.array_equal(shown.images[~sub], twins.images[~sub])
    assert (shown.images[sub] != twins.images[sub]).any(axis=(1, 2)).all()
    for name, column in shown.parameters.items():
        if "subhalo" not in name:
            assert np.array_equal(column, twins.parameters[name]), name
    massless = resolve(preset, size=33, overrides={"subhalos.mass_fraction": 0})
    same_sky = generate(massless, range(1, 7), dtype="float32")
    assert (same_sky.parameters["n_subhalos"][sub] > 0).all()
    assert np.array_equal(same_sky.images, twins.images)


def test_noise_has_the_variance_of_the_exposure():
    noisy = resolve("deeplense", size=33)
    clean = resolve("deeplense", size=33, overrides={"camera.noise": False})
    ours, truth = (generate(c, range(60), dtype="float32").images for c in (noisy, clean))
    pull = (ours - truth) / np.sqrt((truth + 0.1) / 300)
    assert pull.mean() == pytest.approx(0, abs=0.02)
    assert pull.std() == pytest.approx(1, abs=0.02)


def test_grey_values_span_each_image(tmp_path):
    grey = load(quick(4, tmp_path / "grey.npz"))
    flux = load(quick(4, tmp_path / "flux.npz", dtype="float32"))
    assert grey.images.dtype == np.uint8
    assert flux.images.dtype == np.float32
    low, high = (f(flux.images, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
    expected = (flux.images - low) / (high - low) * 255
    assert np.abs(grey.images - expected).max() <= 0.5 + 1e-3


def test_file_holds_all_that_made_it(tmp_path):
    path = quick(5, tmp_path / "new" / "set.npz", preset="three_class", seed=9)
    assert path == tmp_path / "new" / "set.npz"
    with np.load(path, allow_pickle=False) as archive:
        assert {"images", "labels", "index", "seed", "config", "classes"} <= set(archive.files)
        assert json.loads(str(archive["config"]))["camera"]["size"] == 33
    data = load(path)
    assert SimulationConfig.from_dict(data.config) == resolve("three_class", size=33)
    assert data.classes == ("no_sub", "sphere", "vortex")
    assert (data.seed, data.labels.tolist()) == (9, [0, 1, 2, 0, 1])
    assert [p.name for p in path.parent.iterdir()] == ["set.npz"]
    same(data, generate(resolve("three_class", size=33), range(5), seed=9))


def test_shards_join_to_one_run(tmp_path):
    whole = load(quick(150, tmp_path / "whole.npz"))
    for shard in (2, 0, 1):
        path = quick(150, tmp_path / "shards", shard=(shard, 3))
        assert path.name == f"deeplense-{shard:05d}-of-00003.npz"
    same(load(tmp_path / "shards"), whole)


def test_two_workers_make_what_one_makes(tmp_path):
    one = load(quick(130, tmp_path / "one.npz"))
    same(load(quick(130, tmp_path / "two.npz", workers=2)), one)


def start_slow_run(tmp_path, size, start_method="spawn"):
    """Start a run with two workers; return the process when the first chunks are done."""
    out, parts = tmp_path / "set.npz", tmp_path / ".set.npz.parts"
    script = tmp_path / "run.py"
    script.write_text(
        "import signal, sys, time\n"
        "from eqcvt.data import simulate\n"
        "module = sys.modules['eqcvt.data.simulate']\n"
        "whole = module.generate\n"
        "def slow(*args, **kwargs):\n"  # on a busy machine the signal comes late
        "    time.sleep(0.5)\n"
        "    return whole(*args, **kwargs)\n"
        "module.generate = slow\n"
        "if __name__ == '__main__':\n"
        # A shell's background jobs, and what they start, ignore it at first.
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    simulate('deeplense', 1280, out={str(out)!r}, size={size}, workers=2,\n"
        f"             start_method={start_method!r})\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.PIPE)
    deadline = time.time() + 60
    while len(list(parts.glob("0*.npz"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    return process


def test_interrupted_run_resumes(tmp_path):
    out, parts = tmp_path / "set.npz", tmp_path / ".set.npz.parts"
    process = start_slow_run(tmp_path, 33)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert b"KeyboardInterrupt" in errors
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("0*.npz")}
    assert 2 <= len(kept) < 20
    assert not out.exists()

    calls = []
    from eqcvt.data.simulate import _complete

    for number in range(20):
        chunk = range(64 * number, 64 * number + 64)
        calls.append(_complete(parts / f"{64 * number:012d}.npz", chunk))
    assert sum(calls) == len(kept)
    resumed = load(quick(1280, out))
    assert not parts.exists()
    config = resolve("deeplense", size=33)
    picked = [0, 63, 64, 65, 640, 641, 1278, 1279]
    same(resumed.subset(picked), generate(config, picked))
    assert np.array_equal(resumed.index, np.arange(1280))


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_workers_end_with_their_parent(tmp_path, start_method):
    process = start_slow_run(tmp_path, 9, start_method)
    process.terminate()
    # Workers hold the other end of stderr as long as they live.
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def _run_with_counting(monkeypatch, *arguments, **options):
    """Simulate and return the chunks that were computed anew."""
    module = sys.modules["eqcvt.data.simulate"]
    done, whole = [], module._chunk

    def counting(config, chunk, *rest):
        done.append(chunk.start)
        if options.get("fail_at") == chunk.start:
            raise KeyboardInterrupt
        return whole(config, chunk, *rest)

    monkeypatch.setattr(module, "_chunk", counting)
    changes = {name: value for name, value in options.items() if name != "fail_at"}
    try:
        quick(*arguments, **changes)
    except KeyboardInterrupt:
        assert "fail_at" in options
    monkeypatch.undo()
    return done


def test_resume_uses_whole_chunks_of_the_same_run_only(tmp_path, monkeypatch):
    out, parts = tmp_path / "a.npz", tmp_path / ".a.npz.parts"
    assert _run_with_counting(monkeypatch, 200, out, fail_at=128) == [0, 64, 128]
    damaged = parts / f"{64:012d}.npz"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert _run_with_counting(monkeypatch, 200, out) == [64, 128, 192]
    same(load(out), generate(resolve("deeplense", size=33), range(200)))
    out.unlink()
    assert _run_with_counting(monkeypatch, 200, out, fail_at=128) == [0, 64, 128]
    assert _run_with_counting(monkeypatch, 200, out, seed=2) == [0, 64, 128, 192]
    assert load(out).seed == 2
    out.unlink()
    assert _run_with_counting(monkeypatch, 200, out, fail_at=128) == [0, 64, 128]
    monkeypatch.setattr(sys.modules["eqcvt.data.simulate"], "RENDERER", 0)
    assert _run_with_counting(monkeypatch, 200, out) == [0, 64, 128, 192]


def test_only_a_folder_that_is_there_may_have_an_ending(tmp_path):
    out = tmp_path / "set.v2"
    with pytest.raises(ValueError, match=r"set\.v2'; take '.*set\.npz'$"):
        quick(2, out, size=17)
    out.mkdir()
    assert quick(2, out, size=17).parent == out


def test_complete_output_is_left_and_another_is_not_overwritten(tmp_path, monkeypatch):
    out = tmp_path / "a.npz"
    quick(3, out)
    stamp = out.stat().st_mtime_ns
    assert _run_with_counting(monkeypatch, 3, out) == []
    assert out.stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match=r"a\.npz exists .*remove it, take an.*overwrite it$"):
        quick(4, out)
    assert len(load(out)) == 3
    quick(4, out, overwrite=True)
    assert len(load(out)) == 4


def test_progress_shows_images_per_second(tmp_path, capsys):
    quick(4, tmp_path / "a.npz", progress=True)
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    assert "img/s" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"preset": "deeplens"}, ValueError, "got 'deeplens'; did you mean 'deeplense'"),
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"count": 2.5}, TypeError, "count must be an integer, got float 2.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of 'uint8', 'float32'"),
        ({"start_method": "forks"}, ValueError, "did you mean 'fork'"),
        ({"workers": 0}, ValueError, "workers must be at least 1"),
        ({"size": 4}, ValueError, "size must be at least 8, got 4"),
        ({"shard": (4, 4)}, ValueError, r"shard's i must lie in 0..3 for n = 4, got 4"),
        ({"shard": "1/4"}, TypeError, r"shard must be a pair \(i, n\), got '1/4'"),
        ({"shard": (0, 20)}, ValueError, "4 images cannot be divided into 20 shards"),
        ({"shard": (0, 2), "out": "a.npz"}, ValueError, "shards go .*a.npz'; take '.*/a'$"),
        ({"shard": (0, 2), "out": "a.fits"}, ValueError, "shards go .*a.fits'; take '.*/a'$"),
        ({"out": "a.fits"}, ValueError, "a set is .*a.fits'; take '.*/a.npz'$"),
        ({"overrides": {"camera.pixelscale": 1}}, ValueError, "did you mean 'camera.pixel_scale'"),
        ({"overrides": {"halo.axis_ratio": 1.5}}, ValueError, r"halo.axis_ratio must be .* 1\.5"),
        ({"overrides": {"halo.shear": [0.2, 0.1]}}, ValueError, "low <= high"),
        ({"overrides": {"halo.shear": "big"}}, TypeError, "a number or a pair"),
        ({"overrides": {"structures": ["none", "blob"]}}, ValueError, "'line', got 'blob'"),
        ({"overrides": {"structures": ["none"]}}, ValueError, "each of the 2 classes"),
        ({"overrides": {"classes": ["a", "a"]}}, ValueError, "different names"),
        ({"overrides": {"classes": "ab"}}, TypeError, "classes must be a list of names"),
        ({"overrides": {"name": "a/b"}}, ValueError, "usable in a file name, got 'a/b'"),
    ],
)
def test_refusals(tmp_path, changes, error, message):
    options = {"count": 4, "out": "set"} | changes
    count, out = options.pop("count"), tmp_path / options.pop("out")
    with pytest.raises(error, match=message):
        quick(count, out, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Camera(size=151), ValueError, r"camera.size must be at most .* \(150\), got 151"),
        (lambda: Camera(psf_pixels=10), ValueError, "must be odd, got 10; nearest: 9 or 11"),
        (lambda: Camera(psf_sigma=0.15), ValueError, r'0.75 arc.*11 pixels of 0.06"; nearest: 13$'),
        (lambda: Camera(pixel_scale=0.04), ValueError, r'got 11 pixels of 0.04"; nearest: 13$'),
        (lambda: Camera(noise=1), TypeError, "camera.noise must be True or False, got int 1"),
        (lambda: Camera(oversampling=2.0), TypeError, "must be an integer, got float"),
        (lambda: Light(index=float("nan")), ValueError, "light.index must be finite"),
        (lambda: Light(radius=True), TypeError, "light.radius must be a number, got bool"),
        (lambda: Subhalos(line_number=1), ValueError, "line_number must be at least 2"),
        (lambda: SimulationConfig.from_dict({"halos": {}}), ValueError, "did you mean 'halo'"),
        (lambda: SimulationConfig.from_dict({"halo": 3}), TypeError, "halo must be a table"),
        (
            lambda: SimulationConfig.from_dict({"cosmology": {"source_redshift": 0.4}}),
            ValueError,
            "source_redshift must be above lens_redshift 0.5, got 0.4",
        ),
        (
            lambda: SimulationConfig.from_dict({"halo": {"sheer": 0}}),
            ValueError,
            "did you mean 'shear'",
        ),
    ],
)
def test_bad_configurations(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_configurations_survive_json(preset):
    config = resolve(preset, size=65)
    again = SimulationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert config.name == preset


def test_missing_caustics_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "caustics", None)
    with pytest.raises(ImportError, match=r'pip install "eqcvt\[sim\]"'):
        quick(2, tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []


def test_importing_data_imports_neither_caustics_nor_matplotlib():
    code = (
        "import sys, eqcvt.data; "
        "print([m for m in ('caustics', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
