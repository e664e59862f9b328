"""Whole slides are read by region: only the needed tiles, in any thread and process, or with an error."""

import gc
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
import tifffile
import zarr
from spatialdata.transformations import Identity

import he2gene_sc as hg
from he2gene_sc._core.images import pyramid_of
from he2gene_sc.image import PatchReader, Pyramid, direct
from he2gene_sc.io._tiled import TiledImage
from tests.helpers.pictures import picture, read_all


@pytest.fixture
def slide(tmp_path):
    """Write a slide of two levels of 64-px tiles; return it with its pixels."""
    full = picture(500, 700)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(full, subifds=1, photometric="rgb", tile=(64, 64), compression="zlib")
        file.write(full[::2, ::2], subfiletype=1, photometric="rgb", tile=(64, 64), compression="zlib")
    return tmp_path / "a.tif", full.transpose(2, 0, 1)


def image_of(path):
    return pyramid_of(hg.io.read_he(path, mpp=0.5), "he")


def test_the_reader_finds_the_file_behind_dask(slide):
    path, full = slide
    levels = [direct(level.array) for level in image_of(path).levels]
    assert all(isinstance(level, TiledImage) for level in levels)
    np.testing.assert_array_equal(levels[0], full)
    np.testing.assert_array_equal(levels[1], full[:, ::2, ::2])


@pytest.mark.parametrize(
    "key",
    [
        np.s_[:, 10:200, 63:65],
        np.s_[1, 3, 690:],
        np.s_[:, ::7, -5:],
        np.s_[..., 5:3],
        np.s_[[2, 0], 499, 699],
        np.s_[:, 400:100:-3, ::-1],
        np.s_[0],
    ],
)
def test_it_is_indexed_like_an_array(slide, key):
    path, full = slide
    np.testing.assert_array_equal(direct(image_of(path).levels[0].array)[key], full[key])


def test_only_the_tiles_of_a_region_are_decoded(slide, monkeypatch):
    image = direct(image_of(slide[0]).levels[0].array)
    decoded = []
    decode = TiledImage._decode

    def counted(self, plane, index):
        decoded.append(index)
        return decode(self, plane, index)

    monkeypatch.setattr(TiledImage, "_decode", counted)
    image[:, 70:130, 0:64]
    assert decoded == [11, 22]


def test_an_image_that_was_changed_is_read_through_dask(slide):
    path, full = slide
    array = image_of(path).levels[0].array
    changed = {
        "cropped": (array[:, 5:, :], full[:, 5:]),
        "inverted": (255 - array, 255 - full),
        "rechunked": (array.rechunk((3, 100, 100)), full),
        "reordered": (array[::-1], full[::-1]),
        "in memory": (array.persist(scheduler="synchronous"), full),
    }
    for name, (made, expected) in changed.items():
        assert direct(made) is made, name
        np.testing.assert_array_equal(made.compute(scheduler="synchronous"), expected)


def test_cropping_and_writing_an_object_keeps_the_pixels(slide, tmp_path):
    path, full = slide
    sdata = hg.io.read_he(path, mpp=0.5)
    cropped = sd.bounding_box_query(
        sdata, axes=("x", "y"), min_coordinate=[100, 50], max_coordinate=[300, 250], target_coordinate_system="global"
    )
    pyramid = pyramid_of(cropped, "he")
    assert not isinstance(direct(pyramid.levels[0].array), TiledImage)
    np.testing.assert_array_equal(np.asarray(pyramid.levels[0].array), full[:, 50:250, 100:300])
    sdata.write(tmp_path / "a.zarr")
    array = pyramid_of(sd.read_zarr(tmp_path / "a.zarr"), "he").levels[0].array
    assert isinstance(direct(array), zarr.Array)
    np.testing.assert_array_equal(direct(array)[:], full)


