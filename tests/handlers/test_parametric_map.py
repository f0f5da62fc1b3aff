# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Parametric Maps lie where the source series lies, as pydicom, dcmqi (3D Slicer's reader) and SimpleITK see them."""

import json
import shutil
import subprocess
import warnings

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged, Orientationd, Spacingd
from torch import nn

from monai_ifim.handlers import IFIMHandler, IFIMSaver
from monai_ifim.handlers.parametric_map import DicomSeries, write_parametric_map
from tests.handlers import LIGHT, attached

pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom")
highdicom = pytest.importorskip("highdicom", reason="needs the extra dicom")
pytestmark = pytest.mark.usefixtures("small_figures")

SHAPE = (4, 6, 8)  # slices, rows, columns
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
PLANES = {
    "axial": np.eye(3),
    "sagittal": np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "oblique": np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0],
}
NAME, IDENTITY = "Secret^Name", "PAT-4711"


def series_of(folder, plane="axial", spacing=(0.7, 0.9, 2.5), origin=(-31.5, 42.25, -107.0), shape=SHAPE, **changes):
    """A CT series by pydicom, whose file names say nothing of the order; its SimpleITK image is the truth."""
    folder.mkdir()
    row, column = PLANES[plane][:, 0], PLANES[plane][:, 1]
    values = np.random.default_rng(1).integers(0, 1000, size=shape).astype(np.int16)
    study, series, frame = (pydicom.uid.generate_uid() for _ in range(3))
    for number, pixels in enumerate(values):
        image = pydicom.Dataset()
        image.file_meta = pydicom.dataset.FileMetaDataset()
        image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.Modality, image.InstanceNumber = "CT", number + 1
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = NAME, IDENTITY, "19700102", "O"
        image.StudyDate, image.StudyTime, image.StudyID, image.AccessionNumber = "20200102", "120000", "S1", "A1"
        image.ReferringPhysicianName = ""
        place = np.asarray(origin) + number * spacing[2] * np.cross(row, column)
        image.ImagePositionPatient = [round(value, 8) for value in place]
        image.ImageOrientationPatient = [round(value, 10) for value in (*row, *column)]
        image.PixelSpacing, image.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        image.Rows, image.Columns, image.SamplesPerPixel = *shape[1:], 1
        image.PhotometricInterpretation, image.PixelRepresentation = "MONOCHROME2", 1
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
        image.PixelData = pixels.tobytes()
        for word, value in changes.items():
            value = value(number) if callable(value) else value
            delattr(image, word) if value is None else setattr(image, word, value)
        image.save_as(folder / f"{'dbca'[number % 4]}{number}.dcm", enforce_file_format=True)
    return folder


