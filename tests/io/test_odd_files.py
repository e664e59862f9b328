"""Unusual and damaged image files are read upright with correct colours, or raise an error that names the file."""

import imagecodecs
import numpy as np
import pytest
import spatialdata as sd
import tifffile
from PIL import Image

import he2gene_sc as hg
from he2gene_sc.image import check_channel_names, check_pixels
from he2gene_sc.io import _decode
from tests.helpers.pictures import mpp_of, picture, pixels_of

TILES = {"tile": (64, 64)}


def read(path):
    return pixels_of(hg.io.read_he(path, mpp=0.5)).to_numpy()


def write(path, data, **options):
    tifffile.imwrite(path, data, metadata=None, **{"photometric": "rgb", **options})
    return path


def with_tag(path, code, value):
    """Change a SHORT tag of every page."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        for page in file.pages:
            page.tags[code].overwrite(value)
    return path


# Colours


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
def test_ink_is_converted_as_by_pillow(tmp_path, options):
    ink = np.asarray(Image.fromarray(picture()).convert("CMYK")).copy()
    ink[..., 3] = np.arange(128, dtype=np.uint8)[None]
    write(tmp_path / "a.tif", ink, photometric="separated", **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), Image.fromarray(ink, "CMYK").convert("RGB"))


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
def test_a_palette_tiff_is_read_as_a_palette_png(tmp_path, options):
    palette = Image.fromarray(picture()).quantize(32)
    table = np.zeros((3, 256), np.uint16)
    table[:, :32] = np.array(palette.getpalette()[:96]).reshape(32, 3).T * 257
    write(tmp_path / "a.tif", np.asarray(palette), photometric="palette", colormap=table, **options)
    palette.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), read(tmp_path / "a.png"))


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
def test_luminance_and_chroma_without_jpeg_become_rgb(tmp_path, options):
    stored = np.asarray(Image.fromarray(picture()).convert("YCbCr"))
    path = write(
        tmp_path / "a.tif",
        stored,
        compression="zlib",
        photometric="ycbcr",
        extratags=[(530, 3, 2, (1, 1), True)],
        **options,
    )
    assert np.abs(read(path).astype(int) - picture()).max() <= 3


def test_jpeg_2000_of_aperio_in_luminance_and_chroma_becomes_rgb(tmp_path):
    stored = np.asarray(Image.fromarray(picture()).convert("YCbCr"))
    tiles = [
        imagecodecs.jpeg2k_encode(stored[y : y + 32, x : x + 32], codecformat="j2k", mct=False, level=0)
        for y in range(0, 96, 32)
        for x in range(0, 128, 32)
    ]
    options = {"shape": (96, 128, 3), "dtype": np.uint8, "tile": (32, 32), "photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", iter(tiles), compression=34712, **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), stored)
    with_tag(tmp_path / "a.tif", 259, 33003)
    assert np.abs(read(tmp_path / "a.tif").astype(int) - picture()).max() <= 3


@pytest.mark.parametrize("compression", ["zstd", "jpeg2000", "lzw", "jpeg"])
def test_tiles_of_any_codec_are_read(tmp_path, compression):
    write(tmp_path / "a.tif", picture(), compression=compression, **TILES)
    assert np.abs(read(tmp_path / "a.tif").astype(int) - picture()).mean() < 3


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
def test_colours_multiplied_by_alpha_are_not_multiplied_again(tmp_path, options):
    alpha = np.full((96, 128, 1), 128, np.uint8)
    straight = np.concatenate([picture(), alpha], axis=2)
    multiplied = np.concatenate([np.rint(picture() * (128 / 255)).astype(np.uint8), alpha], axis=2)
    write(tmp_path / "a.tif", straight, extrasamples=["unassalpha"], **options)
    write(tmp_path / "b.tif", multiplied, extrasamples=["assocalpha"], **options)
    assert np.abs(read(tmp_path / "a.tif").astype(int) - read(tmp_path / "b.tif")).max() <= 2


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
def test_a_fourth_channel_that_is_not_alpha_is_left_out_or_refused(tmp_path, options):
    for name, fourth in (("empty.tif", np.zeros((96, 128), np.uint8)), ("infrared.tif", picture()[..., 0])):
        write(tmp_path / name, np.dstack([picture(), fourth]), extrasamples=["unspecified"], **options)
    np.testing.assert_array_equal(read(tmp_path / "empty.tif"), picture())
    with pytest.raises(ValueError, match=r"'infrared.tif' has a fourth channel that is not declared as alpha"):
        read(tmp_path / "infrared.tif")


@pytest.mark.parametrize(("colours", "alpha"), [(1.0, 255.0), (255.0, 1.0)])
def test_alpha_on_another_scale_than_float_colours_is_refused(tmp_path, colours, alpha):
    rgba = np.dstack([picture() / 255 * colours, np.full((96, 128), alpha)]).astype(np.float32)
    for name, options in (("a.tif", {}), ("b.tif", TILES)):
        write(tmp_path / name, rgba, extrasamples=["unassalpha"], **options)
        with pytest.raises(ValueError, match=rf"'{name}' has alpha up to {alpha:.3g} .*different scales"):
            read(tmp_path / name)


def test_alpha_of_zeros_and_ones_beside_bytes_is_refused():
    rgba = np.full((4, 50), 200, np.uint8)
    rgba[3] = 1
    with pytest.raises(ValueError, match="different scales"):
        check_pixels(4, np.uint8, rgba, "he")
    rgba[3] = 255
    assert check_pixels(4, np.uint8, rgba, "he") == 1.0
    assert check_pixels(4, np.float32, np.where(rgba > 0, 1.0, 0.0), "he") == 255.0


def test_transparent_colour_of_an_rgb_png_becomes_white(tmp_path):
    image = picture()
    image[:20] = [10, 200, 30]
    Image.fromarray(image).save(tmp_path / "a.png", transparency=(10, 200, 30))
    found = read(tmp_path / "a.png")
    assert (found[:20] == 255).all()
    np.testing.assert_array_equal(found[20:], image[20:])


def test_grey_png_of_16_bits_with_alpha_is_refused_as_grey(tmp_path):
    grey = np.full((8, 8, 2), 1000, np.uint16)
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(grey))
    with pytest.raises(ValueError, match="'a.png' is an image of 2 channels"):
        read(tmp_path / "a.png")


def test_colours_of_another_space_are_refused(tmp_path):
    path = write(tmp_path / "a.tif", picture(), **TILES)
    with_tag(path, 262, 8)
    with pytest.raises(ValueError, match="'a.tif' holds CIELAB colours"):
        read(path)


# Choice of image and channels


def two_images(path, names=("first", "second"), **options):
    scan = picture(512, 640)
    with tifffile.TiffWriter(path) as file:
        for image, name in zip((scan[::8, ::8], scan), names, strict=True):
            file.write(np.ascontiguousarray(image), photometric="rgb", description=name, metadata=None, **options)
    return scan


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
def test_the_scan_is_read_where_an_overview_comes_first(tmp_path, options, caplog):
    scan = two_images(tmp_path / "a.tif", **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), scan)
    assert "'a.tif' holds 2 images: the largest is read, 640 × 512; the others are 80 × 64" in caplog.text


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_tiff_with_another_suffix_is_read_as_a_tiff(tmp_path, suffix):
    scan = two_images(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"a{suffix}"), scan)


def test_a_small_rgb_image_beside_a_scan_that_is_not_is_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.zeros((5, 512, 640), np.uint16), photometric="minisblack", metadata=None)
        file.write(np.ascontiguousarray(picture(512, 640)[::8, ::8]), photometric="rgb", metadata=None)
    with pytest.raises(ValueError, match="an RGB image of 80 × 64 beside one of 640 × 512 that is not RGB"):
        read(tmp_path / "a.tif")


def test_a_larger_grey_image_is_not_read_as_the_scan(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(picture(300, 300)[..., 0], photometric="minisblack", metadata=None, **TILES)
        file.write(picture(), photometric="rgb", metadata=None, **TILES)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), picture())


def test_a_macro_image_is_neither_the_scan_nor_a_level(tmp_path):
    description = "Aperio Image Library v12.0.15\r\n128x96 [0,0 128x96] (64x64) JPEG/RGB Q=70|AppMag = 40|MPP = 0.5"
    with tifffile.TiffWriter(tmp_path / "a.svs") as file:
        file.write(picture(), photometric="rgb", description=description, metadata=None, **TILES)
        file.write(picture()[::2, ::2].copy(), photometric="rgb", description=description, metadata=None)
        file.write(
            picture(90, 90), photometric="rgb", description="Aperio\r\nlabel 90x90", metadata=None, subfiletype=1
        )
        file.write(picture(500, 900), photometric="rgb", description="Aperio\r\nmacro", metadata=None, subfiletype=9)
    element = hg.io.read_he(tmp_path / "a.svs")["he"]
    assert not hasattr(element, "children")
    np.testing.assert_array_equal(element.transpose("y", "x", "c"), picture())


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["r", "g", "b"], [0, 1, 2]),
        (["Blue", "Green", "Red"], [2, 1, 0]),
        (["alpha", "red", "green", "blue"], [1, 2, 3, 0]),
        ([0, 1, 2], None),
        (["Channel:0:0", "Channel:0:1", "Channel:0:2"], None),
        (["", "", ""], None),
        (["Bright field R", "Bright field G", "Bright field B"], None),
    ],
)
def test_channel_names_give_their_order_or_are_ignored(names, order):
    assert check_channel_names(names, "he") == order


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_planes_are_read_in_the_order_that_their_names_give(tmp_path, tile):
    planes = np.moveaxis(picture(), -1, 0)[::-1].copy()
    metadata = {"axes": "CYX", "Channel": {"Name": ["Blue", "Green", "Red"]}}
    tifffile.imwrite(tmp_path / "a.ome.tif", planes, photometric="minisblack", metadata=metadata, tile=tile)
    element = hg.io.read_he(tmp_path / "a.ome.tif", mpp=0.5)["he"]
    np.testing.assert_array_equal(element.transpose("y", "x", "c"), picture())


@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_an_image_stored_as_its_negative_is_refused(tmp_path, tile):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, 255 - picture(), photometric="miniswhite", planarconfig="contig", metadata=None, tile=tile)
    with pytest.raises(ValueError, match="'a.tif' holds MINISWHITE colours; save it as RGB"):
        hg.io.read_he(path)


@pytest.mark.parametrize("names", [["DAPI", "GFP", "RFP"], ["RFP", "GFP", "BFP"], ["CD3", "CD8", "PanCK", "DAPI"]])
def test_stains_of_fluorescence_are_not_red_green_and_blue(names, tmp_path):
    with pytest.raises(ValueError, match=f"'he' has channels that are not red, green and blue: '{names[0]}'"):
        check_channel_names(names, "he")
    sdata = hg.io.read_he(write(tmp_path / "a.tif", picture()), mpp=0.5)
    image = np.zeros((len(names), 96, 128), np.uint8)
    sdata["he"] = sd.models.Image2DModel.parse(image, dims=("c", "y", "x"), c_coords=names)
    with pytest.raises(ValueError, match="set_channel_names"):
        hg.pp.tissue(sdata)
    metadata = {"axes": "CYX", "Channel": {"Name": names}}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="minisblack", metadata=metadata)
    with pytest.raises(ValueError, match=rf"'a.ome.tif' has channels that are not red, green and blue: '{names[0]}'"):
        hg.io.read_he(tmp_path / "a.ome.tif")


# Upright or not


def turned(image, orientation):
    """Return the stored pixels of an image with an EXIF orientation."""
    image = image.transpose(1, 0, 2) if orientation >= 5 else image
    flips = {1: "", 2: "x", 3: "yx", 4: "y", 5: "", 6: "y", 7: "yx", 8: "x"}[orientation]
    for axis in flips:
        image = np.flip(image, "yx".index(axis))
    return np.ascontiguousarray(image)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_rotated_image_is_turned_upright_with_a_warning(tmp_path, orientation):
    stored = turned(picture(), orientation)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    write(tmp_path / "a.tif", stored, extratags=[(274, 3, 1, orientation, True)])
    for name in ("a.png", "a.tif"):
        with pytest.warns(UserWarning, match=rf"rotated \(orientation {orientation}\)"):
            np.testing.assert_array_equal(read(tmp_path / name), picture())


def test_a_rotated_tiled_slide_is_refused(tmp_path):
    write(tmp_path / "a.tif", picture(), extratags=[(274, 3, 1, 8, True)], **TILES)
    with pytest.raises(ValueError, match=r"'a.tif' is stored mirrored or rotated \(orientation tag 8\).*vips autorot"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
def test_an_orientation_that_is_not_valid_counts_as_upright(tmp_path, options):
    write(tmp_path / "a.tif", picture(), extratags=[(274, 3, 1, 0, True)], **options)
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), picture())


# Damage


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
@pytest.mark.parametrize("compression", ["zlib", "jpeg", "jpeg2000", "zstd"])
def test_damaged_tiles_are_found_at_once(tmp_path, options, compression):
    path = write(tmp_path / "a.tif", picture(), compression=compression, **options)
    with tifffile.TiffFile(path) as file:
        offset, size = file.pages.first.dataoffsets[0], file.pages.first.databytecounts[0]
    data = bytearray(path.read_bytes())
    data[offset : offset + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(OSError, match="a.tif.*damaged"):
        read(path)


@pytest.mark.parametrize("options", [{}, TILES], ids=["strips", "tiles"])
def test_an_unknown_compression_is_refused(tmp_path, options):
    path = with_tag(write(tmp_path / "a.tif", picture(), compression="zlib", **options), 259, 52479)
    with pytest.raises(OSError, match="a.tif.*cannot be decoded.*52479.*vips"):
        read(path)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.svs", "a.ndpi", "a.scn"])
@pytest.mark.parametrize("content", [b"", b"II", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0", b"\xff\xd8\xff\xe0"])
def test_a_file_of_a_few_bytes_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)


def test_a_folder_is_not_an_image(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; an image file is needed"):
        read(tmp_path)


def test_an_image_larger_than_the_free_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    write(tmp_path / "a.tif", picture())
    monkeypatch.setattr(_decode, "memory_of_machine", lambda: 10_000)
    for name in ("a.png", "a.tif"):
        with pytest.raises(ValueError, match=f"'{name}' has 128 × 96 pixels, .* of memory.*vips tiffsave"):
            read(tmp_path / name)


def test_damaged_ome_metadata_only_lose_the_mpp(tmp_path):
    path = write(tmp_path / "a.tif", picture(), description='<?xml version="1.0"?><OME xmlns="x"><Image></OME>')
    sdata = hg.io.read_he(path)
    assert mpp_of(sdata) is None
    np.testing.assert_array_equal(pixels_of(sdata), picture())
