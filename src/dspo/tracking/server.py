"""What every call of a tracking server or database has in common: its address, little patience, and its refusals."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

REFUSALS = (MlflowException, SQLAlchemyError, OSError)  # a server or database that is dead, slow or says no
ARTIFACTS = "mlartifacts"  # folder beside a database file
LOCATIONS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}  # where MLflow's tables name the artifacts by absolute path


def connect(uri: str, create: bool = False) -> MlflowClient:
    """A client of a tracking server or database, whose relative path counts from the current folder, as for MLflow.

    ``create``: a database file that is not there will be. Raises one of ``REFUSALS``, also for what is no address.
    """
    try:
        if urlsplit(uri).scheme == "sqlite":
            file = Path(make_url(uri).database or ".").absolute()
            if create:
                file.parent.mkdir(parents=True, exist_ok=True)
            elif not file.exists():
                raise FileNotFoundError(f"{file}: no such file. `dspo sync` writes it, after `dvc repro`.")
            _find_artifacts(file)
            uri = f"sqlite:///{file}"
        elif urlsplit(uri).scheme.partition("+")[0] in DATABASE_ENGINES:
            _knock(uri)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (ValueError, ImportError, sqlite3.Error) as error:
        raise ConnectionError(f"{error}. Set MLFLOW_TRACKING_URI to http://HOST:PORT or sqlite:////FILE.db") from error


def _find_artifacts(database: Path) -> None:
    """Name the artifacts beside a database by the path that they have now: in a container it is another one.

    Raises sqlite3.Error for what is no database; MLflow itself would try for minutes.
    """
    place = (database.parent / ARTIFACTS).as_uri()
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = {name for (name,) in connection.execute("select name from sqlite_master")}
        if not LOCATIONS.keys() <= tables or not (database.parent / ARTIFACTS).is_dir():
            return
        named = "select distinct artifact_location from experiments where artifact_location like ?"
        for (before,) in connection.execute(named, [f"file:%/{ARTIFACTS}"]).fetchall():
            if before == place:
                continue
            for table, column in LOCATIONS.items():
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) "  # noqa: S608  names of our own
                    f"where substr({column} || '/', 1, ?) = ?",
                    [place, len(before) + 1, len(before) + 1, f"{before}/"],
                )


def _knock(database: str) -> None:
    """Raise SQLAlchemyError where no database server answers; MLflow itself would try for minutes."""
    engine = create_engine(database)
    engine.connect().close()
    engine.dispose()


def patience(seconds: int, retries: int) -> None:
    """How long MLflow's client waits for a server; its own defaults are minutes for every call."""
    MLFLOW_HTTP_REQUEST_TIMEOUT.set(seconds)
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(retries)


def reason(refusal: Exception) -> str:
    """The first line of what it said."""
    return (str(refusal).splitlines() or [type(refusal).__name__])[0]
