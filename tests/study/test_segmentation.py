# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The demonstration on MR images: cases keep their place in the file, and a training learns what it is to learn."""

import nibabel
import numpy as np
import pytest
import torch
from monai.transforms import SaveImage
from torch import nn

from monai_ifim.statistics import realistic_table
from monai_ifim.transforms import default_changes
from study.segmentation import training
from study.segmentation.cases import GRID, SPLITS, Case, load_cases, made_up_cases, split_of
from study.segmentation.realistic import markdown_of, measure_realistic
from study.segmentation.training import KINDS, class_dice, derangement, mean_dice, small_unet, train

# millimetres: voxels of unequal size, and axes of which two are turned round
AFFINE = np.array([[-1.0, 0, 0, 20], [0, 2.0, 0, -7], [0, 0, -1.5, 3], [0, 0, 0, 1]])
SHAPES = ((31, 59, 41), (43, 50, 24), (40, 56, 40))


def write(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def write_folder(folder, count=3):
    generator = np.random.default_rng(0)
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        write(folder / "images" / f"case_{number:03}.nii.gz", generator.normal(50, 9, shape).astype(np.float32))
        write(folder / "labels" / f"case_{number:03}.nii.gz", generator.integers(0, 3, shape, dtype=np.uint8))
    return folder


def on_file(folder, part, case):
    return nibabel.load(folder / part / f"{case.name}.nii.gz")


def weights(network):
    return torch.cat([value.flatten() for value in network.state_dict().values()])


def test_volumes_and_labels_come_by_name_order_on_one_grid_and_standardised(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "images" / "._case_000.nii.gz").write_bytes(b"what an archive left")
    cases = load_cases(folder, "train")
    assert [case.name for case in cases] == ["case_000", "case_001", "case_002"]
    for case in cases:
        assert case.image.shape == case.label.shape == (1, *GRID)
        assert (case.image.dtype, case.label.dtype) == (torch.float32, torch.int64)
        assert type(case.tensor) is type(case.label) is torch.Tensor
    values = on_file(folder, "images", cases[2]).get_fdata()  # of the grid's own size
    expected = (values - values.mean()) / values.std()
    np.testing.assert_allclose(cases[2].tensor[0], expected, atol=1e-5)


def test_each_voxel_is_at_the_millimetres_where_it_is_in_the_file(tmp_path):
    folder = write_folder(tmp_path)
    for case in load_cases(folder, "train"):
        label = on_file(folder, "labels", case)
        values, found = label.get_fdata(), 0
        for voxel in np.ndindex(*GRID):
            if any(place % 5 for place in voxel):  # one of 125 will do
                continue
            place = np.linalg.inv(label.affine) @ case.affine.numpy() @ [*voxel, 1]
            np.testing.assert_allclose(place, place.round(), atol=1e-9)
            there = tuple(place[:3].round().astype(int))
            inside = all(0 <= index < side for index, side in zip(there, values.shape))
            found += inside
            assert case.label[0][voxel] == (values[there] if inside else 0)
        assert found > 200


def test_values_go_back_to_the_voxels_of_the_file_and_are_zero_where_the_grid_has_none(tmp_path):
    folder = write_folder(tmp_path)
    for case in load_cases(folder, "train"):
        label = on_file(folder, "labels", case)
        back = case.on_source_grid(torch.cat([case.label, torch.ones_like(case.label)]))
        covered = back[1].numpy() == 1
        shared = [min(side, own) for side, own in zip(label.shape, GRID)]
        assert covered.sum() == np.prod(shared)
        np.testing.assert_array_equal(back[0].numpy(), np.where(covered, label.get_fdata(), 0))
        np.testing.assert_allclose(back.affine, AFFINE)


def test_monai_saves_values_over_the_image_of_the_file(tmp_path):
    folder = write_folder(tmp_path)
    case = load_cases(folder, "train")[0]  # longer than the grid along two axes, shorter along one
    SaveImage(tmp_path / "out", output_postfix="", separate_folder=False, print_log=False)(
        case.on_source_grid(case.tensor + 7)
    )
    saved, source = nibabel.load(tmp_path / "out" / "case_000.nii.gz"), on_file(folder, "images", case)
    np.testing.assert_allclose(saved.affine, source.affine)
    values, written = source.get_fdata(), saved.get_fdata() != 0
    assert written.sum() == 31 * 56 * 40
    expected = (values - values.mean()) / values.std() + 7
    np.testing.assert_allclose(saved.get_fdata()[written], expected[written], atol=1e-5)


def test_values_of_another_grid_are_refused():
    case = made_up_cases(1)[0]
    for values in (torch.zeros(1, 16, 16, 15), torch.zeros(16, 16, 16)):
        with pytest.raises(ValueError, match="got the shape"):
            case.on_source_grid(values)


def test_the_splits_share_no_volume_and_leave_none_out():
    names = [f"case_{number:03}" for number in range(130)]
    assert [name for split in SPLITS for name in split_of(names[::-1], split)] == names


def test_a_folder_without_images_without_a_label_or_without_the_split_is_refused(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="no NIfTI file"):
            load_cases(folder, "train")
    folder = write_folder(tmp_path / "volumes")
    with pytest.raises(ValueError, match="begins after 80 volumes, and there are 3"):
        load_cases(folder, "validation")
    with pytest.raises(ValueError, match="no split 'val'"):
        load_cases(folder, "val")
    (folder / "labels" / "case_001.nii.gz").unlink()
    with pytest.raises(ValueError, match="no label for case_001"):
        load_cases(folder, "train")


@pytest.mark.parametrize(
    ("label", "affine", "message"),
    [
        (np.zeros((31, 59, 40), np.uint8), AFFINE, "not on the same grid"),
        (np.zeros(SHAPES[0], np.uint8), np.eye(4), "not on the same grid"),
        (np.full(SHAPES[0], 3, np.uint8), AFFINE, r"has the values \[3"),
        (np.full(SHAPES[0], 0.5, np.float32), AFFINE, r"has the values \[0.5"),
    ],
)
def test_a_label_that_does_not_fit_its_image_is_refused(tmp_path, label, affine, message):
    folder = write_folder(tmp_path, count=1)
    write(folder / "labels" / "case_000.nii.gz", label, affine)
    with pytest.raises(ValueError, match=message):
        load_cases(folder, "train")


def test_a_series_of_volumes_is_refused(tmp_path):
    for part in ("images", "labels"):
        write(tmp_path / part / "case_000.nii.gz", np.zeros((8, 8, 8, 2), np.uint8))
    with pytest.raises(ValueError, match="not one volume"):
        load_cases(tmp_path, "train")


def test_made_up_cases_repeat_differ_among_each_other_and_have_all_classes():
    cases, again, other = made_up_cases(4, seed=1), made_up_cases(2, seed=1), made_up_cases(2, seed=2)
    assert all(torch.equal(first.tensor, second.tensor) for first, second in zip(cases, again))
    assert len(torch.stack([case.tensor for case in cases]).unique(dim=0)) == 4
    assert not torch.equal(cases[0].tensor, other[0].tensor)
    for case in cases:
        assert case.label.unique().tolist() == [0, 1, 2]
        np.testing.assert_allclose([case.tensor.mean(), case.tensor.std(correction=0)], [0, 1], atol=1e-5)
        assert torch.equal(case.on_source_grid(case.label)[0].as_tensor(), case.label[0])
    with pytest.raises(ValueError, match="at least 1"):
        made_up_cases(0)


def test_a_training_finds_the_classes():
    cases, validation, test = made_up_cases(8), made_up_cases(2, seed=1), made_up_cases(4, seed=2)
    trained, untrained = (train(cases, validation, kind=kind, steps=60) for kind in ("trained", "untrained"))
    assert not trained.training
    assert not untrained.training
    assert torch.equal(weights(untrained), weights(small_unet()))
    assert mean_dice(untrained, test) < 0.3
    assert mean_dice(trained, test) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(kind):
    cases, validation = made_up_cases(3), made_up_cases(2, seed=1)
    first, again, other = (weights(train(cases, validation, kind=kind, steps=5, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_random_numbers_of_others_go_on_as_if_nothing_had_been_trained():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    train(made_up_cases(2), made_up_cases(1), kind="trained", steps=5)
    assert torch.rand(1) == expected


def test_a_derangement_takes_each_place_once_and_none_for_itself():
    for count in (2, 3, 80):
        places = derangement(count, seed=0)
        assert sorted(places) == list(range(count))
        assert all(place != own for own, place in enumerate(places))
    assert derangement(80, seed=0) == places
    assert derangement(80, seed=1) != places
    with pytest.raises(ValueError, match="two or more"):
        derangement(1, seed=0)


def test_shuffled_labels_are_those_of_other_cases_and_no_validation_chooses(monkeypatch):
    cases, seen = made_up_cases(4), []

    def batches(given, steps, seed):
        seen.append(given)
        return iter(())

    monkeypatch.setattr(training, "_batches", batches)
    train(cases, cases, kind="shuffled_labels", steps=10, seed=5)
    train(cases, cases, kind="trained", steps=10, seed=5)
    (shuffled, real), others = seen, derangement(4, seed=5)
    assert all(torch.equal(own.tensor, case.tensor) for own, case in zip(shuffled, cases))
    assert all(torch.equal(own.label, cases[other].label) for own, other in zip(shuffled, others))
    assert all(torch.equal(own.label, case.label) for own, case in zip(real, cases))


def test_the_network_of_shuffled_labels_is_the_one_after_the_last_step(monkeypatch):
    cases, seen = made_up_cases(3), []
    step = torch.optim.AdamW.step

    def counted(optimizer, *arguments, **options):
        result = step(optimizer, *arguments, **options)
        seen.append(optimizer.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    monkeypatch.setattr(training, "mean_dice", lambda *_: 1 / len(seen))  # a validation would choose an early one
    network = train(cases, cases[:1], kind="shuffled_labels", steps=7)
    assert len(seen) == 7
    assert torch.equal(next(network.parameters()), seen[-1])
    assert not torch.equal(seen[-1], seen[-2])
    assert not network.training


def test_batches_have_each_case_once_an_epoch_with_its_own_label():
    drawn = made_up_cases(1)[0]
    cases = [Case(str(k), torch.full_like(drawn.image, 10 * k), torch.full_like(drawn.label, k)) for k in range(3)]
    epochs, unchanged = [], 0
    for images, labels in training._batches(cases, steps=6, seed=0):
        assert images.shape == labels.shape == (2, 1, 16, 16, 16)
        for image, label in zip(images, labels):
            (number,) = label.unique().tolist()
            assert round(float(image.mean()) / 10) == number
            unchanged += bool((image == 10 * number).all())
            epochs.append(number)
    assert [sorted(epochs[place : place + 3]) for place in (0, 3, 6, 9)] == [[0, 1, 2]] * 4
    assert len({tuple(epochs[place : place + 3]) for place in (0, 3, 6, 9)}) > 1
    assert unchanged < 6


def test_the_kept_network_is_the_first_with_the_highest_validation(monkeypatch):
    cases, validation = made_up_cases(2), made_up_cases(1, seed=1)
    reached, seen = iter([0.1, 0.5, 0.5, 0.3, 0.2]), []

    def dice(network, given):
        assert given is validation
        seen.append(weights(network))
        return next(reached)

    monkeypatch.setattr(training, "mean_dice", dice)
    network = train(cases, validation, kind="trained", steps=10)
    assert [torch.equal(weights(network), other) for other in seen] == [False, True, False, False, False]


def test_dice_is_twice_the_overlap_over_the_sum_of_each_class():
    cases = made_up_cases(2)

    class Constant(torch.nn.Module):
        def forward(self, images):
            logits = torch.zeros(1, 3, *images.shape[2:])
            logits[:, 1, :8], logits[:, 2, 8:] = 1, 1
            return logits

    expected = []
    for case in cases:
        for number, half in ((1, case.label[0, :8]), (2, case.label[0, 8:])):
            expected.append(2 * (half == number).sum() / (half.numel() + (case.label == number).sum()))
    torch.testing.assert_close(class_dice(Constant(), cases), torch.stack(expected).view(2, 2).mean(dim=0))
    assert mean_dice(Constant(), cases) == pytest.approx(float(torch.stack(expected).mean()))


def test_a_training_that_cannot_be_is_refused():
    cases = made_up_cases(2)
    with pytest.raises(ValueError, match="no kind 'random'"):
        train(cases, cases, kind="random", steps=10)
    for given in ((cases, []), ([], cases)):
        with pytest.raises(ValueError, match="cases to train and to validate with"):
            train(*given, kind="trained", steps=10)
    with pytest.raises(ValueError, match="steps must be at least 5, got 4"):
        train(cases, cases, kind="trained", steps=4)
    with pytest.raises(ValueError, match="two or more"):
        train(cases[:1], cases, kind="shuffled_labels", steps=10)


def test_realistic_changes_are_tabled_by_change_and_severity_beside_the_leading_eigenvector():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, 3, 1)).eval()
    images, realistic, high = measure_realistic(network, made_up_cases(2))
    assert len(realistic) == 6 * 5 * 2
    text = markdown_of(realistic_table(images, realistic, resamples=50), high)
    first, second = (part.splitlines()[2:] for part in text.split("\n\n"))
    names = list(default_changes(3, affine=False))
    assert [line.split(" | ")[0].strip("| ") for line in first[:-1]] == [name for name in names for _ in range(3)]
    assert first[-1].startswith("| along the leading eigenvector |  | 0.1 | 1000 |")
    assert [line.split(" | ")[0].strip("| ") for line in second] == names
