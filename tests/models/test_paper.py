import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import he2gene_sc as hg
from he2gene_sc._core.slide import resolve
from he2gene_sc.image import PatchReader
from he2gene_sc.models import from_checkpoint, load
from tests.helpers.pictures import read_all

pytestmark = pytest.mark.slow

N_TARGET, N_AUX = 5, 9
TARGET = ["ERBB2", "EPCAM", "COL1A1", "ADIPOQ", "MKI67"]
AUX = ["ENSG00000139618.2", "ACTB", "GAPDH", "VIM", "NOT1", "NOT2", "NOT3", "NOT4", "NOT5"]
NAMES = {"he2gene-base": ("fc1", "fc2", "fc3"), "he2gene-spat": ("fc", "fc_aux", "fc_tmr")}
MEAN, STD = torch.tensor([0.5319, 0.5080, 0.6824]), torch.tensor([0.2442, 0.2063, 0.1633])


class Paper(torch.nn.Module):
    """The paper's network in plain torch, from its description: ResNet-50 and three linear heads."""

    def __init__(self, names):
        super().__init__()
        self.base_model = pytest.importorskip("torchvision").models.resnet50(weights=None)
        self.base_model.fc = torch.nn.Identity()
        for name, n in zip(names, (N_TARGET, N_AUX, 1), strict=True):
            self.add_module(name, torch.nn.Linear(2048, n))
        self.names = names

    def forward(self, x):
        x = self.base_model(x)
        target, aux, tumour = (getattr(self, name)(x) for name in self.names)
        return torch.cat([target, aux], 1), torch.sigmoid(tumour)


@pytest.fixture(scope="module", params=list(NAMES))
def preset(request):
    return request.param


#: For tests that do not depend on the preset: both files hold the same 94 MB of ResNet-50.
first_preset_only = pytest.mark.parametrize("preset", list(NAMES)[:1], indirect=True, scope="module")


@pytest.fixture(scope="module")
def patches():
    """Patches of a spot of the toy slide, in the windows of the paper."""
    (slide,) = resolve(hg.datasets.toy((1, 1), mpp=1.0))
    reader = PatchReader(slide.pyramid, slide.centres, slide.mpp, windows_um=(50.0, 100.0, 150.0), input_px=224)
    return read_all(reader)


