# SPDX-FileCopyrightText: monai_ifim contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables and figures among the artifacts of MLflow, read back from a local store."""

from pathlib import Path

import mlflow
import pytest
from monai.handlers import MLFlowHandler

from monai_ifim.handlers import IFIMSaver
from tests.handlers import CNN, LABELS, ROUTES, attached, items, on_route, pictures

pytestmark = pytest.mark.usefixtures("small_figures")
TABLES = {"summary.json", "images.csv", "perturbations.csv", "curves.csv", "comparisons.csv"}
FIGURES = {"curves.png", "spectrum.png", "histogram.png"}
LIGHT = {"directions": ["high", "low"], "strengths": [0.03], "shown": 1}


def evaluated(route, folder, *others, epochs=1):
    ifim = on_route(route, **LIGHT)
    engine = attached(ifim, CNN(), items(pictures(4), LABELS[:4]), *others, IFIMSaver(ifim, folder, components=False))
    for epoch in range(1, epochs + 1):
        engine.run(epoch)
    return engine


def artifacts(client, run, folder=""):
    """Name -> content of the files in a folder of a run's artifacts, as they lie on the disk."""
    files = [file for file in client.list_artifacts(run, folder or None) if not file.is_dir]
    return {Path(file.path).name: Path(client.download_artifacts(run, file.path)).read_bytes() for file in files}


@pytest.mark.parametrize("route", ROUTES)
def test_the_run_of_the_evaluators_handler_gets_tables_and_figures_of_the_last_evaluation(
    route, tmp_path, tracking_uri
):
    tracker = MLFlowHandler(tracking_uri, iteration_log=False, experiment_name=f"{route}_handler")
    evaluated(route, tmp_path, tracker, epochs=2)
    (run,) = tracker.client.search_runs(tracker.experiment.experiment_id)
    for folder, names in (("ifim", TABLES), ("ifim/figures", FIGURES)):
        found = artifacts(tracker.client, run.info.run_id, folder)
        assert found.keys() == names
        assert all(content == (tmp_path / folder / name).read_bytes() for name, content in found.items())
    assert artifacts(tracker.client, run.info.run_id) == {}
    tracker.close()


def test_without_a_handler_it_is_the_active_run_and_without_a_run_there_is_none(tmp_path, tracking_uri, monkeypatch):
    client = mlflow.MlflowClient(tracking_uri)
    experiment = client.create_experiment("active", artifact_location=(tmp_path / "artifacts").as_uri())
    monkeypatch.setattr(mlflow, "active_run", lambda: None)
    evaluated("handler", tmp_path / "first")
    assert client.search_runs(experiment) == []
    run = client.create_run(experiment)
    monkeypatch.setattr(mlflow, "active_run", lambda: run)
    monkeypatch.setattr(mlflow, "MlflowClient", lambda: client)
    evaluated("handler", tmp_path / "second")
    assert artifacts(client, run.info.run_id, "ifim").keys() == TABLES


def test_a_store_that_fails_is_reported_once_and_the_run_goes_on(tmp_path, tracking_uri, caplog, monkeypatch):
    tracker = MLFlowHandler(tracking_uri, iteration_log=False, experiment_name="failing")

    def fails(*values):
        raise ConnectionError("the store is away")

    monkeypatch.setattr(tracker.client, "log_artifact", fails)
    engine = evaluated("handler", tmp_path, tracker, epochs=3)
    assert "ifim_kl_high" in engine.state.metrics
    assert (tmp_path / "ifim" / "summary.json").is_file()
    reports = [record.getMessage() for record in caplog.records if "IFIMSaver" in record.getMessage()]
    assert reports == [
        "IFIMSaver left out at epoch 1: MLflow (ConnectionError: the store is away). All else was written; this is "
        "said once."
    ]
    tracker.close()


def test_without_mlflow_nothing_is_said_and_all_else_is_written(tmp_path, caplog, monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "mlflow")
    evaluated("handler", tmp_path)
    assert (tmp_path / "ifim" / "summary.json").is_file()
    assert "MLflow" not in caplog.text