def test_zarr_arrays_are_read_without_dask_and_others_are_not():
    stored = zarr.create_array({}, shape=(3, 40, 40), chunks=(3, 10, 10), dtype="uint8")
    assert direct(da.from_zarr(stored)) is stored
    for array in (np.ones((3, 4, 4)), da.ones((3, 4, 4)), da.from_array(np.ones((3, 4, 4)), chunks=2)):
        assert direct(array) is array


def test_patches_equal_those_of_pixels_in_memory(slide):
    path, full = slide
    centres = np.random.default_rng(0).uniform(0, 1, (30, 2)) * [700, 500]
    options = {"windows_um": (20.0, 60.0), "input_px": 40, "batch_size": 7}
    read = read_all(PatchReader(image_of(path), centres, 0.5, **options))
    for a, b in zip(read, read_all(PatchReader(Pyramid.single(full), centres, 0.5, **options)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_may_be_read_by_many_threads(slide):
    path, full = slide
    image = direct(image_of(path).levels[0].array)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda y: image[:, y : y + 90], range(0, 400, 10)))
    for y, rows in zip(range(0, 400, 10), read, strict=True):
        np.testing.assert_array_equal(rows, full[:, y : y + 90])


def test_it_opens_its_file_again_after_pickling(slide):
    path, full = slide
    array = image_of(path).levels[0].array
    np.asarray(array[:, :5, :5])
    again = pickle.loads(pickle.dumps(array))
    assert again.name == array.name
    assert isinstance(direct(again), TiledImage)
    np.testing.assert_array_equal(again, full)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_opens_its_own_file(slide):
    path, full = slide
    image = direct(image_of(path).levels[0].array)
    image[:, :5, :5]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(image[:, 100:200], full[:, 100:200]) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_files_are_closed_with_the_image(slide):
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):  # noqa: PTH112
        pytest.skip("needs /proc")
    gc.collect()
    before = len(os.listdir(folder))  # noqa: PTH208
    image = direct(image_of(slide[0]).levels[0].array)
    image[:, :5, :5]
    assert len(os.listdir(folder)) > before  # noqa: PTH208
    del image
    gc.collect()
    assert len(os.listdir(folder)) == before  # noqa: PTH208


def test_a_file_that_changed_or_moved_is_named(slide):
    path, _ = slide
    read, unread = (direct(image_of(path).levels[0].array) for _ in range(2))
    unread = pickle.loads(pickle.dumps(unread))
    read[:, :5, :5]
    moved = path.with_name("b.tif")
    path.rename(moved)
    read[:, 5:10, :5]
    with pytest.raises(FileNotFoundError, match=r"a\.tif' was moved or removed"):
        unread[:, :5, :5]
    shutil.copy(moved, path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(OSError, match=r"a\.tif' has changed since it was read"):
        unread[:, :5, :5]
    with moved.open("ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match=r"a\.tif' has changed since it was read"):
        read[:, 5:10, :5]


def test_a_tile_that_is_damaged_later_is_named(slide):
    path, _ = slide
    image = direct(image_of(path).levels[0].array)
    with tifffile.TiffFile(path) as file:
        offset = file.pages.first.dataoffsets[12]
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[offset : offset + 50] = bytes(50)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(OSError, match=r"a\.tif': tile 12 is damaged or cannot be decoded"):
        image[:, 64:128, 64:128]


def test_missing_tiles_are_black(tmp_path):
    tiles = [None if i == 1 else np.full((64, 64, 3), 200, np.uint8) for i in range(4)]
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter(tiles),
        shape=(128, 128, 3),
        dtype=np.uint8,
        photometric="rgb",
        tile=(64, 64),
        compression="zlib",
    )
    image = np.asarray(image_of(tmp_path / "a.tif").levels[0].array)
    assert (image[:, :64, :64] == 200).all()
    assert (image[:, :64, 64:] == 0).all()


def test_the_graph_of_a_large_slide_is_small(tmp_path):
    tile = b"".join([bytes([200])] * (64 * 64 * 3))
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter([tile] * (64 * 64)),
        shape=(4096, 4096, 3),
        dtype=np.uint8,
        photometric="rgb",
        tile=(64, 64),
        compression=None,
    )
    element = hg.io.read_he(tmp_path / "a.tif", mpp=0.5)["he"]
    assert element.data.npartitions == 4
    assert sd.transformations.get_transformation(element) == Identity()


