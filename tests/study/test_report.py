"""The report: a page that stands alone, holds everything, and fits; whatever part of the results is missing."""

import copy
import html.parser
import itertools
import math
import re

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sophia import report
from sophia.report import numbers, picture
from sophia.report.axes import log_ticks, spread
from sophia.report.looks import VARIABLES, looks
from sophia.report.page import draw
from sophia.report.page import page as page_of
from sophia.report.reading import Estimate, Results
from tests.pictures import is_picture
from tests.study.example import TOKENS, example_results

_VOID = {"meta", "br", "hr", "col", "wbr", "img", "input", "link"}
_NASTY = "a<b>&\"$x_1$ 'quoted'"
_SECTIONS = ("race", "budgets", "curves", "paper", "batch", "cost", "search", "clipping", "ablations", "trials")


class Page(html.parser.HTMLParser):
    """A page's elements; an element that is closed by none, or by another, is an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.styles = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles += data
        elif self.open:
            self.texts.append((data, tuple(self.open)))

    @property
    def text(self):
        return " ".join(" ".join(data for data, _ in self.texts).split())

    def all(self, tag):
        return [attrs for name, attrs, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def whole():
    return example_results()


@pytest.fixture
def results(whole):
    return copy.deepcopy(whole)


@pytest.fixture
def small(results):
    """Three optimizers and the runs that figures need: to be written often."""
    names = ("adamw", "signum", "sophia-g")
    results["optimizers"] = {name: results["optimizers"][name] for name in names}
    results["runs"] = [run for run in results["runs"] if run["optimizer"] in names and run["role"] == "final"]
    return results


@pytest.fixture(scope="module")
def written(whole, tmp_path_factory):
    return report.write(whole, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(written):
    return Page(written[0].read_text(encoding="utf-8"))


def shown(results):
    """The page without the PNGs."""
    found = Results(results)
    return Page(page_of(found, draw(found)))


def pictures(results):
    return [one for one in draw(Results(results)).values() if one is not None]


def rename(results, old, new):
    results["optimizers"] = {new if name == old else name: entry for name, entry in results["optimizers"].items()}
    for run in results["runs"]:
        run["optimizer"] = new if run["optimizer"] == old else run["optimizer"]
    for ablation in results["ablations"]:
        ablation["of"] = new if ablation["of"] == old else ablation["of"]
    for key in ("baseline", "headline"):
        results[key] = new if results[key] == old else results[key]


def test_files(written):
    assert [path.name for path in written] == [
        "report.html",
        "speedups.png",
        "budgets.png",
        "loss-curves.png",
        "learning-rates.png",
        "clipped.png",
        "ablations.png",
    ]
    for path in written[1:]:
        if path.name in ("speedups.png", "ablations.png"):  # flat ones
            assert matplotlib.image.imread(path).std() > 0.02
        else:
            assert is_picture(path)
    assert not list(written[0].parent.glob("*.partial"))


def test_page_asks_for_nothing(page):
    assert page.all("script") == page.all("link") == page.all("img") == page.all("iframe") == []
    for tag, attributes, _ in page.elements:
        assert not [key for key in attributes if key.startswith(("on", "src", "xlink"))]
        target = attributes.get("href")
        if target is not None:
            assert target.startswith("#") or (tag == "a" and target.startswith("https://arxiv.org/"))
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    urls = re.findall(r"https?://[^\"' <]+", " ".join(str(attributes) for _, attributes, _ in page.elements))
    assert all(url.startswith("https://arxiv.org/") for url in urls)


def test_ids_are_unique_and_every_reference_has_one(page):
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = set()
    for _, attributes, _ in page.elements:
        for key, value in attributes.items():
            referred.update(re.findall(r"url\(#([^)]+)\)", value or ""))
            if key == "href" and value.startswith("#"):
                referred.add(value[1:])
            if key == "aria-labelledby":
                referred.update(value.split())
    assert referred <= set(ids)
    assert len(referred) > 50  # clip paths and markers of all figures, and the contents


def test_everything_is_in_it(page, whole):
    assert page.text.count(whole["verdict"]) == 1
    assert [attributes["id"] for attributes in page.all("section")][: len(_SECTIONS)] == list(_SECTIONS)
    for name in whole["optimizers"]:
        cells = [data for data, place in page.texts if place[-2:] == ("th", "span") and data == name]
        assert cells, name
        assert [data for data, place in page.texts if place[-1] == "text" and name in data], name
    codes = [data for data, place in page.texts if place[-1] == "code"]
    for run in whole["runs"]:
        assert run["id"] in codes
        assert f"{run['val_loss']:.4f}" in page.text
    for search in [s for entry in whole["optimizers"].values() for s in entry["searches"]]:
        assert all(codes.count(trial["id"]) >= 2 for trial in search["trials"])  # in its search, and among the runs
    for trial in [trial for ablation in whole["ablations"] for trial in ablation["trials"]]:
        assert codes.count(trial["id"]) >= 2
    for flag in whole["flags"]:
        assert flag in page.text
    for ablation in whole["ablations"]:
        assert ablation["name"] in page.text
    assert whole["study"]["fingerprint"] in page.text
    assert whole["study"]["file_sha256"] in page.text
    assert whole["study"]["file"] in [data for data, place in page.texts if place[-2:] == ("pre", "code")]
    assert whole["machine"]["cpu"] in page.text
    assert "sophia compare study.toml" in page.text


def test_numbers_of_the_headline(page, whole):
    entry = whole["optimizers"]["sophia-g"]
    keys = dict(
        zip(
            *[iter(data for data, place in page.texts if place[-1] in ("dt", "dd") and "dl" in place)] * 2, strict=False
        )
    )
    assert keys["Final loss, sophia-g"] == f"{entry['final_loss']['mean']:.4f}"
    for key, name in (("tokens", "tokens"), ("seconds", "time"), ("flops", "operations")):
        assert keys[f"Speed-up in {name}"] == f"{entry[f'speedup_{key}']['value']:.2f}×"


def test_the_headline_against_the_others(page, whole):
    assert page.text.count("How many times the speed-up of each other optimizer that of sophia-g is") == 1
    muon = next(one for one in whole["duels"] if one["optimizer"] == "muon")
    assert f"{muon['speedup_tokens']['value']:.2f}" in page.text


def test_tables_have_captions_and_headers(page):
    tables = [place for tag, _, place in page.elements if tag == "table"]
    assert len(tables) > 20
    assert len(page.all("caption")) == len(page.all("thead")) == len(tables)
    assert all("div" in place for place in tables)
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))


def test_figures_are_text_with_a_description(page, whole):
    drawings = page.all("svg")
    assert len(drawings) == 3 + 1 + 4 + len(whole["optimizers"]) + 1 + 1
    assert all(attributes["role"] == "img" and attributes["aria-labelledby"] for attributes in drawings)
    titles = [data for data, place in page.texts if place[-2:] == ("svg", "title")]
    assert len(titles) == len(drawings)
    speedup = whole["optimizers"]["muon"]["speedup_tokens"]["value"]
    assert any(f"muon {speedup:.2f}" in title for title in titles)
    labels = [data for data, place in page.texts if place[-1] == "text"]
    assert "Loss against tokens" in labels
    assert any(data.startswith("muon") for data in labels)


def test_styles_of_figures_stay_in_them(written, page):
    assert all(place[-1] == "head" for tag, _, place in page.elements if tag == "style")
    text = written[0].read_text(encoding="utf-8")
    body = text[text.index("<body") :]
    assert not re.findall(r"#[0-9a-f]{6}\b(?=[;\"])", body)  # every colour is one that a dark page may change
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", body))
    assert used <= {name for name, _, _ in VARIABLES.values()}
    assert "DejaVu" not in body


def test_nothing_is_wider_than_a_phone(page):
    for tag, attributes, place in page.elements:
        if "svg" in place:
            continue
        assert "width" not in attributes or tag == "meta"
        assert "style" not in attributes
        if tag == "svg":
            assert "viewbox" in attributes
    boxed = [place for tag, _, place in page.elements if tag == "table"]
    scrolling = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(scrolling) == len(boxed)
    screen = page.styles[: page.styles.index("@media print")]
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", screen)
    assert re.search(r"\.panels svg \{[^}]*width: 100%", screen)
    # Lengths that an element may not go below are shorter than the narrowest page, or bounded by it.
    for rule, length in re.findall(r"((?:min-|(?<!-))width|minmax\((?:min\(100%, )?)[: ]*([\d.]+)rem", screen):
        assert float(length) <= 20 or "min(100%" in rule, (rule, length)
    (viewport,) = [attributes for attributes in page.all("meta") if attributes.get("name") == "viewport"]
    assert "width=device-width" in viewport["content"]


def test_all_is_open_in_print(page):
    printed = page.styles[page.styles.index("@media print") :]
    assert len(page.all("details")) >= 8
    assert re.search(r"details::details-content \{[^}]*content-visibility: visible", printed)


def test_same_results_same_files(whole, written, tmp_path):
    again = report.write(whole, tmp_path)
    for one, other in zip(written, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_names_are_text(small):
    rename(small, "sophia-g", _NASTY)
    rename(small, "signum", "</svg><script>alert(1)</script>")
    small["study"]["name"] = "<i>study</i> & more"
    small["study"]["file"] = "</code></pre><b>file</b> &amp;"
    small["flags"] = ["<img src=x>"]
    small["ablations"][0]["name"] = "</text>&"
    page = shown(small)
    assert not {"script", "img", "i", "b"} & {tag for tag, _, _ in page.elements}
    assert "<i>study</i> & more" in page.text
    assert "</code></pre><b>file</b> &amp;" in page.text
    assert "<img src=x>" in page.text
    assert _NASTY in [data for data, place in page.texts if place[-1] == "span"]
    assert any(data.startswith("a<b>&\"$x_1$ 'quo") for data, place in page.texts if place[-1] == "text")


def test_a_script_that_the_font_lacks(small):
    rename(small, "signum", "优化器")
    page = shown(small)
    assert [data for data, place in page.texts if place[-1] == "text" and "优化器" in data]


@pytest.mark.parametrize("missing", ["optimizers", "runs", "study", "baseline_curve", "headline"])
def test_a_part_is_missing(small, missing):
    small[missing] = None
    assert shown(small).text.count(small["verdict"]) == 1


def test_nothing_yet(tmp_path):
    (path,) = report.write({}, tmp_path)
    page = Page(path.read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "Unfinished." in page.text
    for sentence in ("No final run has finished yet.", "No run has finished yet.", "Updates have not been timed yet."):
        assert sentence in page.text


def test_every_value_may_be_null(small):
    def emptied(value, depth):
        if depth == 0 or not isinstance(value, dict | list):
            return None
        if isinstance(value, dict):
            return {key: emptied(inner, depth - 1) for key, inner in value.items()}
        return [emptied(inner, depth - 1) for inner in value]

    for depth in range(1, 7):
        shown(emptied(small, depth))


def test_an_unfinished_study_says_so(results):
    results["complete"] = False
    entry = results["optimizers"]["soap"]
    for key in ("best", "final_loss", "speedup_tokens", "speedup_seconds", "speedup_flops", "cost"):
        entry[key] = None
    results["runs"] = [run for run in results["runs"] if run["optimizer"] != "soap" or run["role"] == "search"]
    page = shown(results)
    assert "Unfinished." in page.text
    assert "soap not yet" in page.text
    assert not any("soap" in data for data, place in page.texts if place[-1] == "title" and "Speed-up" in data)


def diverge(results, name, seeds):
    for run in results["runs"]:
        if run["optimizer"] == name and run["role"] == "final" and run["seed"] in seeds:
            run["val_loss"] = None
            for point in run["curve"][4:]:
                point["val_loss"] = None


def test_nothing_is_awaited_of_a_search_that_diverged(results):
    """The study is whole without it."""
    entry = results["optimizers"]["sophia-g"]
    for key in ("best", "final_loss", "speedup_tokens", "speedup_seconds", "speedup_flops", "cost"):
        entry[key] = None
    results["runs"] = [run for run in results["runs"] if run["optimizer"] != "sophia-g" or run["role"] == "search"]
    page = shown(results)
    assert "not yet" not in page.text
    assert "sophia-g (under test) diverged" in page.text


def test_runs_that_diverged(results):
    diverge(results, "lion", {2})
    diverge(results, "signum", {1, 2, 3})
    for key in ("final_loss", "speedup_tokens", "speedup_seconds", "speedup_flops"):
        results["optimizers"]["signum"][key] = None
    for trial in results["optimizers"]["signum"]["searches"][0]["trials"]:
        trial["loss"] = None
    page = shown(results)
    assert "3 (1 diverged)" in page.text
    assert "signum diverged" in page.text
    titles = [data for data, place in page.texts if place[-1] == "title"]
    assert "signum: 5 trials, all diverged" in titles
    assert not any("signum" in title for title in titles if title.startswith("Validation loss against"))
    assert "all diverged" in [data for data, place in page.texts if place[-1] == "text"]


@pytest.mark.parametrize(
    ("edges", "told"),
    [([], False), (["gamma was not searched: trials were spent"], False), (["lr 0.01 is the highest"], True)],
)
def test_a_learning_rate_is_on_an_edge_where_it_is(results, edges, told):
    """Another setting's edge is no news beside the curve of learning rates."""
    for entry in results["optimizers"].values():
        for search in entry["searches"]:
            search["edges"] = edges
    beside = [data for data, place in shown(results).texts if place[-1] == "text" and data.startswith("best at")]
    assert len(beside) > 1
    assert all(text.endswith(", on an edge") == told for text in beside)


