"""Does an encoder whose last stage is trained further on expression serve the default preset better?

    HE2GENE_DATA_DIR=../shared/data python tests/benchmarks/bench_finetune.py [VARIANT...] [--cache DIR]

Variants:
  frozen       as `default` has it
  expression   the last stage (blocks 6 and 7 of EfficientNet-Lite0) is trained on C2-C4 to predict 32 principal components of
               expression from the means of its maps in the three windows, from the ridge solution on; 3 and 10 epochs

Then `default` is trained on C2-C4 with that encoder and tested on C5, a section of a known patient: mean Pearson over the 250
genes of highest mean / the 50 most variable of the training sections.
"""

import argparse
import copy
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bench_training import expression, panels, score
from torch import nn

import he2gene_sc as hg
from he2gene_sc._slide import resolve
from he2gene_sc.image import PatchReader
from he2gene_sc.models._encoders import load_encoder
from he2gene_sc.models._network import Preprocess, symmetric
from he2gene_sc.stats import log_normalise

TRAIN, TEST = ("C2", "C3", "C4"), "C5"
WINDOWS = (100.0, 200.0, 400.0)
SYMMETRIES = ((0, False), (1, True))
FROZEN_BLOCKS = 5


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
            network.blocks[:FROZEN_BLOCKS](network.bn1(network.conv_stem(symmetric(x, *s)))).half() for s in SYMMETRIES
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


def tested(encoder, title, cache):
    """Train ``default`` on C2-C4 with the encoder and test it on C5."""
    sections = [hg.datasets.her2st(name) for name in TRAIN]
    genes = panels([expression(s) for s in sections])
    model = hg.tl.train(
        sections,
        encoder=encoder,
        annotation_key="annotation",
        missing_genes_are_zero=True,
        device="cpu",
        cache=cache,
        show_progress_bar=False,
    )
    sdata = hg.datasets.her2st(TEST)
    hg.tl.predict(sdata, model=model, device="cpu", dtype="float32", show_progress_bar=False)
    table = sdata["table"]
    found = pd.DataFrame(np.nan_to_num(table.layers["he2gene"]), columns=table.var_names)
    truth = pd.DataFrame(log_normalise(table.X), columns=table.var_names)
    print(f"{title}: C5 {score(found, truth, genes[0]):.3f} / {score(found, truth, genes[1]):.3f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["frozen", "expression"])
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
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
