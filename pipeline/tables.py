"""What the command line prints: a table for people, JSON for scripts, from the same values."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import rich.console
import rich.table

from pipeline.auto import Outlook
from pipeline.plan import Plan
from pipeline.preflight import Finding
from pipeline.results import Results
from pipeline.search import OPENERS
from pipeline.tune import Tuned

WIDE = 100  # columns of a terminal
FOR_WIDE = ("of float32", "sparsity")  # left out where it is narrower: the report has them too


def _console() -> rich.console.Console:
    """The terminal; a pipe or a file gets lines that are not cut at 80 columns."""
    console = rich.console.Console(highlight=False, markup=False)
    return console if console.is_terminal else rich.console.Console(highlight=False, markup=False, width=160)


def _table(title: str | None, *columns: str) -> rich.table.Table:
    gap = 2 if _console().width >= WIDE else 1
    table = rich.table.Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def show_results(results: Results) -> None:
    """The table of variants, the chosen file, and where everything lies."""
    data, console = results.data, _console()
    rows = data["examples"]
    columns = ["recipe", data["metric"], "drop", "bytes", "gzip", "of float32", "ms p50", "sparsity", "status"]
    shown = [number for number, name in enumerate(columns) if console.width >= WIDE or name not in FOR_WIDE]
    table = _table(
        f"{data['run']}: {rows['train']} rows trained on, {rows['test']} tested", *(columns[each] for each in shown)
    )
    whole = next((v["gzip_bytes"] for v in data["variants"] if v["recipe"] == "float32" and v["status"] == "ok"), None)
    for variant in data["variants"]:
        chosen = variant["recipe"] == data["selected"]
        row = _variant_row(variant, whole, chosen)
        table.add_row(*(row[each] for each in shown), style="bold green" if chosen else None)
    console.print(table)
    for variant in data["variants"]:
        if variant["reason"]:
            console.print(f"{variant['recipe']}: {variant['reason']}", soft_wrap=True)
    for remark in data["remarks"]:
        console.print(f"note: {remark}", soft_wrap=True)
    if results.selected:
        console.print(f"Chosen:       {data['selected']}: {data['selected_because']}", soft_wrap=True)
        console.print(f"File:         {results.folder / 'bundle' / 'model.tflite'}", soft_wrap=True)
        console.print(f"Bundle:       {results.bundle}", soft_wrap=True)
    console.print(f"Report:       {results.report}", soft_wrap=True)
    console.print(f"TensorBoard:  trimline tensorboard {results.folder}    ({results.tensorboard})", soft_wrap=True)


def _variant_row(variant: dict[str, Any], whole: int | None, chosen: bool) -> list[str]:
    if variant["metric"] is None:
        return [variant["recipe"], *["-"] * 7, variant["status"]]
    share = f"{variant['gzip_bytes'] / whole:.2f}x" if whole else "-"
    return [
        variant["recipe"],
        f"{variant['metric']:.4f}",
        f"{variant['metric_drop']:+.4f}" if variant["metric_drop"] is not None else "-",
        f"{variant['bytes']:,}",
        f"{variant['gzip_bytes']:,}",
        share,
        f"{variant['latency_ms']['p50']:.3g}",
        f"{variant['proof']['sparsity']:.2f}",
        "CHOSEN" if chosen else variant["status"],
    ]


def show_plan(plan: Plan, findings: list[Finding], ahead: Outlook | None = None, *, as_json: bool) -> None:
    """Every step with its state, what is known of a search, then what the pre-flight checks found."""
    states = {step.name: _state(plan, step) for step in plan.steps}
    if as_json:
        steps = [
            {
                "step": step.name,
                "stage": step.stage.name,
                "state": states[step.name],
                "fingerprint": step.key.fingerprint,
            }
            for step in plan.steps
        ]
        facts: dict[str, Any] = {"steps": steps, "findings": [dataclasses.asdict(each) for each in findings]}
        print(json.dumps({**facts, **({"search": dataclasses.asdict(ahead)} if ahead else {})}, indent=1))
        return
    console, table = _console(), _table(f"Plan of {plan.config.name}", "step", "state", "fingerprint")
    for step in plan.steps:
        table.add_row(step.name, states[step.name], step.key.fingerprint[:12])
    console.print(table)
    if ahead is not None:
        _show_outlook(console, ahead, plan.config.compress.budget)
    for finding in findings:
        console.print(f"{finding.level}: {finding.text}", soft_wrap=True)
    if not findings:
        console.print("Pre-flight checks found nothing to say.")


def _show_outlook(console: rich.console.Console, ahead: Outlook, budget: str) -> None:
    line = f"Recipes are searched for behind the base training, for {budget} (compress.budget), {', '.join(OPENERS)} first."
    console.print(line, soft_wrap=True)
    if ahead.known:
        names = ", ".join(each.recipe for each in ahead.known)
        console.print(
            f"In the store are {len(ahead.known)} trials, which took {ahead.seconds:.0f} s: {names}.", soft_wrap=True
        )
    if ahead.then is None:
        console.print("Nothing more fits into the budget, or is in sight.")
    else:
        console.print(f"Next: {ahead.then.recipe} ({ahead.then.why}).", soft_wrap=True)


def _state(plan: Plan, step: Any) -> str:
    if plan.cached(step):
        return "cached"
    if step.stage.resumes and plan.store.partial(step.key).exists():
        return "goes on"
    return "if needed" if step.lazy else "runs"


def show_proof(proof: Any, *, as_json: bool) -> None:
    """What a .tflite file holds, tensor by tensor."""
    facts = dataclasses.asdict(proof)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    columns = ("weights", "used by", "shape", "dtype", "stored", "sparsity", "zeros", "distinct", "distinct/channel")
    console, table = _console(), _table(None, *columns)
    for kernel in facts.pop("weights"):
        table.add_row(
            kernel["name"],
            kernel["operator"],
            "x".join(map(str, kernel["shape"])),
            kernel["dtype"],
            kernel["storage"],
            f"{kernel['sparsity']:.3f}",
            kernel["zeros"]["pattern"] or "none",
            str(kernel["distinct"]),
            str(kernel["distinct_per_channel"]),
        )
    console.print(table)
    for name, value in facts.items():
        console.print(f"{name:26} {_words(value)}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else str(value)


def show_verification(verification: Any, *, as_json: bool) -> None:
    """What a bundle's check found."""
    facts = dataclasses.asdict(verification)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = _console()
    for name, value in facts.items():
        console.print(f"{name:22} {value}")
    console.print("The bundle holds what it promises.")


def show_predictions(predictions: list[dict[str, Any]], *, as_json: bool) -> None:
    """One line a record."""
    if as_json:
        print(json.dumps(predictions, indent=1))
        return
    for each in predictions:
        print("\t".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in each.values()))


def show_tuned(found: Tuned) -> None:
    """The trials of a search, the best first, and the configuration that came of it."""
    console = _console()
    sign = -1 if found.metric == "accuracy" else 1
    keys = list(found.trials[0].values)
    table = _table(f"{len(found.trials)} trials, judged on validation rows", "trial", found.metric, *keys)
    for trial in sorted(found.trials, key=lambda each: (each.score is None, sign * (each.score or 0.0))):
        score = "failed" if trial.score is None else f"{trial.score:.4f}"
        values = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in trial.values.values())
        table.add_row(str(trial.number), score, *values, style="bold green" if trial == found.best else None)
    console.print(table)
    for trial in found.trials:
        if trial.reason:
            console.print(f"trial {trial.number}: {trial.reason}", soft_wrap=True)
    console.print(f"Best:         {found.file}: trimline run {found.file}", soft_wrap=True)
