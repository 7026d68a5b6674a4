"""The web page: in a real browser (slow), and what needs none.

The browser is Chromium with its driver, on Debian: apt-get install chromium chromium-driver. docs/demo.png is what the
test saw:

  BLIP3O_SCREENSHOT=docs/demo.png bash launch/local.sh test --slow -k test_the_page_in_a_browser
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

import blip3o_jax
from blip3o_jax.apps import demo
from blip3o_jax.apps.buttons import Buttons
from blip3o_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = (
  "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
  "--disable-component-update --disable-sync --hide-scrollbars --window-size=1120,1000"
)


def test_what_is_missing_is_one_line(monkeypatch, tmp_path):
  # `run` sets it for the process, and gradio, once imported, goes on to use it.
  monkeypatch.setenv("GRADIO_TEMP_DIR", "")
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {port} .*; give another --host or --port"):
      demo.run("micro", "127.0.0.1", port)
  with pytest.raises(UserError, match="cannot listen on 256.0.0.1, port 0"):
    demo.run("micro", "256.0.0.1", 0)
  with pytest.raises(UserError, match="no such model"):
    demo.run("nowhere/at/all", "127.0.0.1", 0)
  monkeypatch.setitem(sys.modules, "gradio", None)  # an import of it now fails
  with pytest.raises(UserError, match=re.escape("the page needs Gradio: pip install 'blip3o_jax[demo]'")):
    demo.run("micro", "127.0.0.1", 0)


def test_the_page_takes_turns_and_starts_from_the_settings_of_the_model(tiny_directory, tmp_path):
  pytest.importorskip("gradio")
  blocks = demo.page(Buttons(blip3o_jax.load(tiny_directory), tmp_path))
  config = blocks.get_config_file()
  props = {part["props"].get("label"): part["props"] for part in config["components"]}
  assert props["Steps"]["value"] == 2 and props["Guidance"]["value"] == 3 and props["Seed"]["value"] == 0
  work = [event["id"] for event in config["dependencies"] if event["types"]["generator"]]
  assert [(blocks.fns[i].concurrency_id, blocks.fns[i].concurrency_limit) for i in work] == [("device", 1)] * 5
  assert not list(Path(demo.__file__).parent.glob("*.pyi"))  # gradio writes one beside whatever derives from its parts


@pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
def test_only_what_was_uploaded_is_read(tiny_directory, tmp_path, monkeypatch):
  """A request may name any path of the server; Gradio must not take it for an upload, copy it and serve the copy."""
  pytest.importorskip("gradio")
  client = pytest.importorskip("starlette.testclient").TestClient
  monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
  secret, mine = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
  secret.save(tmp_path / "secret.png")
  mine.save(tmp_path / "mine.png")
  blocks = demo.page(Buttons(blip3o_jax.load(tiny_directory), tmp_path / "cache"))
  reconstruct = [event["id"] for event in blocks.get_config_file()["dependencies"] if event["types"]["generator"]][-1]

  def status(path):
    picture = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
    asked = {"data": [picture, 0], "fn_index": reconstruct, "session_hash": path.stem}
    browser.post("/gradio_api/queue/join", json=asked).raise_for_status()
    with browser.stream("GET", f"/gradio_api/queue/data?session_hash={path.stem}") as lines:
      told = [json.loads(line.removeprefix("data: ")) for line in lines.iter_lines() if line]
    return json.dumps(told[-2]["output"])

  with client(demo._mounted(blocks)) as browser:
    assert "error" in status(tmp_path / "secret.png") and not list(tmp_path.glob("cache/*/secret.png"))
    with open(tmp_path / "mine.png", "rb") as file:
      (upload,) = browser.post("/gradio_api/upload", files={"files": file}).json()
    assert "Done" in status(Path(upload))


@pytest.fixture
def outside(monkeypatch):
  """A proxy that answers nobody: whatever the server wants from elsewhere knocks here."""
  with socket.create_server(("127.0.0.1", 0)) as proxy:
    proxy.setblocking(False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
      for spelled in (name, name.upper()):
        monkeypatch.setenv(spelled, f"http://127.0.0.1:{proxy.getsockname()[1]}")
    for name in ("no_proxy", "NO_PROXY"):
      monkeypatch.setenv(name, "127.0.0.1,localhost")
    yield proxy


@pytest.fixture
def browser(tmp_path):
  driver = shutil.which("chromedriver")
  binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
  if not (driver and binary):
    pytest.skip("there is no Chromium with its driver here: apt-get install chromium chromium-driver")
  webdriver = pytest.importorskip("selenium.webdriver")
  options = webdriver.ChromeOptions()
  options.binary_location = binary
  for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
    options.add_argument(flag)
  options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
  opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
  yield opened
  opened.quit()


@pytest.fixture
def server(outside, tmp_path):
  """The real server as a process, and its address."""
  pytest.importorskip("gradio")
  signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it, and so would the server
  words = [sys.executable, "-m", "blip3o_jax", "demo", "--model", "micro", "--port", "0"]
  with open(tmp_path / "stderr", "w") as errors:
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True)
  stuck = threading.Timer(300, process.kill)
  stuck.start()
  said = []
  for line in process.stdout:
    said.append(line)
    if address := re.match(r"open (http://127\.0\.0\.1:\d+) ", line):
      yield process, address[1]
      break
  stuck.cancel()
  process.kill()
  assert address, f"{said} {(tmp_path / 'stderr').read_text()}"


class Page:
  """What a person does with the page."""

  def __init__(self, browser):
    self.browser = browser

  def find(self, css):
    return self.browser.find_elements("css selector", css)

  def wait(self, css, words="", seconds=90):
    """The first that is there and says so."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      for found in self.find(css):
        if found.is_displayed() and words in found.text:
          return found
      time.sleep(0.1)
    raise AssertionError(f"{css} never said {words!r}: {[found.text for found in self.find(css)]}")

  def click(self, css, words=""):
    self.wait(css, words).click()

  def type(self, css, words):
    self.wait(css).send_keys(words)

  def hosts(self):
    """Of all requests over the network since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls += [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
    parsed = [urllib.parse.urlsplit(url) for url in urls]
    return {url.netloc for url in parsed if url.scheme in ("http", "https", "ws", "wss")}

  def phone(self):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def picture_of(page, path):
  """What the browser shows, in few bytes: flat colours need no more than a palette."""
  page.browser.save_screenshot(str(path))
  Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


@pytest.mark.slow
def test_the_page_in_a_browser(browser, server, outside, tmp_path):
  process, address = server
  page = Page(browser)
  browser.get(address)
  page.click("#draw")
  page.wait("#draw-status [role=alert]", "the prompt is empty; say what to draw")
  page.type("#prompt textarea", "a purple circle and an orange square")
  page.click(".label-wrap", "Settings")
  page.type("#steps input", "\ue009a\ue000-5")  # control-a, then over what was there
  page.click("#draw")
  page.wait("#draw-status [role=alert]", "steps are -5")
  page.type("#steps input", "\ue009a\ue00030")
  page.click(".label-wrap", "Settings")
  page.click("#draw")
  page.wait("#draw-status progress")
  page.wait("#draw-status", "4 pictures of seed 0 · ")
  pictures = page.find("#gallery .grid-wrap img")
  assert len(pictures) == 4 and all(picture.get_property("naturalWidth") == 64 for picture in pictures)
  drawn = browser.execute_async_script(
    "const done = arguments[1]; fetch(arguments[0]).then(r => r.arrayBuffer())"
    ".then(b => done(Array.from(new Uint8Array(b))))",
    pictures[0].get_property("src"),
  )
  file = tmp_path / "drawn.png"
  file.write_bytes(bytes(drawn))
  assert Image.open(file).text["prompt"] == "a purple circle and an orange square"
  if wanted := os.environ.get("BLIP3O_SCREENSHOT"):
    picture_of(page, Path(wanted))

  page.click("button[role=tab]", "Talk")
  page.find("#asked input[type=file]")[0].send_keys(str(file))
  page.wait("#asked .thumbnail-item, #asked [aria-label='Remove Image'], #asked img")
  page.type("#asked textarea", "what colour is the circle?")
  page.click("#say")
  page.wait("#talk-status", "Answered · ")
  page.wait("#chat .bot", "purple")
  page.click("#say")
  page.wait("#talk-status [role=alert]", "the message is empty; say something")
  page.type("#asked textarea", "a yellow circle")
  page.click("#draw-next")
  page.wait("#talk-status", "Drawn · ")
  assert len(page.find("#chat .bot img")) == 1 and len(page.find("#chat .user img")) == 1

  page.click("button[role=tab]", "Edit")
  page.type("#instruction input, #instruction textarea", "a yellow circle")
  page.click("#edit")
  page.wait("#edit-status [role=alert]", "there is no picture; choose one first")
  page.find("#picture input[type=file]")[0].send_keys(str(file))
  page.wait("#picture img")
  page.click("#edit")
  page.wait("#edit-status", "Done · ")
  page.wait("#edited img")

  page.phone()
  for tab in ("Draw", "Talk", "Edit"):
    page.click("button[role=tab]", tab)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390  # nothing sticks out
  assert page.hosts() == {urllib.parse.urlsplit(address).netloc}
  with pytest.raises(BlockingIOError):
    outside.accept()

  page.click("button[role=tab]", "Draw")
  page.click("#draw")
  page.wait("#draw-status progress")
  process.send_signal(signal.SIGINT)  # with the page open, in the midst of work
  assert process.wait(30) == 0
  assert "closed" in process.stdout.read() and (tmp_path / "stderr").read_text() == ""