@pytest.fixture(scope="module")
def paper(preset, patches):
    """Random weights, with statistics of batch normalisation from images, as in a trained network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Paper(NAMES[preset])
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                # Residual blocks contribute little; otherwise plain torch deviates by 1e-5 from float64.
                torch.nn.init.uniform_(module.weight, *((0.1, 0.3) if name.endswith("bn3") else (0.5, 1.0)))
                torch.nn.init.normal_(module.bias, std=0.1)
                module.momentum = None
        with torch.no_grad():
            network(torch.cat([prepare(window) for window in patches]))
    return network.eval()


@pytest.fixture(scope="module")
def checkpoint(paper, tmp_path_factory):
    path = tmp_path_factory.mktemp("paper") / "model.pt"
    torch.save(paper.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint, preset):
    return from_checkpoint(checkpoint, preset, TARGET, AUX)


def views(patch):
    """Return the eight symmetries as the authors compute them: mirrored or not in both axes, and rotated or not."""
    for turned in (patch, patch.rot90(1, (-2, -1))):
        for down in (turned, turned.flip(-2)):
            yield from (down, down.flip(-1))


def prepare(patches):
    """Resize as PIL does, which rounds to whole grey values, and normalise."""
    x = F.interpolate(torch.from_numpy(patches), (224, 224), mode="bilinear", antialias=True)
    return (x.float() / 255 - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


def test_outputs_on_patches_equal_plain_torch(model, paper, patches):
    with torch.inference_mode():
        seen = model.network.extractor(tuple(torch.from_numpy(p) for p in patches))
        found = model.network.expression(seen.mean(1), torch.arange(N_TARGET + N_AUX))
        proba = model.network.annotation(seen).mean(1)
        outputs = [paper(prepare(window)) for window in patches]
    expression = torch.stack([e for e, _ in outputs]).mean(0)
    assert (expression > 0).any()
    np.testing.assert_allclose(found, expression.clamp(min=0), atol=1e-5)
    np.testing.assert_allclose(proba[:, 1], torch.stack([p for _, p in outputs]).mean(0)[:, 0], atol=1e-5)


@first_preset_only
def test_predict_equals_a_loop_over_windows_and_symmetries(model, paper, patches):
    toy = hg.datasets.toy((1, 1), mpp=1.0)
    with torch.inference_mode():
        outputs = [[paper(view) for view in views(prepare(window))] for window in patches]
    expression = np.mean([[e.numpy() for e, _ in window] for window in outputs], axis=(0, 1))
    tumour = np.mean([[p.numpy() for _, p in window] for window in outputs], axis=(0, 1))[:, 0]
    hg.tl.predict(toy, model=model, genes="all", device="cpu")
    table = toy["he2gene"]
    found = table[:, TARGET + AUX].layers["he2gene"]
    np.testing.assert_allclose(found, np.maximum(expression, 0), atol=1e-5)
    np.testing.assert_allclose(table.obsm["he2gene_annotation_proba"]["tumour"], tumour, atol=1e-5)
    expected = np.where(tumour > 0.5, "tumour", "normal")
    assert table.obs["he2gene_annotation"].astype(str).tolist() == expected.tolist()
    assert table.uns["he2gene"]["tta"]


def test_a_saved_model_is_a_normal_folder(model, tmp_path):
    found = load(model.save(tmp_path / "paper"))
    patches = tuple(torch.full((1, 3, px, px), 90, dtype=torch.uint8) for px in (75, 150, 225))
    with torch.inference_mode():
        outputs = [m.network.extractor(patches) for m in (model, found)]
    np.testing.assert_array_equal(*outputs)
    assert (found.card.fusion, found.card.tta, found.card.windows_um) == ("mean", True, (50.0, 100.0, 150.0))
    assert found.genes.index.tolist() == TARGET + AUX
    assert found.genes["group"].tolist() == ["target"] * N_TARGET + ["auxiliary"] * N_AUX
    assert found.genes[["pcc", "mean", "skill"]].isna().all().all()
    assert not found.genes["reliable"].any()
    assert found.genes.loc["ENSG00000139618.2", "ensembl_id"] == "ENSG00000139618"
    text = (tmp_path / "paper" / "README.md").read_text()
    assert "averaged over windows and the eight symmetries" in text
    assert "unknown" in text


@first_preset_only
def test_tta_can_be_switched_off_and_on(model, tiny_model):
    toy = hg.datasets.toy((1, 1), mpp=2.0)
    for given, used in ((None, True), (False, False)):
        table = hg.tl.predict(toy, model=model, tta=given, copy=True)["table"]
        assert table.uns["he2gene"]["tta"] is used
    table = hg.tl.predict(toy, model=tiny_model, copy=True)["table"]
    assert table.uns["he2gene"]["tta"] is False


@first_preset_only
def test_encoder_weights_that_do_not_fit_raise(model):
    tensors = {key: value for key, value in model.tensors.items() if key != "encoder.conv1.weight"}
    with pytest.raises(ValueError, match=r"(?s)do not fit its encoder 'resnet50'.*conv1\.weight"):
        _ = type(model)(model.card, model.genes, tensors).network


# Valid files


@pytest.mark.parametrize(("wrapper", "parallel"), [("state_dict", True), ("model_state_dict", False), (None, True)])
def test_wrappers_and_prefixes_are_removed(paper, preset, model, tmp_path, wrapper, parallel):
    state = {("module." if parallel else "") + key: value for key, value in paper.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "model.pt")
    found = from_checkpoint(tmp_path / "model.pt", preset, TARGET, AUX)
    assert found.tensors.keys() == model.tensors.keys()
    for key, value in model.tensors.items():
        np.testing.assert_array_equal(found.tensors[key], value)


@first_preset_only
def test_genes_may_come_from_text_files(checkpoint, preset, tmp_path):
    for name, genes in (("target.txt", TARGET), ("aux.txt", AUX)):
        (tmp_path / name).write_text("\n".join(genes) + "\n")
    found = from_checkpoint(checkpoint, preset, tmp_path / "target.txt", str(tmp_path / "aux.txt"))
    assert found.genes.index.tolist() == TARGET + AUX


# Errors


def test_a_file_of_the_other_preset_raises_with_its_name(checkpoint, preset):
    other = next(name for name in NAMES if name != preset)
    with pytest.raises(ValueError, match=f"expected.*found.*layout of preset '{preset}'"):
        from_checkpoint(checkpoint, other, TARGET, AUX)


@first_preset_only
@pytest.mark.parametrize("windows_um", [(-1,), (), 100])
def test_windows_must_be_a_list_of_sides(checkpoint, preset, windows_um):
    with pytest.raises(ValueError, match="`windows_um` is .* a list of sides"):
        hg.models.from_checkpoint(checkpoint, preset, ["A"], ["B"], windows_um=windows_um)


@first_preset_only
def test_an_unknown_preset_raises(checkpoint):
    with pytest.raises(ValueError, match="`preset` is 'st-net', valid"):
        from_checkpoint(checkpoint, "st-net", TARGET, AUX)


@pytest.mark.parametrize(("genes", "match"), [(TARGET[:-1], "names 4 genes, the network has 5"), (AUX, "names 9")])
def test_another_number_of_genes_raises(checkpoint, preset, genes, match):
    with pytest.raises(ValueError, match=f"`target_genes` {match}"):
        from_checkpoint(checkpoint, preset, genes, [f"A{i}" for i in range(N_AUX)])


@first_preset_only
def test_duplicated_genes_raise(checkpoint, preset):
    with pytest.raises(ValueError, match=r"1 genes occur twice, first \['VIM'\]"):
        from_checkpoint(checkpoint, preset, [*TARGET[:-1], "VIM"], AUX)


@first_preset_only
def test_pickled_objects_raise(paper, preset, tmp_path):
    torch.save(paper, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds more than tensors.*refused"):
        from_checkpoint(tmp_path / "model.pt", preset, TARGET, AUX)


@first_preset_only
@pytest.mark.parametrize("size", [0, 1000, 50_000_000])
def test_a_truncated_file_raises(checkpoint, preset, tmp_path, size):
    (tmp_path / "model.pt").write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.pt"):
        from_checkpoint(tmp_path / "model.pt", preset, TARGET, AUX)


@first_preset_only
def test_a_missing_file_is_named(preset, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        from_checkpoint(tmp_path / "nothing.pt", preset, TARGET, AUX)


@first_preset_only
def test_another_encoder_raises_with_the_layers_that_differ(paper, preset, tmp_path):
    state = {key: value for key, value in paper.state_dict().items() if "layer4.2" not in key}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"(?s)not a ResNet-50.*layer4\.2"):
        from_checkpoint(tmp_path / "model.pt", preset, TARGET, AUX)


@first_preset_only
def test_a_diverged_network_raises(paper, preset, tmp_path):
    state = copy.deepcopy(paper.state_dict())
    state[f"{NAMES[preset][0]}.bias"][0] = np.nan
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not finite.*diverged"):
        from_checkpoint(tmp_path / "model.pt", preset, TARGET, AUX)


@first_preset_only
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 1}, "`version` is 1; a text"),
        ({"version": " "}, "`version` is ' '"),
        ({"name": " "}, "`name` is ' '"),
        ({"description": None}, "`description` is None"),
        ({"ensembl_ids": {"ERBB2": "ENSG 1"}}, "`ensembl_ids` has {'ERBB2': 'ENSG 1'}"),
    ],
)
def test_texts_that_cannot_be_stored_raise(checkpoint, preset, options, message):
    with pytest.raises(ValueError, match=message):
        from_checkpoint(checkpoint, preset, TARGET, AUX, **options)


@first_preset_only
def test_blanks_around_genes_are_stripped_and_blank_names_raise(checkpoint, preset, tmp_path):
    found = from_checkpoint(checkpoint, preset, ["ERBB2 ", *TARGET[1:]], AUX)
    assert load(found.save(tmp_path / "model")).genes.index[0] == "ERBB2"
    with pytest.raises(ValueError, match=r"`target_genes` holds \[''\]"):
        from_checkpoint(checkpoint, preset, [" ", *TARGET[1:]], AUX)


@first_preset_only
@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}])
def test_a_file_without_a_state_dict_raises(preset, tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="a state dict is needed"):
        from_checkpoint(tmp_path / "model.pt", preset, TARGET, AUX)
