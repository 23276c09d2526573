"""Logs settings and losses to a local MLflow store in the run's folder, if asked to."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from jax_moe.config.checks import shorten
from moe_train.configs.settings import TrainConfig, flat

NEEDED = ("mlflow", "sqlalchemy", "alembic")


class Logger(Protocol):
    """Receives the rows of metrics.jsonl."""

    def log(self, row: dict[str, Any]) -> None:
        """Logs an evaluation."""

    def close(self, finished: bool) -> None:
        """Ends the log of a finished or interrupted run."""


class NoLogger:
    """Logs nothing."""

    def log(self, row: dict[str, Any]) -> None:
        pass

    def close(self, finished: bool) -> None:
        pass


class MlflowLogger:
    """Logs settings once, and both losses at each evaluation. A resumed run continues the same MLflow run."""

    def __init__(self, folder: Path, config: TrainConfig):
        with warnings.catch_warnings():
            # MLflow's imports and its database set-up warn about their own dependencies, which users cannot change
            warnings.simplefilter("ignore")
            from mlflow.tracking import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # errors are raised as well, and printed in one line
            self.client = MlflowClient(tracking_uri=f"sqlite:///{(folder / 'mlflow.db').absolute()}")
            found = self.client.get_experiment_by_name("jax_moe")
        artifacts = (folder / "mlflow_artifacts").absolute().as_uri()
        if found is None:
            experiment = self.client.create_experiment("jax_moe", artifact_location=artifacts)
        else:
            experiment = found.experiment_id
        earlier = self.client.search_runs([experiment])
        if earlier:
            self.run_id = earlier[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self.client.create_run(experiment, run_name=folder.name).info.run_id
            for name, value in flat(config).items():
                self.client.log_param(self.run_id, name, value)

    def log(self, row: dict[str, Any]) -> None:
        with _in_one_line():
            for name in ("train_loss", "val_loss"):
                self.client.log_metric(self.run_id, name, row[name], step=row["step"])

    def close(self, finished: bool) -> None:
        with _in_one_line():
            self.client.set_terminated(self.run_id, status="FINISHED" if finished else "KILLED")


def check_logger(config: TrainConfig) -> None:
    """Raises ValueError if the logger's packages are missing."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if config.logger == "mlflow" and missing:
        raise ValueError(f"logger='mlflow': needs {', '.join(missing)}; `pip install 'jax-moe[mlflow]'`")


def open_logger(folder: Path, config: TrainConfig) -> Logger:
    """The logger that the settings name. Raises OSError if its store cannot be written."""
    with _in_one_line():
        return MlflowLogger(folder, config) if config.logger == "mlflow" else NoLogger()


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turns whatever MLflow and its database raise into an OSError of one line."""
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__  # type: ignore[assignment]
        raise OSError(f"logger='mlflow': cannot be written ({shorten(first) or type(first).__name__})") from None
