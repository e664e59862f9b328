"""Quality of the pixels of a spot, without a model: tissue or glass, focus, noise and compression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Share of tissue below which a spot is taken as glass.
MIN_TISSUE = 0.25
#: Side in µm of the cells that are classified as tissue or glass, and most pixels per side of a cell.
_CELL_UM, _CELL_PX = 12.5, 4
#: Glass is bright in its darkest channel, and flat; areas that are black in all channels are not tissue.
_BRIGHT, _FLAT, _BLACK = 185.0, 4.0, 25.0
#: Brightest value, in its darkest channel, of stained structure in a reduced image, and side of a pixel's neighbourhood.
_STAINED, _NEIGHBOURHOOD = 200.0, 9
#: Most pixels per side on which focus is measured.
_SIDE = 192
#: Root mean square difference of pixels four apart below which a patch is flat and focus cannot be measured.
_MIN_CONTRAST = 3.0
#: Variance of the difference of neighbouring pixels, divided by that of pixels two apart: its value on a smooth surface, and
#: the least excess of a sharp image. her2st has .06 to .13; Gaussian blur of one pixel leaves .02, of two pixels .006.
_SMOOTH, _SHARP = 0.25, 0.025
#: The least excess inside blocks of 8 pixels, since JPEG makes sharp edges between them: her2st has at least .018 at quality
#: 30, and less than .005 at quality 50 after Gaussian blur of two pixels.
_SHARP_IN_BLOCKS = 0.0125
#: Least ratio of sharpness along a direction to that across it: above .6 at most spots of her2st, .3 after a motion of 5 pixels.
_ISOTROPY = 0.4
#: Least side in pixels on which both are measured; her2st passes on 31 and more.
_MIN_SIDE = 48
#: The least excess at this distance in µm, since grain and noise hide blur between neighbours. Spots of her2st at 0.7 µm/px have at
#: least .11, sharper scans at least .25; a median filter of 7 pixels leaves .07, Gaussian blur of two pixels .03.
_DETAIL_UM, _SHARP_DETAIL = 1.4, 0.085
#: Limits of noise in grey levels, not shared and shared by red and blue. Shared noise counts only where the image is rougher than
#: tissue (a ratio of variances): her2st has .3 to .45, and .56 if averaged to 3 µm/px.
_NOISE, _SHARED_NOISE, _ROUGH = 2.0, 8.0, 0.65
#: Steps (down, across) of the differences; each pair is at right angles.
_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))
#: Limit of the roughness of the edges of blocks of 8 pixels, divided by that inside: 1.5 for JPEG at quality 30, above 2 at quality 5.
_BLOCKINESS = 2.1
#: Limit of the share of equal neighbours where pixels four apart differ by more than ``_STEP`` grey levels: up to .03 in her2st,
#: .12 at JPEG quality 10, .5 if pixels were duplicated to double the size.
_EQUAL_SHARE, _STEP = 0.25, 10

#: Possible faults of the pixels, in the order of :func:`faults`.
FAULTS = ("blurred", "noisy", "compressed too far, enlarged or of few colours")


def tissue_share(patches: np.ndarray, um: float) -> np.ndarray:
    """Return the share ``(b,)`` of each uint8 patch ``(b, 3, s, s)`` that is neither glass nor black.

    The share is that of cells of 12.5 µm. A cell is tissue if it is stained or has structure, since fat is mostly clear.
    """
    side = patches.shape[-1]
    n = max(1, min(round(um / _CELL_UM), side // 2))
    # Average squares of pixels first; incomplete squares at the edge are dropped.
    factor = max(1, side // (n * _CELL_PX))
    m = side // factor
    x = patches[..., : m * factor, : m * factor].astype(np.float32)
    x = x if factor == 1 else x.reshape(*x.shape[:2], m, factor, m, factor).mean((3, 5))
    bounds = np.linspace(0, x.shape[-1], n + 1).astype(int)
    edges, pixels = bounds[:-1], bounds[1:] - bounds[:-1]
    area = pixels[:, None] * pixels[None]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(values, edges, axis=2), edges, axis=3) / area

    level = mean(x)
    structure = np.sqrt(np.maximum(mean(np.square(x)) - np.square(level), 0)).mean(1)
    tissue = ((structure > _FLAT) | (level.min(1) < _BRIGHT)) & (level.max(1) > _BLACK)
    return tissue.mean((1, 2)).astype(np.float32)


def tissue_pixels(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks ``(h, w)`` of a reduced uint8 image: stained or structured, and stained and structured.

    Each pixel is classified by its neighbourhood of 9 × 9 pixels. The first mask follows :func:`tissue_share`. The second is
    certainly tissue: it leaves out tinted glass and dust.
    """
    from scipy.ndimage import uniform_filter

    structure = np.zeros(image.shape[1:], np.float32)
    darkest, brightest = np.full_like(structure, np.inf), np.zeros_like(structure)
    for channel in image.astype(np.float32):
        level = uniform_filter(channel, _NEIGHBOURHOOD)
        structure += np.sqrt(
            np.maximum(uniform_filter(np.square(channel), _NEIGHBOURHOOD) - np.square(level), 0)
        ) / len(image)
        np.minimum(darkest, level, out=darkest)
        np.maximum(brightest, level, out=brightest)
    textured, seen = structure > _FLAT, brightest > _BLACK
    return (textured | (darkest < _BRIGHT)) & seen, textured & (darkest < _STAINED) & seen


