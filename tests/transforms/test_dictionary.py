# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from monai.data import DataLoader, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    Orientationd,
    SaveImaged,
    ScaleIntensityd,
    Spacingd,
)
from torch import nn

import monai_ifim.transforms
from monai_ifim import Gaussian, input_fisher
from monai_ifim.perturbation import DirectionFunction, LossGradient
from monai_ifim.transforms import IFIMSplit, IFIMSplitd, RandIFIMPerturb, RandIFIMPerturbd
from tests import truths
from tests.transforms import PARTS, Named, done_to, network_and_image, plain

SHARED = Path(__file__).parents[2].parent / "shared"
BREAST = SHARED / "data" / "mri_nifti_pyradiomics" / "breast1_image.nii.gz"
COMMON = [
    {},
    {"rank": 1},
    {"energy": 0.3},
    {"temperature": 3.0},
    {"likelihood": "sigmoid"},
    {"likelihood": Gaussian((0.5, 1.0, 2.0))},
    {"output_key": "z"},
    {"channel_mask": [0, 1]},
]


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("options", [*COMMON, {"reference": 0.5}], ids=str)
def test_the_split_adds_the_results_of_the_array_transform_under_the_documented_keys(options):
    body, image = network_and_image()
    network = Named(body) if "output_key" in options else body
    data = {"image": image, "label": 1}
    found = IFIMSplitd("image", network, **options)(data)
    assert set(found) == {"image", "label", *(f"image_ifim_{part}" for part in PARTS)}
    for part, truth in zip(PARTS, IFIMSplit(network, **options)(image)):
        assert torch.equal(found[f"image_ifim_{part}"], truth)
    assert found["image"] is image
    assert found["label"] == 1
    assert set(data) == {"image", "label"}  # the caller's dictionary is not changed
    if options and "output_key" not in options:
        other = IFIMSplitd("image", network)(data)
        assert any(not torch.equal(found[f"image_ifim_{part}"], other[f"image_ifim_{part}"]) for part in PARTS)


@pytest.mark.parametrize("options", [*COMMON, {"sigma": 0.7}, {"clip": (-0.1, 0.1)}, {"strength": 0.03}], ids=str)
@pytest.mark.parametrize("direction", ["high", "low"])
def test_the_perturbation_is_that_of_the_array_transform(direction, options):
    body, image = network_and_image()
    network = Named(body) if "output_key" in options else body
    data, options = {"image": image, "label": 1}, {"strength": (0.1, 0.5), **options}
    found = RandIFIMPerturbd("image", network, direction, prob=1.0, **options).set_random_state(5)(data)
    truth = RandIFIMPerturb(network, direction, prob=1.0, **options).set_random_state(5)(image)
    assert torch.equal(plain(found["image"]), plain(truth))
    assert done_to(found["image"]) == done_to(truth)
    assert set(found) == {"image", "label"}
    assert found["label"] == 1
    assert data["image"] is image
    assert not torch.equal(plain(found["image"]), image)


@pytest.mark.parametrize("make", [IFIMSplitd, lambda *options, **named: RandIFIMPerturbd(*options, prob=1.0, **named)])
def test_missing_keys_raise_unless_allowed_and_copies_and_pickles_do_the_same(make):
    network, image = network_and_image()
    with pytest.raises(KeyError, match="other"):
        make(["image", "other"], network)({"image": image})
    transform = make(["other", "image"], network, allow_missing_keys=True)
    truth, *others = (
        Compose([one]).set_random_state(2)({"image": image})
        for one in (transform, copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)))
    )
    assert set(truth) == {"image"} | ({f"image_ifim_{part}" for part in PARTS} if make is IFIMSplitd else set())
    for found in others:
        assert all(torch.equal(plain(found[key]), plain(value)) for key, value in truth.items())


def test_aliases_are_the_same_class():
    for kind in (IFIMSplitd, RandIFIMPerturbd):
        for alias in (f"{kind.__name__[:-1]}D", f"{kind.__name__[:-1]}Dict"):
            assert getattr(monai_ifim.transforms, alias) is kind
            assert alias in monai_ifim.transforms.__all__


