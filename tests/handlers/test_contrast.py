# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The handler that compares an evaluator's network with another one, against direct calls and dense matrices."""

from __future__ import annotations

import copy
import logging

import nibabel
import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer

from monai_ifim.handlers import ContrastHandler
from tests import truths
from tests.handlers import CNN, CPU, chosen, evaluator, items, logged, pictures

PREFIX = "ifim_contrast_"


def pair(dtype=torch.float64):
    return CNN(dtype=dtype), CNN(dtype=dtype, seed=1)


def compared(network, handler, data, **options):
    engine = evaluator(network, data, val_handlers=[handler], **options)
    engine.run()
    return engine


def dense_ends(networks, image, damping=1e-3):
    """Greatest and smallest ratio of the dense problem."""
    a, b = (truths.dense_fisher(copy.deepcopy(network).eval(), image) for network in networks)
    floor = damping * float(max(torch.linalg.eigvalsh(a)[-1], torch.linalg.eigvalsh(b)[-1])) * torch.eye(len(a))
    values = scipy.linalg.eigh(a + floor, b + floor, eigvals_only=True)
    return values[-1], values[0]


def test_ratios_are_those_of_the_dense_problem_and_the_table_holds_what_both_networks_do(tmp_path):
    networks, images = pair(), pictures()
    handler = ContrastHandler(networks[1], tmp_path, max_images=4, strengths=[0.003, 0.03])
    engine = compared(networks[0], handler, items(images))
    table = pd.read_csv(tmp_path / "ifim_contrast" / "contrast.csv")
    positions = chosen(len(images), 4)
    assert sorted(table.image.unique()) == positions
    assert set(table.name) == {f"case_{position:02d}" for position in positions}
    assert len(table) == 4 * 2 * 2
    ends = {position: dense_ends(networks, images[position]) for position in positions}
    for row in table.itertuples():
        assert row.ratio == pytest.approx(ends[row.image][row.direction == "b_over_a"], rel=1e-6)
        assert row.residual == 0
    small = table[table.strength == 0.003]
    for name in ("a", "b"):
        np.testing.assert_allclose(small[f"kl_{name}"], small[f"predicted_{name}"], rtol=0.02, atol=1e-9)
    over = small[small.direction == "a_over_b"]
    assert (over.kl_a > over.kl_b).all()
    found = logged(engine, PREFIX)
    assert found["images"] == 4
    assert found["skipped"] == 0
    assert found["log10_ratio"] == pytest.approx(np.median([np.log10(each[0]) for each in ends.values()]), rel=1e-6)
    reverse = np.median([-np.log10(each[1]) for each in ends.values()])
    assert found["log10_ratio_reverse"] == pytest.approx(reverse, rel=1e-6)
    at_strength = table[(table.strength == 0.03) & (table.direction == "b_over_a")]
    assert found["kl_b_over_a_a"] == pytest.approx(at_strength.kl_a.mean())
    assert found["kl_b_over_a_b"] == pytest.approx(at_strength.kl_b.mean())


def test_the_table_over_images_has_the_medians_of_the_table_with_intervals_and_leaves_out_a_kl_of_zero(tmp_path):
    networks = pair()
    handler = ContrastHandler(networks[1], tmp_path, strengths=[0.03], components=False)
    compared(networks[0], handler, items(pictures(12)))
    table = pd.read_csv(tmp_path / "ifim_contrast" / "contrast_table.csv").set_index(["direction", "endpoint"])
    assert len(table) == 2 * 4
    assert (table["count"] == 12).all()
    over = handler.table[handler.table.direction == "a_over_b"]
    truth = {"log10_ratio": np.log10(over.ratio), "kl_a": over.kl_a, "log10_kl_ratio": np.log10(over.kl_a / over.kl_b)}
    for endpoint, values in truth.items():
        row = table.loc["a_over_b", endpoint]
        assert row.value == pytest.approx(np.median(values))
        assert values.min() <= row.low < row.value < row.high <= values.max()

    blind = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 3)).double()
    torch.nn.init.zeros_(blind[1].weight)
    compared(networks[0], ContrastHandler(blind, tmp_path, strengths=[0.03], components=False), items(pictures(3)))
    table = pd.read_csv(tmp_path / "ifim_contrast" / "contrast_table.csv").set_index(["direction", "endpoint"])
    assert table.loc[("a_over_b", "kl_b"), "value"] == 0
    assert table.loc[("a_over_b", "log10_kl_ratio"), "count"] == 0


