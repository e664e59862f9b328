import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from he2gene_sc.image import PatchReader, Pyramid
from he2gene_sc.inference import encode, n_readers, predict, resolve_device, resolve_dtype
from he2gene_sc.models._network import SYMMETRIES, FeatureExtractor
from tests.helpers.pictures import read_all

CPU = torch.device("cpu")
# Even numbers: windows of averaged pixels then have no ties, which would round differently after mirroring.
CENTRES = np.random.default_rng(3).integers(0, 81, (17, 2)) * 2.0


class LimitedMemory(torch.nn.Module):
    """Runs out of memory above ``limit`` spots."""

    def __init__(self, extractor, limit):
        super().__init__()
        self.extractor, self.limit, self.sizes = extractor, limit, []

    def forward(self, patches, symmetries):
        self.sizes.append(len(patches[0]))
        if len(patches[0]) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.extractor(patches, symmetries)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(1, 256, (3, 160, 160), dtype=np.uint8)


@pytest.fixture
def network(tiny_model):
    return tiny_model.network


def read(image, centres=CENTRES, batch_size=8):
    return PatchReader(Pyramid.single(image), centres, 1.0, windows_um=(32.0, 64.0), input_px=32, batch_size=batch_size)


def run(network, reader, genes=None, **options):
    genes = np.arange(network.genes_bias.shape[0]) if genes is None else genes
    found = predict(network, reader, device=CPU, **{"dtype": torch.float32} | options)
    expression = np.empty((len(found.embedding), len(genes)), np.float32)
    for rows, part, values in network.expression_blocks(torch.from_numpy(found.embedding), genes):
        expression[rows, part] = values
    return SimpleNamespace(**vars(found), expression=expression)


def features(extractor, reader):
    out = {}
    for batch, part in encode(extractor, reader, device=CPU, dtype=torch.float32):
        out.update(zip(batch.index.tolist(), part.detach().numpy(), strict=True))
    return np.stack([out[i] for i in range(reader.n_spots)])


def assert_same(a, b):
    for name in ("expression", "proba", "embedding"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 17, 100])
def test_any_batch_size_gives_the_same_predictions(network, image, batch_size):
    assert_same(run(network, read(image, batch_size=batch_size)), run(network, read(image)))


def test_predictions_follow_the_order_of_the_spots(network, image):
    order = np.random.default_rng(0).permutation(len(CENTRES))
    straight, shuffled = run(network, read(image)), run(network, read(image, CENTRES[order]))
    np.testing.assert_allclose(shuffled.expression, straight.expression[order], atol=1e-5)
    assert np.ptp(straight.embedding, axis=0).min() > 1e-3


def test_a_single_spot_gets_the_same_prediction_as_among_others(network, image):
    together = run(network, read(image))
    single = run(network, read(image, CENTRES[4:5]))
    np.testing.assert_allclose(single.expression[0], together.expression[4], atol=1e-5)


def test_predictions_equal_the_heads_applied_to_the_embedding(tiny_model, network, image):
    found = run(network, read(image))
    weights = {name: tensor.astype(float) for name, tensor in tiny_model.tensors.items()}
    expression = np.maximum(found.embedding @ weights["genes.weight"] + weights["genes.bias"], 0)
    logits = np.exp(found.embedding @ weights["annotation.weight"] + weights["annotation.bias"])
    np.testing.assert_allclose(found.expression, expression, atol=1e-4)
    np.testing.assert_allclose(found.proba, logits / logits.sum(1, keepdims=True), atol=1e-5)


def test_chosen_genes_have_the_order_of_the_argument(network, image):
    all_genes, chosen = run(network, read(image)), run(network, read(image), np.array([7, 0, 3]))
    np.testing.assert_allclose(chosen.expression, all_genes.expression[:, [7, 0, 3]], atol=1e-6)


def test_a_wide_gene_head_computed_in_parts_gives_the_same_result(network, image, monkeypatch):
    whole = run(network, read(image))
    monkeypatch.setattr("he2gene_sc.models._network._GENES_AT_ONCE", 4)
    assert_same(run(network, read(image)), whole)


def test_callers_of_expression_blocks_do_not_run_in_inference_mode(network):
    blocks = network.expression_blocks(torch.zeros(2, network.n_latent), np.arange(2))
    next(blocks)
    assert not torch.is_inference_mode_enabled()


def test_no_spots_give_empty_predictions(network, image):
    found = run(network, read(image, np.empty((0, 2))))
    assert found.expression.shape[0] == found.proba.shape[0] == found.embedding.shape[0] == 0


def test_progress_counts_every_spot(network, image):
    done = []
    run(network, read(image), progress=done.append)
    assert sum(done) == len(CENTRES)


def test_out_of_memory_halves_the_batch_and_gives_the_same_features(network, image):
    limited = LimitedMemory(network.extractor, limit=3)
    np.testing.assert_allclose(features(limited, read(image)), features(network.extractor, read(image)), atol=1e-5)
    assert limited.sizes[:2] == [6, 3]
    assert max(limited.sizes[1:]) == 3


def test_a_single_spot_that_does_not_fit_into_memory_raises(network, image):
    with pytest.raises(RuntimeError, match="one spot does not fit"):
        features(LimitedMemory(network.extractor, limit=0), read(image))


