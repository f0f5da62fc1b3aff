# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The plan: what is promised is in it, and the default fits into its time."""

from study.networks import NETWORKS
from study.plan import Cell, effort_of, estimated_minutes, planned_cells, sized
from study.tasks import CONTROLLED, Task

CLINICAL = {
    "pneumonia": Task("pneumonia", "", (28, 28), 1, 2),
    "blood": Task("blood", "", (64, 64), 3, 8),
    "adrenal": Task("adrenal", "", (28, 28, 28), 1, 2),
}
TASKS = {**CONTROLLED, **CLINICAL}
MAIN = ("random_field_2d_2classes", *CLINICAL)


def test_by_default_every_main_task_has_two_networks_three_seeds_and_both_controls():
    cells = planned_cells(TASKS)
    for task in MAIN:
        for network in ("cnn", "small_resnet"):
            seeds = {cell.seed for cell in cells if (cell.task, cell.network, cell.kind) == (task, network, "trained")}
            assert seeds == {0, 1, 2}
        kinds = {cell.kind for cell in cells if cell.task == task}
        assert {"trained", "shuffled labels", "untrained"} <= kinds
    assert {"resnet18", "densenet121", "vit"} <= {cell.network for cell in cells if cell.task == "pneumonia"}
    assert sum(cell.train_size is not None for cell in cells) >= 2


def test_the_default_ends_in_time_on_two_cores():
    assert sum(estimated_minutes(planned_cells(TASKS), TASKS)) / 2 < 65


def test_in_full_every_network_meets_every_task_with_all_seeds_and_both_controls_but_for_one_in_3d():
    full, default = planned_cells(TASKS, full=True), planned_cells(TASKS)
    assert set(default) < set(full)
    assert len(set(full)) == len(full) == len({cell.name for cell in full})
    for name, task in TASKS.items():
        for network in NETWORKS:
            wanted = {Cell(name, network, seed) for seed in (0, 1, 2)}
            wanted |= {Cell(name, network, labels="shuffled"), Cell(name, network, trained=False)}
            never = network == "efficientnet_b0" and len(task.spatial_size) == 3
            assert wanted & set(full) == (set() if never else wanted)


def test_many_images_are_each_seen_once_and_the_usual_number_stays_what_it_was():
    task = CONTROLLED["random_field_2d_2classes"]
    for size, images, iterations in ((None, 64_000, 1000), (4000, 64_000, 1000), (256_000, 256_000, 4000)):
        effort = effort_of(Cell(task.name, "small_resnet", train_size=size), task, False)
        assert (sized(task, effort).train, effort.iterations) == (images, iterations)
    assert Cell(task.name, "small_resnet", train_size=256_000) in planned_cells(CONTROLLED)


def test_a_file_of_the_user_is_run_as_the_clinical_sets_are():
    tasks = {"own": Task("own", "", (28, 28), 1, 3)}
    assert len(planned_cells(tasks)) == 10
    assert {cell.task for cell in planned_cells(tasks)} == {"own"}


def test_costly_networks_train_for_fewer_iterations():
    task = CLINICAL["pneumonia"]
    few, many = (effort_of(Cell("pneumonia", name), task, False) for name in ("densenet121", "cnn"))
    assert few.iterations < many.iterations
    assert few.measured < many.measured
