"""Write predictions into a table, measured or new: compute first, then write all at once, and undo on an interruption."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..image import MIN_TISSUE
from .keys import REGION_FACTS, SPATIAL, Keys
from .lazy import insert_rows, lazy_layer
from .logs import warn
from .names import as_list, stored_colours
from .ownership import check_case, check_free, is_prediction, owns_spatial
from .results import Result, write_results
from .signatures import row_digests, slot_digest

if TYPE_CHECKING:
    from anndata import AnnData

    from ..inference import Predictions
    from ..models import HE2Gene
    from .elements import Slide
    from .genes import WantedGenes


@dataclass(frozen=True)
class StackedPredictions:
    """Predictions of all slides of a table, float32, NaN for spots outside the image, with their target."""

    rows: np.ndarray  # rows of the table, (n,)
    proba: np.ndarray  # (n, c)
    embedding: np.ndarray  # (n, k)
    tissue: np.ndarray  # (n,)
    centres: np.ndarray  # (n, 2), pixels of level 0
    wanted: WantedGenes
    model: HE2Gene
    keys: Keys
    record: dict[str, Any]
    ood: np.ndarray | None = None  # (n,); None if the model has no score
    lazy: bool = False  # expression is computed from the embedding when it is read

    @classmethod
    def collect(
        cls, slides: Sequence[Slide], predictions: Sequence[Predictions], model: HE2Gene, **others: Any
    ) -> StackedPredictions:
        """Concatenate the slides of a table, and warn once of spots outside their image; ``others`` are the other fields."""
        if outside := sum(int((~slide.inside).sum()) for slide in slides):
            total = sum(len(slide.inside) for slide in slides)
            warn(f"{outside} of {total} spots have their centre outside the image: they get NaN and no annotation")

        def stack(values_of: Callable[[Predictions], np.ndarray]) -> np.ndarray:
            parts = [values_of(result) for result in predictions]
            for i, (slide, values) in enumerate(zip(slides, parts, strict=True)):
                if not slide.inside.all():
                    parts[i] = np.full((len(slide.inside), *values.shape[1:]), np.nan, np.float32)
                    parts[i][slide.inside] = values
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        scored = all(result.ood is not None or not len(result.proba) for result in predictions)
        has_score = scored and model.card.guard is not None
        no_score = np.zeros(0, np.float32)
        return cls(
            rows=np.concatenate([slide.rows for slide in slides]),
            proba=stack(lambda result: result.proba),
            embedding=stack(lambda result: result.embedding),
            tissue=stack(lambda result: result.tissue),
            centres=np.concatenate([slide.centres for slide in slides]),
            model=model,
            ood=stack(lambda result: result.ood.score if result.ood else no_score) if has_score else None,
            **others,
        )

    @property
    def unknown(self) -> np.ndarray:
        """Mask of spots without annotation: outside the image, on glass, or out of distribution; ``(n,)`` bool."""
        found = ~(self.tissue >= MIN_TISSUE)
        return found if self.ood is None else found | ~(self.ood <= 1)

    def annotation(self, proba: np.ndarray, unknown: np.ndarray) -> pd.Categorical:
        """Return the most probable class of each spot, missing for unknown spots.

        The categories are the classes that occur, in the order of the card: squidpy turns an unused category into NaN, and
        spatialdata-plot gives its colour to the next one.
        """
        missing = np.isnan(proba).any(1) | unknown
        codes = np.where(missing, -1, np.where(np.isnan(proba), -1, proba).argmax(1))
        return pd.Categorical.from_codes(codes, categories=list(self.model.card.classes)).remove_unused_categories()


def check_fillable(table: AnnData, model: HE2Gene, keys: Keys) -> None:
    """Raise, before any work, if predicting into a table would overwrite something."""
    planned = keys.written(["classes"] * bool(model.card.classes) + ["ood"] * (model.card.guard is not None))
    if keys.layer_name is not None:
        check_free(table, "predict", keys.uns, parameter="layer", layers=planned["layers"])
    check_free(table, "predict", keys.uns, parameter="key_added", **planned)
    check_case(table, "sdata", {"obsm": ["spatial"], "uns": [SPATIAL]})


def fill_table(table: AnnData, stacked: StackedPredictions) -> None:
    """Write into a measured table; its rows, their order, ``X`` and every other slot stay unchanged.

    Rows of regions that were not predicted keep the values of an earlier run of the same model.
    """
    others = np.setdiff1d(np.arange(table.n_obs), stacked.rows)
    before = _earlier_record(table, stacked, others)
    record = stacked.record if before is None else _merge_records(before, stacked.record)
    keys, card = stacked.keys, stacked.model.card

    def merge(earlier: Any, values: np.ndarray) -> np.ndarray:
        """Merge values of the predicted rows with those that an earlier run of the model wrote to the other rows."""
        whole = np.full((table.n_obs, *values.shape[1:]), np.nan, np.float32)
        if before is not None and earlier is not None:
            whole[others] = np.asarray(earlier, np.float32)[others]
        whole[stacked.rows] = values
        return whole

    slots: dict[str, dict[str, Any]] = {
        "layers": {keys.layer: _dense_or_lazy_layer(table, stacked, others, before is not None)},
        "var": _gene_columns(table, stacked, record, before is not None),
        "obs": {},
        "obsm": {keys.embedding: merge(table.obsm.get(keys.embedding), stacked.embedding)},
    }
    slots["uns"] = {keys.rows: row_digests(slots["obsm"][keys.embedding], table.obs_names)}
    if card.classes:
        proba = merge(table.obsm.get(keys.proba), stacked.proba)
        labels = table.obs.get(keys.annotation)
        # Spots that no run has predicted are NaN, and count as unknown.
        unknown = merge(None if labels is None else labels.isna(), stacked.unknown) != 0
        annotation = stacked.annotation(proba, unknown)
        slots["obs"][keys.annotation] = annotation
        # Spots without a class have no confidence.
        slots["obs"][keys.confidence] = np.where(annotation.codes < 0, np.float32(np.nan), np.max(proba, axis=1))
        slots["obsm"][keys.proba] = pd.DataFrame(proba, index=table.obs_names, columns=list(card.classes))
        colours = dict(zip(card.classes, card.class_colors, strict=True))
        if (table.uns.get(keys.uns) or {}).get("weights_sha256") == record["weights_sha256"]:
            # The user may have chosen other colours for the classes since.
            colours |= stored_colours(table, keys.annotation)
        slots["uns"][keys.colors] = [colours[name] for name in annotation.categories]
    slots["obs"][keys.tissue] = merge(table.obs.get(keys.tissue), stacked.tissue)
    if stacked.ood is not None:
        slots["obs"][keys.ood] = merge(table.obs.get(keys.ood), stacked.ood)
    slots["obs"] = {key: pd.Series(values, index=table.obs_names) for key, values in slots["obs"].items()}
    record = {"verb": "predict", **record, **({"lazy": True} if stacked.lazy else {})}
    write_results([(table, Result("predict", keys.uns, record, slots, _spatial_slots(table, stacked, record)))])


def _dense_or_lazy_layer(table: AnnData, stacked: StackedPredictions, others: np.ndarray, keep: bool) -> Any:
    import torch

    before = table.layers.get(stacked.keys.layer) if keep else None
    wanted = stacked.wanted
    if stacked.lazy:
        tensors = stacked.model.tensors
        embedding = np.full((table.n_obs, stacked.embedding.shape[1]), np.nan, np.float32)
        embedding[stacked.rows] = stacked.embedding
        weights, bias = np.full((embedding.shape[1], table.n_vars), np.nan), np.full(table.n_vars, np.nan)
        weights[:, wanted.columns] = tensors["genes.weight"][:, wanted.positions]
        bias[wanted.columns] = tensors["genes.bias"][wanted.positions]
        lazy = lazy_layer(embedding, weights, bias)
        return lazy if before is None else insert_rows(before, lazy, stacked.rows)
    layer = np.full(table.shape, np.nan, np.float32)
    if before is not None:
        old = before[others]
        layer[others] = np.asarray(old.toarray() if hasattr(old, "toarray") else old, np.float32)
    blocks = stacked.model.network.expression_blocks(torch.from_numpy(stacked.embedding), wanted.positions)
    for rows, genes, values in blocks:
        layer[np.ix_(stacked.rows[rows], wanted.columns[genes])] = values
    return layer


def _gene_columns(
    table: AnnData, stacked: StackedPredictions, record: Mapping[str, Any], keep: bool
) -> dict[str, pd.Series]:
    """Return columns of ``var``; genes that only an earlier run predicted, in other rows, keep their values."""
    keys, columns, var = stacked.keys, stacked.wanted.columns, table.var
    known = stacked.model.genes.iloc[stacked.wanted.positions]
    found: dict[str, np.ndarray] = {keys.predicted: np.zeros(table.n_vars, bool)}
    found[keys.predicted][columns] = True
    for name in ("pcc", "pcc_new_patient", "pcc_given_depth", "mean"):
        key = getattr(keys, name)
        found[key] = np.full(table.n_vars, np.nan, np.float32)
        if name in known:
            found[key][columns] = known[name]
    for_known = "reliable_known_patient" if "reliable_known_patient" in known else "reliable"
    for key, name in (
        (keys.reliable, for_known if record.get("known_patient") else "reliable"),
        (keys.reliable_known_patient, for_known),
    ):
        found[key] = np.zeros(table.n_vars, bool)
        # The validation of the model does not hold for a slide out of distribution.
        found[key][columns] = known[name] & ("reasons" not in record)
    if keep and keys.layer in table.layers and keys.predicted in var:
        elsewhere = var[keys.predicted].to_numpy(bool) & ~found[keys.predicted]
        for key, values in found.items():
            if key in var:
                values[elsewhere] = var[key].to_numpy(values.dtype)[elsewhere]
    return {key: pd.Series(values, index=table.var_names) for key, values in found.items()}


def _spatial_slots(table: AnnData, stacked: StackedPredictions, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the spot centres if the table has none, marked as ours, so that a run on another image updates them."""
    if "spatial" in table.obsm and not owns_spatial(table):
        return {}
    # Rows of other regions keep the centres of an earlier run.
    centres = np.array(table.obsm.get("spatial", np.full((table.n_obs, 2), np.nan)), float)
    centres[stacked.rows] = stacked.centres
    names = type(table)(obs=pd.DataFrame(index=table.obs_names), obsm={"spatial": centres})
    mark = {"image": record["image"], "signature": slot_digest(names, "obsm", "spatial")}
    return {"obsm": {"spatial": centres}, "uns": {SPATIAL: mark}}


