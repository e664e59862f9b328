"""Cost and accuracy at size.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_scale.py dense [--side 48] [--keep FOLDER]

`dense`: bins of 8 µm of a square crop of her2st C5, each encoded (`exact=True`) and interpolated from lattices. Prints,
over bins, the median Pearson correlation of the two over reliable genes and the share of bins of the same class; and CPU
seconds, of the crop as measured, and of the tissue of C5 from those of a patch and of a bin, and the patches that it needs.
`--keep` keeps features, so that a second run prints the accuracy at once; its times are then those of no encoding.
"""

import argparse
import time
from pathlib import Path

import numpy as np

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.inference import lattice_of

BIN_UM = 8.0


def bins_of_tissue(sdata):
    """Centres of the bins on tissue, and their µm/px."""
    hg.pp.tissue(sdata)
    hg.pp.grid(sdata, pitch_um=BIN_UM, diameter_um=BIN_UM, key_added="bins")
    shapes = sdata["bins"]
    return np.column_stack([shapes.geometry.x, shapes.geometry.y])


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


def half(sdata):
    """The object with every fourth bin."""
    import spatialdata as sd

    return sd.SpatialData(images=dict(sdata.images), shapes={"bins": sdata["bins"].iloc[::4]}, attrs=sdata.attrs)


def timed(sdata, **options):
    start = time.process_time()
    found = hg.tl.predict(sdata, shapes_key="bins", genes=None, copy=True, show_progress_bar=False, **options)
    return found["table"], time.process_time() - start


def dense(args):
    whole = hg.datasets.her2st("C5")
    tissue_um = (
        bins_of_tissue(whole) * resolve(whole, shapes_key="bins", table_key=None)[0].mpp if args.tissue else None
    )
    sdata, mpp = crop(hg.datasets.her2st("C5"), args.side)
    windows = hg.models.load().card.windows_um
    n = args.side**2
    centres = np.column_stack([sdata["bins"].geometry.x, sdata["bins"].geometry.y]) * mpp
    kept = {} if args.keep is None else {"features": Path(args.keep)}
    hg.tl.predict(sdata, shapes_key="bins", copy=True, show_progress_bar=False, lattice=1.0)  # the network is built
    exact, whole_time = timed(sdata, mpp=mpp, exact=True, **kept)
    reliable = exact.var["he2gene_reliable"].to_numpy(bool) | exact.var["he2gene_reliable_known_patient"].to_numpy(bool)
    print(f"{n:,} bins of {BIN_UM:g} µm of C5, {int(reliable.sum()):,} reliable genes")
    print(f"exact          {n * len(windows):6,} patches {whole_time:7.1f} s of CPU")
    # What is not encoding: the same few patches for all bins and for a quarter of them.
    few = [timed(one, mpp=mpp, lattice=1.0)[1] for one in (sdata, half(sdata))]
    a_bin = max(0.0, (few[0] - few[1]) / (n - len(half(sdata)["bins"])))
    a_patch = (whole_time - n * a_bin) / (n * len(windows))
    print(f"a patch {1000 * a_patch:.1f} ms, a bin beside its patches {1000 * a_bin:.2f} ms")
    for share in args.lattice:
        table, seconds = timed(sdata, mpp=mpp, lattice=share, **kept)
        a, b = (t.layers["he2gene"][:, reliable].astype(float) for t in (table, exact))
        a, b = (x - x.mean(0) for x in (a, b))
        with np.errstate(invalid="ignore"):
            r = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
        same = np.mean(table.obs["he2gene_annotation"].astype(str) == exact.obs["he2gene_annotation"].astype(str))
        patches = sum(len(lattice_of(centres, share * um)[0]) for um in windows)
        print(
            f"lattice {share:<6g} {patches:6,} patches {seconds:7.1f} s of CPU, {seconds / whole_time:.3f} of exact; "
            f"correlation {np.nanmedian(r):.3f} (median), {np.nanquantile(r, 0.05):.3f} (5 %); same annotation {100 * same:.1f} %"
        )
        if tissue_um is not None:
            total, bins = sum(len(lattice_of(tissue_um, share * um)[0]) for um in windows), len(tissue_um)
            each = bins * len(windows)
            cost = (total * a_patch + bins * a_bin) / (each * a_patch + bins * a_bin)
            print(f"  on the tissue of C5: {bins:,} bins, {total:,} patches instead of {each:,}: {cost:.3f} of exact")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("dense")
    command.add_argument("--side", type=int, default=48)
    command.add_argument("--lattice", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    command.add_argument("--keep")
    command.add_argument("--no-tissue", dest="tissue", action="store_false")
    command.set_defaults(run=dense)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
