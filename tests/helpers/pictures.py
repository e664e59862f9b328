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
