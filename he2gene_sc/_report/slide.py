"""Sections of the page of a slide, from the results in its table."""

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
from .._core.names import clean_names, stored_colours
from .._core.ownership import is_record_of, public_name
from .._core.predictions import IF_NONE_RELIABLE, describe_reliable, gene_flags
from .._core.results import scores_of
from .._core.spots import sections_of as section_names
from .page import Cell, Section

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import ModelCard

#: Maximum number of genes in a table, of biomarkers of a group, and of gene sets that are drawn.
_N_ROWS, _N_MARKERS, _N_SETS = 25, 10, 4
#: The table beside the card, which its sentences name and a reader of the page does not have.
_GENE_TABLE = "genes.csv (in the folder of the model; on this page: Reliable genes)"
_UNIT = "ln(1 + counts per 10,000)"


@dataclass(frozen=True)
class Slide:
    """Content of a page."""

    data: SpatialData | AnnData
    table: AnnData
    keys: Keys
    record: Mapping[str, Any]
    card: ModelCard | None
    genes: list[str]
    n_genes: int
    options: dict[str, Any]

    @property
    def known_sections(self) -> list[str]:
        """Training sections that the slides were recognised as."""
        return [str(name) for name in self.record.get("known_sections", ())]

    def genes_by_reliability(self, reliable: bool) -> list[str]:
        """Return the predicted genes that are reliable, or those that are not, best first."""
        return get.genes(self.table, reliable=reliable, prediction_key=self.keys.uns)

    def genes_call(self, reliable: bool) -> str:
        """Return the call that lists the genes of :meth:`genes_by_reliability`."""
        key = self.keys.uns
        return f"hg.get.genes(sdata, reliable={reliable}{f', prediction_key={key!r}' if key != Keys().uns else ''})"

    @property
    def intervals(self) -> Mapping[str, Any] | None:
        """Record of the intervals of the prediction, if computed."""
        record = self.table.uns.get(f"{self.keys.layer}_intervals")
        return record if is_record_of("intervals", record) else None

    def runs(self, verb: str, parameter: str, value: str) -> list[str]:
        """Return the keys of the results of a verb with this value of a parameter."""
        uns = self.table.uns
        return [key for key in uns if is_record_of(verb, uns[key]) and uns[key]["params"].get(parameter) == value]

    def column(self, name: str) -> pd.Series:
        """Return a column of ``var`` as numbers; NaN if it does not exist."""
        return self.table.var.get(name, pd.Series(np.nan, self.table.var_names)).astype(float)

    def draw(self, section: Section, caption: str, **what: Any) -> None:
        """Add a map of the slide."""
        section.draw(pl.spatial(self.data, **what, **self.options), caption)


def sections_of(slide: Slide) -> list[Section]:
    """Return the sections in reading order, without those that are empty."""
    sections = []
    for name, title, fill in (
        ("new-patient", "What holds for a new patient", _trust),
        ("slide", "Slide and model", _slide),
        ("tissue", "Tissue and image quality", _quality),
        ("annotation", "Annotation", _annotation),
        ("genes", "Reliable genes", _genes),
        ("chosen-genes", "Chosen genes", _chosen),
        ("not-reliable", "Genes that are not reliable", _unreliable),
        ("programmes", "Gene sets", _programmes),
        ("evaluation", "Comparison with measured expression", _evaluation),
        ("biomarkers", "Biomarkers", _biomarkers),
        ("domains", "Domains", _domains),
        ("run", "Run", _run),
    ):
        section = Section(name, title)
        fill(slide, section)
        if section.text or section.figures or section.tables:
            sections.append(section)
    return sections


def _trust(slide: Slide, section: Section) -> None:
    keys, record = slide.keys, slide.record
    if slide.options["shapes_key"] is not None and len(pd.unique(section_names(slide.table))) > 1:
        section.text.append(
            f"Maps show only {slide.options['shapes_key']!r}; numbers are for all regions of the table."
        )
    section.text.append(f"{describe_reliable(slide.table, keys)}.")
    if slide.known_sections:
        names = validate.format_list(slide.known_sections)
        text = f"The model was trained on the image of {names}, so metrics on it are optimistic."
        if record.get("known_patient"):
            text += " With known_patient=False, reliable genes are those for a new patient."
        section.text.append(text)
    has_new_patients = slide.column(keys.pcc_new_patient).notna().any()
    r = slide.column(keys.pcc_new_patient if has_new_patients else keys.pcc).dropna()
    if len(r):
        held_out = "patients" if has_new_patients else "data"
        section.text.append(
            f"Over held-out {held_out} in training, the mean correlation of predicted with measured expression of a gene was "
            f"{r.mean():.2f} (middle half of the genes: {r.quantile(0.25):.2f} to {r.quantile(0.75):.2f})."
        )
    if "verdict" in record:
        share = float(record.get("share_out_of_distribution", np.nan))
        section.text.append(
            f"Compared with the training data, this slide is: {record['verdict']}. {share:.0%} of the spots are out of distribution."
        )
    if "reasons" in record:
        section.text.append(f"Do not trust this prediction: {'; '.join(record['reasons'])}.")
    if slide.card is not None:
        section.text.append(slide.card.intended_use)
        limitations = [str(text).replace("genes.csv", _GENE_TABLE) for text in slide.card.limitations]
        section.add_rows([text] for text in limitations)


