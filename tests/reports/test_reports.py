"""Reports: one file that holds everything, whose marks, rows and headings say what they stand for."""

import json
import re
import warnings
from html.parser import HTMLParser

import pytest
import torch
from members import pair
from one_of_each import one_of_each, some_evidence

from jensen.guides import ExactPosterior, PriorGuide
from jensen.inference import Comparison, MCMCConvergenceWarning, Row, bounds, compare, evaluate, mcmc_posterior
from jensen.models import PPCA
from jensen.reports import Report
from jensen.reports.meanings import meaning_of
from jensen.reports.page import Thumbnails, grid_of

KINDS = range(16)
_LOADS = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}


class _Page(HTMLParser):
    """Tags, addresses, headings and marks of a page."""

    def __init__(self, text):
        super().__init__()
        self.text, self.addresses, self.points, self.marks, self.tags, self._inside = text, [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.addresses += [value for key, value in found.items() if key in _LOADS]
        if tag == "figure" and "data-points" in found:
            self.points.append(json.loads(found["data-points"]))
            self.marks.append(0)
            self._inside = False
        if tag == "g" and "points" in found.get("id", ""):
            self._inside = True
        elif tag == "g":
            self._inside = self._inside and "clip-path" in found
        if tag == "use" and self._inside:
            self.marks[-1] += 1

    @property
    def items(self):
        return json.loads(re.search(r'<script type="application/json" id="items">(.*?)</script>', self.text, re.S)[1])


@pytest.fixture(scope="module")
def results():
    return one_of_each()


@pytest.mark.parametrize("kind", KINDS)
def test_every_result_writes_a_page_that_loads_nothing(results, kind, tmp_path):
    path = results[kind].to_html(tmp_path / "folder" / "page.html", title="What <was> found & why")
    page = _Page(path.read_text(encoding="utf-8"))
    assert "<title>What &lt;was&gt; found &amp; why</title>" in page.text
    assert all(address.startswith(("#", "data:")) for address in page.addresses), page.addresses
    assert not re.search(r"url\((?!#|data:)|@import|\bfetch\(|XMLHttpRequest", page.text)
    table = results[kind]._table()
    for name in [*table.columns, *(row[0] for row in table.rows), *(name for name, _ in table.facts)]:
        assert name.strip() in page.text.replace("&gt;", ">").replace("&lt;", "<").replace("&#34;", '"'), name
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_posterior_samples_write_a_page_too(tmp_path):
    model, _, x = pair("PPCA", "MeanField")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MCMCConvergenceWarning)
        found = mcmc_posterior(model, x[:2], draws=20, warmup=20, chains=2, seed=0, progress=False)
    assert "<table" in found.to_html(tmp_path / "page.html").read_text()


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    model = PPCA(16, latent=2)
    x = model(n=30).detach()
    return model, x, {"exact": (model, ExactPosterior(model)), "prior": (model, PriorGuide(model))}


def test_marks_stand_for_their_data_points(digits, tmp_path):
    model, x, _ = digits
    evidence = evaluate(model, ExactPosterior(model), x, 50, seed=0, progress=False)
    page = _Page(evidence.to_html(tmp_path / "page.html", data=x, image_shape=(4, 4)).read_text())
    assert page.points
    assert page.marks == [len(points) for points in page.points]
    for points in page.points:
        texts = [page.items[place]["text"] for place in points]
        assert {text.splitlines()[0].split(",")[0] for text in texts} <= {f"#{n}" for n in range(30)}
        assert all(page.items[place]["image"] is not None for place in points)
    for item in page.items:
        n = int(item["text"][1:].split()[0].strip(","))
        assert f"log p(x) {float(evidence.best[n]):.4g}," in item["text"]
        assert f"gap {float(evidence.gap[n]):.4g}" in item["text"]


