"""Chromium without a window, driven through its own protocol: real keys, real pointer, any width, light and dark."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
KEYS = {"Tab": 9, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
KEYS |= {"ArrowDown": 40}


class Browser:
    """One page; commands and answers are JSON ended by NUL, on the file descriptors 3 and 4 of the browser."""

    def __init__(self, profile: Path) -> None:
        names = ("chromium", "chromium-browser", "google-chrome")
        found = next((path for name in names if (path := shutil.which(name))), None)
        if found is None:
            raise pytest.fail.Exception("no Chromium here; `apt-get install chromium` brings it")
        (read, self._write), (self._read, write) = os.pipe(), os.pipe()
        command = [found, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        shell = ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", *command]
        self._process = subprocess.Popen(shell, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self._unread, self._number, self._session = b"", 0, {}
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self("Page.setLifecycleEventsEnabled", enabled=True)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come in between are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            part = os.read(self._read, 1 << 16)
            assert part, "Chromium ended"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        return dict(json.loads(message))

    def open(
        self, page: Path | str, width: int = 1280, height: int = 900, dark: bool = False, script: bool = True
    ) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Emulation.setScriptExecutionDisabled", value=not script)
        self.events.clear()
        loader = self("Page.navigate", url=page if isinstance(page, str) else page.as_uri())["loaderId"]
        loaded = {"name": "load", "loaderId": loader}  # the blank page's own load may be said late
        while not any(loaded.items() <= event.get("params", {}).items() for event in self.events):
            self.events.append(self._receive())

    def js(self, expression: str) -> Any:
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: int = 120) -> None:
        """Wait for what a page's script brings."""
        self.js(f"""new Promise((good, bad) => {{
            const look = () => {{ if ({expression}) good(); else setTimeout(look, 50); }};
            setTimeout(() => bad(new Error(document.body.innerText)), {1000 * seconds});
            look();
        }})""")

    def press(self, key: str) -> None:
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, **code)

    def type(self, text: str) -> None:
        self("Input.insertText", text=text)

    def click(self, text: str) -> None:
        """On what shows this text and no more; waits for it."""
        shown = f"e.innerText?.trim() === {json.dumps(text)} && e.checkVisibility()"
        found = f"[...document.querySelectorAll('*')].findLast(e => {shown})"
        self.until(f"window.clicked = {found}")
        self.js("window.clicked.click()")

    def point(self, x: float, y: float) -> None:
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        held = {"button": "left", "buttons": 1, "clickCount": 1}
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        for kind, (x, y) in (("Pressed", start), ("Moved", middle), ("Moved", end), ("Released", end)):
            self("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **held)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))


def clean(browser: Browser) -> bool:
    """Nothing failed in the page, and it asked for nothing but itself."""
    wrong = [event for event in browser.events if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    sent = [event for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    addresses = {event["params"]["request"]["url"].split(":")[0] for event in sent}
    return not wrong and addresses <= {"file", "data"}
