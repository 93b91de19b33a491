"""The report: every figure of the run, escaped, alone in one file, and the same every time."""

import html.parser
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from components.delivery.charts import in_short, pareto
from components.delivery.report import in_time, picture, report, stages, table, untreated
from components.delivery.select import drops, failed, select
from components.options import SelectOptions

ROOT = pathlib.Path(__file__).parents[3]


def variant(recipe, metric, size, p50=1.0, **more):
    return {
        "recipe": recipe,
        "status": "ok",
        "reason": None,
        "metric_name": "accuracy",
        "metric": metric,
        "validation_metric": metric + 0.01,
        "bytes": 2 * size,
        "gzip_bytes": size,
        "parameters": 1234,
        "latency_ms": {"p50": p50, "p90": 2 * p50, "threads": 1, "warmup": 3, "runs": 50, "cpu": "Toy CPU"},
        "proof": {"sparsity": 0.25, "distinct_per_channel_max": 16, "weight_dtypes": {}, "operators": {}, "flex": []},
        "untreated": [],
        **more,
    }


def run(variants=None, **more):
    if variants is None:
        layer = {"layer": "norm", "class": "GroupNormalization", "reason": "tfmot refuses it"}
        variants = [
            variant("float32", 0.9, 40_000),
            variant("int8", 0.896, 11_000, 0.4),
            variant("qat", 0.899, 11_500, 0.4, untreated=[layer]),
            variant("prune@0.8+qat", 0.893, 6_000, 0.4, untreated=[layer]),
        ]
        variants.append(failed("cluster+qat", "kernel 'head' holds 40 values, 16 were promised"))
    variants = drops(variants)
    picked = select(variants, SelectOptions())
    return {
        "schema": 1,
        "run": "toy",
        "task": "classification",
        "metric": "accuracy",
        "examples": {"train": 1000, "validation": 100, "calibration": 50, "test": 200},
        "environment": {"cpu": "Toy CPU", "cores": 2, "python": "3.11", "packages": {"keras": "3.15.1"}},
        "seconds": {"preprocess": 2.5, "train": 75.0},
        "variants": variants,
        "constraints": SelectOptions().model_dump(),
        "selected": picked.recipe,
        "selected_because": picked.because,
        "remarks": ["qat takes longer than it should"],
        **more,
    }


