"""`hg.io.read_he` and `hg.io.read_st` read image files of all kinds and legacy ST sections."""

import gzip
import warnings

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
import tifffile
from PIL import Image
from spatialdata.models import Labels2DModel
from spatialdata.transformations import get_transformation

import he2gene_sc as hg
from he2gene_sc.io import _decode
from he2gene_sc.io._open import open_store
from tests.helpers.pictures import mpp_of, picture, pixels_of

# Flat images


def test_png_is_read_pixel_by_pixel(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    sdata = hg.io.read_he(tmp_path / "a.png", mpp=0.5)
    np.testing.assert_array_equal(pixels_of(sdata), picture())
    assert sdata["he"].dtype == np.uint8
    assert sdata["he"].dims == ("c", "y", "x")
    assert list(get_transformation(sdata["he"], get_all=True)) == ["global"]
    assert mpp_of(sdata) == 0.5


@pytest.mark.parametrize("name", ["a.jpg", "b.JPEG"])
def test_jpeg_is_read(tmp_path, name):
    Image.fromarray(picture()).save(tmp_path / name, quality=95)
    read = pixels_of(hg.io.read_he(str(tmp_path / name), mpp=0.5)).to_numpy()
    assert np.abs(read.astype(int) - picture()).mean() < 4


def test_pixels_that_were_decoded_are_not_copied_again(tmp_path, monkeypatch):
    levels = [np.zeros((3, 2100, 2050), np.uint8), np.zeros((3, 1050, 1025), np.uint8)]
    monkeypatch.setattr("he2gene_sc.io._he.decode", lambda _: _decode.Decoded(levels, 0.5))
    element = hg.io.read_he(tmp_path / "a.png")["he"]
    for node, level in zip(element.values(), levels, strict=True):
        chunks = dict(node["image"].data.dask)
        assert len(chunks) == {2100: 9, 1050: 4}[level.shape[1]]
        assert all(np.shares_memory(chunk, level) for chunk in chunks.values())


def test_a_large_flat_image_becomes_a_pyramid(tmp_path):
    Image.fromarray(picture(2100, 2050)).save(tmp_path / "a.png")
    element = hg.io.read_he(tmp_path / "a.png", mpp=0.5)["he"]
    assert [node["image"].shape for node in element.values()] == [(3, 2100, 2050), (3, 1050, 1025), (3, 525, 512)]


def test_transparent_pixels_become_white(tmp_path):
    rgba = np.dstack([picture(), np.full((96, 128), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    read = pixels_of(hg.io.read_he(tmp_path / "a.png", mpp=0.5)).to_numpy()
    assert (read[:10] == 255).all()
    np.testing.assert_array_equal(read[10:], picture()[10:])


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_png_is_converted(tmp_path, transparent):
    flat = np.zeros((64, 64, 3), np.uint8) + np.array([10, 200, 30], np.uint8)
    flat[:32] = [200, 20, 90]
    palette = Image.fromarray(flat).quantize(2)
    extra = {"transparency": palette.getpixel((0, 0))} if transparent else {}
    palette.save(tmp_path / "a.png", **extra)
    expected = flat.copy()
    if transparent:
        expected[:32] = 255
    np.testing.assert_array_equal(pixels_of(hg.io.read_he(tmp_path / "a.png", mpp=0.5)), expected)


def test_exact_black_is_kept_as_read(tmp_path):
    black = picture()
    black[:5] = 0
    Image.fromarray(black).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels_of(hg.io.read_he(tmp_path / "a.png", mpp=0.5)), black)


def test_grey_png_is_refused(tmp_path):
    Image.fromarray(picture()[..., 0]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="'a.png' is a one-channel"):
        hg.io.read_he(tmp_path / "a.png")


def test_grey_png_with_alpha_is_refused(tmp_path):
    Image.fromarray(picture()).convert("LA").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="'a.png' is an image of 2 channels"):
        hg.io.read_he(tmp_path / "a.png")


def test_cmyk_jpeg_is_not_read_as_rgb_with_alpha(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    read = pixels_of(hg.io.read_he(tmp_path / "a.jpg", mpp=0.5)).to_numpy()
    assert np.abs(read.astype(int) - picture()).mean() < 10


def test_truncated_files_are_refused(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="'b.jpg' is truncated"):
        hg.io.read_he(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="'c.jpg' is not an image"):
        hg.io.read_he(tmp_path / "c.jpg")
    (tmp_path / "d.tif").write_bytes(b"no image at all")
    with pytest.raises(ValueError, match="'d.tif' is not a TIFF"):
        hg.io.read_he(tmp_path / "d.tif")


@pytest.mark.parametrize("tiled", [False, True])
def test_a_truncated_tiff_is_refused(tmp_path, tiled):
    whole = tmp_path / "a.tif"
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    tifffile.imwrite(whole, noise, photometric="rgb", tile=(128, 128) if tiled else None)
    (tmp_path / "b.tif").write_bytes(whole.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="'b.tif' is truncated"):
        hg.io.read_he(tmp_path / "b.tif", mpp=0.5)


@pytest.mark.filterwarnings("ignore")
def test_a_tiff_cut_before_its_directory_is_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0" + (10**6).to_bytes(4, "little") + bytes(100))
    with pytest.raises(ValueError, match="'a.tif' (has no image|is not a TIFF|has a damaged)"):
        hg.io.read_he(tmp_path / "a.tif", mpp=0.5)


def test_a_truncated_palette_png_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    Image.fromarray(noise).quantize(64).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:20_000])
    with pytest.raises(ValueError, match="'b.png' is truncated"):
        hg.io.read_he(tmp_path / "b.png", mpp=0.5)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="`path` .*none.png"):
        hg.io.read_he(tmp_path / "none.png")


