# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Fill in tutorial 5's section of a model card for a trained bundle: ``python -m tutorials.model_card BUNDLE``.

The best checkpoint is evaluated with the iFIM overlay, and the section goes into the bundle's ``docs/README.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from monai.bundle import ConfigWorkflow

from monai_ifim.statistics import auc_interval

__all__ = ["HEADING", "fill", "section_function", "with_section"]

TUTORIAL = Path(__file__).parent / "5_how_to_report_it.ipynb"
HEADING = "## Sensitivity to the input (iFIM)\n"
MADE_BY = (
    "the first command under Commands, which trains, and `python -m tutorials.model_card {}`, run from the top folder "
    "of the repository, which evaluates the best checkpoint and writes this section"
)


def section_function() -> Callable[..., str]:
    """The function ``model_card_section`` of tutorial 5, the only place of the section's text."""
    cells = [cell.source for cell in nbformat.read(TUTORIAL, as_version=4).cells if cell.cell_type == "code"]
    names: dict[str, Any] = {}
    for source in (cells[0], next(source for source in cells if "def model_card_section" in source)):
        exec(source, names)  # our own notebook; the first cell holds the imports
    return names["model_card_section"]


def with_section(readme: str, section: str) -> str:
    r"""A text with the section in the place of an earlier one, or at its end.

    Example:
        >>> with_section("# A\n", HEADING + "1\n")
        '# A\n\n## Sensitivity to the input (iFIM)\n1\n'
        >>> with_section("# A\n\n" + HEADING + "0\n\n## B\n", HEADING + "1\n")
        '# A\n\n## Sensitivity to the input (iFIM)\n1\n\n## B\n'
    """
    before, _, after = readme.partition(HEADING)
    _, following, rest = after.partition("\n## ")
    return f"{before.rstrip()}\n\n{section.strip()}\n{following}{rest}"


def fill(bundle: Path, **options: Any) -> str:
    """The section for the best checkpoint of the bundle, which is evaluated; it goes into its ``docs/README.md``.

    Args:
        bundle: its folder, with ``models/model.pt``.
        options: further options of the configuration, as on the command line of ``monai.bundle``.

    Returns:
        The section.

    Raises:
        FileNotFoundError: When the bundle was not trained.
    """
    if not (bundle / "models" / "model.pt").is_file():
        raise FileNotFoundError(
            f"{bundle} has no models/model.pt. Train it first, with the first command of its docs/README.md."
        )
    configs = bundle / "configs"
    options = {"bundle_root": str(bundle), "ifim#mask_key": "mask", **options}
    workflow = ConfigWorkflow(
        config_file=[str(configs / f"{name}.yaml") for name in ("train", "evaluate", "ifim")],
        meta_file=str(configs / "metadata.json"),
        logging_file=str(configs / "logging.conf"),
        workflow_type="train",
        **options,
    )
    workflow.initialize()
    workflow.run()
    [metric] = workflow.parser.get_parsed_content("validate#key_metric").values()
    scores, truth = metric.metric_fn.get_buffer()
    made_by = MADE_BY.format(f"bundles/{bundle.resolve().name}")
    section = section_function()(bundle / "eval" / "ifim", auc_interval(truth.cpu(), scores.cpu()), made_by)
    readme = bundle / "docs" / "README.md"
    readme.write_text(with_section(readme.read_text(encoding="utf-8"), section), encoding="utf-8")
    return section


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