class Page(html.parser.HTMLParser):
    """What a browser would see: elements with attributes, text, and whether all that opens is closed."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(results, folder, **more):
    return Page(report(results, folder, **more).read_text(encoding="utf-8"))


@pytest.fixture
def predictions(tmp_path):
    """Ten rows of class 0 and ten of class 1; three of the first are taken for the second."""
    answered = np.array([0] * 7 + [1] * 13)
    np.savez(tmp_path / "p.npz", outputs=np.eye(2, dtype=np.float32)[answered], labels=np.repeat([0, 1], 10))
    return tmp_path / "p.npz"


def test_the_headline_says_what_ships_and_why(tmp_path):
    page = page_of(run(), tmp_path)
    text = " ".join(page.text.split())
    assert "Ship prune@0.8+qat : 6,000 bytes to download, 0.15x the size of float32." in text.replace("qat:", "qat :")
    assert "gzip 6,000 bytes, the smallest of 4 of 5 variants" in text
    assert "drop against float32 +0.0070" in text
    assert "0.40x float32's; 1 thread" in text
    assert "50 single runs after 3 to warm up, 1 thread, on Toy CPU" in text


def test_every_variant_is_a_row_with_its_figures(tmp_path):
    rows = {row["recipe"]: row for row in table(run())}
    assert list(rows) == ["float32", "int8", "qat", "prune@0.8+qat", "cluster+qat"]
    assert rows["int8"]["share"] == pytest.approx(0.275)
    assert (rows["int8"]["p50"], rows["int8"]["p90"], rows["int8"]["distinct"]) == (0.4, 0.8, 16)
    assert [name for name, row in rows.items() if row["chosen"]] == ["prune@0.8+qat"]
    assert rows["cluster+qat"]["metric"] is rows["cluster+qat"]["share"] is rows["cluster+qat"]["p50"] is None
    text = " ".join(page_of(run(), tmp_path).text.split())
    assert "cluster+qat failed: kernel 'head' holds 40 values, 16 were promised" in text


def test_the_front_is_what_none_beats_in_size_and_metric():
    sizes = [
        variant("a", 0.9, 40),
        variant("b", 0.8, 30),
        variant("c", 0.9, 20),
        variant("d", 0.7, 10),
        variant("e", 0.7, 10),
    ]
    assert [each["recipe"] for each in pareto(sizes, "accuracy")] == ["d", "c"]
    assert [each["recipe"] for each in pareto(sizes, "rmse")] == ["d"]


def test_the_page_stands_alone(tmp_path, predictions):
    page = page_of(run(), tmp_path, labels=("no", "yes"), predictions=predictions, history={"loss": [2.0, 1.0]})
    assert not page.all("script")
    assert not page.all("link")
    assert not page.all("img")
    references = [
        value for _, each in page.elements for key, value in each.items() if key in ("src", "href", "xlink:href")
    ]
    assert all(value.startswith("#") for value in references)
    assert "default-src 'none'" in page.all("meta")[2]["content"]


def test_the_page_can_be_heard(tmp_path, predictions):
    page = page_of(run(), tmp_path, labels=("no", "yes"), predictions=predictions, history={"loss": [2.0, 1.0]})
    drawn = page.all("svg")
    assert len(drawn) == 3
    assert all(each["role"] == "img" and each["aria-label"] for each in drawn)
    assert "at the end: training 1" in drawn[2]["aria-label"]
    assert all(each.get("scope") in ("col", "row") for each in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    ids = [each["id"] for _, each in page.elements if "id" in each]
    clips = {name for name, _ in page.elements}
    assert "clippath" in clips or "defs" in clips
    references = {value[1:] for _, each in page.elements for key, value in each.items() if key == "xlink:href"}
    assert references <= set(ids)


def test_charts_take_their_colours_from_the_page(tmp_path):
    text = report(run(), tmp_path).read_text()
    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert drawn
    assert "var(--accent)" in drawn[0]
    assert not re.findall(r"#fe01\d\d", text)
    assert {colour.lower() for part in drawn for colour in re.findall(r"(?:fill|stroke): (#\w+)", part)} == set()


def test_text_of_the_charts_stays_text(tmp_path):
    assert page_of(run(), tmp_path).text.count("prune@0.8+qat") >= 4  # headline, table, two charts


def test_whatever_comes_from_the_user_is_escaped(tmp_path, predictions):
    places = ("run", "remark", "because", "recipe", "reason", "label", "layer", "cpu", "step")
    nasty = {place: f"<img src={place} onerror=alert(1)>\"'&${place}$" for place in places}
    results = run() | {"run": nasty["run"], "selected_because": nasty["because"], "remarks": [nasty["remark"]]}
    results["variants"][1]["recipe"] = nasty["recipe"]
    results["variants"][-1]["reason"] = nasty["reason"]
    results["variants"][2]["untreated"][0]["layer"] = nasty["layer"]
    results["environment"]["cpu"] = nasty["cpu"]
    results["seconds"][nasty["step"]] = 1.0
    page = page_of(results, tmp_path, labels=(nasty["label"], "yes"), predictions=predictions)
    assert not page.all("img")
    assert [place for place in places if nasty[place] not in page.text] == []
    assert page.text.count(nasty["recipe"]) == 3  # table and two charts, there as it is and not as a formula


def test_the_confusion_matrix_counts_the_chosen_files_answers(tmp_path, predictions):
    page = page_of(run(), tmp_path, labels=("no", "yes"), predictions=predictions)
    shares = [each["style"] for each in page.all("td") if "--share" in each.get("style", "")]
    assert shares == ["--share:0.700", "--share:0.300", "--share:0.000", "--share:1.000"]
    assert "Most frequent mistakes" in page.text
    assert re.search(r"no\s*yes\s*3\s*0\.300", page.text)


def test_many_classes_are_shown_by_their_mistakes_only(tmp_path):
    labels = tuple(f"class {n}" for n in range(30))
    answered = np.arange(30)
    answered[7] = 9
    np.savez(tmp_path / "p.npz", outputs=np.eye(30)[answered], labels=np.arange(30))
    page = page_of(run(), tmp_path, labels=labels, predictions=tmp_path / "p.npz")
    assert not [each for each in page.all("table") if each.get("class") == "matrix"]
    assert re.search(r"class 7\s*class 9\s*1\s*1\.000", page.text)


def test_a_run_that_chose_nothing_says_so(tmp_path):
    results = run() | {"selected": None, "selected_because": "select: none of 4 variants meets every constraint: x"}
    text = page_of(results, tmp_path).text
    assert "No variant ships." in text
    assert "none of 4 variants meets every constraint" in text
    assert "the ring marks" not in text


def test_a_run_in_which_everything_failed_still_has_a_page(tmp_path):
    results = run() | {"variants": [failed("float32", "the converter refused it")], "selected": None, "remarks": []}
    page = page_of(results, tmp_path)
    assert not page.all("svg")
    assert "the converter refused it" in page.text


def test_lower_is_better_for_rmse_and_drawn_upwards(tmp_path):
    variants = [variant("float32", 2.0, 40_000), variant("int8", 2.1, 9_000)]
    for each in variants:
        each["metric_name"] = "rmse"
    page = page_of(run(variants) | {"metric": "rmse", "task": "regression", "selected": "int8"}, tmp_path)
    assert "test rmse (lower is better)" in page.text
    assert "+0.1000" in page.text


def test_layers_left_alone_are_listed_once_with_their_recipes():
    assert untreated(run()) == [
        {
            "layer": "norm",
            "class": "GroupNormalization",
            "reason": "tfmot refuses it",
            "recipes": ["qat", "prune@0.8+qat"],
        }
    ]


def test_a_search_shows_what_it_tried_and_why(tmp_path):
    assert "What the search tried" not in page_of(run(), tmp_path).text
    results = run()
    results["variants"][1]["tried_because"] = "it takes <no> training"
    results["variants"].append({**failed("qat", "time was up", "skipped"), "tried_because": "int8 held"})
    text = page_of(results, tmp_path).text
    assert "What the search tried" in text
    assert "it takes <no> training" in text
    assert "skipped" in text


def test_a_rescue_shows_its_rungs_and_the_layers_that_were_to_blame(tmp_path):
    assert "was written" not in page_of(run(), tmp_path).text
    rung = {"precision": "", "layers": [], "reason": None}
    rescue = {
        "allowed": 0.01,
        "met": True,
        "taken": "worst 1 in int16",
        "rungs": [
            {**rung, "name": "int8", "drop": 0.031, "bytes": 9_000},
            {**rung, "name": "worst 1 in float32", "drop": None, "bytes": None, "reason": "no kernel <for> it"},
            {
                "name": "worst 1 in int16",
                "precision": "int16",
                "layers": ["head"],
                "drop": 0.004,
                "bytes": 9_100,
                "reason": None,
            },
        ],
        "layers": [{"layer": "head", "snr_db": 3.25, "added": 0.5, "raised": "int16"}],
        "worth": [{"layer": "head", "gives_back": 0.027, "bytes": 100}],
    }
    results = run()
    results["variants"][1]["rescue"] = rescue
    text = page_of(results, tmp_path).text
    assert "How int8 was written" in text
    assert "int8 loses 0.0310 on validation rows, 0.0100 is allowed; with 'head' in int16 it loses 0.0040." in text
    assert "no kernel <for> it" in text
    assert "+0.0310" in text
    assert "9,100" in text
    assert "5.00e-01" in text
    assert "+0.0270" in text


def test_time_is_told_as_people_do():
    assert [each["share"] for each in stages({"a": 1.0, "b": 4.0})] == [0.25, 1.0]
    assert stages({}) == []
    assert [in_time(each) for each in (0.04, 59.94, 60, 119.6, 3599.6)] == [
        "0.04 s",
        "59.9 s",
        "1 min 0 s",
        "2 min 0 s",
        "1 h 0 min",
    ]
    assert [in_short(each) for each in (0, 999, 1000, 1499, 99_999, 2_000_000)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.5 kB",
        "100 kB",
        "2 MB",
    ]


def test_equal_runs_give_equal_pages_and_pictures(tmp_path):
    first = report(run(), tmp_path, history={"loss": [1.0, 0.5]}).read_bytes()
    assert report(run(), tmp_path, history={"loss": [1.0, 0.5]}).read_bytes() == first
    picture(run(), tmp_path / "a.png")
    picture(run(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_picture_is_drawn_on_white_and_shows_the_chosen_one(tmp_path):
    picture(run(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels.shape[1] == 2000
    assert (pixels[0, 0] == 255).all()
    assert (pixels == (0x0B, 0x76, 0x6F)).all(axis=2).sum() > 500  # the accent: bar, ring, name


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path):
    results = run()
    results["variants"][1]["recipe"] = "模型 🙂"
    assert "模型 🙂" in page_of(results, tmp_path).text
    picture(results, tmp_path / "a.png")


def test_the_report_needs_no_tensorflow(tmp_path):
    code = "import sys, components.delivery.report; sys.exit(bool({'tensorflow', 'keras', 'matplotlib.pyplot'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
