# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""What a workflow's configs say about its network, where each thing was found, and what had to be guessed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from monai_ifim.bundle.configs import Component, Config
from monai_ifim.bundle.dense import Clue, dense_outputs, says_dense
from monai_ifim.bundle.evidence import Evidence, evidence, for_prediction, inner_loss, postprocessing
from monai_ifim.bundle.refusal import IMAGES, is_no_classifier, output_shape, reads_probabilities, refusal
from monai_ifim.bundle.sections import engines, sections
from monai_ifim.bundle.stacks import Workflow, described
from monai_ifim.handlers.options import MOST_VOLUMES
from monai_ifim.likelihoods import LIKELIHOODS, Likelihood

# What the overlay can say of a regression in place of its likelihood's name.
GAUSSIAN = "likelihood: {_target_: monai_ifim.Gaussian, scale: 1.0}"
OWN_IDS = ("ifim", "ifim_figures", "ifim_saver")  # that the overlay defines
COPIES = ("ifim_metrics", "ifim_handlers")  # and where it must, of what the evaluator has

_OUTPUTS = ("num_classes", "out_channels", "num_outputs", "n_classes", "classes")
_CHANNELS = ("in_channels", "n_input_channels", "input_channels")
# Names of channels that a person draws, and transforms that make them.
_DRAWN = re.compile(r"mask|click|guidance|signal|point|prompt|seed|label", re.IGNORECASE)
_DRAWING = re.compile(r"guidance|click|seedpoint", re.IGNORECASE)
_LABELS_IN_A_DICTIONARY = re.compile(r"HoVerNet")
_OF_SEVERAL_PROCESSES = re.compile(r"DistributedDataParallel|init_process_group")
_CONDITION_ON_RANK = re.compile(r"^\$\s*None\s+if\b.*rank.*\belse\s+@([\w#:]+)\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing that the configs say.

    Attributes:
        name: of the thing.
        value: what was found.
        source: where.
        guess: how to set it, where it had to be guessed; else empty.
    """

    name: str
    value: Any
    source: str
    guess: str = ""


@dataclass
class Findings:
    """All that a workflow's configs say, as far as attaching needs it.

    Attributes:
        workflow: that was looked at.
        refusal: why iFIM cannot be attached, as the end of a sentence; None where it can.
        evaluator: id of the evaluator.
        metric_at: id of the dictionary of metrics that takes another entry; None where there is none.
        metrics_expression: what gives a dictionary that others have too, without ``$``; empty where there is none.
        handlers_at: id of the list of handlers that takes more; None where ``handlers_expression`` makes them.
        handlers_expression: what makes the handlers, without ``$``; empty where there are none.
        several_processes: whether it is for ``torchrun``.
        overrides: further entries of the overlay, for handlers that name their metrics one by one.
        options: of IFIMMetric.
        output_dir: where results go, as a config value.
        items: the findings one by one.
    """

    workflow: Workflow
    refusal: str | None = None
    evaluator: str = ""
    metric_at: str | None = None
    metrics_expression: str = ""
    handlers_at: str | None = None
    handlers_expression: str = ""
    several_processes: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    output_dir: str = "eval"
    items: list[Finding] = field(default_factory=list)

    @property
    def by_metric(self) -> bool:
        """Whether it is the metric route, not the handler route."""
        return self.metric_at is not None or bool(self.metrics_expression)

    @property
    def no_classifier(self) -> bool:
        """Whether it is refused for what ``assume_classifier`` overrules."""
        return self.refusal is not None and is_no_classifier(self.refusal)

    def add(self, name: str, value: Any, source: str, guess: str = "") -> None:
        """Note a finding."""
        self.items.append(Finding(name, value, source, guess))


def find(
    workflow: Workflow,
    others: Sequence[Workflow] = (),
    metadata: Mapping[str, Any] | None = None,
    evaluator: str | None = None,
    likelihood: str | Likelihood | None = None,
    output_key: int | str | None = None,
    assume_classifier: bool = False,
) -> Findings:
    """Look at a workflow.

    Args:
        workflow: to look at.
        others: workflows of the same bundle, whose loss counts where this one has none.
        metadata: of the bundle; default the workflow's.
        evaluator: id of the evaluator, where there are several.
        likelihood: what the user says, a name or an object; ``softmax`` and ``sigmoid`` are those of every voxel where
            the configs say that the outputs are dense.
        output_key: what the user says.
        assume_classifier: the outputs are (B, outputs), although the configs speak against it.

    Raises:
        ValueError: When the workflow has no evaluator of the given id.

    Example:
        >>> content = {"evaluator": {"_target_": "SupervisedEvaluator", "network": {"_target_": "UNet"}}}
        >>> find(Workflow("inference", ("configs/inference.json",), Config(content))).options["likelihood"]
        'voxelwise_softmax'
    """
    config = workflow.config
    metadata = workflow.metadata if metadata is None else metadata
    findings = Findings(workflow)
    engine = _find_evaluator(findings, evaluator)
    if engine is None:
        findings.refusal = "it has no evaluator"
        return findings
    network_id, network_value = config.follow(engine.content.get("network"), f"{engine.id}#network")
    network = config.component(network_value, network_id)
    others_to_run = [
        section for section in sections(config) if section != workflow.section and engines(config, section)
    ]
    if others_to_run:
        findings.add("section", workflow.section, "", f"there are {', '.join(others_to_run)}; choose with --run_id")
    findings.add("network", network.target if network else network_value, workflow.source(network_id))
    loss, loss_source = _find_loss(workflow, others)
    described_outputs = described(metadata, "outputs")
    if output_key is not None:  # the others do not count
        described_outputs = {name: output for name, output in described_outputs.items() if name == output_key}
    dense = None
    if says_dense(likelihood):
        dense = Clue("the command line")
    elif not assume_classifier:
        dense = dense_outputs(workflow, engine, network, loss, loss_source, described_outputs)
    findings.refusal = (
        None if assume_classifier else refusal(config, engine, network, loss, described_outputs, dense, output_key)
    )
    if engine.name == "EnsembleEvaluator":
        findings.refusal = "an EnsembleEvaluator has several networks; use IFIMMetric(network=...) in Python for one"
    if config.macro(engine.id) is not None:
        findings.refusal = "its evaluator stands behind a macro (%), and no other config can add to it; write it out"
    elif config.get(engine.id) is not engine.content:
        findings.refusal = f"its evaluator stands at an id that no other config can name ({engine.id})"
    taken = next((id for id in (*OWN_IDS, *COPIES) if id in config), None)
    if taken is not None:
        findings.refusal = f"it defines an id {taken} itself, which the overlay would replace; rename that one"
    outputs = _find_outputs(findings, network, engine, described_outputs, dense, output_key)
    found = list(evidence(workflow, engine, network, loss, loss_source, described_outputs))
    if dense is not None:  # errors of a segmentation are measured beside its likelihood
        found = [one for one in found if one.likelihood != "gaussian" or one is found[0]]
    _find_likelihood(findings, found, loss is not None, outputs, likelihood, dense)
    if dense is not None:
        _find_of_dense(findings, engine, found, loss, outputs, likelihood)
        _find_window(findings, engine, network, described(metadata, "inputs"))
    _find_output_key(findings, network, str(network_value), output_key)
    _find_channel_mask(findings, network, metadata)
    _find_keys(findings, engine)
    _find_inferer(findings, engine)
    _find_route(findings, engine)
    findings.options["on_error"] = "continue"
    return findings


def _find_evaluator(findings: Findings, wanted: str | None) -> Component | None:
    config = findings.workflow.config
    known = {engine.id: engine for engine in config.components("Evaluator")}
    if wanted is not None:
        if wanted.replace("::", "#") not in known:
            raise ValueError(
                f"{wanted} is no evaluator of {findings.workflow.name}, which has {', '.join(known) or 'none'}. "
                "Name one of these."
            )
        chosen = wanted.replace("::", "#")
    else:
        run = engines(config, findings.workflow.section)
        validators = [
            config.follow(handler.content.get("validator"))[0] for handler in config.components("ValidationHandler")
        ]
        # those that the section runs, else those that run while it trains, else any
        nearest = next((ids for ids in (run, validators) if any(id in known for id in ids)), known)
        listed = [id for id in ("validate#evaluator", "evaluator", *nearest) if id in known and id in nearest]
        if not listed:
            return None
        chosen = listed[0]
    findings.evaluator = chosen
    several = len(known) > 1 and wanted is None
    findings.add(
        "evaluator",
        known[chosen].target,
        findings.workflow.source(chosen),
        f"there are {', '.join(known)}; choose with --evaluator" if several else "",
    )
    return known[chosen]


def _find_loss(workflow: Workflow, others: Sequence[Workflow]) -> tuple[Component | None, str]:
    """The loss that the network is trained with, by this workflow or another one, and where it stands."""
    for candidate in (workflow, *others):
        for trainer in candidate.config.components("Trainer"):
            loss = candidate.config.component(trainer.content.get("loss_function"), f"{trainer.id}#loss_function")
            loss = inner_loss(candidate.config, loss)
            if loss is not None:
                return loss, candidate.source(loss.id)
    return None, ""


def _find_outputs(
    findings: Findings,
    network: Component | None,
    engine: Component,
    described_outputs: Mapping[str, Mapping[str, Any]],
    dense: Clue | None,
    output_key: int | str | None,
) -> int | None:
    by_key = described_outputs if output_key is not None else {}
    places = _output_counts(findings.workflow, None if by_key else network, engine, described_outputs)
    count, source = next(places, (None, ""))
    if dense is None:
        guess = "the first batch will show it" if count is None else ""
        findings.add("outputs", "unknown" if count is None else count, source or "the configs do not say", guess)
        return count
    number = "unknown number of channels" if count is None else f"{count} channel{'s' if count != 1 else ''}"
    source = f"{dense.says}; {source}" if source else dense.says
    guess = "if they are one row an image, --assume_classifier" if dense.weak else ""
    findings.add("outputs", f"dense, {number}", source, guess)
    return count


def _output_counts(
    workflow: Workflow, network: Component | None, engine: Component, described_outputs: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[int, str]]:
    """How many outputs there are, the most trusted first, and what says so."""
    config = workflow.config
    if network is not None:
        for name in _OUTPUTS:
            value = config.literal(network.content.get(name))
            if isinstance(value, int):
                yield value, workflow.source(f"{network.id}#{name}")
        shape = output_shape(config, network)
        if shape is not None:
            yield math.prod(shape), workflow.source(f"{network.id}#out_shape")
    for transform in postprocessing(config, engine):
        value = for_prediction(config, transform, "to_onehot")
        if transform.name.startswith("AsDiscrete") and isinstance(value, int) and not isinstance(value, bool):
            yield value, workflow.source(f"{transform.id}#to_onehot")
    for output in described_outputs.values():
        value = output.get("num_channels")
        if isinstance(value, int):
            yield value, "metadata.json: network_data_format"


def _find_likelihood(
    findings: Findings,
    found: Sequence[Evidence],
    loss_is_known: bool,
    outputs: int | None,
    wanted: str | Likelihood | None,
    dense: Clue | None,
) -> None:
    guess, prefix = "", "" if dense is None else "voxelwise_"
    value: str | Likelihood
    if wanted is not None:
        value, source = wanted, "the command line"
        name = wanted if isinstance(wanted, str) else _name_of(wanted)
        name = name.removeprefix("voxelwise_").removeprefix("pooled_")
        against = next((other for other in found if other.is_loss and other.likelihood != name), None)
        guess = f"{against.says} says {against.likelihood}" if against is not None else ""
        if prefix and wanted in ("softmax", "sigmoid"):
            value, source = prefix + str(wanted), f"{source}, at every voxel, since the outputs are dense"
        prefix = ""
    elif outputs == 1 and not (found and found[0].likelihood in ("gaussian", "sigmoid" if dense else "")):
        value, source = "sigmoid", "there is one output, over which a softmax would be constant"
        guess = "" if found or dense else "if the label is no class but a measured value, --likelihood gaussian"
    elif found:
        value, source = found[0].likelihood, found[0].says
        against = next((other for other in found if other.likelihood != value), None)
        if against is not None:
            source += f"; {against.says} says {against.likelihood}, which is trusted less"
        if value == "gaussian" and against is not None:
            guess = f"if the label is a class, --likelihood {against.likelihood}"
        elif not loss_is_known and (against is not None or value == "sigmoid"):
            other = against.likelihood if against is not None else "softmax"
            guess = f"no loss is known: if the outputs were trained with another one, --likelihood {prefix}{other}"
    else:
        value, source = "softmax", "nothing speaks for another one"
        guess = "set it with --likelihood" + (f" {prefix}sigmoid, where classes overlap" if prefix else "")
    if prefix and value == "gaussian":
        findings.refusal = findings.refusal or f"{IMAGES} ({source})"
    elif prefix:
        value = f"{prefix}{value}"
    findings.options["likelihood"] = value
    findings.add("likelihood", value, source, guess)
    if value == "gaussian":
        advice = f"set it to the root mean square error on held-out data, in the overlay: {GAUSSIAN}"
        findings.add("noise scale", 1.0, "the configs do not say", advice)


def _find_of_dense(
    findings: Findings,
    engine: Component,
    found: Sequence[Evidence],
    loss: Component | None,
    outputs: int | None,
    wanted: str | Likelihood | None,
) -> None:
    """What only a segmentation has: few cases, and the shape of its labels."""
    config = findings.workflow.config
    if wanted == "gaussian" or isinstance(wanted, LIKELIHOODS["gaussian"]):
        findings.refusal = findings.refusal or f"{IMAGES} (--likelihood gaussian)"
    activated = any(one.likelihood in ("softmax", "sigmoid") for one in found)
    if wanted is None and not activated:
        findings.refusal = findings.refusal or reads_probabilities(config, loss)
    findings.options["max_images"] = MOST_VOLUMES
    findings.add("max images", MOST_VOLUMES, "each case of a segmentation takes some hundred forward passes")
    of_indices = loss is not None and config.literal(loss.content.get("to_onehot_y")) is True
    without = ""
    if _LABELS_IN_A_DICTIONARY.search(str(engine.content.get("prepare_batch"))):
        without = f"{findings.workflow.source(f'{engine.id}#prepare_batch')} makes a dictionary of the labels"
    elif of_indices and findings.options["likelihood"] == "voxelwise_sigmoid" and outputs != 1:
        without = "the loss has to_onehot_y: true: labels are class indices, and sigmoids need one map each"
    if without:
        findings.options["label_key"] = None
        findings.add("label key", "none", without, "the numbers that need labels are left out")


def _find_window(
    findings: Findings, engine: Component, network: Component | None, inputs: Mapping[str, Mapping[str, Any]]
) -> None:
    """The window of each case that is measured: that of the evaluator's sliding window."""
    config = findings.workflow.config
    at, value = config.follow(engine.content.get("inferer"), f"{engine.id}#inferer")
    inferer = config.component(value, at)
    written = None if inferer is None else inferer.content.get("roi_size")
    where = "" if inferer is None else f"{findings.workflow.source(inferer.id)}: roi_size of {inferer.name}"
    sides = config.literal(written)
    if isinstance(sides, int) and not isinstance(sides, bool):
        axes = _spatial_axes(config, network, inputs)
        sides = None if axes is None else [sides] * axes
    if inferer is None or written is None:
        source = "there is no sliding window" if inferer is None else f"{inferer.name} has no sliding window"
        findings.add("window", "none, the whole image", source)
    elif inferer.name == "SliceInferer":
        findings.add("window", "none, the whole image slice by slice", f"{where}, of slices")
    elif isinstance(sides, list) and 1 <= len(sides) <= 3 and all(isinstance(n, int) and n > 0 for n in sides):
        findings.options["window"] = sides
        findings.add("window", " x ".join(map(str, sides)), where)
    else:
        advice = "it takes longer; in the overlay, window: [x, y, z] measures one window of each case"
        findings.add("window", "none, the whole image window by window", f"{where} is {written}", advice)


def _spatial_axes(config: Config, network: Component | None, inputs: Mapping[str, Mapping[str, Any]]) -> int | None:
    axes = None if network is None else config.literal(network.content.get("spatial_dims"))
    shape = next((part.get("spatial_shape") for part in inputs.values()), None)
    return axes if isinstance(axes, int) else len(shape) if isinstance(shape, list) and 1 <= len(shape) <= 3 else None


def _name_of(likelihood: Likelihood) -> str:
    return next((name for name, kind in LIKELIHOODS.items() if isinstance(likelihood, kind)), "")


def _find_output_key(findings: Findings, network: Component | None, made: str, wanted: int | str | None) -> None:
    if wanted is not None:
        findings.options["output_key"] = wanted
        findings.add("output key", wanted, "the command line")
    elif network is not None and network.name.lower() == "vit" and re.fullmatch(r"\$@\w+(\.to\(.*\))?|\{.*", made):
        findings.options["output_key"] = 0
        findings.add("output key", 0, "MONAI's ViT returns a tuple, whose first item holds the logits")


def _find_channel_mask(findings: Findings, network: Component | None, metadata: Mapping[str, Any]) -> None:
    config = findings.workflow.config
    channels = _channel_names(metadata)
    drawn = [_DRAWN.search(name) is not None for name in channels]
    makers = [part.name for part in config.components() if _DRAWING.search(part.name)]
    source = "metadata.json: channel_def = " + ", ".join(channels)
    named = [network.content[name] for name in _CHANNELS if name in network.content] if network is not None else []
    count = config.literal(named[0]) if named else None
    if makers and not isinstance(count, int):  # an expression
        count = next((part.get("num_channels") for part in described(metadata, "inputs").values()), None)
    fits = not isinstance(count, int) or count == len(channels)
    if any(drawn) and not all(drawn) and not fits:
        against = f"{source}, but the network takes {count}"
        findings.add("channels", count, against, "set channel_mask in the overlay if a person draws one of them")
    if not (any(drawn) and not all(drawn) and fits):
        if not makers or not isinstance(count, int) or count < 2:
            return
        own = len(channels) if 0 < len(channels) < count else count - 1  # which the metadata name
        drawn = [False] * own + [True] * (count - own)
        more = "a channel" if count - own == 1 else f"{count - own} channels"
        source = f"{makers[0]} adds {more} that a person draws"
    mask = [not is_drawn for is_drawn in drawn]
    findings.options["channel_mask"] = mask
    findings.add("channel mask", mask, source, "only these channels are varied; change channel_mask in the overlay")


def _channel_names(metadata: Mapping[str, Any]) -> list[str]:
    """What the metadata call the channels of the first input, in their order."""
    names = next((part.get("channel_def") for part in described(metadata, "inputs").values()), None)
    if not isinstance(names, Mapping) or not all(str(number).isdecimal() for number in names):
        return []
    return [str(names[number]) for number in sorted(names, key=int)]


def _find_keys(findings: Findings, engine: Component) -> None:
    if "label_key" in findings.options:  # found already
        findings.add("image key", "image", "MONAI's usual key")
        return
    if engine.name != "SupervisedEvaluator":
        findings.add("image key, label key", "image, label", "MONAI's usual keys", "change them in the overlay")
        return
    labels = "labels" if "prepare_batch" in engine.content else "labels, where the data have them"
    findings.add("image key, label key", "image, label", f"SupervisedEvaluator gives input and {labels} under these")


def _find_inferer(findings: Findings, engine: Component) -> None:
    config = findings.workflow.config
    at, value = config.follow(engine.content.get("inferer"), f"{engine.id}#inferer")
    inferer = config.component(value, at)
    if value is None:
        return
    name, guess = inferer.name if inferer else str(value), ""
    if "window" in findings.options:
        guess = "iFIM looks at one window of each case, through the network itself; window: null at the whole image"
    elif name != "SimpleInferer":
        findings.options["use_inferer"] = True
        guess = "iFIM looks through it; with use_inferer: false at the network alone"
    findings.add("inferer", name, findings.workflow.source(at), guess)


def _find_route(findings: Findings, engine: Component) -> None:
    config, source = findings.workflow.config, findings.workflow.source
    value, place = engine.content.get("key_val_metric"), f"{engine.id}#key_val_metric"
    at, metrics = config.follow(value, place)
    takes_entry = isinstance(metrics, Mapping) and metrics and "_target_" not in metrics
    if takes_entry and (is_shared(config, value, place) or config.macro(at) is not None):
        findings.metrics_expression = _reached(findings, at, COPIES[0])
        where = f"{source(at)}, which is not changed: others have it; the metric route, in a copy"
        findings.add("key metric", next(iter(metrics)), where)
    elif takes_entry:
        findings.metric_at = at
        findings.add("key metric", next(iter(metrics)), f"{source(at)}: the metric route, an entry beside it")
    elif not metrics:
        findings.add("key metric", "none", f"{source(engine.id)}: the handler route, which needs none")
    else:
        findings.add("key metric", metrics, f"{source(at)}: an expression takes no entry, so the handler route")
    value, place = engine.content.get("val_handlers"), f"{engine.id}#val_handlers"
    at, handlers = config.follow(value, place)
    on_rank_0 = _CONDITION_ON_RANK.match(handlers) if isinstance(handlers, str) else None
    if on_rank_0:
        findings.add("handlers", "on rank 0 only", source(at))
        value, place = f"@{on_rank_0[1]}", at
        at, handlers = config.follow(value)
    if isinstance(handlers, list) and (is_shared(config, value, place) or config.macro(at) is not None):
        findings.handlers_expression = _reached(findings, at, COPIES[1])
        findings.add("handlers", f"a list of {len(handlers)}", f"{source(at)}, which is not changed: others have it")
        _find_metrics_savers(findings, at, handlers)
    elif isinstance(handlers, list):
        findings.handlers_at = at
        findings.add("handlers", f"a list of {len(handlers)}", source(at))
        _find_metrics_savers(findings, at, handlers)
    elif handlers is None:
        findings.add("handlers", "none", source(engine.id))
    else:
        findings.handlers_expression = str(handlers).removeprefix("$")
        findings.add("handlers", handlers, f"{source(at)}: an expression, to which the overlay adds")
        for at, listed in (config.follow(f"@{id}") for id in config.references(handlers)):
            if isinstance(listed, list):
                _find_metrics_savers(findings, at, listed)
    findings.several_processes = any(_OF_SEVERAL_PROCESSES.search(text) for text in config.texts())
    if findings.several_processes and not findings.by_metric:
        findings.add("processes", "several", "", "without a key metric each process logs its own images")
    _find_output_dir(findings, at, handlers if isinstance(handlers, list) else [])


def _reached(findings: Findings, at: str, id: str) -> str:
    """A reference to what others have too; what stands in the evaluator itself gets an item of its own for that."""
    config = findings.workflow.config
    if not at.startswith(f"{findings.evaluator}#"):
        return f"@{at}"
    if any(at in config.references(text) for text in config.texts()):
        findings.refusal = (
            findings.refusal or f"others refer to what stands in its evaluator ({at}); give that an id of its own"
        )
    findings.overrides[id] = config.macro(at) or config.get(at)
    return f"@{id}"


def _find_output_dir(findings: Findings, at: str, handlers: Sequence[Any]) -> None:
    """Where results go: the bundle's ``output_dir``, else where a handler writes, else ``eval``."""
    config, source = findings.workflow.config, findings.workflow.source
    if "output_dir" in config:
        findings.output_dir = "@output_dir"
        findings.add("results", "@output_dir", source("output_dir"))
        return
    for index, handler in enumerate(handlers):
        found = config.component(handler, f"{at}#{index}")
        for name in ("log_dir", "save_dir", "output_dir"):
            written = config.written(f"{found.id}#{name}") if found is not None and name in found.content else None
            if found is not None and isinstance(written, str):
                findings.output_dir = written
                where = f"no output_dir is defined, and {found.target} writes there"
                findings.add("results", findings.output_dir, where, "change output_dir and log_dir in the overlay")
                return
    if "bundle_root" in config:
        findings.output_dir = "$@bundle_root + '/eval'"
    where = "no output_dir is defined"
    findings.add("results", findings.output_dir, where, "change output_dir and log_dir in the overlay")


def _find_metrics_savers(findings: Findings, at: str, handlers: Sequence[Any]) -> None:
    config = findings.workflow.config
    for index, handler in enumerate(handlers):
        saver = config.component(handler, f"{at}#{index}")
        if saver is None or saver.name != "MetricsSaver":
            continue
        for name in ("metrics", "metric_details"):
            listed = config.literal(saver.content.get(name))
            if isinstance(listed, (str, list)) and "*" not in listed:
                findings.overrides[f"{saver.id}#{name}"] = "*"
                findings.add(
                    f"MetricsSaver's {name}",
                    listed,
                    f"{findings.workflow.source(saver.id)}: the overlay asks for all, for the iFIM's",
                )


def is_shared(config: Config, value: Any, at: str) -> bool:
    """Whether anything else refers to what an option stands for, or to a step on the way there.

    Args:
        config: of the workflow.
        value: of the option.
        at: where it stands, from which the first step is its own.
    """
    end = config.follow(value, at)[1]
    if sum(other is end for other in config.values()) > 1:  # an anchor
        return True
    own = 0
    for _ in range(20):  # circular references end somewhere
        if sum(at in config.references(text) for text in config.texts()) > own:
            return True
        if not (isinstance(value, str) and re.fullmatch(r"@[\w#:]+", value)):
            return False
        at, own = value[1:].replace("::", "#"), 1
        value = config.get(at)
    return False
