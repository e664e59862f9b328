"""Images for tests of readers."""

import numpy as np
import spatialdata as sd


def picture(height=96, width=128, seed=0):
    """Make a smooth RGB image ``(h, w, 3)``, which JPEG hardly changes."""
    y, x = np.mgrid[:height, :width]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    return (150 + 80 * np.sin(x[..., None] / 20 + y[..., None] / 31 + phase)).astype(np.uint8)


def pixels_of(sdata, key="he"):
    element = sdata[key]
    return (sd.get_pyramid_levels(element, n=0) if hasattr(element, "children") else element).transpose("y", "x", "c")


def mpp_of(sdata):
    return sdata.attrs.get("he2gene", {}).get("mpp", {}).get("he")


def read_all(reader):
    """Return the patches of all spots in the order of ``centres``: one ``(n, 3, size, size)`` uint8 per window."""
    out = tuple(np.empty((reader.n_spots, 3, w.size, w.size), np.uint8) for w in reader.plan.windows)
    for batch in reader:
        for whole, part in zip(out, batch.patches, strict=True):
            whole[batch.index] = part
    return out
