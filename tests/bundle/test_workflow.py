# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.engines import SupervisedEvaluator
from monai.handlers import StatsHandler
from monai.networks.nets import DenseNet
from monai.utils import set_determinism

from monai_ifim import Gaussian
from monai_ifim.bundle import attach, attach_to_bundle
from monai_ifim.handlers import IFIMFigureHandler, IFIMHandler, IFIMMetric, IFIMSaver
from tests.bundle.bundles import (
    SHAPES,
    Files,
    alone,
    densenet,
    in_sections,
    only_inference,
    part,
    regression,
    sliced_handlers,
    write,
)

torch.set_num_threads(1)  # the networks are tiny; more threads only wait for each other

LIGHT: dict[str, Any] = {"max_images": 4, "directions": ["high", "transfer"], "strengths": [0.03], "shown": 0}
QUIET: dict[str, Any] = {**LIGHT, "figures": False, "save": False}
EVALUATOR = "validate#evaluator"
Written = list[tuple[str, Path]]


@pytest.fixture(autouse=True)
def written(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Written]:
    """What would be drawn and written, and where: pictures take most of the time, and have tests of their own."""
    noted: Written = []

    def note(what: str, folder: Path) -> dict[str, Exception]:
        noted.append((what, folder))
        return {}

    monkeypatch.setattr(IFIMFigureHandler, "_draw", lambda self, *_: note("drawn", Path(self.log_dir)))
    if getattr(request, "param", "") != "files":
        monkeypatch.setattr(IFIMSaver, "_write", lambda self, *_: note("saved", self.folder))
    yield noted
    set_determinism(None)


def workflow_of(root: Path, names: list[str], files: Files | None = None, **overrides: Any) -> ConfigWorkflow:
    """A workflow of a bundle, which is written first; everything that it writes is in the bundle's folder."""
    write(root, files or {})
    paths = [str(root / "configs" / name) for name in names]
    return ConfigWorkflow(config_file=paths, logging_file=False, bundle_root=str(root), **overrides)


def started(root: Path, names: list[str], files: Files | None = None, **overrides: Any) -> ConfigWorkflow:
    workflow = workflow_of(root, names, files, **overrides)
    workflow.initialize()
    return workflow


def training(root: Path, files: Files | None = None) -> ConfigWorkflow:
    """Of one epoch."""
    return started(root, ["train.json"], files or in_sections(), num_epochs=1)


def parsed(workflow: ConfigWorkflow, id: str) -> Any:
    return workflow.parser.get_parsed_content(id)


def metrics_of(workflow: ConfigWorkflow, evaluator: str) -> dict[str, float]:
    return dict(parsed(workflow, evaluator).state.metrics)


def ifim_of(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("ifim_")}


def checkpoint(root: Path) -> Path:
    """Weights that no seed of a bundle gives, where the inference looks for them."""
    (root / "models").mkdir(parents=True, exist_ok=True)
    network = DenseNet(**{name: value for name, value in densenet().items() if name != "_target_"})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05)
    torch.save({"model": network.state_dict()}, root / "models" / "model.pt")
    return root / "models" / "model.pt"


# The same as with the overlay


def pair(root: Path, shape: str, name: str) -> tuple[ConfigWorkflow, ConfigWorkflow, IFIMHandler | IFIMMetric]:
    """A bundle's workflow after its run, with the overlay and as attached to in Python."""
    run: dict[str, Any] = {"run_id": "evaluating"} if shape == "only_inference" else {}
    run |= {"num_epochs": 1} if name == "train.json" else {}
    options = {f"ifim#{option}": value for option, value in LIGHT.items()}
    runs = []
    for by_overlay in (True, False):
        folder = write(root / ("overlay" if by_overlay else "python"), SHAPES[shape]())
        torch.manual_seed(0)
        checkpoint(folder)
        names = [name, attach_to_bundle(folder)[-1 if name == "inference.json" else 0].name] if by_overlay else [name]
        torch.manual_seed(1)
        runs.append(started(folder, names, **run, **(options if by_overlay else {})))
        if not by_overlay:
            ifim = attach(runs[-1], **LIGHT)
        runs[-1].run()
    return runs[0], runs[1], ifim


