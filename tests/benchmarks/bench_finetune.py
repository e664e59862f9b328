"""Does an encoder that is trained further, on expression or on tissue without labels, serve the default preset better?

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_finetune.py [VARIANT...] [--cache DIR]

Variants:
  frozen            as `default` has it
  expression        the last stage (blocks 6 and 7 of EfficientNet-Lite0) is trained on C2-C4 to predict 32 principal
                    components of expression from the means of its maps in the three windows, from the ridge solution on;
                    3 and 10 epochs
  self-supervised   blocks 3 to 7 are trained on the tissue of C2-C4 without labels, by VICReg (Bardes, Ponce and LeCun, ICLR
                    2022): two crops of a patch, turned, with other stains and some of them blurred, shall look alike; 300 and
                    1,000 steps of 48 patches

Then `default` is trained on C2-C4 with that encoder and tested on C5, a section of a known patient, and on A1 and A2, of
another patient at another resolution: mean Pearson over the 250 genes of highest mean / the 50 most variable of the training
sections.
"""

import argparse
import copy
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from bench_training import expression, panels, score
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import nn

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.image import PatchReader
from he2gene_sc.models._encoders.load import load_encoder
from he2gene_sc.models._network import Preprocess, apply_symmetry
from he2gene_sc.stats import log_normalise

TRAIN, TEST = ("C2", "C3", "C4"), ("C5", "A1", "A2")
WINDOWS = (100.0, 200.0, 400.0)
SYMMETRIES = ((0, False), (1, True))
FROZEN_BLOCKS = 5
#: Of self-supervision: side of a patch and of the crops from it, px; blocks whose weights stay, and whose maps are read.
PATCH_PX, CROP_PX = 128, 96
SSL_FROZEN_BLOCKS, SSL_READ = 2, (2, 4, 6)


class Tail(nn.Module):
    """Blocks that are trained, and the mean of their last maps."""

    def __init__(self, network):
        super().__init__()
        self.blocks = network.blocks[FROZEN_BLOCKS:]

    def forward(self, x):
        return self.blocks(x).mean((2, 3))


@torch.inference_mode()
def maps(network, spec, sdata):
    """What the trained blocks are given, ``(spots, symmetries, windows, c, y, x)`` in half precision."""
    (slide,) = resolve(sdata)
    reader = PatchReader(
        slide.pyramid, slide.centres, slide.mpp, windows_um=WINDOWS, input_px=spec.input_px, factor=slide.pixel_factor
    )
    prepare, found = Preprocess(spec), [None] * len(slide.centres)
    for batch in reader:
        x = torch.cat([prepare(torch.as_tensor(window)) for window in batch.patches])
        views = [
            network.blocks[:FROZEN_BLOCKS](network.bn1(network.conv_stem(apply_symmetry(x, *s)))).half()
            for s in SYMMETRIES
        ]
        views = torch.stack([torch.stack(view.chunk(len(WINDOWS)), 1) for view in views], 1)
        for i, row in zip(batch.index, views, strict=True):
            found[i] = row
    return torch.stack(found)


