"""What the pixels of a spot show before any model reads them: tissue or glass, focus, noise and compression."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Share of tissue below which a spot is taken to lie on glass.
MIN_TISSUE = 0.25
#: Side of the cells that are tissue or not, µm, and the pixels that a cell is read by at most.
_CELL_UM, _CELL_PX = 12.5, 4
#: Glass is bright in its darkest channel and flat; what is black in all channels is no slide.
_BRIGHT, _FLAT, _BLACK = 185.0, 4.0, 25.0
#: Darkest channel of stained structure in a reduced image, and the side of the surroundings that a pixel is read by.
_STAINED, _AROUND = 200.0, 9
#: Pixels of a side that focus is judged by at most.
_SIDE = 192
#: Root mean square difference of pixels four apart below which there is nothing to be sharp.
_PLAIN = 3.0
#: Variance of neighbouring pixels' difference, over that of pixels two apart, of a surface that is smooth, and how much more
#: a sharp image has. Gaussian blur of one pixel leaves .02 of it, of two .006; her2st has .06 to .13.
_SMOOTH, _SHARP = 0.25, 0.025
#: The same within blocks of 8 pixels, whose edges look sharp after JPEG: her2st at quality 30 has .018 and more, at 50 after
#: Gaussian blur of two pixels under .005.
_SHARP_WITHIN = 0.0125
#: Share of the sharpness across a direction that is left along it: in her2st over .6 at most spots, .3 after a motion of 5 pixels.
_ALONG = 0.4
#: Least side, pixels, on which both are told; her2st passes on 31 and more.
_ENOUGH = 48
#: The same of structure of this size, µm, over that of twice the size: grain and noise hide that of neighbours. Spots of her2st at
#: 0.7 µm/px have .11 and more, sharper scans of others .25 and more; a median of 7 pixels leaves .07, Gaussian blur of two .03.
_DETAIL_UM, _SHARP_DETAIL = 1.4, 0.085
#: Noise in grey levels that red and blue do not share; that they share, where the image is rougher than tissue is: her2st has
#: a ratio of .3 to .45, averaged down to 3 µm/px .56.
_NOISE, _SHARED_NOISE, _ROUGH = 2.0, 8.0, 0.65
#: Steps down and across that differences are taken along: each pair is at right angles.
_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))
#: How many times rougher the edges of blocks of 8 pixels are than their inside: JPEG at quality 30 1.5, at 5 over 2.
_BLOCKS = 2.1
#: Share of equal neighbours where pixels four apart differ by more than ``_STEP`` grey levels: her2st has up to .03, at JPEG
#: quality 10 .12. Pixels that were copied to twice the size have .5.
_EQUAL, _STEP = 0.25, 10

#: What may be wrong with the pixels, in the order of :func:`faults`.
FAULTS = ("blurred", "noisy", "compressed too far, enlarged or of few colours")


def tissue_share(patches: np.ndarray, um: float) -> np.ndarray:
    """Share ``(b,)`` of each uint8 patch ``(b, 3, s, s)`` that is neither glass nor black.

    Cells of 12.5 µm are counted, since fat is mostly clear: one is tissue where it is stained or has structure.
    """
    side = patches.shape[-1]
    n = max(1, min(round(um / _CELL_UM), side // 2))
    x = _shrunk(patches, max(1, side // (n * _CELL_PX)))
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
    """Masks ``(h, w)`` of a reduced uint8 image by surroundings of 9 × 9 pixels: stained or structured, and both.

    The first is the rule of :func:`tissue_share`; the second is tissue beyond doubt, without tinted glass and dust.
    """
    from scipy.ndimage import uniform_filter

    structure = np.zeros(image.shape[1:], np.float32)
    darkest, brightest = np.full_like(structure, np.inf), np.zeros_like(structure)
    for channel in image.astype(np.float32):
        level = uniform_filter(channel, _AROUND)
        structure += np.sqrt(np.maximum(uniform_filter(np.square(channel), _AROUND) - np.square(level), 0)) / len(image)
        np.minimum(darkest, level, out=darkest)
        np.maximum(brightest, level, out=brightest)
    textured, seen = structure > _FLAT, brightest > _BLACK
    return (textured | (darkest < _BRIGHT)) & seen, textured & (darkest < _STAINED) & seen


def faults(patches: np.ndarray, mpp: float) -> np.ndarray:
    """How blurred, noisy and compressed each patch is as stored, ``(b, 3)``; above 1 more than a sharp scan.

    The measures are ratios, so that stain and contrast do not count; 0 where a patch is flat. ``mpp`` is that of the pixels of
    the patches. Order: :data:`FAULTS`.
    """
    side = patches.shape[-1]
    if side < 8:
        return np.zeros((len(patches), len(FAULTS)), np.float32)
    low = max(0, (side - _SIDE) // 2)
    stored = patches[:, :, low : low + _SIDE, low : low + _SIDE]
    x = stored.astype(np.float32)
    grey = x.mean(1)
    one, two = ([_squares(grey, lag, step) for step in _STEPS] for lag in (1, 2))
    near, far = (np.stack([x.mean((1, 2)) for x in squares]) for squares in (one, two))
    ratio = near[:2].mean(0) / np.maximum(far[:2].mean(0), 1e-3)
    blurred = _SHARP / np.maximum(ratio - _SMOOTH, 1e-3)
    if side >= _ENOUGH:
        detail = np.maximum(near / np.maximum(far, 1e-3) - _SMOOTH, 1e-3)
        along = np.minimum(*(detail[i : i + 2].min(0) / detail[i : i + 2].max(0) for i in (0, 2)))
        blurred = np.max([blurred, _SHARP_WITHIN / _within_blocks(one, two), _ALONG / along], axis=0)
        blurred = np.maximum(blurred, _SHARP_DETAIL / _detail(grey, mpp))
    noise, shared, own = _noise(x, grey)
    noisy = np.maximum(noise * own / _NOISE, np.minimum(shared / _SHARED_NOISE, ratio / _ROUGH))
    result = np.stack([blurred, noisy, np.maximum(_blocks(grey) / _BLOCKS, _equal(stored) / _EQUAL)], axis=1)
    contrast = np.sqrt(sum(_squares(grey, 4, step).mean((1, 2)) for step in _STEPS[:2]) / 2)
    return np.where(contrast[:, None] < _PLAIN, 0, result).astype(np.float32)


def _shrunk(patches: np.ndarray, factor: int) -> np.ndarray:
    """Average squares of ``factor`` pixels; what is left over at the edge is left out."""
    n = patches.shape[-1] // factor
    x = patches[..., : n * factor, : n * factor].astype(np.float32)
    return x if factor == 1 else x.reshape(*x.shape[:2], n, factor, n, factor).mean((3, 5))


def _squares(grey: np.ndarray, lag: int, step: tuple[int, int]) -> np.ndarray:
    """Square difference of pixels ``lag`` steps apart."""
    down, across = lag * step[0], lag * step[1]
    later, earlier = grey[:, down:], grey[:, : grey.shape[1] - down]
    if across < 0:
        later, earlier, across = earlier, later, -across
    found = later[:, :, across:] - earlier[:, :, : grey.shape[2] - across]
    return np.square(found, out=found)


def _within_blocks(one: Sequence[np.ndarray], two: Sequence[np.ndarray]) -> np.ndarray:
    """Variance of the difference of neighbours over that two apart, less that of a smooth surface, without edges of blocks."""
    near, far = 0.0, 0.0
    for i in (0, 1):
        # By place in a block of 8; the roughest is its edge, which two pairs of pixels two apart lie across.
        n = two[i].shape[2 - i] // 8 * 8
        places = [x.mean(1 + i)[:, :n].reshape(len(x), -1, 8).mean(1) for x in (one[i], two[i])]
        edge = places[0].argmax(1)[:, None]
        place = np.arange(8)
        near = near + np.where(place == edge, 0, places[0]).sum(1) / 7
        far = far + np.where((place == edge) | (place == (edge - 1) % 8), 0, places[1]).sum(1) / 6
    return np.maximum(near / np.maximum(far, 1e-3) - _SMOOTH, 1e-3)


def _detail(grey: np.ndarray, mpp: float) -> np.ndarray:
    """Variance of the difference of pixels 1.4 µm apart over that of twice as far, less that of a smooth surface, ``(b,)``.

    Infinite where 1.4 µm are fewer than two pixels, or the patch is too small: nothing is measured there.
    """
    lag = round(_DETAIL_UM / mpp) if np.isfinite(mpp) else 0
    if not 2 <= lag <= grey.shape[1] // 8:
        return np.full(len(grey), np.inf)
    near, far = (sum(_squares(grey, n, step).mean((1, 2)) for step in _STEPS[:2]) for n in (lag, 2 * lag))
    return np.maximum(near / np.maximum(far, 1e-3) - _SMOOTH, 1e-3)


def _equal(stored: np.ndarray) -> np.ndarray:
    """Share of neighbouring pixels that are equal in all channels, where the image changes around them."""
    found = []
    for x in (stored, stored.swapaxes(2, 3)):
        step = np.maximum(x[..., 4:], x[..., :-4]) - np.minimum(x[..., 4:], x[..., :-4])
        changes = (step > _STEP).any(1)
        equal = (x[..., 1:-3] == x[..., 2:-2]).all(1) & changes
        found.append(equal.sum((1, 2)) / np.maximum(changes.sum((1, 2)), 1))
    return (found[0] + found[1]) / 2


def _noise(x: np.ndarray, grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise by the median and by the mean, which counts single pixels too, and the share that red and blue do not share.

    Immerkaer, Comput Vis Image Underst 1996.
    """
    second = grey[:, :, :-2] - 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    second = second[:, :-2] - 2 * second[:, 1:-1] + second[:, 2:]
    second = np.abs(second)
    noise, shared = np.median(second, axis=(1, 2)) / (6 * 0.6745), second.mean((1, 2)) / (6 * np.sqrt(2 / np.pi))
    red, blue = x[:, 0, :, 1:] - x[:, 0, :, :-1], x[:, 2, :, 1:] - x[:, 2, :, :-1]
    power = np.sqrt(np.square(red).mean((1, 2)) * np.square(blue).mean((1, 2)))
    return noise, shared, 1 - (red * blue).mean((1, 2)) / np.maximum(power, 1e-6)


def _blocks(grey: np.ndarray) -> np.ndarray:
    """Root curvature at the roughest of the eight places in a block over that elsewhere, both directions together."""
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
