"""``he2gene demo``: predict one section, compare it with measured expression, and write figures and tables."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .output import rows_of

if TYPE_CHECKING:
    from anndata import AnnData
    from spatialdata import SpatialData

    from ..models import HE2Gene

_GENES = ("ERBB2", "CD24", "COL1A1", "FASN")
#: Functions that print a line, and a title with the rows of a table.
Echo = Callable[[str], object]
Show = Callable[[str, list[dict[str, str]]], object]


def run(section: str, out: Path, model: HE2Gene, echo: Echo, show: Show) -> pd.DataFrame:
    """Run the demo on a her2st section, else on the toy slide, and print its progress; return the panels."""
    from .. import get, io, pl, tl
    from ..io._files import check_own_files

    # The first line states whether the section was used for training.
    echo(_first_line(section, model))
    start = time.perf_counter()
    name, sdata = _load(section, echo)
    echo(f"Loaded in {time.perf_counter() - start:.1f} s (decoding the image included).")
    store = out / f"{name}.zarr"
    check_own_files(
        out / "genes.csv", "gene,mean,pearson,", "--out", [out / "genes.png", out / "annotation.png", store]
    )
    # A demo of another section may have written the table.
    if store.exists() and not (store / "tables" / "table" / "uns" / "he2gene").exists():
        raise FileExistsError(
            f"--out: {str(store)!r} exists and holds no prediction, so no demo wrote it and it is not replaced; name another place, or "
            "remove it"
        )
    start = time.perf_counter()
    # Report reliability for new patients, also for a training section.
    tl.predict(sdata, model=model, known_patient=False)
    seconds = time.perf_counter() - start
    table, best = sdata["table"], get.genes(sdata)
    record = table.uns["he2gene"]
    has_classes = "he2gene_annotation" in table.obs
    echo(
        f"Predicted {len(best):,} genes{' and the annotation' * has_classes} of {table.n_obs} spots in {seconds:.1f} s "
        f"({table.n_obs / seconds:.1f} spots/s) at {record['mpp']:.3f} µm/px ({record['mpp_source']})."
    )
    out.mkdir(parents=True, exist_ok=True)
    # Without its table, files of a demo that was interrupted would count as those of others.
    (out / "genes.csv").touch()
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    drawn = [gene for gene in _GENES if gene in best] or best[: len(_GENES)]
    pl.spatial(sdata, drawn, save=out / "genes.png")
    echo(f"First picture: {out / 'genes.png'}")
    genes, panels = compare(sdata, model)
    _report(genes, panels, table, echo, show)
    genes.to_csv(out / "genes.csv", index=False, float_format="%.4g")
    if has_classes:
        reference = "annotation" if table.obs["annotation"].notna().any() else None
        pl.annotation(sdata, reference=reference, save=out / "annotation.png")
    plt.close("all")
    io.save(sdata, store, overwrite=True)
    echo("")
    echo(
        f"Pictures   {out / 'genes.png'}  ({', '.join(drawn)}: predicted and measured; below: metrics for new patients)"
    )
    if has_classes:
        echo(f"           {out / 'annotation.png'}")
    echo(f"Genes      {out / 'genes.csv'}  (column `reliable`: the genes where it is False are not to be trusted)")
    echo(f"Object     {store}  (spatialdata.read_zarr)")
    return panels


def _first_line(section: str, model: HE2Gene) -> str:
    trained = model.card.training["sections"]
    if section in trained:
        return f"NOTE: section {section} is in the training set of {model.name}: the metrics below are optimistic."
    siblings = sorted(name for name, facts in trained.items() if facts["patient"] == section[:1])
    if siblings:
        return f"{model.name} was not trained on section {section}, but on other sections of its patient: {', '.join(siblings)}."
    return f"{model.name} was trained neither on section {section} nor on its patient."


def _load(section: str, echo: Echo) -> tuple[str, SpatialData]:
    from .. import datasets

    try:
        sdata = datasets.her2st(section)
        if sdata.images:
            return section, sdata
        echo(f"Section {section} has no image here. Continuing with the synthetic toy slide.")
    except FileNotFoundError as error:
        echo(f"No real data: {str(error).splitlines()[0]} ({section}). Set HE2GENE_DATA_DIR to use real data.")
        echo("Continuing with the synthetic toy slide: it shows the workflow, not the accuracy.")
    return "toy", datasets.toy()


def compare(sdata: SpatialData, model: HE2Gene) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare the layer ``"he2gene"`` of ``sdata["table"]`` with its counts, and with a colour baseline.

    Returns a table of genes: ``gene, mean`` (measured), ``pearson`` (here), ``ceiling`` (here), ``pcc`` (held-out, from the
    card), ``reliable``; and a table of the model's panels, genes of highest mean and of highest variance in its training
    sections: ``panel, n_genes``, and mean Pearson correlations ``model, colour, ceiling``.
    """
    from ..stats import log_normalise, noise_ceiling, pearson

    table = sdata["table"]
    predicted = table.var["he2gene_predicted"].to_numpy(bool)
    names = table.var_names[predicted]
    measured = log_normalise(table.X)[:, predicted]
    layer = np.asarray(table.layers["he2gene"])
    seen = np.asarray(~np.isnan(layer[:, predicted]).any(1))
    genes = pd.DataFrame({"gene": names, "mean": measured.mean(0)}, index=names)
    genes["pearson"] = pearson(layer[seen][:, predicted], measured[seen])
    genes["ceiling"] = noise_ceiling(table.X[np.flatnonzero(seen)])[predicted]
    for column in ("pcc", "reliable"):
        genes[column] = table.var[f"he2gene_{column}"].to_numpy()[predicted]
    colour = _colour_pearson(sdata, model, names, measured, seen)
    scores = {"model": genes["pearson"], "colour": pd.Series(colour, names), "ceiling": genes["ceiling"]}
    target, variable = model.genes["group"] == "target", model.genes["variable"].astype(bool)
    rows = []
    for panel, members in (("highest mean", target), ("most variable", variable)):
        chosen = model.genes.index[members].intersection(names)
        # A gene that is constant on either side counts as 0.
        means = {name: r[chosen].fillna(0).mean() for name, r in scores.items()}
        rows.append({"panel": panel, "n_genes": len(chosen), **means})
    panels = pd.DataFrame(rows)
    if np.isnan(colour).all():
        panels["colour"] = np.nan
    return genes.sort_values("pcc", ascending=False, kind="stable").reset_index(drop=True), panels


