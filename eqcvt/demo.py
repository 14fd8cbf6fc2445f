"""``eqcvt demo``: simulate, train three models under one budget, evaluate, draw; in minutes.

The trained models that come with the package are evaluated beside them, on fresh images.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqcvt import load_model, plots, report
from eqcvt._files import read_json, write_json
from eqcvt.data import load, simulate
from eqcvt.models import VisionModel, list_pretrained, load_pretrained, pretrained_folder
from eqcvt.nn import set_backend
from eqcvt.train import TrainConfig, train
from eqcvt.train.distributed import resolve_device

# Each with the peak learning rate that served it best in trials of this length: at EqCvT's, CvT
# does not leave chance.
MODELS = {
    "EqCvT": ("eqcvt_c4", 1.5e-3),
    "EqCvT exact": ("eqcvt_c4_exact", 1.5e-3),
    "CvT": ("cvt", 4e-4),
}
RESULTS = "results.json"
# Seeds of the images; the packaged models were trained and selected on others.
TRAIN_SEED, TEST_SEED, FRESH_SEED = 1, 2, 4


@dataclass(frozen=True)
class Demo:
    """The demonstration's sizes; the defaults take about five minutes on two cores.

    Attributes:
        out: folder for data, runs, pictures and ``results.json``.
        size: pixels a side.
        images: simulated for training, a tenth of them for validation.
        test_images: simulated with another seed, for the final numbers.
        epochs, batch_size: the same for every model (Adam, one cycle of the learning rate).
        device: ``auto`` | ``cpu`` | ``cuda``.
    """

    out: Path = Path("demo")
    size: int = 65
    images: int = 1000
    test_images: int = 300
    epochs: int = 8
    batch_size: int = 8
    device: str = "auto"


def run(demo: Demo, say: Callable[[str], None]) -> dict[str, Any]:
    """Do all parts that are not done yet, and write ``results.json``.

    Args:
        demo: sizes and folder; parts in the folder that were made with other sizes are refused.
        say: is told each step.

    Returns:
        The content of ``results.json``: origin, settings, for each model its metrics, the same for
        each packaged one, and the pictures' paths relative to the folder.

    Raises:
        FileExistsError, ValueError: the folder holds parts made with other settings.
    """
    begun = time.perf_counter()
    say(f"1/4 simulating {demo.images} + {demo.test_images} images of {demo.size}x{demo.size}")
    sets = {
        name: simulate("deeplense", count, seed=seed, size=demo.size, out=demo.out / f"{name}.npz")
        for name, count, seed in (
            ("train", demo.images, TRAIN_SEED),
            ("test", demo.test_images, TEST_SEED),
        )
    }
    say(f"2/4 training {len(MODELS)} models for {demo.epochs} epochs each")
    histories = {name: _train(demo, name, sets["train"], say) for name in MODELS}
    say(f"3/4 evaluating on {demo.test_images} images that no training saw")
    device = resolve_device(demo.device)
    models = {name: load_model(_folder(demo, name) / "last").to(device) for name in MODELS}
    for model in models.values():
        set_backend(model, None)
    if (done := _finished(demo)) is not None:
        say("all of it was finished before")
        return done
    results = _evaluate(demo, models, sets["test"], say)
    for name, history in histories.items():
        results[name]["seconds"] = sum(row["seconds"] for row in history)
        results[name]["epochs"] = len(history)
    packaged = _evaluate_packaged(demo, say)
    say("4/4 drawing")
    pictures = _draw(demo, models, results, histories, sets)
    content = {
        **report.origin(),
        "settings": _settings(demo),
        "seconds": time.perf_counter() - begun,
        "models": results,
        "packaged": packaged,
        "pictures": [str(p.relative_to(demo.out)) for p in pictures],
    }
    write_json(demo.out / RESULTS, content)
    return content


def verdict(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Say in one line for each model how far its accuracy is from chance."""
    lines = []
    for name, result in results.items():
        count, accuracy = result["n"], result["accuracy"]
        chance = 1 / len(result["classes"])
        error = math.sqrt(chance * (1 - chance) / count)
        sigmas = (accuracy - chance) / error
        if sigmas > 5:
            learnt = "it learnt"
        elif sigmas >= 2:
            learnt = f"better than chance at {sigmas:.1f} sigma"
        else:
            learnt = "not clearly better than chance"
        lines.append(
            f"{name}: {100 * accuracy:.1f} % of {count} held-out images, chance {100 * chance:.0f} "
            f"± {100 * error:.1f} %: {learnt}"
        )
    return "\n".join(lines)


