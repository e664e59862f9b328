"""Results on clean input, held against those of another version of the package.

    HE2GENE_DATA_DIR=../shared/data PYTHONPATH=<checkout of the old version> python tests/benchmarks/bench_equal.py record FOLDER
    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_equal.py compare FOLDER

The old version writes its bundled model and what it computes with it; the new version loads that model and computes the same.
For each result the largest difference is printed, and its share of the largest value. Exit status 1 if one is above 1e-6 and is not
in ``MEANT``, which says why a result was changed.
"""

import argparse
import inspect
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import he2gene_sc as hg

SECTIONS = ("C5", "A1", "B4")
BOUND = 1e-6
#: Results that another version gives by intention, by the beginning of their name.
MEANT = {
    "adapt": "corrected only where the measured spots represent the rest, as held-out blocks bear it out",
    "biomarkers/spatial": "stretched and smooth covariances are tried too; patients weigh alike in the fold change",
    "biomarkers/wilcoxon/logfoldchanges": "patients weigh alike, as in effect_size",
    "domains": "depth is one more reference; a missing annotation is one more label",
    "evaluate/genes/ceiling": "overdispersion of the counts is estimated",
    "intervals": "spots without a class take the interval of all classes",
    "predict/ood": "the score is also of stain, focus, noise and glass",
}


def only_known(function, options):
    """Options that this version has; ``None`` switches off what only the new one does."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}


def numbers(frame):
    """Each column as an array: numbers as they are, all else as text."""
    for name in frame:
        values = frame[name]
        if pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            yield str(name), values.to_numpy(float)
        else:
            yield (
                str(name),
                np.asarray(
                    ["missing" if missing else str(value) for value, missing in zip(values, values.isna(), strict=True)]
                ),
            )


def of_section(name, model):
    sdata = hg.datasets.her2st(name)
    hg.tl.predict(sdata, model=model, show_progress_bar=False)
    table = sdata["table"]
    yield "predict/layer", np.nan_to_num(np.asarray(table.layers["he2gene"]), nan=-1)
    yield "predict/proba", table.obsm["he2gene_annotation_proba"].to_numpy(float)
    yield "predict/embedding", np.asarray(table.obsm["X_he2gene"])
    yield "predict/ood", table.obs["he2gene_ood"].to_numpy(float)
    has_labels = "annotation" in table.obs
    hg.tl.evaluate(sdata, model=model, seed=0, **({"annotation_key": "annotation"} if has_labels else {}))
    for kind in ("genes", "annotation"):
        if kind == "annotation" and not has_labels:
            continue
        for column, values in numbers(hg.get.evaluation(sdata, kind)):
            yield f"evaluate/{kind}/{column}", values
    hg.tl.intervals(sdata, model=model)
    for end in ("lower", "upper"):
        yield f"intervals/{end}", np.nan_to_num(np.asarray(table.layers[f"he2gene_{end}"]), nan=-1)
    measured = np.zeros(table.n_obs, bool)
    measured[np.random.default_rng(0).permutation(table.n_obs)[: table.n_obs // 3]] = True
    known = table.var_names[table.var["he2gene_predicted"].to_numpy(bool)]
    few = list(known[:200])
    hg.tl.adapt(sdata, measured, genes=few)
    yield "adapt", np.nan_to_num(np.asarray(table[:, few].layers["he2gene_adapted"]), nan=-1)
    if not has_labels:
        return
    hg.tl.domain_preservation(sdata, "annotation", genes=few, clustering="kmeans", n_seeds=2, n_perms=99)
    for column, values in numbers(hg.get.domains(sdata)):
        yield f"domains/{column}", values
    classes = table.obs["annotation"].dropna().value_counts()
    classes = list(classes[classes >= 10].index)
    for method in ("spatial", "wilcoxon"):
        options = {
            "method": method,
            "layer": None,
            "reliable_only": False,
            "groups": classes[:1],
            "depth": None,
        }
        if method == "mixed":
            continue
        if hasattr(hg, "Design"):
            options["design"] = hg.Design(depth=options["depth"])
        hg.tl.biomarkers(sdata, "annotation", **only_known(hg.tl.biomarkers, options))
        for column, values in numbers(hg.get.biomarkers(sdata)):
            if column in ("names", "scores", "pvals", "effect_size", "logfoldchanges"):
                yield f"biomarkers/{method}/{column}", values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    folder, wrong = options.folder, 0
    if options.what == "record":
        hg.models.load().save(folder / "model")
    model = hg.models.load(folder / "model")
    for name in SECTIONS:
        found = dict(of_section(name, model))
        if options.what == "record":
            np.savez(folder / f"{name}.npz", **{key.replace("/", "|"): value for key, value in found.items()})
            continue
        with np.load(folder / f"{name}.npz") as stored:
            recorded = {key.replace("|", "/"): stored[key] for key in stored}
        for key, old in recorded.items():
            why = next((why for start, why in MEANT.items() if key.startswith(start)), None)
            if key not in found or found[key].shape != old.shape:
                said, off = f"shape {found[key].shape if key in found else 'absent'}, was {old.shape}", True
            elif old.dtype.kind in "US":
                n = int((found[key].astype(str) != old.astype(str)).sum())
                said, off = f"{n} of {old.size} texts differ", n > 0
            else:
                gap = np.abs(np.nan_to_num(found[key], nan=-9.0) - np.nan_to_num(old, nan=-9.0)).max(initial=0.0)
                scale = max(1.0, np.abs(np.nan_to_num(old)).max(initial=0.0))
                said, off = f"{gap:.1e} ({gap / scale:.1e} of the largest)", gap / scale > BOUND
            wrong += off and why is None
            print(f"{name} {key:44s} {said}{'' if not off else f'  meant: {why}' if why else '  DIFFERS'}", flush=True)
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