def test_bounds_are_marked(results):
    results["optimizers"]["muon"]["speedup_tokens"] = {
        "value": 4.0,
        "low": None,
        "high": None,
        "n": 3,
        "bound": "at least",
    }
    results["optimizers"]["signum"]["speedup_tokens"] = {
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 3,
        "bound": "at most",
    }
    page = shown(results)
    labels = [data for data, place in page.texts if place[-1] == "text"]
    assert {"≥ 4.00", "≤ 0.50", "muon ≥ 4.00", "signum ≤ 0.50"} <= set(labels)


def test_better_and_worse_in_words(small):
    for ablation, (low, high) in zip(small["ablations"], [(-0.03, -0.01), (0.01, 0.03), (-0.01, 0.02)], strict=False):
        ablation["difference"] = {"value": (low + high) / 2, "low": low, "high": high, "n": 3}
    page = shown(small)
    words = [
        data
        for data, place in page.texts
        if place[-2:] == ("td", "span") and ("better" in data or "worse" in data or "clear" in data)
    ]
    assert words[:3] == ["▼ better", "▲ worse", "no clear difference"]


def test_claims_are_the_judges(results):
    entry = results["optimizers"]["muon"]
    entry.update(claim=False, claim_seconds=False)
    results["optimizers"]["soap"].update(claim=True, claim_seconds=False)
    text = shown(results).text
    row = text[text.index("All optimizers at budget T") :]
    assert re.search(r"muon 3\.\d{4} [^a-z]*(to [^a-z]*)+none", row)
    assert re.search(r"soap 3\.\d{4} [^a-z]*(to [^a-z]*)+faster in tokens ", row)


