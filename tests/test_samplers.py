"""The samplers: exact batches, the caps, the promised spans, repeatability and resuming."""

import io
import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from hloss.samplers import SAMPLERS, ClassShuffleSampler

SIZES = (2, 3, 5, 8, 12, 16, 16, 16, 30, 40)
OPTIONS = {"class-shuffle": {"batch_size": 20, "images_per_class": 10}}


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
    with pytest.raises(ValueError, match="other images"):
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
        ((5, 5), {"batch_size": 20}, "batch_size 20 cannot be filled"),
        ((1,) * 40, {}, "none of the 40 classes has two images"),
        (SIZES, {"batch_size": 1}, "batch_size must be an integer of at least 2, got 1"),
        (SIZES, {"images_per_class": 1}, "images_per_class must be an integer of at least 2, got 1"),
        (SIZES, {"images_per_class": 2.5}, "images_per_class must be an integer of at least 2, got 2.5"),
    ],
)
def test_class_shuffle_refuses_what_cannot_make_batches(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        build("class-shuffle", sizes=sizes, **options)


def test_labels_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="labels must be integers"):
        ClassShuffleSampler(torch.rand(50), 10, 5, torch.Generator())
