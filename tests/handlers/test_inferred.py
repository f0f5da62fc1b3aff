# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from monai.data import DataLoader
from monai.engines import EnsembleEvaluator, SupervisedEvaluator
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.handlers import IFIMHandler, IFIMMetric
from monai_ifim.handlers.inferred import Inferred, with_inferer
from tests import truths
from tests.handlers import CPU, attached, evaluator, items, key_metric, logged, measure, per_image, pictures


class ConvHead(nn.Sequential):
    """Logits (B, 3, 1, 1) of a whole image or window, as a classifier for sliding windows gives them."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.AdaptiveAvgPool2d(1))
        with torch.no_grad():
            self[3].weight.mul_(20)
        self.double()


class Detaching(SimpleInferer):
    """Gives values only."""

    def __call__(self, inputs, network, *args, **kwargs):
        return network(inputs, *args, **kwargs).detach()


HIGH = {"directions": ["high"], "strengths": [0.03]}


def same_spectra(engine, network, images):
    """The evaluator logged the spectra of a network."""
    fisher = input_fisher(network.eval(), images)
    network.train()
    assert logged(engine)["lambda_max"] == pytest.approx(float(fisher.eigenvalues[:, 0].quantile(0.5)), rel=1e-10)
    np.testing.assert_allclose(per_image(engine, "trace"), fisher.trace, rtol=1e-6)
    assert logged(engine)["kl_high"] > 0


WINDOWS = {
    "one window": {"roi_size": 12},
    "one padded window": {"roi_size": 16},
    "four windows, one after the other": {"roi_size": 10},
    "four windows, three at a time": {"roi_size": 10, "sw_batch_size": 3},
    "four blended windows": {"roi_size": 10, "mode": "gaussian", "overlap": 0.5, "padding_mode": "reflect"},
    "two windows along one axis, with a device": {"roi_size": (10, 12), "device": "cpu", "sw_device": "cpu"},
}


def jacobian(function, image, step=1e-5):
    """(outputs, D) of an image (1, 12, 12), by central differences."""
    steps = step * torch.eye(image.numel(), dtype=image.dtype).view(-1, *image.shape)
    with torch.no_grad():
        return torch.stack([(function(image + d) - function(image - d)).flatten() for d in steps], 1) / (2 * step)


@pytest.mark.parametrize("options", WINDOWS.values(), ids=WINDOWS)
def test_spectra_through_sliding_windows_are_those_of_finite_differences(options):
    network, images = ConvHead().eval(), pictures(1)
    inferer = SlidingWindowInferer(**options)
    fisher = input_fisher(Inferred(network, inferer), images)
    for index, image in enumerate(images):

        def logits(one):
            return inferer(one.unsqueeze(0), network).flatten()

        change = jacobian(logits, image)
        dense = change.T @ truths.categorical_information(logits(image).detach()) @ change
        values = torch.linalg.eigvalsh(dense).flip(0)[:2]
        torch.testing.assert_close(fisher.eigenvalues[index], values, rtol=1e-7, atol=1e-12)


def test_where_one_window_holds_the_image_the_inferer_changes_nothing():
    network, images = ConvHead().eval(), pictures(4)
    through = input_fisher(Inferred(network, SlidingWindowInferer(12)), images)
    alone = input_fisher(network, images)
    torch.testing.assert_close(through.eigenvalues, alone.eigenvalues, rtol=1e-12, atol=0)
    torch.testing.assert_close(through.eigenvectors, alone.eigenvectors, rtol=1e-9, atol=1e-12)


def test_what_the_evaluator_computes_is_looked_at_and_with_use_inferer_false_the_network_itself():
    network, images, inferer = ConvHead(), pictures(), SlidingWindowInferer(10)
    engines = {}
    for use_inferer in (True, False):
        engines[use_inferer] = evaluator(
            network, items(images), "metric", inferer=inferer, **HIGH, use_inferer=use_inferer
        )
        engines[use_inferer].run()
    same_spectra(engines[True], Inferred(network, inferer), images)
    same_spectra(engines[False], network, images)
    assert logged(engines[True])["lambda_max"] != pytest.approx(logged(engines[False])["lambda_max"], rel=1e-3)


def test_the_results_name_the_network_and_not_what_stands_around_it():
    result = measure("metric", ConvHead(), items(pictures(4)), {"inferer": SlidingWindowInferer(10)}, **HIGH)
    assert result.network == f"ConvHead, {sum(p.numel() for p in ConvHead().parameters()):,} parameters"


def test_an_inferer_that_only_calls_the_network_is_passed_by():
    network = ConvHead()
    engine = evaluator(network, items(pictures(4)))
    assert type(engine.inferer) is SimpleInferer
    assert with_inferer(network, engine) is network
    engine.inferer = Detaching()  # a subclass may do anything
    assert isinstance(with_inferer(network, engine), Inferred)
    engine.inferer = None
    assert with_inferer(network, engine) is network


@pytest.mark.parametrize("inferer", [SlidingWindowInferer(5), SlidingWindowInferer(10, buffer_steps=1)])
def test_dense_outputs_of_an_inferer_are_refused_by_its_name_with_the_remedy_that_works(inferer):
    network, data = ConvHead(), items(pictures(4))
    with pytest.raises(ValueError, match=r"outputs.*through the evaluator's SlidingWindowInferer.*use_inferer: false"):
        evaluator(network, data, "handler", inferer=inferer, **HIGH).run()
    engine = evaluator(network, data, "handler", inferer=inferer, use_inferer=False, **HIGH)
    engine.run()
    same_spectra(engine, network, pictures(4))


def test_an_inferer_that_gives_no_gradient_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"does not depend differentiably.*Detaching.*use_inferer: false"):
        measure("metric", ConvHead(), items(pictures(4)), {"inferer": Detaching()}, **HIGH)


def test_an_error_of_the_network_alone_does_not_speak_of_an_inferer():
    with pytest.raises(ValueError, match="outputs") as raised:
        measure("handler", nn.Conv2d(1, 2, 3).double(), items(pictures(4)), **HIGH)
    assert "inferer" not in str(raised.value)


def test_an_error_says_which_layer_of_the_network_is_meant():
    network = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), ConvHead()).double()
    with pytest.raises(ValueError, match=r"layer 'network.0' \(BatchNorm2d\)"):
        measure("handler", network, items(pictures(4)), {"inferer": SlidingWindowInferer(10)}, **HIGH)


def test_network_and_inferer_are_left_as_they_were(capfd):
    network, inferer = ConvHead(), SlidingWindowInferer(10, progress=True)
    names, settings = [name for name, _ in network.named_modules()], dict(vars(inferer))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    bars = {}
    for there in (None, "handler"):
        evaluator(network, items(pictures()), there, inferer=inferer, **(HIGH if there else {})).run()
        bars[there] = capfd.readouterr().err.count("100%")
    assert [name for name, _ in network.named_modules()] == names
    assert vars(inferer) == settings
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert bars["handler"] == bars[None] > 0


def test_a_changed_copy_of_the_inferer_stays_ours():
    class Noting(SlidingWindowInferer):
        calls = 0

        def __call__(self, inputs, network, *args, **kwargs):
            self.calls += 1
            return super().__call__(inputs, network, *args, **kwargs)

    inferer = Noting(10)
    evaluator(ConvHead(), items(pictures()), "handler", inferer=inferer, **HIGH).run()
    assert inferer.calls == 2  # the evaluator's two batches


def test_the_inferer_is_put_around_a_named_network_of_an_ensemble_too():
    networks, images, inferer = [ConvHead(), ConvHead()], pictures(), SlidingWindowInferer(10)
    with torch.no_grad():
        networks[1][3].weight.mul_(0.5)
    engine = EnsembleEvaluator(
        device=CPU,
        val_data_loader=DataLoader(items(images), batch_size=4),
        networks=networks,
        inferer=inferer,
        key_val_metric=key_metric(),
        val_handlers=[IFIMHandler(network=networks[1], **HIGH)],
    )
    engine.run()
    same_spectra(engine, Inferred(networks[1], inferer), images)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.jit.script, nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_the_inferer_is_put_around_wrapped_networks(wrap):
    network, images = ConvHead(), pictures()
    ifim = IFIMMetric(**HIGH)
    attached(ifim, wrap(network.eval()), [{"image": image} for image in images], inferer=SlidingWindowInferer(10)).run()
    truth = input_fisher(Inferred(network.eval(), SlidingWindowInferer(10)), images).eigenvalues
    torch.testing.assert_close(torch.from_numpy(ifim.result.eigenvalues), truth, rtol=1e-10, atol=0)


def test_the_inferer_is_read_at_each_evaluation():
    network, images = ConvHead(), pictures()
    engine = evaluator(network, items(images), "handler", **HIGH)
    assert isinstance(engine, SupervisedEvaluator)
    for inferer in (SlidingWindowInferer(10), SlidingWindowInferer(11)):
        engine.inferer = inferer
        engine.run()
        same_spectra(engine, Inferred(network, inferer), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_outputs_that_the_inferer_puts_on_another_device_come_back_to_that_of_the_images():
    network, images = ConvHead().eval().cuda(), pictures(4).cuda()
    through = input_fisher(Inferred(network, SlidingWindowInferer(12, device="cpu")), images).eigenvalues
    torch.testing.assert_close(through, input_fisher(network, images).eigenvalues, rtol=1e-10, atol=0)
