"""`python -m data_prep NAME --source PATH [--out data/NAME]`: turn a source into a prepared dataset.

`python -m data_prep list` says what there is, what is prepared, and where to get the rest; nothing is downloaded.
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
from data_prep.originals import listing
from data_prep.prepared import PreparationError
from hloss.runs.errors import DatasetError
from hloss.runs.images import FILTERS, ImageSettings

PUBLISHED = {"cub": cub, "sop": sop, "cuhk03": cuhk03, "market1501": market1501}


def main(arguments: list[str] | None = None) -> None:
    """Prepare one dataset, or list them, from the command line."""
    options = parser().parse_args(arguments)
    try:
        if options.name == "list":
            print(listing(descriptions(), options.data))
        elif options.name == "check":
            print(check.page(options.folder))
        else:
            report(options.name, options)
    except (PreparationError, DatasetError, OSError) as error:
        sys.exit(f"data_prep {options.name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"data_prep {options.name}: interrupted, nothing was written")


def report(name: str, options: argparse.Namespace) -> None:
    """Prepare the dataset and say what came of it."""
    out = options.out or Path("data") / name
    card = prepare(name, out, options)
    print(f"{out}: {card['images']} images of {sum(card['classes'].values())} classes, {card['classes']}")
    print(f"{check.summary(out)}\n`python -m data_prep check {out}` says more".lstrip())


def prepare(name: str, out: Path, options: argparse.Namespace) -> dict:
    """Call the dataset's own `prepare`."""
    if name == "glyphs":
        return glyphs.prepare(out)
    if name == "cuhk03":
        choice = cuhk03.Choice(options.boxes, options.camera_pairs, options.test_set, options.index_file)
        return cuhk03.prepare(options.source, out, chosen(cuhk03.OPTIONS, options), choice)
    if name == "folder":
        return folder.prepare(options.source, out, chosen(folder.OPTIONS, options), options.last_folder)
    return PUBLISHED[name].prepare(options.source, out, chosen(PUBLISHED[name].OPTIONS, options))


def chosen(defaults: Options, options: argparse.Namespace) -> Options:
    """A dataset's options with those given on the command line."""
    given = {k: v for k, v in vars(options).items() if v is not None}
    default = defaults.image_settings
    height, width = given.get("size", (default.height, default.width))
    image_settings = ImageSettings(height, width, given.get("fit", default.fit), given.get("crop"))
    rest = {k: given[k] for k in ("val_fraction", "seed", "any_checksum", "skip_bad") if k in given}
    return dataclasses.replace(defaults, image_settings=image_settings, **rest)


def descriptions() -> dict[str, list[str]]:
    """For `list`: what is said of each dataset."""
    published = {name: module.ORIGINAL.describe() for name, module in PUBLISHED.items()}
    own = ["your own images", "prepare  python -m data_prep folder --source DIR_or_CSV --out data/NAME"]
    return {"glyphs": ["embedded, nothing to get", "prepare  python -m data_prep glyphs"], **published, "folder": own}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    command = commands.add_parser("list", help="what there is, what is prepared, where to get the rest")
    command.add_argument("--data", type=Path, default=Path("data"), help="folder of the prepared datasets (data)")
    command = commands.add_parser("check", help="describe a prepared dataset, warnings first")
    command.add_argument("folder", type=Path, help="data/NAME")
    command = commands.add_parser("glyphs", help="the embedded dataset")
    command.add_argument("--out", type=Path, help="folder to write (data/glyphs)")
    for name, module in PUBLISHED.items():
        command = commands.add_parser(name, help=module.ORIGINAL.title, **_described(module))
        _add_common(command, name, module.OPTIONS)
        help = "use the archive although its size or checksum is not the published one; the card says so"
        command.add_argument("--any-checksum", action="store_true", default=None, help=help)
        if name == "sop":
            help = "first cut the white border off, as Song et al. do"
            command.add_argument("--crop", choices=["bbox250"], help=help)
        if name == "cuhk03":
            _add_cuhk03(command)
    command = commands.add_parser("folder", help="your own images: class-named folders, or a CSV", **_described(folder))
    _add_common(command, "folder", folder.OPTIONS)
    help = "images may be deeper than CLASS/IMAGE; their last folder is the class"
    command.add_argument("--last-folder", action="store_true", help=help)
    return parser


def _described(module: ModuleType) -> dict[str, Any]:
    return {"description": module.__doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}


def _add_common(command: argparse.ArgumentParser, name: str, defaults: Options) -> None:
    default, share = defaults.image_settings, defaults.val_fraction
    command.add_argument(
        "--source", type=Path, required=True, help="the archive or its extracted folder (folder: or CSV)"
    )
    command.add_argument("--out", type=Path, help=f"folder to write (data/{name})")
    command.add_argument("--size", type=_size, help=f"HEIGHTxWIDTH in pixels ({default.height}x{default.width})")
    help = f"pad: keep the aspect ratio, white around; stretch: do not keep it ({default.fit})"
    command.add_argument("--fit", choices=list(FILTERS), help=help)
    help = f"training classes held out for validation: a fraction, or from 1 on a number ({share:g})"
    command.add_argument("--val-fraction", type=_positive, help=help)
    command.add_argument("--seed", type=int, help=f"of the drawn classes ({defaults.seed})")
    help = "leave out images that cannot be decoded; the card names them"
    command.add_argument("--skip-bad", action="store_true", default=None, help=help)


def _add_cuhk03(command: argparse.ArgumentParser) -> None:
    command.add_argument("--boxes", choices=list(cuhk03.PUBLISHED), default="labeled", help="(labeled)")
    help = "use camera pairs 1-3, as the paper does, or all five (3)"
    command.add_argument("--camera-pairs", type=int, choices=[3, 5], default=3, help=help)
    command.add_argument("--test-set", type=int, default=1, help="one of the file's 20 test sets, from 1 (1)")
    help = "cuhk03_new_protocol_config_labeled.mat or ..._detected.mat (of Zhong et al. 2017): the 767/700 protocol"
    command.add_argument("--index-file", type=Path, help=help)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, like 256x256")
    return int(found[1]), int(found[2])


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    main()
