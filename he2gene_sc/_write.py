"""Writing what was predicted into a table: computed first, written at once, undone if it is interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ._keys import INSTANCE, MADE, REGION, Keys
from ._settings import settings

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ._genes import WantedGenes
    from ._slide import Slide
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

        def stack(name: str) -> np.ndarray:
            parts = []
            for slide, result in zip(slides, predictions, strict=True):
                values = getattr(result, name)
                if slide.inside.all():
                    parts.append(values)
                    continue
                whole = np.full((len(slide.inside), values.shape[1]), np.nan, np.float32)
                whole[slide.inside] = values
                parts.append(whole)
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        rows = None if slides[0].rows is None else np.concatenate([slide.rows for slide in slides])
        centres = np.concatenate([slide.centres for slide in slides])
        return cls(rows, stack("expression"), stack("proba"), stack("embedding"), centres, wanted, model, keys, record)

    def annotation(self) -> pd.Categorical:
        """Most probable class of each spot, missing where there is no prediction."""
        missing = np.isnan(self.proba).any(1)
        codes = np.where(missing, -1, np.where(np.isnan(self.proba), -1, self.proba).argmax(1))
        return pd.Categorical.from_codes(codes, categories=list(self.model.card.classes))


def fill_table(table: AnnData, filled: Filled) -> None:
    """Write into a measured table; its rows, their order, ``X`` and every other slot stay as they were.

    Rows of regions that were not predicted keep what an earlier run wrote there.
    """
    keys, rows, columns = filled.keys, filled.rows, filled.wanted.columns
    n_obs, n_vars = table.shape
    layer = np.full((n_obs, n_vars), np.nan, np.float32)
    others = np.setdiff1d(np.arange(n_obs), rows)
    old = table.layers.get(keys.layer) if keys.layer in table.layers else None
    if len(others) and old is not None:
        layer[others] = np.asarray(old[others].toarray() if hasattr(old, "toarray") else old[others], np.float32)
    layer[np.ix_(rows, columns)] = filled.expression
    known = filled.model.genes.iloc[filled.wanted.positions]
    predicted = np.zeros(n_vars, bool)
    predicted[columns] = True
    pcc = np.full(n_vars, np.nan, np.float32)
    pcc[columns] = known["pcc"]
    reliable = np.zeros(n_vars, bool)
    reliable[columns] = known["reliable"]

    def spread(values: np.ndarray, before: Any) -> np.ndarray:
        whole = np.full((n_obs, values.shape[1]), np.nan, np.float32)
        if before is not None and getattr(before, "shape", None) == whole.shape:
            whole[others] = np.asarray(before, np.float32)[others]
        whole[rows] = values
        return whole

    obsm: dict[str, Any] = {keys.embedding: spread(filled.embedding, table.obsm.get(keys.embedding))}
    obs: dict[str, Any] = {}
    uns: dict[str, Any] = {keys.uns: filled.record}
    if filled.model.card.classes:
        proba = spread(filled.proba, table.obsm.get(keys.proba))
        whole = Filled(**{**filled.__dict__, "proba": proba})
        obs[keys.annotation] = pd.Series(whole.annotation(), index=table.obs_names)
        obs[keys.confidence] = pd.Series(np.max(proba, axis=1), index=table.obs_names)
        obsm[keys.proba] = pd.DataFrame(proba, index=table.obs_names, columns=list(filled.model.card.classes))
        uns[keys.colors] = list(filled.model.card.class_colors)
    if "spatial" not in table.obsm:
        spatial = np.full((n_obs, 2), np.nan)
        spatial[rows] = filled.centres
        obsm["spatial"] = spatial
    index = table.var_names
    var = {
        keys.predicted: pd.Series(predicted, index=index),
        keys.pcc: pd.Series(pcc, index=index),
        keys.reliable: pd.Series(reliable, index=index),
    }
    if table.is_view:
        table._init_as_actual(table.copy())
    with _undone_if_interrupted(table):
        table.layers[keys.layer] = layer
        for name, value in var.items():
            table.var[name] = value
        for name, value in obs.items():
            table.obs[name] = value
        for name, value in obsm.items():
            table.obsm[name] = value
        for name, value in uns.items():
            table.uns[name] = value


@contextmanager
def _undone_if_interrupted(table: AnnData) -> Iterator[None]:
    """Put every slot back as it was if the block does not come to its end, by Ctrl-C too."""
    mappings = {name: dict(getattr(table, name)) for name in ("layers", "obsm", "uns")}
    frames = {name: getattr(table, name).copy() for name in ("obs", "var")}
    try:
        yield
    except BaseException:
        for name, frame in frames.items():
            setattr(table, name, frame)
        for name, before in mappings.items():
            slot = getattr(table, name)
            for key in [key for key in slot if key not in before]:
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


def put_table(sdata: SpatialData, name: str, table: AnnData) -> None:
    """Set a table that we made, in place of one that we made before, which comes back if this is interrupted."""
    check_place(sdata, name)
    before = sdata.tables.get(name)
    try:
        if before is not None:
            del sdata.tables[name]
        sdata.tables[name] = table
    except BaseException:
        if before is not None and name not in sdata.tables:
            sdata.tables[name] = before
        raise


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
    taken = [*sdata.tables, *(key for _, key, _ in sdata.gen_spatial_elements())]
    if name.lower() in [key.lower() for key in taken]:
        raise ValueError(f"`key_added`: the new table would be named {name!r}, which is taken; choose another key")
