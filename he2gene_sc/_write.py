"""Writing what was predicted into a table: computed first, written at once, undone if it is interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._core.layers import layer_names
from ._keys import FACTS, INSTANCE, MADE, REGION, SPATIAL, TABLE, Keys
from ._settings import settings
from ._stale import remove_derived, same_values, warn_removed

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ._core.slide import Slide
    from ._genes import WantedGenes
    from .inference import Predictions
    from .models import HE2Gene


@dataclass(frozen=True)
class Filled:
    """Predictions of all slides of a table, spot by spot, and where they go.

    Attributes
    ----------
    rows
        Rows of the table, ``(n,)``; ``None`` for a new table.
    expression, proba, embedding
        ``(n, g)``, ``(n, c)``, ``(n, k)`` float32; NaN for spots outside the image.
    ood
        ``(n,)`` float32, likewise; ``None`` where the model does not tell.
    centres
        ``(n, 2)``, pixels of level 0.
    """

    rows: np.ndarray | None
    expression: np.ndarray
    proba: np.ndarray
    embedding: np.ndarray
    centres: np.ndarray
    wanted: WantedGenes
    model: HE2Gene
    keys: Keys
    record: dict[str, Any]
    ood: np.ndarray | None = None

    @classmethod
    def collect(
        cls,
        slides: Sequence[Slide],
        predictions: Sequence[Predictions],
        wanted: WantedGenes,
        model: HE2Gene,
        keys: Keys,
        record: dict[str, Any],
    ) -> Filled:
        """Put the slides of a table one below the other, and say once how many spots lie outside their image."""
        outside = sum(int((~slide.inside).sum()) for slide in slides)
        if outside:
            total = sum(len(slide.inside) for slide in slides)
            warnings.warn(
                f"{outside} of {total} spots have their centre outside the image: they get NaN and no annotation",
                UserWarning,
                stacklevel=3,
            )

        def stack(of: Callable[[Predictions], np.ndarray]) -> np.ndarray:
            parts = []
            for slide, result in zip(slides, predictions, strict=True):
                values = of(result)
                if slide.inside.all():
                    parts.append(values)
                    continue
                whole = np.full((len(slide.inside), *values.shape[1:]), np.nan, np.float32)
                whole[slide.inside] = values
                parts.append(whole)
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        rows = None if slides[0].rows is None else np.concatenate([slide.rows for slide in slides])
        centres = np.concatenate([slide.centres for slide in slides])
        expression, proba, embedding = (stack(attrgetter(name)) for name in ("expression", "proba", "embedding"))
        looked = all(result.look is not None or not len(result.proba) for result in predictions)
        ood = stack(_scores) if looked and model.card.guard is not None else None
        return cls(rows, expression, proba, embedding, centres, wanted, model, keys, record, ood)

    def annotation(self) -> pd.Categorical:
        """Most probable class of each spot, missing where there is no prediction.

        The categories are the classes that occur, in the order of the card: squidpy makes NaN of one that does not, and
        spatialdata-plot gives its colour to the next.
        """
        missing = np.isnan(self.proba).any(1)
        codes = np.where(missing, -1, np.where(np.isnan(self.proba), -1, self.proba).argmax(1))
        return pd.Categorical.from_codes(codes, categories=list(self.model.card.classes)).remove_unused_categories()


def _scores(result: Predictions) -> np.ndarray:
    return np.zeros(0, np.float32) if result.look is None else result.look.score


def fill_table(table: AnnData, filled: Filled) -> None:
    """Write into a measured table; its rows, their order, ``X`` and every other slot stay as they were.

    Rows of regions that were not predicted keep what an earlier run of the same model wrote there. Results of other verbs
    that were computed from the prediction are removed, with a warning, if a value of the layer changes, in one region or
    all: they were computed from all of it.
    """
    keys, rows, columns = filled.keys, filled.rows, filled.wanted.columns
    n_obs, n_vars = table.shape
    layer = np.full((n_obs, n_vars), np.nan, np.float32)
    others = np.setdiff1d(np.arange(n_obs), rows)
    before = _earlier(table, filled, others)
    old = table.layers[keys.layer] if before is not None and keys.layer in table.layers else None
    if old is not None:
        layer[others] = np.asarray(old[others].toarray() if hasattr(old, "toarray") else old[others], np.float32)
    layer[np.ix_(rows, columns)] = filled.expression
    known = filled.model.genes.iloc[filled.wanted.positions]
    predicted = np.zeros(n_vars, bool)
    predicted[columns] = True
    pcc = np.full(n_vars, np.nan, np.float32)
    pcc[columns] = known["pcc"]
    reliable = np.zeros(n_vars, bool)
    reliable[columns] = known["reliable"]
    mean = np.full(n_vars, np.nan, np.float32)
    mean[columns] = known["mean"]
    if old is not None:
        elsewhere = table.var[keys.predicted].to_numpy(bool) & ~predicted
        predicted |= elsewhere
        pcc[elsewhere] = table.var[keys.pcc].to_numpy()[elsewhere]
        reliable[elsewhere] = table.var[keys.reliable].to_numpy(bool)[elsewhere]
        if keys.mean in table.var:
            mean[elsewhere] = table.var[keys.mean].to_numpy()[elsewhere]

    def spread(values: np.ndarray, name: str) -> np.ndarray:
        whole = np.full((n_obs, values.shape[1]), np.nan, np.float32)
        if before is not None and name in table.obsm:
            whole[others] = np.asarray(table.obsm[name], np.float32)[others]
        whole[rows] = values
        return whole

    obsm: dict[str, Any] = {keys.embedding: spread(filled.embedding, keys.embedding)}
    obs: dict[str, Any] = {}
    uns: dict[str, Any] = {keys.uns: filled.record if before is None else _merged(before, filled.record)}
    if filled.model.card.classes:
        proba = spread(filled.proba, keys.proba)
        annotation = Filled(**{**filled.__dict__, "proba": proba}).annotation()
        obs[keys.annotation] = pd.Series(annotation, index=table.obs_names)
        obs[keys.confidence] = pd.Series(np.max(proba, axis=1), index=table.obs_names)
        obsm[keys.proba] = pd.DataFrame(proba, index=table.obs_names, columns=list(filled.model.card.classes))
        colours = dict(zip(filled.model.card.classes, filled.model.card.class_colors, strict=True))
        uns[keys.colors] = [colours[name] for name in annotation.categories]
    if filled.ood is not None:
        score = np.full(n_obs, np.nan, np.float32)
        if before is not None and keys.ood in table.obs:
            score[others] = table.obs[keys.ood].to_numpy(np.float32)[others]
        score[rows] = filled.ood
        obs[keys.ood] = pd.Series(score, index=table.obs_names)
    if "spatial" not in table.obsm or SPATIAL in table.uns:
        # Marked as ours, so that a run on another image brings it up to date.
        uns[SPATIAL] = filled.record["image"]
        spatial = np.full((n_obs, 2), np.nan)
        spatial[rows] = filled.centres
        obsm["spatial"] = spatial
    index = table.var_names
    var = {
        keys.predicted: pd.Series(predicted, index=index),
        keys.pcc: pd.Series(pcc, index=index),
        keys.reliable: pd.Series(reliable, index=index),
        keys.mean: pd.Series(mean, index=index),
    }
    if table.is_view:
        table._init_as_actual(table.copy())
    changed = not same_values(table.layers[keys.layer], layer) if keys.layer in table.layers else True
    with undone_if_interrupted(table):
        removed = remove_derived(table, _names(keys)) if changed else []
        table.layers[keys.layer] = layer
        for name, value in var.items():
            table.var[name] = value
        if keys.ood not in obs and keys.ood in table.obs:
            # Of an earlier model: it says nothing of this one.
            del table.obs[keys.ood]
        for name, value in obs.items():
            table.obs[name] = value
        for name, value in obsm.items():
            table.obsm[name] = value
        for name, value in uns.items():
            table.uns[name] = value
    warn_removed(removed, stacklevel=3)


def _names(keys: Keys) -> set[str]:
    """Names by which other verbs know what a prediction wrote."""
    return {keys.layer, keys.uns, keys.annotation}


def _earlier(table: AnnData, filled: Filled, others: np.ndarray) -> dict[str, Any] | None:
    """Record of an earlier run whose other rows may stay: it must be of the same model."""
    before = table.uns.get(filled.keys.uns)
    if not len(others) or before is None:
        return None
    if all(before.get(name) == filled.record[name] for name in ("model", "model_version", "weights_sha256")):
        return before
    warnings.warn(
        f"{len(others)} spots of other regions were predicted by model {before.get('model')!r}: they get NaN, since one "
        f"column cannot hold two models. Predict them again, or use another `key_added`",
        UserWarning,
        stacklevel=4,
    )
    return None


def _merged(before: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Facts of this run, and of the regions that only an earlier one predicted."""

    def regions(of: dict[str, Any]) -> list[str]:
        return [of["shapes"]] if isinstance(of["shapes"], str) else list(of["shapes"])

    kept = [region for region in regions(before) if region not in regions(record)]
    if not kept:
        return record
    merged = {**record, "shapes": [*kept, *regions(record)]}
    for fact in FACTS:
        old = before[fact] if isinstance(before[fact], dict) else {kept[0]: before[fact]}
        new = record[fact] if isinstance(record[fact], dict) else {regions(record)[0]: record[fact]}
        merged[fact] = {region: old[region] for region in kept} | new
    return merged


