"""Quality of the pixels of a spot, without a model: glass, blur, noise, compression."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter, median_filter

from he2gene_sc.image import FAULTS, MIN_TISSUE, faults, tissue_share


@pytest.fixture(scope="module")
def patch():
    """Nuclei on stroma, with grain that all channels share, as in a sharp scan."""
    rng = np.random.default_rng(0)
    shape = (160, 160)
    nuclei = gaussian_filter(rng.normal(size=shape), 2.5)
    nuclei = (nuclei > np.quantile(nuclei, 0.75)).astype(float)
    fibres = gaussian_filter(rng.normal(size=shape), (0.8, 3))
    grain = gaussian_filter(rng.normal(size=shape), 0.5)
    picture = np.array([200.0, 150, 190])[:, None, None] - nuclei * np.array([110.0, 90, 50])[:, None, None]
    return np.clip(picture + 60 * fibres + 8 * grain, 0, 255).astype(np.uint8)[None]


def worst_fault(patches):
    (found,) = faults(patches, 0.7)
    return FAULTS[int(found.argmax())] if found.max() > 1 else ""


def jpeg(patch, quality):
    stream = io.BytesIO()
    Image.fromarray(np.moveaxis(patch[0], 0, -1)).save(stream, "JPEG", quality=quality)
    return np.moveaxis(np.asarray(Image.open(stream)), -1, 0)[None]


def test_a_sharp_patch_has_no_fault(patch):
    assert worst_fault(patch) == ""
    assert worst_fault(jpeg(patch, 80)) == ""


@pytest.mark.parametrize("sigma", [2, 4, 6])
def test_blur_is_detected(patch, sigma):
    assert worst_fault(gaussian_filter(patch.astype(float), (0, 0, sigma, sigma)).astype(np.uint8)) == "blurred"


@pytest.mark.parametrize("sd", [20, 40])
def test_noise_is_detected(patch, sd):
    noisy = patch + np.random.default_rng(1).normal(0, sd, patch.shape)
    assert worst_fault(np.clip(noisy, 0, 255).astype(np.uint8)) == "noisy"


@pytest.mark.parametrize(
    "kernel", [np.ones((1, 9)), np.ones((9, 1)), np.eye(9), np.eye(9)[::-1]], ids=["across", "down", "\\", "/"]
)
def test_motion_blur_is_detected(patch, kernel):
    moved = convolve(patch.astype(float), kernel[None, None] / kernel.sum())
    assert worst_fault(moved.astype(np.uint8)) == "blurred"


@pytest.mark.parametrize("sigma", [2, 4])
def test_blur_is_detected_in_a_compressed_image(patch, sigma):
    blurred = gaussian_filter(patch.astype(float), (0, 0, sigma, sigma)).astype(np.uint8)
    assert worst_fault(jpeg(blurred, 50)) == "blurred"
    assert worst_fault(jpeg(patch, 50)) == ""


def test_noise_that_the_channels_share_is_detected(patch):
    noisy = patch + np.random.default_rng(1).normal(0, 40, patch.shape[2:])
    assert worst_fault(np.clip(noisy, 0, 255).astype(np.uint8)) == "noisy"


def test_compression_is_detected_wherever_its_blocks_start(patch):
    for start in (0, 3):
        assert worst_fault(jpeg(patch, 5)[..., start:, start:]) == FAULTS[2]


def test_a_median_filter_is_detected_at_the_scale_of_chromatin():
    rng = np.random.default_rng(0)
    shape = (160, 160)
    cells, grain = gaussian_filter(rng.normal(size=shape), 2), gaussian_filter(rng.normal(size=shape), 0.5)
    picture = np.array([180.0, 140, 170])[:, None, None] + 25 * cells / cells.std() + 8 * grain
    sharp = np.clip(picture, 0, 255).astype(np.uint8)[None]
    filtered = median_filter(sharp, (1, 1, 7, 7))
    assert worst_fault(sharp) == ""
    assert worst_fault(filtered) == "blurred"
    # Differences of neighbouring pixels alone are as large as in a sharp scan.
    assert faults(filtered, float("nan"))[0, 0] < 1


def test_blur_is_detected_in_a_grainy_image(patch):
    blurred = gaussian_filter(patch.astype(float), (0, 0, 2, 2)) + np.random.default_rng(1).normal(0, 3, patch.shape)
    assert worst_fault(np.clip(blurred, 0, 255).astype(np.uint8)) == "blurred"


@pytest.mark.parametrize("share", [0.03, 0.2])
def test_single_wrong_pixels_count_as_noise(patch, share):
    rng = np.random.default_rng(1)
    wrong = np.where(rng.random(patch.shape[2:]) < share, 255 * rng.integers(0, 2, patch.shape[2:]), patch)
    assert worst_fault(wrong.astype(np.uint8)) == "noisy"


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_an_image_enlarged_by_copying_pixels_is_detected(patch, factor):
    assert worst_fault(patch.repeat(factor, 2).repeat(factor, 3)) == FAULTS[2]


def test_few_colours_are_detected(patch):
    assert worst_fault(patch // 32 * 32) == FAULTS[2]


def test_flat_patches_have_no_fault():
    assert (faults(np.full((2, 3, 64, 64), 230, np.uint8), 0.7) == 0).all()
    assert faults(np.zeros((2, 3, 4, 4), np.uint8), 0.7).shape == (2, 3)


def test_faults_do_not_depend_on_the_strength_of_the_stain(patch):
    paler = (255 - 0.5 * (255 - patch.astype(float))).astype(np.uint8)
    np.testing.assert_allclose(faults(paler, 0.7)[0, 0], faults(patch, 0.7)[0, 0], rtol=0.1)


@pytest.mark.parametrize("side", [8, 31, 145, 400])
def test_stained_or_structured_areas_are_tissue(side):
    rng = np.random.default_rng(0)
    glass = np.clip(225 + rng.normal(0, 1, (3, side, side)), 0, 255)
    half = glass.copy()
    half[:, : side // 2] -= 80
    found = tissue_share(np.stack([glass, half, np.zeros_like(glass)]).astype(np.uint8), 100.0)
    assert found.dtype == np.float32
    assert found[0] == found[2] == 0 < MIN_TISSUE
    assert found[1] == pytest.approx(0.5, abs=0.15)


def test_fat_is_tissue_although_most_of_it_is_clear():
    side = 145
    fat = np.full((1, 3, side, side), 228, np.uint8)
    fat[:, :, ::36] = fat[:, :, :, ::36] = 170
    assert tissue_share(fat, 100.0)[0] > 0.4
