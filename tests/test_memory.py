# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Networks that are refused memory now and then must give the numbers of those that never are."""

import warnings
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from monai_ifim import input_fisher, sensitivity_curves
from monai_ifim.arms import LossGradient
from monai_ifim.memory import MemoryWarning, MicroBatches, is_out_of_memory
from monai_ifim.perturbation import ARMS, removal_curves

ALONE = "out of memory at one image"
KINDS = {
    "GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": lambda: torch.empty(2**50),  # the allocator's own error
    "Windows": lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
    "python": lambda: MemoryError(),
    "numpy": lambda: np.empty(2**50, dtype=np.uint8),
    "library": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
}
PLACES = ("forward", "backward")


def run_out(kind):
    """Raise the error of a kind."""
    raise KINDS[kind]()


class Short(nn.Module):
    """A smooth network that is refused memory where ``refuses(images)`` says so; remembers how many images passed."""

    def __init__(self, refuses=lambda images: False, place="forward", kind="GPU"):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 6 * 6, 4, dtype=torch.float64)
        ).double()
        self.refuses, self.place, self.kind = refuses, place, kind
        self.tried, self.passed = [], []
        self.held = []
        self.eval()

    def forward(self, images, shift=None):
        assert not any(reference() is not None for reference in self.held), "the failed try is still in memory"
        self.held = []
        self.tried.append(len(images))
        short = bool(self.refuses(images))
        first = self.layers[:2](images)
        if short:
            self.held = [weakref.ref(first), weakref.ref(images)]
        if short and self.place == "forward":
            run_out(self.kind)
        logits = self.layers[2:](first)
        logits = logits if shift is None else logits + shift
        if short and logits.requires_grad:
            logits.register_hook(lambda gradient: run_out(self.kind))
        if not short:
            self.passed.append(len(images))
        return logits


def more_than(count):
    return lambda images: len(images) > count


def holds_the_bright_one(images):
    return bool((images.mean(dim=(1, 2, 3)) > 50).any())


def bright_with_gradient(images):
    return torch.is_grad_enabled() and holds_the_bright_one(images)


def bright_without_gradient(images):
    return not torch.is_grad_enabled() and holds_the_bright_one(images)


def pictures(count=7, bright=None):
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if bright is not None:
        images[bright] += 100
    return images


def same_spectrum(found, truth, rows=slice(None)):
    for name in ("eigenvalues", "eigenvectors", "rank", "numerical_rank", "logits", "_factor", "_scale"):
        torch.testing.assert_close(getattr(found, name)[rows], getattr(truth, name)[rows], rtol=1e-12, atol=1e-13)


