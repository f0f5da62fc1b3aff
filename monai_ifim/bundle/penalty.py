# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""The Fisher penalty in a workflow's training: whether it can be added, and what the overlay adds for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monai_ifim.bundle.findings import Findings, is_shared
from monai_ifim.bundle.sections import engines

PENALTY_ID = "ifim_penalty"  # that the overlay defines


@dataclass(frozen=True)
class Penalty:
    """What the overlay adds to a training.

    Attributes:
        options: of FisherPenaltyHandler.
        additions: id -> value, behind ``+`` what a list takes in addition.
        source: where the trainer stands.
        trainer: its class.
    """

    options: Mapping[str, Any]
    additions: Mapping[str, Any]
    source: str
    trainer: str


def find_penalty(findings: Findings, weight: float) -> Penalty:
    """The Fisher penalty for a workflow that iFIM can be attached to.

    One row of outputs an image has the greatest eigenvalue. Dense outputs have the trace, which one random probe
    estimates, of a change as large as the image's contrast.

    Raises:
        ValueError: When it cannot be added; the end of a sentence about the workflow.

    Example:
        >>> from monai_ifim.bundle.configs import Config
        >>> from monai_ifim.bundle.stacks import Workflow
        >>> content = {"trainer": {"_target_": "SupervisedTrainer", "train_handlers": "@all"}, "all": []}
        >>> config = Config({**content, "run": "$@trainer.run()"})
        >>> find_penalty(Findings(Workflow("train", (), config), options={"likelihood": "softmax"}), 1.0).additions
        {'+all': ['@ifim_penalty']}
    """
    workflow = findings.workflow
    config = workflow.config
    if PENALTY_ID in config:
        raise ValueError(f"it defines an id {PENALTY_ID} itself, which the overlay would replace; rename that one")
    trained = [id for id, trains in engines(config, workflow.section).items() if trains]
    if not trained:
        raise ValueError("it trains nothing")
    if len(trained) > 1:
        raise ValueError(f"it has several trainers ({', '.join(trained)}); add a FisherPenaltyHandler to one by hand")
    trainer = config.component(f"@{trained[0]}")
    if trainer is None or trainer.name != "SupervisedTrainer":
        name = "no component of a config" if trainer is None else f"a {trainer.name}"
        raise ValueError(f"its trainer is {name}, and the Fisher penalty needs MONAI's SupervisedTrainer")
    if config.macro(trainer.id) is not None or config.get(trainer.id) is not trainer.content:
        raise ValueError(f"no other config can add to its trainer ({trainer.id}), behind a macro or an expression")
    own = f"{trainer.id}#train_handlers"
    value = trainer.content.get("train_handlers")
    at, handlers = config.follow(value, own)
    additions: dict[str, Any]
    if isinstance(handlers, list) and not is_shared(config, value, own) and config.macro(at) is None:
        additions = {f"+{at}": [f"@{PENALTY_ID}"]}
    elif handlers is None:
        additions = {own: [f"@{PENALTY_ID}"]}
    elif isinstance(handlers, list) and at == own:
        raise ValueError(
            f"others refer to the handlers that stand in its trainer ({own}); give these an id of their own"
        )
    else:
        expression = f"@{at}" if isinstance(handlers, list) else str(handlers).removeprefix("$")
        additions = {own: f"$list(({expression}) or []) + [@{PENALTY_ID}]"}
    likelihood = findings.options["likelihood"]
    options: dict[str, Any] = {"weight": weight, "kind": "largest", "likelihood": likelihood}
    if "_" in str(likelihood):  # voxelwise, pooled
        options |= {"kind": "trace", "strength": 1.0}
    options |= {name: findings.options[name] for name in ("output_key", "channel_mask") if name in findings.options}
    return Penalty(options, additions, workflow.source(trainer.id), trainer.target)