# ---------------------------------------------------------------- IFIMSplitd


def test_several_keys_are_split_each():
    network, images = truths.cnn(), truths.images(2)
    found = IFIMSplitd(["first", "second"], network)({"first": images[0], "second": images[1]})
    fisher = input_fisher(network, images)
    for key, high, eigenvalues in zip(("first", "second"), fisher.split(images)[0], fisher.eigenvalues):
        torch.testing.assert_close(found[f"{key}_ifim_high"], high, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[f"{key}_ifim_eigenvalues"], eigenvalues, rtol=1e-12, atol=0)


def test_in_a_compose_it_sees_what_the_transforms_before_it_made():
    network, image = truths.cnn(), MetaTensor(truths.images(1)[0])
    found = Compose([ScaleIntensityd("image", -1, 1, dtype=np.float64), IFIMSplitd("image", network)])({"image": image})
    scaled = (image - image.min()) / (image.max() - image.min()) * 2 - 1
    total = found["image_ifim_high"] + found["image_ifim_low"]
    torch.testing.assert_close(plain(total), plain(scaled), rtol=0, atol=1e-12)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_an_evaluators_postprocessing_it_splits_each_image(context):
    network, images = truths.cnn().train(), truths.images(3)
    data = [{"image": MetaTensor(image)} for image in images]
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(data, batch_size=3),
        network=network,
        postprocessing=IFIMSplitd("image", network),
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with context():
        engine.run()
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert len(engine.state.output) == 3
    fisher = input_fisher(network.eval(), images)
    for output, high, low, eigenvalues in zip(engine.state.output, *fisher.split(images), fisher.eigenvalues):
        torch.testing.assert_close(plain(output["image_ifim_high"]), high, rtol=0, atol=1e-12)
        torch.testing.assert_close(plain(output["image_ifim_low"]), low, rtol=0, atol=1e-12)
        torch.testing.assert_close(output["image_ifim_eigenvalues"], eigenvalues, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- RandIFIMPerturbd


def test_all_keys_share_one_draw_and_each_image_has_its_own_direction():
    network, images = truths.cnn(), truths.images(2)
    transform = RandIFIMPerturbd(["first", "second"], network, "high", (0.1, 0.5), prob=0.5, rank=1).set_random_state(1)
    vectors, causes = input_fisher(network, images, rank=1).eigenvectors[:, 0], []
    for _ in range(30):
        found = transform({"first": images[0], "second": images[1]})
        done = [done_to(found[key]) for key in ("first", "second")]
        assert [done[0][name] == done[1][name] for name in ("strength", "sign", "cause")] == [True] * 3
        causes.append(done[0]["cause"])
        for key, image, vector, one in zip(found, images, vectors, done):
            if not one["cause"]:
                change = plain(found[key] - image)
                torch.testing.assert_close(change, one["sign"] * one["norm"] * vector, rtol=0, atol=1e-12)
    assert 5 < causes.count("not drawn") < 25


@pytest.mark.parametrize(("prob", "cause"), [(0.0, "not drawn"), (1.0, "")])
def test_probabilities_zero_and_one_leave_or_perturb_every_image(prob, cause):
    network, image = network_and_image()
    transform = RandIFIMPerturbd("image", network, prob=prob).set_random_state(0)
    for _ in range(5):
        found = transform({"image": image})["image"]
        assert isinstance(found, MetaTensor)
        assert done_to(found)["cause"] == cause
        assert torch.equal(plain(found), image) == (prob == 0)


def test_the_random_state_of_the_dictionary_transform_repeats():
    network, image = network_and_image()
    transform = RandIFIMPerturbd("image", network, "random", (0.1, 0.5), prob=0.5)
    series = []
    for state in ({"seed": 3}, {"state": np.random.RandomState(3)}, {"seed": 4}):
        transform.set_random_state(**state)
        series.append([done_to(transform({"image": image})["image"])["norm"] for _ in range(8)])
    assert series[0] == series[1]
    assert series[0] != series[2]
    pipeline, series = Compose([transform]), []
    for _ in range(2):
        pipeline.set_random_state(3)
        series.append([done_to(pipeline({"image": image})["image"])["norm"] for _ in range(8)])
    assert series[0] == series[1]


def test_the_label_is_read_for_the_loss_gradient_and_rules_of_ones_own():
    network, image = network_and_image()
    transform = RandIFIMPerturbd("image", network, LossGradient(), 0.2, prob=1.0, label_key="label").set_random_state(0)
    for label in (0, torch.tensor([2])):
        found = transform({"image": image, "label": label})
        truth = RandIFIMPerturb(network, LossGradient(), 0.2, prob=1.0)
        truth._drawn = transform.perturb._drawn
        assert torch.equal(plain(found["image"]), plain(truth(image, label, randomize=False)))
        assert found["label"] is label
    with pytest.raises(KeyError, match="label"):
        transform({"image": image})
    seen = []

    def rule(inputs):
        seen.append(inputs.targets.tolist())
        return inputs.images

    own = RandIFIMPerturbd("image", network, DirectionFunction("own", rule), prob=1.0, label_key="class")
    own({"image": image, "class": 2})
    assert seen == [[[2]]]


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (LossGradient(), "'loss_gradient' needs labels: give label_key"),
        ("transfer", "'transfer' takes the eigenvector of another image"),
    ],
)
def test_directions_that_need_more_are_refused_at_construction(direction, message):
    with pytest.raises(ValueError, match=message):
        RandIFIMPerturbd("image", truths.cnn(), direction)


