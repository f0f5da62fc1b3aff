# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
import warnings

import monai.data
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import ThreadDataLoader
from monai.transforms import GridSplitd
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from monai_ifim.handlers import IFIMHandler
from monai_ifim.handlers.selection import ImageSelection
from tests.handlers import (
    CNN,
    LIGHT,
    attached,
    chosen,
    evaluator,
    items,
    lambda_max,
    logged,
    on_route,
    per_image,
    pictures,
    run,
)


class Numbers(IterableDataset):
    """A stream of whole numbers, of unknown length."""

    def __iter__(self):
        return iter(range(9))


def picked(selection, loader):
    """The numbers that are chosen of a loader over ``range(n)``, and the positions that they are said to have."""
    selection.start(loader)
    numbers, positions = [], []
    for batch in loader:
        rows, there = selection.choose(len(batch))
        numbers += [int(batch[row]) for row in rows]
        positions += there
    return numbers, positions


def silent(max_images, loader, seed=0):
    """As :func:`picked`, and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return picked(ImageSelection(max_images, seed), loader)


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("max_images", [1, 5, 9, 100])
def test_sequential_loaders_give_the_promised_positions(max_images, batch_size):
    numbers, positions = silent(max_images, DataLoader(range(9), batch_size=batch_size))
    assert numbers == positions == chosen(9, max_images)


@pytest.mark.parametrize("max_images", [0, -3, True, 1.5])
def test_fewer_than_one_image_is_refused(max_images):
    with pytest.raises(ValueError, match=f"max_images must be a whole number, 1 or more, got {max_images}"):
        ImageSelection(max_images, 0)


def test_more_images_keep_those_of_a_smaller_choice():
    sets = [set(silent(count, DataLoader(range(20)))[0]) for count in (3, 8, 15)]
    assert [len(positions) for positions in sets] == [3, 8, 15]
    assert sets[0] < sets[1] < sets[2]


def test_the_choice_depends_on_the_seed_and_not_on_the_global_random_state():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = silent(5, DataLoader(range(20)), seed=0)
    torch.manual_seed(2)
    assert silent(5, DataLoader(range(20)), seed=0) == first
    assert silent(5, DataLoader(range(20)), seed=1) != first
    torch.manual_seed(1)
    selection = ImageSelection(5, 0)
    selection.start(DataLoader(range(20)))
    selection.choose(20)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_epoch_gives_the_same_choice():
    selection, loader = ImageSelection(4, 0), DataLoader(range(9), batch_size=2)
    assert picked(selection, loader) == picked(selection, loader) == (chosen(9, 4),) * 2


def test_seen_counts_all_images_of_the_epoch():
    selection, loader = ImageSelection(4, 0), DataLoader(range(9), batch_size=2)
    for _ in range(2):
        picked(selection, loader)
        assert selection.seen == 9


@pytest.mark.parametrize("length", [8, 9])
@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shares_of_a_distributed_sampler_are_together_the_choice_of_one_process(length, replicas, drop_last):
    everything = []
    for rank in range(replicas):
        sampler = DistributedSampler(range(length), replicas, rank, shuffle=False, drop_last=drop_last)
        numbers, positions = silent(6, DataLoader(range(length), batch_size=2, sampler=sampler))
        assert numbers == positions
        everything += numbers
    reached = length // replicas * replicas if drop_last else length
    assert sorted(everything) == [position for position in chosen(length, 6) if position < reached]


@pytest.mark.parametrize("even_divisible", [True, False])
def test_monais_distributed_sampler_likewise(even_divisible):
    everything = []
    for rank in range(2):
        sampler = monai.data.DistributedSampler(
            range(9), even_divisible=even_divisible, num_replicas=2, rank=rank, shuffle=False
        )
        everything += silent(9, DataLoader(range(9), batch_size=2, sampler=sampler))[0]
    assert sorted(everything) == list(range(9))  # the padding copy is not looked at twice


def test_sequential_sampler_and_batch_sampler_given_by_hand_are_known():
    loader = DataLoader(range(9), sampler=SequentialSampler(range(9)), batch_size=4)
    assert silent(4, loader)[0] == chosen(9, 4)
    loader = DataLoader(range(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 4, drop_last=False))
    assert silent(4, loader)[0] == chosen(9, 4)


def test_a_batch_sampler_in_another_order_is_not_taken_for_sequential():
    # torch gives such a loader a sequential sampler beside the batch sampler, which it does not use
    order = BatchSampler([8, 7, 6, 5, 4, 3, 2, 1, 0], 4, drop_last=False)
    with pytest.warns(UserWarning, match="first 4 images"):
        numbers, _ = picked(ImageSelection(4, 0), DataLoader(range(9), batch_sampler=order))
    assert numbers == [8, 7, 6, 5]


def unknown_order():
    """Loaders whose n-th image is not known to be a certain one of the data set."""
    sampler = DistributedSampler(range(9), 1, 0, shuffle=True)
    return {
        "shuffled": DataLoader(range(9), batch_size=4, shuffle=True),
        "random sampler": DataLoader(range(9), batch_size=4, sampler=RandomSampler(range(9))),
        "subset": DataLoader(range(9), batch_size=4, sampler=SubsetRandomSampler([1, 5, 7, 3, 2])),
        "shuffled distributed": DataLoader(range(9), batch_size=4, sampler=sampler),
        "stream": DataLoader(Numbers(), batch_size=4),
        "list of batches": [torch.arange(4), torch.arange(4, 8)],
        "repeating threads": ThreadDataLoader(range(9), batch_size=4, num_workers=0, repeats=2),
    }


@pytest.mark.parametrize("name", unknown_order())
def test_unknown_orders_give_the_first_images_seen_and_one_warning(name):
    loader, selection = unknown_order()[name], ImageSelection(3, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            selection.start(loader)
            assert selection.choose(2) == ([0, 1], [0, 1])
            assert selection.choose(2) == ([0], [2])
            assert selection.choose(2) == ([], [])
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "first 3 images" in messages[0]
    assert "shuffle=False" in messages[0]


def test_a_stream_gives_its_first_images():
    with pytest.warns(UserWarning, match="first 5 images"):
        assert picked(ImageSelection(5, 0), DataLoader(Numbers(), batch_size=2))[0] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- items that give several images


def several(numbers, each=3, batch_size=4, collate=None, **options):
    """A loader whose item ``n`` gives the images ``each * n, each * n + 1, ...``, as lists that are flattened."""

    def flattened(items):
        return torch.tensor([each * item + index for item in items for index in range(each)])

    return DataLoader(range(numbers), batch_size=batch_size, collate_fn=collate or flattened, **options)


@pytest.mark.parametrize("batch_size", [1, 4, 20])
@pytest.mark.parametrize("max_images", [1, 5, 27, 100])
def test_items_of_several_images_give_the_promised_positions_among_all_images(max_images, batch_size):
    selection = ImageSelection(max_images, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            numbers, positions = picked(selection, several(9, batch_size=batch_size))
            assert numbers == positions == chosen(27, max_images)
            assert (selection.data_set_size, selection.seen) == (27, 27)


def test_items_of_several_images_without_an_incomplete_last_batch():
    numbers, positions = silent(27, several(9, drop_last=True))
    assert numbers == positions == list(range(24))


def test_an_epoch_over_the_first_batches_chooses_among_their_images():
    selection = ImageSelection(5, 0)
    selection.start(several(9), epoch_length=2)
    assert selection.choose(12)[1] + selection.choose(12)[1] == chosen(24, 5)
    assert selection.data_set_size == 27


def test_a_loader_that_starts_again_within_the_epoch_gives_no_image_twice():
    for loader, images in ((several(9), 27), (several(9, drop_last=True), 24)):
        selection, positions = ImageSelection(100, 0), []
        selection.start(loader, epoch_length=2 * len(loader))
        for _ in range(2):
            for batch in loader:
                positions += selection.choose(len(batch))[1]
        assert positions == list(range(images))


@pytest.mark.parametrize("length", [8, 9])
@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_with_items_of_several_images_make_together_the_choice_of_one_process(length, replicas, drop_last):
    everything = []
    for rank in range(replicas):
        sampler = DistributedSampler(range(length), replicas, rank, shuffle=False, drop_last=drop_last)
        numbers, positions = silent(7, several(length, batch_size=2, sampler=sampler))
        assert numbers == positions
        everything += numbers
    reached = 3 * (length // replicas * replicas if drop_last else length)
    assert sorted(everything) == [position for position in chosen(3 * length, 7) if position < reached]


def ragged(counts, batch_size=1):
    """A loader whose item ``n`` gives ``counts[n]`` images, numbered as they come."""
    starts = np.cumsum([0, *counts])

    def flattened(items):
        return torch.tensor([starts[item] + index for item in items for index in range(counts[item])])

    return DataLoader(range(len(counts)), batch_size=batch_size, collate_fn=flattened)


@pytest.mark.parametrize(
    ("counts", "batch_size"), [([2, 3, 2, 3], 2), ([0, 2, 2], 1), ([0, 1, 1], 2)], ids=["uneven", "none", "fewer"]
)
def test_batches_that_are_no_multiple_of_their_items_give_the_first_images_seen_and_one_warning(counts, batch_size):
    selection = ImageSelection(3, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            first = list(range(min(3, sum(counts))))
            assert picked(selection, ragged(counts, batch_size)) == (first, first)
            assert selection.data_set_size is None
    (message,) = [str(warning.message) for warning in caught]
    assert "first 3 images" in message
    assert "do not all give the same number of images" in message


def test_uneven_items_that_show_late_still_fill_the_choice_with_different_images():
    selection, counts = ImageSelection(4, 0), [2, 2, 2, 3, 2, 2, 2]
    before = [position for position in chosen(14, 4) if position < 6]
    assert len(before) in (1, 2, 3)  # otherwise this would show nothing
    with pytest.warns(UserWarning, match="first 4 images"):
        numbers, positions = picked(selection, ragged(counts))
    assert numbers == positions == [*before, *range(6, 10 - len(before))]
    for _ in range(2):  # from then on the first ones, every epoch
        assert picked(selection, ragged(counts)) == ([0, 1, 2, 3],) * 2


# ---------------------------------------------------------------- in an evaluator


def test_a_shuffled_loader_gives_the_first_images_and_one_warning_for_all_epochs():
    network, images, seen, orders = CNN(), pictures(), [], set()
    engine = evaluator(
        network, monai.data.DataLoader(items(images), batch_size=3, shuffle=True), "metric", max_images=4
    )
    engine.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: seen.extend(int(item["image"].meta["filename_or_obj"][-2:]) for item in engine.state.batch),
    )
    truth = lambda_max(network, images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            seen.clear()
            engine.run()
            orders.add(tuple(seen))
            np.testing.assert_allclose(per_image(engine, "lambda_max")[:4], truth[seen[:4]], rtol=1e-6)
            assert np.isnan(per_image(engine, "lambda_max")[4:]).all()
    assert len(orders) == 3
    assert len([warning for warning in caught if "iFIM looks at the first 4" in str(warning.message)]) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_of_a_distributed_sampler_looks_at_its_own_images_once(rank):
    own = [[0, 2, 4, 6], [1, 3, 5]][rank]  # rank 1 sees image 0 again, as padding
    network, images = CNN(), pictures()
    sampler = DistributedSampler(items(images), num_replicas=2, rank=rank, shuffle=False)
    loader = ThreadDataLoader(items(images), batch_size=3, sampler=sampler, num_workers=0)
    engine = run(network, loader)
    found = per_image(engine, "lambda_max")
    assert logged(engine)["images"] == len(own)
    np.testing.assert_allclose(found[: len(own)], lambda_max(network, images[own]), rtol=1e-6)
    assert np.isnan(found[len(own) :]).all()
    assert len(found) == 4


@pytest.mark.parametrize(("batch_size", "max_images"), [(2, 5), (3, 100)])
def test_the_patches_that_a_grid_split_makes_of_each_item_are_images_of_their_own(batch_size, max_images):
    network, whole = CNN(), torch.randn(5, 1, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches = torch.stack([x[:, i : i + 12, j : j + 12] for x in whole for i in (0, 12) for j in (0, 12)])
    patients = [f"patient {index}" for index in range(5)]
    data = monai.data.Dataset(items(whole, [0, 1, 2, 1, 0], patient=patients), GridSplitd(keys="image", grid=(2, 2)))
    ifim = on_route("metric", max_images=max_images, group_key="patient", **LIGHT)
    engine = attached(ifim, network, monai.data.DataLoader(data, batch_size=batch_size, num_workers=0))
    for _ in range(2):
        engine.run()
        result, positions = ifim.result, chosen(20, max_images)
        assert result.images.image.tolist() == positions
        assert result.data_set_size == 20
        assert result.images.name.tolist() == [f"case_{position // 4:02d}" for position in positions]
        assert result.images.group.tolist() == [patients[position // 4] for position in positions]
        assert result.images.label.astype(int).tolist() == [[0, 1, 2, 1, 0][position // 4] for position in positions]
        np.testing.assert_allclose(result.images.lambda_max, lambda_max(network, patches[positions]), rtol=1e-6)
        assert np.flatnonzero(~np.isnan(per_image(engine, "lambda_max"))).tolist() == positions
        assert len(per_image(engine, "lambda_max")) == 20


@pytest.mark.parametrize("epoch_length", [1, 2, 4])
def test_an_epoch_of_another_length_than_the_loader_looks_at_each_chosen_image_once(epoch_length):
    network, images = CNN(), pictures()
    engine = run(network, items(images), epoch_length=epoch_length, per_batch=4, max_images=4)
    seen = images[:4] if epoch_length == 1 else images
    positions = chosen(len(seen), 4)
    assert logged(engine)["images"] == 4
    found = per_image(engine, "lambda_max")
    np.testing.assert_allclose(found[positions], lambda_max(network, images[positions]), rtol=1e-6)
    assert np.flatnonzero(~np.isnan(found)).tolist() == positions


# ---------------------------------------------------------------- orders that only look known


class Backwards(SequentialSampler):
    def __iter__(self):
        return reversed(range(len(self.data_source)))


class Named(SequentialSampler):
    """A subclass that leaves the order."""


class Rotated(DistributedSampler):
    def __iter__(self):
        own = list(super().__iter__())
        return iter(own[1:] + own[:1])


class Stepping(DataLoader):
    def __iter__(self):
        return reversed(list(super().__iter__()))


UNKNOWN = {
    "a sequential sampler with an order of its own": lambda data: DataLoader(data, sampler=Backwards(data)),
    "a distributed sampler with an order of its own": lambda data: DataLoader(
        data, sampler=Rotated(data, 1, 0, shuffle=False)
    ),
    "a loader with an order of its own": lambda data: Stepping(data, batch_size=2),
    "a weighted distributed sampler": lambda data: DataLoader(
        data, sampler=monai.data.DistributedWeightedRandomSampler(data, [1.0] * len(data), num_replicas=1, rank=0)
    ),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_an_order_is_trusted_only_where_it_is_known(make):
    with pytest.warns(UserWarning, match="shuffled or unknown"):
        numbers, _ = picked(ImageSelection(4, 0), make(range(9)))
    assert len(numbers) == 4


@pytest.mark.parametrize("make", [Named, lambda data: Named(data)])
def test_a_subclass_that_leaves_the_order_is_trusted(make):
    numbers, positions = silent(4, DataLoader(range(9), sampler=make(range(9))))
    assert numbers == positions == chosen(9, 4)


def test_a_loader_whose_workers_need_not_keep_the_order_is_not_trusted():
    try:
        loader = DataLoader(range(9), num_workers=2, in_order=False)
    except TypeError:
        pytest.skip("this torch has no such loader")
    selection = ImageSelection(4, 0)
    with pytest.warns(UserWarning, match="shuffled or unknown"):
        selection.start(loader)


def test_other_images_at_the_same_places_than_at_an_earlier_epoch_are_told_once():
    network, ifim = CNN(), IFIMHandler(max_images=3, **LIGHT)
    images = pictures(9)
    data = items(list(images[:7]))
    engine = attached(ifim, network, data)
    engine.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine.run()
    for place, item in enumerate(items(list(images[2:]))):
        item["image"].meta["filename_or_obj"] = f"other_{place}"
        data[place] = item
    with pytest.warns(UserWarning, match="other images at the same places"):
        engine.run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine.run()
