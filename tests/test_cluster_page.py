# Copyright 2026 The clusterformer-hf team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The page that shows an image's clusters: its data, its texts, and the page itself in a real browser."""

import base64
import fcntl
import json
import os
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as pictures

from clusterformer_hf import ClusterFormerConfig, ClusterFormerForObjectDetection, ClusterFormerModel
from clusterformer_hf.cluster_iterations import StageIterations, trace_clusters
from clusterformer_hf.cluster_page import FoundObject, cluster_page
from clusterformer_hf.visualization import box_assignment


NANO = {
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 2, 1, 1],
    "num_attention_heads": [1, 2, 2, 2],
    "mlp_ratios": [2, 2, 2, 2],
    "center_grid": [3, 3, 2, [2, 3]],
    "sr_ratios": [2, 1, 1, 1],
    "decoder_hidden_size": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "initializer_range": 0.3,
}
EVIL = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">&amp;"


def picture(width: int = 160, height: int = 96) -> Image.Image:
    return Image.fromarray(pictures.chelsea()).resize((width, height))


def pixel_values(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(scope="module")
def traced():
    torch.manual_seed(0)
    model = ClusterFormerForObjectDetection(ClusterFormerConfig(**NANO)).eval()
    return trace_clusters(model, {"pixel_values": pixel_values(picture())})


# ---- the iterations --------------------------------------------------------------------------------------------------


def test_iterations_lead_to_the_models_assignments(traced):
    outputs, stages = traced
    assert len(stages) == 4
    for stage, assignments in zip(stages, outputs.cluster_assignments, strict=True):
        assert stage.assignments.shape == (4, *assignments.shape[1:])
        torch.testing.assert_close(stage.assignments[-1], assignments[0])
        torch.testing.assert_close(stage.assignments.sum(dim=2), torch.ones(4, *stage.assignments[0, :, 0].shape))
        assert stage.assignments.diff(dim=0).abs().amax(dim=(1, 2, 3, 4)).min() > 0.01


def test_places_start_at_the_cells(traced):
    _, stages = traced
    rows, columns = torch.meshgrid(torch.tensor([1, 3, 5]) / 6, torch.tensor([1, 3, 5]) / 6, indexing="ij")
    cells = torch.stack([rows.flatten(), columns.flatten()], dim=-1)
    torch.testing.assert_close(stages[0].places[0, 0], cells)
    assert all(stage.places.shape[1:] == (*stage.assignments.shape[1:3], 2) for stage in stages)
    assert (stages[0].places[1] - cells).abs().max() > 0.01
    assert all((0 <= stage.places).all() and (stage.places <= 1).all() for stage in stages)


def test_a_padded_image_is_as_alone():
    model = ClusterFormerModel(ClusterFormerConfig(**NANO)).eval()
    values, mask = torch.randn(2, 3, 72, 100), torch.ones(2, 72, 100)
    mask[1, 40:], mask[1, :, 61:] = 0, 0
    _, padded = trace_clusters(model, {"pixel_values": values, "pixel_mask": mask}, index=1)
    _, alone = trace_clusters(model, {"pixel_values": values[1:, :, :40, :61]})
    for one, other in zip(padded, alone):
        kept = ~one.places[0, 0].isnan().any(dim=-1)  # the larger image has more centres
        assert kept.sum() == other.places.shape[2]
        torch.testing.assert_close(one.assignments[:, :, kept], other.assignments, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.places[:, :, kept], other.places, atol=1e-5, rtol=1e-5)


def test_released_form_and_other_models():
    config = ClusterFormerConfig(**NANO | {"sr_ratios": None}, clustering="release")
    outputs, stages = trace_clusters(ClusterFormerModel(config).eval(), {"pixel_values": torch.randn(1, 3, 64, 96)})
    for stage, assignments in zip(stages, outputs.cluster_assignments):
        torch.testing.assert_close(stage.assignments[-1], assignments[0])
        used = stage.assignments.sum(dim=(-2, -1)) > 0
        assert (stage.places.isnan().any(dim=-1) == ~used).all()
    with pytest.raises(ValueError, match="There is no ClusterFormer in Linear"):
        trace_clusters(torch.nn.Linear(1, 1), {})


# ---- the page's data -------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page: their tags, and the text of scripts by id."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.scripts, self.texts, self.attributes, self.open = [], {}, [], [], (None, None)
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.open = tag, dict(attributes).get("id")

    def handle_data(self, text):
        self.texts.append((self.open[0], text))
        if self.open[0] == "script" and text.strip():
            self.scripts[self.open[1]] = text


def unpack(text: str, dtype, *shape) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(shape)


@pytest.fixture(scope="module")
def page(traced) -> str:
    outputs, stages = traced
    left, right = (np.arange(160)[None].repeat(96, axis=0) < 60), (np.arange(160)[None].repeat(96, axis=0) >= 110)
    objects = [
        FoundObject("cat 0.91", 2, box_assignment(outputs, 0, 2), (250, 120, 10), box=[0.45, 0.2, 0.65, 0.9]),
        FoundObject(EVIL, 4, box_assignment(outputs, 0, 4), (10, 250, 120), mask=left),
        FoundObject("dog 0.50", 1, box_assignment(outputs, 0, 1), (10, 120, 250), mask=right),
    ]
    return cluster_page(picture(), stages, objects, title=f"photo {EVIL}")


def test_data_of_the_page(page, traced):
    outputs, stages = traced
    data = json.loads(Elements(page).scripts["data"])
    assert data["iterations"] == 3 and len(data["stages"]) == 4 and len(data["colours"]) == 9
    for stage, written in zip(stages, data["stages"]):
        steps, heads, clusters, height, width = stage.assignments.shape
        kept = min(3, clusters)
        expected, winners = stage.assignments.numpy(), stage.assignments.topk(kept, dim=2).indices.numpy()
        shape = (steps, heads, kept, height, width)
        assert [written[name] for name in ("heads", "kept", "height", "width", "num_clusters", "step")] == [
            heads, kept, height, width, clusters, 1,
        ]  # fmt: skip
        np.testing.assert_array_equal(unpack(written["clusters"], "<u2", *shape), winners)
        shares = unpack(written["shares"], "u1", *shape) / 255
        np.testing.assert_allclose(shares, np.take_along_axis(expected, winners, axis=2), atol=0.51 / 255)
        np.testing.assert_array_equal(unpack(written["places"], "<f4", steps, heads, clusters, 2), stage.places)
    box, mask, _ = data["objects"]
    heat = unpack(box["heat"]["values"], "u1", box["heat"]["height"], box["heat"]["width"]) / 255
    np.testing.assert_allclose(heat, box_assignment(outputs, 0, 2), atol=0.51 / 255)
    assert box["box"] == [0.45, 0.2, 0.65, 0.9] and box["query"] == 2 and box["kind"] == "box"
    shown = unpack(mask["mask"]["values"], "u1", mask["mask"]["height"], mask["mask"]["width"])
    np.testing.assert_array_equal(shown, np.arange(160)[None, ::2].repeat(48, axis=0) < 60)  # every second pixel
    assert mask["area"] == pytest.approx(60 / 160)


def test_large_pictures_make_no_large_pages():
    weights = torch.rand(4, 2, 100, 200, 300).softmax(dim=2)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (800, 1200, 3), np.uint8))
    large = cluster_page(noise, [StageIterations(weights, torch.rand(4, 2, 100, 2))])
    (stage,) = json.loads(Elements(large).scripts["data"])["stages"]
    assert stage["step"] == 3 and (stage["height"], stage["width"]) == (67, 100) and stage["map_size"] == [200, 300]
    clusters = unpack(stage["clusters"], "<u2", 4, 2, 3, 67, 100)
    np.testing.assert_array_equal(clusters[:, :, 0], weights[..., ::3, ::3].argmax(dim=2))
    assert len(large) < 2**20