def same_table(found, truth):
    pd.testing.assert_frame_equal(found, truth, rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------- the helper


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_every_allocator_are_known(kind):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        run_out(kind)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory"), KeyError("memory")])
def test_other_errors_are_not_taken_for_a_shortage(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("most", range(1, 10))
@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_every_row_is_done_once_and_in_order_at_ever_smaller_sizes(most, size):
    tried, batches = [], MicroBatches(size)

    def work(rows):
        tried.append(len(rows))
        return rows if len(rows) <= most else run_out("python")

    done = list(batches.run(torch.arange(9), work))
    assert torch.cat([rows for rows, _ in done]).tolist() == list(range(9))
    assert all(torch.equal(rows, result) for rows, result in done)
    assert tried[:-1] == sorted(tried[:-1], reverse=True)
    failed = [count for count in tried if count > most]
    assert len(failed) <= 4  # 9, 4, 2 and no more: the size stays
    assert batches.size == min(size, *([failed[-1] // 2] if failed else [size]))


def test_a_later_call_starts_at_the_smaller_size():
    tried, batches = [], MicroBatches(8)

    def work(rows):
        tried.append(len(rows))
        return rows if len(rows) <= 2 else run_out("python")

    for _ in range(2):
        list(batches.run(torch.arange(4), work))
    assert tried == [4, 2, 2, 2, 2]


def test_a_row_that_does_not_fit_alone_gives_none_and_the_others_go_on():
    work = lambda rows: run_out("python") if 2 in rows else rows.tolist()  # noqa: E731
    assert [(rows.tolist(), result) for rows, result in MicroBatches(5).run(torch.arange(5), work)] == [
        ([0, 1], [0, 1]),
        ([2], None),
        ([3], [3]),
        ([4], [4]),
    ]


@pytest.mark.parametrize(
    ("rows", "most", "sizes"), [(4, 4, [4]), (6, 5, [3, 3]), (8, 6, [4, 4]), (13, 5, [5, 4, 4]), (3, 1, [1, 1, 1])]
)
def test_micro_batches_are_of_like_sizes_and_as_few_as_can_be(rows, most, sizes):
    assert [len(some) for some, _ in MicroBatches(most).run(torch.arange(rows), len)] == sizes


# ---------------------------------------------------------------- the spectrum


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_the_spectrum_is_that_without_a_shortage_and_one_warning_says_so(place, kind):
    network, images = Short(more_than(2), place, kind), pictures()
    truth = input_fisher(Short(), images)
    with pytest.warns(MemoryWarning) as caught:
        found = input_fisher(network, images)
    same_spectrum(found, truth)
    assert found.skipped == {}
    assert [str(warning.message) for warning in caught] == [
        "Memory was short with 7 images at a time, so input_fisher went on with 1. Nothing is lost; with "
        "micro_batch_size=1 it does not try more."
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("place", PLACES)
def test_finished_images_are_not_computed_again_and_the_size_stays_small(place):
    scarce = []
    network = Short(lambda images: len(images) > (2 if scarce else 4) or (scarce.append(1) or False), place)
    with pytest.warns(MemoryWarning):
        input_fisher(network, pictures(12), micro_batch_size=4)
    assert network.tried == [4, 4, 2, 2, 2, 2]  # of the second four only the first two try again as two
    assert sum(network.passed) == 12


def test_no_shortage_draws_no_warning_and_tries_nothing_twice():
    network = Short()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        input_fisher(network, pictures(), micro_batch_size=3)
    assert network.tried == [3, 2, 2]


def test_further_inputs_are_cut_along_with_the_smaller_micro_batches():
    images, shift = pictures(), torch.linspace(-1, 1, 28, dtype=torch.float64).view(7, 4)
    truth = input_fisher(Short(), images, arguments=(shift,))
    with pytest.warns(MemoryWarning):
        found = input_fisher(Short(more_than(3)), images, arguments=(shift,))
    same_spectrum(found, truth)


@pytest.mark.parametrize("keep_factor", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_an_image_whose_gradient_does_not_fit_alone_is_left_out_and_its_logits_are_known(place, keep_factor):
    images = pictures(bright=4)
    truth = input_fisher(Short(), images)
    with (
        pytest.warns(MemoryWarning),
        pytest.warns(UserWarning, match="input_fisher left out 1 of 7 images \\(image 4: out of memory at one image"),
    ):
        found = input_fisher(Short(bright_with_gradient, place), images, keep_factor=keep_factor)
    assert found.skipped == {4: ALONE}
    torch.testing.assert_close(found.logits, truth.logits, rtol=1e-12, atol=1e-13)
    others = [0, 1, 2, 3, 5, 6]
    torch.testing.assert_close(found.eigenvalues[others], truth.eigenvalues[others], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.eigenvectors[others], truth.eigenvectors[others], rtol=0, atol=1e-12)
    assert found.eigenvalues[4].isnan().all()
    assert found.rank[4] == found.numerical_rank[4] == 0
    assert not found.eigenvectors[4].any()
    assert found.split(images)[0][4].isnan().all()
    if keep_factor:
        assert found.quadratic(images)[4].isnan()
        torch.testing.assert_close(found.quadratic(images)[others], truth.quadratic(images)[others])


def test_where_no_gradient_fits_every_image_is_left_out():
    with pytest.warns(MemoryWarning), pytest.warns(UserWarning, match="left out 3 of 3"):
        found = input_fisher(Short(lambda images: torch.is_grad_enabled()), pictures(3))
    assert found.eigenvalues.shape == (3, 3)
    assert found.eigenvalues.isnan().all()


@pytest.mark.parametrize(
    ("kind", "error"), [("GPU", torch.OutOfMemoryError), ("CPU", RuntimeError), ("python", MemoryError)]
)
def test_where_not_even_a_forward_pass_fits_the_error_is_of_the_same_kind_and_names_the_remedy(kind, error):
    with pytest.raises(error, match=r"one image of shape \(1, 8, 8\) fits into memory .*Make the images smaller"):
        input_fisher(Short(lambda images: True, kind=kind), pictures())


def test_another_error_passes_at_once_as_it_is():
    network = Short(lambda images: True)
    network.forward = lambda images: network.tried.append(1) or torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        input_fisher(network, pictures())
    assert network.tried == [1]


# ---------------------------------------------------------------- perturbations


EVERY_ARM = (*ARMS, LossGradient())
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2])


def measured(network, images, fisher, **options):
    curves = sensitivity_curves(network, images, fisher, EVERY_ARM, (0.02, 0.3), labels=LABELS, draws=2, **options)
    return curves, removal_curves(network, images, fisher, labels=LABELS, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_perturbations_are_those_without_a_shortage_and_each_function_says_so_once(kind):
    images = pictures()
    fisher = input_fisher(Short(), images)
    truth = measured(Short(), images, fisher)
    network = Short(more_than(5), kind=kind)
    with pytest.warns(MemoryWarning) as caught:
        curves, removals = measured(network, images, fisher)
    same_table(curves.to_frame(probabilities=True), truth[0].to_frame(probabilities=True))
    same_table(curves.unperturbed, truth[0].unperturbed)
    same_table(removals, truth[1])
    assert not any(curves.skipped.values())
    said = [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert "so sensitivity_curves went on with 3" in said[0]
    assert "so removal_curves went on with 3" in said[1]


def test_perturbed_images_are_not_computed_again():
    images = pictures(4)
    fisher = input_fisher(Short(), images)
    network, free = Short(more_than(5)), Short()
    for each in (network, free):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MemoryWarning)
            sensitivity_curves(each, images, fisher, ("high", "low"), micro_batch_size=8)
    assert sum(network.passed) == sum(free.passed)
    assert len(network.tried) - len(network.passed) == 1


def test_an_image_that_does_not_fit_alone_is_left_out_of_every_arm_with_the_cause_and_changes_no_other():
    images = pictures(bright=4)
    fisher = input_fisher(Short(), images)
    truth, truth_removals = measured(Short(), images, fisher)
    with pytest.warns(MemoryWarning):
        curves, removals = measured(Short(bright_without_gradient), images, fisher)
    assert all(causes == {4: ALONE} for causes in curves.skipped.values())
    frame = truth.to_frame()
    same_table(curves.to_frame(), frame[frame.image != 4].reset_index(drop=True))
    # without much of its brightness, which is in the low component, the image fits
    fits = (truth_removals.component == "low") & (truth_removals.fraction > 0.5)
    same_table(removals, truth_removals[fits | (truth_removals.image != 4)].reset_index(drop=True))
    same_table(curves.unperturbed, truth.unperturbed)  # those logits are known from the spectrum


def test_an_image_whose_loss_gradient_does_not_fit_alone_is_left_out_of_that_arm_only():
    images = pictures(bright=4)
    fisher = input_fisher(Short(), images)
    truth = sensitivity_curves(Short(), images, fisher, (LossGradient(), "high"), labels=LABELS).to_frame()
    found = sensitivity_curves(Short(bright_with_gradient), images, fisher, (LossGradient(), "high"), labels=LABELS)
    cause = "the gradient of the loss is NaN or infinite, or does not fit into memory"
    assert found.skipped == {"loss_gradient": {4: cause}, "high": {}}
    kept = truth[(truth.arm == "high") | (truth.image != 4)].reset_index(drop=True)
    same_table(found.to_frame(), kept)