def as_sitk(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def ras(image):
    """From the indices (column, row, slice) of a SimpleITK image to RAS."""
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return RAS_TO_LPS @ lps


def random_values(shape=SHAPE):
    """(1, W, H, D), as small as those of an eigenvector."""
    return torch.from_numpy(np.random.default_rng(2).normal(0, 1e-3, size=shape).T.astype(np.float32).copy())[None]


def program(name):
    return shutil.which(name) or pytest.skip(f"{name} is not there: pip install 'monai-ifim[test]'")


def converted(file, folder):
    """The map as dcmqi reads it, which 3D Slicer uses, too: the image that SimpleITK reads from its NRRD file."""
    command = [program("paramap2itkimage"), "--inputDICOM", file, "--outputDirectory", folder, "-t", "nrrd"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (nrrd,) = folder.glob("*.nrrd")
    return sitk.ReadImage(str(nrrd))


def same_grid(found, truth, atol=2e-5):
    assert found.GetSize() == truth.GetSize()
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(found, name)(), getattr(truth, name)(), atol=atol, err_msg=name)


@pytest.mark.parametrize("plane", PLANES)
def test_the_map_lies_on_the_grid_of_the_series_as_simpleitk_reads_both(plane, tmp_path):
    source = as_sitk(series_of(tmp_path / "series", plane))
    values = random_values()
    write_parametric_map(values, ras(source), tmp_path / "series", tmp_path / "map.dcm")
    found = converted(tmp_path / "map.dcm", tmp_path)
    same_grid(found, source)
    # without which 3D Slicer does not show what it has read
    assert {"QuantityValueCode", "MeasurementUnitsCode"} <= json.loads((tmp_path / "meta.json").read_text()).keys()
    np.testing.assert_allclose(sitk.GetArrayFromImage(found), values[0].numpy().T, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("plane", PLANES)
def test_each_frame_of_the_map_is_at_its_source_image_and_refers_to_it(plane, tmp_path):
    series_of(tmp_path / "series", plane)
    images = {image.SOPInstanceUID: image for image in map(pydicom.dcmread, (tmp_path / "series").iterdir())}
    values = random_values()
    write_parametric_map(values, ras(as_sitk(tmp_path / "series")), tmp_path / "series", tmp_path / "map.dcm")
    found = pydicom.dcmread(tmp_path / "map.dcm")
    assert found.BitsAllocated == 32
    assert found.pixel_array.dtype == np.float32
    shared = found.SharedFunctionalGroupsSequence[0]
    assert len(found.PerFrameFunctionalGroupsSequence) == SHAPE[0]
    for pixels, frame in zip(found.pixel_array, found.PerFrameFunctionalGroupsSequence):
        (reference,) = frame.DerivationImageSequence[0].SourceImageSequence
        image = images.pop(reference.ReferencedSOPInstanceUID)
        assert list(frame.PlanePositionSequence[0].ImagePositionPatient) == list(image.ImagePositionPatient)
        assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == image.ImageOrientationPatient
        assert shared.PixelMeasuresSequence[0].PixelSpacing == image.PixelSpacing
        # the slice of the values is told by the source's number, which counts along the normal
        np.testing.assert_allclose(pixels, values[0, ..., image.InstanceNumber - 1].numpy().T, rtol=1e-5, atol=1e-9)
        assert found.FrameOfReferenceUID == image.FrameOfReferenceUID
    assert not images


@pytest.mark.parametrize("codes", ["RAS", "PIL", "SAR"])
def test_turned_and_mirrored_axes_change_no_value(codes, tmp_path):
    source = as_sitk(series_of(tmp_path / "series", "oblique"))
    values = random_values()
    turned = nibabel.Nifti1Image(values[0].numpy(), ras(source))
    aim = nibabel.orientations.axcodes2ornt(codes)
    turned = turned.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(turned.affine), aim))
    write_parametric_map(turned.get_fdata()[None], turned.affine, tmp_path / "series", tmp_path / "map.dcm")
    found = pydicom.dcmread(tmp_path / "map.dcm").pixel_array
    np.testing.assert_allclose(found, values[0].numpy().T, rtol=1e-4, atol=1e-8)


def test_values_on_another_grid_are_interpolated_in_space(tmp_path):
    """A linear function of the place is exact under linear interpolation, whatever the grids."""
    source = as_sitk(series_of(tmp_path / "series", "oblique"))
    matrix = np.diag([1.3, 1.1, 0.9, 1.0])
    corners = ras(source)[:3, 3], ras(source) @ [*np.array(SHAPE[::-1]) - 1, 1]
    centre = (corners[0] + corners[1][:3]) / 2
    shape = (40, 36, 44)
    matrix[:3, 3] = centre - np.array([1.3, 1.1, 0.9]) * np.array(shape) / 2

    def function(affine, shape):
        place = np.einsum("ij,j...->i...", affine, np.stack([*np.indices(shape), np.ones(shape)]))[:3]
        return np.tensordot([0.3, -0.2, 0.5], place, 1) + 7

    values = function(matrix, shape)
    write_parametric_map(values[None], matrix, tmp_path / "series", tmp_path / "map.dcm")
    found = pydicom.dcmread(tmp_path / "map.dcm").pixel_array
    np.testing.assert_allclose(found, function(ras(source), SHAPE[::-1]).T, rtol=1e-4)
    whole = torch.from_numpy(np.random.default_rng(3).integers(0, 4, shape))[None]
    write_parametric_map(whole, matrix, tmp_path / "series", tmp_path / "classes.dcm")
    assert set(np.unique(pydicom.dcmread(tmp_path / "classes.dcm").pixel_array)) <= {0.0, 1.0, 2.0, 3.0}


