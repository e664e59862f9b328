"""A whole-slide TIFF of 256-px JPEG tiles against the same pixels as zarr: spots a second of CPU time by `PatchReader`.

python tests/benchmarks/bench_wsi.py                    40,000 x 40,000 pixels
python tests/benchmarks/bench_wsi.py --side 100000      some 3 GB on disk
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
    tiff, store = folder / f"slide_{side}.tif", folder / f"slide_{side}.zarr"
    if not tiff.exists():
        write_tiff(tiff, side)
    if not store.exists():
        write_zarr(store, tiff, side)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=40_000)
    parser.add_argument("--spots", type=int, default=2000)
    parser.add_argument("--folder", type=Path, help="where the files are kept; default: a temporary folder")
    chosen = parser.parse_args()
    if chosen.folder:
        main(chosen.side, chosen.folder, chosen.spots)
    else:
        with tempfile.TemporaryDirectory() as made:
            main(chosen.side, Path(made), chosen.spots)
