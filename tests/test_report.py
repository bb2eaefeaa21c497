"""The report: figures equal their inputs, the page holds in a browser, gates say yes and no."""

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dspo.reporting.gates import gates
from dspo.reporting.gates import main as gates_main
from dspo.reporting.page import choose, render_page, verdict
from dspo.reporting.plots import judges_plot, svg
from dspo.reporting.summary import summarise

SCRIPT = "<script>document.title='attacked'</script>"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


def row(win_rate: float, low: float, high: float, decided: int = 400) -> dict[str, Any]:
    counts = {"n_decided": decided, "n_images": 800, "n_prompts": 400, "tie_share": 0.5, "win_rate_ties_half": 0.6}
    return {"win_rate": win_rate, "low": low, "high": high, "tau": 0.01, **counts}


def estimate(base: float, tuned: float) -> dict[str, Any]:
    values = {"base": base, "tuned": tuned, "difference": tuned - base, "fixed": 0.3, "broken": 0.1}
    return {k: {"value": v, "low": v - 0.02, "high": v + 0.02, "n": 800, "n_prompts": 400} for k, v in values.items()}


def results(gold: dict[str, Any], over_optimised: bool = False) -> dict[str, Any]:
    rates = {"reward_overall": row(0.8, 0.75, 0.85), "gold_overall": gold, "second": row(0.6, 0.55, 0.65)}
    judged = {name: r["low"] > 0.5 for name, r in rates.items()}
    diversity = {"among_fully_right": {"attributes": {"value": 0.97}, "pixels": {"value": 0.95}}}
    tuned = {"win_rates": rates, "fully_right": estimate(0.5, 0.6), "diversity": diversity}
    tuned |= {"drift": {"saturation": estimate(0.5, 0.51)}, "scores": {"gold_overall": estimate(0.6, 0.7)}}
    worse = {name: r["high"] < 0.5 for name, r in rates.items()}
    return {
        "tuned_against_base": tuned,
        "best_of_n": {"n": 4, "best_against_base": rates},
        "base_against_base": rates,
        "hacks": {"blur": rates},
        "best_sampler_against_default": rates,
        "combinations": {"seen": rates},
        "settings": {"tie_band": 0.01},
        "verdict": {"improved": judged, "worse": worse, "over_optimised": over_optimised},
    }


REWARD: dict[str, Any] = {
    "macro_f1": 0.85, "macro_f1_low": 0.84, "macro_f1_high": 0.86, "ceiling_macro_f1": 0.9, "constant_f1": 0.67,
    "pair_accuracy": 0.85, "zero_shot_macro_f1": 0.7, "zero_shot_pair_accuracy": 0.7, "prevalence_first": 0.5,
    "nll": 0.4,    "brier": 0.1, "ece": 0.02, "temperature": 1.2, "n_pairs": 2500, "n_prompts": 520,
    "heads": {"detail": "untrained"},
}  # fmt: skip
TRAINING = {"train_loss": 0.1, "steps": 200, "pairs": 300}
GOOD = results(row(0.75, 0.7, 0.8))


def images(value: float) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    prompts = [SCRIPT, *(f"prompt {i} " + "long" * 30 for i in range(30))]
    scores = value + rng.random(len(prompts))
    return pd.DataFrame(
        {"prompt_id": prompts, "caption": prompts, "image": [buffer.getvalue()] * len(prompts), "gold_overall": scores}
    )


def page(result: dict[str, Any] = GOOD) -> str:
    summary = summarise(result, REWARD, TRAINING, None)
    drawing = svg(judges_plot(result["tuned_against_base"]["win_rates"]))
    figures = dict.fromkeys(("judges", "distributions", "training"), drawing)
    pictures = choose(images(0.0), images(0.1), "gold_overall")
    return render_page(result, summary, pictures, figures, REWARD, "world: shapes", {"data": "0"}, {"losses": "{}"})


def test_the_summary_holds_the_figures_of_its_inputs() -> None:
    summary = summarise(GOOD, REWARD, TRAINING, {"plain_head_macro_f1": 0.8})
    assert summary["evaluation"]["gold"]["ci95"] == [0.7, 0.8]
    assert summary["evaluation"]["fully_right"]["tuned"] == 0.6
    assert summary["evaluation"]["diversity_ratio"] == 0.95
    assert summary["reward_model"]["plain_head_macro_f1"] == 0.8
    assert summary["train"] == {"loss": 0.1, "steps": 200, "pairs": 300}


def test_gates_hold_for_good_figures_and_name_what_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = summarise(GOOD, REWARD, TRAINING, None)
    assert all(gate.holds for gate in gates(good))
    bad = summarise(results(row(0.65, 0.59, 0.7, decided=250)), REWARD | {"macro_f1": 0.8}, TRAINING, None)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(bad))
    assert gates_main([str(path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS")]
    assert len(failed) == 5 and "gold win rate" in failed[0]
    assert gates_main([str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (GOOD, "Improved by the gold judge: tuned beats base on 75.0% of 400"),
        (results(row(0.52, 0.47, 0.57)), "Not separable"),
        (results(row(0.4, 0.35, 0.45)), "Worse"),
        (
            results(row(0.4, 0.35, 0.45), over_optimised=True),
            "Over-optimised: the reward went up and the gold judge down",
        ),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(result: dict[str, Any], said: str) -> None:
    assert said in verdict(result)


def test_the_page_is_the_same_bytes_and_prompts_are_text() -> None:
    assert page() == page()
    assert SCRIPT not in page() and "&lt;script&gt;" in page()
    assert not any(f'{name}="http' in page() for name in ("src", "href", "action"))


@pytest.fixture(scope="session")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    raise pytest.fail.Exception("no Chromium here; `apt-get install chromium` brings it")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_a_wide_and_a_narrow_screen(chromium: str, width: int, tmp_path: Path) -> None:
    """The page in a frame of that width: a real browser window has a least width of its own."""
    (tmp_path / "page.html").write_text(page(), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"""<iframe src="page.html" width="{width}" height="900" onload="
        const d = this.contentDocument; document.title = [d.title, d.documentElement.scrollWidth,
        [...d.images].filter(i => i.naturalWidth === 8).length, d.querySelectorAll('svg').length]
        .join('|')"></iframe>"""
    )
    command = [chromium, *FLAGS, "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title, scroll_width, shown, drawings = dom.split("<title>")[1].split("</title>")[0].split("|")
    assert title == "DSPO report"
    assert int(scroll_width) <= width
    assert int(shown) == 48 and int(drawings) == 3
