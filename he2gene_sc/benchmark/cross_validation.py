"""Grouped cross-validation of presets, models and baselines over the sections of a data set, for ``he2gene benchmark``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .. import datasets, tl
from .._core import validate
from .._core.matrix import dense, matrix_of
from ..datasets._her2st import local_image
from ..inference import resolve_device, resolve_dtype
from ..models import HE2Gene, load_encoder
from ..models._embedding import N_COLOUR
from ..models._encoders.load import encoder_sha256
from ..models._network import FeatureExtractor
from ..stats import log_normalise, noise_ceiling, pearson, skill
from ..tl._train.fit import encode_section
from ..tl._train.measured import MeasuredSection, join, read_sections
from ..tl._train.options import PRESETS, WINDOWS_UM, Classes, DefaultRecipe, GeneSelection, TrainingKeys
from ..training import Section, folds_of, grouped_folds
from ..training._closed_form.validate import panels
from ..training._figures import interval
from ..training._held_out import Panel

if TYPE_CHECKING:
    from spatialdata import SpatialData

UNITS = ("section", "patient")
N_TARGET = 250
#: Most folds: more sections or patients than these are held out in folds of several whole groups.
MAX_FOLDS = 8
#: Penalties of the ridges, in units of the number of features.
_PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
_ENCODER = "efficientnet-lite0"
#: Selection of genes: the files of these data sets omit genes that were not detected in a section.
GENES = GeneSelection(missing_genes_are_zero=True)


@dataclass(frozen=True)
class Source:
    """Sections of a data set, read on demand."""

    name: str
    patients: dict[str, str]  # patient of each section
    read: Callable[[str], SpatialData]  # reads a section by name


@dataclass(frozen=True)
class Prediction:
    """Prediction of the panel genes of one held-out section, ``(n, g)``; NaN rows were not predicted."""

    values: np.ndarray
    reliable: tuple[np.ndarray, np.ndarray] | None = None  # measured and predicted, of reliable genes


def her2st(sections: Sequence[str] | None = None) -> Source:
    """Return the sections of her2st that have a local image, or the chosen ``sections``."""
    names = datasets.HER2ST_SECTIONS
    chosen = _choose_sections(sections, names, [name for name in names if local_image(name) is not None])
    return Source("her2st", {name: name[0] for name in chosen}, datasets.her2st)


def hbcis(root: str | Path, sections: Sequence[str] | None = None) -> Source:
    """Return the sections of HBCIS under ``root``, or the chosen ``sections``."""
    found = datasets.hbcis(root)
    chosen = _choose_sections(sections, found.names, found.names)
    return Source("hbcis", {name: found.metadata.loc[name, "patient"] for name in chosen}, found.__getitem__)


def _choose_sections(sections: Sequence[str] | None, valid: Sequence[str], default: Sequence[str]) -> list[str]:
    if unknown := [name for name in sections or () if name not in valid]:
        raise ValueError(f"`sections` {unknown} are unknown, valid: {', '.join(valid)}")
    chosen = list(dict.fromkeys(sections or default))
    if len(chosen) < 2:
        raise ValueError(
            f"`sections`: only {chosen[0]} is named; two are needed to hold one out, valid: {', '.join(valid)}"
            if sections
            else f"`sections`: {len(chosen)} section(s) with an image found here; two are needed to hold one out. Set "
            "HE2GENE_DATA_DIR to the folder above her2st, or name sections that can be downloaded"
        )
    return chosen


def split(source: Source, unit: str) -> list[tuple[list[str], list[str]]]:
    """Return the training and held-out sections of each fold; folds hold out whole sections or whole patients."""
    validate.one_of(unit, UNITS, "folds")
    names = np.array(list(source.patients))
    codes, patients = pd.factorize(np.array(list(source.patients.values())))
    groups = len(patients) if unit == "patient" else len(names)
    if groups < 2:
        raise ValueError(f"`folds` is {unit!r}, but all sections {names.tolist()} are of one {unit} only")
    n_folds = MAX_FOLDS if groups > MAX_FOLDS else None
    _, folds = grouped_folds(np.arange(len(names)), codes, unit=unit, n_folds=n_folds)
    return [(names[folds != held].tolist(), names[folds == held].tolist()) for held in np.unique(folds)]


def run(
    source: Source,
    models: Sequence[str],
    units: Sequence[str],
    *,
    cache: str | Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | None = None,
    n_target: int = N_TARGET,
    echo: Callable[[str], object] = print,
) -> pd.DataFrame:
    """Hold out one group of sections after the other, and score every predictor on the held-out sections.

    ``models`` are presets, which are trained in each fold, or models, which are scored only on sections or patients that they
    were not trained on. There is one row per ``folds, section, patient, predictor, panel``, with ``pearson`` across spots (0 if
    constant), ``low, high`` (95 %, blocks of tissue), ``skill`` (median), ``ceiling`` and ``above`` (share over 0.1).
    """
    from ..models import load

    folds = {unit: split(source, unit) for unit in units}
    loaded = {name: load(name) for name in models if name not in PRESETS}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="he2gene-") as work:
        cache = Path(work) if cache is None else Path(cache)
        read, sections, genes = _read(source, cache, device)
        for unit, parts in folds.items():
            for train, test in parts:
                fold = _Fold(
                    unit, [sections[name] for name in train], [sections[name] for name in test], genes, n_target
                )
                predictors = _baselines(fold)
                for name in models:
                    own = (options or {}).get(name, {})
                    model = loaded.get(name) or _train(source, train, name, cache, device, own)
                    predictors[name] = _predict_sections(source, fold, model, read, name in PRESETS, device)
                for i, section in enumerate(fold.test):
                    measured = read[section.name]
                    columns = measured.genes.get_indexer(genes[fold.columns])
                    ceiling = noise_ceiling(measured.counts, genes=columns)
                    ceiling = np.where(columns >= 0, np.nan_to_num(ceiling), 0)
                    for name, predictions in predictors.items():
                        if (prediction := predictions[i]) is not None:
                            rows += _score(fold, section, name, prediction, ceiling)
                echo(f"{source.name}, {unit} held out: {', '.join(test)} done")
    return pd.DataFrame(rows)


class _Fold:
    """Training sections, held-out sections, and the genes that are scored, chosen on the training sections."""

    def __init__(self, unit: str, train: list[Section], test: list[Section], genes: pd.Index, n_target: int) -> None:
        self.unit, self.train, self.test, self.genes = unit, train, test, genes
        rows = [np.ones(len(section), bool) for section in train]
        self.target, self.variable = panels(train, rows, min(n_target, len(genes)))
        self.columns = np.concatenate([self.target, self.variable])
        self.y = [section.dense(self.columns) for section in train]
        self.mean = np.nanmean(np.concatenate(self.y), axis=0)


def _read(
    source: Source, cache: Path, device: str | None
) -> tuple[dict[str, MeasuredSection], dict[str, Section], pd.Index]:
    """Read all sections, and encode them for the baselines: output of the encoder in three windows, and colour."""
    resolved = resolve_device("auto" if device is None else device)
    network, spec = load_encoder(_ENCODER)
    extractor, sha256 = FeatureExtractor(network, spec), encoder_sha256(network)
    engine = (32, resolved, resolve_dtype("float32", resolved), False)
    kept, features = [], []
    for name in source.patients:
        sdata = source.read(name)
        if not sdata.images:
            raise FileNotFoundError(f"section {name} of {source.name} has no local image")
        for section in read_sections(sdata, TrainingKeys("annotation", "patient", "section"), {}):
            features.append(encode_section(section, extractor, sha256, WINDOWS_UM, cache, engine))
            kept.append(section.release())
        del sdata, section
    sections, genes, _ = join(kept, features, GENES, Classes())
    return {m.name: m for m in kept}, {s.name: s for s in sections}, genes


def _baselines(fold: _Fold) -> dict[str, list[Prediction | None]]:
    """Predict with baselines that are fitted only on the training sections of the fold."""
    n_colour = N_COLOUR * len(WINDOWS_UM)
    return {
        "training mean": [Prediction(np.tile(fold.mean, (len(section), 1))) for section in fold.test],
        "class mean (labels of the held-out section given)": _class_mean(fold),
        "total counts (of the held-out section given)": _total_counts(fold),
        "mean colour, ridge": _ridge(fold, slice(-n_colour, None)),
        "frozen encoder, ridge": _ridge(fold, slice(None, -n_colour)),
    }


def _class_mean(fold: _Fold) -> list[Prediction | None]:
    codes, y = np.concatenate([section.codes for section in fold.train]), np.concatenate(fold.y)
    means = {code: np.nanmean(y[codes == code], axis=0) for code in np.unique(codes[codes >= 0])}
    found: list[Prediction | None] = []
    for section in fold.test:
        values = np.tile(fold.mean, (len(section), 1))
        for code, mean in means.items():
            values[section.codes == code] = mean
        found.append(Prediction(values) if (section.codes >= 0).any() else None)
    return found


def _total_counts(fold: _Fold) -> list[Prediction | None]:
    depth = [np.log(section.totals) for section in fold.train]
    x = np.concatenate([d - d.mean() for d in depth])
    y = np.concatenate([np.nan_to_num(part - np.nanmean(part, axis=0)) for part in fold.y])
    slope = x @ y / np.square(x).sum()
    depth = [np.log(section.totals) for section in fold.test]
    return [Prediction(np.outer(d - d.mean(), slope) + fold.mean) for d in depth]


def _ridge(fold: _Fold, features: slice) -> list[Prediction | None]:
    """Fit a ridge on standardised features, with a penalty chosen by grouped folds of the training sections."""
    train, test = ([np.asarray(part.features[:, 0, features]) for part in parts] for parts in (fold.train, fold.test))
    x, y = np.concatenate(train), np.nan_to_num(np.concatenate(fold.y) - fold.mean)
    n = len(fold.target)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()),
        {"ridge__alpha": np.multiply(_PENALTIES, x.shape[1])},
        scoring=lambda model, x, y: np.nan_to_num(pearson(model.predict(x)[:, :n], y[:, :n])).mean(),
        cv=PredefinedSplit(np.concatenate(folds_of(fold.train, None)[1])),
        error_score="raise",
    ).fit(x, y)
    return [Prediction(search.predict(part) + fold.mean) for part in test]


def _train(
    source: Source, names: Sequence[str], preset: str, cache: Path, device: str | None, options: Mapping[str, Any]
) -> HE2Gene:
    # Only expression is scored.
    default = {"preset": DefaultRecipe(n_recoloured=0), "cache": cache}
    own = default if preset == "default" else {"preset": preset, "encoder": _ENCODER}
    settings = {"annotation_key": "annotation", "device": device, **own, **options}
    # A list chooses genes; the other settings of the selection stay.
    genes = options.get("genes")
    settings["genes"] = genes if isinstance(genes, GeneSelection) else replace(GENES, genes=genes)
    return tl.train((source.read(name) for name in names), show_progress_bar=False, **settings)


def _predict_sections(
    source: Source,
    fold: _Fold,
    model: HE2Gene,
    read: Mapping[str, MeasuredSection],
    trained_here: bool,
    device: str | None,
) -> list[Prediction | None]:
    """Predict the held-out sections; ``None`` if a ready model was trained on the section or patient."""
    trained_on = model.card.training.get("sections", {})
    patients = {facts["patient"] for facts in trained_on.values()}
    found: list[Prediction | None] = []
    for section in fold.test:
        leaks = section.name in trained_on or (fold.unit == "patient" and section.patient in patients)
        if leaks and not trained_here:
            found.append(None)
            continue
        sdata = source.read(section.name)
        tl.predict(sdata, model=model, genes="all", key_added="he2gene_bench", device=device, show_progress_bar=False)
        made = sdata["he2gene_bench"]
        # The rows of `Section`: spots inside the image with counts, in the order of the table.
        totals = np.asarray(sdata["table"].X.sum(axis=1)).ravel()
        layer = matrix_of(made, "he2gene_bench")
        rows = np.flatnonzero((totals > 0) & np.isfinite(dense(layer[:, 0])))
        values = dense(layer[rows])
        columns = made.var_names.get_indexer(fold.genes[fold.columns])
        panel = np.where(columns >= 0, values[:, columns], fold.mean)
        reliable = np.flatnonzero(model.genes.loc[made.var_names, "reliable"].to_numpy(bool))
        columns_of_section = read[section.name].genes.get_indexer(made.var_names[reliable])
        logs = log_normalise(read[section.name].counts)[:, columns_of_section]
        measured = np.where(columns_of_section >= 0, logs, 0)
        found.append(Prediction(panel, (measured, values[:, reliable]) if len(reliable) else None))
        del sdata, made
    return found


def _score(
    fold: _Fold, section: Section, predictor: str, prediction: Prediction, ceiling: np.ndarray
) -> Iterator[dict[str, Any]]:
    measured = section.dense(fold.columns)
    panel = Panel(fold.target, fold.variable, prediction.values.astype(np.float32), measured)
    r = np.nan_to_num(pearson(prediction.values, measured))
    skills = skill(prediction.values, measured, fold.mean)
    limits = interval(panel, section.centres_um)
    common = {"folds": fold.unit, "section": section.name, "patient": section.patient, "predictor": predictor}
    n = len(fold.target)
    parts = {f"{n} highest mean": slice(0, n), f"{len(fold.variable)} most variable": slice(n, None)}
    for (name, part), (low, high) in zip(parts.items(), limits, strict=True):
        row = {**common, "panel": name, "n_genes": len(r[part]), "pearson": r[part].mean(), "low": low, "high": high}
        row |= {"skill": np.nanmedian(skills[part]), "ceiling": ceiling[part].mean(), "above": (r[part] > 0.1).mean()}
        if predictor == "training mean":  # constant
            row |= dict.fromkeys(("pearson", "low", "high", "above"), np.nan)
        yield row
    if prediction.reliable is not None:
        r = np.nan_to_num(pearson(*prediction.reliable))
        yield {**common, "panel": "called reliable", "n_genes": len(r), "pearson": r.mean(), "above": (r > 0.1).mean()}
