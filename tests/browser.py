"A real Chromium for tests, spoken to in its own protocol over a WebSocket"
import base64
import json
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import free_port, get, until
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Page:
    "A page that is open; what it asks for, and what its console says"

    def __init__(self, socket):
        self.socket, self.number = socket, 0
        self.requests, self.console, self.times = [], [], {}
        for each in ("Page", "Runtime", "Network", "Log"): self.call(f"{each}.enable")

    def take(self, message):
        "Remember what is of interest of an event"
        given = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent": self.requests.append(given["request"]["url"])
        if message.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.console.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        if message.get("method") == "Runtime.exceptionThrown":
            self.console.append(json.dumps(given["exceptionDetails"]))
        if message.get("method") == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.console.append(json.dumps(given["args"]))

    def call(self, method, **given):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": given}))
        while True:
            message = json.loads(self.socket.recv(timeout=20))
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.take(message)

    def js(self, text):
        "The value of an expression"
        found = self.call("Runtime.evaluate", expression=text, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{text}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, text, seconds=15.): return until(lambda: self.js(text), seconds)

    def key(self, name, text="", modifiers=0): # 8: shift
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}[name]
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, modifiers=modifiers,
                      code={" ": "Space"}.get(name, name), **more)

    def press(self): self.key("Enter", "\r")
    def type(self, text): self.call("Input.insertText", text=text)

    def drawn(self): self.js("new Promise(go => requestAnimationFrame(() => requestAnimationFrame(go)))")

    def size(self, width, height=900):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Emulation.setScrollbarsHidden", hidden=True) # a picture has none, and would be laid out anew for it
        self.drawn()

    def scheme(self, name):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])
        self.drawn()

    def picture(self, path, whole=True):
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser():
    "A page of a browser; skipped where there is none"
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if not program: pytest.skip("no browser is installed: apt-get install chromium")
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        running = subprocess.Popen([program, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                                    "--disable-dev-shm-usage", "--disable-background-networking",
                                    f"--remote-debugging-port={port}", f"--user-data-dir={folder}", "about:blank"],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            found = until(lambda: [each for each in json.loads(get(f"http://127.0.0.1:{port}/json"))
                                   if each["type"] == "page"], 30.)
            with connect(found[0]["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket: yield Page(socket)
        finally:
            running.terminate()
            running.wait(10)
