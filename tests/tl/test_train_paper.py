"""The paper's presets of ``hg.tl.train``, on toy sections and a network with a few thousand weights."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse

from he2gene_sc import PaperRecipe
from he2gene_sc.models import load
from tests.helpers.toy_sections import own, predicted, toy, train

pytestmark = pytest.mark.slow

OPTIONS = {"max_epochs": 2, "batch_size": 32, "lr": 3e-3, "n_target_genes": 12}
SHAPE = (4, 5)


def sections():
    return [toy(i, patient, shape=SHAPE) for i, patient in enumerate("ABA")]


@pytest.fixture(scope="module", params=["he2gene-base", "he2gene-spat"])
def model(request):
    return train(sections(), preset=request.param, name="mine", **OPTIONS)


def weights(model):
    return {key: value for key, value in model.tensors.items() if key.startswith("encoder.")}


def test_the_card_names_recipe_and_patients(model):
    card = model.card
    assert card.training["preset"] in ("he2gene-base", "he2gene-spat")
    assert card.windows_um == (50.0, 100.0, 150.0)
    assert (card.fusion, card.tta, card.training["epochs"]) == ("mean", True, 2)
    facts = dict(card.training["sections"]["S1"])
    assert set(facts.pop("image")) == {"shape", "sha256", "spots"}
    assert facts == {"patient": "B", "n_spots": 20, "mpp": 2.0}
    # The patient with one section is closest to a tenth of the spots.
    assert card.training["held_out_to_stop"] == {"S1": 20}
    assert card.training["chosen_by"] == "held-out patients"
    assert (model.genes["group"] == "target").sum() == 12
    (protocol,) = card.metrics
    assert "held-out patients" in protocol


def test_the_network_has_been_trained(model):
    before = own()[0].state_dict()
    assert any((value != before[key.removeprefix("encoder.")].numpy()).any() for key, value in weights(model).items())


def test_the_model_predicts_before_and_after_saving(model, tmp_path):
    saved = load(model.save(tmp_path / "mine"), encoder=own())
    one, two = (predicted(toy(5, shape=(3, 4)), m) for m in (model, saved))
    assert np.isfinite(one.layers["he2gene"]).all()
    assert one.layers["he2gene"].std(axis=0).max() > 0
    assert set(one.obs["he2gene_annotation"]) <= set(model.card.classes)
    np.testing.assert_allclose(one.layers["he2gene"], two.layers["he2gene"], atol=1e-5)


def test_training_is_deterministic(model):
    again = train(sections(), preset=model.card.training["preset"], name="mine", **OPTIONS)
    for key, value in model.tensors.items():
        np.testing.assert_array_equal(value, again.tensors[key], err_msg=key)


@pytest.mark.parametrize("model", ["he2gene-base"], indirect=True)
def test_a_resumed_run_gives_the_same_weights(model, tmp_path):
    class Killed(BaseException):
        pass

    from lightning.pytorch.callbacks import Callback

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise Killed

    options = OPTIONS | {"preset": "he2gene-base", "name": "mine", "checkpoint_dir": tmp_path, "checkpoint_steps": 1}
    with pytest.raises(Killed):
        train(sections(), callbacks=[Kill()], **options)
    assert list(tmp_path.rglob("*.ckpt"))
    resumed = train(sections(), resume=True, **options)
    for key, value in model.tensors.items():
        np.testing.assert_array_equal(value, resumed.tensors[key], err_msg=key)


def test_random_validation_is_named_in_the_card():
    found = train(sections(), preset="he2gene-base", validation="random", **(OPTIONS | {"max_epochs": 1}))
    (protocol,) = found.card.metrics
    assert "LEAKS" in protocol
    assert not found.genes["reliable"].any()
    assert len(found.card.training["held_out_to_stop"]) > 1


def test_one_patient_gives_a_warning(caplog):
    train(
        [toy(0, shape=SHAPE), toy(1, shape=SHAPE)],
        preset="he2gene-base",
        annotation_key=None,
        windows_um=(100.0,),
        **(OPTIONS | {"max_epochs": 1}),
    )
    assert "not for other patients" in caplog.text


def test_another_training_does_not_change_the_users_network():
    network, spec = own()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    train(sections(), preset="he2gene-base", encoder=(network, spec), **(OPTIONS | {"max_epochs": 1}))
    for key, value in network.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    assert not network.training


def test_a_user_network_named_resnet50_keeps_its_normalisation(tmp_path):
    network, spec = own()
    encoder = network, replace(spec, name="resnet50")
    model = train(sections(), preset="he2gene-base", encoder=encoder, **(OPTIONS | {"max_epochs": 1}))
    assert model.card.encoder["mean"] == list(spec.mean)
    first = predicted(toy(0, shape=SHAPE), model).layers["he2gene"]
    again = load(model.save(tmp_path / "model"), encoder=encoder)
    np.testing.assert_allclose(predicted(toy(0, shape=SHAPE), again).layers["he2gene"], first, atol=1e-5)


# exact=True


def exact_sections():
    """Toy sections with a gene detected in one spot, a gene detected in no spot, and two labels."""
    found = sections()
    for i, sdata in enumerate(found):
        table = sdata["table"]
        counts = table.X.toarray()
        rare, never = (list(table.var_names).index(gene) for gene in (RARE, NEVER))
        counts[:, [rare, never]] = 0
        counts[0, rare] = int(i == 0)
        table.X = scipy.sparse.csr_matrix(counts)
        table.obs["annotation"] = np.where(np.arange(table.n_obs) % 2, "tumour", "normal")
    return found


RARE, NEVER = "FTL", "GAPDH"


@pytest.fixture(scope="module")
def exact_model():
    from he2gene_sc.training._gradient import module as _module

    heads = []

    class Watched(_module.TrainingModule):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            heads.append(self.annotation.out_features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_module, "TrainingModule", Watched)
        model = train(exact_sections(), preset="he2gene-base", exact=True, min_spot_share=0, **OPTIONS)
    return model, heads


def test_exact_keeps_all_genes(exact_model):
    model, _ = exact_model
    listed = toy(0, shape=(2, 2))["table"].var_names
    assert set(model.genes.index) == set(listed)
    assert model.genes.loc[NEVER, "mean"] == 0
    assert (model.genes["group"] == "target").sum() == OPTIONS["n_target_genes"]


def test_exact_has_one_uncalibrated_logit(exact_model):
    model, heads = exact_model
    assert heads == [1]
    assert model.card.classes == ("normal", "tumour")
    weight, bias = model.tensors["annotation.weight"], model.tensors["annotation.bias"]
    assert (weight.shape[1], bias.shape) == (2, (2,))
    assert (weight[:, 0] == 0).all()
    assert bias[0] == 0
    assert weight[:, 1].any()
    assert "annotation_temperature" not in model.card.training
    assert "not calibrated, as in the paper" in " ".join(model.card.limitations)
    assert model.card.training["exact"] is True


def test_exact_windows_are_the_pixels_of_the_paper(exact_model):
    model, _ = exact_model
    assert model.card.windows_um == pytest.approx((51.75, 103.5, 155.25))
    assert model.card.training["train_window_um"] == pytest.approx(150 * 0.69)
    assert [round(um / 0.69, 6) for um in model.card.windows_um] == [75, 150, 225]


def test_exact_trains_in_single_precision(monkeypatch):
    import lightning.pytorch

    from he2gene_sc.training._gradient import fit as _fit

    class Stop(BaseException):
        pass

    precisions = []

    def trainer(**options):
        precisions.append(options["precision"])
        raise Stop

    monkeypatch.setattr(_fit, "default_precision", lambda accelerator: "bf16-mixed")
    monkeypatch.setattr(lightning.pytorch, "Trainer", trainer)
    with pytest.raises(Stop):
        train(sections(), preset="he2gene-base", annotation_key=None, exact=True, **OPTIONS)
    assert precisions == ["32-true"]


def test_precision_can_be_a_number():
    assert PaperRecipe("he2gene-base", precision=32, exact=True).precision == "32"
    with pytest.raises(ValueError, match="`precision` is '64', valid"):
        PaperRecipe("he2gene-base", precision=64)


def test_the_default_preset_is_not_a_recipe_of_the_paper():
    with pytest.raises(ValueError, match=r"`name` is 'default', valid: \['he2gene-base', 'he2gene-spat'\]"):
        PaperRecipe("default", exact=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_spot_share": 0.1}, "`min_spot_share` is 0.1, but `exact` sets it"),
        ({"windows_um": (50.0,)}, r"`windows_um` is \(50.0,\), but `exact` sets it"),
        ({"precision": "bf16-mixed"}, "`precision` is 'bf16-mixed', but `exact` sets it"),
        ({"exact": "yes"}, "`exact` is 'yes'; True or False is needed"),
    ],
)
def test_exact_raises_for_options_that_it_sets(options, message):
    with pytest.raises(ValueError, match=message):
        train([], **({"preset": "he2gene-base", "exact": True} | options))


def test_exact_raises_for_a_third_class():
    with pytest.raises(ValueError, match=r"`exact` is True, .* two classes.*found \['adipose.*with classes="):
        train(sections(), preset="he2gene-base", exact=True, **OPTIONS)
