"""The samplers: exact batches, the caps, the promised spans, repeatability and resuming."""

import io
import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from hloss.samplers import SAMPLERS, ClassShuffleSampler

SIZES = (2, 3, 5, 8, 12, 16, 16, 16, 30, 40)
OPTIONS = {
    "class-shuffle": {"batch_size": 20, "images_per_class": 10},
    "balanced": {"batch_size": 8, "images_per_class": 2},
    "random-class": {"batch_size": 24, "images_per_class": 10},
}


def labels(sizes=SIZES, seed=0):
    """Labels with gaps between their values, shuffled."""
    flat = torch.cat([torch.full((size,), 3 * label) for label, size in enumerate(sizes)])
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))]


def build(name, seed=0, sizes=SIZES, **options):
    generator = torch.Generator().manual_seed(seed)
    return SAMPLERS[name](labels(sizes), **(OPTIONS[name] | options), generator=generator)


def take(sampler, n):
    return list(itertools.islice(sampler, n))


@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_are_exact_plain_distinct_and_repeatable(name):
    batches = take(build(name), 300)
    assert batches == take(build(name), 300)
    assert batches != take(build(name, seed=1), 300)
    for batch in batches:
        assert len(batch) == len(set(batch)) == OPTIONS[name]["batch_size"]
        assert all(type(index) is int for index in batch)
        assert len(labels()[batch].unique()) < len(batch)  # some pair is positive


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_a_saved_state_continues_with_the_same_batches(name, after):
    sampler = build(name)
    take(sampler, after)
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    expected = take(sampler, 30)
    resumed = build(name, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert take(resumed, 30) == expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_state_is_not_changed_by_drawing_on(name):
    sampler = build(name)
    state = sampler.state_dict()
    first = take(sampler, 20)
    sampler.load_state_dict(state)
    assert take(sampler, 20) == first


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_state_for_other_images_is_refused(name):
    with pytest.raises(ValueError, match="other labels"):
        build(name).load_state_dict(build(name, sizes=(20, 20, 20, 20, 20)).state_dict())


@pytest.mark.parametrize("name", SAMPLERS)
def test_global_randomness_is_neither_used_nor_touched(name):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(build(name), 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_data_loader_takes_the_sampler(name):
    images = torch.arange(len(labels()))
    drawn = [batch.tolist() for batch in itertools.islice(DataLoader(images, batch_sampler=build(name)), 5)]
    assert drawn == take(build(name), 5)


def test_class_shuffle_visits_every_class_once_per_walk_with_the_cap():
    cap, walk = 10, sum(min(size, 10) for size in SIZES)
    stream = itertools.chain.from_iterable(take(build("class-shuffle"), 50 * walk // 20))
    for _ in range(50):
        visited = labels()[list(itertools.islice(stream, walk))]
        runs = [(label.item(), len(list(run))) for label, run in itertools.groupby(visited)]
        assert sorted(runs) == [(3 * label, min(size, cap)) for label, size in enumerate(SIZES)]


def test_class_shuffle_sees_every_image_within_the_promised_visits():
    walks = 4  # the largest class, 40 images, at 10 a visit
    batches = take(build("class-shuffle"), -(-walks * sum(min(size, 10) for size in SIZES) // 20))
    assert set(itertools.chain.from_iterable(batches)) == set(range(len(labels())))


def test_class_shuffle_lets_a_class_straddle_two_batches():
    batches = [labels()[batch] for batch in take(build("class-shuffle"), 50)]
    assert any(before[-1] == after[0] for before, after in itertools.pairwise(batches))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((5, 5), {"batch_size": 20}, "batch_size must be at most 10 for 2 classes with images_per_class=10: got 20"),
        ((1,) * 40, {}, "class with at least two images: got 40 classes with one"),
        (SIZES, {"batch_size": 1}, "batch_size must be a whole number of at least 2: got 1"),
        (SIZES, {"images_per_class": 1}, "images_per_class must be a whole number of at least 2: got 1"),
        (SIZES, {"images_per_class": 2.5}, "images_per_class must be a whole number of at least 2: got 2.5"),
    ],
)
def test_class_shuffle_refuses_what_cannot_make_batches(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        build("class-shuffle", sizes=sizes, **options)


def test_balanced_batches_hold_as_many_images_of_each_of_their_classes():
    sizes = (4, 5, 6, 7, 8, 9, 30)
    for batch in take(build("balanced", sizes=sizes, batch_size=12, images_per_class=4), 200):
        found, counts = labels(sizes)[batch].unique(return_counts=True)
        assert len(found) == 3
        assert counts.tolist() == [4, 4, 4]


def test_balanced_sees_every_class_in_a_walk_and_every_image_within_the_promised_visits():
    sampler = build("balanced")  # 10 classes, 4 in a batch
    drawn = torch.tensor(list(itertools.chain.from_iterable(take(sampler, 5 * 20))))
    for walk in labels()[drawn].view(-1, 10, 2)[..., 0]:  # every two walks make five batches
        assert len(walk.unique()) == 10
    visits = 20  # of the largest class, 40 images, at 2 a visit: all images within 20 walks of 2.5 batches
    batches = take(build("balanced"), int(visits * 2.5))
    assert set(itertools.chain.from_iterable(batches)) == set(range(len(labels())))


def test_random_classes_give_between_the_fewest_and_the_most_images():
    counts_seen, classes_seen = set(), []
    for batch in take(build("random-class"), 400):
        found = labels()[batch]
        runs = [(label.item() // 3, len(list(run))) for label, run in itertools.groupby(found)]
        assert len({label for label, _ in runs}) == len(runs)
        for label, count in runs[:-1]:
            assert min(SIZES[label], 5) <= count <= min(SIZES[label], 10)
            counts_seen.add(count)
        classes_seen += [label for label, _ in runs[:1]]
    assert counts_seen == {2, 3, 5, 6, 7, 8, 9, 10}
    frequency = torch.bincount(torch.tensor(classes_seen), minlength=10) / 400
    assert (frequency - 0.1).abs().max() < 5 * (0.1 * 0.9 / 400) ** 0.5  # whatever their size


@pytest.mark.parametrize(
    ("name", "sizes", "options", "message"),
    [
        ("balanced", (8,) * 5, {"batch_size": 9}, "batch_size must be a multiple of images_per_class=2: got 9"),
        ("balanced", (8,) * 3, {}, "needs 4 classes: got 3"),
        (
            "balanced",
            SIZES,
            {"images_per_class": 4},
            "images_per_class=4 images: got 2 of 10 classes with fewer, the smallest with 2",
        ),
        ("balanced", (1,) * 20, {}, "class with at least two images: got 20 classes with one"),
        ("balanced", (1, *SIZES), {}, "at least images_per_class=2 images: got 1 of 11 classes"),
        (
            "random-class",
            (4,) * 5,
            {},
            "batch_size must be at most 20 for 5 classes with min_images_per_class=5: got 24",
        ),
        (
            "random-class",
            SIZES,
            {"images_per_class": 4},
            "min_images_per_class must be at most images_per_class=4: got 5",
        ),
        (
            "random-class",
            SIZES,
            {"min_images_per_class": 1},
            "min_images_per_class must be a whole number of at least 2: got 1",
        ),
        ("random-class", (1,) * 40, {}, "class with at least two images: got 40 classes with one"),
    ],
)
def test_the_other_samplers_refuse_what_cannot_make_batches(name, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, sizes=sizes, **options)


def test_labels_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="labels must be integers"):
        ClassShuffleSampler(torch.rand(50), 10, 5, torch.Generator())


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_length_is_the_batches_of_an_epoch_and_the_stream_is_endless(name):
    sampler = build(name)
    assert len(sampler) == len(sampler.labels) // sampler.batch_size > 0
    loader = DataLoader(torch.arange(len(sampler.labels)), batch_sampler=sampler)
    assert len(loader) == len(sampler)
    assert len(take(loader, 2 * len(sampler) + 1)) == 2 * len(sampler) + 1