def test_written_directions_are_unit_ones_along_which_the_networks_differ(tmp_path):
    networks, images = pair(), pictures(3)
    affine = torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    data = [{"image": MetaTensor(image, affine=affine, meta={"filename_or_obj": "x/scan.nii.gz"})} for image in images]
    compared(networks[0], ContrastHandler(networks[1], tmp_path), data)
    a, b = ([truths.dense_fisher(copy.deepcopy(net).eval(), image) for image in images] for net in networks)
    for index in range(3):
        stem = f"{tmp_path}/ifim_contrast/{index:06d}_scan"
        vectors = {end: nibabel.load(f"{stem}_{end}.nii.gz") for end in ("image", "a_over_b", "b_over_a")}
        np.testing.assert_allclose(vectors["image"].affine, affine.numpy())
        np.testing.assert_allclose(np.asarray(vectors["image"].dataobj).squeeze(), images[index, 0], atol=1e-6)
        for end, greater, smaller in (("a_over_b", a, b), ("b_over_a", b, a)):
            v = torch.from_numpy(np.asarray(vectors[end].dataobj).squeeze().astype(np.float64)).flatten()
            assert float(v.norm()) == pytest.approx(1, rel=1e-5)
            assert float(v @ greater[index] @ v) > 3 * float(v @ smaller[index] @ v)


@pytest.mark.parametrize("held", ["model", "weights alone"])
def test_the_checkpoint_gives_the_other_network_its_weights(tmp_path, held):
    network, other = pair()
    torch.save({"model": other.state_dict()} if held == "model" else other.state_dict(), tmp_path / "other.pt")
    made = ContrastHandler(copy.deepcopy(network), tmp_path, tmp_path / "other.pt")
    given = ContrastHandler(other, tmp_path)
    for handler in (made, given):
        compared(network, handler, items(pictures(2)))
    pd.testing.assert_frame_equal(made.table, given.table)


def test_nothing_is_left_behind_in_the_networks_and_random_states(tmp_path):
    networks = pair()
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    for network in networks:
        network.train()
    handler, ends = ContrastHandler(networks[1], tmp_path, components=False), []
    for handlers in ([], [handler, handler]):
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        engine = evaluator(networks[0], items(pictures(3)), val_handlers=handlers)
        engine.run()
        ends.append((torch.get_rng_state(), np.random.get_state()[1]))  # noqa: NPY002
    assert engine.state.metrics
    assert all(name.startswith(PREFIX) for name in engine.state.metrics)
    assert torch.equal(ends[0][0], ends[1][0])
    assert np.array_equal(ends[0][1], ends[1][1])
    for network, state in zip(networks, before):
        assert all(module.training for module in network.modules())
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_another_evaluation_replaces_the_numbers_and_the_folder(tmp_path):
    network, other = pair()
    handler = ContrastHandler(other, tmp_path, max_images=2)
    engine = compared(network, handler, items(pictures(3)))
    first = engine.state.metrics[f"{PREFIX}log10_ratio"]
    network.load_state_dict(other.state_dict())
    engine.run()
    assert first > 0.1
    assert engine.state.metrics[f"{PREFIX}log10_ratio"] == pytest.approx(0, abs=1e-9)
    assert (pd.read_csv(tmp_path / "ifim_contrast" / "contrast.csv").ratio.round(6) == 1).all()