# ---------------------------------------------------------------- volumes


def volume_network(outputs=3):
    """A small network of volumes (1, *spatial) of any size, in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, stride=2),
        nn.BatchNorm3d(3),
        nn.Tanh(),
        nn.AdaptiveAvgPool3d(2),
        nn.Flatten(),
        nn.Linear(24, outputs),
    )


def oblique_affine():
    """Rotated about two axes, with unequal spacing, and axes that point to L, A and I before the rotation."""
    a, b = np.deg2rad(17), np.deg2rad(-9)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([-0.9, 1.3, -2.5])
    affine[:3, 3] = [31.0, -17.5, 8.25]
    return affine


@pytest.fixture
def source(tmp_path):
    """A NIfTI volume of smooth random numbers on an oblique, anisotropic grid."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(14, 12, 8)).cumsum(0).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, oblique_affine()), tmp_path / "source.nii.gz")
    return tmp_path / "source.nii.gz"


def preprocessing(pixdim=(1.5, 1.5, 2.0)):
    """From the file to what the network sees."""
    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Spacingd("image", pixdim=pixdim, mode="bilinear"),
            Orientationd("image", axcodes="RAS", labels=None),
        ]
    )


def check_saved_component(source, pixdim, folder, part):
    """Save a component, and open it with nibabel and with SimpleITK."""
    data = preprocessing(pixdim)({"image": str(source)})
    data = IFIMSplitd("image", volume_network(), rank=1)(data)
    key = f"image_ifim_{part}"
    save = SaveImaged(key, output_dir=folder, output_postfix=part, resample=False, separate_folder=False)
    save(data)
    image, component = data["image"], data[key]
    assert component.as_tensor().abs().max() > 0
    path = folder / f"{source.name.split('.')[0]}_{part}.nii.gz"

    opened = nibabel.load(path)
    assert opened.shape == tuple(image.shape[1:])
    np.testing.assert_allclose(opened.affine, image.affine.numpy(), rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(opened.header.get_zooms(), pixdim, rtol=1e-5)
    np.testing.assert_array_equal(opened.get_fdata(dtype=np.float32), component[0].numpy())

    read = SimpleITK.ReadImage(str(path))
    assert read.GetSize() == tuple(image.shape[1:])
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(read).T, component[0].numpy())
    to_lps = np.diag([-1.0, -1.0, 1.0])  # NIfTI counts to the right and to the front, ITK to the left and to the back
    affine = image.affine.numpy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(read.GetSpacing(), spacing, rtol=1e-5)
    np.testing.assert_allclose(read.GetSpacing(), pixdim, rtol=1e-5)
    np.testing.assert_allclose(read.GetOrigin(), to_lps @ affine[:3, 3], rtol=1e-5, atol=1e-4)
    direction = np.array(read.GetDirection()).reshape(3, 3)
    np.testing.assert_allclose(direction, to_lps @ affine[:3, :3] / spacing, atol=1e-5)
    return image, affine