def faults(patches: np.ndarray, mpp: float) -> np.ndarray:
    """Measure how blurred, noisy and compressed each patch is, ``(b, 3)``; a value above 1 is worse than a sharp scan.

    Columns are in the order of :data:`FAULTS`. The measures are ratios, so they do not depend on stain and contrast. They are 0
    where a patch is flat. ``mpp`` is the µm per pixel of the patches.
    """
    side = patches.shape[-1]
    if side < 8:
        return np.zeros((len(patches), len(FAULTS)), np.float32)
    low = max(0, (side - _SIDE) // 2)
    stored = patches[:, :, low : low + _SIDE, low : low + _SIDE]
    x = stored.astype(np.float32)
    grey = x.mean(1)
    lag_one, lag_two = ([_squared_difference(grey, lag, step) for step in _STEPS] for lag in (1, 2))
    near, far = (np.stack([x.mean((1, 2)) for x in squares]) for squares in (lag_one, lag_two))
    ratio = near[:2].mean(0) / np.maximum(far[:2].mean(0), 1e-3)
    blurred = _SHARP / np.maximum(ratio - _SMOOTH, 1e-3)
    if side >= _MIN_SIDE:
        detail = np.maximum(near / np.maximum(far, 1e-3) - _SMOOTH, 1e-3)
        isotropy = np.minimum(*(detail[i : i + 2].min(0) / detail[i : i + 2].max(0) for i in (0, 2)))
        blurred = np.max(
            [blurred, _SHARP_IN_BLOCKS / _sharpness_in_blocks(lag_one, lag_two), _ISOTROPY / isotropy], axis=0
        )
        blurred = np.maximum(blurred, _SHARP_DETAIL / _sharpness_of_detail(grey, mpp))
    noise, shared, own = _noise(x, grey)
    noisy = np.maximum(noise * own / _NOISE, np.minimum(shared / _SHARED_NOISE, ratio / _ROUGH))
    result = np.stack(
        [blurred, noisy, np.maximum(_blockiness(grey) / _BLOCKINESS, _equal_share(stored) / _EQUAL_SHARE)], axis=1
    )
    contrast = np.sqrt(sum(_squared_difference(grey, 4, step).mean((1, 2)) for step in _STEPS[:2]) / 2)
    return np.where(contrast[:, None] < _MIN_CONTRAST, 0, result).astype(np.float32)


def _squared_difference(grey: np.ndarray, lag: int, step: tuple[int, int]) -> np.ndarray:
    """Return the squared difference of pixels ``lag`` steps apart."""
    down, across = lag * step[0], lag * step[1]
    later, earlier = grey[:, down:], grey[:, : grey.shape[1] - down]
    if across < 0:
        later, earlier, across = earlier, later, -across
    found = later[:, :, across:] - earlier[:, :, : grey.shape[2] - across]
    return np.square(found, out=found)


def _sharpness_in_blocks(lag_one: Sequence[np.ndarray], lag_two: Sequence[np.ndarray]) -> np.ndarray:
    """Return the excess of sharpness over a smooth surface, without the edges of JPEG blocks (see ``_SMOOTH``)."""
    near, far = 0.0, 0.0
    for i in (0, 1):
        # Means by place in a block of 8. The roughest place is its edge, which two of the pairs two apart cross.
        n = lag_two[i].shape[2 - i] // 8 * 8
        places = [x.mean(1 + i)[:, :n].reshape(len(x), -1, 8).mean(1) for x in (lag_one[i], lag_two[i])]
        edge = places[0].argmax(1)[:, None]
        place = np.arange(8)
        near = near + np.where(place == edge, 0, places[0]).sum(1) / 7
        far = far + np.where((place == edge) | (place == (edge - 1) % 8), 0, places[1]).sum(1) / 6
    return np.maximum(near / np.maximum(far, 1e-3) - _SMOOTH, 1e-3)


def _sharpness_of_detail(grey: np.ndarray, mpp: float) -> np.ndarray:
    """Return the excess of sharpness over a smooth surface at a distance of 1.4 µm, ``(b,)`` (see ``_SHARP_DETAIL``).

    It is infinite, that is not measured, where 1.4 µm are fewer than two pixels or the patch is too small.
    """
    lag = round(_DETAIL_UM / mpp) if np.isfinite(mpp) else 0
    if not 2 <= lag <= grey.shape[1] // 8:
        return np.full(len(grey), np.inf)
    near, far = (sum(_squared_difference(grey, n, step).mean((1, 2)) for step in _STEPS[:2]) for n in (lag, 2 * lag))
    return np.maximum(near / np.maximum(far, 1e-3) - _SMOOTH, 1e-3)


def _equal_share(stored: np.ndarray) -> np.ndarray:
    """Return the share of neighbouring pixels that are equal in all channels, where the image around them is not flat."""
    found = []
    for x in (stored, stored.swapaxes(2, 3)):
        step = np.maximum(x[..., 4:], x[..., :-4]) - np.minimum(x[..., 4:], x[..., :-4])
        changes = (step > _STEP).any(1)
        equal = (x[..., 1:-3] == x[..., 2:-2]).all(1) & changes
        found.append(equal.sum((1, 2)) / np.maximum(changes.sum((1, 2)), 1))
    return (found[0] + found[1]) / 2


def _noise(x: np.ndarray, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimate noise by the median and by the mean (sensitive to single pixels), and the share not common to red and blue.

    Immerkaer, Comput Vis Image Underst 1996.
    """
    second = grey[:, :, :-2] - 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    second = second[:, :-2] - 2 * second[:, 1:-1] + second[:, 2:]
    second = np.abs(second)
    noise, shared = np.median(second, axis=(1, 2)) / (6 * 0.6745), second.mean((1, 2)) / (6 * np.sqrt(2 / np.pi))
    red, blue = x[:, 0, :, 1:] - x[:, 0, :, :-1], x[:, 2, :, 1:] - x[:, 2, :, :-1]
    power = np.sqrt(np.square(red).mean((1, 2)) * np.square(blue).mean((1, 2)))
    return noise, shared, 1 - (red * blue).mean((1, 2)) / np.maximum(power, 1e-6)


def _blockiness(grey: np.ndarray) -> np.ndarray:
    """Return root curvature at the roughest of eight places in a block, divided by that elsewhere, for both directions."""
    found = []
    for image in (grey, grey.transpose(0, 2, 1)):
        curvature = np.sqrt(np.abs(image[:, :, :-2] - 2 * image[:, :, 1:-1] + image[:, :, 2:]))
        n = curvature.shape[2] // 8 * 8
        if not n:
            return np.zeros(len(grey))
        places = curvature[:, :, :n].reshape(len(grey), grey.shape[1], -1, 8).mean((1, 2))
        pairs = (places + np.roll(places, -1, axis=1)).max(1)
        found.append(3 * pairs / (places.sum(1) - pairs + 0.3))
    return np.sqrt(found[0] * found[1])
