"""Small network and training data for tests."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from he2gene_sc.models import EncoderSpec
from he2gene_sc.training import PRESETS, PatchSet, RunOptions, fit_network

SPEC = EncoderSpec("tiny", "tiny", "BSD-3-Clause", False, 16, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BASE = replace(PRESETS["he2gene-base"], lr=3e-3, batch_size=16, patience=50, max_epochs=3)
SPAT = replace(PRESETS["he2gene-spat"], lr=3e-3, batch_size=16, patience=50, max_epochs=3)


def encoder(dropout=0.1):
    """Make a small network with stateful layers: batch normalisation and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
        )


def toy_set(n=80, px=18, seed=0, **changes):
    """Make spots on a 4-column grid in five sections of three patients; genes and classes depend on the colour."""
    rng = np.random.default_rng(seed)
    hue = rng.uniform(0, 1, (n, 3))
    patches = 255 * np.clip(hue[:, :, None, None] + 0.1 * rng.normal(size=(n, 3, px, px)), 0, 1)
    targets = hue @ rng.uniform(0, 3, (3, 6)) + 0.05 * rng.uniform(size=(n, 6))
    order = np.arange(n)
    sections = order * 5 // n
    arrays = {
        "patches": patches.astype(np.uint8),
        "targets": targets.astype(np.float32),
        "codes": hue.argmax(1),
        "sections": sections,
        "patients": np.array([0, 0, 1, 1, 2])[sections],
        "target_mask": np.arange(6) < 3,
        "coordinates": np.stack([200.0 * (order % 4), 200.0 * (order // 4)], axis=1),
        "neighbours": rng.integers(-1, n, (n, 8)),
    }
    return PatchSet(**(arrays | changes))


def fit_to(path, options):
    """Train in this process, and write the weights to a file."""
    preset = replace(SPAT, max_epochs=8)
    fitted = fit_network(toy_set(), preset, encoder(), SPEC, run=RunOptions(**options), device="cpu")
    np.savez(path, **fitted.tensors)
