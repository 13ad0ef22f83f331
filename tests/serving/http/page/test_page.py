"""The page in Chromium, as its users meet it: what they see, by mouse, keyboard and on a phone."""

from __future__ import annotations

import io
import json
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from muntin.artifact import ClassInfo
from muntin.images import encode_png
from muntin.serving.server import Server
from muntin.serving.versions.rollout import Rollout
from muntin.serving.worker.opening import NotReadyError
from tensor_models import write_tensors

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

EVIL = "<img src=x onerror=document.title='owned'>"
CLASSES = tuple(
    ClassInfo(name=name, color=color) for name, color in (("sea", (30, 72, 130)), (EVIL, (46, 125, 80)), ("roof", (240, 220, 130)))
)
COLORS = np.array([entry.color for entry in CLASSES], np.float64)
HEIGHT, WIDTH = 24, 32
PICTURE = np.random.default_rng(5).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
LABELS = PICTURE.argmax(2)
SHARES = [f"{100 * share:.1f} %" for share in np.bincount(LABELS.ravel()) / LABELS.size]
ALL_ROOF = np.full_like(LABELS, 2)
DROP = """([name, bytes]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name));
  const type = name.startsWith('pasted') ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true})
    : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
  document.querySelector('#stage').dispatchEvent(type);
}"""

Open = Callable[..., Any]
Serve = Callable[..., Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "earth"
    write_pixels(folder / "1", classes=CLASSES)
    return folder


@pytest.fixture(scope="module")
def server(start_server: Any, folder: Path) -> Iterator[Server]:
    with start_server(folder) as server:
        yield server


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """`open_page(server, **context)`: the page. Fails at the end on errors of scripts, and on violations of the content security policy."""
    errors: list[str] = []
    contexts = []

    def opened(server: Server, **settings: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | settings))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.on("console", lambda line: errors.append(line.text) if "Failed to load resource" not in line.text else None)
        page.goto(f"http://127.0.0.1:{server.http_port}/")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def give(page: Any, name: str = "photo.png", content: bytes | None = None) -> None:
    """Drop a file on the page, or paste one whose name begins with "pasted"."""
    page.locator("#versions tr").first.wait_for()
    page.evaluate(DROP, [name, list(encode_png(PICTURE) if content is None else content)])