@pytest.mark.parametrize("bend", ["plain", "long", "bounds", "many"])
def test_text_lies_within_its_figure(results, bend):
    if bend == "long":
        rename(results, "muon", "a-very-long-name-of-an-optimizer-that-nobody-can-read")
        results["ablations"][0]["name"] = "a change with a name that is far too long for a figure"
    if bend == "bounds":
        for name, bound, value in (("muon", "at least", 4.0), ("signum", "at most", 0.5)):
            for key in ("tokens", "seconds", "flops"):
                results["optimizers"][name][f"speedup_{key}"] = {"value": value, "bound": bound, "n": 3}
        results["optimizers"]["sophia-g"]["speedup_tokens"] = {"value": 3.9, "low": 0.01, "high": 200.0, "n": 2}
        results["optimizers"]["sophia-g"]["final_loss"]["mean"] -= 0.25
    if bend == "many":
        for copied in range(8):
            name = f"muon-{copied}"
            results["optimizers"][name] = copy.deepcopy(results["optimizers"]["muon"])
            results["runs"] += [{**run, "optimizer": name} for run in results["runs"] if run["optimizer"] == "muon"]
    for drawn in pictures(results):
        for panel in drawn.panels:
            with picture._style():
                figure = Figure(figsize=(panel.width, panel.height), dpi=100)
                canvas = FigureCanvasAgg(figure)
                panel.draw(figure)
                canvas.draw()
                box = figure.bbox.expanded(1.005, 1.005)
                renderer = canvas.get_renderer()
                extents = []
                for text in _texts(figure):
                    extent = text.get_window_extent(renderer)
                    inside = box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1
                    assert inside, (drawn.name, text.get_text(), extent, box)
                    assert text.get_fontsize() >= 7.5
                    extents.append((text.get_text(), extent))
                for text in [text for axes in figure.axes for text in axes.texts if _is_arrow(text)]:
                    inner, tip = text.axes.get_window_extent(), text.arrow_patch.get_window_extent(renderer)
                    assert inner.x0 - 1 <= tip.x0 < tip.x1 <= inner.x1 + 1, drawn.name
                for (one, box), (other, second) in itertools.combinations(extents, 2):
                    across = min(box.x1, second.x1) - max(box.x0, second.x0)
                    upwards = min(box.y1, second.y1) - max(box.y0, second.y0)
                    assert across < 1 or upwards < 4, (drawn.name, one, other)  # of a line's height of 13


