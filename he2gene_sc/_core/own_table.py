"""New tables of predicted genes, which replace the tables that we made before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .element_results import replaced_element
from .fill import StackedPredictions, check_fillable, fill_table
from .keys import ALIGNED, INSTANCE, OWN_TABLE, REGION, SLOTS, SPATIAL, TABLE, Keys
from .lazy import is_large
from .ownership import foreign_keys, is_result, owns_spatial, recorded_keys, unchanged_keys
from .results import remove_derived, same_values, warn_removed
from .signatures import digest_of, same_digest
from .validate import format_list

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene
    from .elements import Slide
    from .genes import WantedGenes

#: Columns of every new table.
_OWN_COLUMNS = {"obs": (REGION, INSTANCE), "var": ("ensembl_id",)}


def check_new_table(
    sdata: SpatialData, name: str, slides: Sequence[Slide], wanted: WantedGenes, model: HE2Gene, keys: Keys
) -> None:
    """Raise, before any work, if the name or ids of a new table are invalid, or if it would replace data that is not ours."""
    check_place(sdata, name)
    for slide in slides:
        check_spot_ids(pd.Index(slide.spot_ids), slide.shapes_key)
    before = sdata.tables.get(name)
    if before is None:
        return
    check_fillable(before, model, keys)
    like = None if slides[0].table_key is None else sdata[slides[0].table_key]
    new_obs = _obs(slides, like).index
    changed = _changed_axes(before, new_obs, pd.Index(model.genes.index[wanted.positions].astype(str)))
    lost = [
        f"{slot}[{key!r}]"
        for slot, keys_there in foreign_keys(before).items()
        for key in keys_there
        if any(slot in slots for slots in changed.values()) and key not in _OWN_COLUMNS.get(slot, ())
    ]
    if changed and before.raw is not None:
        lost.append("raw")
    signed = before.uns[OWN_TABLE].get("signature") if hasattr(before.uns[OWN_TABLE], "get") else None
    if signed and before.X is not None and str(signed) != digest_of(before.X):
        lost.append("X, changed since hg.tl.predict wrote it")
    if lost:
        what = " and ".join({"obs": "spots", "var": "genes"}[axis] for axis in sorted(changed)) or "values"
        raise ValueError(
            f"`key_added`: table {name!r} would be replaced by a table of other {what}, and {format_list(lost)} would be lost; "
            f"keep the table under another name or delete it: del sdata.tables[{name!r}]"
        )


def check_place(sdata: SpatialData, name: str) -> None:
    """Raise, before any work, if the new table would replace an element that is not ours."""
    if name in sdata.tables and OWN_TABLE in sdata.tables[name].uns:
        return
    if name in sdata.tables and name == TABLE:
        attrs = sdata.tables[name].uns.get("spatialdata_attrs", {})
        raise ValueError(
            f"`table_key`: table {name!r} does not annotate the spots: it annotates {attrs.get('region', 'nothing')!r}, the "
            f"shapes are {sorted(sdata.shapes)}. Link it with sdata.set_table_annotates_spatialelement({name!r}, "
            "region=..., region_key=..., instance_key=...), or rename it if it belongs to other shapes"
        )
    if name.lower() in [other.lower() for _, other, _ in sdata.gen_elements()]:
        raise ValueError(f"`key_added`: the new table would be named {name!r}, which is taken; choose another key")


def check_spot_ids(ids: pd.Index, shapes_key: str) -> None:
    """Raise for ids that ``TableModel`` would reject after the work is done."""
    values = ids.categories if isinstance(ids, pd.CategoricalIndex) else ids
    kind = "mixed" if isinstance(ids, pd.MultiIndex) else pd.api.types.infer_dtype(values, skipna=False)
    if kind == "string" and values.hasnans:
        # Strings of pandas 3 have their own missing value.
        kind = "mixed"
    if kind == "integer" and len(values) and values.max() > np.iinfo(np.int64).max:
        kind = "too large"
    if kind in ("integer", "string"):
        return
    raise ValueError(
        f"`shapes_key` {shapes_key!r}: the ids of the spots are {kind} values ({format_list(map(repr, ids[:3]))}); a table "
        f"needs whole numbers or texts: sdata[{shapes_key!r}].index = sdata[{shapes_key!r}].index.map(str)"
    )


def make_table(slides: Sequence[Slide], stacked: StackedPredictions, like: AnnData | None) -> AnnData:
    """Make a table of the predicted genes, marked as ours.

    ``X`` is a copy of the layer, or empty if both together exceed ``settings.memory_limit``. ``like`` is a table that
    annotates the same spots, from which ``obs`` names and ids are copied.
    """
    import scipy.sparse
    from anndata import AnnData
    from spatialdata.models import TableModel

    model = stacked.model
    shape = (len(stacked.embedding), len(stacked.wanted.positions))
    fits = not (stacked.lazy or is_large(2 * shape[0], shape[1]))
    genes = model.genes.iloc[stacked.wanted.positions]
    table = AnnData(
        X=None if fits else scipy.sparse.csr_matrix(shape, dtype=np.float32),
        obs=_obs(slides, like),
        var=pd.DataFrame({"ensembl_id": genes["ensembl_id"].astype(str)}, index=pd.Index(genes.index.astype(str))),
    )
    # The table holds only these spots and genes, in their order.
    wanted = replace(stacked.wanted, columns=np.arange(shape[1]), all_genes=False)
    fill_table(table, replace(stacked, rows=np.arange(shape[0]), wanted=wanted))
    if fits:
        table.X = table.layers[stacked.keys.layer].copy()
    table.uns[OWN_TABLE] = {
        "by": "hg.tl.predict",
        "X": model.card.expression_scale if fits else "empty: over memory_limit",
        **({"signature": digest_of(table.X)} if fits else {}),
    }
    regions = [slide.shapes_key for slide in slides]
    return TableModel.parse(
        table, region=regions if len(regions) > 1 else regions[0], region_key=REGION, instance_key=INSTANCE
    )


def put_table(sdata: SpatialData, name: str, table: AnnData, keys: Keys) -> None:
    """Set a new table, replacing one that we made before, which is restored on an interruption.

    Results that were computed from the prediction are not carried over if its values have changed.
    """
    before = sdata.tables.get(name)
    removed = [] if before is None else _carry_over(before, table, keys)
    with replaced_element(sdata, "tables", name, table):
        # Warn inside the block: a filter may turn the warning into an exception.
        warn_removed(removed)


def _carry_over(before: AnnData, table: AnnData, keys: Keys) -> list[str]:
    """Copy other entries of the table ``before`` into the new table; return the results that are not copied."""
    changed = _changed_axes(before, table.obs_names, table.var_names)
    aligned = set().union(*changed.values())
    dropped: dict[str, dict[str, list[str]]] = {keys.uns: recorded_keys(keys.uns, before.uns.get(keys.uns))}
    for key in [key for key, record in before.uns.items() if key != keys.uns and is_result(record)]:
        written = unchanged_keys(before, key)
        if "obs" in changed or any(slot in aligned for slot, names in written.items() if names):
            dropped[key] = written
    for slot in SLOTS:
        if slot in aligned:
            continue
        there, here = getattr(before, slot), getattr(table, slot)
        gone = {name for written in dropped.values() for name in written.get(slot, [])}
        gone |= set(dropped) if slot == "uns" else set()
        for key in [key for key in there if key is not None and key not in here and key not in gone]:
            here[key] = there[key]
    if "obs" not in changed and "spatial" in before.obsm and not owns_spatial(before):
        table.obsm["spatial"] = before.obsm["spatial"]
        del table.uns[SPATIAL]
    if not changed and before.raw is not None:
        table.raw = before.raw.to_adata()
    layer = before.layers.get(keys.layer)
    labels = [t.obs.get(keys.annotation) for t in (before, table)]
    same_labels = (labels[0] is None) == (labels[1] is None) and (labels[0] is None or same_digest(*labels))
    if not changed and same_labels and layer is not None and same_values(layer, table.layers[keys.layer]):
        return []
    lost = [key for key in dropped if key != keys.uns]
    return lost + remove_derived(table, {keys.layer, keys.uns, keys.annotation})


def _changed_axes(before: AnnData, obs_names: pd.Index, var_names: pd.Index) -> dict[str, tuple[str, ...]]:
    """Return the axes that have other names than before, each with the slots that are aligned to it."""
    same = {"obs": before.obs_names.equals(obs_names), "var": before.var_names.equals(var_names)}
    return {axis: slots for axis, slots in ALIGNED.items() if not same[axis]}


def _obs(slides: Sequence[Slide], like: AnnData | None) -> pd.DataFrame:
    """Return regions and ids of the spots, indexed by the names of the measured table, else by the ids."""
    region = np.concatenate([np.repeat(slide.shapes_key, len(slide.spot_ids)) for slide in slides])
    ids: Any = pd.Index(np.concatenate([np.asarray(slide.spot_ids) for slide in slides])).infer_objects()
    names = pd.Index(ids.astype(str))
    if like is not None:
        names = like.obs_names[np.concatenate([slide.rows for slide in slides])]
    if names.has_duplicates:
        names = pd.Index([f"{r}-{i}" for r, i in zip(region, ids, strict=True)])
    ids = ids.astype(np.int64) if ids.dtype.kind in "iu" else ids
    return pd.DataFrame({REGION: pd.Categorical(region), INSTANCE: np.asarray(ids)}, index=names)
