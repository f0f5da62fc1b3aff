# Copyright (c) monai_ifim contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import copy
import pickle
import random

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flip
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.data import IdealObserver, SignalDetectionDataset, SignalDetectionTask
from monai_ifim.transforms import IFIMSplit
from tests import truths

OPTIONS = [{}, {"rank": 1}, {"energy": 0.3}, {"energy": 1.0}, {"temperature": 2.0}, {"rank": 2, "reference": 0.7}]


def network_and_image(dtype=torch.float64):
    """A network of three classes with batch norm, in evaluation mode, and one image (2, 8, 8)."""
    return truths.cnn(dtype=dtype), truths.images(1, dtype=dtype)[0]


def meta_image(image):
    """The image with an affine, an entry of meta-data and an applied operation."""
    affine = torch.tensor([[0.0, -2.0, 0, 5], [3, 0, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1]], dtype=torch.float64)
    tensor = MetaTensor(image, affine=affine, meta={"filename_or_obj": "case.nii.gz", "spacing": [2.0, 3.0]})
    return Flip(spatial_axis=0)(tensor)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_high_is_the_projection_on_the_leading_eigenspace_of_the_dense_matrix(options):
    network, image = network_and_image()
    high, low, eigenvalues = IFIMSplit(network, **options)(image)
    matrix = truths.dense_fisher(network, image, temperature=options.get("temperature", 1.0))
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
    share = values.cumsum(0) / values.sum()
    energy = options.get("energy", 0.95)
    rank = options.get("rank", 2 if energy == 1 else int((share < energy).sum()) + 1)
    leading = vectors[:, :rank]
    difference = (image - options.get("reference", 0.0)).flatten()
    truth = (leading @ (leading.T @ difference)).view_as(image)
    torch.testing.assert_close(high, truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(low, image - options.get("reference", 0.0) - truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(eigenvalues, values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_high_and_low_add_up_to_the_image(dtype, options):
    network, image = network_and_image(dtype)
    high, low, eigenvalues = IFIMSplit(network, **options)(image)
    assert high.dtype == low.dtype == dtype
    assert eigenvalues.dtype == torch.float64
    assert high.shape == low.shape == image.shape
    assert eigenvalues.shape == (2,)
    assert high.abs().max() > 0
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(options.get("reference", 0.0) + high + low, image, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"rank": 1}, {"energy": 1.0}], ids=str)
def test_components_are_those_of_input_fisher(options):
    network, image = network_and_image()
    fisher = input_fisher(network, image[None], **options)
    high, low, eigenvalues = IFIMSplit(network, **options)(image)
    for found, truth in zip((high, low), fisher.split(image[None])):
        torch.testing.assert_close(found, truth[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(eigenvalues, fisher.eigenvalues[0], rtol=1e-14, atol=0)


def test_high_of_the_ideal_observer_is_the_projection_on_its_template():
    task = SignalDetectionTask(spatial_size=(12, 12))
    image = SignalDetectionDataset(task, 1)[0]["image"].double()
    high, _, eigenvalues = IFIMSplit(IdealObserver(task, torch.float64))(image)
    w = task.template.flatten()
    g = image.as_tensor().flatten()
    torch.testing.assert_close(high.as_tensor().flatten(), (w @ g) / (w @ w) * w, rtol=0, atol=1e-12)
    p = torch.sigmoid(w @ g - w @ task.signals[0].flatten() / 2)
    assert eigenvalues.tolist() == pytest.approx([float(p * (1 - p) * (w @ w))], rel=1e-10)


def test_a_reference_image_is_subtracted_before_the_projection():
    network, image = network_and_image()
    reference = truths.images(1, seed=8)[0]
    high, low, _ = IFIMSplit(network, rank=1, reference=reference)(image)
    torch.testing.assert_close(reference + high + low, image, rtol=0, atol=1e-14)
    vector = input_fisher(network, image[None], rank=1).eigenvectors[0, 0]
    truth = ((image - reference) * vector).sum() * vector
    torch.testing.assert_close(high, truth, rtol=0, atol=1e-12)
    with_meta = IFIMSplit(network, rank=1, reference=MetaTensor(reference))(meta_image(image.flip(1)))
    torch.testing.assert_close(with_meta[0].as_tensor(), high, rtol=0, atol=1e-12)


def test_a_reference_of_another_dtype_is_converted():
    network, image = network_and_image(torch.float32)
    high, low, _ = IFIMSplit(network, reference=torch.ones(2, 8, 8, dtype=torch.float64))(image)
    assert high.dtype == torch.float32
    torch.testing.assert_close(1 + high + low, image, rtol=0, atol=1e-6)


def test_arrays_give_the_same_numbers_as_tensors():
    network, image = network_and_image(torch.float32)
    for found, truth in zip(IFIMSplit(network)(image.numpy()), IFIMSplit(network)(image)):
        assert type(found) is torch.Tensor
        assert torch.equal(found, truth)


def test_plain_tensors_give_plain_tensors():
    network, image = network_and_image()
    assert [type(part) for part in IFIMSplit(network)(image)] == [torch.Tensor] * 3


def test_meta_tensors_give_meta_tensors_in_the_same_place():
    network, image = network_and_image()
    image = meta_image(image)
    high, low, eigenvalues = IFIMSplit(network)(image)
    truth = IFIMSplit(network)(image.as_tensor())
    assert type(eigenvalues) is torch.Tensor
    assert len(image.applied_operations) == 1  # so that the comparison below says something
    for part, plain in zip((high, low), truth):
        assert isinstance(part, MetaTensor)
        assert torch.equal(part.as_tensor(), plain)
        assert torch.equal(part.affine, image.affine)
        assert part.applied_operations == image.applied_operations
        assert part.meta["filename_or_obj"] == "case.nii.gz"
        assert set(part.meta) == set(image.meta)
        assert part.meta["spacing"] == [2.0, 3.0]


def test_meta_data_of_a_component_is_a_copy():
    network, image = network_and_image()
    image = meta_image(image)
    high, low, _ = IFIMSplit(network)(image)
    high.meta["filename_or_obj"] = "other"
    high.meta["spacing"].append(1.0)
    high.affine[0, 3] = 100
    high.applied_operations.clear()
    for other in (image, low):
        assert other.meta["filename_or_obj"] == "case.nii.gz"
        assert other.meta["spacing"] == [2.0, 3.0]
        assert other.affine[0, 3] != 100
        assert len(other.applied_operations) == 1


def test_the_image_is_not_changed():
    network, image = network_and_image()
    image = meta_image(image)
    before, meta = image.as_tensor().clone(), copy.deepcopy(image.meta)
    high, _, _ = IFIMSplit(network)(image)
    high += 1
    assert torch.equal(image.as_tensor(), before)
    assert set(image.meta) == set(meta)


def noisy_network():
    """Batch norm and dropout, with mixed modes, and a frozen weight."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(108, 3))
    network = network.double().train()
    network[3].eval()
    network[0].weight.requires_grad_(False)
    network[4].weight.grad = torch.ones_like(network[4].weight)
    return network


def test_a_network_in_training_mode_gives_the_numbers_of_evaluation_mode():
    _, image = network_and_image()
    for found, truth in zip(IFIMSplit(noisy_network())(image), IFIMSplit(noisy_network().eval())(image)):
        assert torch.equal(found, truth)


def test_the_network_and_the_random_states_are_left_as_found():
    network, (_, image) = noisy_network(), network_and_image()
    truth = copy.deepcopy(network)
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002
    random.seed(4)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    IFIMSplit(network)(image)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert [module.training for module in network.modules()] == [module.training for module in truth.modules()]
    for name, value in truth.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name != "0.weight")
        assert (parameter.grad is None) == (name != "4.weight")
    assert torch.equal(network[4].weight.grad, torch.ones_like(network[4].weight))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(context):
    network, image = network_and_image()
    truth = IFIMSplit(network)(image)
    with context():
        found = IFIMSplit(network)(meta_image(image.flip(1)))
    for part, plain in zip(found, truth):
        assert torch.equal(torch.as_tensor(part).as_subclass(torch.Tensor), plain)
        assert not part.requires_grad


def test_results_carry_no_graph():
    network, image = network_and_image()
    assert not any(part.requires_grad for part in IFIMSplit(network)(image.clone().requires_grad_()))


def test_output_key_picks_the_logits():
    network, image = network_and_image()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            return {"features": images, "logits": self.network(images)}

    for found, truth in zip(IFIMSplit(Two(), output_key="logits")(image), IFIMSplit(network)(image)):
        assert torch.equal(found, truth)


def test_one_logit_under_sigmoid_has_one_eigenvalue():
    network, image = truths.cnn(outputs=1), truths.images(1)[0]
    _, _, eigenvalues = IFIMSplit(network, "sigmoid")(image)
    truth = torch.linalg.eigvalsh(truths.dense_fisher(network, image, "sigmoid"))[-1:]
    torch.testing.assert_close(eigenvalues, truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:input_fisher left out")
def test_an_image_that_is_not_finite_is_refused_with_the_cause(value):
    network, image = network_and_image()
    image[0, 2, 3] = value
    with pytest.raises(ValueError, match="cannot be split: the image has NaN or infinite values"):
        IFIMSplit(network)(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"predictive": "tanh"}, "predictive"), ({"temperature": 0.0}, "temperature")],
    ids=str,
)
def test_options_out_of_range_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        IFIMSplit(truths.cnn(), **options)


@pytest.mark.parametrize("options", [{"rank": 0}, {"energy": 1.5}, {"rank": 1, "energy": 0.5}], ids=str)
def test_rank_and_energy_out_of_range_are_refused(options):
    network, image = network_and_image()
    with pytest.raises(ValueError, match=r"rank|energy"):
        IFIMSplit(network, **options)(image)


def test_copies_and_pickles_give_the_same_numbers():
    network, image = network_and_image()
    split = IFIMSplit(network, rank=1, reference=torch.ones_like(image))
    truth = split(image)
    for other in (copy.deepcopy(split), pickle.loads(pickle.dumps(split)), Compose([split])):
        for found, expected in zip(other(image), truth):
            assert torch.equal(found, expected)
