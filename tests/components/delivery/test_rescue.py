"""Rescue: the first rung within the limit, proven in the file; one layer is made bad on purpose."""

import dataclasses
import json

import pytest

from components.artifacts import Promise, TFLiteFile, write_json
from components.delivery.errors_by_layer import LayerError, errors_by_layer
from components.delivery.measure import predict
from components.delivery.owners import layer_classes
from components.delivery.proof import check, read_proof
from components.delivery.rescue import in_words, rescue
from components.errors import BudgetError, ModelError, TrimlineError
from components.options import ExportOptions, RescueOptions
from components.tracing import Trace
from tests.components.delivery.conftest import spoilt


class Heard(Trace):
    """Keeps what is said."""

    def __init__(self):
        self.warnings = []
        super().__init__(on_warning=self.warnings.append)


def rescued(toy, folder, *, allowed, retrain=None, precisions=("int16", "float32"), options=None):
    """A rescue with real files; what is lost is told against the float file."""
    whole = toy.export(folder / "float32", "float32").file
    reference = toy.accuracy(predict(whole, toy.held))
    heard, layers = Heard(), layer_classes(toy.model)
    target = folder / "rescued"
    target.mkdir()
    file = rescue(
        lambda each, place: toy.export(place, "int8", recipe="rescue", options=each),
        retrain,
        lambda each: reference - toy.accuracy(predict(each.file, toy.held)),
        lambda each: errors_by_layer(whole, each.file, toy.inputs[:48], list(layers)),
        layers,
        options or ExportOptions(),
        target,
        allowed=allowed,
        precisions=precisions,
        trace=heard,
    )
    return file, heard.warnings


def test_where_int8_is_good_enough_the_file_is_int8s_to_the_byte(toy, tmp_path):
    file, warnings = rescued(toy, tmp_path, allowed=0.05)
    plain = toy.export(tmp_path / "int8", "int8", recipe="rescue")
    assert file.file.read_bytes() == plain.file.read_bytes()
    face = file.facts["rescue"]
    assert (face["taken"], face["met"], len(face["rungs"]), face["layers"]) == ("int8", True, 1, [])
    assert warnings == []
    assert sorted(path.name for path in file.folder.iterdir()) == ["calibration.json", "exported.json", "model.tflite"]


@pytest.mark.parametrize("precision", ["int16", "float32"])
def test_the_guilty_layer_is_raised_and_the_file_proves_it(toy, tmp_path, precision):
    ruined = spoilt(toy, "hidden", "head")
    file, warnings = rescued(ruined, tmp_path, allowed=0.02, precisions=(precision,))
    face = file.facts["rescue"]
    first, taken = face["rungs"][0], face["rungs"][-1]
    assert first["drop"] > 0.1
    assert face["met"]
    assert taken["drop"] <= 0.02
    # The range of its output is at fault, and "head" would round that again.
    assert (taken["name"], taken["layers"]) == (f"worst 1 in {precision}", ["hidden", "head"])
    raised = {each["layer"]: each["raised"] for each in face["layers"] if each["raised"]}
    assert raised.items() <= dict.fromkeys(taken["layers"], precision).items()
    assert face["layers"][0]["added"] == max(each["added"] for each in face["layers"])
    worth = {each["layer"]: each for each in face["worth"]}
    assert worth.keys() == {"hidden", "head"}
    assert worth["hidden"]["gives_back"] > 0.1, "its output is of no use in int8"
    if precision == "float32":
        assert worth["hidden"]["bytes"] > 20_000, "three bytes more for each of its 8,192 weights"
    promises = [Promise.from_json(each) for each in file.facts["promises"]]
    assert {each.layer for each in promises if each.precision == precision} == {"hidden", "head"}
    assert check(read_proof(file.file), promises, file.facts["format"]) == []
    assert warnings == [in_words(face)]
    assert f"with 'hidden', 'head' in {precision} it " in warnings[0]


# --- the ladder alone: files that are made up, so that every rung is the test's to say ------------------------------