def _settings(demo: Demo) -> dict[str, Any]:
    """Return the sizes as JSON."""
    return {**dataclasses.asdict(demo), "out": str(demo.out)}


def _finished(demo: Demo) -> dict[str, Any] | None:
    """Return the results on disk if they are of these settings and models, with their pictures."""
    path = demo.out / RESULTS
    parts = [demo.out / "test.npz"]
    parts += [_folder(demo, name) / "last" / "model.safetensors" for name in MODELS]
    if not path.is_file() or any(p.stat().st_mtime > path.stat().st_mtime for p in parts):
        return None
    content: dict[str, Any] = read_json(path)
    whole = all((demo.out / picture).is_file() for picture in content["pictures"])
    whole = whole and sorted(content.get("packaged", {})) == list_pretrained()
    whole = whole and all(
        map(report.whole, [*content["models"].values(), *content["packaged"].values()])
    )
    return content if whole and content["settings"] == _settings(demo) else None


def _folder(demo: Demo, name: str) -> Path:
    """Return a model's run folder."""
    return demo.out / "runs" / MODELS[name][0]


def _train(demo: Demo, name: str, data: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train a model, go on with its run, or find it finished; return its epochs' records."""
    folder, (model, lr) = _folder(demo, name), MODELS[name]
    resume = (folder / "last" / "training_state.json").is_file()
    config = TrainConfig(
        data=str(data),
        out=str(folder),
        model=model,
        epochs=demo.epochs,
        batch_size=demo.batch_size,
        lr=lr,
        schedule="onecycle",
        # Averaging steadies the statistics of batch norms, which small batches shake.
        ema=0.98,
        augment="dihedral",
        device=demo.device,
    )
    say(f"{name} ({'going on with' if resume else 'training into'} {folder})")
    return train(config, resume=resume, overwrite=folder.exists() and not resume).history


def _evaluate(
    demo: Demo, models: Mapping[str, VisionModel], test: Path, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Evaluate the models; results newer than model and images are taken from disk."""
    data, device, results = load(test), resolve_device(demo.device), {}
    for name, model in models.items():
        kept = _folder(demo, name) / "evaluation.json"
        made_of = (test, _folder(demo, name) / "last" / "model.safetensors")
        if kept.is_file() and all(p.stat().st_mtime < kept.stat().st_mtime for p in made_of):
            results[name] = read_json(kept)
            if report.whole(results[name]):
                continue
        results |= report.evaluate_models({name: model}, data, device=device, progress=say)
        write_json(kept, results[name])
    return results


def _evaluate_packaged(demo: Demo, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Evaluate the packaged models, each on fresh images of the set and size it was trained on."""
    results: dict[str, dict[str, Any]] = {}
    for name in list_pretrained():
        card = read_json(pretrained_folder(name) / "card.json")
        preset, device = card["trained"]["set"], resolve_device(demo.device)
        model = load_pretrained(name).to(device)
        set_backend(model, None)
        size = model.config["image_size"]
        fresh = demo.out / f"{preset}-{size}.npz"
        simulate(preset, demo.test_images, seed=FRESH_SEED, size=size, out=fresh)
        results |= report.evaluate_models({name: model}, load(fresh), device=device, progress=say)
    return results


def _draw(
    demo: Demo,
    models: Mapping[str, VisionModel],
    results: Mapping[str, Mapping[str, Any]],
    histories: Mapping[str, list[dict[str, Any]]],
    sets: Mapping[str, Path],
) -> list[Path]:
    """Write all pictures and return their paths."""
    folder, device = demo.out / "pictures", resolve_device(demo.device)
    samples = load(sets["train"]).subset(range(min(12, demo.images)))
    grid = plots.sample_grid(
        samples.images,
        samples.labels,
        samples.classes,
        pixel_scale=report.pixel_scale(samples),
        title="simulated strong lenses, without and with substructure",
    )
    return [
        plots.save(grid, folder / "images.png"),
        plots.save(plots.training_curves(histories), folder / "training.png"),
        *report.draw(models, results, load(sets["test"]), folder, device=device),
    ]