def test_texts_stay_texts(page):
    """No element but those of the template, whatever labels and titles say, and one script that may run."""
    elements = Elements(page)
    assert elements.tags.count("script") == 2 and "img" not in elements.tags
    assert ("title", f"photo {EVIL}") in elements.texts and ("h1", f"photo {EVIL}") in elements.texts
    assert json.loads(elements.scripts["data"])["objects"][1]["text"] == EVIL
    assert "<" not in elements.scripts["data"]
    (policy,) = (value for _, name, value in elements.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
    assert "script-src 'unsafe" not in policy and "'unsafe-eval'" not in policy
    assert not re.search(r"https?://", page)


def test_an_object_has_one_shape(traced):
    heat = np.zeros((2, 2))
    for shape in ({}, {"box": [0, 0, 1, 1], "mask": heat > 0}):
        with pytest.raises(ValueError, match="either a box or a mask: 'cat'"):
            FoundObject("cat", 0, heat, (0, 0, 0), **shape)


# ---- in a browser ----------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium, driven through its DevTools protocol over two pipes."""

    def __init__(self, command: str, folder):
        (commands, self.to_child), (self.from_child, answers) = os.pipe(), os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={folder}", "--window-size=1200,800", "about:blank"]
        # The browser reads commands from file descriptor 3 and answers to 4.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        self.process = subprocess.Popen(
            [command, *flags],
            preexec_fn=lambda: [os.dup2(end, target) for target, end in enumerate(high, start=3)],
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *high):
            os.close(end)
        self.number, self.rest, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to_child, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            chunk = os.read(self.from_child, 2**20)
            assert chunk, "the browser has ended"
            self.rest += chunk
        text, self.rest = self.rest.split(b"\0", 1)
        return json.loads(text)

    def evaluate(self, script: str):
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        ready = "document.documentElement.dataset.ready"
        poll = f"new Promise(done => {{ const look = () => {ready} ? done(1) : setTimeout(look, 20); look(); }})"
        while self.evaluate("location.href") != path.as_uri() and not self.evaluate(f"{ready} ?? ''"):
            pass  # the address gets its fragment when the page is ready
        self.evaluate(poll)

    def mouse(self, x: float, y: float, *kinds: str):
        """Mouse events at a place of the picture, in shares of its sides."""
        box = "(({left, top, width, height}) => [left, top, width, height])(canvas.getBoundingClientRect())"
        left, top, width, height = self.evaluate(box)
        for kind in kinds:
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=left + x * width, y=top + y * height, **button)

    def press(self, element: str, key: str):
        self.evaluate(f"document.getElementById({element!r}).focus()")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        os.close(self.to_child)
        os.close(self.from_child)


