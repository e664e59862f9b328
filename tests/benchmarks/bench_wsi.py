"""Reading whole slides: spots a second of CPU time, by `PatchReader` and by other packages where they are installed.

python tests/benchmarks/bench_wsi.py                    40,000 x 40,000 pixels: TIFF and svs of 256-px JPEG tiles, and zarr
python tests/benchmarks/bench_wsi.py --side 100000      some 4 GB on disk
python tests/benchmarks/bench_wsi.py --slide A.svs      a slide of yours, one window
python tests/benchmarks/bench_wsi.py --side 8192 --against --spots 200      LazySlide, reading and encoder

With one window openslide and tifffile read the same squares. Ways are timed by turns, and the best of `--repeats` is printed.
"""

import argparse
import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

TILE, CHUNK = 256, 1024
MPP, INPUT_PX = 0.25, 224
THREE, ONE = (100.0, 200.0, 400.0), (100.0,)
#: Spots and the distance between them, µm: spots far apart, and a tissue that is covered.
LAYOUTS = {"200 µm apart": 200.0, "over the whole slide": None}


def pattern() -> np.ndarray:
    """A tile that compresses about as well as a stained section, ``(1024, 1024, 3)``."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    noise = np.stack([gaussian_filter(rng.normal(size=(CHUNK, CHUNK)), 3, mode="wrap") for _ in range(3)], axis=-1)
    return np.clip([190, 140, 180] + 250 * noise + rng.normal(0, 4, noise.shape), 1, 255).astype(np.uint8)


def write_tiff(path: Path, side: int, description: str | None = None) -> None:
    import imagecodecs
    import tifffile

    picture = pattern()
    n = CHUNK // TILE
    encoded = [
        [imagecodecs.jpeg_encode(picture[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE].copy(), level=80,
                                 colorspace="rgb", outcolorspace="ycbcr", subsampling="420") for x in range(n)]
        for y in range(n)
    ]  # fmt: skip
    steps = -(-side // TILE)

    def tiles() -> Iterator[bytes]:
        for y in range(steps):
            for x in range(steps):
                yield encoded[y % n][x % n]

    tifffile.imwrite(
        path,
        tiles(),
        shape=(side, side, 3),
        dtype=np.uint8,
        photometric="ycbcr",
        subsampling=(2, 2),
        tile=(TILE, TILE),
        compression="jpeg",
        bigtiff=True,
        metadata=None,
        description=description,
    )


def write_zarr(path: Path, tiff: Path, side: int) -> None:
    """Write the same pixels, as decoded from the TIFF, in chunks as spatialdata has them."""
    import tifffile
    import zarr

    with tifffile.TiffFile(tiff) as file:
        page = file.pages.first
        tables, columns = page.jpegtables, -(-side // TILE)

        def decoded(y: int, x: int) -> np.ndarray:
            index = y * columns + x
            data = os.pread(descriptor, page.databytecounts[index], page.dataoffsets[index])
            return page.decode(data, index, jpegtables=tables)[0][0]

        descriptor = os.open(tiff, os.O_RDONLY)
        n = CHUNK // TILE
        chunk = np.block([[decoded(y, x).transpose(2, 0, 1) for x in range(n)] for y in range(n)])
        os.close(descriptor)
    array = zarr.create_array(path, shape=(3, side, side), chunks=(3, CHUNK, CHUNK), dtype="uint8")
    array[:, :CHUNK, :CHUNK] = chunk
    # All chunks are alike: they are links to the first, also those that reach over the border.
    first = path / "c" / "0" / "0" / "0"
    for y in range(-(-side // CHUNK)):
        for x in range(-(-side // CHUNK)):
            if (y, x) != (0, 0):
                (first.parents[1] / str(y)).mkdir(exist_ok=True)
                os.link(first, first.parents[1] / str(y) / str(x))


def written(folder: Path, side: int) -> tuple[Path, Path, Path]:
    """Return the slide as TIFF, svs and zarr, made where they are not there."""
    tiff, svs, store = (folder / f"slide_{side}.{end}" for end in ("tif", "svs", "zarr"))
    if not tiff.exists():
        write_tiff(tiff, side)
    if not svs.exists():
        write_tiff(
            svs, side, f"Aperio Image Library v12.0.0\r\n{side}x{side} ({TILE}x{TILE}) JPEG|AppMag = 40|MPP = {MPP}"
        )
    if not store.exists():
        write_zarr(store, tiff, side)
    return tiff, svs, store


def centres(side: int, n: int, pitch_um: float | None) -> np.ndarray:
    steps = int(n**0.5)
    pitch = side / steps if pitch_um is None else min(pitch_um / MPP, side / steps)
    at = side / 2 + (np.arange(steps) - (steps - 1) / 2) * pitch
    return np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)


def by_reader(pyramid, windows: tuple[float, ...], mpp: float, spots: np.ndarray) -> float:
    """Read all windows; return the mean of some pixels."""
    from he2gene_sc.image import PatchReader

    total = 0.0
    for batch in PatchReader(pyramid, spots, mpp, windows_um=windows, input_px=INPUT_PX):
        total += float(batch.patches[0][:, :, ::16, ::16].mean(dtype=float)) * len(batch.index)
    return total / len(spots)


def by_region(read: Callable[[int, int, int], np.ndarray], px: int, spots: np.ndarray) -> float:
    """Read one window of each spot by ``read(x, y, px)``; return the mean of some pixels."""
    corners = np.floor(spots - px / 2 + 0.5).astype(int)
    return float(np.mean([read(x, y, px)[::16, ::16, :3].mean(dtype=float) for x, y in corners]))


def others(path: Path) -> dict[str, Callable[[int, int, int], np.ndarray]]:
    """Return what other packages that are installed read a region of a file by."""
    import tifffile
    import zarr

    level = zarr.open(tifffile.imread(path, aszarr=True, level=0, series=0), mode="r")
    found = {"tifffile": lambda x, y, px: level[y : y + px, x : x + px]}
    with contextlib.suppress(ImportError):
        import openslide

        slide = openslide.OpenSlide(path)
        found["openslide"] = lambda x, y, px: np.asarray(slide.read_region((int(x), int(y)), 0, (px, px)))
    return found


def compare(ways: dict[str, Callable[[np.ndarray], object]], spots: np.ndarray, repeats: int) -> None:
    """Print spots a second of CPU time of each way, by turns, and how the first compares."""
    seconds = dict.fromkeys(ways, np.inf)
    for _ in range(repeats):
        for name, read in ways.items():
            start = time.process_time()
            read(spots)
            seconds[name] = min(seconds[name], time.process_time() - start)
    first, least = next(iter(seconds.items()))
    for name, taken in seconds.items():
        ratio = "" if name == first else f"   {first}: {taken / least:.2f} times as fast"
        print(f"  {name:<22} {len(spots) / taken:6.1f} spots/s of CPU{ratio}", flush=True)


def main(side: int, folder: Path, n: int, repeats: int) -> None:
    import dask.array as da

    import he2gene_sc as hg
    from he2gene_sc._core.images import pyramid_of
    from he2gene_sc.image import Pyramid

    warnings.simplefilter("ignore")
    tiff, svs, store = written(folder, side)
    start = time.process_time()
    slides = {"TIFF": pyramid_of(hg.io.read_he(tiff, mpp=MPP), "he")}
    print(
        f"{side}² pixels, {tiff.stat().st_size / 1e9:.1f} GB of TIFF; read_he: {time.process_time() - start:.2f} s of CPU"
    )
    slides |= {"svs": pyramid_of(hg.io.read_he(svs), "he"), "zarr": Pyramid.single(da.from_zarr(store))}
    for name, pitch in LAYOUTS.items():
        spots = centres(side, n, pitch)
        for windows in (ONE, THREE):
            ways = {kind: partial(by_reader, pyramid, windows, MPP) for kind, pyramid in slides.items()}
            if windows == ONE:
                px = round(ONE[0] / MPP)
                ways |= {f"{kind}, TIFF": partial(by_region, read, px) for kind, read in others(tiff).items()}
                ways |= {f"{kind}, svs": partial(by_region, read, px) for kind, read in others(svs).items()}
            few = spots[:: max(1, len(spots) // 16)]
            means = [read(few) for read in ways.values()]
            assert np.ptp(means) < 1, means
            what = ", ".join(f"{um:g}" for um in windows)
            print(f"{len(spots)} spots {name}, windows of {what} µm")
            compare(ways, spots, repeats)


def of_slide(path: Path, repeats: int) -> None:
    """Print what reading one window at spots side by side costs on a slide that is there."""
    import he2gene_sc as hg
    from he2gene_sc._core.images import pyramid_of

    warnings.simplefilter("ignore")
    sdata = hg.io.read_he(path)
    mpp = sdata.attrs.get("he2gene", {}).get("mpp", {}).get("he", MPP)
    pyramid, px = pyramid_of(sdata, "he"), round(ONE[0] / mpp)
    x, y = (np.arange(px / 2, size - px / 2, px) for size in (pyramid.width, pyramid.height))
    spots = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    ways = {"he2gene_sc": partial(by_reader, pyramid, ONE, mpp)}
    ways |= {kind: partial(by_region, read, px) for kind, read in others(path).items()}
    print(
        f"{path.name}: {pyramid.width} x {pyramid.height} px, {mpp:.3g} µm/px, {len(spots)} spots, one window of 100 µm"
    )
    compare(ways, spots, repeats)


def against(side: int, folder: Path, n: int, repeats: int) -> None:
    """Print spots a second of CPU of LazySlide and of this package, with the encoder, on the same tiles of 100 µm."""
    import dask.array as da
    import lazyslide as zs
    import torch
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel
    from torchvision.transforms import v2
    from wsidata import open_wsi

    import he2gene_sc as hg
    from he2gene_sc._core.images import pyramid_of
    from he2gene_sc.image import PatchReader
    from he2gene_sc.inference import encode
    from he2gene_sc.models._network import FeatureExtractor

    warnings.simplefilter("ignore")
    tiff, _, store = written(folder, side)
    sdata = SpatialData(
        images={"he": Image2DModel.parse(da.from_zarr(store), dims=("c", "y", "x"), c_coords=["r", "g", "b"])}
    )
    encoder, spec = hg.models.load_encoder("efficientnet-lite0")
    ready = v2.Compose(
        [v2.ToImage(), v2.Resize((INPUT_PX, INPUT_PX), antialias=True), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize(spec.mean, spec.std)]
    )  # fmt: skip
    px = round(ONE[0] / MPP)
    for name, wsi, pyramid in (
        ("TIFF", open_wsi(tiff, store=None), pyramid_of(hg.io.read_he(tiff, mpp=MPP), "he")),
        ("zarr", open_wsi(sdata, image_key="he", store=None), pyramid_of(sdata, "he")),
    ):
        zs.pp.tile_tissues(wsi, px, mpp=MPP, slide_mpp=MPP, background_filter=False)
        wsi.shapes["tiles"] = wsi.shapes["tiles"].iloc[:n]
        corners = wsi.shapes["tiles"].bounds[["minx", "miny"]].to_numpy()
        extractor = FeatureExtractor(encoder, spec)

        def ours(spots, pyramid=pyramid, extractor=extractor) -> None:
            reader = PatchReader(pyramid, spots, MPP, windows_um=ONE, input_px=INPUT_PX)
            with torch.inference_mode():
                for _ in encode(extractor, reader, device=torch.device("cpu"), dtype=torch.float32):
                    pass

        def theirs(_, wsi=wsi) -> None:
            zs.tl.feature_extraction(wsi, encoder, transform=ready, batch_size=32, pbar=False, device="cpu")

        print(f"{name}, {len(corners)} tiles of 100 µm, reading and encoder")
        compare({"he2gene_sc": ours, "LazySlide": theirs}, corners + px / 2, repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=40_000)
    parser.add_argument("--spots", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where the files are kept; default: a temporary folder")
    parser.add_argument("--against", action="store_true", help="reading and encoder, beside LazySlide")
    parser.add_argument("--slide", type=Path, help="a slide that is there instead")
    parser.add_argument("--repeats", type=int, default=1)
    chosen = parser.parse_args()
    measured = against if chosen.against else main
    if chosen.slide:
        of_slide(chosen.slide, chosen.repeats)
    elif chosen.folder:
        measured(chosen.side, chosen.folder, chosen.spots, chosen.repeats)
    else:
        with tempfile.TemporaryDirectory() as made:
            measured(chosen.side, Path(made), chosen.spots, chosen.repeats)
