import threading

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from he2gene_sc.image import (
    Level,
    PatchReader,
    Pyramid,
    RecolouredReader,
    Recolouring,
    check_pixels,
    plan_windows,
    read_darkness,
    read_reduced,
    reflect_index,
    to_rgb_uint8,
)
from he2gene_sc.image import _blocks as blocks
from he2gene_sc.image import _reader as reader_module
from he2gene_sc.image import _recolour as recolour
from tests.helpers.pictures import read_all

forty_examples = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_image(height, width, seed=0, channels=3):
    return np.random.default_rng(seed).integers(1, 256, (channels, height, width), dtype=np.uint8)


def halved(image):
    h, w = image.shape[1] // 2, image.shape[2] // 2
    quads = image[:, : 2 * h, : 2 * w].reshape(3, h, 2, w, 2).astype(float)
    return np.floor(quads.mean(axis=(2, 4)) + 0.5).astype(np.uint8)


def naive_patch(image, centre, size, factor=1):
    for _ in range(int(np.log2(factor))):
        image = halved(image)
    x, y = (int(np.floor(v / factor - size / 2 + 0.5)) for v in centre)
    margin = size + 1
    padded = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    return padded[:, y + margin : y + margin + size, x + margin : x + margin + size]


def pyramid_of(image, n_levels):
    levels = [Level(image)]
    for i in range(1, n_levels):
        levels.append(Level(halved(levels[-1].array), 2.0**i))
    return Pyramid(tuple(levels))


def stored(image, library, chunks):
    if library == "numpy":
        return image
    if library == "dask":
        return da.from_array(image, chunks=(3, *chunks))
    array = zarr.create_array({}, shape=image.shape, chunks=(3, *chunks), dtype=image.dtype)
    array[:] = image
    return array