BLAMED = [
    LayerError(layer="b", operators=("CONV_2D",), snr_db=3.0, added=0.5, rounding=0.1, readers=("a.1",)),
    LayerError(layer="a.1", operators=("CONV_2D",), snr_db=2.0, added=0.1),
    LayerError(layer="serving/Reshape", operators=("RESHAPE",), snr_db=9.0, added=0.05),
    LayerError(layer="c", operators=("ADD",), snr_db=20.0, added=0.01),
    LayerError(layer="clean", operators=("ADD",), snr_db=40.0, added=0.0),
]


class Bench:
    """Writes stand-ins for files; `drops` says by name of the rung what each loses, or raises."""

    def __init__(self, folder, drops):
        self.folder, self.drops, self.asked, self.warnings = folder, drops, [], []

    def write(self, options, place):
        self.asked.append((tuple(options.int16), tuple(options.keep_float), options.calibration_examples))
        raised = [*options.int16, *options.keep_float]
        return self.put(place, f"{len(raised)} {'int16' if options.int16 else 'float32'}" if raised else "int8")

    def put(self, place, name):
        drop = self.drops[name]
        if isinstance(drop, Exception):
            raise drop
        (place / "model.tflite").write_text(name)
        write_json(place / "calibration.json", {"rows": 128})
        write_json(place / "exported.json", {"recipe": "rescue", "format": "int8", "bytes": len(name)})
        return TFLiteFile(place)

    def climb(self, *, qat=True, pulse=lambda: None, **options):
        return rescue(
            self.write,
            (lambda place: self.put(place, "qat")) if qat else None,
            lambda file: self.drops[file.file.read_text()],
            lambda file: BLAMED,
            dict.fromkeys(["a.1", "b", "c", "clean"], "Conv2D"),
            ExportOptions(rescue=RescueOptions(**options)),
            self.folder,
            allowed=0.01,
            precisions=("int16", "float32"),
            trace=Trace(on_warning=self.warnings.append, on_pulse=pulse),
        )


BAD = {f"{n} {precision}": 0.02 for n in (1, 2, 3) for precision in ("int16", "float32")}


def test_layers_are_raised_worst_first_in_doubling_numbers_and_both_precisions(tmp_path):
    bench = Bench(tmp_path, {"int8": 0.03, **BAD, "3 float32": 0.01})
    face = bench.climb().facts["rescue"]
    assert [(rung["name"], rung["layers"]) for rung in face["rungs"]] == [
        ("int8", []),
        ("worst 1 in int16", ["b"]),
        ("worst 1 in float32", ["b"]),
        ("worst 2 in int16", ["b", "a.1"]),
        ("worst 2 in float32", ["b", "a.1"]),
        ("worst 3 in int16", ["b", "a.1", "c"]),
        ("worst 3 in float32", ["b", "a.1", "c"]),
    ]
    assert face["taken"] == "worst 3 in float32"
    assert bench.asked[0] == ((), (), None)
    assert bench.asked[3] == (("b", "a\\.1"), (), 128)
    assert (tmp_path / "model.tflite").read_text() == "3 float32"
    # Without any one of the three the file is that of two layers: it loses 0.01 more, and its stand-in is as long.
    assert face["worth"] == [{"layer": each, "gives_back": 0.01, "bytes": 0} for each in ("b", "a.1", "c")]
    assert bench.asked[-1] == ((), ("b", "a\\.1"), 128)


def test_a_budget_that_ends_leaves_no_file_for_a_rescue(tmp_path):
    bench = Bench(tmp_path, {"int8": 0.03, **BAD, "qat": BudgetError("the time is up.")})
    with pytest.raises(BudgetError, match="the time is up"):
        bench.climb()
    assert not (tmp_path / "exported.json").exists()


def test_a_rescue_can_be_ended_before_every_rung(tmp_path):
    bench = Bench(tmp_path, {"int8": 0.03, **BAD, "qat": 0.0})
    rungs = []
    bench.climb(pulse=lambda: rungs.append(1))
    assert len(rungs) == 8