@pytest.mark.parametrize(
    ("shape", "name", "evaluator"),
    [
        ("in_sections", "train.json", EVALUATOR),  # metric, evaluator made by the run
        ("in_sections", "inference.json", "evaluator"),  # handler, evaluator made before
        ("only_inference", "inference.json", "evaluator"),  # handler, evaluator made by the run
        ("sliced_handlers", "train.json", EVALUATOR),  # handlers made by an expression
        ("four_channels", "train.json", EVALUATOR),
        ("sliding_window", "inference.yaml", "evaluator"),
        ("regression", "train.json", EVALUATOR),
    ],
)
def test_the_numbers_are_those_with_the_overlay(shape: str, name: str, evaluator: str, tmp_path: Path):
    first, second, ifim = pair(tmp_path, shape, name)
    expected = metrics_of(first, evaluator)
    assert metrics_of(second, evaluator) == expected
    assert ifim_of(expected)["ifim_images"] == 4
    assert ifim.result is not None
    assert ifim.result.metrics["log10_lambda_max"] == expected["ifim_log10_lambda_max"]


@pytest.mark.parametrize("written", ["files"], indirect=True)
def test_the_files_are_those_with_the_overlay(tmp_path: Path):
    pair(tmp_path, "in_sections", "inference.json")
    files = [
        sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        for folder in (tmp_path / "overlay" / "eval" / "ifim_inference", tmp_path / "python" / "eval" / "ifim")
    ]
    assert files[0] == files[1] != []


@pytest.mark.parametrize("shape", ["in_sections", "sliced_handlers", "one_logit", "regression"])
def test_a_training_ends_with_the_same_bits(shape: str, tmp_path: Path):
    ends = []
    for watched in (False, True):
        workflow = started(tmp_path / str(watched), ["train.json"], SHAPES[shape]())
        if watched:
            attach(workflow, **QUIET)
        workflow.run()
        metrics = metrics_of(workflow, EVALUATOR)
        assert bool(ifim_of(metrics)) == watched
        optimizer = parsed(workflow, "optimizer").state_dict()["state"]
        ends.append(
            {
                **parsed(workflow, "network").state_dict(),
                **{f"{key}_{name}": value for key, values in optimizer.items() for name, value in values.items()},
                "random": torch.get_rng_state(),
                "key metric": torch.tensor(next(value for name, value in metrics.items() if name.startswith("val_"))),
            }
        )
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# What was made before


def test_an_evaluator_that_is_there_keeps_its_loaded_weights(tmp_path: Path):
    file = checkpoint(tmp_path)
    workflow = started(tmp_path, ["inference.json"], in_sections())
    network, evaluator = parsed(workflow, "network"), parsed(workflow, "evaluator")
    ifim = attach(workflow, **QUIET)
    workflow.run()
    assert parsed(workflow, "evaluator") is evaluator
    assert evaluator.network is network
    weights = torch.load(file)["model"]
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
    assert ifim.result is not None
    assert ifim_of(evaluator.state.metrics)["ifim_log10_lambda_max"] == ifim.result.metrics["log10_lambda_max"]