KEYS = {"ArrowLeft": 37, "ArrowRight": 39}
SHARES = "[...document.querySelectorAll('.share')].map(row => [row.dataset.cluster, row.dataset.share])"


@pytest.fixture(scope="module")
def browser(tmp_path_factory, page):
    command = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if command is None:
        pytest.skip("Chromium is not installed (apt-get install chromium): the page was not looked at in a browser.")
    version = subprocess.run([command, "--version"], capture_output=True, text=True)
    if version.returncode != 0:
        pytest.skip(f"{command} does not start: {version.stderr.strip()[-200:]}")
    folder = tmp_path_factory.mktemp("browser")
    (folder / "page.html").write_text(page, "utf-8")
    browser = Browser(command, folder / "profile")
    browser.file = folder / "page.html"
    yield browser
    browser.close()


@pytest.fixture
def opened(browser) -> Browser:
    browser.events.clear()
    browser.open(browser.file)
    return browser


def expected_shares(stage: StageIterations, iteration: int, head: int, row: int, column: int) -> list[list[str]]:
    shares, clusters = stage.assignments[iteration, head, :, row, column].topk(3)
    shares = (shares * 255).round() / 255
    return [[str(k), f"{share:.2f}"] for k, share in zip(clusters.tolist(), shares.tolist()) if share > 0]


def test_pointing_and_sliders(opened, traced):
    """The pixel under the pointer is read in every stage, head and iteration that the sliders are moved to."""
    _, stages = traced
    opened.mouse(0.53, 0.3, "mouseMoved")
    assert opened.evaluate(SHARES) == expected_shares(stages[3], 3, 0, int(0.3 * 3), int(0.53 * 5))
    opened.press("stage", "ArrowLeft")
    opened.press("stage", "ArrowLeft")
    assert opened.evaluate("$('stage-text').textContent") == "2 of 4"
    assert opened.evaluate(SHARES) == expected_shares(stages[1], 3, 0, int(0.3 * 12), int(0.53 * 20))
    opened.press("head", "ArrowRight")
    for _ in range(3):
        opened.press("iteration", "ArrowLeft")
    assert opened.evaluate("$('head-text').textContent + $('iteration-text').textContent") == "2 of 20 of 3"
    opened.mouse(0.12, 0.8, "mouseMoved")
    assert opened.evaluate(SHARES) == expected_shares(stages[1], 0, 1, int(0.8 * 12), int(0.12 * 20))
    first_head = opened.evaluate("location.hash")
    assert "stage=2" in first_head and "head=2" in first_head and "iteration=0" in first_head


def canvas_pixel(browser, x: float, y: float) -> list[int]:
    at = f"Math.floor({x} * canvas.width), Math.floor({y} * canvas.height)"
    return browser.evaluate(f"[...context.getImageData({at}, 1, 1).data]")[:3]


def test_colours_of_the_picture(opened, traced):
    """At full opacity a pixel has its cluster's colour, as strong as its share; a stage further it has another."""
    _, stages = traced
    opened.evaluate("$('opacity').value = 100; $('opacity').dispatchEvent(new Event('input')); update({pixel: null})")
    original = np.asarray(picture()).astype(float)
    colours = json.loads(opened.evaluate("JSON.stringify(data.colours)"))
    for number, (x, y) in ((4, (0.9, 0.75)), (1, (0.1, 0.1))):
        opened.evaluate(f"update({{stage: {number}}})")
        weights = stages[number - 1].assignments[-1, 0]
        share, cluster = weights[:, int(y * weights.shape[1]), int(x * weights.shape[2])].max(dim=0)
        strength = 0.25 + 0.75 * float(share)
        below = original[int(y * 96), int(x * 160)]
        expected = strength * np.array(colours[cluster]) + (1 - strength) * below
        assert np.abs(canvas_pixel(opened, x, y) - expected).max() < 12  # the enlarged picture is no copy