def test_readers_come_along_where_an_output_is_to_blame(tmp_path, monkeypatch):
    first = dataclasses.replace(BLAMED[0], rounding=0.4, readers=("a.1", "serving/Reshape", "c"))
    monkeypatch.setitem(globals(), "BLAMED", [first, *BLAMED[1:]])
    bench = Bench(tmp_path, {"int8": 0.03, "3 int16": 0.004, "2 int16": 0.02})
    face = bench.climb().facts["rescue"]
    assert (face["taken"], face["rungs"][-1]["layers"]) == ("worst 1 in int16", ["b", "a.1", "c"])


def test_no_more_layers_are_raised_than_the_options_allow(tmp_path):
    bench = Bench(tmp_path, {"int8": 0.03, **BAD, "qat": 0.002})
    face = bench.climb(most_layers=1).facts["rescue"]
    assert [rung["name"] for rung in face["rungs"]] == ["int8", "worst 1 in int16", "worst 1 in float32", "qat"]
    assert (face["taken"], face["met"], face["worth"]) == ("qat", True, [])
    assert bench.warnings == [
        "rescue: int8 loses 0.0300 on validation rows, 0.0100 is allowed; after qat it loses 0.0020."
    ]


def test_where_nothing_helps_the_best_is_kept_and_said_to_miss(tmp_path):
    bench = Bench(tmp_path, {"int8": 0.03, **BAD, "2 int16": 0.015, "qat": 0.05})
    file = bench.climb()
    face = file.facts["rescue"]
    assert (face["taken"], face["met"]) == ("worst 2 in int16", False)
    assert bench.warnings == [
        "rescue: int8 loses 0.0300 on validation rows, 0.0100 is allowed; none of 8 rungs is within it, "
        "with 'b', 'a.1' in int16 it loses least, 0.0150."
    ]
    assert {each["layer"]: each["raised"] for each in face["layers"]} == {"b": "int16", "a.1": "int16", "c": ""}


def test_a_rung_that_cannot_be_made_is_recorded_and_passed_over(tmp_path):
    bench = Bench(tmp_path, {"int8": 0.03, **BAD, "qat": ModelError("qat: no layer to work on")})
    face = bench.climb(most_layers=1).facts["rescue"]
    assert face["rungs"][-1] == {
        **dict.fromkeys(("drop", "bytes")),
        "name": "qat",
        "precision": "",
        "layers": [],
        "reason": "qat: no layer to work on",
    }
    assert face["taken"] == "worst 1 in int16"


def test_without_qat_the_ladder_ends_at_the_layers(tmp_path):
    bench = Bench(tmp_path, {"int8": 0.03, **BAD})
    assert [rung["name"] for rung in bench.climb(qat=False).facts["rescue"]["rungs"]][-1] == "worst 3 in float32"


def test_a_model_that_has_no_int8_file_is_refused_with_the_reason(tmp_path):
    bench = Bench(tmp_path, {"int8": ModelError("no kernel for ERF")})
    with pytest.raises(TrimlineError, match=r"^rescue: int8 itself cannot be made: no kernel for ERF$"):
        bench.climb()
    assert not (tmp_path / "exported.json").exists()


@pytest.mark.parametrize(
    ("drop", "words"), [(0.004, "loses 0.0040."), (0.0, "loses nothing."), (-0.02, "gains 0.0200.")]
)
def test_what_came_of_it_is_said_in_words(tmp_path, drop, words):
    bench = Bench(tmp_path, {"int8": 0.03, "1 int16": drop})
    bench.climb()
    assert bench.warnings[0].endswith(f"with 'b' in int16 it {words}")


def test_the_face_is_json_and_holds_no_infinity(tmp_path):
    bench = Bench(tmp_path, {"int8": 0.03, "1 int16": 0.0})
    bench.climb()
    text = (tmp_path / "exported.json").read_text()
    assert json.loads(text)["rescue"]["layers"][0] == {"layer": "b", "snr_db": 3.0, "added": 0.5, "raised": "int16"}
    assert "Infinity" not in text
