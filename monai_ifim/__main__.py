# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The command line: ``monai-ifim COMMAND``, or ``python -m monai_ifim COMMAND``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from monai_ifim import __version__

__all__ = ["main"]

# those of monai_ifim.likelihoods, whose import takes seconds
_LIKELIHOODS = (
    *("softmax", "sigmoid", "gaussian"),
    *("voxelwise_softmax", "voxelwise_sigmoid", "pooled_softmax", "pooled_sigmoid"),
)
_FOLDER = "the folder that a run with the overlay wrote, <output_dir>/ifim"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of one command, which is run.

    Args:
        arguments: of the command line; default those of the process.

    Returns:
        The exit status: 0, or 2 where the input cannot be used, with the cause on the standard error output; of
        ``compare`` 1 where a criterion fails.
    """
    script = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    program = script if script == "monai-ifim" else "python -m monai_ifim"
    parser = _Parser(prog=program, description="What is this network sensitive to, in this image, and how strongly?")
    parser.add_argument("--version", action="version", version=f"monai_ifim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    attach = commands.add_parser(
        "attach",
        usage="%(prog)s BUNDLE_ROOT [options] [--ID=VALUE ...]",
        allow_abbrev=False,
        help="write the overlay that adds iFIM to a MONAI bundle",
        description="Look at a bundle's configs, print what was found, and write the overlay that adds iFIM to its "
        "runs. Nothing of the bundle is run or changed. BUNDLE_ROOT is the bundle's folder, with configs/ in it; other "
        "options, --ID=VALUE, --ID VALUE or ID=VALUE, are those of `monai.bundle run`, whose commands get them, too.",
    )
    attach.add_argument("--output", metavar="FILE", help="the overlay; default BUNDLE_ROOT/configs/ifim.yaml")
    attach.add_argument("--dry-run", "--dry_run", action="store_true", help="only print")
    attach.add_argument(
        "--force", action="store_true", help="overwrite an overlay that is there; a link is replaced, not followed"
    )
    attach.add_argument("--evaluator", metavar="ID", help="which evaluator, where there are several")
    attach.add_argument(
        "--config_file",
        metavar="FILES",
        help="what to run, as `monai.bundle run` takes it: one file, several with commas between, or a list; default "
        "every workflow of the bundle",
    )
    attach.add_argument("--run_id", metavar="ID", help="the section to run, where there are several")
    attach.add_argument(
        "--likelihood",
        choices=_LIKELIHOODS,
        help="what the outputs mean, where the configs are wrong or silent: logits of a softmax or of sigmoids, at "
        "every voxel of a segmentation (voxelwise_...), or the means of a regression (gaussian)",
    )
    attach.add_argument(
        "--output_key",
        metavar="KEY",
        help="which output of the network has the logits or means, where it returns several",
    )
    attach.add_argument(
        "--assume_classifier",
        action="store_true",
        help="attach although the configs speak against one row of outputs an image",
    )
    attach.add_argument(
        "--penalty",
        nargs="?",
        const=1.0,
        type=_weight,
        metavar="WEIGHT",
        help="also add the Fisher penalty to the loss of its training, with this weight (default 1), so that the "
        "network becomes less sensitive; see docs/penalty.md",
    )
    attach.set_defaults(command=_attach, further=True)

    report = commands.add_parser(
        "report",
        help="make one HTML page of the folder that IFIMSaver wrote",
        description="Make one self-contained HTML page of the folder that IFIMSaver wrote, and print where it is.",
    )
    report.add_argument("folder", metavar="FOLDER", help=_FOLDER)
    report.add_argument("--output", metavar="FILE", help="the page; default FOLDER/report.html")
    report.add_argument(
        "--viewer",
        action="store_true",
        help="also write a page of each shown volume, to scroll through its slices (needs nilearn)",
    )
    report.set_defaults(command=_report, further=False)

    compare = commands.add_parser(
        "compare",
        help="judge a new model against a reference, from two folders that IFIMSaver wrote of the same cases",
        description="Compare two models case by case, from two folders that IFIMSaver wrote, by criteria that are "
        "stated beforehand; write a page, JSON and CSV. Exit status: 0 when no criterion fails, 1 when one does, 2 "
        "when the input cannot be used.",
    )
    compare.add_argument("reference", metavar="RUN_A", help=f"{_FOLDER}, of the reference, such as the released model")
    compare.add_argument("new", metavar="RUN_B", help=f"{_FOLDER}, of the new model")
    compare.add_argument("--criteria", metavar="FILE", help="YAML or JSON, see docs/compare.md; default the package's")
    compare.add_argument(
        "--output", metavar="FOLDER", default="ifim_comparison", help="where the files are put; default %(default)s"
    )
    compare.set_defaults(command=_compare, further=False)

    cohort = commands.add_parser(
        "cohort",
        help="say what the images that IFIMSaver saw have in common: places, directions, clusters, strata",
        description="Say where the leading eigenvectors of all images of a folder lie, how many distinct directions "
        "there are, which images are alike and whether strata differ; write a self-contained HTML page, and the "
        "numbers beside it as JSON.",
    )
    cohort.add_argument("folder", metavar="RUN", help=_FOLDER)
    cohort.add_argument(
        "--metadata", metavar="TABLE.csv", help="a row an image, with the column name and further ones, such as site"
    )
    cohort.add_argument(
        "--by",
        metavar="COLUMN",
        nargs="+",
        help="columns of the table, or of images.csv, that are strata; default all that have 2 to 12 "
        "levels, with two images each on average",
    )
    cohort.add_argument("--output", metavar="FILE", help="the page; default RUN/cohort.html")
    cohort.set_defaults(command=_cohort, further=False)

    demo = commands.add_parser(
        "demo",
        usage="%(prog)s [FOLDER] [--ID VALUE ...]",
        help="train a small network with iFIM beside its metrics, on made-up images; three to ten minutes",
        description="Copy the bundle signal_detection into FOLDER, train it with the overlay of iFIM, and write the "
        "page of its last evaluation. --ID VALUE go to `monai.bundle run`, such as --num_epochs 1.",
    )
    demo.add_argument("folder", metavar="FOLDER", nargs="?", default="ifim_demo", help="default %(default)s")
    demo.set_defaults(command=_demo, further=True)

    chosen, further = parser.parse_known_args(arguments)
    try:
        if chosen.command is _demo:
            chosen.overrides = further
        elif chosen.further:
            chosen.bundle_root, chosen.overrides = _split(further, attach)
        elif further:
            parser.error(f"unrecognized arguments: {' '.join(further)}")
        return chosen.command(chosen)
    except (ImportError, OSError, ValueError) as error:
        print(_visible(f"{parser.prog}: {error}"), file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """One that shows control characters in what it was given."""

    def error(self, message: str) -> NoReturn:
        super().error(_visible(message))


def _visible(message: str) -> str:
    """A message of several lines with its control characters escaped."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in message)


