"""The embedding of spots, relative to their slide and neighbours, and the stages of an encoder."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.sparse
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from he2gene_sc.models import EncoderSpec, load_encoder
from he2gene_sc.models._embedding import NO_CONTEXT, Basis, Context, rings_of
from he2gene_sc.models._encoders.stages import Stages, default_stages, stage_sizes, wrap_stages
from he2gene_sc.models._network import FeatureExtractor

pytestmark = pytest.mark.slow

RINGS = ((50.0, 350.0), (350.0, 600.0), (600.0, 900.0))
few = settings(max_examples=40, deadline=None)


def slide(n, f=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, f)).astype(np.float32)


# Standardisation


@pytest.mark.parametrize("prior", [0.001, 1.0])
def test_standardisation_removes_the_stain_of_a_large_slide(prior):
    """Affine changes of the features of a whole slide have no effect if the prior has little weight."""
    x = slide(4000)
    context = Context(prior_spots=prior)
    mean, scale = np.zeros(5, np.float32), np.ones(5, np.float32)
    gain, shift = np.array([0.5, 1, 2, 3, 0.7], np.float32), np.array([1, -2, 0, 3, 0.5], np.float32)
    plain, changed = context.standardise(x, mean, scale), context.standardise(gain * x + shift, mean, scale)
    np.testing.assert_allclose(changed, plain, atol=2e-2 * prior + 1e-4)
    assert (
        np.abs(NO_CONTEXT.standardise(gain * x + shift, mean, scale) - NO_CONTEXT.standardise(x, mean, scale)).max() > 1
    )


def test_standardisation_is_the_posterior_mean_and_variance():
    x, context = slide(30), Context(prior_spots=20.0)
    mean, scale = np.full(5, 0.7, np.float32), np.full(5, 2.0, np.float32)
    centre = (30 * x.mean(0) + 20 * 0.7) / 50
    spread = np.sqrt((30 * x.var(0) + 20 * 4.0) / 50)
    np.testing.assert_allclose(context.standardise(x, mean, scale), (x - centre) / spread, atol=1e-5)


def test_a_single_spot_is_standardised_nearly_by_training():
    x, mean, scale = slide(1), np.full(5, 3.0, np.float32), np.full(5, 2.0, np.float32)
    expected = (x - mean) / scale
    np.testing.assert_allclose(Context(prior_spots=20.0).standardise(x, mean, scale), expected, rtol=0.1)
    np.testing.assert_allclose(Context(prior_spots=1e9).standardise(x, mean, scale), expected, rtol=1e-5)
    np.testing.assert_allclose(NO_CONTEXT.standardise(x, mean, scale), expected, rtol=1e-6)


@pytest.mark.parametrize("context", [NO_CONTEXT, Context()])
def test_a_feature_without_scale_is_zero(context):
    found = context.standardise(slide(9), np.zeros(5, np.float32), np.array([1, 0, 1, 1, 0], np.float32))
    assert (found[:, [1, 4]] == 0).all()
    assert (found[:, [0, 2, 3]] != 0).all()
    assert found.dtype == np.float32


@pytest.mark.parametrize("context", [NO_CONTEXT, Context()])
def test_no_spots_give_an_empty_array(context):
    assert context.standardise(slide(0), np.zeros(5, np.float32), np.ones(5, np.float32)).shape == (0, 5)
    basis = Basis(np.zeros(5), np.ones(5), np.eye(5), np.ones((5 * (1 + len(context.rings_um)), 3)), context)
    assert basis.embed(slide(0), rings_of(np.empty((0, 2)), context.rings_um)).shape == (0, 3)


def test_a_context_survives_json():
    context = Context(((0, 100),), (0.5,), None)
    assert Context(**context.to_dict()) == context
    assert Context(**{k: (list(map(list, v)) if k == "rings_um" else v) for k, v in asdict(context).items()}) == context


@pytest.mark.parametrize("rings", [((100.0, 100.0),), ((-1.0, 50.0),), ((50.0, 20.0),), ((0.0, 50.0), (50.0, 90.0))])
def test_invalid_rings_raise(rings):
    with pytest.raises(ValueError, match="rings_um"):
        Context(rings, (1.0,))


# Rings


@given(seed=st.integers(0, 1000), n=st.integers(1, 60))
@few
def test_rings_equal_a_loop_over_spots(seed, n):
    centres = np.random.default_rng(seed).uniform(0, 1500, (n, 2))
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    for (inner, outer), found in zip(RINGS, rings_of(centres, RINGS), strict=True):
        expected = np.zeros((n, n))
        for i in range(n):
            near = [j for j in range(n) if j != i and inner <= distance[i, j] < outer]
            expected[i, near or [i]] = 1 / max(1, len(near))
        np.testing.assert_allclose(found.toarray(), expected, atol=1e-6)
        assert found.dtype == np.float32


def test_the_inner_radius_is_included_and_the_outer_is_not():
    near, far = rings_of(np.array([[0.0, 0], [350, 0]]), ((50.0, 350.0), (350.0, 600.0)))
    np.testing.assert_array_equal(near.toarray(), np.eye(2))
    np.testing.assert_array_equal(far.toarray(), 1 - np.eye(2))


def test_spots_at_the_same_place_are_not_neighbours():
    (ring,) = rings_of(np.zeros((3, 2)), ((50.0, 350.0),))
    np.testing.assert_array_equal(ring.toarray(), np.eye(3))


def test_rings_of_no_rings_and_of_no_spots():
    assert rings_of(np.zeros((4, 2)), ()) == ()
    assert [ring.shape for ring in rings_of(np.empty((0, 2)), RINGS)] == [(0, 0)] * 3


def test_an_isolated_spot_is_its_own_neighbour():
    rng = np.random.default_rng(0)
    context = Context(RINGS[:2], (0.7, 0.5), None)
    basis = Basis(np.zeros(5), np.ones(5), rng.normal(size=(5, 2)), rng.normal(size=(6, 3)), context)
    x = slide(1)
    own = x @ basis.projection
    np.testing.assert_allclose(
        basis.embed(x, rings_of(np.zeros((1, 2)), context.rings_um)), np.tile(own, 3) @ basis.mixing, rtol=1e-5
    )


def test_the_embedding_combines_the_components_of_a_spot_and_of_its_rings():
    rng = np.random.default_rng(1)
    centres = 200.0 * np.stack(np.mgrid[:6, :6], -1).reshape(-1, 2)
    context = Context(RINGS, (0.7, 0.5, 0.3), 20.0)
    mean, scale = rng.normal(size=5).astype(np.float32), np.ones(5, np.float32)
    basis = Basis(mean, scale, rng.normal(size=(5, 2)), rng.normal(size=(8, 3)), context)
    x = slide(36)
    own = context.standardise(x, mean, scale) @ basis.projection
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    parts = [own]
    for inner, outer in RINGS:
        parts.append(np.stack([own[(d >= inner) & (d < outer)].mean(0) for d in distance]))
    rings = rings_of(centres, RINGS)
    np.testing.assert_allclose(basis.embed(x, rings), np.hstack(parts) @ basis.mixing, atol=1e-5)
    assert all(scipy.sparse.issparse(ring) for ring in rings)


# Stages


def test_stages_of_lite0_are_the_means_of_its_maps():
    encoder, spec = load_encoder("efficientnet-lite0")
    stages = default_stages(encoder)
    assert stages == (2, 3, 4)
    x = torch.randn(2, 3, spec.input_px, spec.input_px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps = encoder.forward_intermediates(x, intermediates_only=True)
        found = Stages(encoder, stages)(x)
    assert found.shape[1] == sum(stage_sizes(encoder, stages, spec.input_px)) == 40 + 112 + 320
    np.testing.assert_allclose(found, torch.cat([maps[i].mean((2, 3)) for i in stages], 1), atol=1e-5)


def test_stages_of_the_fused_network_equal_those_of_the_network():
    encoder, spec = load_encoder("efficientnet-lite0")
    patches = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = FeatureExtractor(encoder, spec, stages=(1, 4))
    with torch.inference_mode():
        found = extractor((patches,))[:, 0]
        expected = Stages(encoder, (1, 4))(extractor.preprocess(patches))
    assert found.shape[1] == expected.shape[1] + 9
    np.testing.assert_allclose(found[:, :-9], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", (2, 3, 4)),
        ("efficientnet_b0", (2, 3, 4)),
        ("efficientnet_lite1", (2, 3, 4)),
        ("densenet121", None),
        ("vit_tiny_patch16_224", None),
        ("test_vit", None),
    ],
)
def test_default_stages_are_the_last_three_of_a_convolutional_network(name, expected):
    found = default_stages(timm.create_model(name, pretrained=False, num_classes=0))
    assert found == expected or (name == "densenet121" and found == (2, 3, 4))


def test_a_users_module_has_no_stages():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    assert default_stages(module) is None
    assert wrap_stages(module, None) is module
    assert stage_sizes(module, None, 16) == (12,)


@pytest.mark.parametrize("stages", [(), (5,), (-1,), (0, 9)])
def test_invalid_stages_raise_with_the_valid_ones(stages):
    encoder, spec = load_encoder("efficientnet-lite0")
    with pytest.raises(ValueError, match=r"`stages` is .*valid for this encoder: 0 to 4"):
        FeatureExtractor(encoder, spec, stages=stages)


def test_stages_of_a_module_without_stages_raise():
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(ValueError, match="valid for this encoder: None"):
        FeatureExtractor(module, EncoderSpec("own", input_px=16), stages=(0,))


def test_a_fine_slide_uses_the_mean_of_both_halves_and_a_coarse_one_the_second():
    context = Context(RINGS, (0.7, 0.5, 0.3), 20.0, fine_below_mpp=1.5)
    assert Context(**context.to_dict()) == context
    basis = Basis(np.zeros(5), np.ones(5), np.eye(5), np.ones((20, 4)), context)
    assert basis.column_weights(1.49).tolist() == [0.5, 0.5, 0.5, 0.5]
    assert basis.column_weights(1.5).tolist() == [0, 0, 1, 1]
    assert replace(basis, context=Context()).column_weights(0.5).tolist() == [1, 1, 1, 1]