@pytest.mark.parametrize(
    ("name", "initialize"),
    [
        ("train.json", ["$monai.utils.set_determinism(seed=1)"]),
        ("train.json", ["$@network.eval()", "$len(@validate#handlers)", "$len(@validate#key_metric)"]),
        ("train.json", ["$@validate#handlers", "$@train#trainer"]),
        *((name, []) for name in ("train.json", "inference.json")),
        *(("inference.json", [made]) for made in ("$@evaluator", "$@handlers")),
    ],
)
def test_nothing_is_made_twice(name: str, initialize: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []

    def counting(self: Any, *arguments: Any, **options: Any) -> None:
        made.append(type(self).__name__)
        originals[type(self)](self, *arguments, **options)

    originals: dict[type, Callable] = {kind: kind.__init__ for kind in (DenseNet, SupervisedEvaluator, StatsHandler)}
    for kind in originals:
        monkeypatch.setattr(kind, "__init__", counting)
    files = in_sections()
    files["train.json"]["num_epochs"] = 1
    workflow = started(tmp_path, [name], files, initialize=initialize)
    ifim = attach(workflow, **QUIET)
    workflow.run()
    assert ifim.result is not None
    handlers = ["StatsHandler"] * (2 if name == "train.json" else 1)
    assert sorted(made) == ["DenseNet", *handlers, "SupervisedEvaluator"]


def test_a_saver_that_names_its_metrics_saves_ours_too(tmp_path: Path):
    checkpoint(tmp_path)
    workflow = started(tmp_path, ["train.json", "evaluate.json"], in_sections())
    network = parsed(workflow, "network")
    attach(workflow, **QUIET)
    workflow.run()
    assert parsed(workflow, "network") is network
    rows = dict(csv.reader((tmp_path / "eval" / "metrics.csv").open()))
    assert {"val_accuracy", "ifim_log10_lambda_max"} <= set(rows)
    assert (tmp_path / "eval" / "ifim_lambda_max_raw.csv").is_file()


@pytest.mark.parametrize("made", [[], ["validate#handlers"], ["validate#key_metric"], [EVALUATOR]])
def test_what_python_code_made_gets_ours_too(made: list[str], tmp_path: Path, written: Written):
    workflow = training(tmp_path)
    before = [parsed(workflow, id) for id in made]
    ifim = attach(workflow, figures=False, **LIGHT)
    workflow.run()
    assert [parsed(workflow, id) for id in made] == before
    assert ifim.result is not None
    assert written == [("saved", tmp_path / "eval" / "ifim")]
    assert ifim.agreement.communicate == (made != [EVALUATOR])  # the metric, where it can still be one


@pytest.mark.parametrize("files", [in_sections, sliced_handlers])
def test_a_workflow_that_starts_again_is_still_watched(files: Callable[[], Files], tmp_path: Path, written: Written):
    workflow = training(tmp_path, files())
    ifim = attach(workflow, figures=False, **LIGHT)
    workflow.run()
    first = ifim.result
    workflow.initialize()
    workflow.run()
    assert len(written) == 2
    assert first is not None
    assert ifim.result is not None
    assert ifim.result is not first
    assert ifim.result.metrics == first.metrics  # the same seed


# Options


def test_options_come_before_what_the_configs_say(tmp_path: Path):
    workflow = started(tmp_path, ["inference.json"], only_inference(), run_id="evaluating")
    ifim = attach(workflow, likelihood="softmax", prefix="mine_", **QUIET)
    workflow.run()
    assert (ifim.likelihood, ifim.on_error) == ("softmax", "continue")
    assert "mine_images" in parsed(workflow, "evaluator").state.metrics


def test_the_noise_of_a_regression_is_that_of_the_object(tmp_path: Path):
    largest = []
    for likelihood in ("gaussian", Gaussian(scale=0.1)):
        workflow = training(tmp_path, regression())
        ifim = attach(workflow, likelihood=likelihood, **QUIET)
        workflow.run()
        assert ifim.result is not None
        largest.append(ifim.result.metrics["lambda_max"])
        assert {"kl_high", "shift_high", "error"} <= set(ifim.result.metrics)
    assert largest[1] == pytest.approx(100 * largest[0], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "figures", "save"),
    [("train.json", True, False), ("inference.json", False, True), ("inference.json", False, False)],
)
def test_figures_and_tables_are_written_where_they_are_wanted(
    name: str, figures: bool, save: bool, tmp_path: Path, written: Written
):
    checkpoint(tmp_path / "bundle")
    workflow = started(tmp_path / "bundle", [name], in_sections())
    elsewhere = tmp_path / "elsewhere"
    attach(workflow, figures=figures, save=save, output_dir=str(elsewhere), **LIGHT)
    workflow.run()
    assert set(written) == {*[("drawn", elsewhere)] * figures, *[("saved", elsewhere / "ifim")] * save}
    assert len(written) == (figures + save) * (2 if name == "train.json" else 1)  # each epoch


def test_an_error_stops_the_run_where_the_user_wants_that_and_not_by_default(tmp_path: Path):
    workflow = training(tmp_path)
    ifim = attach(workflow, on_error="raise", image_key="nothing", **QUIET)
    assert ifim.on_error == "raise"
    with pytest.raises(RuntimeError, match="run") as stopped:
        workflow.run()
    assert isinstance(stopped.value.__cause__, KeyError)
    workflow = training(tmp_path)
    ifim = attach(workflow, image_key="nothing", **QUIET)
    workflow.run()
    assert ifim.result is None
    assert set(metrics_of(workflow, EVALUATOR)) == {"val_accuracy"}


def test_the_user_chooses_the_evaluator(tmp_path: Path):
    files = in_sections()
    train = files["train.json"]
    train["test"] = {"evaluator": {**train["validate"]["evaluator"], "key_val_metric": None, "val_handlers": None}}
    train["run"] = ["$@validate#evaluator.run()", "$@test#evaluator.run()"]
    workflow = started(tmp_path, ["train.json"], files)
    attach(workflow, evaluator="test#evaluator", **QUIET)
    workflow.run()
    assert ifim_of(metrics_of(workflow, "test#evaluator"))
    assert not ifim_of(metrics_of(workflow, EVALUATOR))