def test_where_the_values_have_no_voxel_the_map_is_zero(tmp_path):
    source = as_sitk(series_of(tmp_path / "series"))
    affine = ras(source)
    affine[:3, 3] += affine[:3, 2]  # without the first slice, and the first two columns
    affine[:3, 3] += 2 * affine[:3, 0]
    values = torch.ones(1, 6, 6, 3)
    write_parametric_map(values, affine, tmp_path / "series", tmp_path / "map.dcm")
    truth = np.ones(SHAPE)
    truth[0] = truth[..., :2] = 0
    np.testing.assert_array_equal(pydicom.dcmread(tmp_path / "map.dcm").pixel_array, truth)


def test_a_single_slice_refers_to_its_own_file_and_a_volume_to_the_series_of_the_file(tmp_path):
    folder = series_of(tmp_path / "series", "oblique")
    file = sorted(folder.iterdir())[1]
    image = pydicom.dcmread(file)
    affine = ras(as_sitk(folder))
    affine[:3, 3] = np.array([-1, -1, 1]) * image.ImagePositionPatient
    values = random_values()[..., 2]
    write_parametric_map(values, affine, file, tmp_path / "slice.dcm")
    found = pydicom.dcmread(tmp_path / "slice.dcm")
    (reference,) = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert reference.ReferencedSOPInstanceUID == image.SOPInstanceUID
    np.testing.assert_allclose(found.pixel_array.squeeze(), values[0].numpy().T, rtol=1e-5, atol=1e-9)
    write_parametric_map(random_values(), ras(as_sitk(folder)), file, tmp_path / "map.dcm")
    assert pydicom.dcmread(tmp_path / "map.dcm").NumberOfFrames == SHAPE[0]


def test_the_file_says_what_it_holds_and_for_whom(tmp_path):
    source = as_sitk(series_of(tmp_path / "series"))
    values = random_values()
    file = tmp_path / "map.dcm"
    write_parametric_map(values, ras(source), tmp_path / "series", file, label="high", description="its best part")
    found = pydicom.dcmread(file)
    assert (found.ContentLabel, found.ContentDescription) == ("HIGH", "its best part")
    assert (found.ManufacturerModelName, found.ContentQualification) == ("monai_ifim", "RESEARCH")
    assert found.SoftwareVersions == __import__("monai_ifim").__version__
    assert (found.PatientName, found.PatientID, found.AccessionNumber) == (NAME, IDENTITY, "A1")
    assert found.RecognizableVisualFeatures == "YES"
    derivation = found.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0]
    assert derivation.DerivationDescription.startswith("its best part; input-dependent Fisher information")
    (mapping,) = found.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1, 0)
    assert mapping.DoubleFloatRealWorldValueFirstValueMapped == found.pixel_array.min()
    assert mapping.DoubleFloatRealWorldValueLastValueMapped == found.pixel_array.max()
    again = highdicom.pm.ParametricMap.from_file(file)
    np.testing.assert_array_equal(again.get_frames(apply_real_world_transform=True), found.pixel_array)


