"""A folder of pairs: ``winners/NAME.png``, ``losers/NAME.png``, and the prompt in ``winners/NAME.txt``.

The caption file beside the image is the convention of the LoRA trainers. Any image format, also two different ones.
"""

from collections.abc import Iterator
from pathlib import Path

from dspo.data.readers.comparison import Comparison, check_different, checked_prompt, read_image
from dspo.errors import UserError


def read(path: Path) -> Iterator[Comparison]:
    """Yield the pairs in the order of their names."""
    winners, losers = (_images(path / name) for name in ("winners", "losers"))
    for name in sorted(winners.keys() ^ losers.keys()):
        image, other = (winners[name], "losers") if name in winners else (losers[name], "winners")
        raise UserError(f"{image}: {path / other} has no image of that name. Add it or remove this one.")
    for name, winner in sorted(winners.items()):
        caption = winner.with_suffix(".txt")
        try:
            prompt = checked_prompt(caption.read_text(encoding="utf-8-sig"), str(caption))
        except FileNotFoundError:
            raise UserError(f"{winner}: no prompt. Write it into {caption}.") from None
        except UnicodeDecodeError:
            raise UserError(f"{caption}: not UTF-8 text. Save the file as UTF-8 and run again.") from None
        images = (read_image(winner, str(winner)), read_image(losers[name], str(losers[name])))
        check_different(images, str(winner))
        yield Comparison(str(winner), prompt, images, {"overall": 1.0})


def _images(folder: Path) -> dict[str, Path]:
    """Files by name without suffix."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Expected winners/ and losers/ with images of equal names.")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".txt" or file.name.startswith("."):
            continue
        if file.stem in found:
            raise UserError(f"{file}: {found[file.stem].name} has the same name. Rename one of them in both folders.")
        found[file.stem] = file
    return found
