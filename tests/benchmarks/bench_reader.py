"""How fast and in how much memory `PatchReader` reads patches, against what else one could do, in one run.

python tests/benchmarks/bench_reader.py            ratios to ImageTilesDataset and to decoding the whole image
python tests/benchmarks/bench_reader.py --memory   peak memory on a 40,000 x 40,000 image
"""

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np

CHUNK = 1024
TARGET_TILES, TARGET_DECODE, TARGET_MEMORY = 8.0, 0.9, 1000
SIDE, MPP, PITCH_UM = 8192, 0.7, 200.0
LARGE_SIDE, LARGE_MPP, LARGE_SPOTS = 40_000, 0.25, 2000
INPUT_PX = 224
ONE, THREE = (100.0,), (100.0, 200.0, 400.0)
N_TILES, N_REPEATS = 100, 5


def tile() -> np.ndarray:
    """Smooth colours with some grain: compresses about as well as a stained section."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(120, 240, (3, CHUNK // 64, CHUNK // 64))
    smooth = coarse.repeat(64, axis=1).repeat(64, axis=2)
    return (smooth + rng.integers(-8, 9, smooth.shape)).astype(np.uint8)


def grid(side: int, pitch: float) -> np.ndarray:
    steps = np.arange(pitch / 2, side, pitch)
    return np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)


def write_slide(path: Path, centres: np.ndarray) -> None:
    import dask.array as da
    import spatialdata as sd
    from spatialdata.models import Image2DModel, ShapesModel

    n = SIDE // CHUNK
    image = da.tile(da.from_array(tile(), chunks=-1), (1, n, n))
    spots = ShapesModel.parse(centres, geometry=0, radius=50 / MPP)
    sd.SpatialData(images={"he": Image2DModel.parse(image, dims=("c", "y", "x"))}, shapes={"spots": spots}).write(path)


def seconds(*works) -> list[float]:
    """Best time of each, taken in turns so that what else runs on the machine meets all of them."""
    best = [np.inf] * len(works)
    for _ in range(N_REPEATS):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def with_reader(array, centres: np.ndarray, windows: tuple[float, ...]) -> None:
    from he2gene_sc.image import PatchReader, Pyramid

    reader = PatchReader(Pyramid.single(array), centres, MPP, windows_um=windows, input_px=INPUT_PX)
    assert sum(len(batch.index) for batch in reader) == len(centres)


def decode_and_slice(array, centres: np.ndarray, windows: tuple[float, ...], batch_size: int = 32) -> None:
    """The least that one has to do: windows are shifted into the image and never averaged."""
    image = np.asarray(array)
    sizes = [round(um / MPP) for um in windows]
    for start in range(0, len(centres), batch_size):
        part = centres[start : start + batch_size]
        for size in sizes:
            batch = np.empty((len(part), 3, size, size), np.uint8)
            corners = np.clip(part - size / 2, 0, SIDE - size).astype(int)
            for patch, (x, y) in zip(batch, corners, strict=True):
                patch[:] = image[:, y : y + size, x : x + size]


def with_tiles(sdata) -> None:
    from spatialdata.dataloader import ImageTilesDataset

    dataset = ImageTilesDataset(
        sdata, {"spots": "he"}, {"spots": "global"}, transform=lambda tile: np.asarray(tile["he"].data)
    )
    for i in np.linspace(0, len(dataset) - 1, N_TILES).astype(int):
        assert dataset[i].shape[0] == 3


def speed() -> None:
    import spatialdata as sd

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    centres = grid(SIDE, PITCH_UM / MPP)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "slide.zarr"
        write_slide(store, centres)
        sdata = sd.read_zarr(store)
        array = sdata["he"].data
        print(f"{SIDE}² pixels at {MPP} µm, chunks {array.chunksize}, {len(centres)} spots, best of {N_REPEATS}")
        one, one_decoded, three, three_decoded, tiles = seconds(
            partial(with_reader, array, centres, ONE),
            partial(decode_and_slice, array, centres, ONE),
            partial(with_reader, array, centres, THREE),
            partial(decode_and_slice, array, centres, THREE),
            partial(with_tiles, sdata),
        )
    for windows, ours, decoded in ((ONE, one, one_decoded), (THREE, three, three_decoded)):
        print(f"windows {windows}: {len(centres) / ours:.0f} spots/s, decode and slice {len(centres) / decoded:.0f}")
        print(f"  PatchReader : decode and slice = {decoded / ours:.2f} (target {TARGET_DECODE})")
    print(f"ImageTilesDataset, one window: {N_TILES / tiles:.0f} spots/s")
    print(f"  PatchReader : ImageTilesDataset = {len(centres) / one / (N_TILES / tiles):.1f} (target {TARGET_TILES:g})")


def write_large(path: Path) -> None:
    import zarr

    shape, chunks = (3, LARGE_SIDE, LARGE_SIDE), (3, CHUNK, CHUNK)
    array = zarr.create_array(path, shape=shape, chunks=chunks, dtype="uint8")
    pixels = tile() // 64 * 64 + 1
    for y in range(0, LARGE_SIDE, CHUNK):
        for x in range(0, LARGE_SIDE, CHUNK):
            array[:, y : y + CHUNK, x : x + CHUNK] = pixels[:, : LARGE_SIDE - y, : LARGE_SIDE - x]


def read_large(path: Path) -> None:
    """In a process of its own: peak memory above that of the imports."""
    import dask.array as da

    from he2gene_sc.image import PatchReader, Pyramid

    array = da.from_zarr(path)
    centres = grid(LARGE_SIDE, LARGE_SIDE / LARGE_SPOTS**0.5)
    before = peak_mb()
    start = time.perf_counter()
    reader = PatchReader(Pyramid.single(array), centres, LARGE_MPP, windows_um=THREE, input_px=INPUT_PX)
    n = sum(len(batch.index) for batch in reader)
    took = time.perf_counter() - start
    print(
        f"{LARGE_SIDE}² pixels at {LARGE_MPP} µm, windows {THREE}, {n} spots in {took:.1f} s: peak "
        f"{peak_mb() - before:.0f} MB above the imports ({before:.0f} MB; target < {TARGET_MEMORY})"
    )


def peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.zarr"
        write_large(path)
        subprocess.run([sys.executable, __file__, "--read", str(path)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.read:
        read_large(chosen.read)
    elif chosen.memory:
        memory()
    else:
        speed()
