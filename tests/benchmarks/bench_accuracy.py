"""Held-out C5 by the bundled model, against a ridge on colour alone that is trained here, and the noise ceiling.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_accuracy.py

The panels (250 genes of highest mean, 50 most variable) are chosen on C2, C3 and C4. The colour ridge reads mean and SD
of RGB in the model's three windows, is trained on C2, C3 and C4, and gets the best of several penalties on C5 itself,
so its figures are too good. C5 is of patient C, as three of the five training sections: this says nothing of a new patient.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.image import PatchReader
from he2gene_sc.stats import log_normalise, noise_ceiling, pearson

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.pictures import read_all


def expression(sdata):
    table = sdata["table"]
    return pd.DataFrame(log_normalise(table.X), index=table.obs_names, columns=table.var_names)


def colours(sdata, windows_um):
    (slide,) = resolve(sdata)
    patches = read_all(PatchReader(slide.pyramid, slide.centres, slide.mpp, windows_um=windows_um, input_px=224))
    return np.hstack([stat(window, axis=(2, 3)) for window in patches for stat in (np.mean, np.std)])


def main():
    model = hg.models.load()
    train = {name: hg.datasets.her2st(name) for name in ("C2", "C3", "C4")}
    measured = pd.concat({name: expression(sdata) for name, sdata in train.items()}).fillna(0)
    x = np.vstack([colours(sdata, model.card.windows_um) for sdata in train.values()])
    test = hg.datasets.her2st("C5")
    truth = expression(test).reindex(columns=measured.columns, fill_value=0)
    ceiling = pd.Series(noise_ceiling(test["table"].X), index=test["table"].var_names)
    scaler = StandardScaler().fit(x)
    x, x_test = scaler.transform(x), scaler.transform(colours(test, model.card.windows_um))
    for tta in (False, True):
        hg.tl.predict(test, model=model, tta=tta, show_progress_bar=False)
        predicted = test["table"].to_df("he2gene")
        for panel, score in (("250 highest mean", measured.mean()), ("50 most variable", measured.var())):
            genes = score.sort_values(ascending=False, kind="stable").index[: int(panel.split()[0])]
            model_r = np.nan_to_num(
                pearson(predicted.reindex(columns=genes).to_numpy(), truth[genes].to_numpy())
            ).mean()
            colour_r = max(
                np.nan_to_num(
                    pearson(Ridge(alpha=alpha).fit(x, measured[genes]).predict(x_test), truth[genes].to_numpy())
                ).mean()
                for alpha in (1, 10, 30, 100, 300)
            )
            print(
                f"C5, {panel}: model{' with tta' if tta else ''} {model_r:.3f}, colour alone {colour_r:.3f}, "
                f"above it by {model_r - colour_r:.3f}, noise ceiling {ceiling.reindex(genes).fillna(0).mean():.3f}"
            )


if __name__ == "__main__":
    main()