def by_expression(network, spec, epochs):
    """Train the tail on the components of expression, from the closed-form head on."""
    inputs, targets = [], []
    frames = [hg.datasets.her2st(name) for name in TRAIN]
    genes = sorted(set.union(*(set(s["table"].var_names) for s in frames)))
    for sdata in frames:
        inputs.append(maps(network, spec, sdata))
        y = expression(sdata).reindex(columns=genes, fill_value=0).to_numpy()
        targets.append(y - y.mean(0))
    u, d, _ = np.linalg.svd(np.concatenate(targets), full_matrices=False)
    y = torch.tensor(u[:, :32] * d[:32] / d[0] * np.sqrt(len(u)), dtype=torch.float32)
    x, tail = torch.cat(inputs), Tail(network)
    section = torch.tensor(np.repeat(np.arange(len(inputs)), [len(part) for part in inputs]))

    def features(rows, view):
        batch = x[rows, view].float()
        return tail(batch.flatten(0, 1)).unflatten(0, batch.shape[:2]).flatten(1)

    with torch.no_grad():
        start = torch.cat([features(rows, 0) for rows in torch.arange(len(x)).split(64)])
    mean = torch.stack([start[section == i].mean(0) for i in range(len(inputs))])
    scale = start.sub(mean[section]).std(0)
    z = (start - mean[section]) / scale
    penalty = 30 * z.shape[1] * torch.eye(z.shape[1])
    head = nn.Linear(z.shape[1], y.shape[1], bias=False)
    head.weight.data = torch.linalg.solve(z.T @ z + penalty, z.T @ y).T.contiguous()
    optimiser = torch.optim.AdamW([*tail.parameters(), *head.parameters()], lr=1e-4, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(x), generator=generator).split(32):
            view = int(torch.randint(len(SYMMETRIES), (), generator=generator))
            found = head((features(rows, view) - mean[section[rows]]) / scale)
            loss = (found - y[rows]).square().sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        print(
            f"  expression, epoch {epoch + 1}: loss {np.mean(losses):.4f} of {y.square().sum(1).mean():.4f}", flush=True
        )


def tissue():
    """Patches of 140, 280 and 560 µm at the spots of C2-C4 and between them, ``(n, 3, PATCH_PX, PATCH_PX)`` uint8."""
    found = []
    for name in TRAIN:
        (slide,) = resolve(hg.datasets.her2st(name))
        for shift in ((0, 0), (0.5, 0.5), (0.5, 0), (0, 0.5)):
            centres = slide.centres + np.array(shift) * 200 / slide.mpp
            reader = PatchReader(
                slide.pyramid,
                centres,
                slide.mpp,
                windows_um=(140.0, 280.0, 560.0),
                input_px=PATCH_PX,
                factor=slide.pixel_factor,
            )
            for batch in reader:
                for window in batch.patches:
                    x = torch.as_tensor(window).float()
                    found.append(
                        F.interpolate(x, size=(PATCH_PX, PATCH_PX), mode="bilinear", antialias=True).round().byte()
                    )
    x = torch.cat(found)
    # Bare glass has nothing to tell.
    return x[x.float().mean((1, 2, 3)) < 225]


def augmented(x, rng):
    """A crop of each patch, turned and mirrored, with stains of another strength; two of five are blurred."""
    n, turns = len(x), []
    for _ in range(n):
        size, angle = rng.uniform(0.55, 1), rng.integers(4) * np.pi / 2
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag(
            [rng.choice([-1, 1]), 1]
        )
        turns.append(np.column_stack([size * turn, rng.uniform(size - 1, 1 - size, 2)]))
    grid = F.affine_grid(torch.tensor(np.array(turns)).float(), (n, 3, CROP_PX, CROP_PX), align_corners=False)
    x = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    mixed = [hed_from_rgb @ np.diag(np.exp(rng.normal(0, 0.25, 3))) @ rgb_from_hed for _ in range(n)]
    density = torch.einsum("bcyx,bcd->bdyx", -torch.log((x + 1) / 256), torch.tensor(np.array(mixed)).float())
    x = 256 * torch.exp(-density - torch.tensor(rng.normal(0, 0.04, (n, 3, 1, 1))).float()) - 1
    for i in np.flatnonzero(rng.random(n) < 0.4):
        side = int(CROP_PX / rng.uniform(1.5, 4))
        small = F.interpolate(x[i : i + 1], size=(side, side), mode="bilinear", antialias=True)
        x[i : i + 1] = F.interpolate(small, size=(CROP_PX, CROP_PX), mode="bilinear")
    return x.clamp(0, 255)