def test_rows_of_a_table_are_said_by_the_names_of_its_columns(digits, tmp_path):
    model, x, _ = digits
    evidence = evaluate(model, ExactPosterior(model), x, 50, seed=0, progress=False)
    columns = [f"sensor {i}" for i in range(16)]
    path = Report("rows", data=x, columns=columns).add(evidence).write(tmp_path / "page.html")
    page = _Page(path.read_text())
    item = next(item for item in page.items if item["text"].startswith("#3"))
    assert f"sensor 2 {float(x[3, 2]):.4g}" in item["text"]
    assert "(16 in all)" in item["text"]
    assert item["image"] is None


def test_the_thumbnails_are_the_images(digits):
    import base64
    import io

    from matplotlib import image

    x = torch.linspace(0, 1, 5 * 6).reshape(5, 6)
    thumbnails = Thumbnails((2, 3))
    assert thumbnails.add(x[:2]) + thumbnails.add(x[2:]) == [0, 1, 2, 3, 4]
    drawn = image.imread(io.BytesIO(base64.b64decode(thumbnails.uri.partition(",")[2])))[..., 0]
    for n in range(5):
        row, column = divmod(n, thumbnails.columns)
        tile = drawn[row * 2 : row * 2 + 2, column * 3 : column * 3 + 3]
        assert abs(1 - tile - x[n].reshape(2, 3).numpy()).max() < 0.01  # ink on paper


@pytest.mark.parametrize("channels", [1, 3])
def test_missing_values_are_shown_as_such(channels, digits):
    import base64
    import io

    from matplotlib import image
    from matplotlib.colors import to_rgb

    from jensen.plots.images import HOLE

    x = torch.linspace(0, 255, 4 * 6 * channels).reshape(4, 6 * channels)
    x[1, 2] = torch.nan
    report = Report("holes", data=x, image_shape=(2, 3))
    assert report.material.images.value_range == (0.0, 255.0)
    assert report.material.image(1) == 0
    drawn = image.imread(io.BytesIO(base64.b64decode(report.material.images.uri.partition(",")[2])))
    assert drawn[0, 2, :3] == pytest.approx(to_rgb(HOLE), abs=0.01)
    values = x[1].reshape(channels, 2, 3)[:, 0, 1] / 255
    expected = values if channels == 3 else 1 - values.expand(3)  # ink on paper
    assert drawn[0, 1, :3] == pytest.approx(expected.numpy(), abs=0.01)
    assert Report("rows", data=x, columns=list("abcdef")[: 6 * channels]).material.row(1).count("missing") == 1


def test_a_large_measurement_shows_its_worst_data_points(tmp_path):
    n = 5000
    gap = torch.zeros(n).double()
    gap[1234] = 9.0
    level = torch.linspace(-2, -1, n).double()
    evidence = some_evidence(n, elbo=level - gap, log_evidence=level)
    page = _Page(evidence.to_html(tmp_path / "page.html").read_text())
    assert "of 5,000 data points are shown" in page.text
    assert any(item["text"].startswith("#1234\n") for item in page.items)
    assert len(page.items) < 1100
    assert len(page.text) < 2e6


def test_the_finding_says_what_the_table_says(tmp_path):
    high = some_evidence(4, pareto_k=torch.tensor([0.1, 0.2, 0.9, 0.3]).double())
    text = high.to_html(tmp_path / "page.html").read_text()
    assert "Log p(x) of 4 data points is -4.00 ± 0.43 nats per data point (estimated); the ELBO is" in text
    assert "The estimate is unreliable (k-hat &gt; 0.7) for 25.0 % of the data points." in text
    both = Comparison({"a": Row(high, 5, 1.5), "b": Row(some_evidence(4, elbo=high.elbo - 1), 7, 2.0)}, True)
    text = both.to_html(tmp_path / "page.html").read_text()
    assert '<p class="finding">ELBO below <code>a</code> (paired over test points, nats): b 1.000' in text


