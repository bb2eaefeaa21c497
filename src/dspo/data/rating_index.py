"""What has been read of the ratings, on disk: pairs that come up again, and what would leak from split to split."""

import hashlib
from typing import Any, Self

from dspo.data.readers.comparison import image_key
from dspo.data.readers.grouping import temporary_database
from dspo.data.splits import SPLITS  # in the order train, validation, test: later ones are held out more strictly


class RatingIndex:
    """Remembers ids, labels and hashes of the pairs of every split in a temporary database, which grows with them.

    A prompt belongs to one split, but an image may come with several prompts, in one set or in two, and a prompt may
    come in several spellings. A pair that shares an image, or its prompt but for case and white space, with a split
    that is held out more strictly has to be left out: else the reward model is tested on what it was trained on.
    """

    def __init__(self) -> None:
        self._database = temporary_database()
        self._database.execute("CREATE TABLE pair (id TEXT PRIMARY KEY, split INTEGER, prompt TEXT, label REAL)")
        self._database.execute("CREATE TABLE content (pair TEXT, key TEXT)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, rating: dict[str, Any], split: str) -> bool:
        """Remember a row of the ratings table. False if the pair was there before, with whatever label, or is one of an
        image with itself."""
        images = image_key(rating["jpg_0"]), image_key(rating["jpg_1"])
        if images[0] == images[1]:
            return False
        values = (rating["pair_id"], SPLITS.index(split), rating["prompt_id"], rating["label_0"])
        if not self._database.execute("INSERT OR IGNORE INTO pair VALUES (?, ?, ?, ?)", values).rowcount:
            return False
        spelling = " ".join(rating["caption"].casefold().split())
        keys = [*images, hashlib.sha256(spelling.encode()).hexdigest()]
        self._database.executemany("INSERT INTO content VALUES (?, ?)", [(rating["pair_id"], key) for key in keys])
        return True

    def drop_leaks(self) -> int:
        """Find the pairs that have to be left out; how many there are. :meth:`holds` is False for them from then on."""
        self._database.executescript(
            """
            CREATE TABLE strictest (key TEXT PRIMARY KEY, split INTEGER) WITHOUT ROWID;
            INSERT INTO strictest
                SELECT content.key, max(pair.split) FROM content JOIN pair ON pair.id = content.pair
                GROUP BY content.key;
            """
        )
        return self._database.execute(
            """
            DELETE FROM pair WHERE id IN (
                SELECT pair.id FROM content JOIN pair ON pair.id = content.pair JOIN strictest USING (key)
                WHERE strictest.split > pair.split)
            """
        ).rowcount

    def holds(self, pair_id: str) -> bool:
        return self._database.execute("SELECT 1 FROM pair WHERE id = ?", (pair_id,)).fetchone() is not None

    def summary(self, split: str) -> dict[str, float | int | None]:
        """The figures of :func:`dspo.data.ratings.summarise`; none of the images are the base model's own."""
        pairs, prompts, decided, wins = self._database.execute(
            "SELECT count(*), count(DISTINCT prompt), count(*) FILTER (WHERE label != 0.5), "
            "count(*) FILTER (WHERE label = 1) FROM pair WHERE split = ?",
            (SPLITS.index(split),),
        ).fetchone()
        return {
            "pairs": pairs,
            "prompts": prompts,
            "decided": decided,
            "decided_base": 0,
            "base_share": 0.0 if pairs else None,
            "tie_share": 1 - decided / pairs if pairs else None,
            "first_share": wins / decided if decided else None,
        }
