"""Prepare a dataset for training. Nothing is downloaded.

`python -m data_prep NAME --source PATH [--out data/NAME]` prepares a dataset from its archive or folder.
`python -m data_prep list` shows all datasets: which are prepared, and where to download the others.
`python -m data_prep check data/NAME` describes a prepared dataset, warnings first.
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep import check, cub, cuhk03, folder, glyphs, market1501, sop
from data_prep.conversion import Options
from data_prep.originals import card_summary, dataset_list
from data_prep.prepared import PreparationError
from hloss.runs.errors import DatasetError
from hloss.runs.images import FILTERS, ImageSettings

RAW = argparse.RawDescriptionHelpFormatter
PUBLISHED = {"cub": cub, "sop": sop, "cuhk03": cuhk03, "market1501": market1501}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: The arguments after `python -m data_prep`; None for those of this process.

    Raises:
        SystemExit: an option is wrong, or the dataset cannot be prepared; the message says why.
    """
    options = parser().parse_args(arguments)
    try:
        if options.name == "list":
            print(dataset_list(descriptions(), options.data))
        elif options.name == "check":
            print(check.describe(options.folder))
        else:
            prepare_and_report(options.name, options)
    except (PreparationError, DatasetError) as error:
        sys.exit(f"data_prep {options.name}: {error}")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(
            f"data_prep {options.name}: {place}{error.strerror or error}; check that the path exists and that you may "
            "read and write there"
        )
    except KeyboardInterrupt:
        sys.exit(f"data_prep {options.name}: interrupted; nothing was written")


def prepare_and_report(name: str, options: argparse.Namespace) -> None:
    """Prepare a dataset and print its counts, its warnings and what was left out.

    Args:
        name: Name of the dataset.
        options: The parsed command line.

    Raises:
        PreparationError: the dataset cannot be prepared.
    """
    suffix = f"-{options.difficulty}" if name == "glyphs" and options.difficulty != "normal" else ""
    out = options.out or Path("data") / f"{name}{suffix}"
    if name == "glyphs" and options.folds:
        for number, card in enumerate(glyphs.prepare_folds(out, options.difficulty)):
            print(f"{out}-{number}: {card_summary(card)}; {card['class_split']}")
        return
    card = prepare(name, out, options)
    print(f"{out}: {card_summary(card)}")
    print(f"{check.summary(out)}\nDetails: python -m data_prep check {out}".lstrip())


def prepare(name: str, out: Path, options: argparse.Namespace) -> dict:
    """Call `prepare` of the dataset's module.

    Args:
        name: Name of the dataset.
        out: The folder to write.
        options: The parsed command line.

    Returns:
        The card of the prepared dataset.

    Raises:
        PreparationError: the dataset cannot be prepared.
    """
    if name == "glyphs":
        return glyphs.prepare(out, options.difficulty)
    if name == "cuhk03":
        variant = cuhk03.Variant(
            options.boxes, options.camera_pairs, options.test_set, options.index_file, options.partial
        )
        return cuhk03.prepare(options.source, out, with_arguments(cuhk03.OPTIONS, options), variant)
    if name == "folder":
        taken = {*PUBLISHED, "glyphs", *(f"glyphs-{difficulty}" for difficulty in glyphs.JITTERS)}
        if re.sub(r"-\d+$", "", out.name) in taken:
            raise PreparationError(
                f"--out {out}: {out.name} is the name of another dataset, whose results would be compared with those "
                "of your images; choose another name"
            )
        evaluation = folder.Evaluation(options.protocol, options.recall_at)
        settings = with_arguments(folder.OPTIONS, options)
        return folder.prepare(options.source, out, settings, options.last_folder, evaluation)
    return PUBLISHED[name].prepare(options.source, out, with_arguments(PUBLISHED[name].OPTIONS, options))


def with_arguments(defaults: Options, options: argparse.Namespace) -> Options:
    """Return a dataset's default options, replaced by those of the command line.

    Args:
        defaults: The dataset's default options.
        options: The parsed command line; None means the default.

    Returns:
        The options to prepare with.
    """
    given = {k: v for k, v in vars(options).items() if v is not None}
    default = defaults.image_settings
    height, width = given.get("size", (default.height, default.width))
    image_settings = ImageSettings(height, width, given.get("fit", default.fit), given.get("crop"))
    rest = {k: given[k] for k in ("val_fraction", "seed", "any_checksum", "skip_bad") if k in given}
    return dataclasses.replace(defaults, image_settings=image_settings, **rest)