def vicreg(a, b):
    """Invariance, variance and covariance of two views, weighted 25, 25 and 1."""
    invariance = F.mse_loss(a, b)
    variance = covariance = 0.0
    for z in (a - a.mean(0), b - b.mean(0)):
        variance = variance + F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2
        between = z.T @ z / (len(z) - 1)
        covariance = covariance + (between.square().sum() - between.diagonal().square().sum()) / z.shape[1]
    return 25 * invariance + 25 * variance + covariance


def by_tissue(network, spec, steps):
    """Train the blocks without labels; yields the number of steps at each of ``steps``."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    patches, prepare = tissue(), Preprocess(replace(spec, input_px=CROP_PX))
    read = {network.blocks[block] for block in SSL_READ}

    def features(x):
        with torch.no_grad():
            x = network.blocks[:SSL_FROZEN_BLOCKS](network.bn1(network.conv_stem(prepare(x))))
        means = []
        for block in network.blocks[SSL_FROZEN_BLOCKS:]:
            x = block(x)
            if block in read:
                means.append(x.mean((2, 3)))
        return torch.cat(means, 1)

    size = features(patches[:2].float()).shape[1]
    projector = nn.Sequential(nn.Linear(size, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512))
    trained = network.blocks[SSL_FROZEN_BLOCKS:].requires_grad_(True)
    optimiser = torch.optim.AdamW(
        [{"params": trained.parameters(), "lr": 0.0}, {"params": projector.parameters(), "lr": 1e-3}], weight_decay=1e-4
    )
    losses = []
    for step in range(1, max(steps) + 1):
        optimiser.param_groups[0]["lr"] = 1e-4 * min(1, step / 100)
        x = patches[torch.from_numpy(rng.choice(len(patches), 48, replace=False))]
        both = projector(features(torch.cat([augmented(x, rng), augmented(x, rng)])))
        loss = vicreg(*both.chunk(2))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"  self-supervised, step {step}: loss {np.mean(losses[-100:]):.2f}", flush=True)
        if step in steps:
            yield step


def tested(encoder, title, cache):
    """Train ``default`` on C2-C4 with the encoder and test it on sections of both patients."""
    sections = [hg.datasets.her2st(name) for name in TRAIN]
    genes = panels([expression(s) for s in sections])
    model = hg.tl.train(
        sections,
        encoder=encoder,
        annotation_key="annotation",
        genes=hg.GeneSelection(missing_genes_are_zero=True),
        device="cpu",
        cache=cache,
        show_progress_bar=False,
    )
    rows = []
    for name in TEST:
        sdata = hg.datasets.her2st(name)
        hg.tl.predict(sdata, model=model, device="cpu", dtype="float32", show_progress_bar=False)
        table = sdata["table"]
        found = pd.DataFrame(np.nan_to_num(table.layers["he2gene"]), columns=table.var_names)
        truth = pd.DataFrame(log_normalise(table.X), columns=table.var_names)
        rows.append(f"{name} {score(found, truth, genes[0]):.3f} / {score(found, truth, genes[1]):.3f}")
    print(f"{title}: {', '.join(rows)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["frozen", "expression", "self-supervised"])
    parser.add_argument("--cache", type=Path, help="folder for the encoder's features")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    network, spec = load_encoder("efficientnet-lite0")
    for name in arguments.variants:
        start = time.perf_counter()
        if name == "frozen":
            tested("efficientnet-lite0", "frozen", arguments.cache)
        for epochs in (3, 10) if name == "expression" else ():
            # Batch normalisation keeps its statistics: batches are small.
            trained = copy.deepcopy(network).eval()
            by_expression(trained, spec, epochs)
            tested((trained.requires_grad_(False), spec), f"expression, {epochs} epochs", arguments.cache)
        if name == "self-supervised":
            trained = copy.deepcopy(network).eval()
            for step in by_tissue(trained, spec, (300, 1000)):
                tested(
                    (copy.deepcopy(trained).requires_grad_(False), spec),
                    f"self-supervised, {step} steps",
                    arguments.cache,
                )
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