@contextmanager
def undone_if_interrupted(table: AnnData) -> Iterator[None]:
    """Put every slot back as it was if the block does not come to its end, by Ctrl-C too."""
    mappings: dict[str, dict[str, Any]] = {name: dict(getattr(table, name)) for name in ("obsm", "uns")}
    mappings["layers"] = {name: table.layers[name] for name in layer_names(table)}
    frames = {name: getattr(table, name).copy() for name in ("obs", "var")}
    try:
        yield
    except BaseException:
        for name, frame in frames.items():
            setattr(table, name, frame)
        for name, before in mappings.items():
            slot = getattr(table, name)
            for key in [key for key in slot if key is not None and key not in before]:
                del slot[key]
            for key, value in before.items():
                slot[key] = value
        raise


def make_table(slides: Sequence[Slide], filled: Filled, like: AnnData | None) -> AnnData:
    """Make a table of the predicted genes, marked as ours.

    ``X`` is a copy of the layer, or empty where that would pass ``settings.memory_limit``. With ``like``, the table
    that annotates the same spots, its ``obs`` names and ids are taken over.
    """
    import scipy.sparse
    from anndata import AnnData
    from spatialdata.models import TableModel

    model = filled.model
    region = np.concatenate([np.repeat(slide.shapes_key, len(slide.spot_ids)) for slide in slides])
    ids = np.concatenate([np.asarray(slide.spot_ids) for slide in slides])
    names = pd.Index(ids.astype(str)) if like is None else like.obs_names[filled.rows]
    if names.has_duplicates:
        names = pd.Index([f"{r}-{i}" for r, i in zip(region, ids, strict=True)])
    obs = pd.DataFrame({REGION: pd.Categorical(region), INSTANCE: ids}, index=names)
    shape = filled.expression.shape
    fits = filled.expression.nbytes <= settings.memory_limit
    genes = model.genes.iloc[filled.wanted.positions]
    table = AnnData(
        X=filled.expression.copy() if fits else scipy.sparse.csr_matrix(shape, dtype=np.float32),
        obs=obs,
        var=pd.DataFrame({"ensembl_id": genes["ensembl_id"].astype(str)}, index=pd.Index(genes.index.astype(str))),
    )
    everything = Filled(
        **{
            **filled.__dict__,
            "rows": np.arange(shape[0]),
            "wanted": type(filled.wanted)(filled.wanted.positions, np.arange(shape[1]), False),
        }
    )
    fill_table(table, everything)
    table.uns[MADE] = {"by": "hg.tl.predict", "X": model.card.expression_scale if fits else "empty: over memory_limit"}
    regions = [slide.shapes_key for slide in slides]
    return TableModel.parse(
        table, region=regions if len(regions) > 1 else regions[0], region_key=REGION, instance_key=INSTANCE
    )


