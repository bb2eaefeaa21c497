"""Candidate images -> scores -> pairs on disk, by whatever scorer.

Several processes share the shards of candidates out; the first one makes the pairs.
"""

import csv
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from dspo import distributed
from dspo.data.files import write_bytes, write_json
from dspo.data.images import Pixels, decode_image, read_table, write_table
from dspo.data.parts import in_parts
from dspo.data.records import CANDIDATES, HEADS, PAIRS
from dspo.diffusion.base import TextEmbedding, encode_null, encode_prompts, load_text_encoders
from dspo.errors import UserError
from dspo.params import BaseModelParams, Head, SamplerParams, ScoreParams
from dspo.preference.pairs import Candidate, Pair, calibrated_rewards, held_out_prompts, select_pairs, weighted_reward
from dspo.progress import progress

PROMPTS_PER_FILE = 1024  # of their text: 0.3 MB each for SDXL

Row = dict[str, Any]
Key = tuple[str, int]  # prompt id, sample index


class Scorer(Protocol):
    """A reward model, or a judge that stands in for one."""

    @property
    def heads(self) -> Sequence[str]:
        """Names of the scores; "overall" is among them."""

    @property
    def untrained(self) -> Sequence[str]:
        """Heads whose scores mean nothing."""

    @property
    def temperature(self) -> float:
        """T of P(first wins) = sigmoid((overall_first - overall_second) / T)."""

    def score(self, images: Sequence[Pixels], captions: Sequence[str], batch_size: int) -> NDArray[np.floating[Any]]:
        """Scores [n, n_heads]."""


def write_pairs(
    candidates: Path,
    scorer: Scorer,
    base: BaseModelParams,
    params: ScoreParams,
    seed: int,
    device: torch.device,
    output: Path,
) -> None:
    """Score the shards of ``candidates`` and fill ``output`` with pairs.

    ``{train,validation}.parquet`` (columns: ``records.PAIRS``), ``text/`` (what ``base`` sees of the pairs' prompts),
    ``scores.csv`` (every candidate) and ``summary.json``, by the first process. Called again after a kill, it scores
    the shards that have no scores yet. Raises :class:`UserError` if there is no pair.
    """
    shards = sorted(candidates.glob("*.parquet"))
    if not shards:
        raise UserError(f"{candidates}: no candidates here. Make them: `dvc repro generate_pairs`")
    trained = trained_heads(scorer, params.weights)
    unfinished = output / "scores"
    score_shards(shards, scorer, params.batch_size, unfinished)
    if not distributed.first():
        return
    scored = read_scores(shards, unfinished, scorer.heads, params.weights)
    pairs = select_pairs(scored, params, trained)
    if not pairs:
        raise UserError(
            f"{candidates}: no two candidates of a prompt differ enough for a pair. "
            f"Lower score.margin (now {params.margin}) or sample more candidates."
        )
    rows = pair_rows(pairs, candidate_rows(shards, pairs), prompt_rewards(scored, scorer.temperature))
    held_out = held_out_prompts((row["prompt_id"] for row in rows), params.validation_share, seed)
    splits = {
        "train": [row for row in rows if row["prompt_id"] not in held_out],
        "validation": [row for row in rows if row["prompt_id"] in held_out],
    }
    for split, members in splits.items():
        write_table(pa.Table.from_pylist(members, schema=PAIRS), output / f"{split}.parquet")
    captions = {row["prompt_id"]: row["caption"] for row in rows}
    write_text(base, captions, device, output / "text")
    write_scores(scored, scorer.heads, output / "scores.csv")
    shutil.rmtree(unfinished)
    write_json(summary(scored, pairs, splits, scorer), output / "summary.json")


def trained_heads(scorer: Scorer, weights: Mapping[Head, float]) -> list[str]:
    """The heads whose scores mean something. Raises :class:`UserError` if ``weights`` has another."""
    trained = [head for head in scorer.heads if head not in scorer.untrained]
    if missing := [head for head in weights if head not in trained]:
        raise UserError(
            f"score.weights: the reward model has no trained head {missing[0]}. Choose from: {', '.join(trained)}"
        )
    return trained


def score_shards(shards: Sequence[Path], scorer: Scorer, batch_size: int, folder: Path) -> None:
    """Write the scores of every shard's candidates to a file of its name in ``folder``, where there is none yet.

    Scores do not depend on the number of processes. Returns when the files of all are there.
    """
    missing = distributed.from_first([shard for shard in shards if not (folder / shard.name).exists()])
    own = distributed.share(missing)
    for shard, (table, images) in progress(ahead(own), len(own), "scoring shards"):
        scores = scorer.score(images, table["caption"].to_pylist(), batch_size)
        scored = table.select(["prompt_id", "sample_index", "scheduler", "steps", "guidance_scale"])
        for head, column in zip(scorer.heads, scores.T, strict=True):
            scored = scored.append_column(head, pa.array(column.astype(np.float64)))
        write_table(scored, folder / shard.name)
    distributed.wait()