def descriptions() -> dict[str, list[str]]:
    """Return the lines that `list` prints about each dataset, by name."""
    published = {name: module.ORIGINAL.describe() for name, module in PUBLISHED.items()}
    own = ["your own images", "prepare  python -m data_prep folder --source DIR_or_CSV --out data/NAME"]
    return {
        "glyphs": [
            "built-in, needs no download",
            "prepare  python -m data_prep glyphs [--folds] [--difficulty easy|hard]",
        ],
        **published,
        "folder": own,
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__, formatter_class=RAW)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    command = commands.add_parser("list", help="show all datasets: which are prepared, where to download the others")
    command.add_argument(
        "--data", type=Path, default=Path("data"), help="folder of the prepared datasets (default: data)"
    )
    command = commands.add_parser("check", help="describe a prepared dataset, warnings first")
    command.add_argument("folder", type=Path, help="folder of the prepared dataset, for example data/glyphs")
    command = commands.add_parser("glyphs", help="the built-in dataset of drawn characters")
    help = "folder to write (default: data/glyphs, data/glyphs-easy or data/glyphs-hard)"
    command.add_argument("--out", type=Path, help=help)
    help = "amount of jitter, noise and occlusion of the drawings (default: normal)"
    command.add_argument("--difficulty", choices=list(glyphs.JITTERS), default="normal", help=help)
    help = "write OUT-0 to OUT-4 with five disjoint test sets, one per seed of a study, and OUT-5 for tuning"
    command.add_argument("--folds", action="store_true", help=help)
    for name, module in PUBLISHED.items():
        command = commands.add_parser(name, help=module.ORIGINAL.title, **_described(module))
        _add_common(command, name, module.OPTIONS)
        help = "accept an archive whose size or checksum differs from the published one; card.json records it"
        command.add_argument("--any-checksum", action="store_true", default=None, help=help)
        if name == "sop":
            help = "crop the white border first, as Song et al. (2016) do (default: no crop)"
            command.add_argument("--crop", choices=["bbox250"], help=help)
        if name == "cuhk03":
            _add_cuhk03(command)
    command = commands.add_parser(
        "folder", help="your own images: one folder per class, or a CSV file", **_described(folder)
    )
    _add_common(command, "folder", folder.OPTIONS)
    help = "allow nested folders; the innermost folder of an image is its class"
    command.add_argument("--last-folder", action="store_true", help=help)
    help = "evaluation protocol (default: the one that fits the roles and cameras of the test images)"
    command.add_argument("--protocol", choices=list(folder.RECALL_AT), help=help)
    help = "values of K of the reported Recall@K, such as 1,5,10 (default: those of the protocol)"
    command.add_argument("--recall-at", type=_recall_at, metavar="K,K,...", help=help)
    return parser


def _described(module: ModuleType) -> dict[str, Any]:
    return {"description": module.__doc__, "formatter_class": RAW}


def _add_common(command: argparse.ArgumentParser, name: str, defaults: Options) -> None:
    default, share = defaults.image_settings, defaults.val_fraction
    source = "folder of class folders, or CSV file" if name == "folder" else "original archive, or its extracted folder"
    command.add_argument("--source", type=Path, required=True, help=source)
    command.add_argument("--out", type=Path, help=f"folder to write (default: data/{name})")
    command.add_argument(
        "--size",
        type=_size,
        help=f"HEIGHTxWIDTH of the prepared images in pixels (default: {default.height}x{default.width})",
    )
    help = f"pad: keep the aspect ratio and add white borders; stretch: ignore it (default: {default.fit})"
    command.add_argument("--fit", choices=list(FILTERS), help=help)
    help = (
        f"training classes moved to validation: a fraction below 1, or a number of classes (default: {share:g}); "
        '0: none, for runs with choose="last"'
    )
    command.add_argument("--val-fraction", type=_class_share, help=help)
    help = f"seed of the random choice of classes, 0 or more (default: {defaults.seed})"
    command.add_argument("--seed", type=_seed, help=help)
    help = "leave out images that cannot be decoded; card.json lists them"
    command.add_argument("--skip-bad", action="store_true", default=None, help=help)


def _add_cuhk03(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--boxes",
        choices=list(cuhk03.PUBLISHED),
        default="labeled",
        help="pedestrian boxes: drawn by people, or detected by an algorithm (default: labeled)",
    )
    help = "3: camera pairs 1-3, as in the paper; 5: all camera pairs (default: 3)"
    command.add_argument("--camera-pairs", type=int, choices=[3, 5], default=3, help=help)
    command.add_argument(
        "--test-set", type=int, default=1, help="number of the test set in the file, 1 to 20 (default: 1)"
    )
    help = "use the 767/700 protocol of Zhong et al. (2017): cuhk03_new_protocol_config_labeled.mat or ..._detected.mat"
    command.add_argument("--index-file", type=Path, help=help)
    help = "accept a part of the original (fewer identities), which is not compared with published values"
    command.add_argument("--partial", action="store_true", help=help)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"must be HEIGHTxWIDTH, each from 1 to 9999 pixels, such as 256x256: got {text!r}"
        )
    return int(found[1]), int(found[2])


def _class_share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if 0 <= value < 1 or (value >= 1 and value.is_integer()):
        return value
    raise argparse.ArgumentTypeError(f"must be a fraction between 0 and 1 or a number of classes: got {text!r}")


def _recall_at(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != len(text.split(",")) or numbers[0] != 1 or numbers != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"must be increasing whole numbers from 1, such as 1,5,10: got {text!r}")
    return tuple(numbers)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more: got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
