# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Components lie where the image lies: read back with nibabel and SimpleITK, from any reader, in each format."""

import dataclasses
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.data.meta_obj import set_track_meta
from torch import nn

from monai_ifim import input_fisher
from monai_ifim.handlers import IFIMHandler, IFIMSaver
from monai_ifim.handlers.components import DICOM, write_components
from monai_ifim.handlers.components import FORMATS as ALL_FORMATS
from monai_ifim.handlers.grids import affine_of_grid
from monai_ifim.results import Case
from tests.handlers import LIGHT, attached, measure
from tests.handlers.test_figures import flat_network

FORMATS = tuple(name for name in ALL_FORMATS if name != DICOM)  # has tests of its own
PARTS = ("image", "high", "low", "eigenvector")
formats = pytest.mark.parametrize("extension", FORMATS)
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def case_of(shape, affine=None, **changes):
    """A shown image of random numbers."""
    torch.manual_seed(0)
    images = torch.randn(1, *shape)
    fisher = input_fisher(nn.Sequential(nn.Flatten(), nn.Linear(images.numel(), 2)), images)
    affine = None if affine is None else torch.tensor(affine, dtype=torch.float64)
    return dataclasses.replace(Case(3, "a.nii", "", images[0], fisher, affine), **changes)


def places(file):
    """From indices to millimetres in LPS, as SimpleITK reads a file."""
    image = sitk.ReadImage(str(file))
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(image.GetDirection(), (image.GetDimension(), -1))[:3, :3] * image.GetSpacing()[:3]
    matrix[:3, 3] = image.GetOrigin()[:3]
    return matrix


def written(case, extension="nii.gz"):
    """The files of the four parts, by part, in a new folder."""
    folder = Path(tempfile.mkdtemp())
    write_components(case, folder, extension)
    files = {part: folder / f"{case.stem}_{part}.{extension}" for part in PARTS}
    assert set(folder.iterdir()) == set(files.values())
    return files


@pytest.mark.usefixtures("small_figures")
@pytest.mark.parametrize(
    ("space", "plane", "extension"),
    [
        *(("LPS", "axial", "nii.gz"), ("LPS", "coronal", "nrrd"), ("LPS", "sagittal", "mha")),
        *(("LPS", "oblique", extension) for extension in FORMATS),
        ("RAS", "oblique", "nii.gz"),
    ],
)
def test_a_dicom_series_gets_its_components_back_on_its_grid(extension, plane, space, tmp_path):
    turned = {
        "axial": np.eye(3),
        "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
        "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]),
        "oblique": np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0],
    }[plane]
    turned[:, 2] = np.cross(turned[:, 0], turned[:, 1])  # as DICOM has it
    source = dicom_series(tmp_path / "dicom", turned, spacing=(0.7, 0.9, 2.5), origin=(-31.5, 42.25, -107.0))
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(source.GetDirection(), (3, 3)) * source.GetSpacing()
    lps[:3, 3] = source.GetOrigin()
    voxels = torch.from_numpy(np.swapaxes(sitk.GetArrayFromImage(source).astype(np.float64), 0, 2).copy())
    affine = torch.from_numpy(lps if space == "LPS" else RAS_TO_LPS @ lps)
    data = [{"image": MetaTensor(voxels[None], affine=affine, meta={"space": space})}]
    ifim = IFIMHandler(**LIGHT)
    saver = IFIMSaver(ifim, tmp_path, components=extension)
    attached(ifim, flat_network((1, *voxels.shape)), data, saver).run()
    files = sorted((saver.folder / "components").iterdir())
    assert [file.name.removeprefix("000000_image_000000_") for file in files] == sorted(
        f"{part}.{extension}" for part in PARTS
    )
    for file in files:
        found = sitk.ReadImage(str(file))
        assert found.GetSize() == source.GetSize()
        assert found.GetPixelID() == sitk.sitkFloat32
        for name in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(found, name)(), getattr(source, name)(), atol=2e-5, err_msg=name)
        if extension == "nii.gz":
            np.testing.assert_allclose(nibabel.load(file).affine, RAS_TO_LPS @ lps, atol=2e-5)
            assert nibabel.load(file).header.get_xyzt_units()[0] == "mm"
        if "_image." in file.name:
            np.testing.assert_allclose(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(source))