def test_unknown_type_is_refused_and_valid_ones_are_listed(tmp_path):
    (tmp_path / "a.bmp").write_bytes(b"BM")
    with pytest.raises(ValueError, match=r"`path` 'a.bmp': .bmp type; valid: .*\.jpg"):
        hg.io.read_he(tmp_path / "a.bmp")


@pytest.mark.parametrize("mpp", [0, -1, np.nan, np.inf, "0.5"])
def test_mpp_that_is_not_a_positive_number_is_refused(tmp_path, mpp):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="`mpp`"):
        hg.io.read_he(tmp_path / "a.png", mpp=mpp)


def test_an_image_above_the_limit_is_refused_and_pillows_limit_is_restored(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "a.tif", picture(), photometric="rgb")
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(_decode, "MAX_PIXELS", 96 * 128 - 1)
    for name in ("a.png", "a.tif"):
        with pytest.raises(ValueError, match="128 × 96 pixels, more than"):
            hg.io.read_he(tmp_path / name)
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_limit_does_not_stop_an_image_below_our_limit(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    hg.io.read_he(tmp_path / "a.png", mpp=0.5)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_tiled_image_above_the_limit_is_read_lazily(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", picture(512, 512), photometric="rgb", tile=(128, 128))
    monkeypatch.setattr(_decode, "MAX_PIXELS", 1000)
    assert hg.io.read_he(tmp_path / "a.tif", mpp=0.5)["he"].shape == (3, 512, 512)


# TIFF


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
def test_stripped_tiff_is_decoded(tmp_path, compression, planar):
    data = picture() if planar == "contig" else np.moveaxis(picture(), -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="rgb", compression=compression, planarconfig=planar)
    np.testing.assert_array_equal(pixels_of(hg.io.read_he(tmp_path / "a.tif", mpp=0.5)), picture())


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiled_tiff_is_lazy_and_equal(tmp_path, planar):
    data = picture(500, 700)
    stored = data if planar == "contig" else np.moveaxis(data, -1, 0)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", tile=(128, 128), planarconfig=planar)
    read = pixels_of(hg.io.read_he(tmp_path / "a.tif", mpp=0.5))
    assert isinstance(read.data, da.Array)
    assert read.data.npartitions == 1
    np.testing.assert_array_equal(read, data)
    np.testing.assert_array_equal(read[130:260, 5:400], data[130:260, 5:400])


def test_tiled_tiff_with_alpha_is_painted_on_white(tmp_path):
    rgba = np.dstack([picture(256, 256), np.full((256, 256), 255, np.uint8)])
    rgba[:50, :, 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", rgba, photometric="rgb", tile=(128, 128), extrasamples=["unassalpha"])
    read = pixels_of(hg.io.read_he(tmp_path / "a.tif", mpp=0.5)).to_numpy()
    assert read.shape == (256, 256, 3)
    assert (read[:50] == 255).all()
    np.testing.assert_array_equal(read[50:], rgba[50:, :, :3])


def pyramid(path, ome=False, **options):
    levels = [picture(512, 640)]
    while len(levels) < 3:
        levels.append(levels[-1][::2, ::2])
    with tifffile.TiffWriter(path, ome=ome) as writer:
        writer.write(levels[0], subifds=2, photometric="rgb", tile=(128, 128), **options)
        options.pop("metadata", None)
        for level in levels[1:]:
            writer.write(level, subfiletype=1, photometric="rgb", tile=(128, 128), **options)
    return levels


def test_pyramidal_tiff_keeps_its_levels(tmp_path):
    levels = pyramid(tmp_path / "a.tif")
    element = hg.io.read_he(tmp_path / "a.tif", mpp=0.5)["he"]
    assert len(element.children) == 3
    for node, level in zip(element.values(), levels, strict=True):
        assert isinstance(node["image"].data, da.Array)
        np.testing.assert_array_equal(node["image"].transpose("y", "x", "c"), level)


def test_levels_of_a_pyramid_are_aligned(tmp_path):
    pyramid(tmp_path / "a.tif")
    element = hg.io.read_he(tmp_path / "a.tif", mpp=0.5)["he"]
    for node in element.values():
        matrix = get_transformation(node["image"]).to_affine_matrix(("x", "y"), ("x", "y"))
        size = np.array([node["image"].sizes["x"], node["image"].sizes["y"], 1])
        np.testing.assert_allclose(matrix @ size, [640, 512, 1])


@pytest.mark.parametrize(("value", "unit"), [(0.25, "µm"), (250.0, "nm"), (0.00025, "mm")])
def test_ome_tiff_states_its_mpp(tmp_path, value, unit):
    metadata = {"axes": "YXS", "PhysicalSizeX": value, "PhysicalSizeXUnit": unit}
    pyramid(tmp_path / "a.ome.tif", ome=True, compression="jpeg", metadata=metadata)
    sdata = hg.io.read_he(tmp_path / "a.ome.tif")
    assert mpp_of(sdata) == pytest.approx(0.25)
    assert len(sdata["he"].children) == 3
    read = pixels_of(sdata).to_numpy()
    assert read.shape == (512, 640, 3)
    assert np.abs(read.astype(int) - picture(512, 640)).mean() < 5


def test_planar_ome_tiff_of_three_channels_is_read(tmp_path):
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    data = np.moveaxis(picture(256, 256), -1, 0)
    tifffile.imwrite(tmp_path / "a.ome.tif", data, tile=(128, 128), metadata=metadata, photometric="minisblack")
    sdata = hg.io.read_he(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(pixels_of(sdata), picture(256, 256))
    assert mpp_of(sdata) == 0.5


def test_resolution_in_pixels_per_centimetre_states_the_mpp(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", picture(), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    assert mpp_of(hg.io.read_he(tmp_path / "a.tif")) == pytest.approx(0.5)


@pytest.mark.parametrize(("pixels", "unit"), [(72, "INCH"), (28, "CENTIMETER"), (1, "NONE")])
def test_print_resolution_is_not_used_as_mpp(tmp_path, pixels, unit):
    tifffile.imwrite(tmp_path / "a.tif", picture(), photometric="rgb", resolution=(pixels, pixels), resolutionunit=unit)
    assert mpp_of(hg.io.read_he(tmp_path / "a.tif")) is None


@pytest.mark.parametrize(
    ("x", "y", "problem"),
    [(0.5, 1.0, "0.5 × 1 µm per pixel, pixels that are not square"), (250, 250, "which is not plausible for a scan")],
)
def test_mpp_that_is_anisotropic_or_implausible_is_not_used(tmp_path, x, y, problem, caplog):
    metadata = {"axes": "YXS", "PhysicalSizeX": x, "PhysicalSizeY": y}
    tifffile.imwrite(tmp_path / "a.ome.tif", picture(), photometric="rgb", metadata=metadata)
    assert mpp_of(hg.io.read_he(tmp_path / "a.ome.tif")) is None
    assert problem in caplog.text


def test_resolution_tags_of_two_sizes_are_not_used_as_mpp(tmp_path, caplog):
    tifffile.imwrite(
        tmp_path / "a.tif", picture(), photometric="rgb", resolution=(20000, 10000), resolutionunit="CENTIMETER"
    )
    assert mpp_of(hg.io.read_he(tmp_path / "a.tif")) is None
    assert "0.5 × 1 µm per pixel, pixels that are not square" in caplog.text


def test_the_argument_wins_over_the_file(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", picture(), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    assert mpp_of(hg.io.read_he(tmp_path / "a.tif", mpp=1.0)) == 1.0


@pytest.mark.parametrize("tile", [None, (128, 128)])
@pytest.mark.parametrize("kind", ["grey", "uint16"])
def test_grey_and_uint16_tiffs_are_refused(tmp_path, kind, tile):
    data = picture(256, 256)[..., 0] if kind == "grey" else picture(256, 256).astype(np.uint16)
    photometric = "minisblack" if kind == "grey" else "rgb"
    tifffile.imwrite(tmp_path / "a.tif", data, photometric=photometric, tile=tile)
    with pytest.raises(
        ValueError, match="'a.tif'( is a one-channel|: the value of white is unknown for pixels of type uint16)"
    ):
        hg.io.read_he(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".svs", ".tif"])
def test_aperio_file_states_its_mpp_and_keeps_its_levels(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    description = (
        "Aperio Image Library v12.0.15\r\n640x512 [0,0 640x512] (256x256) JPEG/RGB Q=70|AppMag = 40|MPP = 0.25"
    )
    full = picture(512, 640)
    options = {"photometric": "rgb", "tile": (256, 256), "metadata": None}
    with tifffile.TiffWriter(path) as writer:
        writer.write(full, description=description, **options)
        writer.write(full[::4, ::4], photometric="rgb", description=description, metadata=None)
        writer.write(full[::2, ::2], description=description, subfiletype=1, **options)
    sdata = hg.io.read_he(path)
    assert mpp_of(sdata) == pytest.approx(0.25)
    read = pixels_of(sdata)
    assert isinstance(read.data, da.Array)
    np.testing.assert_array_equal(read, full)


def test_a_lazy_image_is_written_and_read_back(tmp_path):
    levels = pyramid(tmp_path / "a.tif")
    hg.io.read_he(tmp_path / "a.tif", mpp=0.5).write(tmp_path / "a.zarr")
    again = sd.read_zarr(tmp_path / "a.zarr")
    np.testing.assert_array_equal(pixels_of(again), levels[0])
    assert mpp_of(again) == 0.5


# Legacy ST


def section(folder, angle=0.0):
    """Write files of a section of 4 × 5 spots with a pitch of 60 px, rotated by an angle."""
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(2, 7), np.arange(3, 7)))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    pixels = np.column_stack([x - 4, y - 4]) * 60.0 @ turn + 250
    spots = pd.DataFrame(
        {"x": x, "y": y, "new_x": x, "new_y": y, "pixel_x": pixels[:, 0], "pixel_y": pixels[:, 1], "selected": 1}
    )
    counts = pd.DataFrame(
        np.random.default_rng(0).poisson(2, (20, 6)),
        columns=list("ABCDEF"),
        index=[f"{a}x{b}" for a, b in zip(x, y, strict=True)],
    )
    labels = pd.DataFrame({"x": x + 0.1, "y": y - 0.2, "label": ["cancer", "stroma"] * 10})
    labels.loc[20] = [np.nan, np.nan, "cancer"]
    spots.to_csv(folder / "spots.tsv", sep="\t", index=False)
    counts.to_csv(folder / "counts.tsv.gz", sep="\t")
    labels.to_csv(folder / "labels.tsv", sep="\t", index=False)
    Image.fromarray(picture(512, 512)).save(folder / "he.jpg")
    return counts, spots, labels


def test_read_st_puts_everything_in_its_place(tmp_path):
    counts, spots, labels = section(tmp_path)
    files = [tmp_path / name for name in ("counts.tsv.gz", "spots.tsv", "he.jpg")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sdata = hg.io.read_st(*files, labels=tmp_path / "labels.tsv", section="S1", patient="P")
    table = sdata["table"]
    assert list(table.obs_names) == list(counts.index)
    np.testing.assert_array_equal(table.X.toarray(), counts)
    np.testing.assert_array_equal(table.obsm["spatial"], spots[["pixel_x", "pixel_y"]])
    np.testing.assert_array_equal(table.obs["array_col"], spots["x"])
    np.testing.assert_array_equal(table.obs["array_row"], spots["y"])
    assert list(table.obs["annotation"]) == list(labels["label"][:20])
    assert set(table.obs["section"]) == {"S1"}
    assert set(table.obs["patient"]) == {"P"}
    assert sdata["he"].shape == (3, 512, 512)
    assert mpp_of(sdata) == pytest.approx(200 / 60)
    np.testing.assert_allclose(sdata["spots"]["radius"], 15.0)
    assert list(get_transformation(sdata["spots"], get_all=True)) == ["global"]


@pytest.mark.parametrize("angle", [0.3, np.pi / 2, 2.0])
def test_mpp_is_found_from_a_turned_array(tmp_path, angle):
    counts, spots, _ = section(tmp_path, angle)
    assert mpp_of(hg.io.read_st(counts, spots)) == pytest.approx(200 / 60)


def test_mpp_argument_wins_over_the_pitch(tmp_path):
    counts, spots, _ = section(tmp_path)
    sdata = hg.io.read_st(counts, spots, mpp=3.0)
    assert mpp_of(sdata) == 3.0
    np.testing.assert_allclose(sdata["spots"]["radius"], 50 / 3)


def test_spots_in_a_single_row_need_an_mpp(tmp_path):
    counts, spots, _ = section(tmp_path)
    with pytest.raises(ValueError, match="`mpp` cannot be found"):
        hg.io.read_st(counts.iloc[:5], spots.iloc[:5])


def test_spots_in_only_one_file_are_dropped_with_one_warning(tmp_path):
    counts, spots, _ = section(tmp_path)
    with pytest.warns(UserWarning, match="dropped") as caught:
        sdata = hg.io.read_st(counts.iloc[:-2], spots.iloc[3:], section="S1")
    assert [str(w.message) for w in caught if issubclass(w.category, UserWarning)] == [
        "section 'S1': 3 spots are only in the counts and 2 only in the spot file; they are dropped, 15 remain"
    ]
    assert list(sdata["table"].obs_names) == list(counts.index[3:-2])
    assert list(sdata["spots"].index) == list(counts.index[3:-2])


def test_spots_that_were_not_selected_are_left_out(tmp_path):
    counts, spots, _ = section(tmp_path)
    spots["selected"] = [1] * 15 + [0] * 5
    with pytest.warns(UserWarning, match="5 spots are only in the counts"):
        assert hg.io.read_st(counts, spots)["table"].n_obs == 15


def test_the_frames_that_were_given_are_not_changed(tmp_path):
    counts, spots, labels = section(tmp_path)
    counts.index = pd.Index(counts.index, dtype=object)
    before = counts.copy(), spots.copy(), labels.copy()
    hg.io.read_st(counts, spots, labels=labels)
    for frame, copy in zip((counts, spots, labels), before, strict=True):
        pd.testing.assert_frame_equal(frame, copy)


def bad(counts, spots, labels, kind):
    if kind == "spot twice in counts":
        return {"counts": pd.concat([counts, counts[:1]]), "spots": spots}
    if kind == "spot twice in spots":
        return {"counts": counts, "spots": pd.concat([spots, spots[:1]])}
    if kind == "label twice":
        return {"counts": counts, "spots": spots, "labels": pd.concat([labels, labels[:1]])}
    if kind == "gene twice":
        return {"counts": counts.rename(columns={"B": "A"}), "spots": spots}
    if kind in ("negative", "fraction", "nan", "text"):
        counts = counts.astype(object if kind == "text" else float)
        counts.iloc[2, 2] = {"negative": -1, "fraction": 0.5, "nan": np.nan, "text": "x"}[kind]
        return {"counts": counts, "spots": spots}
    if kind == "no pixels":
        return {"counts": counts, "spots": spots.drop(columns=["pixel_x"])}
    if kind == "pixels nan":
        return {"counts": counts, "spots": spots.assign(pixel_x=np.nan)}
    if kind == "no label":
        return {"counts": counts, "spots": spots, "labels": labels.drop(columns="label")}
    return {"counts": counts.set_axis([f"q{i}" for i in range(20)]), "spots": spots}


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("spot twice in counts", r"`counts` names spots twice: \['2x3'\]"),
        ("spot twice in spots", r"`spots` names spots twice: \['2x3'\]"),
        ("label twice", r"`labels` names spots twice: \['2x3'\]"),
        ("gene twice", r"`counts` has duplicated genes: \['A'\]"),
        ("negative", "`counts` .*whole numbers from 0"),
        ("fraction", "`counts` .*whole numbers from 0"),
        ("nan", "`counts` .*whole numbers from 0"),
        ("text", "`counts` .*whole numbers from 0"),
        ("no pixels", r"`spots` lacks the columns \['pixel_x'\]"),
        ("pixels nan", "`spots` has NaN or infinite pixels"),
        ("no label", r"`labels` lacks the columns \['label'\]"),
        ("no spot shared", "`counts` and `spots` .*share no spot: .*'q0'.*'2x3'"),
    ],
)
def test_read_st_refuses(tmp_path, kind, match):
    with pytest.raises(ValueError, match=match):
        hg.io.read_st(**bad(*section(tmp_path), kind))


@pytest.mark.parametrize("parameter", ["counts", "spots", "image", "labels"])
def test_read_st_names_a_missing_file(tmp_path, parameter):
    section(tmp_path)
    files = {"counts": tmp_path / "counts.tsv.gz", "spots": tmp_path / "spots.tsv", parameter: tmp_path / "none.tsv"}
    with pytest.raises(FileNotFoundError, match=r"none\.tsv"):
        hg.io.read_st(**files)


def test_a_file_that_names_a_gene_twice_is_refused(tmp_path):
    counts, spots, _ = section(tmp_path)
    counts.rename(columns={"B": "A"}).to_csv(tmp_path / "twice.tsv.gz", sep="\t")
    with pytest.raises(ValueError, match=r"`counts` 'twice.tsv.gz' has duplicated genes: \['A'\]"):
        hg.io.read_st(tmp_path / "twice.tsv.gz", spots)
    blank = counts.rename(columns={"B": "A "})
    blank.to_csv(tmp_path / "blank.tsv", sep="\t")
    for given in (blank, tmp_path / "blank.tsv"):
        with pytest.raises(ValueError, match=r"has duplicated genes: \['A'\]"):
            hg.io.read_st(given, spots)
    assert "B" in hg.io.read_st(counts.rename(columns={"B": " B"}), spots)["table"].var_names
    counts.rename(columns={"B": ""}).to_csv(tmp_path / "unnamed.tsv", sep="\t")
    with pytest.raises(ValueError, match="`counts` 'unnamed.tsv' has 1 columns without a name"):
        hg.io.read_st(tmp_path / "unnamed.tsv", spots)


def test_a_header_without_its_corner_is_checked_from_its_first_gene(tmp_path):
    counts, spots, _ = section(tmp_path)
    text = counts.to_csv(sep="\t")
    (tmp_path / "r.tsv").write_text(text.removeprefix("\t"))
    assert list(hg.io.read_st(tmp_path / "r.tsv", spots)["table"].var_names) == list(counts.columns)
    (tmp_path / "twice.tsv").write_text(text.removeprefix("\t").replace("B", "A", 1))
    with pytest.raises(ValueError, match=r"has duplicated genes: \['A'\]"):
        hg.io.read_st(tmp_path / "twice.tsv", spots)


def test_a_spot_file_that_names_a_column_twice_is_refused(tmp_path):
    counts, spots, _ = section(tmp_path)
    spots.assign(other=1).rename(columns={"other": "pixel_x"}).to_csv(tmp_path / "twice.tsv", sep="\t", index=False)
    with pytest.raises(ValueError, match=r"`spots` 'twice.tsv' has duplicated columns: \['pixel_x'\]"):
        hg.io.read_st(counts, tmp_path / "twice.tsv")


def test_a_missing_patient_is_refused_and_a_wrong_separator_is_named(tmp_path):
    counts, spots, _ = section(tmp_path)
    with pytest.raises(ValueError, match="`patient` holds 'nan', which is a missing value"):
        hg.io.read_st(counts, spots, patient="nan")
    with pytest.raises(ValueError, match="`patient` holds '-', which is a missing value"):
        hg.io.read_st(counts, spots, patient="-")
    spots.assign(a=np.nan, b=np.nan).rename(columns={"a": "", "b": ""}).to_csv(
        tmp_path / "tabs.tsv", sep="\t", index=False
    )
    assert hg.io.read_st(counts, tmp_path / "tabs.tsv")["table"].n_obs == 20
    counts.to_csv(tmp_path / "counts.csv", sep=";")
    with pytest.raises(ValueError, match="columns seem to be separated by ';', tabs are needed"):
        hg.io.read_st(tmp_path / "counts.csv", spots)


@pytest.mark.parametrize("no", ["0", "False", "false", "FALSE", " no ", 0.0])
def test_selected_may_be_text(tmp_path, no):
    counts, spots, _ = section(tmp_path)
    yes = {"0": "1", "False": "True", "false": "true", "FALSE": "TRUE", " no ": "yes"}.get(no, 1.0)
    spots["selected"] = pd.Series([yes] * 15 + [no] * 5, dtype=object)
    with pytest.warns(UserWarning, match="5 spots are only in the counts"):
        assert hg.io.read_st(counts, spots)["table"].n_obs == 15


@pytest.mark.parametrize("value", ["maybe", np.nan, 2, ""])
def test_selected_that_is_neither_yes_nor_no_is_refused(tmp_path, value):
    counts, spots, _ = section(tmp_path)
    spots["selected"] = pd.Series([1] * 19 + [value], dtype=object)
    with pytest.raises(ValueError, match="the column 'selected' has"):
        hg.io.read_st(counts, spots)


def test_labels_that_match_no_spot_are_refused_and_few_matches_are_warned_of(tmp_path):
    counts, spots, labels = section(tmp_path)
    with pytest.raises(ValueError, match=r"`labels` of section 'S' has no label of any spot: .*'102x3'.*'2x3'"):
        hg.io.read_st(counts, spots, labels=labels.assign(x=labels["x"] + 100), section="S")
    with pytest.warns(UserWarning, match=r"1[0-9] of 20 labels do not belong to a spot"):
        hg.io.read_st(counts, spots, labels=labels.assign(x=labels["x"] + 3))


@pytest.mark.parametrize("name", ["pitch_um", "diameter_um", "mpp"])
@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, "200", True])
def test_sizes_that_are_not_positive_numbers_are_refused(tmp_path, name, value):
    counts, spots, _ = section(tmp_path)
    with pytest.raises(ValueError, match=f"`{name}` is"):
        hg.io.read_st(counts, spots, **{name: value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": ["a"] * 20}, "`spots`: x and y have to be array positions"),
        ({"y": [np.nan] * 20}, "`spots` has rows without an array position"),
        ({"pixel_x": ["a"] * 20}, "`spots`: pixel_x and pixel_y have to be numbers"),
        ({"pixel_x": 1.0, "pixel_y": 2.0}, "`mpp` cannot be found: the distance of neighbouring spots is .* pixels"),
        ({"new_x": np.nan}, "`spots` has NaN or infinite values of new_x and new_y"),
        ({"new_x": "a"}, "`spots`: new_x and new_y have to be numbers"),
    ],
)
def test_spots_without_coordinates_are_refused(tmp_path, change, match):
    counts, spots, _ = section(tmp_path)
    with pytest.raises(ValueError, match=match):
        hg.io.read_st(counts, spots.assign(**change))


@pytest.mark.parametrize("parameter", ["counts", "spots", "labels"])
@pytest.mark.parametrize("damage", ["cut", "no gzip", "empty", "not text", "other gzip"])
def test_damaged_text_files_are_named(tmp_path, parameter, damage):
    section(tmp_path)
    whole = (tmp_path / "counts.tsv.gz").read_bytes()
    content = {
        "cut": whole[: len(whole) // 2],
        "no gzip": b"x\ty\n",
        "empty": b"",
        "not text": gzip.compress(bytes(range(128, 256))),
        "other gzip": whole[:20] + bytes(50) + whole[70:],
    }[damage]
    (tmp_path / "bad.tsv.gz").write_bytes(content)
    files = {"counts": tmp_path / "counts.tsv.gz", "spots": tmp_path / "spots.tsv", "labels": tmp_path / "labels.tsv"}
    with pytest.raises(OSError, match=rf"`{parameter}` .*bad\.tsv\.gz' is (damaged|empty)"):
        hg.io.read_st(**{**files, parameter: tmp_path / "bad.tsv.gz"})


def test_array_positions_may_be_texts(tmp_path):
    counts, spots, _ = section(tmp_path)
    as_texts = hg.io.read_st(counts, spots.astype({"x": str, "y": str}))["table"].obs
    pd.testing.assert_frame_equal(as_texts, hg.io.read_st(counts, spots)["table"].obs)


def test_counts_without_genes_are_refused(tmp_path):
    counts, spots, _ = section(tmp_path)
    with pytest.raises(ValueError, match="`counts` of section 'section' has no genes"):
        hg.io.read_st(counts[[]], spots)


def test_a_rotated_image_is_refused_together_with_spots(tmp_path):
    counts, spots, _ = section(tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture(512, 512)).save(tmp_path / "turned.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"`image` 'turned.jpg' is stored mirrored or rotated \(orientation 6\)"):
        hg.io.read_st(counts, spots, tmp_path / "turned.jpg")


def test_reading_a_store_with_labels_logs_nothing_of_ome_zarr(tmp_path, caplog):
    labels = Labels2DModel.parse(np.ones((8, 8), np.int16), dims=("y", "x"))
    sd.SpatialData(labels={"mask": labels}).write(tmp_path / "a.zarr")
    sd.read_zarr(tmp_path / "a.zarr")
    assert "no parent found" in caplog.text
    caplog.clear()
    assert "mask" in open_store(tmp_path / "a.zarr")
    assert not caplog.records