def _slide(slide: Slide, section: Section) -> None:
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
    section.add_rows(fact for fact in facts.items() if fact[1] is not None and str(fact[1]))


def _quality(slide: Slide, section: Section) -> None:
    """Draw tissue and out-of-distribution score, and summarise the tiles of ``hg.pp.qc``."""
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
            f"{key} (hg.pp.qc): {len(values):,} tiles of the image on tissue. Compare their sharpness and stain with slides with the "
            "same scanner settings."
        )
        quantiles = values.quantile([0.05, 0.5, 0.95]).T.rename_axis("measure").reset_index()
        section.add_frame(quantiles.set_axis(["measure", "5 % of the tiles below", "median", "5 % above"], axis=1))


def _annotation(slide: Slide, section: Section) -> None:
    keys, table = slide.keys, slide.table
    if keys.annotation not in table.obs:
        return
    labels = table.obs[keys.annotation].astype("category")
    confidence = table.obs.get(keys.confidence, pd.Series(np.nan, table.obs_names)).astype(float)
    colours = stored_colours(table, keys.annotation)
    rows = [
        {
            "class": Cell(str(name), color=_hex(colours.get(str(name), ""))),
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


def _hex(colour: Any) -> str:
    """Return a colour as CSS; empty if it is invalid, because a store may hold any text."""
    from matplotlib.colors import to_hex

    try:
        return to_hex(colour)
    except ValueError:
        return ""


def _genes(slide: Slide, section: Section) -> None:
    reliable = slide.genes_by_reliability(True)
    if reliable:
        chosen = reliable[: slide.n_genes]
        slide.draw(section, f"The best {len(chosen)} of {len(reliable):,} reliable genes.", genes=chosen, ncols=2)
        section.add_frame(_gene_table(slide, reliable[:_N_ROWS]))
        section.text.append(
            f"{min(len(reliable), _N_ROWS)} of {len(reliable):,} reliable genes are listed, by held-out correlation. All: "
            f"{slide.genes_call(True)}."
        )
        return
    section.text += [
        "None of the predicted genes is reliable here. Do not interpret the map of a single gene.",
        f"You can {IF_NONE_RELIABLE}.",
    ]


def _chosen(slide: Slide, section: Section) -> None:
    if slide.genes:
        slide.draw(section, "Chosen genes, with measured expression beside if available.", genes=slide.genes, ncols=2)
        section.add_frame(_gene_table(slide, slide.genes))
        record = slide.intervals
        section.text.append(
            "Intervals were not computed: hg.tl.intervals(sdata)."
            if record is None
            else f"± is half the width of the interval of a spot. Guarantee of its coverage: {record.get('guarantee') or 'none'}."
        )


def _gene_table(slide: Slide, genes: list[str]) -> pd.DataFrame:
    """Return genes with their mean, held-out correlations, and intervals if computed."""
    keys, table = slide.keys, slide.table
    values = pd.DataFrame(dense(matrix_of(table[:, genes], keys.layer)), columns=genes, dtype=float)
    frame = pd.DataFrame({"gene": genes, "mean predicted": values.mean().to_numpy()})
    held_out = {"held-out correlation": keys.pcc, "on a new patient": keys.pcc_new_patient}
    for title, column in held_out.items():
        if slide.column(column).notna().any():
            frame[title] = slide.column(column)[genes].to_numpy()
    frame["reliable"] = gene_flags(table, keys.reliable)[table.var_names.get_indexer(genes)]
    if slide.intervals is not None:
        coverage = slide.intervals["params"].get("coverage", 0.9)
        frame[f"± (interval of {coverage:.0%})"] = slide.column(f"{keys.layer}_halfwidth")[genes].to_numpy()
    return frame


def _unreliable(slide: Slide, section: Section) -> None:
    if unreliable := slide.genes_by_reliability(False):
        section.text.append(
            f"{len(unreliable):,} predicted genes are not reliable. Do not interpret maps of single ones; "
            f"{slide.genes_call(False)} lists them."
        )
        if chosen := [gene for gene in slide.genes if gene in set(unreliable)]:
            section.text.append(f"Chosen genes among them: {', '.join(chosen)}.")


def _programmes(slide: Slide, section: Section) -> None:
    columns = ["source", "n_genes", "n_predicted", "pearson", "pearson_low", "pearson_given_depth", "ceiling"]
    columns += ["reliable", "evidence"]
    for key in slide.runs("programmes", "layer", slide.keys.layer):
        results = get.programmes(slide.table, key=key)
        section.text.append(
            f"{key}: scores of gene sets. Correlations are between predicted and measured scores on held-out patients. Do not interpret "
            "a set that is not reliable on this slide."
        )
        section.add_frame(results[columns])
        # Leave out sets with the name of a gene or column, which would be drawn instead.
        drawn = {name for name, (own_key, _) in scores_of(slide.table, slide.keys).items() if own_key == key}
        drawn -= {*slide.table.obs, *slide.table.var_names}
        reliable = results.loc[results["reliable"], "source"]
        if names := [name for name in reliable if name in drawn][:_N_SETS]:
            slide.draw(section, f"Scores of {len(names)} of {len(reliable):,} reliable gene sets.", color=names)


def _evaluation(slide: Slide, section: Section) -> None:
    columns = {
        "section": "section",
        "panel": "genes",
        "predictor": "predictor",
        "n_genes": "number",
        "pearson_mean": "mean correlation",
        "pearson_median": "median",
        "pearson_difference_mean": "prediction minus predictor",
        "ceiling_share_mean": "share of the ceiling",
        "skill_mean": "skill",
    }
    for key in slide.runs("evaluate", "prediction_key", slide.options["prediction_key"]):
        results = get.evaluation(slide.table, key=key)
        section.text.append(
            f"{key}: mean over genes. The model should be better than the other predictors; depth, colour and coordinates use no gene."
        )
        is_one_section = results.loc[results["scope"] == "section", "section"].nunique() < 2
        rows = results[results["scope"] == ("section" if is_one_section else "mean")]
        # A constant predictor has no correlation.
        section.add_frame(rows.dropna(subset="pearson_mean").filter(list(columns)).rename(columns=columns))


def _biomarkers(slide: Slide, section: Section) -> None:
    columns = ["group", "names", "effect_size", "ci_low", "ci_high", "pvals_adj", "n_samples", "reliable"]
    for key in slide.runs("biomarkers", "layer", slide.keys.layer):
        tested = get.biomarkers(slide.table, key=key)
        results = tested.groupby("group", sort=False, observed=True).head(_N_MARKERS).filter(columns)
        section.text.append(
            f"{key}: {len(results):,} of {len(tested):,} results, those with the highest scores in each group of "
            f"{slide.table.uns[key]['params'].get('groupby', '')}. All: hg.get.biomarkers(sdata, key={key!r})."
        )
        section.add_frame(results)


def _domains(slide: Slide, section: Section) -> None:
    columns = ["section", "labels", "against", "mean", "sd", "pval"]
    for key in slide.runs("domain_preservation", "layer", slide.keys.layer):
        scores = get.domains(slide.table, score="ari", key=key)
        section.text.append(f"{key}: adjusted Rand index of the clusters with the annotated domains.")
        section.add_frame(scores.filter(columns))
        for name in scores["section"].drop_duplicates():
            if name != "all":
                axes = pl.domains(slide.data, section=name, key=key, table_key=slide.options["table_key"])
                section.draw(axes, f"Domains and clusters of {name}.")


def _run(slide: Slide, section: Section) -> None:
    section.text.append("Recorded parameters of each run, without arguments that were None.")
    record = slide.record
    facts = {"Versions": "versions", "Device": "device", "Precision": "dtype"}
    section.add_rows((title, record.get(name)) for title, name in facts.items())
    names = {"image_key": "image", "shapes_key": "shapes", "coordinate_system": "coordinate_system", "mpp": "mpp"}
    given = {name: record.get(names[name]) for name in record.get("given", ()) if name in names}
    given = {"model": record["model"], **given}
    for name in ("genes", "known_patient", "gene_symbols", "exact"):
        if name in record and not (
            name == "known_patient" and slide.known_sections and name not in record.get("given", ())
        ):
            given[name] = record[name] if isinstance(record[name], str | bool) else validate.format_list(record[name])
    runs = {f"hg.tl.predict, {slide.options['prediction_key']}": given}
    for key, entry in slide.table.uns.items():
        if isinstance(entry, Mapping) and {"verb", "params"} <= set(entry):
            runs[f"{public_name(entry['verb'])}, {key}"] = dict(entry["params"])
    section.add_rows(runs.items())
