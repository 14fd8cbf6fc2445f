"""The training loop: epochs, validation, checkpoints, stopping and going on."""

from __future__ import annotations

import filecmp
import json
import logging
import math
import os
import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from eqcvt._check import amp_dtype
from eqcvt._files import write_json, write_text
from eqcvt.data import Augment, Batches, LensingImages
from eqcvt.models import VisionModel, _base, load_model
from eqcvt.train import checkpoint
from eqcvt.train.average import Average
from eqcvt.train.checkpoint import Progress, State
from eqcvt.train.config import TrainConfig
from eqcvt.train.distributed import Process, processes
from eqcvt.train.evaluate import model_input, predict_logits
from eqcvt.train.folder import BEST, CONFIG, LAST, METRICS, TENSORBOARD, alone, claim, remove
from eqcvt.train.graph import GraphedStep
from eqcvt.train.metrics import mean_auc
from eqcvt.train.report import Reporter
from eqcvt.train.schedule import learning_rate
from eqcvt.train.setup import (
    fingerprint,
    load_data,
    make_model,
    make_optimizer,
    summary_writer,
)
from eqcvt.train.step import Step
from eqcvt.train.trained import model_folder, save_seen_images, seen_images, start_from

log = logging.getLogger("eqcvt")


@dataclass(frozen=True)
class TrainResult:
    """What a run reached.

    Args:
        best_accuracy: validation accuracy of the epoch ``best_epoch``, whose model is in ``best/``.
        last_accuracy: that of the last epoch, whose model is in ``last/``.
        best_epoch: counted from 1.
        folder: the run folder.
        history: the rows of ``metrics.json``.
        stopped_early: whether ``early_stopping`` ended it.
    """

    best_accuracy: float
    last_accuracy: float
    best_epoch: int
    folder: Path
    history: list[dict[str, Any]]
    stopped_early: bool


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> TrainResult:
    """Train a model; under torchrun, together with the other processes.

    The run folder gets ``config.toml``, ``classes.json`` (their names), ``trained_on.safetensors``
    (hashes of the training images), and after every epoch ``metrics.json`` (one row per epoch),
    ``best/`` and ``last/``, each written whole or not at all. The best epoch is the one with the
    highest validation accuracy, and among equal ones with the lowest validation loss.

    Args:
        config: the settings.
        resume: go on after the last finished epoch in ``config.out``; on the CPU the result is
            bit for bit that of an unbroken run on the same number of processes and threads.
            Settings that would change the finished epochs must be the same; ``epochs`` may grow
            with the schedules ``step`` and ``constant``.
        overwrite: start afresh, removing an earlier run from ``config.out`` when data, model and
            settings have been found to fit.
        quiet: print nothing.

    Returns:
        The accuracies, the run folder and the history.

    Raises:
        FileExistsError: when ``config.out`` holds a run and neither flag is given, or another
            process is training into it.
        FileNotFoundError, ValueError: for data, model or checkpoint that cannot be used.
        FloatingPointError: when the loss is NaN or infinite.
        KeyboardInterrupt: after Ctrl-C, saying how to go on.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    with processes(config.device) as process, _numerics(config, process):
        folder = Path(config.out)
        claim(folder, may_hold_a_run=resume or overwrite)
        with alone(folder) if process.first else nullcontext():
            process.wait()  # until the first one has put back what a killed run left half renamed
            run = _Run(config, process, resume=resume, overwrite=overwrite, quiet=quiet)
            try:
                return run.epochs()
            except KeyboardInterrupt:
                message = run.interrupted()
                raise KeyboardInterrupt(message) from None


class _Run:
    """One training run: its data, its state, and the steps on them."""

    def __init__(
        self, config: TrainConfig, process: Process, *, resume: bool, overwrite: bool, quiet: bool
    ) -> None:
        self.config, self.process, self.folder = config, process, Path(config.out)
        self.amp = amp_dtype(config.amp, process.device.type)
        data, self.validation = load_data(config)
        self.batches = _batches(config, process, data)
        self.labels = torch.from_numpy(self.validation.labels).long()
        rows = np.arange(process.rank, len(self.validation), process.world_size)
        self.share, self.rows = self.validation.subset(rows), torch.from_numpy(rows)
        torch.manual_seed(config.seed)
        model = make_model(config, data)
        model.classes = data.classes  # best/ and last/ keep their names wherever they are copied
        start = None
        before: NDArray[np.int64] | None = np.empty(0, np.int64)
        if config.init is not None and not resume:
            start = start_from(model, config.init, data.classes)
            before = seen_images(model_folder(Path(config.init)))
        model.to(process.device)
        average = Average(model, config.ema) if config.ema else None
        no_graph = _no_graph(config, process)
        graphed = config.cuda_graph and no_graph is None
        self.state = State(
            model=model,
            optimizer=make_optimizer(model, config, capturable=graphed),
            scaler=torch.amp.GradScaler(process.device.type, enabled=config.amp == "fp16"),
            average=average,
            progress=Progress(data=fingerprint(data, self.validation)),
        )
        self.augment = Augment(config.augment, supersample=config.supersample)
        if resume:
            checkpoint.load(self.folder / LAST, self.state, config)
        self.step = self._make_step(GraphedStep if graphed else Step)
        self.reporter = Reporter(
            shown=process.first and not quiet,
            steps=config.epochs * len(self.batches),
            done=self.state.progress.epoch * len(self.batches),
            batch_size=config.batch_size,
        )
        if start is not None:
            self.reporter.say(start)
        if config.cuda_graph and no_graph is not None:
            log.info("cuda_graph is not used: %s", no_graph)
            self.reporter.say(f"cuda_graph is not used: {no_graph}")
        if not config.cuda_graph and no_graph is None:
            self.reporter.say(
                "a step's kernels are launched one by one, and the GPU may wait for that: "
                "cuda_graph (--cuda-graph) replays them as one"
            )
        make_writer = summary_writer() if config.tensorboard else None
        # Every process has read and checked all it needs before the first one changes anything.
        process.wait()
        self.writer = None
        if process.first:
            if overwrite:
                remove(self.folder)
            if make_writer is not None:
                self.writer = make_writer(str(self.folder / TENSORBOARD))
            held_out = config.val_data and os.path.abspath(config.val_data)
            # Absolute, so that a command in any folder finds the images.
            located = replace(config, data=os.path.abspath(config.data), val_data=held_out)
            located.save(self.folder / CONFIG)
            write_text(self.folder / _base.CLASSES, json.dumps(data.classes) + "\n")
            self._write_metrics()
            if resume:
                self._check_best()
            else:
                if before is not None:
                    save_seen_images(self.folder, np.append(before, data.hashes))
                checkpoint.save(self.folder / LAST, self.state, config)
        self.saved_epoch = self.state.progress.epoch

    def _check_best(self) -> None:
        """Write ``best/`` anew where it should be ``last/``; warn where it cannot be loaded."""
        best, progress = self.folder / BEST, self.state.progress
        if progress.best_epoch == progress.epoch:
            files = (_base.WEIGHTS, _base.CONFIG, _base.CLASSES)
            same, *_ = filecmp.cmpfiles(best, self.folder / LAST, files, shallow=False)
            if progress.epoch and len(same) < len(files):
                checkpoint.save_model(best, self.state.validated)
            return
        try:
            load_model(best)
        except (FileNotFoundError, ValueError) as error:
            warnings.warn(
                f"the model of the best epoch, {progress.best_epoch}, is lost ({error}): {best} is "
                "written when a later epoch is better",
                stacklevel=2,
            )

    def _make_step(self, kind: type[Step]) -> Step:
        """Make the training step, of a model that is parallel and compiled if asked."""
        config, state = self.config, self.state
        if config.sync_batch_norm and self.process.world_size > 1:
            from eqcvt.nn import set_sync_batch_norm

            for model in {state.model, state.validated}:
                set_sync_batch_norm(model, torch.distributed.group.WORLD)
        net: Any = self.process.wrap(state.model)
        if config.compile:
            net = torch.compile(net)
        return kind(
            net,
            state.optimizer,
            loss_fn=partial(F.cross_entropy, label_smoothing=config.label_smoothing),
            prepare=partial(_gather, self.batches, self.augment, state.model),
            amp=self.amp,
            clip=config.clip,
            scaler=state.scaler,
            average=state.average,
        )

    def epochs(self) -> TrainResult:
        """Train until the last epoch, or until validation no longer improves."""
        progress, config = self.state.progress, self.config
        with self.reporter:
            while progress.epoch < config.epochs and not self._stale():
                self.reporter.start_epoch(progress.epoch + 1, config.epochs)
                self._epoch()
        if self._stale() and progress.epoch < config.epochs:
            self.reporter.say(
                f"stopped early: no better validation result since epoch {progress.best_epoch}"
            )
        if self.writer is not None:
            self.writer.close()
        return TrainResult(
            best_accuracy=progress.best_accuracy,
            last_accuracy=progress.history[-1]["val_accuracy"],
            best_epoch=progress.best_epoch,
            folder=self.folder,
            history=progress.history,
            stopped_early=progress.epoch < config.epochs,
        )

    def interrupted(self) -> str:
        """Say where the state is and how to go on."""
        done, count = self.saved_epoch, self.process.world_size
        launch = f"torchrun --nproc-per-node {count} -m " if count > 1 else ""
        text = (
            f"interrupted in epoch {done + 1}; the state after epoch {done} is in "
            f"{self.folder / LAST}. Go on with: {launch}eqcvt train --out "
            f"{shlex.quote(str(self.folder))} --resume, or train(config, resume=True)"
        )
        self.reporter.say(text)
        return text

    def _stale(self) -> bool:
        patience, progress = self.config.early_stopping, self.state.progress
        return 0 < patience <= progress.epoch - progress.best_epoch

    def _epoch(self) -> None:
        """Train and validate once, then write everything down."""
        start, progress, process = time.perf_counter(), self.state.progress, self.process
        train_loss, lr = self._train()
        trained = time.perf_counter() - start
        if self.config.recalibrate:
            self._recalibrate()
        logits = self._validate()
        val_loss = float(F.cross_entropy(logits.double(), self.labels))
        if not math.isfinite(val_loss):
            raise self._not_finite("validation loss", val_loss, "")
        accuracy = float((logits.argmax(1) == self.labels).double().mean())
        row = {
            "epoch": progress.epoch + 1,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_accuracy": accuracy,
            "val_auc": mean_auc(logits, self.labels),
            "lr": lr,
            "images_per_second": len(self.batches) * self.config.batch_size / trained,
            "seconds": time.perf_counter() - start,
        }
        progress.epoch += 1
        progress.history.append(row)
        best = progress.improves(accuracy, val_loss)
        if best:
            progress.best_epoch = progress.epoch
            progress.best_accuracy, progress.best_loss = accuracy, val_loss
        if process.first:
            if not (self.folder / CONFIG).is_file():  # else half a run would be begun there
                raise FileNotFoundError(
                    f"the run folder {self.folder} is gone: was it moved? It goes on with resume, "
                    "and out where it is now"
                )
            # In this order: from last/ a resumed run makes the others if this one is killed here.
            checkpoint.save(self.folder / LAST, self.state, self.config)
            if best:
                checkpoint.save_model(self.folder / BEST, self.state.validated)
            self._write_metrics()
            self._log(row)
        self.saved_epoch = progress.epoch
        self.reporter.end_epoch(row, self.config.epochs, best=best)

    def _train(self) -> tuple[float, float]:
        """One pass over the training images; the mean loss and the last learning rate."""
        config, state, device = self.config, self.state, self.process.device
        checkpoint.seed_epoch(config.seed, state.progress.epoch, self.process.rank)
        self.batches.set_epoch(state.progress.epoch)
        state.model.train()
        steps = len(self.batches)
        # They stay on the device: reading them at every step would wait for it.
        losses = torch.zeros(steps, dtype=torch.float64, device=device)
        lr = 0.0
        for step, places in enumerate(self.batches.places()):
            lr = learning_rate(config, state.progress.epoch * steps + step, steps)
            loss = self._step(places, lr)
            losses[step] = loss
            self.reporter.step(loss)
        mean = float(self.process.sum(losses.sum())) / (steps * self.process.world_size)
        if not math.isfinite(mean):
            bad = (~losses.isfinite()).nonzero().flatten().tolist()
            where = f" at step {bad[0] + 1} of {steps}" if bad else ""
            raise self._not_finite("training loss", mean, where)
        return mean, lr

    def _step(self, places: Tensor, lr: float) -> Tensor:
        """One optimiser step; returns the loss of this process's images, detached."""
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr
        return self.step(places)

    def _recalibrate(self) -> None:
        """Estimate the running statistics of the model to validate on training batches.

        On images as validation has them: turning smooths their noise, which moves the statistics.
        Weights that were trained with both kinds keep the statistics of both.
        """
        model = self.state.validated
        both = self.config.augment == "mixed"
        batches = islice(self.batches, self.config.recalibrate)
        images = (model_input(model, images) for images, _ in batches)
        with torch.no_grad():
            update_bn(map(self.augment, images) if both else images, model)

    def _validate(self) -> Tensor:
        """The logits of all validation images, [N, K] on the CPU; each process makes its share."""
        self.process.broadcast_buffers(self.state.model)
        if self.state.average is not None:
            self.process.broadcast_buffers(self.state.average.module)
        device = self.process.device
        shape = (len(self.validation), len(self.validation.classes))
        logits = torch.zeros(shape, dtype=torch.float64, device=device)
        if len(self.share):
            share = predict_logits(
                self.state.validated, self.share, device=device, batch_size=self.config.batch_size
            )
            logits[self.rows.to(device)] = share.to(device, torch.float64)
        return self.process.sum(logits).cpu()

    def _not_finite(self, what: str, value: float, where: str) -> FloatingPointError:
        done = self.state.progress.epoch
        return FloatingPointError(
            f"the {what} became {value}{where} in epoch {done + 1}. The state after epoch {done} "
            f"is in {self.folder / LAST}. Try a lower lr (now {self.config.lr:g}), clip=1, a "
            f"longer warm-up or amp='off' (now {self.config.amp!r})"
        )

    def _write_metrics(self) -> None:
        write_json(self.folder / METRICS, self.state.progress.history)

    def _log(self, row: dict[str, Any]) -> None:
        if self.writer is not None:
            for key, value in row.items():
                if key != "epoch" and value is not None:
                    self.writer.add_scalar(key, value, row["epoch"])
            self.writer.flush()


