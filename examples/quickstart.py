"""EqCvT from the first line to a trained model, in under a minute on a laptop.

Read it from top to bottom, or run it:  python examples/quickstart.py
It writes into the folder quickstart/ (or the one given as its argument).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import eqcvt
from eqcvt import plots
from eqcvt.data import load, simulate, to_unit
from eqcvt.train import TrainConfig, evaluate, logits_over_angles, train


def main(out: Path, *, images: int = 1000, epochs: int = 8, size: int = 33) -> dict[str, float]:
    """Go through all steps; return the accuracy and what quarter turns do to the logits."""
    # 1. A model. "front" turns with the image up to the tokens (the poster's EqCvT); "exact" has
    #    turn-symmetric token filters too, so that its logits do not change at all.
    front = eqcvt.EqCvT(in_channels=1, num_classes=2, image_size=size).eval()
    exact = eqcvt.EqCvT(in_channels=1, num_classes=2, image_size=size, invariance="exact").eval()
    print(f"EqCvT: {sum(p.numel() for p in front.parameters()):,} parameters")

    # 2. Its shapes: images [B, C, H, W] -> tokens [B, D, H', W'] -> logits [B, classes].
    x = torch.rand(2, 1, size, size)
    tokens = front.forward_features(x)
    print(f"images {list(x.shape)} -> tokens {list(tokens.shape)} -> logits {list(front(x).shape)}")

    # 3. Its symmetry: turn the image by 90 degrees and compare the logits.
    with torch.no_grad():
        for name, model in (("front", front), ("exact", exact)):
            change = (model(x.rot90(1, (2, 3))) - model(x)).abs().max()
            print(f"{name}: a quarter turn changes the logits by {change:.1e}")

    # 4. Images: strong lenses with and without dark-matter substructure. Image i depends on
    #    (preset, seed, i) alone.
    path = simulate("deeplense", images, seed=1, size=size, out=out / "train.npz", workers=1)
    test = load(simulate("deeplense", 64, seed=2, size=size, out=out / "test.npz", workers=1))
    print(f"{images} images for training, {len(test)} to test, classes {test.classes}")

    # 5. Training, here as briefly as it still learns; `eqcvt demo` takes larger images and compares
    #    three models.
    config = TrainConfig(
        data=str(path),
        out=str(out / "run"),
        model="eqcvt_c4_exact",
        epochs=epochs,
        batch_size=8,
        lr=1.5e-3,
        ema=0.98,
        augment="dihedral",
        device="cpu",
    )
    result = train(config, overwrite=True)

    # 6. Evaluation: the last epoch's model, on images of another seed.
    model = eqcvt.load_model(result.folder / "last")
    found = evaluate(model, test, device="cpu")
    print(f"accuracy {100 * found['accuracy']:.0f} % (chance 50 %)")
    print(f"largest change under quarter turns {found['rotation']['residual_group']:.1e}")

    # 7. Pictures: what it was trained on, how it went, and the logits as the image turns.
    grid = plots.sample_grid(test.images[:8], test.labels[:8], test.classes, columns=4)
    plots.save(grid, out / "images.png")
    plots.save(plots.training_curves({"EqCvT exact": result.history}), out / "training.png")
    angles = [15.0 * i for i in range(24)]
    first_two = torch.from_numpy(test.images[:2])
    logits = {
        "untrained": logits_over_angles(front, first_two, angles),
        "trained, exact": logits_over_angles(model, first_two, angles),
    }
    truth = [test.classes[int(label)] for label in test.labels[:2]]
    polar = plots.logits_polar(angles, logits, test.classes, truth=truth)
    plots.save(polar, out / "logits_vs_angle.png")
    print(f"pictures are in {out}")

    # 8. Your own images: values in [0, 1], [B, C, H, W].
    probabilities = model(to_unit(first_two)).softmax(dim=1)
    print(f"probability of substructure: {probabilities[:, 1].tolist()}")
    return {"accuracy": found["accuracy"], "residual": found["rotation"]["residual_group"]}


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart"))
