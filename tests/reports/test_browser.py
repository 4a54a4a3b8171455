"""The report as a reader sees it, in a headless Chromium: it sorts, shows data points, and asks no network.

Needs Chromium and its driver (Debian: ``chromium`` and ``chromium-driver``), and selenium (``jensen[browser]``).
"""

import json
import shutil

import pytest
import torch

from jensen.families import FullCovariance, MeanField
from jensen.guides import ExactPosterior, PriorGuide, amortize
from jensen.inference import bounds, calibrate, compare
from jensen.models import PPCA
from jensen.networks import mlp
from jensen.reports import Report

pytestmark = pytest.mark.browser
SIZES = {"wide": (1400, 1000), "narrow": (420, 900)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    model = PPCA(16, latent=3)
    x = model(n=40).detach()
    guides = {name: amortize(model, mlp(16, [8]), family, context=8) for name, family in _FAMILIES.items()}
    pairs = {name: (model, guide) for name, guide in guides.items()}
    pairs |= {"prior": (model, PriorGuide(model)), "exact": (model, ExactPosterior(model))}
    table = compare(pairs, x, 100, seed=0, progress=False)
    curves = {name: bounds(model, guide, x, 64, seed=0, progress=False) for name, (_, guide) in pairs.items()}
    page = Report("Four guides of one model", data=x, image_shape=(4, 4)).add(table).bounds(curves, {})
    page.add(calibrate(model, guides["mean-field"], 100, seed=0, progress=False))
    page.images("Reconstructions", [((x[n], x[n]), f"#{n}") for n in range(4)])
    return page.write(tmp_path_factory.mktemp("report") / "report.html")


_FAMILIES = {"mean-field": MeanField, "full-covariance": FullCovariance}


@pytest.fixture(scope="module")
def chromium():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(params=SIZES)
def page(request, chromium, path):
    width, height = SIZES[request.param]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    chromium.get_log("performance")
    chromium.get(path.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []


def _cells(page, column):
    script = "return [...document.querySelector('table.sortable').tBodies[0].rows].map((r) => r.cells[%d].textContent)"
    return page.execute_script(script % column)


def _heading(page, name):
    buttons = page.find_elements("css selector", "table.sortable th button")
    return next((i, button) for i, button in enumerate(buttons, 1) if button.text.strip() == name)


def _hover(page, element):
    from selenium.webdriver import ActionChains

    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    ActionChains(page).move_to_element(element).perform()


def test_a_click_on_a_heading_sorts(page):
    column, button = _heading(page, "gap")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
    before = dict(zip(_cells(page, 0), _cells(page, column), strict=True))
    for order, reverse in (("descending", True), ("ascending", False)):
        button.click()
        gaps = [float(text.replace(",", "")) for text in _cells(page, column)]
        assert gaps == sorted(gaps, reverse=reverse)
        assert button.find_element("xpath", "..").get_attribute("aria-sort") == order
    assert dict(zip(_cells(page, 0), _cells(page, column), strict=True)) == before  # rows move as a whole


def test_a_heading_says_what_it_means(page):
    _, button = _heading(page, "k>0.7")
    _hover(page, button)
    tip = page.find_element("id", "tip")
    assert tip.is_displayed()
    assert "Pareto k-hat" in tip.text
    box = page.execute_script("return JSON.parse(JSON.stringify(arguments[0].getBoundingClientRect()))", tip)
    width = page.execute_script("return innerWidth")
    assert box["left"] >= 0
    assert box["right"] <= width


def test_a_mark_shows_its_data_point_and_rings_it_everywhere(page):
    figure = page.find_elements("css selector", "[data-points]")[0]
    points = json.loads(figure.get_attribute("data-points"))
    marks = figure.find_elements("css selector", 'g[id*="points"] use')
    assert len(marks) == len(points)
    items = json.loads(page.find_element("id", "items").get_attribute("textContent"))
    _hover(page, marks[7])
    tip = page.find_element("id", "tip")
    assert tip.is_displayed()
    assert tip.text in {items[place]["text"] for place in points}
    assert tip.find_elements("class name", "thumb")
    rings = page.find_elements("css selector", "[data-points] circle")
    assert len(rings) == len(page.find_elements("css selector", "[data-points]"))
    assert sum(ring.is_displayed() for ring in rings) >= len(rings) - 1  # an error of zero has no mark
    assert len(json.loads(page.find_elements("css selector", "[data-points]")[0].get_attribute("data-points"))) > 100


def test_nothing_is_asked_of_a_network_and_nothing_is_cut_off(page):
    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [
        message["params"]["request"]["url"] for message in asked if message["method"] == "Network.requestWillBeSent"
    ]
    assert sent
    assert all(url.startswith(("file:", "data:")) for url in sent), sent
    sizes = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert sizes[0] <= sizes[1]
    hidden = page.execute_script(
        "return [...document.querySelectorAll('figure svg, h2, .finding, .thumb')].filter((e) => {"
        "const b = e.getBoundingClientRect(); return b.width < 5 || b.right > innerWidth + 1 || b.left < 0; }).length"
    )
    assert hidden == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(page, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    colours = page.execute_script(
        "const s = (e) => getComputedStyle(e); const b = s(document.body).backgroundColor;"
        "return [b, s(document.body).color, s(document.querySelector('figcaption')).color,"
        "s(document.querySelector('figure svg text, figure svg [id*=text] path, figure svg use')).fill,"
        "s(document.querySelector('nav a')).color]"
    )
    ground, *others = (_luminance(colour) for colour in colours)
    assert (ground < 0.2) == (scheme == "dark")
    for other in others:
        light, dark = max(ground, other), min(ground, other)
        assert (light + 0.05) / (dark + 0.05) > 4.5, colours


def _luminance(colour):
    """Of the Web Content Accessibility Guidelines 2.2."""
    values = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_it_prints(page):
    import base64

    printed = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    pdf = base64.b64decode(printed)
    assert pdf.startswith(b"%PDF")
    assert 1 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") + pdf.count(b"/Type/Page\n") <= 12
