import multiprocessing
import random
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from he2gene_sc.training import PRESETS, RunOptions, _memory, fit_network
from he2gene_sc.training._gradient.module import annotation_loss, gene_loss, neighbour_loss
from he2gene_sc.training._gradient.patches import BatchLoader, Split, Targets, column_means, split
from he2gene_sc.training._memory import activation_bytes
from tests.helpers.tiny_network import BASE, SPAT, SPEC, encoder, fit_to, toy_set

pytestmark = pytest.mark.slow

CPU = {"device": "cpu"}


def fit(data, preset=BASE, dropout=0.1, **options):
    """Fit a network; fields of the preset and of `RunOptions` can be given as keywords."""
    preset = replace(preset, **{name: options.pop(name) for name in ("lr", "max_epochs") if name in options})
    known = {field.name for field in fields(RunOptions)}
    run = RunOptions(**{name: options.pop(name) for name in known & options.keys()})
    return fit_network(data, preset, encoder(dropout), SPEC, run=run, **(CPU | options))


@cache
def whole_run(preset=BASE):
    """Return an uninterrupted run, which tests must not modify."""
    return fit(toy_set(), preset)


def same(first, second):
    assert first.tensors.keys() == second.tensors.keys()
    for key, value in first.tensors.items():
        np.testing.assert_array_equal(value, second.tensors[key], err_msg=key)
    assert first.history == second.history
    np.testing.assert_array_equal(first.expression, second.expression)


# The recipe


def test_the_presets_hold_the_numbers_of_the_paper():
    base, spat = PRESETS["he2gene-base"], PRESETS["he2gene-spat"]
    assert (base.aux_weight, base.annotation_weight, base.neighbour_weight, base.batch_size) == (20, 1, 0, 256)
    assert (spat.aux_weight, spat.annotation_weight, spat.neighbour_weight, spat.batch_size) == (100, 1, 0.01, 32)
    for preset in (base, spat):
        assert (preset.lr, preset.weight_decay, preset.lr_step, preset.lr_factor) == (1e-5, 1e-4, 10, 0.5)
        assert (preset.max_epochs, preset.patience, preset.clip, preset.encoder) == (100, 10, 1.0, "resnet50")
        assert preset.mean == (0.5319, 0.5080, 0.6824)
        assert preset.std == (0.2442, 0.2063, 0.1633)
        assert (preset.train_window_um, preset.windows_um, preset.tta) == (100.0, (50.0, 100.0, 150.0), True)
        assert preset.n_target_genes == 250


def test_one_logit_has_the_loss_of_a_sigmoid_over_labelled_spots():
    logits, codes = torch.tensor([[0.5], [-2.0], [9.0]]), torch.tensor([1, 0, -1])
    expected = nn.functional.binary_cross_entropy(torch.sigmoid(logits[:2, 0]), codes[:2].float())
    torch.testing.assert_close(annotation_loss(logits, codes), expected)
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    torch.testing.assert_close(annotation_loss(two, codes), expected)
    assert annotation_loss(logits, torch.full((3,), -1)) == 0


def test_windows_of_the_exact_recipe_are_pixels_of_the_paper():
    for preset in PRESETS.values():
        exact = preset.exact_recipe()
        assert exact.windows_um == pytest.approx([75 * 0.69, 150 * 0.69, 225 * 0.69])
        assert exact.train_window_um == pytest.approx(150 * 0.69)
        assert replace(exact, exact=False, train_window_um=100.0, windows_um=preset.windows_um) == preset


def test_the_loss_without_missing_values_equals_that_of_the_paper():
    g = torch.Generator().manual_seed(0)
    predicted, measured = torch.randn(5, 7, generator=g), torch.rand(5, 7, generator=g)
    mask = torch.arange(7) < 3
    target, aux = gene_loss(predicted, measured, mask)
    torch.testing.assert_close(target, nn.functional.mse_loss(predicted[:, :3], measured[:, :3]))
    torch.testing.assert_close(aux, nn.functional.mse_loss(predicted[:, 3:], measured[:, 3:]))
    logits, codes = torch.randn(5, 2, generator=g), torch.tensor([0, 1, 1, 0, 1])
    difference = logits[:, 1] - logits[:, 0]
    expected = nn.functional.binary_cross_entropy_with_logits(difference, codes.float())
    torch.testing.assert_close(annotation_loss(logits, codes), expected)


