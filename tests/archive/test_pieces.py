# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from monai_ifim.archive.pieces import Piece, is_written, piece_folder, piece_ranges
from tests.archive import archive, labelled_images


@pytest.mark.parametrize("size", [1, 2, 3, 64])
@pytest.mark.parametrize("images", [1, 2, 63, 64, 65, 128, 129])
def test_pieces_have_each_image_once_and_in_order_and_none_is_alone(images: int, size: int):
    pieces = piece_ranges(images, size)
    assert [place for piece in pieces for place in piece] == list(range(images))
    assert all(piece.start == number * size for number, piece in enumerate(pieces))
    assert size == 1 or images == 1 or all(len(piece) > 1 for piece in pieces)


def test_a_piece_is_read_as_it_was_measured_to_the_last_bit_and_its_record_says_if_it_is_damaged(tmp_path: Path):
    archive(tmp_path, labelled_images(4), piece_size=4).measure()
    folder = piece_folder(tmp_path, 0)
    piece = Piece.read(folder)
    assert piece.images.image.tolist() == [0, 1, 2, 3]
    assert len(piece.curves) == 4 * 3 * 2  # images, directions, signs
    (folder / "piece.json").write_text("{")
    with pytest.raises(ValueError, match=r"piece\.json is not JSON"):
        Piece.read(folder)


def test_a_folder_without_its_record_is_no_piece(tmp_path: Path):
    folder = piece_folder(tmp_path, 3)
    folder.mkdir(parents=True)
    (folder / "images.csv").write_text("image\n")
    assert not is_written(folder)
