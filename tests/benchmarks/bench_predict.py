"""End to end `tl.predict` against the bare encoder on ready tensors, in one run.

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_predict.py [--device cuda] [--zarr N_SPOTS]

Prints seconds and the ratio of the two, the smaller the better: 1 would mean that everything beside the encoder is
free. Seconds are those of CPU time, on a GPU those of the clock. The bare encoder is timed twice: as timm builds it, and
with batch normalisation folded as we run it. `--zarr` takes a synthetic zarr slide of that many spots instead of her2st C5.

The way of HE2Gene is 24 passes a spot, three windows in eight symmetries, one patch at a time, by the same encoder in plain
torch on ready tensors; it is timed on a few spots.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.image import PatchReader
from he2gene_sc.inference import resolve_device, resolve_dtype
from he2gene_sc.models import load_encoder

BATCH = 32
ALONE = 8  # spots that are encoded in the way of HE2Gene


def c5():
    start = time.perf_counter()
    sdata = hg.datasets.her2st("C5")
    # Resident: the pixels are in memory before anything is timed.
    print(f"loading C5, JPEG decoded: {time.perf_counter() - start:.1f} s (not part of the ratio)")
    return sdata


def zarr_slide(n_spots: int, folder: Path):
    import spatialdata as sd

    side = int(np.ceil(np.sqrt(n_spots)))
    hg.io.save(hg.datasets.toy((side, side), mpp=0.5), folder / "slide.zarr")
    return sd.read_zarr(folder / "slide.zarr")


def ready_tensors(sdata, model, device):
    (slide,) = resolve(sdata)
    extractor = model.network.extractor
    reader = PatchReader(
        slide.pyramid,
        slide.centres,
        slide.mpp,
        windows_um=model.card.windows_um,
        input_px=extractor.input_px,
        batch_size=BATCH,
    )
    with torch.inference_mode():
        return [
            torch.cat([extractor.preprocess(torch.from_numpy(w).to(device)) for w in batch.patches]) for batch in reader
        ]


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def run_bare(encoder, tensors, device, dtype):
    start = clock(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for x in tensors:
            encoder(x)
    return clock(device) - start


def run_alone(encoder, tensors, n_windows, device, dtype):
    """Seconds a spot of 24 passes, one patch at a time."""
    batch = tensors[0].unflatten(0, (n_windows, -1))[:, :ALONE]
    start = clock(device)
    with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        for patch in batch.flatten(0, 1):
            for turns in range(4):
                turned = torch.rot90(patch, turns, (1, 2))
                encoder(turned[None])
                encoder(turned.flip(2)[None])
    return (clock(device) - start) / batch.shape[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--zarr", type=int, default=0, metavar="N_SPOTS")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    dtype = resolve_dtype("auto", device)
    model = hg.models.load()
    with tempfile.TemporaryDirectory() as folder:
        sdata = zarr_slide(arguments.zarr, Path(folder)) if arguments.zarr else c5()
        model.network.to(device)
        tensors = ready_tensors(sdata, model, device)
        timm_encoder = load_encoder("efficientnet-lite0")[0].to(device, memory_format=torch.channels_last)
        folded = model.network.extractor.encoder
        seconds = {"predict": [], "bare, as timm builds it": [], "bare, folded": []}
        for _ in range(arguments.repeats):
            seconds["bare, as timm builds it"].append(run_bare(timm_encoder, tensors, device, dtype))
            seconds["bare, folded"].append(run_bare(folded, tensors, device, dtype))
            start = clock(device)
            hg.tl.predict(sdata, model=model, device=device, batch_size=BATCH, show_progress_bar=False)
            seconds["predict"].append(clock(device) - start)
        n = sdata["table"].n_obs
        n_windows = len(model.card.windows_um)
        alone = [run_alone(timm_encoder, tensors, n_windows, device, dtype) for _ in range(arguments.repeats)]
    print(f"{n} spots, {sum(len(x) for x in tensors)} patches, {device}, {dtype}; best of {arguments.repeats}")
    best = {name: min(values) for name, values in seconds.items()}
    best["24 passes, one at a time"] = n * min(alone)
    for name, value in best.items():
        print(f"  {name:<24} {value:7.2f} s  {n / value:8.2f} spots/s  predict : it {best['predict'] / value:.3f}")


if __name__ == "__main__":
    main()
