"""Small copies of the original archives in their exact formats, and helpers for prepared datasets."""

import dataclasses
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

from data_prep import __main__ as command_line
from hloss.retrieval.protocols import evaluate
from hloss.runs.datasets import open_dataset
from hloss.samplers import SAMPLERS


def encoded(pixels, format="JPEG", mode=None, **settings):
    """The bytes of an image file for an array or an Image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, format, **settings)
    return file.getvalue()


def photo(seed, height=24, width=32, **settings):
    """A JPEG with smooth colours; `mode` L gives a grey image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return encoded(coarse.resize((width, height), Image.Resampling.BICUBIC), quality=90, **settings)


def write_tgz(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for folder in sorted({str(p) for name in files for p in Path(name).parents if str(p) != "."}):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


CUB_PUBLISHED = {"train classes": 6, "test classes": 4, "train images": 27, "test images": 18}


def cub_files():
    """Ten classes of four or five images: names, folders and lists as in CUB_200_2011.tgz."""
    files, images, labels, other = {}, [], [], []
    for label in range(1, 11):
        for i in range(4 + label % 2):
            path = f"{label:03d}.Mini_Bird/Mini_Bird_{i:04d}_{label}.jpg"
            image = len(images) + 1
            files[f"CUB_200_2011/images/{path}"] = photo(image, height=20 + label, width=30)
            images.append(f"{image} {path}")
            labels.append(f"{image} {label}")
            other.append(f"{image} {image % 2}")
    lists = {"images": images, "image_class_labels": labels, "train_test_split": other, "bounding_boxes": other}
    lists["classes"] = [f"{label} {label:03d}.Mini_Bird" for label in range(1, 11)]
    texts = {f"CUB_200_2011/{name}.txt": ("\n".join(lines) + "\n").encode() for name, lines in lists.items()}
    return {"attributes.txt": b"1 has_bill_shape::curved\n", **files, **texts, "CUB_200_2011/README": b"mini"}


SOP_PUBLISHED = {"train classes": 12, "test classes": 11, "train images": 31, "test images": 28}
SOP_KINDS = ("bicycle_final", "cabinet_final", "mug_final")


def sop_files():
    """23 products of three kinds, two or three images each, one grey, names ending in .JPG."""
    files, lists = {}, {"train": [], "test": []}
    for label in range(1, 24):
        split = "train" if label <= 12 else "test"
        kind = (label - 1) % 12 // 4
        for i in range(2 + (label % 12 < 7)):
            path = f"{SOP_KINDS[kind]}/11108512{label:04d}_{i}.JPG"
            image = len(files) + 1
            mode = "L" if image == 5 else None
            files[f"Stanford_Online_Products/{path}"] = photo(100 + image, height=40, width=28, mode=mode)
            lists[split].append(f"{image} {label} {kind + 1} {path}")
    for split, lines in lists.items():
        text = "\n".join(["image_id class_id super_class_id path", *lines])
        files[f"Stanford_Online_Products/Ebay_{split}.txt"] = text.encode()
    return {"Stanford_Online_Products/Ebay_info.txt": b"image_id class_id super_class_id path\n", **files}


MARKET_PUBLISHED = {
    "train classes": 12,
    "test classes": 8,
    "train images": 48,
    "query images": 16,
    "query classes": 8,
    "gallery and distractor images": 34,
    "junk images": 3,
}
MARKET_IDENTITIES = 20


def market_files():
    """Twelve identities for training and eight for test, junk, distractors, hand-drawn boxes, extra files."""
    names = {"bounding_box_train": [], "query": [], "bounding_box_test": [], "gt_bbox": []}
    for identity in range(1, 21):
        for camera in (1 + identity % 6, 1 + (identity + 2) % 6):
            crops = [f"{identity:04d}_c{camera}s1_{frame:06d}_01.jpg" for frame in (151, 176)]
            drawn = [f"{identity:04d}_c{camera}s1_{frame:06d}_00.jpg" for frame in (151, 176, 201)]
            names["gt_bbox"] += drawn
            if identity % 5 < 3:
                names["bounding_box_train"] += crops
            else:
                names["query"].append(f"{identity:04d}_c{camera}s1_000201_00.jpg")
                names["bounding_box_test"] += crops
    names["bounding_box_test"] += [f"-1_c{camera}s1_000401_03.jpg" for camera in (1, 3, 5)]
    names["bounding_box_test"] += [f"0000_c{camera}s2_000151_01.jpg" for camera in (2, 6)]
    files = {
        f"Market-1501-v15.09.15/{folder}/{name}": photo(hash_of(name), height=128, width=64)
        for folder, listed in names.items()
        for name in listed
    }
    stray = {f"Market-1501-v15.09.15/{folder}/Thumbs.db": b"\xd0\xcf\x11\xe0" for folder in list(names)[:3]}
    others = {"readme.txt": b"mini", "gt_query/0004_c5s1_000201_00_good.mat": b"MATLAB 5.0 MAT-file"}
    return files | stray | {f"Market-1501-v15.09.15/{name}": content for name, content in others.items()}


def hash_of(name):
    """One seed for all images of an identity, so that they are similar and retrieval can find them."""
    return int(hashlib.md5(name[:4].encode()).hexdigest()[:8], 16)


def write_mat(path, pair_sizes, slots, boxes=("labeled",), test_sets=20, test_size=100, shape=(3, 3, 8), seed=0):
    """A MATLAB v7.3 file like cuhk-03.mat: cells of references, transposed arrays, empty cells, test sets from 1.

    `slots(pair, person)` gives the filled slots (1 to 10) of an identity (both counted from 1); `shape` is (channels,
    width, height). Identities of the first three pairs make the test sets. Returns the test sets.
    """
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w", userblock_size=512) as mat:
        cells = mat.create_group("#refs#")
        empty = cells.create_dataset("a", data=np.zeros(2, np.uint64))
        empty.attrs["MATLAB_class"], empty.attrs["MATLAB_empty"] = np.bytes_("double"), np.uint8(1)
        for name in boxes:
            pairs = [
                _write_pair(cells, f"{name}{i}", i + 1, size, slots, shape, rng) if size else empty.ref
                for i, size in enumerate(pair_sizes)
            ]
            mat.create_dataset(name, data=np.array([pairs], dtype=h5py.ref_dtype))
        everybody = [(pair, person) for pair in (1, 2, 3) for person in range(1, pair_sizes[pair - 1] + 1)]
        sets = [[everybody[i] for i in rng.choice(len(everybody), test_size, replace=False)] for _ in range(test_sets)]
        references = [cells.create_dataset(f"t{i}", data=np.array(s, float).T).ref for i, s in enumerate(sets)]
        mat.create_dataset("testsets", data=np.array([references], dtype=h5py.ref_dtype))
    with open(path, "r+b") as file:  # MATLAB writes this header before the HDF5 data
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return [set(s) for s in sets]


def _write_pair(cells, name, pair, size, slots, shape, rng):
    references = np.empty((10, size), dtype=h5py.ref_dtype)
    references[:] = cells["a"].ref
    for person in range(1, size + 1):
        colour = rng.integers(0, 256, (3, 1, 1))
        for slot in slots(pair, person):
            pixels = (colour + rng.integers(-120, 121, shape)).clip(0, 255).astype(np.uint8)
            references[slot - 1, person - 1] = cells.create_dataset(f"{name}_{person}_{slot}", data=pixels).ref
    return cells.create_dataset(name, data=references, dtype=h5py.ref_dtype).ref


def expect(monkeypatch, module, published, archive=None, **others):
    """Make a dataset's module expect the counts of a miniature, and the checksum of `archive` if it is given.

    Two classes are for validation, because a tenth of so few classes is one, which has no non-matches.
    """
    digest = hashlib.sha256(archive.read_bytes()).hexdigest() if archive else None
    size = archive.stat().st_size if archive else None
    original = dataclasses.replace(module.ORIGINAL, size=size, md5=None, sha256=digest)
    monkeypatch.setattr(module, "ORIGINAL", original)
    monkeypatch.setattr(module, "PUBLISHED", published)
    monkeypatch.setattr(module, "OPTIONS", dataclasses.replace(module.OPTIONS, val_fraction=2))
    for name, value in others.items():
        monkeypatch.setattr(module, name, value)


def prepared(name, source, out, *options):
    """Prepare a dataset from the command line and open it."""
    command_line.main([name, "--source", str(source), "--out", str(out), *options])
    return open_dataset(out)


def a_batch(dataset, batch_size=8, images_per_class=2):
    """A training batch as a run draws it: images and labels."""
    rows = dataset.rows("train")
    sampler = SAMPLERS["class-shuffle"](
        dataset.labels(rows), batch_size, images_per_class, torch.Generator().manual_seed(0)
    )
    batch = next(iter(sampler))
    return dataset.pixels(rows[batch]), dataset.labels(rows)[batch]


def evaluated(dataset, split="test", protocol=None, **settings):
    """Evaluate the pixels as embeddings with the protocol of the dataset."""
    rows = dataset.rows(split)
    pixels = dataset.pixels(rows).float().flatten(1)
    embeddings = pixels - pixels.mean(0)
    return evaluate(
        protocol or dataset.card["protocol"],
        embeddings,
        dataset.labels(rows),
        k=tuple(dataset.card["recall_at"]),
        cameras=dataset.cameras(rows),
        roles=dataset.roles(rows),
        **settings,
    )