def test_a_mark_of_a_comparison_has_the_gap_of_its_table_and_the_weights_of_its_guide(tmp_path):
    low = some_evidence(4, log_evidence=torch.full((4,), -4.9).double(), pareto_k=torch.full((4,), 0.9).double())
    refined = some_evidence(4, method="refined", by_guide=low)
    table = Comparison({"a": Row(refined, 5, 1.5), "b": Row(refined, 5, 1.5)}, True)
    page = _Page(table.to_html(tmp_path / "page.html").read_text())
    item = next(item["text"] for item in page.items if item["text"].startswith("#0, a"))
    assert item.splitlines()[1:] == [
        "log p(x) -5, error 0.1",
        "ELBO -6, gap 1",
        "samples from the guide: k-hat 0.9, ESS 20, error 0.1",
    ]
    assert "k-hat, ESS and error are those of samples from each guide alone." in page.text


def test_two_reports_of_the_same_results_are_the_same(digits, tmp_path):
    model, x, _ = digits
    evidence = evaluate(model, ExactPosterior(model), x, 50, seed=0, progress=False)
    pages = [evidence.to_html(tmp_path / f"{i}.html", data=x, image_shape=(4, 4)).read_text() for i in range(2)]
    assert pages[0] == pages[1]


def test_names_in_the_figures_of_a_page_are_told_apart(digits, tmp_path):
    _, x, pairs = digits
    curves = {name: bounds(*of, x, 8, seed=0, progress=False) for name, of in pairs.items()}
    table = compare(pairs, x, 50, seed=0, progress=False)
    report = Report("several").add(table).bounds(curves, {name: row.evidence for name, row in table.rows.items()})
    page = _Page(report.write(tmp_path / "page.html").read_text())
    names = [found["id"] for tag, found in page.tags if "id" in found and tag in ("g", "clipPath", "svg")]
    figures = {name.split("-")[0] for name in names}
    assert len(figures) > 2
    for address in page.addresses:
        assert address.startswith("data:") or f'id="{address[1:]}"' in page.text


def test_headings_of_tables_have_a_meaning(results):
    named = set()
    for result in results:
        if type(result).__name__ in ("Evidence", "Comparison", "History"):
            grid = grid_of(result._table())
            named |= {name for name, tip in grid.columns if name and not tip}
            named |= {name for name, tip, _ in grid.facts if name and not tip}
    assert not named
    assert meaning_of("a name of the user's") == ""


def test_a_script_in_a_name_is_text(tmp_path):
    row = Row(some_evidence(4), 5, 1.5)
    table = Comparison({"</script><script>alert(1)</script>": row, "b": row}, True)
    text = table.to_html(tmp_path / "page.html").read_text()
    assert "<script>alert" not in text


def test_joint_weights_and_numbers_that_are_not_finite_are_said_as_such(tmp_path):
    joint = some_evidence(1, joint=True).to_html(tmp_path / "page.html").read_text()
    assert "Log p(x) of all data points jointly is" in joint
    assert "The Pareto k-hat of the weights is 0.50 (limit 0.7): reliable." in joint
    lost = some_evidence(4, log_evidence=torch.tensor([-1.0, float("nan"), -2.0, float("-inf")]).double())
    text = lost.to_html(tmp_path / "page.html").read_text()
    assert "Log p(x) or ELBO is not finite for 2 of 4 data points" in text


def test_data_are_those_that_were_measured(tmp_path):
    evidence = some_evidence(4)
    with pytest.raises(ValueError, match="data has 3 data points, but the result has 4"):
        evidence.to_html(tmp_path / "page.html", data=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"images of shape \[N, 9\]"):
        evidence.to_html(tmp_path / "page.html", data=torch.zeros(4, 4), image_shape=(3, 3))
    with pytest.raises(ValueError, match="image_shape needs data"):
        evidence.to_html(tmp_path / "page.html", image_shape=(2, 2))
    assert not list(tmp_path.iterdir())


def test_images_need_their_shape():
    with pytest.raises(ValueError, match="image_shape"):
        Report("rows", data=torch.zeros(2, 4)).images("Samples", [([torch.zeros(4)], "")])