def test_tta_averages_the_eight_symmetries(network, image):
    patches = read_all(read(image))
    views = []
    for turns, mirrored in SYMMETRIES:
        turned = [np.rot90(p, turns, axes=(2, 3)) for p in patches]
        turned = [np.flip(p, 3) if mirrored else p for p in turned]
        views.append(network.extractor(tuple(torch.from_numpy(p.copy()) for p in turned))[:, 0].numpy())
    assert len({view.tobytes() for view in views}) == 8
    expected = network.embed(np.mean(views, axis=0), CENTRES, 1.0)
    np.testing.assert_allclose(run(network, read(image), tta=True).embedding, expected, atol=1e-4)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_tta_is_invariant_to_rotation_and_mirroring_of_the_image(network, image, turns, mirrored):
    turned, centres = np.rot90(image, turns, axes=(1, 2)), CENTRES
    for _ in range(turns):
        centres = np.stack([centres[:, 1], 160 - centres[:, 0]], axis=1)
    if mirrored:
        turned, centres = turned[:, :, ::-1], np.stack([160 - centres[:, 0], centres[:, 1]], axis=1)
    reference = run(network, read(image), tta=True)
    assert_same(run(network, read(turned.copy(), centres), tta=True), reference)


def test_without_tta_mirroring_the_image_changes_the_embedding(network, image):
    turned = run(network, read(image[:, :, ::-1].copy(), np.stack([160 - CENTRES[:, 0], CENTRES[:, 1]], axis=1)))
    assert np.abs(turned.embedding - run(network, read(image)).embedding).max() > 1e-2


def test_auto_device_is_available():
    assert torch.zeros(1, device=resolve_device("auto")).item() == 0


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xpu", ""])
def test_an_unknown_or_absent_device_raises_and_lists_the_available_ones(device):
    with pytest.raises(ValueError, match="valid here: 'auto', 'cpu'"):
        resolve_device(device)


def test_a_cpu_has_one_reader_and_a_gpu_one_a_core_unless_the_settings_say_otherwise():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert n_readers(CPU, None) == 1
    assert n_readers(torch.device("cuda"), None) == min(8, cores)
    assert n_readers(CPU, 3) == n_readers(torch.device("cuda"), 3) == 3


def test_auto_dtype_is_float32_on_the_cpu():
    assert resolve_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), (torch.float32, torch.float32)])
def test_dtypes_resolve_by_name_and_by_type(name, dtype):
    assert resolve_dtype(name, CPU) == dtype


@pytest.mark.parametrize("dtype", ["float8", torch.int8, "float16", torch.float16])
def test_unsupported_dtypes_raise(dtype):
    with pytest.raises(ValueError, match="`dtype`"):
        resolve_dtype(dtype, CPU)


def test_bfloat16_predictions_stay_close_to_float32(network, image):
    half = run(network, read(image), dtype=torch.bfloat16)
    full = run(network, read(image))
    assert half.embedding.dtype == np.float32
    assert np.abs(half.embedding - full.embedding).max() < 0.05 * np.abs(full.embedding).max()


def test_keeping_the_heap_does_not_change_results():
    from he2gene_sc.models._network import keep_heap

    x = torch.rand(1, 3, 64, 64)
    layer = torch.nn.Conv2d(3, 8, 3)
    with torch.inference_mode():
        before = layer(x)
        with keep_heap(), keep_heap():
            assert torch.equal(layer(x), before)
        assert torch.equal(layer(x), before)


# Tiles


def test_a_tiled_window_is_the_mean_of_windows_at_the_input_scale_of_the_encoder(image):
    from tests.helpers.toy_sections import SPEC, network

    centres, net = np.array([[64.0, 80.0], [70.0, 60.0]]), network()
    tiled = FeatureExtractor(net, SPEC, tiles=(1, 2))
    assert tiled.window_px == (16, 32)
    options = {"windows_um": (16.0, 32.0), "input_px": tiled.window_px}
    reader = PatchReader(Pyramid.single(image), centres, 1.0, **options)
    assert [(w.factor, w.size) for w in reader.plan.windows] == [(1, 16), (1, 32)]
    found = features(tiled, reader)[:, 0]
    corners = np.concatenate([centres + 8 * np.array(step) for step in ((-1, -1), (1, -1), (-1, 1), (1, 1))])
    whole = FeatureExtractor(net, SPEC)
    single = features(whole, PatchReader(Pyramid.single(image), corners, 1.0, windows_um=(16.0,), input_px=16))[:, 0]
    np.testing.assert_allclose(found[:, 12:24], single[:, :12].reshape(4, 2, 12).mean(0), atol=1e-5)
    coarse = features(whole, PatchReader(Pyramid.single(image), centres, 1.0, **options | {"input_px": 16}))[:, 0]
    np.testing.assert_allclose(found[:, :12], coarse[:, :12], atol=1e-5)
    assert np.abs(found[:, 12:24] - coarse[:, 12:24]).max() > 0.01


def test_tiles_are_rotated_and_mirrored_with_their_window():
    from tests.helpers.toy_sections import SPEC, network

    extractor = FeatureExtractor(network(), SPEC, tiles=(2,))
    patch = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extractor((patch,), SYMMETRIES)[0]
    for i, (turns, mirrored) in enumerate(SYMMETRIES):
        turned = torch.rot90(patch, turns, dims=(2, 3))
        expected = extractor((turned.flip(3) if mirrored else turned,))[0, 0]
        torch.testing.assert_close(found[i, :12], expected[:12], atol=1e-5, rtol=1e-4)