@pytest.mark.parametrize("values", [random_values(), torch.zeros(1, 8, 6, 4), torch.full((1, 8, 6, 4), 1e-30)])
@pytest.mark.parametrize("plane", ["axial", "oblique"])
def test_dciodvfy_finds_no_error(plane, values, tmp_path):
    source = as_sitk(series_of(tmp_path / "series", plane))
    write_parametric_map(values, ras(source), tmp_path / "series", tmp_path / "map.dcm", description="of an image")
    done = subprocess.run([program("dciodvfy"), tmp_path / "map.dcm"], capture_output=True, text=True)
    assert "ParametricMap" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("Error")] == []


def test_a_series_without_the_patient_makes_a_map_without_the_patient(tmp_path):
    empty = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID")
    times = ("StudyDate", "StudyTime", "ReferringPhysicianName", "SliceThickness")
    source = as_sitk(series_of(tmp_path / "series", **dict.fromkeys((*empty, *times))))
    write_parametric_map(random_values(), ras(source), tmp_path / "series", tmp_path / "map.dcm")
    found = pydicom.dcmread(tmp_path / "map.dcm")
    assert not any(found.get(word) for word in empty)
    same_grid(converted(tmp_path / "map.dcm", tmp_path), source)


REFUSED = {
    "lack FrameOfReferenceUID": {"FrameOfReferenceUID": None},
    "lack ImagePositionPatient": {"ImagePositionPatient": None},
    "several frames": {"NumberOfFrames": 2, "PixelData": bytes(2 * 2 * 48)},
    "belong to 4 series": {"SeriesInstanceUID": lambda number: f"1.2.3.{number}"},
    "no regular grid": {"ImagePositionPatient": lambda number: [0, 0, number**2]},
    "no regular grid ": {"ImagePositionPatient": lambda number: [0, number, number]},
    "no regular grid (": {"PixelSpacing": lambda number: [1 + number // 3, 1]},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_series_are_refused(reason, tmp_path):
    series_of(tmp_path / "series", **REFUSED[reason])
    with pytest.raises(ValueError, match="DICOM") as error:
        write_parametric_map(random_values(), np.eye(4), tmp_path / "series", tmp_path / "map.dcm")
    assert reason.strip() in str(error.value)
    assert not (tmp_path / "map.dcm").exists()


@pytest.mark.parametrize(
    ("values", "affine", "options", "words"),
    [
        (torch.zeros(2, 8, 6, 4), np.eye(4), {}, r"one channel at one time: .* got \(2, 8, 6, 4\)"),
        (torch.zeros(1, 8, 6, 4, 3), np.eye(4), {}, "one channel at one time"),
        (torch.full((1, 8, 6, 4), torch.nan), np.eye(4), {}, "NaN or infinite"),
        (torch.zeros(1, 8, 6, 4), None, {}, "no affine matrix"),
        (torch.zeros(1, 8, 6, 4), np.eye(4) * 0, {}, "affine matrix"),
        (torch.zeros(1, 8, 6, 4), np.diag([1.0, 1, 1, 1]) + 9e3 * np.eye(4, k=3), {}, "no voxel of the image lies"),
        (torch.zeros(1, 8, 6, 4), np.eye(4), {"label": "a*b"}, "label must be"),
        (torch.zeros(1, 8, 6, 4), np.eye(4), {"label": "x" * 17}, "label must be"),
    ],
)
def test_values_that_no_map_can_hold_are_refused(values, affine, options, words, tmp_path):
    series_of(tmp_path / "series")
    with pytest.raises(ValueError, match=words):
        write_parametric_map(values, affine, tmp_path / "series", tmp_path / "map.dcm", **options)
    assert not (tmp_path / "map.dcm").exists()


@pytest.mark.parametrize("source", ["nowhere", "", "x" * 5000, "scan.nii.gz", "empty"])
def test_what_is_no_dicom_is_refused(source, tmp_path):
    (tmp_path / "empty").mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2)), np.eye(4)), tmp_path / "scan.nii.gz")
    with pytest.raises(ValueError, match="not read from DICOM files that are still there"):
        DicomSeries.read(tmp_path / source)


