"""Peak memory of `hg.tl.train` on folders in the layout of HEST-1k, by the number of samples.

    python tests/benchmarks/bench_streams.py 5 25 125 [--spots 400] [--genes 10000] [--same-genes]

Samples are synthetic: counts of low rank, an image of 20 px a spot, two samples a patient, gene lists that lack other genes each
(as those of legacy ST do, unless `--same-genes`). The encoder is tiny, and genes are predicted in blocks that a few samples fill
(a real run with 4 million values a block fills them too), so that what grows with the samples shows. Each number of samples is trained
on in a process of its own. Printed are the peak of the process's own memory above that at the start, that of the resident memory (pages of
mapped files are in it, which the system may take back), and the time.
"""

import argparse
import logging
import multiprocessing
import resource
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import tifffile
import torch
from bench_training import own_memory
from torch import nn

import he2gene_sc as hg
from he2gene_sc.training._closed_form import validate as _validate

PITCH, PITCH_UM = 20, 200.0


def write(root, n_samples, n_spots, n_genes, same_genes):
    for folder in ("st", "wsis"):
        (root / folder).mkdir(parents=True)
    side = round(n_spots**0.5)
    y, x = (place.ravel() for place in np.mgrid[:side, :side])
    names = np.array([f"G{i:05d}" for i in range(n_genes)])
    axes = np.random.default_rng(0).normal(size=(3, n_genes)) / 3
    rows = []
    for i in range(n_samples):
        rng = np.random.default_rng([1, i])
        pattern = np.stack(
            [np.sin((x + rng.uniform(0, 9)) / 3), np.cos((y + rng.uniform(0, 9)) / 4), rng.normal(size=len(x))]
        )
        counts = rng.poisson(np.exp(pattern.T @ axes - 2.3)).astype(np.float32)
        listed = np.ones(n_genes, bool) if same_genes else rng.random(n_genes) > 0.05
        table = anndata.AnnData(
            scipy.sparse.csr_matrix(counts[:, listed]),
            obs=pd.DataFrame(index=[f"{a}x{b}" for a, b in zip(x, y, strict=True)]),
            var=pd.DataFrame(index=names[listed]),
        )
        table.obsm["spatial"] = np.column_stack([x + 1.0, y + 1.0]) * PITCH
        name = f"S{i}"
        table.write_h5ad(root / "st" / f"{name}.h5ad")
        colour = np.full((side + 2, side + 2, 3), 220.0)
        colour[y + 1, x + 1] = 150 + 40 * pattern.T
        image = np.clip(
            colour.repeat(PITCH, 0).repeat(PITCH, 1) + rng.normal(0, 9, ((side + 2) * PITCH,) * 2 + (3,)), 0, 255
        )
        shifted = np.roll(image, (PITCH // 2, PITCH // 2), axis=(0, 1)).astype(np.uint8)
        tifffile.imwrite(root / "wsis" / f"{name}.tif", shifted, tile=(128, 128), photometric="rgb", compression="zlib")
        rows.append(
            {
                "id": name,
                "dataset_title": "Synthetic",
                "patient": f"P{i // 2}",
                "organ": "Breast",
                "species": "Homo sapiens",
                "st_technology": "Spatial Transcriptomics",
                "pixel_size_um_estimated": PITCH_UM / PITCH,
                "spot_diameter": 100.0,
            }
        )
    pd.DataFrame(rows).to_csv(root / "HEST_v1_1_0.csv", index=False)


def encoder():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 32, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    return network, hg.models.EncoderSpec("tiny", input_px=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def measure(arguments, n_samples):
    warnings.simplefilter("ignore")
    logging.getLogger("he2gene_sc").setLevel(logging.ERROR)
    _validate._VALUES_AT_ONCE = 100_000
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "HEST", n_samples, arguments.spots, arguments.genes, arguments.same_genes)
        preset = hg.DefaultRecipe(windows_um=(160.0,))
        few = hg.datasets.hest(Path(folder) / "HEST", ids=["S0", "S1"])
        options = {"encoder": encoder(), "preset": preset, "device": "cpu", "show_progress_bar": False}
        hg.tl.train(few, **options)
        before = int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 2**20
        start = time.perf_counter()
        with own_memory() as own:
            model = hg.tl.train(hg.datasets.hest(Path(folder) / "HEST"), **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{n_samples:>3} samples of {arguments.spots} spots, {len(model.genes):,} genes: {1024 * (max(own) - before):.0f} MiB more than "
        f"before, resident {peak:.2f} GiB, {time.perf_counter() - start:.0f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="+", type=int)
    parser.add_argument("--spots", type=int, default=400, help="of a sample, a square number")
    parser.add_argument("--genes", type=int, default=10_000)
    parser.add_argument("--same-genes", action="store_true")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for n_samples in arguments.samples:
        process = context.Process(target=measure, args=(arguments, n_samples))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
