"""A whole-slide TIFF of 256-px JPEG tiles against the same pixels as zarr: spots a second of CPU time by `PatchReader`.

python tests/benchmarks/bench_wsi.py                    40,000 x 40,000 pixels
python tests/benchmarks/bench_wsi.py --side 100000      some 3 GB on disk
python tests/benchmarks/bench_wsi.py --side 8192 --against --spots 400
                                    openslide (reading alone) and LazySlide (reading and encoder), where they are installed
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

TILE, CHUNK = 256, 1024
MPP, INPUT_PX = 0.25, 224
THREE, ONE = (100.0, 200.0, 400.0), (100.0,)
TARGET = 0.8
#: Spots and the distance between them, µm: spots far apart, and a tissue that is covered.
LAYOUTS = {"200 µm apart": 200.0, "over the whole slide": None}


def pattern() -> np.ndarray:
    """A tile that compresses about as well as a stained section, ``(1024, 1024, 3)``."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    noise = np.stack([gaussian_filter(rng.normal(size=(CHUNK, CHUNK)), 3, mode="wrap") for _ in range(3)], axis=-1)
    return np.clip([190, 140, 180] + 250 * noise + rng.normal(0, 4, noise.shape), 1, 255).astype(np.uint8)


def write_tiff(path: Path, side: int) -> None:
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


def written(folder: Path, side: int) -> tuple[Path, Path]:
    """Return the slide as TIFF and as zarr, made where they are not there."""
    tiff, store = folder / f"slide_{side}.tif", folder / f"slide_{side}.zarr"
    if not tiff.exists():
        write_tiff(tiff, side)
    if not store.exists():
        write_zarr(store, tiff, side)
    return tiff, store


def centres(side: int, n: int, pitch_um: float | None) -> np.ndarray:
    steps = int(n**0.5)
    pitch = side / steps if pitch_um is None else min(pitch_um / MPP, side / steps)
    at = side / 2 + (np.arange(steps) - (steps - 1) / 2) * pitch
    return np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)


def cpu_seconds(pyramid, spots: np.ndarray, windows: tuple[float, ...]) -> tuple[float, float]:
    """CPU time of all threads, and the mean of all pixels read."""
    from he2gene_sc.image import PatchReader

    start, total = time.process_time(), 0.0
    for batch in PatchReader(pyramid, spots, MPP, windows_um=windows, input_px=INPUT_PX):
        total += float(batch.patches[0][:, :, ::16, ::16].mean(dtype=float)) * len(batch.index)
    return time.process_time() - start, total / len(spots)


def main(side: int, folder: Path, n: int) -> None:
    import dask.array as da

    import he2gene_sc as hg
    from he2gene_sc._core.images import pyramid_of
    from he2gene_sc.image import Pyramid

    warnings.simplefilter("ignore")
    tiff, store = written(folder, side)
    start = time.process_time()
    slide = pyramid_of(hg.io.read_he(tiff, mpp=MPP), "he")
    print(f"{side}² pixels, {tiff.stat().st_size / 1e9:.1f} GB of TIFF; read_he: {time.process_time() - start:.2f} s")
    stored = Pyramid.single(da.from_zarr(store))
    for name, pitch in LAYOUTS.items():
        spots = centres(side, n, pitch)
        for windows in (ONE, THREE):
            (a, mean), (b, same) = cpu_seconds(slide, spots, windows), cpu_seconds(stored, spots, windows)
            assert abs(mean - same) < 1e-6, (mean, same)
            print(
                f"{len(spots)} spots {name}, windows {windows} µm: TIFF {len(spots) / a:.0f} spots/s of CPU, zarr {len(spots) / b:.0f}, "
                f"ratio {b / a:.2f} (target {TARGET})",
                flush=True,
            )


def against(side: int, folder: Path, n: int) -> None:
    """Print spots a second of CPU of openslide, of LazySlide and of this package on the same tiles of 100 µm."""
    import dask.array as da
    import lazyslide as zs
    import openslide
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
    tiff, store = written(folder, side)
    slide = openslide.OpenSlide(tiff)
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
        rates = {}
        start = time.process_time()
        for x, y in corners if name == "TIFF" else []:
            np.asarray(slide.read_region((int(x), int(y)), 0, (px, px)))[..., :3].copy()
        rates["openslide, reading"] = time.process_time() - start
        start = time.process_time()
        for _ in PatchReader(pyramid, corners + px / 2, MPP, windows_um=ONE, input_px=INPUT_PX):
            pass
        rates["he2gene_sc, reading"] = time.process_time() - start
        start = time.process_time()
        zs.tl.feature_extraction(wsi, encoder, transform=ready, batch_size=32, pbar=False, device="cpu")
        rates["LazySlide, reading and encoder"] = time.process_time() - start
        reader = PatchReader(pyramid, corners + px / 2, MPP, windows_um=ONE, input_px=INPUT_PX)
        extractor = FeatureExtractor(encoder, spec)
        start = time.process_time()
        with torch.inference_mode():
            for _ in encode(extractor, reader, device=torch.device("cpu"), dtype=torch.float32):
                pass
        rates["he2gene_sc, reading and encoder"] = time.process_time() - start
        for what, seconds in rates.items():
            if seconds > 0.01:
                print(f"{name}: {what}: {len(corners) / seconds:.1f} spots/s of CPU", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=40_000)
    parser.add_argument("--spots", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where the files are kept; default: a temporary folder")
    parser.add_argument("--against", action="store_true", help="other packages instead")
    chosen = parser.parse_args()
    measured = against if chosen.against else main
    if chosen.folder:
        measured(chosen.side, chosen.folder, chosen.spots)
    else:
        with tempfile.TemporaryDirectory() as made:
            measured(chosen.side, Path(made), chosen.spots)