def test_the_neighbour_loss_is_the_distance_to_the_mean_of_neighbours_with_the_same_label():
    g = torch.Generator().manual_seed(0)
    predicted, neighbour = torch.randn(3, 4, generator=g), torch.randn(5, 4, generator=g)
    owner, alike = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([True, True, False, False, True])
    expected = torch.stack([predicted[0] - neighbour[:2].mean(0), predicted[2] - neighbour[4]]).square().mean()
    torch.testing.assert_close(neighbour_loss(predicted, neighbour, owner, alike), expected)
    assert neighbour_loss(predicted, neighbour, owner, torch.zeros(5, dtype=torch.bool)) == 0
    assert neighbour_loss(predicted, neighbour[:0], owner[:0], alike[:0]) == 0


# Masking


def test_unmeasured_genes_have_no_gradient():
    predicted = torch.randn(4, 3, requires_grad=True)
    measured = torch.rand(4, 3)
    measured[1:3, 1] = torch.nan
    measured[:, 2] = torch.nan
    sum(gene_loss(predicted, measured, torch.tensor([True, True, False]))).backward()
    assert (predicted.grad == 0).numpy().tolist() == measured.isnan().numpy().tolist()
    logits = torch.randn(3, 4, requires_grad=True)
    annotation_loss(logits, torch.tensor([2, -1, 0])).backward()
    assert (logits.grad != 0).any(1).tolist() == [True, False, True]
    annotation_loss(logits, torch.tensor([-1, -1, -1])).backward()
    assert torch.isfinite(logits.grad).all()


