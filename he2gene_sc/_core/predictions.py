"""Find tables, records and layers that predict wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import validate
from .keys import OWN_TABLE, Keys
from .logs import warn
from .matrix import layer_names, matrix_of
from .names import check_text_names
from .ownership import is_prediction, is_record_of, recorded_keys, unchanged_keys
from .signatures import digest_of, row_digests

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene

#: What can be done if no gene is reliable.
IF_NONE_RELIABLE = (
    "measure some spots and adapt the prediction (hg.tl.adapt), train on more patients (hg.tl.train), test gene sets "
    "(hg.tl.programmes), or, for another section of a patient that the model was trained on, predict with known_patient=True"
)


def predicted_table(sdata: SpatialData, prediction_key: str = "he2gene", table_key: str | None = None) -> str:
    """Return the name of the table that ``predict(key_added=...)`` filled; a measured table comes first."""
    if not hasattr(sdata, "tables"):
        raise TypeError(f"`sdata` is a {type(sdata).__name__}; a SpatialData object is needed")
    tables = dict(sdata.tables)
    if table_key is not None:
        tables = {table_key: tables[validate.existing_key(table_key, tables, "table_key")]}
    found = [key for key, table in tables.items() if is_prediction(table.uns.get(prediction_key))]
    candidates = [key for key in found if OWN_TABLE not in sdata[key].uns] or found
    if not candidates:
        lost = [key for key, table in tables.items() if prediction_key in table.layers]
        hint = f" ({lost} have the layer, but not the record in uns: anndata.concat keeps it with uns_merge='first')"
        where = "`sdata`" if table_key is None else f"`table_key` {table_key!r}"
        raise ValueError(
            f"{where} holds no prediction {prediction_key!r}; run hg.tl.predict first{hint if lost else ''}"
        )
    validate.not_ambiguous(candidates, "table_key")
    check_text_names(sdata[candidates[0]])
    return candidates[0]


def prediction_of(table: AnnData, layer: str | None) -> str | None:
    """Return the prediction that a layer (``None``: ``X``) holds or was adapted from; ``None`` for a measured layer."""
    if layer is not None:
        layer = source_layer(table, layer)[0]
    if layer is None and OWN_TABLE not in table.uns:
        return None
    for key, record in table.uns.items():
        # `X` of our own tables is the prediction.
        if is_prediction(record) and layer in (None, record["layer"]):
            return key
    if layer is None:
        return None
    # Without a record, look for columns that predict writes with a layer; anndata.concat only keeps those of obs.
    keys = Keys(layer)
    has_columns = keys.reliable in table.var or keys.annotation in table.obs or keys.ood in table.obs
    return layer if has_columns or layer == Keys().layer else None


def record_of_layer(table: AnnData, layer: str | None) -> Mapping[str, Any]:
    """Return what predict recorded of a layer, or of the layer that it was adapted from; empty for other layers."""
    record = table.uns.get(prediction_of(table, layer) or "")
    return record if is_prediction(record) else {}


def source_layer(table: AnnData, layer: str) -> tuple[str, list[str]]:
    """Return the layer that a layer was adapted from (itself if not adapted), and the adapted layers, last first."""
    steps: list[str] = []
    while is_record_of("adapt", table.uns.get(layer)) and layer not in steps:
        steps.append(layer)
        layer = str(table.uns[layer]["params"]["layer"])
    return layer, steps


def record_of(table: AnnData, prediction_key: str = "he2gene") -> Mapping[str, Any]:
    """Return what ``predict(key_added=...)`` recorded in a table."""
    keys = Keys(prediction_key)
    record = table.uns.get(keys.uns)
    if not is_prediction(record):
        raise ValueError(f"`data` holds no prediction {prediction_key!r}; run hg.tl.predict first")
    if keys.predicted not in table.var:
        raise ValueError(
            f"`data`: var has no {keys.predicted!r}, which hg.tl.predict wrote with prediction {prediction_key!r}; keep it, or "
            "predict again"
        )
    return record


def describe_reliable(table: AnnData, keys: Keys) -> str:
    """State how many of the predicted genes are reliable."""
    predicted, reliable = (int(gene_flags(table, name).sum()) for name in (keys.predicted, keys.reliable))
    known = table.uns[keys.uns].get("known_patient")
    patient = "another section of a patient that the model was trained on" if known else "a new patient"
    return f"{reliable:,} of {predicted:,} predicted genes are reliable on {patient}"


def summary_of(record: Mapping[str, Any]) -> str:
    """Return the summary of a prediction from its record: spots, tissue, verdict, and training sections."""
    n_spots = record["n_spots"]
    found = f"{sum(n_spots.values()) if isinstance(n_spots, Mapping) else n_spots:,} spots"
    found += f", {record['share_on_tissue']:.0%} on tissue"
    if "verdict" in record:
        share = record["share_out_of_distribution"]
        found += (
            f"; compared with the training data: {record['verdict']} ({share:.0%} of the spots out of distribution)"
        )
    if sections := ", ".join(repr(str(section)) for section in record.get("known_sections", ())):
        found += f"; the model was trained on this image (section {sections}), so metrics are optimistic"
    return found


def gene_flags(table: AnnData, name: str) -> np.ndarray:
    """Return a boolean column of ``var``, ``(n_vars,)`` bool."""
    if name not in table.var:
        raise ValueError(f"`data`: var has no {name!r}, which hg.tl.predict wrote; keep it, or predict again")
    column = table.var[name]
    other = column.isna() | ~column.isin([True, False])
    if other.any():
        raise ValueError(
            f"`data`: var[{name!r}] is neither True nor False for {int(other.sum()):,} genes, for example "
            f"{column[other].iloc[0]!r} for {column.index[other][0]!r}; predict again"
        )
    return column.to_numpy(bool)


def symbols_of(table: AnnData, record: Mapping[str, Any], gene_symbols: str | None) -> str | None:
    """Return the column of ``var`` with gene symbols: the argument, else the one that predict used."""
    recorded = record.get("gene_symbols") if isinstance(record, Mapping) else None
    return recorded if gene_symbols is None and recorded in table.var else gene_symbols


def predicted_layer(table: AnnData, prediction_key: str = "he2gene", layer: str = "he2gene") -> str:
    """Return the name of a layer of a prediction; the default and the prediction's name mean the layer that it wrote.

    Raise if the layer belongs to another prediction.
    """
    record = record_of(table, prediction_key)
    name = str(record["layer"]) if layer in (Keys().layer, prediction_key) else layer
    for key, other in table.uns.items():
        if is_prediction(other) and other["layer"] == name and key != prediction_key:
            raise ValueError(
                f"`layer` {name!r} belongs to prediction {key!r}, not to {prediction_key!r}; pass prediction_key={key!r}"
            )
    hint = "; hg.get.expression(data, genes) computes genes again" if name == record["layer"] else ""
    return validate.existing_key(name, layer_names(table), "layer", hint)


def check_layer_unchanged(table: AnnData, prediction_key: str, layer: str) -> None:
    """Warn if a layer was changed since predict wrote it."""
    values = matrix_of(table, layer)
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        if np.isinf(values).any():
            raise ValueError(f"`layer` {layer!r} holds infinite values; predict again")
        if np.isnan(values).all():
            raise ValueError(f"`layer` {layer!r} is NaN for every gene and spot; predict again")
    record = record_of(table, prediction_key)
    if layer == record["layer"] and layer not in unchanged_keys(table, Keys(prediction_key).uns, record).get(
        "layers", ()
    ):
        warn(
            f"`layer` {layer!r} was changed since hg.tl.predict wrote it: the reliability that the model states may not hold; "
            "predict again"
        )


def head_digest(model: HE2Gene) -> str:
    """Return a digest of the genes of a model and of its gene head."""
    tensors = model.tensors
    return digest_of({"genes": model.genes.index, **{part: tensors[f"genes.{part}"] for part in ("weight", "bias")}})


def embedding_of(table: AnnData, prediction_key: str = "he2gene") -> np.ndarray:
    """Return the embedding that predict wrote, ``(n, k)`` float32; raise if it was changed."""
    name, rows = Keys(prediction_key).embedding, Keys(prediction_key).rows
    if name not in table.obsm or rows not in table.uns:
        what = "is missing" if name not in table.obsm else f"cannot be checked, since uns[{rows!r}] is missing"
        raise ValueError(f"`data`: obsm[{name!r}], from which genes are computed, {what}; predict again")
    values = np.asarray(table.obsm[name], np.float32)
    other = ~np.isin(row_digests(values, table.obs_names), table.uns[rows])
    if other.any():
        raise ValueError(
            f"`data`: obsm[{name!r}], from which genes are computed, is not what hg.tl.predict wrote for {int(other.sum()):,} "
            f"of {table.n_obs:,} spots, for example {table.obs_names[other][0]!r}: it was changed, or the spots were renamed or "
            "come from another table; predict again"
        )
    return values


def adaptation_spots(table: AnnData, steps: Sequence[str]) -> np.ndarray | None:
    """Return the spots that adapted layers were fitted on, ``(n_obs,)`` bool; ``None`` if they were not recorded."""
    columns = [f"{step}_measured" for step in steps]
    if not all(column in table.obs for column in columns):
        return None
    return np.logical_or.reduce([np.zeros(table.n_obs, bool), *(table.obs[c].to_numpy(bool) for c in columns)])


def bundled_model(record: Mapping[str, Any]) -> HE2Gene | None:
    """Return the bundled model that made a prediction; ``None`` if it was another model."""
    from ..models import BUNDLED, load

    found = load(record["model"]) if record.get("model") in BUNDLED else None
    return found if found is not None and found.weights_sha256 == record.get("weights_sha256") else None


def predicting_model(record: Any, model: str | Path | HE2Gene | None) -> HE2Gene:
    """Return the model of a prediction: the argument, checked, or the bundled model."""
    from ..models import load

    name, sha256 = record["model"], record["weights_sha256"]
    if model is None:
        found = bundled_model(record)
        if found is None:
            raise ValueError(
                f"`model`: the prediction was made by {name!r}, which is not a bundled model of this version; pass its folder "
                "or the loaded model, or predict again"
            )
        return found
    found = load(model)
    head = head_digest(found)
    # Models that were never saved have no file hash.
    if found.weights_sha256 != sha256 or record.get("head", head) != head:
        raise ValueError(
            f"`model` {found.name!r} has weights {found.weights_sha256[:12] or 'that were never saved'}, the prediction was "
            f"made by {name!r} with {str(sha256)[:12] or 'weights that were never saved'}; pass that model, or predict again"
        )
    return found


def find_features(features: Any, table: AnnData | None) -> tuple[AnnData, str, Mapping[str, Any]] | Path | None:
    """Return table, key in ``obsm`` and record of features that embed wrote, or the folder that ``features`` names."""
    if features is None:
        return None
    path = validate.folder_or_file(features, "features")
    if isinstance(features, str) and table is not None and features in table.obsm:
        for key, record in table.uns.items():
            if is_record_of("embed", record) and features in recorded_keys(key, record).get("obsm", []):
                if features not in unchanged_keys(table, key, record).get("obsm", []):
                    raise ValueError(
                        f"`features`: obsm[{features!r}] was changed since hg.tl.embed wrote it; compute it again: "
                        f"hg.tl.embed(sdata, model=..., key_added={key!r})"
                    )
                return table, features, record
        raise ValueError(
            f"`features`: obsm[{features!r}] was not written by hg.tl.embed, or its record in uns is missing; compute features: "
            "hg.tl.embed(sdata, model=...)"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"`features` {str(features)!r} is a file; a folder or a key of obsm is needed")
    if isinstance(features, str) and len(path.parts) == 1 and not path.exists() and not features.startswith((".", "~")):
        raise ValueError(
            f"`features` {features!r} is neither a key of obsm nor an existing folder; for a new folder pass "
            f"features='./{features}', for a key run hg.tl.embed(sdata, model=...) first"
        )
    return path