def test_saving_an_image_with_what_was_done_in_its_meta_data_works(source, tmp_path):
    data = preprocessing()({"image": str(source)})
    data = RandIFIMPerturbd("image", volume_network(), strength=0.1, prob=1.0)(data)
    assert done_to(data["image"])["norm"] > 0
    SaveImaged("image", output_dir=tmp_path, output_postfix="perturbed", resample=False, separate_folder=False)(data)
    opened = nibabel.load(tmp_path / "source_perturbed.nii.gz")
    np.testing.assert_array_equal(opened.get_fdata(dtype=np.float32), data["image"][0].numpy())
    np.testing.assert_allclose(opened.affine, data["image"].affine.numpy(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("part", ["high", "low"])
def test_a_saved_component_lies_where_the_network_saw_the_volume(source, tmp_path, part):
    _, affine = check_saved_component(source, (1.5, 1.5, 2.0), tmp_path / "out", part)
    assert nibabel.aff2axcodes(affine) == ("R", "A", "S")
    assert np.abs(affine[:3, :3] - np.diag(np.diag(affine[:3, :3]))).max() > 0.1  # still oblique
    assert not np.allclose(affine, oblique_affine(), atol=0.1)  # and not the grid of the source


def check_inverted_components(source, pixdim):
    """Components on the grid of the source add up to what the image itself gives there."""
    before = preprocessing(pixdim)
    data = before({"image": str(source)})
    data = IFIMSplitd("image", volume_network(), rank=1)(data)
    assert data["image"].shape[1:] != nibabel.load(source).shape
    keys = ["image_ifim_high", "image_ifim_low"]
    back = Invertd(keys, before, orig_keys="image", nearest_interp=False)(data)
    image = before.inverse({"image": data["image"]})["image"]
    origin = nibabel.load(source)
    for key in keys:
        assert tuple(back[key].shape) == (1, *origin.shape)
        np.testing.assert_allclose(back[key].affine.numpy(), origin.affine, rtol=1e-6, atol=1e-5)
        assert back[key].as_tensor().abs().max() > 0
    scale = float(image.as_tensor().abs().max())
    total = back["image_ifim_high"].as_tensor() + back["image_ifim_low"].as_tensor()
    torch.testing.assert_close(total, image.as_tensor(), rtol=0, atol=1e-5 * scale)


def test_invertd_brings_components_back_to_the_grid_of_the_source(source):
    check_inverted_components(source, (1.5, 1.5, 2.0))


def test_save_and_invert_work_one_after_the_other_in_an_evaluators_postprocessing(source, tmp_path):
    network, before = volume_network(), preprocessing()
    engine = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader([before({"image": str(source)})], batch_size=1),
        network=network,
        postprocessing=Compose(
            [
                IFIMSplitd("image", network, rank=1),
                Invertd("image_ifim_high", before, orig_keys="image", nearest_interp=False),
                SaveImaged("image_ifim_high", output_dir=tmp_path, output_postfix="high", separate_folder=False),
            ]
        ),
    )
    engine.run()
    opened, origin = nibabel.load(tmp_path / "source_high.nii.gz"), nibabel.load(source)
    assert opened.shape == origin.shape
    np.testing.assert_allclose(opened.affine, origin.affine, rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(
        opened.get_fdata(dtype=np.float32), engine.state.output[0]["image_ifim_high"][0].numpy()
    )


@pytest.mark.skipif(not BREAST.is_file(), reason=f"the shared data are not beside the checkout: no {BREAST}")
def test_components_of_a_real_volume_keep_its_place_in_both_directions(tmp_path):
    pixdim = tuple(2.5 * zoom for zoom in nibabel.load(BREAST).header.get_zooms()[:3])
    check_saved_component(BREAST, pixdim, tmp_path / "out", "high")
    check_inverted_components(BREAST, pixdim)
