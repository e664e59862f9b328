"""Tables of several patients with planted genes, small and fast."""

from dataclasses import fields

import numpy as np
import pandas as pd
import scipy.sparse
from anndata import AnnData

import he2gene_sc as hg
from he2gene_sc._core.labelled import labelled_spots
from he2gene_sc._core.spots import read_spots
from he2gene_sc.stats import log_normalise

GENES = 60
DESIGN = {field.name for field in fields(hg.Design)}


def biomarkers(tables, groupby, **options):
    """Call hg.tl.biomarkers, with fields of the design among the options."""
    design = {name: options.pop(name) for name in DESIGN & options.keys()}
    return hg.tl.biomarkers(tables, groupby, design=hg.Design(**design), **options)


def pool(tables, groupby, *, layer=None, **options):
    """Read labelled spots as hg.tl.biomarkers does."""
    return labelled_spots(read_spots(tables, groupby, "groupby", layer=layer), groupby, **options)


def patient(i, *, n=40, genes=GENES, shift=2.0, labels=("tumour", "stroma"), seed=1):
    """Make logs of one patient; the first five genes are higher in the first label, and all differ between patients."""
    rng = np.random.default_rng((seed, i))
    label = np.array(labels)[np.arange(n) % len(labels)]
    values = 5 + rng.normal(0, 0.5, genes) + rng.normal(0, 0.4, (n, genes))
    values[:, :5] += shift * 0.4 * (label == labels[0])[:, None]
    obs = pd.DataFrame({"patient": f"P{i}", "section": f"S{i}", "label": label}, index=[f"P{i}-{j}" for j in range(n)])
    table = AnnData(obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(genes)]))
    table.layers["log"] = np.clip(values, 0, None).astype(np.float32)
    table.obsm["spatial"] = np.stack(np.meshgrid(np.arange(n // 8), np.arange(8)), -1).reshape(-1, 2)[:n].astype(float)
    return table


def patients(n=5, **options):
    return [patient(i, **options) for i in range(n)]


def as_predicted(table, *, annotation=None, reliable=None):
    """Mark ``log`` as a layer of predict, and put raw counts of the same genes into ``X``."""
    rng = np.random.default_rng(table.n_obs)
    table.X = rng.poisson(np.expm1(table.layers["log"]) / 20).astype(np.float32)
    table.layers["he2gene"] = table.layers["log"]
    table.uns["he2gene"] = {"weights_sha256": "0", "layer": "he2gene", "model": "none"}
    table.var["he2gene_reliable"] = np.arange(table.n_vars) < 30 if reliable is None else reliable
    if annotation is not None:
        table.obs["he2gene_annotation"] = pd.Categorical(annotation)
    return table


def slides(n_patients=4, shape=(8, 6), n_genes=20, seed=0):
    """Make counts and predictions of another model; the first five genes are higher in the left half."""
    rng = np.random.default_rng(seed)
    rows, columns = (grid.ravel() for grid in np.mgrid[: shape[0], : shape[1]])
    left = np.tile(columns < shape[1] // 2, n_patients)
    n = len(left)
    names = [f"P{i}" for i in range(n_patients) for _ in rows]
    rate = np.exp(rng.normal(2, 0.4, (n, n_genes)) + rng.normal(0, 0.5, n_genes))
    rate[:, :5] *= np.where(left, 3, 1)[:, None]
    obs = pd.DataFrame({"patient": names, "section": names, "label": np.where(left, "left", "right")})
    obs.index = [f"{name}-{i}" for i, name in enumerate(names)]
    counts = rng.poisson(rate)
    table = AnnData(scipy.sparse.csr_matrix(counts.astype(np.float32)), obs=obs)
    table.var_names = [f"g{i}" for i in range(n_genes)]
    table.obsm["spatial"] = np.tile(np.column_stack([columns, rows]) * 100.0, (n_patients, 1))
    predicted = 0.7 * log_normalise(rate) + rng.normal(1.5, 0.2, counts.shape)
    table.layers["other_model"] = np.clip(predicted, 0, None).astype(np.float32)
    return table