def dicom_series(folder, direction, spacing, origin):
    """A series of four slices of 8 by 6 pixels, written and read by SimpleITK."""
    folder.mkdir()
    values = np.random.default_rng(1).integers(0, 1000, size=(4, 6, 8)).astype(np.int16)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number, slice_ in enumerate(values):
        image = sitk.GetImageFromArray(slice_)
        image.SetSpacing(spacing[:2])
        place = np.asarray(origin) + number * spacing[2] * direction[:, 2]
        row, column = direction[:, 0], direction[:, 1]
        tags = {
            "0008|0060": "CT",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{number + 1}",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.2",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.3",
            "0020|0013": str(number),
            "0020|0032": "\\".join(f"{value:.10g}" for value in place),
            "0020|0037": "\\".join(f"{value:.10g}" for value in (*row, *column)),
            "0018|0050": str(spacing[2]),
            "0028|0030": f"{spacing[1]}\\{spacing[0]}",
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{number}.dcm"))
        writer.Execute(image)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    found = reader.Execute()
    np.testing.assert_allclose(found.GetOrigin(), origin, atol=1e-6)
    np.testing.assert_allclose(found.GetDirection(), direction.flatten(), atol=1e-6)
    np.testing.assert_allclose(found.GetSpacing(), spacing, atol=1e-6)
    return found


numbers = st.floats(-200, 200, allow_nan=False).map(lambda value: round(value, 3))


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    channels=st.integers(1, 3),
    turns=st.lists(numbers, min_size=9, max_size=9),
    lengths=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
    origin=st.lists(numbers, min_size=3, max_size=3),
    extension=st.sampled_from(FORMATS),
)
def test_voxels_of_any_grid_lie_where_the_affine_matrix_puts_them_and_hold_their_values(
    sizes, channels, turns, lengths, origin, extension
):
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(np.reshape(turns, (3, 3)) + np.eye(3) * 1e-3)[0] * lengths
    affine[:3, 3] = origin
    case = case_of((channels, *sizes), affine)
    file = written(case, extension)["image"]
    found = RAS_TO_LPS @ places(file)
    for index in np.ndindex(*sizes):
        at = np.array([*index, *[0] * (3 - len(sizes)), 1.0])
        np.testing.assert_allclose(found @ at, affine @ at, atol=1e-3)
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    if extension == "nii.gz":  # whose fourth axis are the channels
        values = np.asarray(nibabel.load(file).dataobj).reshape(*sizes, channels)
    else:
        values = np.swapaxes(values.reshape(*values.shape[:3], channels), 0, 2).reshape(*sizes, channels)
    np.testing.assert_array_equal(np.moveaxis(values, -1, 0), case.image.numpy())


NAN = float("nan")
SINGLE = {
    "sagittal, PydicomReader": ((5, 4), [[0, 0, 0, -10], [-0.7, 0, 0, 20], [0, -0.7, 1, 30], [0, 0, 0, 1]]),
    "coronal, PydicomReader": ((5, 4), [[-0.7, 0, 0, -10], [0, 0, 0, 20], [0, -0.7, 1, 30], [0, 0, 0, 1]]),
    "oblique, PydicomReader": ((5, 4), [[0.6, 0, 0, 1], [0, 0.5, 0, 2], [0.8, 0, 1, 3], [0, 0, 0, 1]]),
    "one slice with its third axis": ((5, 4, 1), [[-0.7, 0, 0, 1], [0, -0.7, 0, 2], [0, 0, 5, 3], [0, 0, 0, 1]]),
    "one slice without distance": ((5, 4, 1), [[0.7, 0, 0, 1], [0, 0.7, 0, 2], [0, 0, 0, 3], [0, 0, 0, 1]]),
    "one slice, distance NaN": ((5, 4, 1), [[0.7, 0, NAN, 1], [0, 0.7, NAN, 2], [0, 0, NAN, 3], [0, 0, 0, 1]]),
    "first axis of one voxel": ((1, 5, 4), [[0, 0, 0, 1], [0, 2, 0, 2], [0, 0, 3, 3], [0, 0, 0, 1]]),
    "a row": ((5, 1, 1), [[0, 0, 0, 1], [2, 0, 0, 2], [0, 0, 0, 3], [0, 0, 0, 1]]),
    "a voxel": ((1, 1, 1), [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 3], [0, 0, 0, 1]]),
}


@formats
@pytest.mark.parametrize("kind", SINGLE)
def test_of_axes_with_one_voxel_only_the_place_of_the_voxels_counts(kind, extension):
    shape, affine = SINGLE[kind]
    found = RAS_TO_LPS @ places(written(case_of((1, *shape), affine), extension)["high"])
    for index in np.ndindex(*shape):
        at = np.array([*index, *[0] * (3 - len(shape)), 1.0])
        truth = np.nan_to_num(np.array(affine, dtype=float)) @ at
        np.testing.assert_allclose(found @ at, truth, atol=1e-5)