def _earlier_record(table: AnnData, stacked: StackedPredictions, others: np.ndarray) -> Mapping[str, Any] | None:
    """Return the record of an earlier run of the same model, whose other rows are kept; else ``None``."""
    before = table.uns.get(stacked.keys.uns)
    if not len(others) or not is_prediction(before):
        return None
    same = ["model", "model_version", "weights_sha256", *(["head"] if "head" in before else [])]
    if all(before.get(name) == stacked.record[name] for name in same):
        return before
    warn(
        f"{len(others)} spots of other regions were predicted by model {before.get('model')!r}: they get NaN, since one "
        f"column cannot hold two models. Predict them again, or use another `key_added`"
    )
    return None


def _merge_records(before: Mapping[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Merge the record of this run with the facts of regions that only an earlier run predicted."""
    regions = as_list(record.get("shapes", []))
    kept = [region for region in as_list(before.get("shapes", [])) if region not in regions]
    # anndata.concat only keeps the entries that all tables share.
    if not kept or any(fact not in before for fact in REGION_FACTS):
        return record
    merged = {**record, "shapes": [*kept, *regions]}
    # Only named if every region shows training sections.
    merged.pop("known_sections", None)
    for fact in REGION_FACTS:
        old = before[fact] if isinstance(before[fact], Mapping) else {kept[0]: before[fact]}
        new = record[fact] if isinstance(record[fact], Mapping) else {regions[0]: record[fact]}
        merged[fact] = {region: old[region] for region in kept if region in old} | new
    # Regions without facts of their own have those of the whole record, without counts.
    facts: dict[str, Any] = {name: before[name] for name in ("verdict", "known_patient") if name in before}
    if facts.get("verdict") in ("out of distribution", "no tissue"):
        facts["reasons"] = [f"{facts['verdict']} (predicted by an earlier version; predict again for the reasons)"]
    earlier = {region: dict(before.get("regions", {}).get(region, facts)) for region in kept}
    return merged | pool_regions(earlier | record["regions"])


def pool_regions(regions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entries of a record that concern all regions of a table, and ``regions`` itself.

    The verdict is that of the worst region. The patient counts as known only if it is known in every region.
    """
    from ..models._ood import VERDICTS

    facts = [dict(own) for own in regions.values()]

    def share(name: str) -> float:
        counted = [own for own in facts if name in own]
        return float(sum(own[name] for own in counted) / max(sum(own["n_inside"] for own in counted), 1))

    pooled: dict[str, Any] = {"min_tissue": MIN_TISSUE, "share_on_tissue": share("n_on_tissue")}
    if verdicts := [str(own["verdict"]) for own in facts if "verdict" in own]:
        pooled["share_out_of_distribution"] = share("n_out_of_distribution")
        pooled["verdict"] = max(verdicts, key=VERDICTS.index)
    reasons = {region: as_list(own.get("reasons", [])) for region, own in regions.items()}
    if any(reasons.values()):
        several = len(regions) > 1
        pooled["reasons"] = [f"{name!r}: {text}" if several else text for name in reasons for text in reasons[name]]
    sections = [as_list(own.get("known_sections", [])) for own in facts]
    if all(sections):
        pooled["known_sections"] = list(dict.fromkeys(str(name) for own in sections for name in own))
    if known := [bool(own["known_patient"]) for own in facts if "known_patient" in own]:
        pooled["known_patient"] = len(known) == len(facts) and all(known)
    return pooled | {"regions": dict(regions)}