def ahead(shards: Sequence[Path]) -> Iterator[tuple[Path, tuple[pa.Table, list[Pixels]]]]:
    """Every shard with what :func:`read_images` reads of it, which happens while the one before is scored."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = [thread.submit(read_images, shard) for shard in shards[:1]]
        for position, shard in enumerate(shards):
            present = upcoming.pop().result()
            upcoming += [thread.submit(read_images, following) for following in shards[position + 1 : position + 2]]
            yield shard, present


def read_images(shard: Path) -> tuple[pa.Table, list[Pixels]]:
    """Table of a shard without its latents, and its images decoded."""
    table = read_table(shard, [name for name in CANDIDATES.names if not name.startswith("latent")])
    images = [decode_image(data, f"{shard}, row {row}") for row, data in enumerate(table["image"].to_pylist())]
    return table, images


def read_scores(
    shards: Sequence[Path], folder: Path, heads: Sequence[str], weights: Mapping[Head, float]
) -> list[Candidate]:
    """All candidates with what :func:`score_shards` wrote of them, sorted by prompt and sample index."""
    candidates = []
    for shard in shards:
        for row in read_table(folder / shard.name).to_pylist():
            sampler = SamplerParams(**{key: row[key] for key in ("scheduler", "steps", "guidance_scale")})
            scores = {head: row[head] for head in heads}
            reward = weighted_reward(scores, weights)
            candidates.append(Candidate(row["prompt_id"], row["sample_index"], sampler, scores, reward))
    return sorted(candidates, key=_key)


def prompt_rewards(candidates: Sequence[Candidate], temperature: float) -> dict[Key, float]:
    """Calibrated reward of every candidate among those of its prompt."""
    by_prompt: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_prompt.setdefault(candidate.prompt_id, []).append(candidate)
    rewards: dict[Key, float] = {}
    for members in by_prompt.values():
        calibrated = calibrated_rewards([member.reward for member in members], temperature)
        rewards.update(zip(map(_key, members), calibrated.tolist(), strict=True))
    return rewards


def candidate_rows(shards: Sequence[Path], pairs: Sequence[Pair]) -> dict[Key, Row]:
    """The full rows of the candidates that are in a pair; one shard in memory at a time."""
    wanted = {_key(side) for pair in pairs for side in (pair.winner, pair.loser)}
    found: dict[Key, Row] = {}
    for shard in shards:
        table = read_table(shard, CANDIDATES.names)
        keys = list(zip(table["prompt_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True))
        positions = [position for position, key in enumerate(keys) if key in wanted]
        for position, row in zip(positions, table.take(pa.array(positions, pa.int64())).to_pylist(), strict=True):
            found[keys[position]] = row
    return found


def pair_rows(pairs: Sequence[Pair], candidates: dict[Key, Row], rewards: dict[Key, float]) -> list[Row]:
    """Rows of ``records.PAIRS``; sampler settings are the winner's (equal in whatever ``score.match`` lists)."""
    rows = []
    for pair in pairs:
        winner = candidates[_key(pair.winner)]
        row: Row = {name: winner[name] for name in PAIRS.names if name in CANDIDATES.names}
        row |= {"pair_id": pair.id, "label_0": 1.0, "label_1": 0.0}
        for side, candidate in enumerate((pair.winner, pair.loser)):
            source = candidates[_key(candidate)]
            row |= {
                f"jpg_{side}": source["image"],
                f"latent_{side}": source["latent"],
                f"sample_index_{side}": candidate.sample_index,
                f"rca_{side}": rewards[_key(candidate)],
            }
            row |= {f"score_{side}_{head}": candidate.scores.get(head) for head in HEADS}
        rows.append(row)
    return rows


def write_text(base: BaseModelParams, captions: Mapping[str, str], device: torch.device, folder: Path) -> None:
    """What ``base`` sees of the captions by prompt id, as ``<prompt_id>.embeds`` [L, C] and ``<prompt_id>.pooled`` [P].

    In files of ``PROMPTS_PER_FILE``, so that memory never holds the text of a public set; ``null.*`` of the empty
    prompt has a file of its own.
    """
    pipe = load_text_encoders(base, device)
    encoded = (_on_host(embedding) for embedding in encode_prompts(pipe, list(captions.values())))
    named = zip(captions, encoded, strict=True)
    write_bytes(save(_text_tensors([("null", _on_host(encode_null(pipe)))])), folder / "null.safetensors")
    for number, part in enumerate(in_parts(named, PROMPTS_PER_FILE)):
        write_bytes(save(_text_tensors(part)), folder / f"{number:05d}.safetensors")


def _text_tensors(embeddings: Iterable[tuple[str, TextEmbedding]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, embedding in embeddings:
        tensors |= {f"{name}.embeds": embedding.embeds, f"{name}.pooled": embedding.pooled}
    return tensors


def _on_host(embedding: TextEmbedding) -> TextEmbedding:
    """Cloned: rows of one batch share memory, which safetensors refuses."""
    return TextEmbedding(embedding.embeds.cpu().clone(), embedding.pooled.cpu().clone())


def write_scores(candidates: Sequence[Candidate], heads: Sequence[str], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["prompt_id", "sample_index", "scheduler", "steps", "guidance_scale", *heads])
        for c in candidates:
            scores = [f"{c.scores[head]:.9g}" for head in heads]  # nine digits bring a float32 back
            settings = [c.sampler.scheduler, c.sampler.steps, c.sampler.guidance_scale]
            writer.writerow([c.prompt_id, c.sample_index, *settings, *scores])


def summary(
    candidates: Sequence[Candidate], pairs: Sequence[Pair], splits: dict[str, list[Row]], scorer: Scorer
) -> dict[str, Any]:
    gaps = [pair.gap for pair in pairs]
    scores = {head: [candidate.scores[head] for candidate in candidates] for head in scorer.heads}
    return {
        "candidates": len(candidates),
        "prompts": len({candidate.prompt_id for candidate in candidates}),
        "prompts_with_pairs": len({pair.winner.prompt_id for pair in pairs}),
        "pairs": len(pairs),
        "pairs_train": len(splits["train"]),
        "pairs_validation": len(splits["validation"]),
        "gap_mean": float(np.mean(gaps)),
        "gap_min": min(gaps),
        "heads": {head: {"mean": float(np.mean(s)), "std": float(np.std(s))} for head, s in scores.items()},
        "untrained_heads": list(scorer.untrained),
    }


def _key(candidate: Candidate) -> Key:
    return candidate.prompt_id, candidate.sample_index