UNUSABLE = {
    "no inverse": ((4, 4, 4), [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 0, 3], [0, 0, 0, 1]]),
    "voxels lie on each other": ((4, 4, 4), [[1, 1, 0, 1], [1, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]),
    "holds NaN": ((4, 4, 4), [[NAN, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]),
    "infinite numbers": ((4, 4), [[1, 0, 0, float("inf")], [0, 1, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]),
    "has no inverse": ((4, 4), [[1, 2, 0, 1], [1, 2, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]),
    "has no inverse (": ((4, 4, 4), np.zeros((4, 4)) + np.diag([0, 0, 0, 1.0])),
    "the last row": ((4, 4, 4), np.diag([1.0, 1, 1, 2])),
    "has the shape (3, 3), which does not fit 3 axes": ((4, 4, 4), np.eye(3)),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_where_the_place_is_not_known_nothing_is_written(reason, tmp_path):
    shape, affine = UNUSABLE[reason]
    for extension in FORMATS:
        with pytest.raises(ValueError, match="affine matrix") as error:
            write_components(case_of((1, *shape), affine), tmp_path, extension)
        assert reason in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_without_an_affine_matrix_the_grid_is_the_space():
    np.testing.assert_array_equal(affine_of_grid(None, (4, 4)), np.eye(4))
    np.testing.assert_allclose(RAS_TO_LPS @ places(written(case_of((1, 4, 3, 2)))["low"]), np.eye(4), atol=1e-6)


@formats
def test_a_file_that_fails_takes_the_others_of_its_image_with_it(extension, tmp_path, monkeypatch):
    calls = []

    def fails(owner, name):
        original = getattr(owner, name)

        def sometimes(*values, **options):
            calls.append(1)
            if len(calls) == 3:
                raise (OSError if owner is nibabel else RuntimeError)("sitk::ERROR: No space left")
            return original(*values, **options)

        monkeypatch.setattr(owner, name, sometimes)

    fails(*((nibabel, "save") if extension == "nii.gz" else (sitk, "WriteImage")))
    with pytest.raises(OSError, match="No space left"):
        write_components(case_of((1, 4, 4)), tmp_path, extension)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "found"), [(True, "nii.gz"), (False, None), ("nrrd", "nrrd"), ("mha", "mha")])
def test_components_are_a_format_or_wanted_or_not(given, found, tmp_path):
    assert IFIMSaver(IFIMHandler(), tmp_path, components=given).format == found


@pytest.mark.parametrize("wrong", ["nifti", "", 1, None, ["nrrd"], ".nii.gz"])
def test_another_format_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"components must be true, false or one of nii\.gz, nrrd, mha, dicom, got"):
        IFIMSaver(IFIMHandler(), tmp_path, components=wrong)


def test_without_its_packages_dicom_is_refused_when_the_saver_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("monai_ifim.handlers.saver.optional_import", lambda name: (None, name != "highdicom"))
    with pytest.raises(ImportError, match=r"components='dicom' needs pydicom and highdicom: pip install"):
        IFIMSaver(IFIMHandler(), tmp_path, components="dicom")
    IFIMSaver(IFIMHandler(), tmp_path, components="mha")


@pytest.mark.parametrize(
    ("dtype", "extension"), [(torch.bfloat16, "nii.gz"), (torch.float16, "nrrd"), (torch.float32, "mha")]
)
def test_networks_and_images_of_few_bits_are_measured_drawn_and_written(dtype, extension, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2)).to(dtype)
    data = [{"image": MetaTensor(torch.randn(1, 8, 8).to(dtype)), "label": number % 2} for number in range(4)]
    result = measure("handler", network, data, **LIGHT)
    folder = IFIMSaver(IFIMHandler(), tmp_path, components=extension).write(result)
    assert len(list((folder / "figures").glob("case_*.png"))) == len(result.cases) > 0
    for case in result.cases:
        parts = {}
        for part in PARTS:
            (file,) = (folder / "components").glob(f"{case.stem}_{part}.*")
            image = sitk.ReadImage(str(file))
            assert image.GetPixelID() == sitk.sitkFloat32
            parts[part] = sitk.GetArrayFromImage(image)
        np.testing.assert_array_equal(parts["image"][0].T, case.image[0].float().numpy())
        np.testing.assert_allclose(parts["high"] + parts["low"], parts["image"], atol=1e-5)


def test_meta_data_that_are_not_tracked_do_not_matter():
    set_track_meta(False)
    try:
        assert written(case_of((1, 4, 4)))["image"].is_file()
    finally:
        set_track_meta(True)
