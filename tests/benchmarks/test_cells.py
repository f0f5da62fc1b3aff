# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import pytest

from benchmarks.cells import DEFAULT_CELLS, FULL_CELLS, QUICK_CELLS, Cell, chosen_cells


@pytest.mark.parametrize("cell", [*FULL_CELLS, *QUICK_CELLS], ids=lambda cell: cell.name)
def test_a_cell_is_found_by_its_name(cell):
    assert Cell.parse(cell.name) == cell


@pytest.mark.parametrize("name", ["densenet121-2d-224", "lenet-2d-28-c2-b1", "densenet121-2d-224-c2-bx", ""])
def test_a_name_that_is_no_size_is_refused(name):
    with pytest.raises(ValueError, match="is no size"):
        Cell.parse(name)


@pytest.mark.parametrize("attribute", ["network", "classes"])
def test_the_default_sizes_have_every_network_and_number_of_classes(attribute):
    assert {getattr(cell, attribute) for cell in DEFAULT_CELLS} == {getattr(cell, attribute) for cell in FULL_CELLS}


def test_the_default_sizes_have_every_image_size_of_every_network_and_the_three_batches():
    assert {(c.network, c.pixels) for c in DEFAULT_CELLS} == {(c.network, c.pixels) for c in FULL_CELLS}
    assert {1, 8, 32} == {cell.batch for cell in DEFAULT_CELLS}


def test_the_default_sizes_are_among_all():
    assert set(DEFAULT_CELLS) < set(FULL_CELLS)


def test_a_beginning_stands_for_all_that_begin_so_up_to_a_dash():
    chosen = chosen_cells("densenet121-2d-64-c2", full=False, quick=False)
    assert [cell.name for cell in chosen] == [f"densenet121-2d-64-c2-b{batch}" for batch in (1, 8, 32)]
    with pytest.raises(ValueError, match="is no size"):
        chosen_cells("densenet121-2d-6", full=False, quick=False)


def test_a_size_is_chosen_once():
    assert chosen_cells("vit-2d-64,vit-2d-64-c2-b1", full=False, quick=False) == chosen_cells("vit-2d-64", False, False)


def test_a_micro_batch_is_the_whole_batch_where_memory_allows():
    assert [cell.name for cell in FULL_CELLS if cell.micro_batch < cell.batch] == [
        *(f"densenet121-2d-224-c{classes}-b32" for classes in (2, 6, 14)),
        "resnet18-3d-96-c2-b4",
    ]
