"""What every call of a tracking server or database has in common: little patience, and the ways it can refuse."""

from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

REFUSALS = (MlflowException, SQLAlchemyError, OSError)  # a server or database that is dead, slow or says no


def patience(seconds: int, retries: int) -> None:
    """How long MLflow's client waits for a server; its own defaults are minutes for every call."""
    MLFLOW_HTTP_REQUEST_TIMEOUT.set(seconds)
    MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(retries)


def reason(refusal: Exception) -> str:
    """The first line of what it said."""
    return (str(refusal).splitlines() or [type(refusal).__name__])[0]
