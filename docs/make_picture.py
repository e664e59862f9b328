"""Make the picture of the README: section C5 and what holds for a new patient. Run with HE2GENE_DATA_DIR set."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image

import he2gene_sc as hg

OUT = Path(__file__).parent / "_static" / "c5.png"
GENES = ("COL1A1", "CD24")


def main() -> None:
    """Predict C5; draw two genes and the annotation, what is known below, and the correlations beside."""
    sdata = hg.datasets.her2st("C5")
    hg.tl.predict(sdata)
    figure, axes = plt.subplot_mosaic(
        [["COL1A1", "CD24", "annotation", "new"], ["COL1A1 known", "CD24 known", "labels", "new"]],
        figsize=(16, 6.4),
        width_ratios=(1, 1, 1, 1.3),
        layout="constrained",
    )
    for gene in GENES:
        hg.pl.spatial(sdata, gene, ax=[axes[gene], axes[f"{gene} known"]])
    pair = [axes["annotation"], axes["labels"]]
    hg.pl.annotation(
        sdata,
        reference="annotation",
        legend_loc="below",
        title=["predicted annotation", "transferred labels"],
        ax=pair,
    )
    hg.pl.predictability(sdata, genes=GENES, ax=axes["new"])
    figure.savefig(OUT, dpi=85, bbox_inches="tight")
    # 256 colours are enough, and a third of the file.
    Image.open(OUT).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3).save(OUT, optimize=True)


if __name__ == "__main__":
    main()