@pytest.mark.parametrize("photometric", ["ycbcr", "separated", "palette"])
def test_missing_tiles_are_black_in_every_kind_of_colour(tmp_path, photometric):
    channels = {"ycbcr": 3, "separated": 4, "palette": 1}[photometric]
    shape = (128, 128, channels) if channels > 1 else (128, 128)
    tile = np.full((64, 64, *shape[2:]), 200, np.uint8)
    given = {"colormap": np.full((3, 256), 200 * 257, np.uint16)} if photometric == "palette" else {}
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter([tile if i != 1 else None for i in range(4)]),
        shape=shape,
        dtype=np.uint8,
        photometric=photometric,
        tile=(64, 64),
        compression="zlib",
        **given,
    )
    image = direct(image_of(tmp_path / "a.tif").levels[0].array)
    assert image.colour.kind in ("ycbcr", "ink", "palette")
    region = image[:, 30:128, 60:128]
    assert (region[:, :34, 4:] == 0).all()
    assert region[:, 34:].any(axis=0).all()
    assert region[:, :, :4].any(axis=0).all()


def test_a_level_that_lacks_tiles_of_the_scan_is_not_used(tmp_path, caplog):
    full, tile = picture(256, 256), np.full((64, 64, 3), 200, np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(full, subifds=2, photometric="rgb", tile=(64, 64), compression="zlib")
        for n, tiles in ((128, [tile, None, tile, tile]), (64, [tile])):
            options = {"shape": (n, n, 3), "dtype": np.uint8, "subfiletype": 1, "compression": "zlib"}
            file.write(iter(tiles), photometric="rgb", tile=(64, 64), **options)
    image = image_of(tmp_path / "a.tif")
    assert [level.array.shape[1] for level in image.levels] == [256, 64]
    assert "level 1 lacks 1 tiles that the scan has" in caplog.text


def test_levels_of_a_sparse_slide_are_used_if_scan_tiles_cover_theirs(tmp_path, caplog):
    """Use five tiles of the scan per 1.25 tiles of the level, so that its second tile only shows the fifth."""

    tile = np.full((64, 64, 3), 200, np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for n, tiles in ((320, [tile if i % 5 < 4 and i < 20 else None for i in range(25)]), (80, [tile, *[None] * 3])):
            options = {"subfiletype": 1} if n == 80 else {"subifds": 1}
            options |= {"shape": (n, n, 3), "dtype": np.uint8, "compression": "zlib"}
            file.write(iter(tiles), photometric="rgb", tile=(64, 64), **options)
    assert [level.array.shape[1] for level in image_of(tmp_path / "a.tif").levels] == [320, 80]
    assert "lacks" not in caplog.text


def test_a_region_of_a_sparse_slide_only_uses_its_own_tiles(tmp_path, monkeypatch):
    tile = np.full((16, 16, 3), 200, np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter([None if i % 3 else tile for i in range(400)]),
        shape=(320, 320, 3),
        dtype=np.uint8,
        photometric="ycbcr",
        tile=(16, 16),
        compression="zlib",
    )
    image = direct(image_of(tmp_path / "a.tif").levels[0].array)
    whole = image[:, :, :]
    seen, argwhere = [], np.argwhere
    monkeypatch.setattr(np, "argwhere", lambda found: seen.append(found.size) or argwhere(found))
    assert np.array_equal(image[:, 100:150, 37:90], whole[:, 100:150, 37:90])
    assert seen == [4 * 4]
