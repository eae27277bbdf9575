"""A headless Chromium for the tests of pages: what a page shows, logs and does with keys.

Speaks the DevTools protocol over `--remote-debugging-pipe`: JSON messages that end in a zero byte,
read by the browser from descriptor 3 and written to descriptor 4. No package, no port.
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
needs_chromium = pytest.mark.skipif(
    EXECUTABLE is None, reason="no Chromium here (Debian: apt-get install chromium); CI has one"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars "
    "--no-first-run --disable-extensions --disable-background-networking --remote-debugging-pipe"
).split()
PATIENCE = 60.0  # seconds for one answer, on a machine with other work
KEYS = {"Enter": 13, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
        "ArrowDown": 40, "Tab": 9, "Home": 36, "End": 35, "PageUp": 33, "PageDown": 34}  # fmt: skip


class Browser:
    """One Chromium with one tab. `problems` collects what the page logs as error or throws."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        assert EXECUTABLE is not None
        self.problems: list[str] = []
        self._loaded = False
        self._number = 0
        self._rest = b""
        self._home = tempfile.TemporaryDirectory(prefix="chromium-")
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [EXECUTABLE, *FLAGS, f"--user-data-dir={self._home.name}"]
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")
        self.resize(width, height)

    def resize(self, width: int, height: int) -> None:
        """The window's size, CSS pixels."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, page: Path) -> None:
        """Show a local file and wait until it is loaded."""
        self._loaded = False
        answer = self._ask("Page.navigate", url=page.resolve().as_uri())
        assert "errorText" not in answer, answer
        limit = time.monotonic() + PATIENCE
        while not self._loaded:
            self._read(limit)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page (promises are awaited)."""
        answer = self._ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release one key ("ArrowRight", "Enter", "n")."""
        code = KEYS.get(key, ord(key[0].upper()))
        named = {"key": key, "windowsVirtualKeyCode": code}
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self._ask("Input.dispatchKeyEvent", type="keyUp", **named)

    def point(self, selector: str, click: bool = False) -> None:
        """Move the mouse over the first element that matches, and click it if asked to."""
        box = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        at = {"x": box[0], "y": box[1]}
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", **at)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self._ask("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def screenshot(self, file: Path) -> None:
        """Write a PNG of what the window shows."""
        file.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """End the browser and remove its profile."""
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._home.name, ignore_errors=True)
        self._home._finalizer.detach()  # what a dying child still writes must not raise here

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        limit = time.monotonic() + PATIENCE
        while True:
            answer = self._read(limit)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]  # type: ignore[no-any-return]

    def _read(self, limit: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                raise TimeoutError(f"Chromium gave no answer for {PATIENCE:.0f} s")
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise RuntimeError(f"Chromium ended with code {self._process.wait()}")
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        event: dict[str, Any] = json.loads(message)
        self._note(event.get("method"), event.get("params", {}))
        return event

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(" ".join(str(one.get("value")) for one in params["args"]))