def test_without_highdicom_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "monai_ifim.handlers.parametric_map.optional_import", lambda name: (pydicom, name != "highdicom")
    )
    with pytest.raises(ImportError, match=r"pip install 'monai-ifim\[dicom\]'"):
        write_parametric_map(random_values(), np.eye(4), tmp_path, tmp_path / "map.dcm")


def saved(data, folder):
    """The folder of an evaluation of these data."""
    data = [{"image": row["image"].double()} for row in data]
    ifim = IFIMHandler(**LIGHT)
    saver = IFIMSaver(ifim, folder, components="dicom")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(data[0]["image"].numel(), 2)).double()
    attached(ifim, network, data, saver).run()
    return saver.folder


def test_a_series_that_monai_reads_gets_its_components_back_as_maps(tmp_path):
    folder = series_of(tmp_path / "series", "oblique")
    source = as_sitk(folder)
    data = [LoadImaged("image", reader="PydicomReader", ensure_channel_first=True)({"image": folder})]
    out = saved(data, tmp_path)
    files = {file.name.rpartition("_")[2]: file for file in (out / "components").iterdir()}
    assert sorted(files) == ["eigenvector.dcm", "high.dcm", "image.dcm", "low.dcm"]
    maps = {name: pydicom.dcmread(file).pixel_array for name, file in files.items()}
    np.testing.assert_allclose(maps["image.dcm"], sitk.GetArrayFromImage(source), rtol=1e-5)
    np.testing.assert_allclose(maps["high.dcm"] + maps["low.dcm"], maps["image.dcm"], rtol=1e-4, atol=1e-2)
    for name, file in files.items():
        (tmp_path / name).mkdir()
        same_grid(converted(file, tmp_path / name), source)
    # the patient stands in the maps alone
    for file in out.rglob("*"):
        if file.is_file() and file.suffix != ".dcm":
            assert not any(word.encode() in file.read_bytes() for word in (NAME, IDENTITY, "19700102"))
    assert NAME.encode() in files["high.dcm"].read_bytes()


def test_components_of_a_resampled_input_come_back_on_the_grid_of_the_series(tmp_path):
    folder = series_of(tmp_path / "series", "oblique", spacing=(1.0, 1.2, 2.0))
    steps = [
        LoadImaged("image", reader="PydicomReader", ensure_channel_first=True),
        Orientationd("image", "RAS", labels=None),
        Spacingd("image", (1.5, 1.5, 1.5)),
    ]
    out = saved([Compose(steps)({"image": folder})], tmp_path)
    (file,) = (out / "components").glob("*_high.dcm")
    same_grid(converted(file, tmp_path), as_sitk(folder))
    assert pydicom.dcmread(file).pixel_array.any()


def test_an_image_that_was_not_read_from_dicom_is_written_as_nifti_and_the_log_says_why(tmp_path, caplog):
    meta = {"filename_or_obj": str(tmp_path / "scan.nii.gz")}
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1]))
    data = [{"image": MetaTensor(torch.randn(1, 6, 5, 4), affine=affine, meta=meta)}]
    with caplog.at_level("WARNING"):
        out = saved(data, tmp_path)
    files = sorted((out / "components").iterdir())
    assert len(files) == 4
    for file in files:
        np.testing.assert_allclose(nibabel.load(file).affine, affine)
    assert "was not read from DICOM files" in caplog.text
    assert "written as NIfTI instead" in caplog.text


def test_no_message_names_the_patient(tmp_path, monkeypatch):
    source = as_sitk(series_of(tmp_path / "series"))

    def fails(*_, **__):
        raise ValueError(f"Invalid value {NAME}")

    monkeypatch.setattr(highdicom.pm, "ParametricMap", fails)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="highdicom makes no Parametric Map") as error:
        write_parametric_map(random_values(), ras(source), tmp_path / "series", tmp_path / "map.dcm")
    assert NAME not in str(error.value)
    assert error.value.__suppress_context__
