"""Pages seen by a real browser without a window: what it draws, prints on its console, requests, and its DOM."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = (
    "--headless", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
    "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=2000", "--window-size=1000,1400",
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser on PATH: {', '.join(NAMES[:3])}")


@dataclass(frozen=True)
class Seen:
    """A page as the browser saw it."""

    picture: np.ndarray  # [height, width, colours], 0 to 1
    console: list[str]  # what it printed, errors among it
    requests: list[str]  # addresses that the page asked for, its own file left out
    dom: str  # the page after its scripts

    @property
    def colours(self) -> int:
        """How many colours the picture has; a blank page has one."""
        return len(np.unique((self.picture[..., :3] * 255).astype(np.int64) @ (65536, 256, 1)))


def see(page: Path, folder: Path, address: str = "") -> Seen:
    """Opens the file in the browser; `address` is what follows the file's name, like #layer-1."""
    assert BROWSER is not None
    picture, log = folder / "seen.png", folder / "requests.json"
    picture.unlink(missing_ok=True)
    root = ("--no-sandbox",) if os.getuid() == 0 else ()  # the browser has no sandbox for root
    wanted = (f"--log-net-log={log}", f"--screenshot={picture}", "--dump-dom", f"{page.as_uri()}{address}")
    command = [BROWSER, *OPTIONS, *root, f"--user-data-dir={folder / 'profile'}", *wanted]
    done = subprocess.run(command, capture_output=True, timeout=120)
    said = done.stderr.decode("utf-8", "replace")
    assert picture.exists(), said[-2000:]
    console = [line for line in said.splitlines() if ":CONSOLE" in line]
    return Seen(imread(picture), console, _requests(log), done.stdout.decode("utf-8"))


def _requests(log: Path) -> list[str]:
    """The addresses in the browser's log that a page asked for, and not the browser for itself."""
    text = log.read_text(encoding="utf-8").rstrip()
    try:
        events = json.loads(text)["events"]
    except json.JSONDecodeError:  # the browser was ended before it closed the list
        events = json.loads(f"{text.rstrip(',')}]}}")["events"]
    asked = [each["params"] for each in events if {"initiator", "url"} <= each.get("params", {}).keys()]
    return [each["url"] for each in asked if each["initiator"] != "not an origin"]