def _batches(config: TrainConfig, process: Process, data: LensingImages) -> Batches:
    """The training batches of this process; images that do not fill a batch wait an epoch."""
    world = process.world_size
    if config.batch_size // world < 2 and not config.sync_batch_norm:
        raise ValueError(
            f"batch_size {config.batch_size} leaves one image to each of {world} processes, too "
            "few for batch norm: use a larger batch or sync_batch_norm"
        )
    if config.batch_size > len(data):
        largest = len(data) // world * world
        hint = f"the largest allowed is {largest}" if largest > 1 else "give more images"
        raise ValueError(
            f"batch_size {config.batch_size} is more than the {len(data)} training images: {hint}"
        )
    return Batches(
        data,
        config.batch_size,
        device=process.device,
        shuffle=True,
        seed=config.seed,
        rank=process.rank,
        world_size=world,
        drop_last=True,
    )


def _gather(
    batches: Batches, augment: Augment, model: VisionModel, places: Tensor
) -> tuple[Tensor, Tensor]:
    """The images at ``places`` as the model takes them, scaled and turned, and their labels."""
    images, labels = batches.take(places)
    return augment(model_input(model, images)), labels


def _no_graph(config: TrainConfig, process: Process) -> str | None:
    """Why a CUDA graph cannot hold the training step; None where it can."""
    if process.device.type != "cuda":
        return f"it needs a GPU, and this run is on device {str(process.device)!r}"
    if process.world_size > 1:
        return f"it holds the step of a single process, and this run has {process.world_size}"
    if config.compile:
        return "it does not hold what compile makes; leave compile away"
    return None


@contextmanager
def _numerics(config: TrainConfig, process: Process) -> Iterator[None]:
    """Switch deterministic operations on if asked; put that and torch's seeds back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    devices = [process.device] if process.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if config.deterministic:
            # cuBLAS reads it when it starts; without it torch refuses matrix products on a GPU.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warned)
