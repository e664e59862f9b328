"""napari-spatialdata opens a store that was predicted and saved (`pip install napari-spatialdata PyQt6`)."""

import numpy as np
import pytest
import spatialdata as sd

import he2gene_sc as hg

pytestmark = pytest.mark.slow


def test_a_saved_prediction_is_drawn_on_the_tissue(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    napari_spatialdata = pytest.importorskip("napari_spatialdata")
    from napari_spatialdata._view import QtAdataViewWidget
    from qtpy.QtWidgets import QApplication

    # Without a screen, OpenGL cannot be queried; nothing is rendered.
    monkeypatch.setattr("napari._vispy.layers.image.get_gl_extensions", lambda: "texture_float")
    for module in ("base", "image"):
        monkeypatch.setattr(f"napari._vispy.layers.{module}.get_max_texture_sizes", lambda: (4096, 2048))
    slide = hg.datasets.toy((3, 4), mpp=2.0)
    hg.tl.predict(slide, model=tiny_model)
    slide["table"].obs["he2gene_annotation"] = slide["table"].obs["pathologist"].astype("category")
    hg.io.save(slide, tmp_path / "toy.zarr")
    sdata = sd.read_zarr(tmp_path / "toy.zarr")
    opened = napari_spatialdata.Interactive(sdata, headless=True)
    try:
        for name in ("he", "spots"):
            opened.add_element(name, "global")
            assert opened._sdata_widget.worker_thread.wait(60_000)
            QApplication.processEvents()
        image, spots = opened.get_layer("he"), opened.get_layer("spots")
        assert image.data.shape[:2] == (sdata["he"].sizes["y"], sdata["he"].sizes["x"])
        np.testing.assert_allclose(spots.data[:, ::-1], sdata["table"].obsm["spatial"])

        opened._viewer.layers.selection.select_only(spots)
        view = QtAdataViewWidget(opened._viewer)
        view.adata_layer_widget.setCurrentText("he2gene")
        view.var_widget._onAction(["ERBB2"])
        column = sdata["table"].var_names.get_loc("ERBB2")
        np.testing.assert_array_equal(spots.features["ERBB2"], sdata["table"].layers["he2gene"][:, column])
        view.obs_widget._onAction(["he2gene_annotation"])
        labels = sdata["table"].obs["he2gene_annotation"].to_numpy()
        colours = [tuple(colour) for colour in spots.face_color]
        assert len(set(zip(labels, colours, strict=True))) == len(set(labels)) > 1
    finally:
        opened._viewer.close()
