"""An optional second home for settings and losses: a local MLflow store inside the run's folder."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from jax_moe.config.checks import shorten
from train.configs.settings import TrainConfig, flat

NEEDED = ("mlflow", "sqlalchemy", "alembic")


class Logger(Protocol):
    """Takes what metrics.jsonl gets."""

    def log(self, row: dict[str, Any]) -> None:
        """One evaluation."""

    def close(self, finished: bool) -> None:
        """The run ended, or was interrupted."""


class NoLogger:
    """metrics.jsonl is enough."""

    def log(self, row: dict[str, Any]) -> None:
        pass

    def close(self, finished: bool) -> None:
        pass


class MlflowLogger:
    """Parameters once, train and val loss at each evaluation; a resumed run goes on in the same MLflow run."""

    def __init__(self, folder: Path, config: TrainConfig):
        with warnings.catch_warnings():
            # MLflow's imports and its database set-up warn about their own dependencies, which a user cannot change
            warnings.simplefilter("ignore")
            from mlflow.tracking import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.CRITICAL)  # errors are raised as well, and told in one line
            self.client = MlflowClient(tracking_uri=f"sqlite:///{(folder / 'mlflow.db').absolute()}")
            found = self.client.get_experiment_by_name("jax_moe")
        artifacts = (folder / "mlflow_artifacts").absolute().as_uri()
        experiment = found.experiment_id if found else self.client.create_experiment("jax_moe", artifact_location=artifacts)
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
    """The logger that the settings name. Raises OSError where its store cannot be written."""
    with _in_one_line():
        return MlflowLogger(folder, config) if config.logger == "mlflow" else NoLogger()


@contextmanager
def _in_one_line() -> Iterator[None]:
    """OSError of one line for all that MLflow and its database raise: dozens of classes, with messages of pages."""
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__  # type: ignore[assignment]
        raise OSError(f"logger='mlflow': cannot be written ({shorten(first) or type(first).__name__})") from None
