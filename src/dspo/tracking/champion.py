"""The alias ``champion`` of a registered model: ``promote`` gives it to a version, ``rollback`` takes it back.

The registered model's tag ``champion.history`` lists the versions that held the alias, the present one last. Where a
person moved the alias on MLflow's page, the list lacks the present holder, which is then added. A call that is killed
between its two writes leaves that same state, or the one before it, so that the next call does the right thing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from dspo.errors import UserError
from dspo.tracking.server import REFUSALS, connect, patience, reason

ADAPTER_MD5 = "dvc.adapter_md5"  # tag of a version
CHAMPION = "champion"
HISTORY = "champion.history"
GOLD_RATE, GOLD_LOW, GOLD_HIGH, GOLD_DECIDED = "gold.win_rate", "gold.low", "gold.high", "gold.n_decided"  # tags
LEAST_LOW, LEAST_DECIDED = 0.5, 30  # what the gate wants; with fewer images the interval is too sure of itself


@dataclass(frozen=True)
class Change:
    model: str
    champion: int
    before: int | None  # who held the alias until now

    def __str__(self) -> str:
        if self.before == self.champion:
            return f"{self.model}: version {self.champion} is {CHAMPION} already"
        was = "none before" if self.before is None else f"before: version {self.before}"
        return f"{self.model}: version {self.champion} is {CHAMPION} ({was})"


def model_name(world: str) -> str:
    return f"dspo-adapter-{world}"


def promote(uri: str, world: str, version: int | None = None, adapter: str | None = None) -> Change:
    """Make a version the champion: the one of that number, or of the adapter with that md5, or the newest.

    Raises :class:`UserError` if there is no such version, if its gate does not hold, or if MLflow does not answer.
    """
    name = model_name(world)
    try:
        client = _client(uri)
        versions = _versions(client, name)
        there = ", ".join(map(str, versions)) or "none; run `dvc repro`, then `dspo sync`"
        chosen = version
        if chosen is None:
            wanted = [number for number, one in versions.items() if adapter in (None, one.tags.get(ADAPTER_MD5))]
            chosen = max(wanted, default=None)
            if versions and chosen is None:
                raise UserError(
                    f"{name}: the adapter of this workspace is no version in {uri} yet; `dspo sync` makes it one. "
                    f"Or give the number of another: {there}"
                )
        if chosen not in versions:
            raise UserError(f"{name}: no version {chosen or 'yet'} in {uri}. Versions: {there}")
        failed = why_not(versions[chosen].tags)
        if failed:
            raise UserError(f"{name}: version {chosen} is not promoted. {failed}")
        history, holder = _history(client, name, versions)
        if holder != chosen:
            # The alias first: without its line in the list, the version counts as one that a person moved it to.
            client.set_registered_model_alias(name, CHAMPION, str(chosen))
            client.set_registered_model_tag(name, HISTORY, json.dumps([*history, chosen]))
        client.update_registered_model(name, describe(world, versions[chosen]))
    except REFUSALS as error:
        raise UserError(f"{uri}: MLflow did not promote. {reason(error)}") from error
    return Change(name, chosen, holder)


def rollback(uri: str, world: str) -> Change:
    """Give the alias back to the version that held it before; again and again, until the first one holds it.

    Raises :class:`UserError` if none held it before, or if MLflow does not answer.
    """
    name = model_name(world)
    try:
        client = _client(uri)
        versions = _versions(client, name)
        history, holder = _history(client, name, versions)
        if holder is None:
            raise UserError(f"{name}: no version is {CHAMPION} in {uri}. `dspo promote` names one.")
        *before, _ = history
        if not before:
            raise UserError(
                f"{name}: version {holder} is the first {CHAMPION}; there is nothing to go back to. "
                "`dspo promote` names another one."
            )
        # The list first: without the alias, the version that should go counts as one that a person moved it to.
        client.set_registered_model_tag(name, HISTORY, json.dumps(before))
        client.set_registered_model_alias(name, CHAMPION, str(before[-1]))
        client.update_registered_model(name, describe(world, versions[before[-1]]))
    except REFUSALS as error:
        raise UserError(f"{uri}: MLflow did not roll back. {reason(error)}") from error
    return Change(name, before[-1], holder)


def why_not(tags: Mapping[str, str]) -> str | None:
    """Why a version with these tags may not be champion; None if the gate holds.

    The gate: the lower end of the 95 % interval of the gold judge's win rate of tuned over base is above one half.
    """
    if GOLD_LOW not in tags:
        return (
            "It has no win rate by the gold judge. In a world without that judge a person names the champion, "
            f"on MLflow's page of the model: alias `{CHAMPION}`."
        )
    low, decided = float(tags[GOLD_LOW]), int(float(tags[GOLD_DECIDED]))
    if decided < LEAST_DECIDED:
        return f"The gold judge decided {decided} images; the gate wants {LEAST_DECIDED}."
    if low <= LEAST_LOW:
        return (
            f"The gate does not hold: its gold win rate {float(tags[GOLD_RATE]):.3f} has a 95 % interval from "
            f"{low:.3f}, which is not above {LEAST_LOW}."
        )
    return None


def describe(world: str, champion: ModelVersion | None = None) -> str:
    """What the registered model's page says (Markdown)."""
    head = f"""DoRA adapters for SDXL's UNet, tuned by preference in the world `{world}`; one version per adapter.
`dspo promote` makes a version `{CHAMPION}` if the lower end of its gold win rate's interval is above one half;
`dspo rollback` takes that back."""
    if champion is None:
        return f"{head}\n\nNo version is `{CHAMPION}` yet. The page of each says how to load it."
    return f"{head}\n\n# {CHAMPION.capitalize()}: version {champion.version}\n\n{champion.description or ''}"


def _client(uri: str) -> MlflowClient:
    patience(30, retries=1)
    return connect(uri)


def _versions(client: MlflowClient, name: str) -> dict[int, ModelVersion]:
    found = {int(version.version): version for version in client.search_model_versions(f"name = '{name}'")}
    return dict(sorted(found.items()))


def _history(client: MlflowClient, name: str, versions: Mapping[int, ModelVersion]) -> tuple[list[int], int | None]:
    """The versions that held the alias, in order, and the one that does, which is the last of them; None: none does.

    Versions that were deleted since are left out, and what then stands twice in a row.
    """
    if not versions:
        return [], None
    model = client.get_registered_model(name)
    holder = int(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
    listed = [*json.loads(model.tags.get(HISTORY, "[]")), *([] if holder is None else [holder])]
    history: list[int] = []
    for version in listed:
        if version in versions and version not in history[-1:]:
            history.append(version)
    return history, holder