@pytest.mark.parametrize(("by_overlay", "made"), [(True, []), (False, ["validate#key_metric"]), (False, [])])
def test_a_trainer_that_shares_the_metrics_is_not_attached_to(by_overlay: bool, made: list[str], tmp_path: Path):
    files = in_sections()
    files["train.json"]["train"]["trainer"]["key_train_metric"] = "@validate#key_metric"
    names = ["train.json"]
    if by_overlay:
        names.append(attach_to_bundle(write(tmp_path, files))[0].name)
    options = {f"ifim#{name}": value for name, value in LIGHT.items()} if by_overlay else {}
    workflow = started(tmp_path, names, files, num_epochs=1, **options)
    for id in made:
        parsed(workflow, id)
    if not by_overlay:
        assert attach(workflow, **QUIET).agreement.communicate  # the metric, not the handler
    workflow.run()
    assert ifim_of(metrics_of(workflow, EVALUATOR))["ifim_images"] == 4
    assert set(metrics_of(workflow, "train#trainer")) == {"val_accuracy"}


# What cannot be done


def test_a_workflow_that_is_not_initialized_or_has_no_configs_is_refused(tmp_path: Path):
    if not hasattr(monai.bundle, "PythonicWorkflow"):
        pytest.skip("MONAI before 1.5 has no PythonicWorkflow")

    class Own(monai.bundle.PythonicWorkflow):
        def run(self) -> None: ...

        def finalize(self) -> None: ...

    with pytest.raises(RuntimeError, match=r"not initialized. Call workflow.initialize\(\) first"):
        attach(workflow_of(tmp_path, ["train.json"], in_sections()))
    workflow = Own(workflow_type="train")
    workflow.initialize()
    with pytest.raises(TypeError, match=r"must be a monai.bundle.ConfigWorkflow, got Own"):
        attach(workflow)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "name"),
    [("in_sections", "train.json"), ("in_sections", "inference.json"), ("sliced_handlers", "train.json")],
)
def test_attaching_twice_is_refused(shape: str, name: str, tmp_path: Path):
    checkpoint(tmp_path)
    workflow = started(tmp_path, [name], SHAPES[shape]())
    ifim = attach(workflow, **QUIET)
    with pytest.raises(ValueError, match="attached"):
        attach(workflow, **QUIET)
    workflow.run()
    assert ifim.result is not None


def test_attaching_beside_the_overlay_and_to_an_evaluator_that_is_not_there_is_refused(tmp_path: Path):
    root = write(tmp_path, in_sections())
    overlay = attach_to_bundle(root)[0]
    with pytest.raises(ValueError, match="attached to this workflow already, by an overlay or an earlier attach"):
        attach(started(root, ["train.json", overlay.name]))
    with pytest.raises(ValueError, match="wrong is no evaluator of the workflow, which has validate#evaluator"):
        attach(training(root), evaluator="wrong")


def test_a_workflow_that_cannot_be_served_is_refused_unless_the_user_knows_better(tmp_path: Path):
    config = alone([])
    config["loss"], config["trainer"] = part("PerceptualLoss"), part("SupervisedTrainer", loss_function="@loss")
    workflow = started(tmp_path, ["inference.json"], {"inference.json": config})
    with pytest.raises(ValueError, match=r"iFIM cannot be attached: it generates images.*assume_classifier=True"):
        attach(workflow, **QUIET)
    ifim = attach(workflow, assume_classifier=True, **QUIET)
    workflow.run()
    assert ifim.result is not None
    taken = started(tmp_path, ["inference.json"], {"inference.json": {**alone([]), "ifim_saver": 1}})
    with pytest.raises(ValueError, match="an id ifim_saver itself") as refused:
        attach(taken, **QUIET)
    assert "assume_classifier" not in str(refused.value)  # nothing misleads


@pytest.mark.parametrize("written", ["files"], indirect=True)
def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "docs" / "add_to_your_bundle.md").read_text()
    block = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block is not None
    files = in_sections()
    files["train.json"]["num_epochs"] = 1
    files["train.json"]["validate"]["dataset"]["data"] = "$@train#dataset.data[:3]"
    monkeypatch.chdir(write(tmp_path, files))
    names: dict[str, Any] = {}
    exec(block[1], names)
    assert len(names["ifim"].result.images) == 3
    assert (tmp_path / "eval" / "ifim" / "summary.json").is_file()