def _texts(figure):
    for axes in figure.axes:
        ticks = [
            label
            for axis in (axes.xaxis, axes.yaxis)
            for label in axis.get_ticklabels()
            if axis.get_view_interval()[0] <= _place(axis, label) <= axis.get_view_interval()[1]
        ]
        titles = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        yield from (text for text in [*axes.texts, *ticks, *titles] if text.get_text() and text.get_visible())


def _is_arrow(text):
    return getattr(text, "arrow_patch", None) is not None


def _place(axis, label):
    return label.get_position()[0 if axis.axis_name == "x" else 1]


def test_optimizers_are_told_apart_without_colour():
    names = [f"o{index}" for index in range(12)]
    found = looks(names, "o3", "o5")
    assert len({(str(look.linestyle), look.marker) for look in found.values()}) == 12
    assert len({look.color for look in list(found.values())[:8]}) == 8
    assert looks(["x", "o3", "o5"], "o3", "o5")["o5"] == found["o5"]
    assert looks(["o3"], "o3", "o5")["o3"] == found["o3"]


def test_colours_stand_out():
    def luminance(colour):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    values = {name: (light, dark) for name, light, dark in VARIABLES.values()}
    for name, (light, dark) in values.items():
        if name not in ("--paper", "--grid"):
            assert contrast(light, values["--paper"][0]) >= 4.5, name  # they colour text, too
            assert contrast(dark, values["--paper"][1]) >= 4.5, name