class CountingArray:
    """Counts how often each chunk of an array is touched."""

    def __init__(self, array, chunks):
        self._array, self.chunks = array, chunks
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.reads = np.zeros([-(-n // c) for n, c in zip(array.shape[1:], chunks[1:], strict=True)], int)

    def __getitem__(self, key):
        spans = (s.indices(n)[:2] for s, n in zip(key[1:], self.shape[1:], strict=True))
        rows, columns = (slice(a // c, -(-b // c)) for (a, b), c in zip(spans, self.chunks[1:], strict=True))
        self.reads[rows, columns] += 1
        return self._array[key]


class BrokenArray:
    shape, dtype, chunks = (3, 600, 600), np.dtype(np.uint8), (3, 600, 600)

    def __getitem__(self, key):
        raise OSError("chunk is damaged")


@pytest.fixture
def small_blocks(monkeypatch):
    """Shrink blocks, cells and cache so that tiny images are read in many pieces."""
    monkeypatch.setattr(blocks, "_MIN_CELL", 4)
    monkeypatch.setattr(blocks, "CACHE_BYTES", 600)
    monkeypatch.setattr(reader_module, "BLOCK_BYTES", 900)


# plan_windows


@pytest.mark.parametrize(("mpp", "level"), [(0.05, 3), (0.25, 1), (0.3, 0), (0.5, 0), (2.0, 0)])
def test_the_coarsest_level_that_is_fine_enough_for_the_finest_window_is_chosen(mpp, level):
    pyramid = pyramid_of(random_image(64, 64), 4)
    assert plan_windows(pyramid, mpp, (200.0, 100.0), 200).level == level


def test_rounding_error_in_mpp_does_not_change_the_level():
    pyramid = pyramid_of(random_image(64, 64), 3)
    assert plan_windows(pyramid, 0.25 * (1 + 1e-6), (100.0,), 200).level == 1


def test_wider_windows_are_averaged_by_powers_of_two():
    plan = plan_windows(Pyramid.single(random_image(8, 8)), 0.5, (100.0, 150.0, 200.0, 400.0), 200)
    assert [(w.factor, w.size) for w in plan.windows] == [(1, 200), (1, 300), (2, 200), (4, 200)]


@given(mpp=st.floats(0.05, 5), um=st.floats(20, 800), input_px=st.sampled_from([32, 224]), n_levels=st.integers(1, 4))
@forty_examples
def test_no_window_is_read_at_a_coarser_scale_than_the_encoder_input_unless_the_image_is_coarser(
    mpp, um, input_px, n_levels
):
    plan = plan_windows(pyramid_of(random_image(16, 16), n_levels), mpp, (um,), input_px)
    read_mpp = plan.mpp * plan.windows[0].factor
    assert read_mpp <= max(mpp, um / input_px * 1.002)
    assert abs(plan.windows[0].size * read_mpp - um) <= read_mpp * 0.51 or plan.windows[0].size == 1


@given(mpp=st.floats(0.05, 5), um=st.floats(20, 800))
@forty_examples
def test_a_pyramid_changes_neither_the_pixel_size_nor_the_patch_size(mpp, um):
    image = random_image(16, 16)
    plans = [plan_windows(pyramid_of(image, n), mpp, (um, 2 * um), 64) for n in (1, 3)]
    sizes = [[(w.size, w.factor * plan.scale) for w in plan.windows] for plan in plans]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("mpp", [0, -1.0, np.nan, np.inf])
def test_mpp_must_be_a_positive_number(mpp):
    with pytest.raises(ValueError, match="`mpp`"):
        plan_windows(Pyramid.single(random_image(8, 8)), mpp, (100.0,), 224)


@pytest.mark.parametrize("windows", [(), (0.0,), (100.0, -5.0), (np.nan,)])
def test_windows_must_have_positive_sizes(windows):
    with pytest.raises(ValueError, match="`windows_um`"):
        plan_windows(Pyramid.single(random_image(8, 8)), 0.5, windows, 224)


@pytest.mark.parametrize("scales", [(), (2.0,), (1.0, 1.0), (1.0, 4.0, 2.0)])
def test_scales_of_a_pyramid_must_increase_from_one(scales):
    with pytest.raises(ValueError, match="`levels`"):
        Pyramid(tuple(Level(random_image(8, 8), scale) for scale in scales))


def test_pyramid_of_a_two_dimensional_array_raises():
    with pytest.raises(ValueError, match="c, y, x"):
        Pyramid.single(np.zeros((8, 8), np.uint8))


# pixels


@given(n=st.integers(1, 12), before=st.integers(0, 40), after=st.integers(0, 40))
@forty_examples
def test_reflect_index_equals_numpy_pad(n, before, after):
    expected = np.pad(np.arange(n), (before, after), mode="reflect")
    np.testing.assert_array_equal(reflect_index(-before, before + n + after, n), expected)


def test_transparent_pixels_are_blended_with_white():
    pixels = np.array([100, 50, 200, 0], np.uint8).reshape(4, 1, 1)
    np.testing.assert_array_equal(to_rgb_uint8(pixels).ravel(), [255, 255, 255])
    pixels[3] = 255
    np.testing.assert_array_equal(to_rgb_uint8(pixels).ravel(), [100, 50, 200])
    pixels[3] = 51
    np.testing.assert_array_equal(to_rgb_uint8(pixels).ravel(), [224, 214, 244])


@pytest.mark.parametrize(("scale", "factor"), [(1 / 255, 255.0), (1.0, 1.0)])
def test_float_images_in_0_to_1_and_in_0_to_255_become_the_same_uint8(scale, factor):
    image = random_image(5, 6)
    pixels = (image * np.float32(scale)).astype(np.float32)
    assert check_pixels(3, pixels.dtype, pixels, "he") == factor
    np.testing.assert_array_equal(to_rgb_uint8(pixels, factor), image)


@pytest.mark.parametrize(("n_channels", "dtype"), [(1, "uint8"), (5, "uint8"), (3, "uint16"), (3, "bool")])
def test_images_with_an_unknown_white_level_raise_an_error_with_their_name(n_channels, dtype):
    with pytest.raises(ValueError, match="'slide'.*RGB H&E image"):
        check_pixels(n_channels, np.dtype(dtype), None, "slide")


@pytest.mark.parametrize("value", [-0.1, 300.0, np.nan])
def test_float_pixels_out_of_range_raise(value):
    sample = np.full((3, 2, 2), 0.5)
    sample[0, 0, 0] = value
    with pytest.raises(ValueError, match="float pixels"):
        check_pixels(3, sample.dtype, sample, "he")
    with pytest.raises(ValueError, match="outside"):
        to_rgb_uint8(sample, 255.0)


def test_exact_black_becomes_white_and_near_black_is_kept():
    image = np.zeros((3, 1, 3), np.uint8)
    image[:, 0, 1] = 1
    image[2, 0, 2] = 7
    np.testing.assert_array_equal(to_rgb_uint8(image)[:, 0].T, [[255, 255, 255], [1, 1, 1], [0, 0, 7]])
    assert not to_rgb_uint8(image, paint_black=False)[:, 0, 0].any()


def test_rgb_uint8_without_black_is_not_copied():
    image = random_image(4, 4)
    assert to_rgb_uint8(image) is image


# PatchReader

positions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@given(data=st.data(), height=st.integers(1, 40), width=st.integers(1, 40), spots=positions)
@forty_examples
def test_patches_equal_crop_and_pad_for_any_array_chunks_batch_size_and_order(small_blocks, data, height, width, spots):
    image = random_image(height, width)
    library = data.draw(st.sampled_from(["numpy", "dask", "zarr"]))
    chunks = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    batch_size = data.draw(st.integers(1, 13))
    um = data.draw(st.sampled_from([3.0, 8.0, 60.0]))
    # Spots lie from border to border, and on both of them.
    centres = np.array(spots) / 4 * [width, height]
    reader = PatchReader(
        Pyramid.single(stored(image, library, chunks)),
        centres,
        1.0,
        windows_um=(um, 2 * um),
        input_px=int(um),
        batch_size=batch_size,
    )
    assert [(w.factor, w.size) for w in reader.plan.windows] == [(1, um), (2, um)]
    narrow, wide = read_all(reader)
    for i, centre in enumerate(centres):
        np.testing.assert_array_equal(narrow[i], naive_patch(image, centre, int(um)))
        if min(height, width) > 1:
            np.testing.assert_array_equal(wide[i], naive_patch(image, centre, int(um), 2))


@pytest.mark.parametrize("library", ["numpy", "dask", "zarr"])
@pytest.mark.parametrize("size", [(37, 53), (40, 64)])
def test_windows_reduced_by_two_and_four_average_aligned_squares(small_blocks, library, size):
    image = random_image(*size)
    centres = np.random.default_rng(1).uniform(0, 1, (30, 2)) * size[::-1]
    reader = PatchReader(
        Pyramid.single(stored(image, library, (16, 16))), centres, 0.5, windows_um=(4.0, 8.0, 16.0), input_px=8
    )
    assert [(w.factor, w.size) for w in reader.plan.windows] == [(1, 8), (2, 8), (4, 8)]
    for window, patches in zip(reader.plan.windows, read_all(reader), strict=True):
        for centre, patch in zip(centres, patches, strict=True):
            np.testing.assert_array_equal(patch, naive_patch(image, centre, 8, window.factor))


@pytest.mark.parametrize("mpp", [0.5, 0.25, 0.2])
def test_patches_are_the_same_with_and_without_a_pyramid(mpp):
    image = random_image(96, 128)
    centres = np.random.default_rng(2).uniform(0, 1, (20, 2)) * [128, 96]
    options = {"windows_um": (8.0, 20.0), "input_px": 8}
    with_levels = PatchReader(pyramid_of(image, 3), centres, mpp, **options)
    without = PatchReader(Pyramid.single(image), centres, mpp, **options)
    assert with_levels.plan.level > 0
    for a, b in zip(read_all(with_levels), read_all(without), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_image_with_channels_last_in_memory_gives_the_same_patches():
    image = random_image(41, 53)
    channels_last = np.ascontiguousarray(image.transpose(1, 2, 0)).transpose(2, 0, 1)
    options = {"centres": np.array([[20.0, 20.0], [3.0, 40.0]]), "mpp": 1.0, "windows_um": (8.0, 20.0), "input_px": 8}
    expected = read_all(PatchReader(Pyramid.single(image), **options))
    for a, b in zip(read_all(PatchReader(Pyramid.single(channels_last), **options)), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_transparent_images_are_read_as_white():
    image = np.concatenate([random_image(20, 20), np.zeros((1, 20, 20), np.uint8)])
    reader = PatchReader(Pyramid.single(image), np.array([[10.0, 10.0]]), 1.0, windows_um=(8.0,), input_px=8)
    assert (read_all(reader)[0] == 255).all()


@pytest.mark.parametrize(("chunk", "windows"), [(512, (60.0,)), (512, (60.0, 1200.0)), (200, (60.0, 500.0))])
def test_each_chunk_is_decoded_at_most_once(chunk, windows):
    array = CountingArray(random_image(1500, 1800), (3, chunk, chunk))
    centres = np.random.default_rng(0).permutation(np.mgrid[20:1780:90, 20:1480:90].reshape(2, -1).T).astype(float)
    reader = PatchReader(Pyramid.single(array), centres, 1.0, windows_um=windows, input_px=60)
    assert sum(len(batch.index) for batch in reader) == len(centres)
    assert array.reads.max() == 1


class MeetingArray(CountingArray):
    """An array whose first reads wait for one another."""

    def __init__(self, array, chunks, n):
        super().__init__(array, chunks)
        self._first, self._meet = n, threading.Barrier(n, timeout=10)
        self._lock = threading.Lock()

    def __getitem__(self, key):
        with self._lock:
            self._first -= 1
            wait = self._first >= 0
            pixels = super().__getitem__(key)
        if wait:
            self._meet.wait()
        return pixels


def test_several_readers_decode_at_once_each_chunk_once_and_give_the_same(monkeypatch):
    monkeypatch.setattr(reader_module, "BLOCK_BYTES", 3 * 600 * 600)
    array = MeetingArray(random_image(1500, 1800), (3, 256, 256), 3)
    centres = np.random.default_rng(0).permutation(np.mgrid[20:1780:90, 20:1480:90].reshape(2, -1).T).astype(float)
    options = {"windows_um": (60.0, 240.0), "input_px": 60}
    one, three = (
        PatchReader(Pyramid.single(source), centres, 1.0, n_readers=n, **options)
        for source, n in ((array._array, 1), (array, 3))
    )
    assert len(three._blocks) > 6
    for expected, found in zip(read_all(one), read_all(three), strict=True):
        np.testing.assert_array_equal(expected, found)
    assert array.reads.max() == 1


@pytest.mark.parametrize("n_readers", [1, 3])
def test_an_error_of_one_reader_ends_all(n_readers):
    array = CountingArray(random_image(1500, 1800), (3, 256, 256))
    read = array.__class__.__getitem__

    def broken(self, key):
        if key[1].start >= 768:
            raise OSError("chunk is damaged")
        return read(self, key)

    array.__class__ = type("Broken", (CountingArray,), {"__getitem__": broken})
    centres = np.mgrid[20:1780:90, 20:1480:90].reshape(2, -1).T.astype(float)
    reader = PatchReader(Pyramid.single(array), centres, 1.0, windows_um=(60.0,), input_px=60, n_readers=n_readers)
    with pytest.raises(OSError, match="chunk is damaged"):
        list(reader)
    assert not any(thread.name.startswith("he2gene") for thread in threading.enumerate())


def test_chunks_far_from_all_spots_are_not_read():
    array = CountingArray(random_image(1100, 2100), (3, 512, 512))
    list(PatchReader(Pyramid.single(array), np.array([[100.0, 100.0]]), 1.0, windows_um=(50.0,), input_px=50))
    assert array.reads.sum() == 1


@given(n=st.integers(0, 30), batch_size=st.integers(1, 12))
@forty_examples
def test_batches_hold_every_spot_once_and_their_sizes_differ_by_at_most_one(n, batch_size):
    centres = np.random.default_rng(n).uniform(0, 50, (n, 2))
    reader = PatchReader(
        Pyramid.single(random_image(50, 50)), centres, 1.0, windows_um=(5.0,), input_px=5, batch_size=batch_size
    )
    index = [batch.index for batch in reader]
    assert len(index) == len(reader)
    sizes = [len(part) for part in index]
    assert max(sizes, default=0) <= batch_size
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    assert sorted(np.concatenate([*index, []])) == list(range(n))


def test_batches_use_arrays_that_the_caller_allocates():
    allocated = []

    def allocate(shape):
        allocated.append(np.zeros(shape, np.uint8))
        return allocated[-1]

    reader = PatchReader(
        Pyramid.single(random_image(30, 30)),
        np.full((3, 2), 15.0),
        1.0,
        windows_um=(5.0,),
        input_px=5,
        batch_size=2,
        allocate=allocate,
    )
    assert all(any(batch.patches[0] is memory for memory in allocated) for batch in reader)


def test_an_error_in_the_reading_thread_is_raised_in_the_caller():
    reader = PatchReader(Pyramid.single(BrokenArray()), np.full((4, 2), 300.0), 1.0, windows_um=(9.0,), input_px=9)
    with pytest.raises(OSError, match="chunk is damaged"):
        list(reader)


def test_leaving_the_loop_early_stops_the_thread():
    reader = PatchReader(
        Pyramid.single(random_image(60, 60)), np.full((50, 2), 30.0), 1.0, windows_um=(9.0,), input_px=9, batch_size=1
    )
    batches = iter(reader)
    next(batches)
    assert any(thread.name.startswith("he2gene-patches") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("he2gene-patches") for thread in threading.enumerate())


@pytest.mark.parametrize("centres", [[[-0.1, 5]], [[5, 10.1]], [[np.nan, 5]], [5.0, 5.0], [[1.0, 2.0, 3.0]]])
def test_centres_must_be_finite_pairs_inside_the_image(centres):
    with pytest.raises(ValueError, match="`centres`"):
        PatchReader(Pyramid.single(random_image(10, 10)), np.array(centres), 1.0, windows_um=(5.0,), input_px=5)


# read_reduced


@pytest.mark.parametrize("library", ["numpy", "dask", "zarr"])
def test_read_reduced_averages_aligned_squares(small_blocks, library):
    image = random_image(80, 96)
    reduced = read_reduced(Pyramid.single(stored(image, library, (7, 50))), 80 * 96 // 16)
    np.testing.assert_array_equal(reduced, halved(halved(image)))


@given(height=st.integers(1, 70), width=st.integers(1, 70), max_pixels=st.integers(1, 3000), rows=st.integers(1, 70))
@forty_examples
def test_read_reduced_halves_as_rarely_as_the_bound_allows(small_blocks, height, width, max_pixels, rows):
    image = stored(random_image(height, width), "dask", (min(rows, height), width))
    sizes = [(max(1, height >> times), max(1, width >> times)) for times in range(8)]
    expected = next((h, w) for h, w in sizes if h * w <= max_pixels)
    assert read_reduced(Pyramid.single(image), max_pixels).shape == (3, *expected)


def test_read_reduced_gives_the_same_image_from_a_coarser_level():
    image = random_image(64, 96)
    np.testing.assert_array_equal(
        read_reduced(pyramid_of(image, 3), 64 * 96 // 16), read_reduced(Pyramid.single(image), 64 * 96 // 16)
    )


@pytest.mark.parametrize(("chunk", "reads"), [(60, 1), (30, 3)])
def test_squares_of_an_image_of_one_chunk_are_cut_from_one_read(chunk, reads):
    image, centres = random_image(60, 60), np.linspace([10.0, 20], [50, 40], 5)
    array = CountingArray(image, (3, chunk, chunk))
    found = read_darkness(Pyramid.single(array), centres, 8.0)
    expected = [255 - image[:, int(y) - 4 : int(y) + 4, int(x) - 4 : int(x) + 4].mean() for x, y in centres]
    np.testing.assert_allclose(found.mean, expected, atol=0.5)
    assert array.reads.max() == reads


@pytest.mark.parametrize(
    ("value", "kind"), [(np.nan, r" \(NaN or infinite\)"), (np.inf, r" \(NaN or infinite\)"), (3.0, "")]
)
@pytest.mark.parametrize("lazy", [False, True])
def test_the_error_for_an_invalid_float_pixel_gives_its_place(value, kind, lazy):
    image = np.full((3, 300, 400), 0.5, np.float32)
    image[1, 210, 333] = value
    array = da.from_array(image, chunks=(3, 128, 128)) if lazy else image
    reader = PatchReader(
        Pyramid.single(array), np.array([[340.0, 200.0]]), 1.0, windows_um=(100.0,), input_px=32, factor=255.0
    )
    with pytest.raises(
        ValueError,
        match=rf"a block has 1 pixel\(s\) outside 0\.\.1{kind}, the first in row 210, column 333; .* make them white, 1: ",
    ):
        read_all(reader)


def test_small_overshoots_of_float_pixels_are_clipped_and_ambiguous_scales_raise():
    assert check_pixels(3, np.float32, np.array([-0.01, 1.02]), "he") == 255.0
    assert check_pixels(3, np.float32, np.array([0.0, 256.0]), "he") == 1.0
    with pytest.raises(ValueError, match="float pixels from 0 to 2.55"):
        check_pixels(3, np.float32, np.array([0.0, 2.55]), "he")
    block = to_rgb_uint8(np.full((3, 2, 2), 1.02, np.float32), 255.0)
    assert (block == 255).all()


def test_chunks_between_distant_spots_are_not_read():
    array = CountingArray(random_image(500, 3000), (3, 256, 256))
    centres = np.array([[100.0, 100.0], [1400.0, 100.0], [2900.0, 100.0]])
    reader = PatchReader(Pyramid.single(array), centres, 1.0, windows_um=(50.0,), input_px=50)
    for centre, patch in zip(centres, read_all(reader)[0], strict=True):
        np.testing.assert_array_equal(patch, naive_patch(array._array, centre, 50))
    assert array.reads.sum() == 3


def test_a_small_cache_keeps_the_chunks_that_are_needed_next(monkeypatch):
    """Four bands over a wide image need the same chunks; half of them fit into the cache."""
    array = CountingArray(random_image(1024, 8192), (3, 1024, 256))
    centres = np.stack(np.meshgrid(np.arange(128.0, 8192, 256), [100.0, 400.0, 650.0, 900.0]), axis=-1).reshape(-1, 2)
    monkeypatch.setattr(blocks, "CACHE_BYTES", 16 * 3 * 1024 * 256)
    monkeypatch.setattr(blocks, "_MAX_CELL", 256)
    monkeypatch.setattr(reader_module, "BLOCK_BYTES", 3 * 50 * 2048)
    reader = PatchReader(Pyramid.single(array), centres, 1.0, windows_um=(50.0,), input_px=50)
    assert len(reader._blocks) == 16
    assert sum(len(batch.index) for batch in reader) == len(centres)
    assert array.reads.sum() <= 2.5 * array.reads.size


# Recolouring


def test_a_recolouring_that_changes_nothing_returns_the_pixels():
    patches = random_image(40, 40)[None]
    same = Recolouring(np.eye(3), np.zeros(3), 0.0)(patches)
    assert same.dtype == np.uint8
    assert same.shape == patches.shape
    # The table merges four neighbouring levels.
    assert np.abs(same.astype(int) - patches).max() <= 2


def test_more_stain_is_darker_and_a_third_of_a_turn_swaps_the_channels():
    patches = random_image(40, 40)[None]
    stronger = Recolouring(1.5 * np.eye(3), np.zeros(3), 0.0)(patches)
    expected = 256 * ((patches + 1.0) / 256) ** 1.5 - 1
    assert np.abs(stronger - expected).max() < 4
    turned = Recolouring(np.eye(3), np.zeros(3), 1 / 3)(patches)
    assert np.abs(turned.astype(int) - np.roll(patches, 1, axis=1)).max() <= 3


def test_a_stronger_stain_moves_each_colour_as_its_stain_absorbs(monkeypatch):
    """A colour of haematoxylin alone becomes what the law of Lambert and Beer says of a stronger haematoxylin."""
    from skimage.color import rgb_from_hed

    monkeypatch.setattr(recolour, "_STRENGTHS", (1.4, 1.4))
    for name in ("_STAIN_SD", "_LIGHT_SD", "_HUE"):
        monkeypatch.setattr(recolour, name, 0.0)
    stronger = Recolouring.draw(np.random.default_rng(0))
    np.testing.assert_allclose(stronger.mixing, 1.4 * np.eye(3), atol=1e-9)
    monkeypatch.setattr(recolour, "_STAIN_SD", 0.5)
    varied = Recolouring.draw(np.random.default_rng(0)).mixing
    # Each stain keeps its direction in optical density.
    for stain in rgb_from_hed:
        cosine = (stain @ varied) @ stain / np.linalg.norm(stain @ varied) / np.linalg.norm(stain)
        assert cosine == pytest.approx(1)
    assert np.ptp([np.linalg.norm(stain @ varied) / np.linalg.norm(stain) for stain in rgb_from_hed]) > 0.2


def test_a_lamp_with_less_red_darkens_red_alone():
    patches = random_image(40, 40)[None]
    found = Recolouring(np.eye(3), np.array([0.3, 0.0, 0.0]), 0.0)(patches).astype(int)
    expected = 256 * np.exp(-0.3) * (patches[:, 0] + 1.0) / 256 - 1
    assert np.abs(found[:, 0] - expected).max() < 3
    assert np.abs(found[:, 1:] - patches[:, 1:]).max() <= 2


def test_draws_differ_between_seeds_alone():
    patches = random_image(40, 40)[None]
    one, same, other = (Recolouring.draw(np.random.default_rng(seed))(patches) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one.astype(int) - other).mean() > 3


def test_a_recoloured_reader_yields_the_recoloured_windows():
    recolouring = Recolouring.draw(np.random.default_rng(0))
    arguments = (pyramid_of(random_image(300, 300), 2), np.array([[150.0, 150.0], [100.0, 80.0]]), 1.0)
    options = {"windows_um": (50.0, 100.0), "input_px": 40}
    plain = {i: p for batch in PatchReader(*arguments, **options) for i, p in enumerate(batch.patches)}
    (batch,) = RecolouredReader(*arguments, recolouring=recolouring, **options)
    for i, patches in enumerate(batch.patches):
        np.testing.assert_array_equal(patches, recolouring(plain[i]))