def test_neighbours_with_another_label_have_no_gradient():
    predicted, neighbour = torch.randn(2, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    neighbour_loss(predicted, neighbour, torch.tensor([0, 0, 1]), torch.tensor([True, False, False])).backward()
    assert (predicted.grad != 0).any(1).tolist() == [True, False]
    assert (neighbour.grad != 0).any(1).tolist() == [True, False, False]


def module_of(data, preset):
    from he2gene_sc.training._gradient.module import TrainingModule

    torch.manual_seed(0)
    rows = Split("spot", np.arange(len(data)), np.arange(len(data)))
    return TrainingModule(encoder(0.0), SPEC, preset, data, rows, n_classes=3, seed=0).train()


def first_batch(data, allowed=None):
    loader = BatchLoader(data, np.arange(len(data)), batch_size=16, seed=0, neighbours=True, allowed=allowed)
    return next(iter(loader))


def statistics(module):
    return {key: value.clone() for key, value in module.state_dict().items() if "running" in key}


def test_absent_neighbours_do_not_affect_loss_or_batch_normalisation():
    data = toy_set()
    none = replace(data, neighbours=np.full_like(data.neighbours, -1))
    seen = {}
    for name, preset, batch in (
        ("absent", SPAT, first_batch(none)),
        (
            "never read",
            replace(SPAT, neighbour_weight=0.0),
            {k: first_batch(none)[k] for k in ("patches", "targets", "codes")},
        ),
        ("present", SPAT, first_batch(data)),
    ):
        module = module_of(data, preset)
        loss = module.loss(batch)
        loss.backward()
        seen[name] = loss.item(), statistics(module), [p.grad for p in module.parameters()]
    assert len(first_batch(none)["neighbours"]) == 0
    assert seen["absent"][0] == seen["never read"][0]
    for key, value in seen["absent"][1].items():
        torch.testing.assert_close(value, seen["never read"][1][key], rtol=0, atol=0)
    for mine, theirs in zip(seen["absent"][2], seen["never read"][2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert not torch.equal(seen["absent"][1]["encoder.1.running_mean"], seen["present"][1]["encoder.1.running_mean"])


def test_held_out_spots_do_not_serve_as_neighbours():
    data = toy_set()
    training = np.arange(len(data)) < 40
    unrestricted, restricted = first_batch(data), first_batch(data, training)
    assert 0 < len(restricted["neighbours"]) < len(unrestricted["neighbours"])


def test_neighbours_without_a_label_do_not_have_the_same_label():
    data = toy_set(codes=np.full(80, -1))
    assert not first_batch(data)["same"].any()


def test_sections_without_labels_or_without_a_gene_can_be_trained_on():
    data = toy_set()
    targets, codes = data.targets.copy(), data.codes.copy()
    targets[data.sections == 0, 2:4] = np.nan
    codes[data.sections == 1] = -1
    fitted = fit(replace(data, targets=targets, codes=codes))
    assert np.isfinite(fitted.expression).all()
    assert all(np.isfinite(value).all() for value in fitted.tensors.values())
    assert all(np.isfinite(list(row.values())).all() for row in fitted.history)


# Learning


@pytest.mark.parametrize("preset", [BASE, SPAT], ids=["base", "spat"])
def test_a_tiny_network_learns_a_planted_signal(preset):
    data = toy_set(120)
    recipe = replace(preset, lr=2e-2, lr_step=100, aux_weight=1.0, max_epochs=25)
    fitted = fit(data, recipe, dropout=0.0)
    first, best = fitted.history[0], fitted.history[fitted.best_epoch]
    assert best["held_out_error"] < 0.1 * first["held_out_error"]
    assert best["held_out_pearson"] > 0.95
    assert fitted.history[-1]["loss"] < 0.2 * first["loss"]
    assert (fitted.proba.argmax(1) == data.codes[fitted.rows]).mean() > 0.8


def test_the_weights_are_those_of_the_best_epoch():
    data = toy_set()
    long = fit(data, replace(BASE, lr=0.05, max_epochs=12))
    assert long.best_epoch == int(np.argmin([row["held_out_error"] for row in long.history]))
    short = fit(data, replace(BASE, lr=0.05, max_epochs=long.best_epoch + 1))
    for key, value in short.tensors.items():
        np.testing.assert_array_equal(value, long.tensors[key])


def test_training_stops_after_the_patience():
    fitted = fit(toy_set(), replace(BASE, lr=0.1, patience=2, max_epochs=40))
    assert len(fitted.history) == fitted.best_epoch + 3 < 40


def test_the_learning_rate_decays_by_steps():
    fitted = fit(toy_set(), replace(BASE, lr=1e-3, lr_step=2, max_epochs=5))
    assert [row["lr"] for row in fitted.history] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4]


def test_without_labels_there_is_no_annotation_head():
    fitted = fit(toy_set(codes=np.full(80, -1)))
    assert fitted.proba.shape == (len(fitted.rows), 0)
    assert not [key for key in fitted.tensors if key.startswith("annotation")]


# Determinism and resumption


def test_a_seed_gives_the_same_bits_and_keeps_the_global_random_state():
    data = toy_set()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002 - the state a user may rely on
    expected = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    torch.manual_seed(5), np.random.seed(5), random.seed(5)  # noqa: NPY002
    first = fit(data)
    found = torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    assert torch.equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[2] == expected[2]
    same(first, whole_run())
    assert not np.array_equal(fit(data, seed=1).tensors["genes.weight"], first.tensors["genes.weight"])


def test_no_file_is_left_in_the_working_folder_and_the_encoder_is_unchanged(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    network = encoder()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fit_network(toy_set(), BASE, network, SPEC, **CPU)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    found = capfd.readouterr()
    assert found.out + found.err == ""


class Killed(Exception):
    pass


def killer(step):
    from lightning.pytorch import Callback

    class Killer(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                raise Killed

        def on_validation_start(self, trainer, *_):
            if -trainer.global_step == step:
                raise Killed

    return Killer()


@pytest.mark.parametrize(("preset", "every"), [(SPAT, 1), (BASE, 3), (SPAT, 100)], ids=["spat-1", "base-3", "spat-100"])
def test_a_run_killed_at_any_step_and_resumed_ends_like_an_uninterrupted_one(tmp_path, preset, every):
    data, whole = toy_set(), whole_run(preset)
    n = round(len(whole.trained) / 16)
    assert n == 4
    steps = list(range(1, 3 * n + 1)) if (preset, every) == (BASE, 3) else [2, n, n + 3]
    for step in [*steps, -n, -2 * n]:
        folder = tmp_path / f"{step}"
        options = {"checkpoint_dir": folder, "checkpoint_steps": every}
        with pytest.raises(Killed):
            fit(data, preset, callbacks=[killer(step)], **options)
        same(fit(data, preset, resume=True, **options), whole)


def test_runs_resumed_after_two_kills_or_after_the_end_give_the_same_result(tmp_path):
    data, whole = toy_set(), whole_run()
    options = {"checkpoint_dir": tmp_path / "run", "checkpoint_steps": 1, "resume": True}
    for step in (2, 3, 7):
        with pytest.raises(Killed):
            fit(data, callbacks=[killer(step)], **options)
    same(fit(data, **options), whole)
    same(fit(data, **options), whole)


def test_a_run_that_had_stopped_early_is_not_continued(tmp_path):
    data, preset = toy_set(), replace(BASE, lr=0.1, patience=2, max_epochs=40)
    options = {"checkpoint_dir": tmp_path / "run"}
    same(fit(data, preset, **options), fit(data, preset, resume=True, **options))


@pytest.fixture(scope="module")
def start():
    """Return a function that fits in another process, forked from one with all imports."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("processes are not forked here")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.tiny_network", "he2gene_sc.training._gradient.module"])

    def call(path, **options):
        process = context.Process(target=fit_to, args=(path, options))
        process.start()
        return process

    return call


def ended(process):
    process.join(120)
    process.kill()
    return process.exitcode == 0


def test_a_run_killed_by_the_system_and_resumed_ends_like_an_uninterrupted_one(tmp_path, start):
    # Also in another process: the state of earlier tests can change the last digits.
    assert ended(start(tmp_path / "whole.npz"))
    options = {"checkpoint_dir": str(tmp_path / "run"), "checkpoint_steps": 1, "resume": True}
    last = tmp_path / "run" / "last.ckpt"
    for _ in range(2):
        process = start(tmp_path / "weights.npz", **options)
        before = last.stat().st_mtime_ns if last.exists() else None
        while process.is_alive() and (last.stat().st_mtime_ns if last.exists() else None) == before:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        process.join()
    assert ended(start(tmp_path / "weights.npz", **options))
    found, expected = np.load(tmp_path / "weights.npz"), np.load(tmp_path / "whole.npz")
    assert found.files == expected.files
    for key in found.files:
        np.testing.assert_array_equal(found[key], expected[key])


_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.helpers.tiny_network import fit_to
if __name__ == "__main__":
    fit_to(sys.argv[1], {{"devices": 2, "strategy": "ddp"}})
"""


def test_two_processes_learn_the_same_as_one(tmp_path):
    (tmp_path / "run.py").write_text(_SCRIPT.format(root=str(Path(__file__).parents[2])))
    out = str(tmp_path / "weights.npz")
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", out], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = np.load(out)
    # Each process normalises half a batch, so the results are close, not equal.
    whole = fit(toy_set(), SPAT, max_epochs=8)
    np.testing.assert_allclose(found["genes.bias"], whole.tensors["genes.bias"], atol=0.02)


def test_resuming_another_run_raises_with_the_settings_that_differ(tmp_path):
    fit(toy_set(), checkpoint_dir=tmp_path)
    with pytest.raises(FileExistsError, match="resume=True"):
        fit(toy_set(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="another run.*lr was 0.003, is 0.001"):
        fit(toy_set(), checkpoint_dir=tmp_path, resume=True, lr=1e-3)


@pytest.mark.parametrize("changed", ["pixels", "expression", "labels", "places", "grouping", "names of genes"])
def test_resuming_with_other_data_raises_with_the_data_that_differ(tmp_path, changed):
    data = toy_set()
    names = {"genes": list("abcdef")}
    fit(data, checkpoint_dir=tmp_path, max_epochs=1, names=names)
    # A spot other than the first, which a digest of a sample would miss.
    array = {"pixels": "patches", "expression": "targets", "labels": "codes", "places": "coordinates"}.get(changed)
    array = "target_mask" if changed == "grouping" else array
    if array is None:
        names = {"genes": list("abcdeg")}
    else:
        other = getattr(data, array).copy()
        other.reshape(-1)[41 % other.size] = 1 - other.reshape(-1)[41 % other.size] % 2
        data = replace(data, **{array: other})
    with pytest.raises(ValueError, match=rf"another run \(data has other {changed}\); "):
        fit(data, checkpoint_dir=tmp_path, max_epochs=2, resume=True, names=names)


def test_processes_share_a_batch():
    data = toy_set()
    whole = BatchLoader(data, np.arange(80), batch_size=16, seed=3)
    parts = [BatchLoader(data, np.arange(80), batch_size=16, seed=3, rank=r, world=2) for r in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for key in batch:
            joined = torch.stack([half[key] for half in halves], dim=1).flatten(0, 1)
            assert torch.equal(joined, batch[key])


def test_every_epoch_has_every_spot_once_and_all_symmetries_occur():
    data = toy_set(px=4)
    loader = BatchLoader(data, np.arange(80), batch_size=16, seed=0)
    epochs = [torch.cat([batch["targets"] for batch in loader]) for _ in range(2)]
    assert not torch.equal(*epochs)
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == sorted(data.targets[:, 0].tolist())
    turns = loader._order(0)[1]
    assert set(turns.ravel()) == set(range(8))


# Held-out spots


@pytest.mark.parametrize(
    ("groups", "unit", "held"),
    [({}, "patient", "patients"), ({"patients": np.zeros(80, int)}, "section", "sections")],
)
def test_groups_are_not_split_between_training_and_held_out_spots(groups, unit, held):
    data = toy_set(**groups)
    found, train, rows = split(data, BASE)
    assert found == unit
    assert sorted([*train, *rows]) == list(range(80))
    assert not set(getattr(data, held)[train]) & set(getattr(data, held)[rows])


def test_a_block_of_a_single_section_is_held_out():
    zero = np.zeros(80, int)
    data = toy_set(sections=zero, patients=zero)
    unit, train, rows = split(data, BASE)
    assert (unit, len(rows)) == ("block", 16)
    assert data.coordinates[rows, 1].max() <= data.coordinates[train, 1].min()


def test_the_validation_of_the_paper_holds_out_a_random_tenth_of_the_spots():
    data = toy_set()
    unit, train, rows = split(data, BASE, "random")
    assert (unit, len(rows)) == ("spot", 8)
    assert sorted([*train, *rows]) == list(range(80))
    assert set(data.sections[rows]) <= set(data.sections[train])
    assert fit(data, max_epochs=1, rows=split(data, BASE, "random")).unit == "spot"


def test_held_out_predictions_equal_those_of_the_model_on_the_training_window():
    from he2gene_sc.models._embedding import NO_CONTEXT
    from he2gene_sc.models._network import SYMMETRIES, FeatureExtractor, Network

    data, fitted = toy_set(), whole_run()
    network = encoder(0.0)
    state = {k.removeprefix("encoder."): torch.from_numpy(v) for k, v in fitted.tensors.items() if "encoder." in k}
    network.load_state_dict(state)
    heads = {key: torch.from_numpy(value) for key, value in fitted.tensors.items() if "encoder." not in key}
    model = Network(FeatureExtractor(network, SPEC, fusion="mean"), heads, NO_CONTEXT)
    with torch.inference_mode():
        latent = model.extractor((torch.from_numpy(data.patches[fitted.rows]),), SYMMETRIES).mean(1)
        expected = model.expression(latent, torch.arange(6))
    np.testing.assert_allclose(fitted.expression, expected, atol=1e-5)
    assert (fitted.expression >= 0).all()
    np.testing.assert_allclose(fitted.proba.sum(1), 1, atol=1e-5)


def test_held_out_error_and_correlation_equal_those_of_the_predictions():
    from he2gene_sc.stats import pearson

    data = toy_set()
    fitted = fit(data, replace(BASE, tta=False, lr=1e-2, max_epochs=20))
    measured, predicted = data.targets[fitted.rows][:, :3], fitted.expression[:, :3]
    assert (predicted > 0).all()
    row = fitted.history[fitted.best_epoch]
    assert row["held_out_error"] == pytest.approx(np.square(predicted - measured).mean(), rel=1e-4)
    sections = data.sections[fitted.rows]
    r = [pearson(predicted[sections == s], measured[sections == s]) for s in np.unique(sections)]
    assert row["held_out_pearson"] == pytest.approx(np.mean(r), abs=1e-4)


# Errors


def test_a_loss_that_is_not_finite_raises_with_what_to_change():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.eval()

        def forward(self, x):
            y = self.scale * x.mean((2, 3))
            return y * torch.nan if self.training else y

    with pytest.raises(RuntimeError, match=r"became nan in epoch 0, step 0\. Lower `lr` \(it is 0\.003; try 0\.0003\)"):
        fit_network(toy_set(), BASE, Broken(), SPEC, **CPU)


def test_a_diverging_loss_raises_with_what_to_change():
    with pytest.raises(RuntimeError, match="diverged.*Lower `lr`"):
        fit(toy_set(), replace(BASE, lr=100.0, max_epochs=30), dropout=0.0)


def test_running_out_of_memory_raises_with_what_to_change(monkeypatch):
    class Hungry(nn.Linear):
        def forward(self, x):
            if self.training:
                raise torch.OutOfMemoryError
            return super().forward(x.mean((2, 3)))

    monkeypatch.setattr("he2gene_sc.training._gradient.fit.check_memory", lambda *arguments, **options: None)
    with pytest.raises(RuntimeError, match=r"`patches_at_once`, lower `batch_size` \(it is 16\).*hg.PaperRecipe"):
        fit_network(toy_set(), BASE, Hungry(3, 4), SPEC, **CPU)


def test_the_memory_of_a_patch_for_its_gradient_is_measured():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.Tanh(), nn.Linear(8, 4))
    # The patch, and the output of tanh, which gives its derivative and is the input of the next layer.
    assert activation_bytes(network, 16) == 4 * (3 * 16 * 16 + 8)


def test_a_batch_that_does_not_fit_into_memory_raises_before_training(monkeypatch):
    monkeypatch.setattr(_memory, "memory_of_machine", lambda: 200_000)
    with pytest.raises(
        MemoryError, match=r"^16 patches at once need .* pass `patches_at_once` \(at most \d+ fit\).*hg.PaperRecipe"
    ):
        fit(toy_set())
    monkeypatch.setattr(_memory, "memory_of_machine", lambda: 20_000)
    with pytest.raises(MemoryError, match="take a smaller `encoder`"):
        fit(toy_set())


# A batch in parts


def parts_of(network, at_once):
    data = toy_set()
    module = module_of(data, SPAT)
    module.encoder, module.patches_at_once = network, at_once
    loss = module.loss(first_batch(data))
    loss.backward()
    return loss, [p.grad for p in network.parameters()]


def test_a_batch_in_parts_gives_the_same_gradient():
    make = lambda: nn.Sequential(*(layer for layer in encoder(0.0) if not isinstance(layer, nn.BatchNorm2d)))  # noqa: E731
    whole, parts = parts_of(make(), None), parts_of(make(), 5)
    torch.testing.assert_close(parts[0], whole[0])
    for mine, theirs in zip(parts[1], whole[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_batch_normalisation_counts_each_part_once():
    network, again = encoder(0.0).train(), encoder(0.0).train()
    module = module_of(toy_set(), BASE)
    module.encoder, module.patches_at_once = network, 6
    x = module.preprocess(first_batch(toy_set())["patches"])
    module.encode(x).sum().backward()
    for part in x.chunk(3):
        again(part)
    for key, value in again.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value, msg=key)
    assert [norm.momentum for norm in network if isinstance(norm, nn.BatchNorm2d)] == [0.1, 0.1]


def test_a_run_in_parts_learns_and_can_be_resumed(tmp_path):
    data = toy_set()
    options = {"patches_at_once": 7, "checkpoint_dir": tmp_path / "run"}
    whole = fit(data, SPAT, patches_at_once=7)
    with pytest.raises(Killed):
        fit(data, SPAT, callbacks=[killer(5)], **options)
    same(fit(data, SPAT, resume=True, **options), whole)


# Sparse targets and calibration


def test_sparse_targets_give_the_same_result_as_dense_ones(tmp_path):
    data = toy_set()
    dense = np.where(data.targets > 1.5, data.targets, 0).astype(np.float32)
    measured = np.ones((5, 6), bool)
    measured[1, 2] = measured[4, 5] = False
    sparse = Targets([scipy.sparse.csr_array(dense[data.sections == i]) for i in range(5)], measured)
    dense[~measured[data.sections]] = np.nan
    np.testing.assert_array_equal(sparse[[70, 3, 20, 3]], dense[[70, 3, 20, 3]])
    np.testing.assert_array_equal(sparse[10:40:7], dense[10:40:7])
    np.testing.assert_allclose(column_means(sparse, np.arange(80)), np.nanmean(dense, axis=0), rtol=1e-6)
    whole = fit(replace(data, targets=dense))
    same(fit(replace(data, targets=sparse), checkpoint_dir=tmp_path), whole)
    same(fit(replace(data, targets=dense), checkpoint_dir=tmp_path, resume=True), whole)


def test_the_temperature_maximises_the_likelihood_of_held_out_labels():
    data = toy_set(120)
    codes = np.where(np.random.default_rng(0).random(120) < 0.3, 0, data.codes)
    fitted = fit(replace(data, codes=codes), replace(BASE, lr=1e-2, max_epochs=30), dropout=0.0)
    assert fitted.temperature is not None
    views = np.log(fitted.proba)

    def surprise(stretch):
        proba = np.exp(stretch * views)
        return -np.log((proba / proba.sum(1, keepdims=True))[np.arange(len(views)), codes[fitted.rows]]).mean()

    # Views hardly differ here, so scaling their mean is almost the same as scaling each.
    assert surprise(1) < min(surprise(0.8), surprise(1.25))


def test_without_two_held_out_classes_there_is_no_calibration():
    data = toy_set()
    codes = data.codes.copy()
    codes[split(data, BASE)[2]] = -1
    assert fit(replace(data, codes=codes)).temperature is None
    assert fit(toy_set(codes=np.full(80, -1))).temperature is None


def test_a_full_disk_keeps_the_last_checkpoint_intact(tmp_path, monkeypatch):
    from lightning.pytorch import Trainer

    data, options = toy_set(), {"checkpoint_dir": tmp_path, "checkpoint_steps": 1}
    save, written = Trainer.save_checkpoint, []

    def full(self, path, *args, **kwargs):
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(self, path, *args, **kwargs)

    monkeypatch.setattr(Trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match=r"No space left.*another `checkpoint_dir`.*resume=True"):
        fit(data, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    same(fit(data, resume=True, **options), whole_run())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"checkpoint_steps": 0}, "`checkpoint_steps` is 0"),
        ({"patches_at_once": 1}, "`patches_at_once` is 1"),
        ({"resume": True}, "`resume` needs the `checkpoint_dir`"),
        ({"rows": Split("patient", np.arange(1), np.arange(1, 80))}, "too few"),
    ],
)
def test_invalid_arguments_raise(options, match):
    with pytest.raises(ValueError, match=match):
        fit(toy_set(), **options)


def test_target_genes_that_no_held_out_section_measured_raise():
    data = toy_set()
    targets = data.targets.copy()
    targets[split(data, BASE)[2]] = np.nan
    with pytest.raises(ValueError, match="no held-out section measured"):
        fit(replace(data, targets=targets))


@pytest.mark.parametrize("content", [b"", b"junk", "torn", "foreign", "another"])
def test_resuming_from_a_damaged_or_foreign_file_raises_with_its_name(tmp_path, content):
    data = toy_set(40)
    fit(data, replace(BASE, max_epochs=1), checkpoint_dir=tmp_path)
    last = tmp_path / "last.ckpt"
    if content == "torn":
        last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    elif content == "foreign":
        torch.save({"weights": torch.zeros(3)}, last)
    elif content == "another":
        torch.save({"callbacks": {"Keeper": {"run": [1, 2]}}}, last)
    else:
        last.write_bytes(content)
    before = last.read_bytes()
    with pytest.raises(ValueError, match=r"`resume`: .*last.ckpt' is damaged, is not a checkpoint"):
        fit(data, replace(BASE, max_epochs=2), checkpoint_dir=tmp_path, resume=True)
    assert last.read_bytes() == before


def test_a_callback_that_stops_training_immediately_raises():
    from lightning.pytorch.callbacks import Timer

    with pytest.raises(RuntimeError, match="stopped training before its first epoch"):
        fit(toy_set(40), replace(BASE, max_epochs=1), callbacks=[Timer(duration={"seconds": 0})])
