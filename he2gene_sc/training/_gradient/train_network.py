"""Train a network on patches, and describe it on a card."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..._core.logs import logger
from ...models import HE2Gene
from ...models._encoders.load import encoder_sha256
from ...models._tensors import ENCODER
from .._folds import warn_of_unit
from .._metadata import ModelMetadata
from .._sections import Section, group_codes
from .fit import Fitted, fit_network
from .held_out import HeldOutSection, figures, gene_figures, held_out_sections, reliable_rule, variable_genes
from .patches import PatchSet, Split, Targets, balanced_folds, column_means, neighbour_table, split
from .presets import Preset
from .run_options import RunOptions


def patch_set(sections: Sequence[Section], patches: np.ndarray, *, n_target: int, neighbours: bool = False) -> PatchSet:
    """Combine sections for training by gradient descent; codes of sections and patients follow their order.

    ``patches`` ``(n, 3, s, s)`` uint8 are those of all sections. Features are not used, and targets stay sparse.
    """
    codes = np.repeat(np.arange(len(sections)), [len(section) for section in sections])
    targets = Targets([section.targets.tocsr() for section in sections], np.stack([s.measured for s in sections]))
    centres = np.concatenate([section.centres_um for section in sections])
    return PatchSet(
        patches=patches,
        targets=targets,
        codes=np.concatenate([section.codes for section in sections]),
        sections=codes,
        patients=group_codes(sections, "patient"),
        target_mask=target_mask(targets, np.arange(len(codes)), n_target),
        coordinates=centres,
        neighbours=neighbour_table(centres, None, codes) if neighbours else None,
    )


def target_mask(targets: Targets | np.ndarray, rows: np.ndarray, n_target: int) -> np.ndarray:
    """Return a mask ``(g,)`` of the ``n_target`` genes with the highest mean over some spots."""
    means = np.nan_to_num(column_means(targets, rows), nan=-1.0)
    mask = np.zeros(len(means), bool)
    mask[np.argsort(-means, kind="stable")[:n_target]] = True
    return mask


def train_network(
    data: PatchSet,
    sections: Sequence[Section],
    metadata: ModelMetadata,
    preset: Preset,
    encoder: nn.Module,
    *,
    run: RunOptions | None = None,
    validation: str = "grouped",
    cross_validate: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    show_progress: bool = False,
) -> HE2Gene:
    """Train a whole network by a preset, and return that of the best epoch with its card, in single precision.

    Target genes are chosen in each fold; ``data`` gives their number. ``validation`` is ``"grouped"`` (patients, else sections,
    else blocks) or ``"random"``, a tenth of the spots as in the paper, whose metrics leak. With ``cross_validate``, metrics are
    over folds that were not used for early stopping, at up to eleven times the work. Otherwise they are slightly optimistic,
    as the card states.
    """
    run = RunOptions() if run is None else run
    names = {
        "sections": [section.name for section in sections],
        "patients": [section.patient for section in sections],
        "genes": metadata.genes,
        "classes": metadata.classes,
    }
    rows = split(data, preset, validation, seed)
    warn_of_unit(rows.unit)
    n_target = int(data.target_mask.sum())

    def fit(chosen: Split, name: str, predicted: np.ndarray | None = None) -> tuple[PatchSet, Fitted]:
        fold_data = replace(data, target_mask=target_mask(data.targets, chosen.train, n_target))
        folder = run.checkpoint_dir
        return fold_data, fit_network(
            fold_data,
            preset,
            encoder,
            metadata.encoder,
            run=replace(run, checkpoint_dir=Path(folder) / name) if folder and cross_validate else run,
            rows=chosen,
            predicted=predicted,
            n_classes=len(metadata.classes),
            names=names,
            seed=seed,
            device=device,
            show_progress=show_progress,
        )

    model_data, model = fit(rows, "model")
    protocol, found = _protocol(rows.unit), held_out_sections(model_data, model)
    if cross_validate:
        unit, folds = balanced_folds(data, preset, np.arange(len(data)))
        n_folds, found = int(folds.max()) + 1, []
        protocol = _protocol(unit, n_folds)
        for fold in range(n_folds):
            # Early stopping uses a part of the other spots, not the fold.
            rest = split(data, preset, rows=np.flatnonzero(folds != fold))
            fold_data, fitted = fit(rest, f"fold-{fold}", np.flatnonzero(folds == fold))
            logger.info("fold %d of %d: best epoch %d", fold + 1, n_folds, fitted.best_epoch)
            found += held_out_sections(fold_data, fitted)
    n_spots = np.bincount(data.sections, minlength=len(sections))
    facts = {
        "training": metadata.spots(sections, n_spots, data.codes) | _training(data, preset, model, sections, seed),
        "metrics": {protocol: figures(found, names["sections"])},
    }
    return _describe(model_data, metadata, preset, encoder, model, found, facts)


def _protocol(unit: str, n_folds: int = 0) -> str:
    if unit == "spot":
        return "random spots of the training patients, as in the paper: this LEAKS, do not report it as accuracy"
    parts = "other parts" if n_folds else "another part"
    warning = f"; {parts} of the SAME section, do not report it as accuracy" if unit == "block" else ""
    if n_folds:
        return f"cross-validated over {n_folds} folds of {unit}s{warning}"
    return f"one fold of held-out {unit}s, also used for early stopping, so metrics are slightly optimistic{warning}"


def _describe(
    data: PatchSet,
    metadata: ModelMetadata,
    preset: Preset,
    encoder: nn.Module,
    fitted: Fitted,
    found: list[HeldOutSection],
    facts: dict[str, Any],
) -> HE2Gene:
    patients = data.patients[np.unique(data.sections, return_index=True)[1]].tolist()
    variable = variable_genes(data, np.arange(len(data)))
    mean = column_means(data.targets, np.arange(len(data)))
    genes = gene_figures(found, fitted.unit, patients)
    table = metadata.table(np.flatnonzero(data.target_mask), variable, mean, genes)
    spec = metadata.encoder
    trained = copy.deepcopy(encoder).cpu()
    trained.load_state_dict(
        {key.removeprefix(ENCODER): torch.from_numpy(v) for key, v in fitted.tensors.items() if key.startswith(ENCODER)}
    )
    if "annotation.weight" not in fitted.tensors:
        metadata = replace(metadata, classes=(), class_colors=())
    card = replace(metadata, encoder_sha256=encoder_sha256(trained)).card(
        table,
        fitted.tensors,
        **facts,
        reliable_rule=reliable_rule(found, fitted.unit, patients),
        limitations=(
            *metadata.limitations,
            *_calibration(fitted, preset),
            f"Metrics use only the training window ({preset.train_window_um:g} µm); predictions average all windows.",
        ),
        fusion="mean",
        tta=preset.tta,
    )
    # A user's network cannot be built by name.
    is_own = not (spec.timm_name or spec.transformers_name)
    return HE2Gene(card, table, fitted.tensors, encoder=(trained.eval(), spec) if is_own else None)


def _calibration(fitted: Fitted, preset: Preset) -> list[str]:
    if "annotation.weight" not in fitted.tensors:
        return []
    if fitted.temperature is None:
        reason = ", as in the paper" if preset.exact else ": no labels of two classes were held out"
        return [f"The probabilities of its annotation are not calibrated{reason}."]
    return [
        f"The probabilities of its annotation are calibrated by one temperature on the held-out {fitted.unit}s that were "
        "also used for early stopping, in the training window; predictions average all windows."
    ]


def _training(data: PatchSet, preset: Preset, fitted: Fitted, sections: Sequence[Section], seed: int) -> dict[str, Any]:
    held_out = np.bincount(data.sections[fitted.rows], minlength=len(sections))
    best = fitted.history[fitted.best_epoch]
    temperature = {} if fitted.temperature is None else {"annotation_temperature": round(fitted.temperature, 4)}
    return {
        "preset": preset.name,
        **({"exact": True} if preset.exact else {}),
        "train_window_um": preset.train_window_um,
        "lr": preset.lr,
        "batch_size": preset.batch_size,
        "seed": seed,
        "chosen_by": f"held-out {fitted.unit}s",
        "held_out_to_stop": {s.name: int(n) for s, n in zip(sections, held_out, strict=True) if n},
        "epochs": len(fitted.history),
        "best_epoch": fitted.best_epoch,
        "held_out_error_of_the_best_epoch": round(best["held_out_error"], 5),
        **temperature,
    }