class Segmenter(torch.nn.Sequential):
    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 2, 3, padding=1))
        self.double()


def test_segmentations_are_compared_in_a_window_around_the_label(tmp_path):
    images = pictures(2)
    labels = torch.zeros(2, 1, 12, 12)
    labels[:, :, 1:4, 8:11] = 1
    handler = ContrastHandler(
        Segmenter(1), tmp_path, likelihood="voxelwise_softmax", window=[6, 6], damping=0.1, strengths=[0.03]
    )
    engine = compared(Segmenter(0), handler, items(images, list(labels)))
    assert engine.state.metrics[f"{PREFIX}images"] == 2
    assert (handler.table.residual <= 1e-2).all()
    over = handler.table[handler.table.direction == "a_over_b"]
    assert (over.ratio > 1).all()
    assert (over.predicted_a > over.predicted_b).all()
    window = np.asarray(nibabel.load(tmp_path / "ifim_contrast" / "000000_case_00_image.nii.gz").dataobj).squeeze()
    np.testing.assert_allclose(window, images[0, 0, 0:6, 6:12], atol=1e-6)


# ---------------------------------------------------------------- bad input


def test_a_failure_stops_the_run_or_is_logged_and_it_goes_on(tmp_path, caplog):
    data, other = items(pictures(2)), CNN(outputs=3).float()  # another dtype
    with pytest.raises(RuntimeError):
        compared(CNN(), ContrastHandler(other, tmp_path), data)
    with caplog.at_level(logging.ERROR):
        handler = ContrastHandler(other, tmp_path, on_error="continue")
        engine = compared(CNN(), handler, data)
    assert "the run goes on" in caplog.text
    assert handler.table is None
    assert not any(name.startswith(PREFIX) for name in engine.state.metrics)


def test_a_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "ifim_contrast").mkdir()
    (tmp_path / "ifim_contrast" / "thesis.txt").write_text("mine")
    network, other = pair()
    with pytest.raises(FileExistsError, match="was not written by ContrastHandler"):
        compared(network, ContrastHandler(other, tmp_path), items(pictures(2)))
    assert (tmp_path / "ifim_contrast" / "thesis.txt").read_text() == "mine"


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.pt, the checkpoint of the other network"):
        ContrastHandler(CNN(), tmp_path, tmp_path / "absent.pt")
    torch.save({"model": CNN(outputs=2).state_dict(), "epoch": 3}, tmp_path / "two.pt")
    with pytest.raises(
        ValueError, match=r"(?s)two\.pt does not fit .*'model' \(it holds model, epoch\).*size mismatch"
    ):
        ContrastHandler(CNN(), tmp_path, tmp_path / "two.pt")
    with pytest.raises(TypeError, match=r"needs a network that is an nn\.Module, got function"):
        ContrastHandler(lambda images: images, tmp_path, tmp_path / "two.pt")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"network": 3}, TypeError, "network must be a callable"),
        ({"max_images": 0}, ValueError, "max_images must be a whole number, 1 or more"),
        ({"strength": 0.5}, ValueError, "must be one of strengths"),
        ({"window": [4, 4]}, ValueError, "window is for segmentations"),
        ({"folder": "a/b"}, ValueError, "folder must be a plain name, got 'a/b'"),
        ({"damping": 0.0}, ValueError, "damping must be a positive number, got 0.0"),
        ({"on_error": "ignore"}, ValueError, "on_error must be 'raise' or 'continue'"),
    ],
)
def test_options_out_of_range_are_refused_when_the_handler_is_made(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        ContrastHandler(**{"network": CNN(), "output_dir": tmp_path, **options})


def test_a_trainer_is_refused(tmp_path):
    network = CNN()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    trainer = SupervisedTrainer(CPU, 1, [], network, optimizer, torch.nn.CrossEntropyLoss(), epoch_length=1)
    with pytest.raises(ValueError, match="SupervisedTrainer is a trainer"):
        ContrastHandler(network, tmp_path).attach(trainer)
