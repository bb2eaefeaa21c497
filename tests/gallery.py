"""What holds of every page with image pairs, looked at in Chromium: the report's, and that of `dspo compare`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chromium import Browser, clean

ORDERS: dict[str, Callable[[float, float], float]] = {
    "gain": lambda first, second: first - second,
    "loss": lambda first, second: second - first,
    "near": lambda first, second: abs(second - first),
    "first": lambda first, _: -first,
    "second": lambda _, second: -second,
}
CARDS = """[...document.querySelectorAll('.pair')].map(card => ({
    first: card.dataset.first.split(' ').map(Number), second: card.dataset.second.split(' ').map(Number),
    shown: [...card.querySelectorAll('b')].map(b => b.textContent), visible: card.checkVisibility()}))"""
PARTED = "getComputedStyle(document.querySelectorAll('.pair img')[1]).clipPath"

# Every text that is drawn, against the nearest opaque ground behind it: WCAG 2's ratio of relative luminances.
FAINT = """(() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => {
        const [r, g, b] = parts(colour).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const opaque = colour => (parts(colour)[3] ?? 1) === 1;
    const ground = element => {
        for (let e = element; e; e = e.parentElement)
            if (opaque(getComputedStyle(e).backgroundColor)) return getComputedStyle(e).backgroundColor;
        throw new Error('no ground');
    };
    const seen = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement, style = getComputedStyle(element);
        if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest('script')) continue;
        const ink = element.closest('svg') ? style.fill : style.color;
        if (!opaque(ink) || style.opacity !== '1') throw new Error(`not opaque: ${texts.currentNode.data}`);
        const [one, other] = [light(ink), light(ground(element))].toSorted((a, b) => b - a);
        seen.push([texts.currentNode.data.trim(), ink, ground(element), (one + 0.05) / (other + 0.05)]);
    }
    return [seen.length, seen.filter(([, , , ratio]) => ratio < 4.5)];
})()"""


def assert_page(browser: Browser, page: Path) -> None:
    """One file that asks for nothing, with sliders for pointer and keys, every judge's order, and texts to be read."""
    assert page.stat().st_size < 5_000_000
    browser.open(page)
    slider(browser)
    orders(browser)
    for dark in (False, True):
        browser.open(page, dark=dark)
        browser.js("for (const details of document.querySelectorAll('details')) details.open = true")
        browser.js("document.querySelector('.pair input').focus()")  # its scores are texts too
        number, faint = browser.js(FAINT)
        assert number > browser.js("document.querySelectorAll('.pair').length") and not faint, faint
        assert clean(browser)


def slider(browser: Browser) -> None:
    """The first pair's: dragged there and back, then moved by keys from where the pointer left it."""
    browser.js("document.querySelector('.pair').scrollIntoView({behavior: 'instant', block: 'center'})")
    box = browser.js(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('.pair input').getBoundingClientRect())"
    )
    left, y, width = box[0], box[1] + box[3] / 3, box[2]
    assert cut(browser) == 50
    browser.drag((left + width / 2, y), (left + 0.2 * width, y))
    assert abs(cut(browser) - 20) <= 2
    browser.drag((left + 0.2 * width, y), (left + 0.9 * width, y))
    there = cut(browser)
    assert abs(there - 90) <= 2
    for key, step in (("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", -1)):
        browser.press(key)
        assert cut(browser) == there + step


def cut(browser: Browser) -> float:
    """Percent of the first picture, from the left, that show the first side."""
    return float(browser.js(PARTED).removesuffix("%)").split()[-1])


def orders(browser: Browser) -> None:
    """Both lists gone through by keys: each judge sorts by its own values, and shows them."""
    before = browser.js(CARDS)
    judges = browser.js("[...tools.elements.judge.options].map(option => option.text)")
    assert len(set(judges)) == len(judges) == len(before[0]["first"])
    for judge in range(len(judges)):
        for order, rank in ORDERS.items():
            choose(browser, "judge", str(judge))
            choose(browser, "order", order)
            cards = browser.js(CARDS)
            sides = [(card["first"][judge], card["second"][judge]) for card in cards]
            assert [rank(*side) for side in sides] == sorted(rank(*side) for side in sides), (judges[judge], order)
            assert all(card["visible"] for card in cards) and len(cards) == len(before)
            for card, side in zip(cards, sides, strict=True):
                assert [float(text) for text in card["shown"]] == pytest.approx(side, abs=1e-3)


def choose(browser: Browser, name: str, value: Any) -> None:
    """By arrow keys alone."""
    options = browser.js(f"[...tools.elements.{name}.options].map(option => option.value)")
    away = options.index(value) - browser.js(f"tools.elements.{name}.selectedIndex")
    browser.js(f"tools.elements.{name}.focus()")
    for _ in range(abs(away)):
        browser.press("ArrowDown" if away > 0 else "ArrowUp")
    assert browser.js(f"tools.elements.{name}.value") == value
