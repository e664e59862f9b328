"""Sections of the page of one slide, from what the verbs wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import get, pl
from .._core import validate
from .._core.keys import PATIENT, SECTION, Keys
from .._core.matrix import dense, matrix_of
from .._core.names import clean_names
from .._core.ownership import is_record_of, public_name
from .._core.predictions import gene_flags
from .._core.results import scores_of
from .._core.spots import sections_of as section_names
from .page import Cell, Section, Table

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import ModelCard

#: Rows of a table of genes, and of biomarkers of a group.
_N_ROWS, _N_MARKERS, _N_SETS = 25, 10, 4
_UNIT = "ln(1 + counts per 10,000)"


@dataclass(frozen=True)
class Slide:
    """What a page is made from."""

    data: SpatialData | AnnData
    table: AnnData
    keys: Keys
    record: Mapping[str, Any]
    card: ModelCard | None
    genes: list[str]
    n_genes: int
    options: dict[str, Any]

    @property
    def known_patient(self) -> bool:
        """Whether the prediction is of a patient that the model was trained on."""
        return bool(self.record.get("known_patient", False))

    @property
    def known_sections(self) -> list[str]:
        """Sections of training that the slides were found to be."""
        return [str(name) for name in self.record.get("known_sections", ())]

    def reliable(self, of: bool = True) -> list[str]:
        """Predicted genes that are reliable or not, best first."""
        options = {key: value for key, value in self.options.items() if key != "shapes_key"}
        return get.genes(self.data, reliable=of, **options)

    @property
    def intervals(self) -> Mapping[str, Any] | None:
        """Record of the intervals of the prediction, where these were computed."""
        record = self.table.uns.get(f"{self.keys.layer}_intervals")
        return record if is_record_of("intervals", record) else None

    def runs(self, verb: str, parameter: str, value: str) -> list[str]:
        """Keys of the results of a verb that it computed with a value of a parameter."""
        uns = self.table.uns
        return [key for key in uns if is_record_of(verb, uns[key]) and uns[key]["params"].get(parameter) == value]

    def column(self, name: str) -> pd.Series:
        """Return a column of ``var`` as numbers, NaN where there is none."""
        return self.table.var.get(name, pd.Series(np.nan, self.table.var_names)).astype(float)

    def draw(self, section: Section, caption: str, **what: Any) -> None:
        """Add a map of the slide."""
        section.draw(pl.spatial(self.data, **what, **self.options), caption)


def sections_of(slide: Slide) -> list[Section]:
    """Sections in the order of reading; what was not computed is left out."""
    made = (
        _trust,
        _slide,
        _quality,
        _annotation,
        _genes,
        _chosen,
        _unreliable,
        _programmes,
        _evaluation,
        _biomarkers,
        _domains,
        _run,
    )
    found = [make(slide) for make in made]
    return [s for s in found if s.text or s.figures or s.tables]


def _trust(slide: Slide) -> Section:
    """State what holds for a new patient."""
    section = Section("new-patient", "What holds for a new patient")
    keys, record = slide.keys, slide.record
    n_good, n_all = len(slide.reliable()), int(gene_flags(slide.table, keys.predicted).sum())
    whose = "another section of a patient that the model was trained on" if slide.known_patient else "a new patient"
    if slide.options["shapes_key"] is not None and len(pd.unique(section_names(slide.table))) > 1:
        section.text.append(
            f"Maps are of {slide.options['shapes_key']!r} alone; numbers are of all regions of the table."
        )
    section.text.append(f"{n_good:,} of {n_all:,} predicted genes are reliable on {whose}.")
    if slide.known_sections:
        section.text.append(
            f"The image is that of {validate.format_list(slide.known_sections)}, which the model was trained on: metrics on it are "
            "optimistic. With known_patient=False, genes are called as on a new patient."
        )
    of_patients = slide.column(keys.pcc_new_patient).notna().any()
    r = slide.column(keys.pcc_new_patient if of_patients else keys.pcc).dropna()
    if len(r):
        held_out = (
            "Over patients that were held out in training" if of_patients else "Over what was held out in training"
        )
        section.text.append(
            f"{held_out}, the mean correlation of a predicted gene with what was measured was {r.mean():.2f} (middle half of the "
            f"genes: {r.quantile(0.25):.2f} to {r.quantile(0.75):.2f})."
        )
    if "verdict" in record:
        odd = float(record.get("share_out_of_distribution", np.nan))
        section.text.append(
            f"Compared with the training data, this slide is: {record['verdict']}. {odd:.0%} of the spots are out of distribution."
        )
    if slide.card is not None:
        section.text += [slide.card.intended_use]
        section.tables.append(Table([[Cell(str(sentence))] for sentence in slide.card.limitations]))
    return section


def _slide(slide: Slide) -> Section:
    section = Section("slide", "Slide and model")
    record, obs = slide.record, slide.table.obs
    facts: dict[str, Any] = {
        name.capitalize(): ", ".join(pd.unique(pd.Series(clean_names(obs[name])).dropna()))
        for name in (PATIENT, SECTION)
        if name in obs
    }
    facts |= {
        "Spots": record.get("n_spots"),
        "Spots outside the image": record.get("n_outside"),
        "Share of spots on tissue": record.get("share_on_tissue"),
        "µm per pixel": record.get("mpp"),
        "Found by": record.get("mpp_source"),
        "Image": record.get("image"),
        "Model": f"{record['model']} {record.get('model_version', '')}",
        "SHA-256 of the weights": record["weights_sha256"][:16],
        "Encoder": f"{record.get('encoder', '')} ({record.get('encoder_license', '')})",
        "Windows, µm": record.get("windows_um"),
        "Unit of the prediction": _UNIT,
    }
    section.list_facts({name: value for name, value in facts.items() if value is not None and str(value)})
    return section


def _quality(slide: Slide) -> Section:
    section = Section("tissue", "Tissue and image quality")
    drawn = [column for column in (slide.keys.ood, slide.keys.tissue) if column in slide.table.obs]
    if drawn:
        slide.draw(
            section,
            "Out-of-distribution score (above 1: unlike the training data) and share of tissue of each spot.",
            color=drawn,
        )
    for key, tiles in getattr(slide.data, "shapes", {}).items():
        if "qc_outlier" not in tiles or not tiles["is_tissue"].any():
            continue
        values = tiles.loc[tiles["is_tissue"]].select_dtypes("number")
        section.text.append(
            f"{key} (hg.pp.qc): {len(values):,} tiles of the image on tissue. Compare their sharpness and stain with slides that were "
            "scanned alike."
        )
        spread = values.quantile([0.05, 0.5, 0.95]).T.set_axis(
            ["5 % of the tiles below", "median", "5 % above"], axis=1
        )
        section.add_frame(spread.rename_axis("measure").reset_index())
    return section


def _annotation(slide: Slide) -> Section:
    section = Section("annotation", "Annotation")
    keys, table = slide.keys, slide.table
    if keys.annotation not in table.obs:
        return section
    labels = table.obs[keys.annotation].astype("category")
    confidence = table.obs.get(keys.confidence, pd.Series(np.nan, table.obs_names)).astype(float)
    colours = dict(zip(labels.cat.categories, table.uns.get(keys.colors, ()), strict=False))
    rows = [
        {
            "class": Cell(str(name), color=_hex(colours.get(name, ""))),
            "spots": int((labels == name).sum()),
            "share": f"{(labels == name).mean():.1%}",
            "mean confidence": confidence[(labels == name).to_numpy()].mean(),
        }
        for name in labels.cat.categories
    ]
    rows.append({"class": "without a class", "spots": int(labels.isna().sum()), "share": f"{labels.isna().mean():.1%}"})
    section.add_frame(pd.DataFrame(rows))
    if labels.notna().any():
        section.draw(pl.annotation(slide.data, **slide.options), "Most probable class of each spot.")
    return section


def _hex(colour: Any) -> str:
    """Write a colour as CSS, empty if it is none: a store may hold any text."""
    from matplotlib.colors import to_hex

    try:
        return to_hex(colour)
    except ValueError:
        return ""


def _genes(slide: Slide) -> Section:
    section = Section("genes", "Reliable genes")
    good = slide.reliable()
    if good:
        chosen = good[: slide.n_genes]
        slide.draw(section, "Reliable genes with the highest held-out correlation.", genes=chosen, ncols=2)
        section.add_frame(_table_of(slide, good[:_N_ROWS]))
        return section
    section.text.append("None of the predicted genes is reliable here. Do not interpret the map of a single gene.")
    section.text.append(
        "What can be done: measure some spots and adapt the prediction (hg.tl.adapt); train on sections of your own tissue "
        "(hg.tl.train), five patients or more; use the annotation; or, for another section of a patient that the model was trained "
        "on, predict with known_patient=True."
    )
    return section


def _chosen(slide: Slide) -> Section:
    section = Section("chosen-genes", "Chosen genes")
    if slide.genes:
        slide.draw(
            section, "Chosen genes; what was measured stands beside, where it is there.", genes=slide.genes, ncols=2
        )
        section.add_frame(_table_of(slide, slide.genes))
        record = slide.intervals
        section.text.append(
            "Intervals were not computed: hg.tl.intervals(sdata)."
            if record is None
            else f"± is half the width of the interval of a spot. Guarantee of its coverage: {record.get('guarantee') or 'none'}."
        )
    return section


def _table_of(slide: Slide, genes: list[str]) -> pd.DataFrame:
    """Genes with their mean, held-out correlations, and intervals where these were computed."""
    keys, table = slide.keys, slide.table
    values = dense(matrix_of(table[:, genes], keys.layer)).astype(float)
    frame = pd.DataFrame({"gene": genes, "mean predicted": np.nanmean(values, axis=0)})
    held_out = {"held-out correlation": keys.pcc, "on a new patient": keys.pcc_new_patient}
    for title, column in held_out.items():
        if slide.column(column).notna().any():
            frame[title] = slide.column(column)[genes].to_numpy()
    frame["reliable"] = gene_flags(table, keys.reliable)[table.var_names.get_indexer(genes)]
    if slide.intervals is not None:
        coverage = slide.intervals["params"].get("coverage", 0.9)
        frame[f"± (interval of {coverage:.0%})"] = slide.column(f"{keys.layer}_halfwidth")[genes].to_numpy()
    return frame


def _unreliable(slide: Slide) -> Section:
    section = Section("not-reliable", "Genes not to trust")
    wrong = slide.reliable(False)
    if wrong:
        asked = [gene for gene in slide.genes if gene in set(wrong)]
        section.text.append(
            f"{len(wrong):,} predicted genes are not reliable. Do not interpret their maps one by one; the list is "
            "hg.get.genes(sdata, reliable=False)."
        )
        if asked:
            section.text.append(f"Of the chosen genes: {', '.join(asked)}.")
    return section


def _programmes(slide: Slide) -> Section:
    section = Section("programmes", "Gene sets")
    columns = [
        "source",
        "n_genes",
        "n_predicted",
        "pearson",
        "pearson_low",
        "pearson_given_depth",
        "ceiling",
        "reliable",
        "evidence",
    ]
    for key in slide.runs("programmes", "layer", slide.keys.layer):
        found = get.programmes(slide.table, key=key)
        section.text.append(
            f"{key}: scores of gene sets. Correlations are of predicted with measured scores on patients that were held out; a set "
            "that is not reliable must not be interpreted on this slide."
        )
        section.add_frame(found[columns])
        # Genes and columns of that name would be drawn instead.
        drawn = {name for name, (where, _) in scores_of(slide.table, slide.keys).items() if where == key}
        drawn -= {*slide.table.obs, *slide.table.var_names}
        if names := [name for name in found.loc[found["reliable"], "source"] if name in drawn][:_N_SETS]:
            slide.draw(section, "Scores of reliable gene sets.", color=names)
    return section


def _evaluation(slide: Slide) -> Section:
    section = Section("evaluation", "Against what was measured")
    columns = {
        "section": "section",
        "panel": "genes",
        "predictor": "predictor",
        "n_genes": "number",
        "pearson_mean": "mean correlation",
        "pearson_median": "median",
        "pearson_difference_mean": "prediction minus it",
        "ceiling_share_mean": "share of the ceiling",
        "skill_mean": "skill",
    }
    for key in slide.runs("evaluate", "prediction_key", slide.options["prediction_key"]):
        found = get.evaluation(slide.table, key=key)
        section.text.append(
            f"{key}: mean over genes; predictors that the model should beat stand beside it: depth, colour and coordinates see no gene."
        )
        one = found.loc[found["scope"] == "section", "section"].nunique() < 2
        # A constant has no correlation.
        rows = found[(found["scope"] == ("section" if one else "mean")) & found["pearson_mean"].notna()]
        section.add_frame(rows[[name for name in columns if name in rows]].rename(columns=columns))
    return section


def _biomarkers(slide: Slide) -> Section:
    section = Section("biomarkers", "Biomarkers")
    columns = ["group", "names", "effect_size", "ci_low", "ci_high", "pvals_adj", "n_samples", "reliable"]
    for key in slide.runs("biomarkers", "layer", slide.keys.layer):
        found = get.biomarkers(slide.table, key=key).groupby("group", sort=False, observed=True).head(_N_MARKERS)
        groupby = slide.table.uns[key]["params"].get("groupby", "")
        section.text.append(f"{key}: genes with the highest scores of each group of {groupby}.")
        section.add_frame(found[[name for name in columns if name in found]])
    return section


def _domains(slide: Slide) -> Section:
    section = Section("domains", "Domains")
    columns = ["section", "labels", "against", "mean", "sd", "pval"]
    for key in slide.runs("domain_preservation", "layer", slide.keys.layer):
        found = get.domains(slide.table, score="ari", key=key)
        section.text.append(f"{key}: adjusted Rand index of the clusters with the annotated domains.")
        section.add_frame(found[[name for name in columns if name in found]])
        for name in found["section"].drop_duplicates():
            if name != "all":
                axes = pl.domains(slide.data, section=name, key=key, table_key=slide.options["table_key"])
                section.draw(axes, f"Domains and clusters of {name}.")
    return section


def _run(slide: Slide) -> Section:
    section = Section("run", "Run", text=["Recorded parameters of each run; an argument that was None is left out."])
    record = slide.record
    section.list_facts(
        {"Versions": record.get("versions"), "Device": record.get("device"), "Precision": record.get("dtype")}
    )
    names = {"image_key": "image", "shapes_key": "shapes", "coordinate_system": "coordinate_system", "mpp": "mpp"}
    given = {name: record.get(names[name]) for name in record.get("given", ()) if name in names}
    given = {"model": record["model"], **given}
    for name in ("genes", "known_patient", "gene_symbols", "exact"):
        if name in record and not (name == "known_patient" and slide.known_sections):
            given[name] = record[name] if isinstance(record[name], str | bool) else validate.format_list(record[name])
    runs = {f"hg.tl.predict, {slide.options['prediction_key']}": given}
    for key, found in slide.table.uns.items():
        if isinstance(found, Mapping) and {"verb", "params"} <= set(found):
            runs[f"{public_name(found['verb'])}, {key}"] = dict(found["params"])
    section.list_facts(runs)
    return section