def test_numbers_are_written_as_people_do():
    assert numbers.rate(8e-3) == "8e-3"
    assert numbers.rate(0.0056568) == "5.66e-3"
    assert numbers.rate(1.0) == "1e0"
    assert numbers.loss(3.14159) == "3.1416"
    assert numbers.loss(math.nan) == numbers.loss(None) == "–"
    assert numbers.ratio(1.234) == "1.23"
    assert numbers.ratio(12.34) == "12.3"
    assert numbers.difference(-0.01) == "−0.0100"
    assert numbers.count(999_999) == "1 M"
    assert numbers.count(1_234_567) == "1.23 M"
    assert numbers.count(8192) == "8\N{NARROW NO-BREAK SPACE}192"
    assert numbers.operations(3.1e13) == "31 TFLOP"
    assert numbers.operations(6.2e10) == "62 GFLOP"
    assert numbers.seconds(0.0456) == "45.6 ms"
    assert numbers.seconds(600) == "10 min"
    assert numbers.memory(734003200) == "700 MiB"
    assert numbers.budget(TOKENS // 2, TOKENS) == "T/2"
    assert numbers.budget(TOKENS, TOKENS) == "T"
    assert numbers.budget(4 * TOKENS, TOKENS) == "4T"
    assert numbers.budget(1.5 * TOKENS, TOKENS) == "1.5T"
    assert numbers.setting("lr", 0.016) == "1.6e-2"
    assert numbers.setting("gamma", 0.05) == "0.05"
    assert numbers.setting("eps", 1e-12) == "1e-12"
    assert numbers.setting("bias_correction", True) == "true"
    assert numbers.setting("gamma", "auto") == "auto"
    assert numbers.setting("arguments", ["momentum=0.9", "nesterov=True"]) == "momentum=0.9 nesterov=True"
    assert numbers.setting("decay_by_name", []) == "none"


def test_an_interval_excludes_what_it_does_not_hold():
    assert Estimate(1.2, 1.1, 1.3, 3, None).excludes(1.0)
    assert not Estimate(1.2, 0.9, 1.3, 3, None).excludes(1.0)
    assert not Estimate(1.2, None, None, 1, None).excludes(1.0)


def test_labels_are_spread_as_little_as_possible():
    assert spread([0.0, 50.0, 90.0], 10, 0, 100) == [0.0, 50.0, 90.0]
    assert spread([50.0, 50.0, 50.0], 10, 0, 100) == pytest.approx([40.0, 50.0, 60.0])
    crowded = spread([1.0, 2.0, 3.0, 99.0, 99.5], 10, 0, 100)
    assert min(after - before for before, after in itertools.pairwise(crowded)) >= 10 - 1e-9
    assert min(crowded) >= 0
    assert max(crowded) <= 100


@pytest.mark.parametrize(
    ("low", "high"), [(0.9, 1.15), (0.1, 30), (8e5, 2e7), (4e-4, 9e-3), (1.0, 1e9), (1.2e6, 4.6e6)]
)
def test_ticks_are_few_and_apart(low, high):
    ticks = log_ticks(low, high, 5)
    assert 1 <= len(ticks) <= 5
    assert all(low <= tick <= high for tick in ticks)
    assert all(after > before * (high / low) ** 0.12 for before, after in itertools.pairwise(ticks))
