"""Cost and accuracy at size.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_scale.py dense [--side 48] [--keep FOLDER]

`dense`: bins of 8 µm of a square crop of her2st C5, each encoded (`exact=True`) and interpolated from lattices. Prints,
over bins, the median Pearson correlation of the two over reliable genes and the share of bins of the same class; and the
cost on the tissue of C5 in CPU seconds: those of a patch (of 144 bins of the crop, encoded) times the patches, and those of
a bin beside its patches (of all bins of the tissue with few patches). `--keep` keeps the features of the crop in a folder.
"""

import argparse
import time
from pathlib import Path

import numpy as np

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.inference import lattice_of, without_idle

BIN_UM = 8.0


def tissue():
    """C5 with all bins on tissue, and without its spots."""
    sdata = hg.datasets.her2st("C5")
    hg.pp.tissue(sdata)
    hg.pp.grid(sdata, pitch_um=BIN_UM, diameter_um=BIN_UM, key_added="bins")
    del sdata.tables["table"]
    del sdata.shapes["spots"]
    return sdata


def crop(sdata, side):
    """The same object with bins of a square in the middle of the tissue."""
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import get_transformation

    mpp = resolve(sdata)[0].mpp
    spots = sdata["spots"]
    middle = np.array([spots.geometry.x.median(), spots.geometry.y.median()])
    x, y = np.meshgrid(*(2 * [(np.arange(side) - side / 2) * BIN_UM / mpp]))
    transformations = get_transformation(spots, get_all=True)
    sdata["bins"] = ShapesModel.parse(
        middle + np.column_stack([x.ravel(), y.ravel()]),
        geometry=0,
        radius=BIN_UM / 2 / mpp,
        transformations=transformations,
    )
    del sdata.tables["table"]
    del sdata.shapes["spots"]
    return sdata, mpp


def seconds_of(whole, mpp, genes, windows):
    """CPU seconds of a patch, and of a bin beside its patches."""
    few = crop(hg.datasets.her2st("C5"), 12)[0]
    base = timed(few, mpp=mpp, lattice=1.0, genes=genes)[1]
    n_base = sum(patches_of(centres_of(few) * mpp, windows, 1.0))
    a_patch = (timed(few, mpp=mpp, exact=True, genes=genes)[1] - base) / (144 * len(windows) - n_base)
    seconds = timed(whole, mpp=mpp, lattice=1.0, genes=genes)[1]
    at = centres_of(whole) * mpp
    return a_patch, (seconds - a_patch * sum(patches_of(at, windows, 1.0))) / len(at)


def centres_of(sdata):
    return np.column_stack([sdata["bins"].geometry.x, sdata["bins"].geometry.y])


def patches_of(centres_um, windows, share):
    return [len(without_idle(*lattice_of(centres_um, share * um), centres_um)[0]) for um in windows]


def timed(sdata, **options):
    start = time.process_time()
    found = hg.tl.predict(sdata, shapes_key="bins", copy=True, show_progress_bar=False, **options)
    return found["table"], time.process_time() - start


def dense(args):
    sdata, mpp = crop(hg.datasets.her2st("C5"), args.side)
    model = hg.models.load()
    windows, genes = model.card.windows_um, model.genes
    reliable = list(genes.index[genes["reliable"] | genes["reliable_known_patient"]])
    options = {"mpp": mpp, "genes": reliable} | ({} if args.keep is None else {"features": Path(args.keep)})
    exact = timed(sdata, exact=True, **options)[0]
    n = args.side**2
    print(f"{n:,} bins of {BIN_UM:g} µm of C5, {len(reliable):,} reliable genes, {n * len(windows):,} patches")
    found = []
    for share in args.lattice:
        table = timed(sdata, lattice=share, **options)[0]
        a, b = (t.layers["he2gene"].astype(float) for t in (table, exact))
        a, b = (x - x.mean(0) for x in (a, b))
        r = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
        same = np.mean(table.obs["he2gene_annotation"].astype(str) == exact.obs["he2gene_annotation"].astype(str))
        found.append(share)
        print(
            f"lattice {share:<6g} {sum(patches_of(centres_of(sdata) * mpp, windows, share)):6,} patches: correlation "
            f"{np.median(r):.3f} (median), {np.quantile(r, 0.05):.3f} (5 %); same annotation {100 * same:.1f} %",
            flush=True,
        )
    whole = tissue()
    at = centres_of(whole) * mpp
    a_patch, a_bin = seconds_of(whole, mpp, reliable, windows)
    each = len(at) * len(windows)
    print(f"CPU: a patch {1000 * a_patch:.1f} ms, a bin beside its patches {1000 * a_bin:.2f} ms")
    for share in found:
        total = sum(patches_of(at, windows, share))
        cost = (total * a_patch + len(at) * a_bin) / (each * a_patch + len(at) * a_bin)
        print(
            f"tissue of C5, {len(at):,} bins, lattice {share:g}: {total:,} of {each:,} patches, {cost:.4f} of the CPU time of exact"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("dense")
    command.add_argument("--side", type=int, default=48)
    command.add_argument("--lattice", type=float, nargs="+", default=[0.25, 0.125])
    command.add_argument("--keep")
    command.set_defaults(run=dense)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
