# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import pytest

from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMSaver
from tests.handlers import CNN, attached, items, pictures

FOLLOWING = {
    "output_dir of IFIMSaver": lambda ifim, folder: IFIMSaver(ifim, folder),
    "log_dir of IFIMFigureHandler": lambda ifim, folder: IFIMFigureHandler(ifim, log_dir=folder),
}


@pytest.mark.parametrize("option", FOLLOWING)
@pytest.mark.parametrize("below", [".", "results/today"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_run_by_the_rank_that_writes(
    option, below, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    ifim = IFIMHandler()
    with pytest.raises(OSError, match=f"{option} is .*file.*cannot be made or written"):
        attached(ifim, CNN(), items(pictures()), FOLLOWING[option](ifim, tmp_path / "file" / below))
    assert (tmp_path / "file").read_text() == "in the way"
    monkeypatch.setattr("monai_ifim.handlers.listening.process_rank", lambda: 1)
    attached(IFIMHandler(), CNN(), items(pictures()), FOLLOWING[option](ifim, tmp_path / "file" / below))


@pytest.mark.parametrize("option", FOLLOWING)
def test_a_folder_that_can_be_made_is_not_made_before_there_is_something_to_write(option, tmp_path):
    ifim = IFIMHandler()
    attached(ifim, CNN(), items(pictures()), FOLLOWING[option](ifim, tmp_path / "results" / "today"))
    assert list(tmp_path.iterdir()) == []


def test_an_address_of_tensorboard_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "s3:").write_text("in the way")
    monkeypatch.chdir(tmp_path)
    ifim = IFIMHandler()
    attached(ifim, CNN(), items(pictures()), IFIMFigureHandler(ifim, log_dir="s3://bucket/runs"))