def put_table(sdata: SpatialData, name: str, table: AnnData, keys: Keys) -> None:
    """Set a table that we made, in place of one that we made before, which comes back if this is interrupted.

    What was computed from the prediction is not carried over if its values have changed.
    """
    check_place(sdata, name)
    before = sdata.tables.get(name)
    removed = []
    if before is not None:
        carry_over(before, table)
        old = before.layers.get(keys.layer)
        if (
            old is None
            or not before.var_names.equals(table.var_names)
            or not same_values(old, table.layers[keys.layer])
        ):
            removed = remove_derived(table, _names(keys))
    try:
        if before is not None:
            del sdata.tables[name]
        sdata.tables[name] = table
    except BaseException:
        if before is not None and name not in sdata.tables:
            sdata.tables[name] = before
        raise
    warn_removed(removed, stacklevel=3)


def copy_tables(sdata: SpatialData) -> SpatialData:
    """Return an object that shares every element but the tables, which are copied."""
    import spatialdata as sd

    elements: dict[str, Any] = {name: element for _, name, element in sdata.gen_spatial_elements()}
    tables = {name: table.copy() for name, table in sdata.tables.items()}
    return sd.SpatialData.init_from_elements({**elements, **tables}, attrs=dict(sdata.attrs))


def check_place(sdata: SpatialData, name: str) -> None:
    """Refuse, before any work is done, to put a table where one stands that is not ours.

    Raises
    ------
    ValueError
        If an element of that name is there and is no table that we made.
    """
    if name in sdata.tables and MADE in sdata.tables[name].uns:
        return
    if name in sdata.tables and name == TABLE:
        attrs = sdata.tables[name].uns.get("spatialdata_attrs", {})
        raise ValueError(
            f"`table_key`: table {name!r} is no table of the spots: it annotates {attrs.get('region', 'nothing')!r}, the "
            f"shapes are {sorted(sdata.shapes)}. Link it with sdata.set_table_annotates_spatialelement({name!r}, "
            "region=..., region_key=..., instance_key=...), or, if it is another, rename it"
        )
    if name.lower() in [key.lower() for key in (*sdata.tables, *(key for _, key, _ in sdata.gen_spatial_elements()))]:
        raise ValueError(f"`key_added`: the new table would be named {name!r}, which is taken; choose another key")


def check_layer(table: AnnData, keys: Keys) -> None:
    """Refuse to write over a layer that no prediction wrote.

    Raises
    ------
    ValueError
        If there is one under that name.
    """
    ours = {value.get("layer") for value in table.uns.values() if isinstance(value, dict) and "weights_sha256" in value}
    if keys.layer in table.layers and keys.layer not in ours:
        raise ValueError(f"`layer` {keys.layer!r} is there and was not written by predict; choose another name")


def carry_over(before: AnnData, table: AnnData) -> None:
    """Bring what else stands in a table that we made into the one that takes its place: other runs, other columns."""
    if not before.obs_names.equals(table.obs_names):
        return
    slots = ["obs", "obsm", "uns", "obsp"]
    if before.var_names.equals(table.var_names):
        slots += ["var", "layers", "varm"]
    for name in slots:
        there, here = getattr(before, name), getattr(table, name)
        for key in [key for key in there if key is not None and key not in here]:
            here[key] = there[key]
