"""Make the picture of the README: section C5, its spots alone. Run with HE2GENE_DATA_DIR set."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

import he2gene_sc as hg

OUT = Path(__file__).parent / "_static" / "c5.png"


def main() -> None:
    """Predict C5 and draw two genes and the annotation, predicted above, measured or known below."""
    sdata = hg.datasets.her2st("C5")
    hg.tl.predict(sdata)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), layout="constrained")
    for column, gene in enumerate(("COL1A1", "CD24")):
        hg.pl.spatial(sdata, gene, image=False, ax=axes[:, column])
    hg.pl.annotation(sdata, reference="annotation", image=False, ax=axes[:, 2])
    axes[1, 2].set_title("transferred labels")
    figure.savefig(OUT, dpi=80)


if __name__ == "__main__":
    main()