def text_of(page: Any, selector: str, pattern: str) -> str:
    """Wait until an element's text matches, and return the text."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(re.compile(pattern))
    return str(page.locator(selector).inner_text())


def seen(page: Any) -> NDArray[np.float64]:
    """The colours on the screen at the middle of each pixel of the picture."""
    pixels = np.array(Image.open(io.BytesIO(page.locator("#frame").screenshot())).convert("RGB"), np.float64)
    rows = ((np.arange(HEIGHT) + 0.5) * pixels.shape[0] / HEIGHT).astype(int)
    columns = ((np.arange(WIDTH) + 0.5) * pixels.shape[1] / WIDTH).astype(int)
    return np.asarray(pixels[np.ix_(rows, columns)])


def blended(opacity: float, labels: NDArray[Any] = LABELS) -> NDArray[np.float64]:
    return PICTURE * (1 - opacity) + COLORS[labels] * opacity


def legend(page: Any) -> dict[str, list[str]]:
    return {row.locator(".name").inner_text(): row.locator("b").all_inner_texts() for row in page.locator("#legend li").all()}


def change(server: Server, action: str, version: str) -> None:
    """Load or unload a version."""
    body = json.dumps({"parameters": {"version": version}}).encode()
    url = f"http://127.0.0.1:{server.http_port}/v2/repository/models/{server.slot.name}/{action}"
    urllib.request.urlopen(urllib.request.Request(url, body), timeout=60).close()


def test_overlay_and_legend(open_page: Any, server: Server, save_picture: Any) -> None:
    page = open_page(server)
    give(page)
    assert text_of(page, "#by", "version") == "version 1"
    np.testing.assert_allclose(seen(page), blended(0.6), atol=1.5)
    for opacity in ("0", "100", "25"):
        page.locator("#opacity").fill(opacity)
        np.testing.assert_allclose(seen(page), blended(int(opacity) / 100), atol=1.5)
    assert legend(page) == {entry.name: [share] for entry, share in zip(CLASSES, SHARES, strict=True)}
    for time in ("total", "compute", "wait", "round"):
        assert re.fullmatch(r"\d+\.?\d* m?s", page.locator(f"#time-{time}").inner_text())
    assert (page.title(), page.locator("main img").count()) == ("earth · muntin", 0)  # the name is no element
    page.locator("#legend label").filter(has_text="sea").click()  # is painted no more
    np.testing.assert_allclose(seen(page)[LABELS == 0], PICTURE[LABELS == 0], atol=1.5)
    np.testing.assert_allclose(seen(page)[LABELS != 0], blended(0.25)[LABELS != 0], atol=1.5)
    page.hover("#frame", position={"x": 3, "y": 3})
    assert text_of(page, "#readout", ".") == CLASSES[LABELS[0, 0]].name
    save_picture(page, "overlay")


def test_many_classes_and_large_labels(open_page: Any, start_server: Any, write_version: Any, signature_of: Any, tmp_path: Path) -> None:
    signature = signature_of(classes=tuple(f"class {number}" for number in range(300)))
    with start_server(write_version(tmp_path / "many", 299, signature=signature)) as server:  # labels of 16 bits
        page = open_page(server)
        give(page)
        text_of(page, "#absent", "288 more classes, without a pixel")
        assert legend(page)["class 299"] == ["100.0 %"]
        assert page.locator("#legend li").count() == 12


@pytest.fixture
def earth(write_pixels: Any, write_version: Any, signature_of: Any, tmp_path: Path) -> Path:
    """Version 1, and version 2 beside it, to be moved there: it says roof everywhere."""
    write_version(tmp_path / "next", 2, signature=signature_of().model_copy(update={"classes": CLASSES}))
    write_pixels(tmp_path / "earth" / "1", classes=CLASSES)
    return tmp_path / "earth"


def test_swap_and_comparison(open_page: Any, start_server: Any, earth: Path, save_picture: Any) -> None:
    with start_server(earth) as server:
        page = open_page(server)
        give(page)
        text_of(page, "#by", "version 1")
        (earth.parent / "next").rename(earth / "2")
        change(server, "load", "2")
        text_of(page, "#by", "version 2")  # the shown picture is computed again
        assert page.locator("#serving").inner_text() == "version 2 serves"
        assert legend(page)["roof"] == ["100.0 %"]
        np.testing.assert_allclose(seen(page), blended(0.6, ALL_ROOF), atol=1.5)
        rows = [row.inner_text().split() for row in page.locator("#versions tr").all()]
        assert [(row[0], row[1]) for row in rows] == [("2", "current,"), ("1", "previous:")]

        page.select_option("#version", "1")
        page.select_option("#against", "2")
        text_of(page, "#name-two", "version 2")
        assert page.locator("#name-one").inner_text() == "version 1"
        assert text_of(page, "#agreement", "Same") == f"Same class on {SHARES[2]} of the pixels"
        assert legend(page)["roof"] == [SHARES[2], "100.0 %"]
        divider = page.locator("#divider")
        divider.focus()
        for key, at in (("Home", 0), ("ArrowRight", 2), ("PageUp", 12), ("End", 100), ("ArrowLeft", 98), ("PageDown", 88)):
            divider.press(key)
            assert divider.get_attribute("aria-valuenow") == str(at)
        box = page.locator("#frame").bounding_box()
        page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.8 * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.8 * box["height"], steps=3)
        page.mouse.up()
        assert divider.get_attribute("aria-valuenow") == "25"
        colors, low = seen(page), slice(4, 10)  # rows below the names and above the handle
        np.testing.assert_allclose(colors[low, :7], blended(0.6)[low, :7], atol=1.5)
        np.testing.assert_allclose(colors[low, 9:], blended(0.6, ALL_ROOF)[low, 9:], atol=1.5)
        save_picture(page, "comparison")

        change(server, "unload", "1")
        text_of(page, "#version", r"1 \(kept answer\)")
        np.testing.assert_allclose(seen(page)[low, :7], blended(0.6)[low, :7], atol=1.5)


def test_candidate_loaded_again(open_page: Any, start_server: Any, write_version: Any, earth: Path, signature_of: Any) -> None:
    signature = signature_of().model_copy(update={"classes": CLASSES})
    rollout = Rollout(canary=0.001, for_seconds=600, for_requests=10_000)
    with ExitStack() as trials, start_server(earth, rollout=rollout) as server:
        page = open_page(server)
        give(page)
        text_of(page, "#by", "version 1")
        page.select_option("#against", "")
        for label, name in ((2, "roof"), (0, "sea")):
            path = write_version(earth.parent / f"says-{name}" / "2", label, signature=signature)
            trial = threading.Thread(target=on_trial, args=(server, path))
            trial.start()
            trials.callback(trial.join)
            text_of(page, "#versions tr:first-child", "candidate: canary 0%")
            page.select_option("#version", "2")
            text_of(page, "#by", "version 2")
            assert legend(page)[name] == ["100.0 %"]
            page.select_option("#version", "1")
            text_of(page, "#by", "version 1")
            change(server, "unload", "2")
            text_of(page, "#version", r"2 \(kept answer\)")


def on_trial(server: Server, path: Path) -> None:
    with suppress(NotReadyError):  # it is unloaded during its trial
        server.slot.load(path, path.name)


def test_folder_with_a_broken_file(open_page: Any, server: Server, tmp_path: Path, save_picture: Any) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "1.png").write_bytes(encode_png(PICTURE))
    (folder / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (folder / "more" / "10.png").write_bytes(encode_png(PICTURE[:, ::-1]))
    (folder / "notes.txt").write_text("no picture")
    page = open_page(server)
    page.locator("#versions tr").first.wait_for()
    page.set_input_files("#pick-folder", folder)
    text_of(page, "#progress", "^2 of 3 answered, 1 failed$")
    page.locator("#clear").click()
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})
    text_of(page, "#progress", "^2 of 3 answered, 1 failed$")
    text_of(page, "#live", r"^3 pictures: 2 answered, 1 failed\.$")
    names = [button.get_attribute("aria-label") for button in page.locator("#strip button").all()]
    assert [name.partition(":")[0] for name in names] == [
        "photos/1.png, answered", "photos/2.png, failed", "photos/more/10.png, answered"
    ]  # fmt: skip
    page.locator("#strip button").first.focus()
    page.keyboard.press("ArrowRight")
    assert "the picture" in text_of(page, "#failure", "damaged")
    assert page.locator("#by").inner_text() == "–"
    assert page.locator("#classes").is_hidden()
    save_picture(page, "broken")
    page.keyboard.press("End")
    text_of(page, "#by", "version 1")
    np.testing.assert_allclose(seen(page), blended(0.6)[:, ::-1], atol=1.5)
    assert page.locator("#failure").is_hidden()


def test_keyboard_alone(open_page: Any, server: Server) -> None:
    page = open_page(server)
    file = {"name": "a.png", "mimeType": "image/png", "buffer": encode_png(PICTURE)}
    page.on("filechooser", lambda chooser: chooser.set_files([file]))
    page.locator("#versions tr").first.wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pick-files"
    page.keyboard.press("Enter")
    text_of(page, "#by", "version 1")
    visited = []
    for _ in range(20):
        page.keyboard.press("Tab")
        place = page.evaluate("(e => [e.closest('[id]')?.id ?? '', getComputedStyle(e).outlineStyle])(document.activeElement)")
        if place[0] == "opacity" and page.locator("#opacity").input_value() == "60":
            page.keyboard.press("ArrowLeft")
        if place[0] == "against" and page.locator("#against").input_value() == "":
            page.keyboard.press("ArrowDown")
            page.locator("#divider").wait_for()
            page.keyboard.press("Shift+Tab")
        visited.append(place)
    assert {name for name, _ in visited} >= {"more", "clear", "strip", "version", "against", "opacity", "legend", "save", "divider"}
    assert {outline for name, outline in visited if name not in ("stage", "pick-files", "pick-folder", "")} <= {"solid", "auto"}
    assert page.locator("#opacity-value").inner_text() == "59 %"
    assert page.locator("#name-one").inner_text() == "picture"


def test_phone(open_page: Any, server: Server, save_picture: Any) -> None:
    page = open_page(server, viewport={"width": 360, "height": 740}, has_touch=True, reduced_motion="reduce")
    give(page, "a-very-long-name-of-a-file-that-does-not-fit-into-one-line-of-a-phone.png")
    text_of(page, "#by", "version 1")
    page.select_option("#against", "picture")
    text_of(page, "#name-two", "version 1")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    small = [
        box for box in (button.bounding_box() for button in page.locator("button:visible, select:visible").all()) if box["height"] < 40
    ]
    assert not small
    for scheme, color in (("light", "rgb(244, 246, 246)"), ("dark", "rgb(15, 21, 23)")):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == color
        save_picture(page, f"phone-{scheme}")


def test_security_policy_is_enforced(browser: Any, server: Server) -> None:
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.http_port}/")
    page.locator("#versions tr").first.wait_for()
    blocked = page.evaluate("""() => {
      const directives = [];
      document.addEventListener('securitypolicyviolation', (event) => directives.push(event.effectiveDirective));
      const script = Object.assign(document.createElement('script'), {textContent: 'window.ran = true'});
      document.body.append(script);
      document.body.insertAdjacentHTML('beforeend', '<p style="color: red" id="styled"></p>');
      const later = (done) => setTimeout(() => done([window.ran === true, directives]), 100);
      return fetch('http://127.0.0.1:9/').catch(() => new Promise(later));
    }""")
    page.close()
    assert blocked == [False, ["script-src-elem", "style-src-attr", "connect-src"]]


def test_token(open_page: Any, start_server: Any, write_pixels: Any, tmp_path: Path) -> None:
    with start_server(write_pixels(tmp_path / "closed", classes=CLASSES), tokens=("secret",)) as server:
        page = open_page(server)
        page.locator("#token-field").wait_for()
        assert page.evaluate("document.activeElement.id") == "token-field"
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        text_of(page, "#token-wrong", "does not take")
        page.locator("#token-field").fill("secret")
        page.keyboard.press("Enter")
        give(page)
        text_of(page, "#by", "version 1")
        assert page.locator("#token").is_hidden()
        page.reload()
        text_of(page, "#serving", "version 1 serves")
        page.locator("#forget").click()
        page.locator("#token-field").wait_for()
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [0, 0, ""]


def test_classifier(open_page: Any, start_server: Any, write_pixels: Any, tmp_path: Path, save_picture: Any) -> None:
    means = PICTURE.reshape(-1, 3).mean(0)
    weights = np.exp(means - means.max())
    with start_server(write_pixels(tmp_path / "classes", task="classify", classes=CLASSES)) as server:
        page = open_page(server)
        give(page)
        text_of(page, "#by", "version 1")
        listed = legend(page)
        assert list(listed) == [CLASSES[number].name for number in np.argsort(-weights)]
        for number, entry in enumerate(CLASSES):
            assert float(listed[entry.name][0].strip("< %")) == pytest.approx(100 * weights[number] / weights.sum(), abs=2)
        np.testing.assert_allclose(seen(page), PICTURE, atol=1.5)
        assert page.locator("#opacity").is_hidden()
        save_picture(page, "classifier")


def test_restoration(open_page: Any, start_server: Any, write_pixels: Any, tmp_path: Path, save_picture: Any) -> None:
    with start_server(write_pixels(tmp_path / "restore", task="restore", classes=())) as server:
        page = open_page(server)
        give(page)
        text_of(page, "#name-two", "version 1")
        assert page.locator("#name-one").inner_text() == "picture"  # before and after, by default
        colors = seen(page)[4:10]
        np.testing.assert_allclose(colors[:, :15], PICTURE[4:10, :15], atol=1.5)
        np.testing.assert_allclose(colors[:, 17:], PICTURE[4:10, 17:], atol=2.5)  # the model is the identity, in BF16
        assert page.locator("#classes").is_hidden()
        save_picture(page, "restoration")
        tiff = io.BytesIO()
        Image.fromarray(PICTURE).save(tiff, "TIFF")
        give(page, "photo.tif", tiff.getvalue())  # which the browser cannot show: the answer is shown alone, and whole
        text_of(page, "#file-size", "cannot show")
        text_of(page, "#by", "version 1")
        np.testing.assert_allclose(seen(page)[4:10], PICTURE[4:10], atol=2.5)


def test_objective_beside_the_latency(open_page: Any, start_server: Any, folder: Path, save_picture: Any) -> None:
    with start_server(folder, objective_ms=400) as server:
        page = open_page(server)
        give(page)
        text_of(page, "#by", "version 1")
        chart = page.locator("#charts figure").last
        chart.locator("b", has_text=re.compile(r"[0-9.]+ ms")).wait_for()
        assert chart.locator(".promise").inner_text() == "objective 400 ms"
        assert chart.locator("svg").get_attribute("aria-label").endswith("in 90 seconds; objective 400 ms")
        assert chart.locator(".aim").get_attribute("visibility") == "visible"
        assert 14 < float(chart.locator(".aim").get_attribute("y1")) < 83
        save_picture(page, "objective")


def test_pasted_picture_without_objective(open_page: Any, server: Server) -> None:
    page = open_page(server)
    give(page, "pasted.png")
    text_of(page, "#by", "version 1")
    assert legend(page) == {entry.name: [share] for entry, share in zip(CLASSES, SHARES, strict=True)}
    assert page.locator(".promise:visible").count() == 0
    assert {line.get_attribute("visibility") for line in page.locator(".aim").all()} == {"hidden"}


def test_polling_stops_in_a_hidden_tab(open_page: Any, server: Server) -> None:
    page = open_page(server)
    page.locator("#versions tr").first.wait_for()
    calls: list[str] = []
    page.on("request", lambda request: calls.append(request.url))
    hide = (
        "Object.defineProperty(document, 'hidden', {value: %s, configurable: true}); document.dispatchEvent(new Event('visibilitychange'))"
    )
    with page.expect_request("**/page/status"):
        pass
    page.evaluate(hide % "true")
    page.wait_for_timeout(200)
    calls.clear()
    page.wait_for_timeout(1500)
    assert calls == []
    with page.expect_request("**/page/status"):
        page.evaluate(hide % "false")


def test_named_tensors(open_page: Any, start_server: Any, tmp_path: Path) -> None:
    with start_server(write_tensors(tmp_path / "encoder").path) as server:
        page = open_page(server)
        assert "named tensors" in text_of(page, "#invitation", "tensors")
        assert page.locator("#pick").is_hidden()
        give(page)
        text_of(page, "#live", "takes no pictures")
        assert page.locator("#panel").is_hidden()
