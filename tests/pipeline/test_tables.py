"""What the command line prints of a run, on a narrow and on a wide terminal."""

import json
import re

import pytest

from components.delivery.proof import Kernel, Proof
from components.delivery.zeros import Zeros
from pipeline import tables
from pipeline.results import Results


def variant(recipe, **changes):
    return {
        "recipe": recipe, "status": "ok", "reason": None, "metric": 0.9712, "metric_drop": 0.0046, "bytes": 120744,
        "gzip_bytes": 110059, "latency_ms": {"p50": 0.0031}, "proof": {"sparsity": 0.6}, **changes,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    value = {
        "run": "t", "metric": "accuracy", "examples": {"train": 100, "test": 20}, "selected": "prune@0.7+cluster@16+qat",
        "selected_because": "gzip 110,059 bytes, the smallest", "remarks": ["int8 takes longer than float32 here."],
        "variants": [
            variant("float32", gzip_bytes=220118),
            variant("prune@0.7+cluster@16+qat"),
            variant("int8", status="failed", reason="layer 'a' [b] broke.", metric=None),
        ],
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps(value))
    return Results(tmp_path)


@pytest.mark.parametrize(("width", "with_sparsity"), [(80, False), (120, True)])
def test_the_table_fits_the_terminal_and_cuts_no_figure(results, capsys, monkeypatch, width, with_sparsity):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    tables.show_results(results)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    rows = [line for line in shown.splitlines() if "prune@0.7+cluster@16+qat" in line and "CHOSEN" in line]
    assert len(rows) == 1
    assert "…" not in shown
    assert "110,059" in rows[0]
    assert ("sparsity" in shown) == with_sparsity


def test_reasons_remarks_and_places_are_told(results, capsys):
    tables.show_results(results)
    shown = capsys.readouterr().out
    assert "int8: layer 'a' [b] broke." in shown
    assert "note: int8 takes longer than float32 here." in shown
    assert f"{results.folder}/report.html" in shown
    assert "0.50x" in shown


def test_predictions_are_a_line_each_or_json(capsys):
    answers = [{"label": "cat", "probability": 0.93214567}]
    tables.show_predictions(answers, as_json=False)
    assert capsys.readouterr().out == "cat\t0.932146\n"
    tables.show_predictions(answers, as_json=True)
    assert json.loads(capsys.readouterr().out) == answers


def test_inspect_names_the_pattern_and_the_storage_of_each_kernel(capsys):
    facts = {"operator": "FULLY_CONNECTED", "used_as": "y", "dtype": "int8", "scales": 1}
    counts = {"shape": (8, 32), "sparsity": 0.5, "distinct": 9, "distinct_per_channel": 5}
    held = Zeros(pattern="1x16", groups={"2": 1}, blocks={"1x16": 0.5})
    kernels = (
        Kernel(name="a", zeros=held, storage="sparse 1x16", **facts, **counts),
        Kernel(name="b", **facts, **counts),
    )
    totals = dict.fromkeys(("bytes", "gzip_bytes", "parameters", "distinct_weights_max", "distinct_per_channel_max"), 1)
    none = {"weight_dtypes": {}, "operators": {}, "float_operators": (), "flex": (), "custom": ()}
    proof = Proof(sparsity=0.5, input_dtype="int8", output_dtype="int8", weights=kernels, **totals, **none)
    tables.show_proof(proof, as_json=False)
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert first == ["a", "FULLY_CONNECTED", "8x32", "int8", "sparse", "1x16", "0.500", "1x16", "9", "5"]
    assert second == ["b", "FULLY_CONNECTED", "8x32", "int8", "dense", "0.500", "none", "9", "5"]
    tables.show_proof(proof, as_json=True)
    assert json.loads(capsys.readouterr().out)["weights"][0]["zeros"] == {
        "pattern": "1x16",
        "groups": {"2": 1},
        "blocks": {"1x16": 0.5},
    }