def _split(words: Sequence[str], parser: argparse.ArgumentParser) -> tuple[str, dict[str, str]]:
    """The bundle's folder, and the overrides as ``monai.bundle run`` reads them, with their texts."""
    root: str | None = None
    overrides: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, is_set, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name:
            if not is_set:
                value = rest.pop(0) if rest and not re.match("--|-[a-zA-Z]", rest[0]) else "True"
            overrides[name] = value
        elif word.startswith("-"):
            parser.error(f"unrecognized arguments: {word}")
        elif is_set and re.match(r"[\w+]", name) and "/" not in name and not os.path.isdir(word):
            overrides[name] = value
        elif root is None:
            root = word
        else:
            parser.error(f"unrecognized arguments: {word}")
    if root is None:
        parser.error("the following arguments are required: BUNDLE_ROOT")
    return root, overrides


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no weight; give the bundle's folder before --penalty, or write --penalty=1"
        ) from None


def _attach(chosen: argparse.Namespace) -> int:
    from monai_ifim.bundle import attach_to_bundle
    from monai_ifim.bundle.words import parsed

    key = chosen.output_key
    attach_to_bundle(
        chosen.bundle_root,
        output=chosen.output,
        dry_run=chosen.dry_run,
        force=chosen.force,
        evaluator=chosen.evaluator,
        likelihood=chosen.likelihood,
        output_key=int(key) if key is not None and re.fullmatch("-?[0-9]+", key) else key,
        assume_classifier=chosen.assume_classifier,
        config_file=chosen.config_file,
        run_id=chosen.run_id,
        overrides={name: parsed(value) for name, value in chosen.overrides.items()},
        penalty=chosen.penalty,
    )
    return 0


def _report(chosen: argparse.Namespace) -> int:
    from monai_ifim.visualize import write_report, write_viewers  # other commands need no matplotlib

    if chosen.viewer:
        for page in write_viewers(chosen.folder):
            print(page)
    print(write_report(chosen.folder, chosen.output))
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    from monai_ifim.comparison import compare_runs, write_comparison

    comparison = compare_runs(chosen.reference, chosen.new, chosen.criteria)
    page = write_comparison(comparison, chosen.output)
    print(_visible(comparison.text))
    print(page)
    return int(comparison.failed)


def _cohort(chosen: argparse.Namespace) -> int:
    from monai_ifim.visualize.cohort import write_cohort

    page = write_cohort(chosen.folder, chosen.metadata, chosen.by, chosen.output)
    print(_visible(page.finding))
    print(page.path)
    print(page.path.with_suffix(".json"))
    return 0


def _demo(chosen: argparse.Namespace) -> int:
    from monai_ifim.demo import run_demo

    page = run_demo(chosen.folder, chosen.overrides)
    print(f"The page of the last evaluation: {page}")
    print(f"The numbers of all evaluations: tensorboard --logdir {page.parent.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