def _colour_pearson(
    sdata: SpatialData, model: HE2Gene, names: pd.Index, measured: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """Return the correlation of the model's colour baseline for each gene that it covers, NaN for others."""
    import torch

    from .._core.slide import resolve
    from ..image import PatchReader
    from ..stats import pearson

    if "colour.genes" not in model.tensors:
        return np.full(len(names), np.nan)
    (slide,) = resolve(sdata)
    extractor = model.network.extractor
    reader = PatchReader(
        slide.pyramid,
        slide.centres[seen],
        slide.mpp,
        windows_um=model.card.windows_um,
        input_px=extractor.window_px,
        factor=slide.pixel_factor,
    )
    baseline = np.zeros((int(seen.sum()), len(model.tensors["colour.genes"])), np.float32)
    for batch in reader:
        colour = extractor.colour(tuple(torch.from_numpy(window) for window in batch.patches)).numpy()
        baseline[batch.index] = colour @ model.tensors["colour.weight"] + model.tensors["colour.bias"]
    covered = model.genes.index[model.tensors["colour.genes"]]
    columns = names.get_indexer(covered)
    r = np.full(len(names), np.nan)
    here = columns >= 0
    r[columns[here]] = pearson(np.maximum(baseline[:, here], 0), measured[seen][:, columns[here]])
    return r


def _report(genes: pd.DataFrame, panels: pd.DataFrame, table: AnnData, echo: Echo, show: Show) -> None:
    columns = {"genes": "n_genes", "panel": "panel", "model": "model", "colour alone": "colour"}
    show("Mean Pearson of a gene, across spots", rows_of(panels, columns | {"noise ceiling": "ceiling"}))
    by_name = genes.set_index("gene", drop=False)
    names = [gene for gene in _GENES if gene in by_name.index]
    chosen = by_name.loc[list(dict.fromkeys([*names, *by_name.index[:6]]))]
    columns = {"gene": "gene", "Pearson here": "pearson", "held-out in training": "pcc", "noise ceiling": "ceiling"}
    chosen = chosen.assign(reliable=np.where(chosen["reliable"], "yes", "no"))
    show(f"{len(chosen)} of {len(genes):,} genes", rows_of(chosen, columns | {"reliable": "reliable"}))
    reliable = int(genes["reliable"].sum())
    echo(f"{reliable:,} genes are called reliable, {len(genes) - reliable:,} should not be interpreted individually.")
    if "he2gene_annotation" in table.obs and table.obs["annotation"].notna().any():
        known = table.obs["annotation"].notna() & table.obs["he2gene_annotation"].notna()
        same = table.obs["annotation"].astype(str)[known] == table.obs["he2gene_annotation"].astype(str)[known]
        sources = ", ".join(sorted(table.obs["annotation_source"].dropna().unique()))
        echo(f"Annotation: {same.mean():.0%} of {known.sum()} labelled spots agree (labels: {sources}).")
