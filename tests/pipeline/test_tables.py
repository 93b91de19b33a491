"""What the command line prints of a run, on a narrow and on a wide terminal."""

import json
import re

import pytest

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