def test_objects_and_their_assignments(opened, traced):
    """A click into a box shows its assignment, and from there its cluster in the last stage; masks are clicked too."""
    outputs, _ = traced
    assert opened.evaluate("[...document.querySelectorAll('#objects button')].map(b => b.textContent)")[0] == "cat 0.91"
    opened.mouse(0.5, 0.5, "mouseMoved", "mousePressed", "mouseReleased")
    assert opened.evaluate("$('reading').textContent").startswith("cat 0.91box of centre 2:")
    heat = box_assignment(outputs, 0, 2)
    hottest, coldest = (np.unravel_index(heat.argsort(axis=None)[rank], heat.shape) for rank in (-1, 0))
    red = []
    for row, column in (hottest, coldest):
        pixel = canvas_pixel(opened, (column + 0.5) / heat.shape[1], (row + 0.5) / heat.shape[0])
        red.append(pixel[0] + pixel[1] - pixel[2])
    assert red[0] > red[1] + 100  # yellow
    opened.evaluate("$('origin').click()")
    assert opened.evaluate("[state.stage, state.cluster, state.object]") == [4, 2, None]
    opened.mouse(0.9, 0.5, "mouseMoved", "mousePressed", "mouseReleased")
    assert opened.evaluate("$('reading').textContent").startswith("dog 0.50mask of centre 1:")
    opened.mouse(0.8, 0.05, "mouseMoved", "mousePressed", "mouseReleased")
    assert opened.evaluate("state.object") is None  # inside the same mask: a second click lets it go


def test_centres_paths_are_drawn(opened):
    before = opened.evaluate("update({pixel: null}); canvas.toDataURL()")
    opened.evaluate("$('paths').click()")
    assert opened.evaluate("canvas.toDataURL()") != before
    opened.evaluate("$('paths').click()")
    assert opened.evaluate("canvas.toDataURL()") == before


def test_an_address_leads_to_what_it_shows(opened):
    opened.evaluate("location.hash = 'stage=1&head=9&iteration=2&pixel=0.2,0.4&object=7&cluster=none'")
    opened.evaluate("new Promise(done => setTimeout(done, 100))")
    assert opened.evaluate("[state.stage, state.head, state.iteration, state.object]") == [1, 1, 2, None]
    assert opened.evaluate("state.pixel") == [0.2, 0.4]


def test_the_address_is_not_written_as_the_pointer_moves(opened):
    opened.evaluate("window.written = 0; history.replaceState = () => written++")
    for place in (0.2, 0.4, 0.6):
        opened.mouse(place, 0.05, "mouseMoved")
    assert opened.evaluate("[written, state.pixel != null]") == [0, True]
    opened.evaluate("update({stage: 1})")
    assert opened.evaluate("written") == 1
    opened.evaluate("delete history.replaceState")


def test_labels_are_texts_and_nothing_is_fetched(opened):
    assert opened.evaluate("document.title") == f"photo {EVIL}"
    assert opened.evaluate("document.querySelectorAll('#objects button')[1].textContent") == EVIL
    opened.mouse(0.1, 0.9, "mouseMoved", "mousePressed", "mouseReleased")
    assert opened.evaluate("$('reading').firstChild.textContent") == EVIL
    assert opened.evaluate("[document.images.length, document.scripts.length]") == [0, 2]
    requests = [
        event["params"]["request"]["url"]
        for event in opened.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert requests and all(url.startswith(("file:///", "data:")) for url in requests)
    assert not [event for event in opened.events if event.get("method") == "Runtime.exceptionThrown"]


def test_screenshot(opened, tmp_path):
    """Picture and controls side by side, drawn as a person sees them."""
    opened.mouse(0.5, 0.1, "mouseMoved")
    shot = tmp_path / "page.png"
    shot.write_bytes(base64.b64decode(opened.call("Page.captureScreenshot")["data"]))
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    left, right = pixels[60:400, 40:600], pixels[60:400, 860:1180]
    assert left.std(axis=(0, 1)).min() > 20 and (right.min(axis=2) < 80).any()
    assert (right.reshape(-1, 3).min(axis=1) > 200).mean() > 0.5  # a light panel with dark letters
