"""Cost and accuracy at size.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_scale.py dense [--side 48] [--keep FOLDER]
    python tests/benchmarks/bench_scale.py million [--side 1000] [--lattice 0.25] [--keep-layer]
    python tests/benchmarks/bench_scale.py sizes [--spots 200 2000 20000]

`dense`: bins of 8 µm of a square crop of her2st C5, each encoded (`exact=True`) and interpolated from lattices. Prints,
over bins, the median Pearson correlation of the two over reliable genes and the share of bins of the same class; and the
cost on the tissue of C5 in CPU seconds: those of a patch (of 144 bins of the crop, encoded) times the patches, and those of
a bin beside its patches (of all bins of the tissue with few patches). `--keep` keeps the features of the crop in a folder.

`million`: a synthetic slide of side² bins of 8 µm, all genes of the bundled model, a cheap encoder (a mean of pixels and a random
projection). One process predicts, deletes the layer unless `--keep-layer`, and saves; another opens the store, computes a gene and draws
it. Prints of each the seconds, the CPU seconds and the peak memory of the process, and the bytes written.

`sizes`: spots 50 µm apart, each encoded by the cheap encoder, `genes="all"`: CPU seconds, peak memory above that after loading, beside
the size of a dense layer, and the exponent that is fitted to time.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.inference import drop_idle_nodes, lattice_of

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
    return [len(drop_idle_nodes(*lattice_of(centres_um, share * um), centres_um)[0]) for um in windows]


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


def slide(side, pitch_um, mpp):
    """A square of bins on a pattern of the toy slide."""
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel

    from he2gene_sc.io._raster import build_levels, image_element

    tile = np.asarray(hg.datasets.toy((4, 4), mpp=mpp)["he"].data)
    px = round((side + 1) * pitch_um / mpp) + 1
    repeats = (1, *(-(-px // size) for size in tile.shape[1:]))
    x, y = np.meshgrid(*2 * [(np.arange(side) + 1) * pitch_um / mpp])
    bins = ShapesModel.parse(np.column_stack([x.ravel(), y.ravel()]), geometry=0, radius=pitch_um / mpp / 2)
    image = image_element(build_levels(np.tile(tile, repeats)[:, :px, :px]))
    return SpatialData(images={"he": image}, shapes={"bins": bins}, attrs={"he2gene": {"mpp": {"he": mpp}}})


def cheap_model():
    """The bundled model with an encoder that costs next to nothing: what it predicts means nothing."""
    import torch

    model = hg.models.load()
    extractor = model.network.extractor
    extractor.input_px = extractor.preprocess.input_px = 24
    width = (model.tensors["latent.projection"].shape[0] - 9 * len(model.card.windows_um)) // len(model.card.windows_um)
    torch.manual_seed(0)
    extractor.encoder = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, width, bias=False)
    ).requires_grad_(False)
    return model


def memory(line="VmHWM"):
    """GB of this process: the peak, or what it holds now (VmRSS)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith(line)) / 2**20


def report(what, start):
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(f"{what}: {wall:,.0f} s, {cpu:,.0f} s of CPU, peak of the process so far {memory():.2f} GB", flush=True)


def now():
    return time.perf_counter(), time.process_time()


def in_child(*words):
    subprocess.run([sys.executable, __file__, *map(str, words)], check=True)


def million(args):
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "bins.zarr")
        kept = ["--keep-layer"] * args.keep_layer
        in_child("predict-bins", store, "--side", args.side, "--lattice", args.lattice, *kept)
        n_bytes = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        print(f"written: {n_bytes / 1e9:.2f} GB")
        in_child("draw-gene", store)


def predict_bins(args):
    warnings.simplefilter("ignore")
    start, sdata, model = now(), slide(args.side, BIN_UM, 2.0), cheap_model()
    genes = len(model.genes)
    print(
        f"{args.side**2:,} bins of {BIN_UM:g} µm, {genes:,} genes: a dense layer of {4e-9 * args.side**2 * genes:.1f} GB"
    )
    report("make the slide", start)
    start = now()
    hg.tl.predict(sdata, model=model, lattice=args.lattice, show_progress_bar=False)
    report(f"predict, lattice {args.lattice:g}", start)
    if not args.keep_layer:
        del sdata["table"].layers["he2gene"]
    start = now()
    hg.io.save(sdata, args.store)
    report("save", start)


def draw_gene(args):
    import matplotlib
    import spatialdata as sd

    matplotlib.use("Agg")
    warnings.simplefilter("ignore")
    start = now()
    sdata = sd.read_zarr(args.store)
    report("open", start)
    start = now()
    values = hg.get.expression(sdata, "ERBB2")
    report(f"compute a gene at {len(values):,} bins", start)
    start = now()
    sdata["table"].obs["gene"] = values["ERBB2"]
    hg.pl.spatial(sdata, color="gene", save=Path(args.store).with_name("gene.png"))
    report("draw it", start)


def sizes(args):
    found = []
    for n in args.spots:
        words = [sys.executable, __file__, "predict-spots", "--side", str(round(n**0.5))]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        print(out, end="", flush=True)
        found.append([float(word) for word in out.split("[")[1].split("]")[0].split(",")])
    for first in range(len(found) - 1):
        n, cpu = np.log(np.array(found[first:])).T
        print(f"exponent of time, {args.spots[first]:,} to {args.spots[-1]:,} spots: {np.polyfit(n, cpu, 1)[0]:.2f}")


def predict_spots(args):
    warnings.simplefilter("ignore")
    sdata, model = slide(args.side, 50.0, 4.0), cheap_model()
    before, start = memory("VmRSS"), now()
    hg.tl.predict(sdata, model=model, genes="all", show_progress_bar=False)
    cpu, above = time.process_time() - start[1], memory() - before
    n, layer = args.side**2, 4 * args.side**2 * len(model.genes) / 2**30
    lazy = "lazy" if sdata["table"].uns["he2gene"].get("lazy") else "dense"
    print(
        f"{n:>9,} spots, {lazy}: {cpu:7.1f} s of CPU, {above:.2f} GB above load, a dense layer {layer:.2f} GB  [{n}, {cpu:.3f}]"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("dense")
    command.add_argument("--side", type=int, default=48)
    command.add_argument("--lattice", type=float, nargs="+", default=[0.25, 0.125])
    command.add_argument("--keep")
    command.set_defaults(run=dense)
    for name, run, store in (("million", million, False), ("predict-bins", predict_bins, True)):
        command = commands.add_parser(name)
        command.add_argument("--side", type=int, default=1000)
        command.add_argument("--lattice", type=float, default=0.25)
        command.add_argument("--keep-layer", action="store_true")
        if store:
            command.add_argument("store")
        command.set_defaults(run=run)
    command = commands.add_parser("draw-gene")
    command.add_argument("store")
    command.set_defaults(run=draw_gene)
    command = commands.add_parser("sizes")
    command.add_argument("--spots", type=int, nargs="+", default=[200, 2000, 20_000])
    command.set_defaults(run=sizes)
    command = commands.add_parser("predict-spots")
    command.add_argument("--side", type=int)
    command.set_defaults(run=predict_spots)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
