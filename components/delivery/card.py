"""The model card: what ships, how good it is, how that was measured, and what nobody checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

STEPS = {
    "channels": "removal of channels that took {} of the multiply-adds",
    "lowrank": "low-rank factorisation that keeps {} of the energy of each kernel",
    "prune": "magnitude pruning to {}",
    "cluster": "weight clustering, {} distinct weights a layer",
    "qat": "quantization-aware training",
}
FORMATS = {
    "float32": "float32",
    "float16": "float16 kernels that are computed in float32",
    "dynamic": "int8 kernels with activations quantized at run time",
    "int8": "int8 kernels and activations",
    "int16x8": "int8 kernels with int16 activations",
    "int8_weights": "int8 kernels that are computed in float32",
    "int4_weights": "int4 kernels that are computed in float32",
}


def model_card(metadata: Mapping[str, Any], gate: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
      metadata: Content of the bundle's `metadata.json`.
      gate: What `skew.skew_gate` returned.
      manifest: Of the prepared data.
    """
    parts = (_what, _use, _data, _figures, _latency, _proof)
    sections = [part(metadata, manifest) for part in parts]
    sections += [_privacy(metadata["privacy"])] if "privacy" in metadata else []
    sections += [_gate(gate), _limits(metadata, gate)]
    return "\n\n".join(sections) + "\n"


def in_words(recipe: str, format: str) -> str:
    """A recipe as a person would say it.

    >>> in_words("prune@0.8+qat", "int8")
    'magnitude pruning to a sparsity of 0.8, then quantization-aware training, then written as int8 kernels and activations'
    """
    names = [part.partition("@") for part in recipe.split("+")]
    steps = [
        STEPS[name].format(_zeros(strength) if name == "prune" else strength)
        for name, _, strength in names
        if name in STEPS
    ]
    sparse = " without the zeros" if recipe.endswith("+sparse") else ""
    return ", then ".join([*steps, f"written as {FORMATS[format]}{sparse}"])


def _zeros(strength: str) -> str:
    """'0.8', '0.9:1x16' or '2:4' in words."""
    first, _, last = strength.partition(":")
    if not last:
        return f"a sparsity of {first}"
    return f"a sparsity of {first} in blocks of {last}" if "x" in last else f"{first} zeros in each {last} inputs"


def _table(header: tuple[str, ...], rows: Iterator[tuple[Any, ...]] | list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(part) for part in line) + " |" for line in lines)


def _cell(part: Any) -> str:
    return str(part).replace("|", "\\|").replace("\n", " ")


def _what(metadata: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    given, made = metadata["inputs"][0], metadata["outputs"][0]
    labels = ", ".join(map(_cell, metadata["labels"][:20])) + (", ..." if len(metadata["labels"]) > 20 else "")
    answers = f"one of {len(metadata['labels'])} labels: {labels}" if metadata["labels"] else "a number"
    return "\n".join(
        [
            f"# {metadata['name']}",
            "",
            f"A {metadata['task']} model as one TFLite file of {metadata['measured']['bytes']:,} bytes "
            f"({metadata['measured']['gzip_bytes']:,} compressed) with {metadata['parameters']:,} parameters. It answers with {answers}.",
            "",
            f"- input `{given['name']}`: {given['dtype']} {given['shape']}{_quantized(given)}",
            f"- output `{made['name']}`: {made['dtype']} {made['shape']}{_quantized(made)}",
            f"- recipe `{metadata['recipe']}`: {in_words(metadata['recipe'], metadata['format'])}",
            f"- chosen because: {metadata['selected_because']}",
        ]
    )


def _quantized(tensor: Mapping[str, Any]) -> str:
    parts = tensor["quantization"]
    return "" if parts is None else f", real value = {parts['scale']:.9g} * (code - {parts['zero_point']})"


def _use(metadata: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    example = {"table": "rows.csv", "values": "rows.npy", "image": "picture.png"}[metadata["preprocessing"]["kind"]]
    return "\n".join(
        [
            "## Use",
            "",
            "    pip install numpy ai-edge-litert",
            f"    python predict.py {example}",
            "    python predict.py golden.json",
            "",
            "`predict.py` feeds the file as training did: `transform.py` with the numbers of `transform.json`. Feed the file "
            "otherwise only if you reproduce the features of `golden.json` exactly.",
        ]
    )


def _data(metadata: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    rows = [(split, f"{count:,}") for split, count in metadata["examples"].items()]
    records = manifest["records"]
    return "\n".join(
        [
            "## Data",
            "",
            _table(("split", "rows"), rows),
            "",
            f"{records['read']:,} records were read, {records['quarantined']:,} of them malformed and left out. "
            f"Preprocessing: {_preprocessing(metadata['preprocessing'])}.",
        ]
    )


def _preprocessing(facts: Mapping[str, Any]) -> str:
    if facts["kind"] == "image":
        height, width = facts["size"]
        return f"pictures resized to {height} x {width} with {facts['channels']} channels, pixels times 1/255"
    if facts["kind"] == "values":
        return f"{facts['width']} numbers, standardised"
    return "; ".join(f"{_cell(column['name'])} ({column['kind']}, {column['rule']})" for column in facts["columns"])


def _figures(metadata: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    figures = metadata["metrics"]
    better = "lower" if figures["name"] == "rmse" else "higher"
    rows = [
        ("test", _number(figures["metric"]), _number(figures["metric_drop"])),
        ("validation", _number(figures["validation_metric"]), _number(figures["validation_drop"])),
    ]
    return "\n".join(
        [
            "## Figures",
            "",
            f"{figures['name']} of this very file, run by ai-edge-litert; {better} is better, a positive drop is worse than float32.",
            _chosen_on(figures["validation_metric"]),
            "",
            _table(("split", figures["name"], "drop"), rows),
        ]
    )


def _chosen_on(validation: float | None) -> str:
    if validation is None:
        return "There is no validation split: the choice was made on the test split, so expect less on new data."
    return "The choice was made on the validation split; the test split was read to report only."


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _latency(metadata: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    timing = metadata["latency_ms"]
    return (
        f"## Latency\n\n{timing['p50']:.3g} ms median, {timing['p90']:.3g} ms 90th percentile of {timing['runs']} single runs after "
        f"{timing['warmup']} to warm up, {timing['threads']} thread(s), on {timing['cpu']}. Another processor gives other figures."
    )


def _proof(metadata: Mapping[str, Any], _: Mapping[str, Any]) -> str:
    proof = metadata["proof"]
    lines = [
        "## Proof",
        "",
        "Read back from the file:",
        "",
        f"- sparsity {proof['sparsity']:.3f} (fraction of zeros over all kernels)",
        f"- kernels stored as {', '.join(f'{name} ({count})' for name, count in proof['weight_dtypes'].items())}",
        f"- operators {', '.join(f'{name} ({count})' for name, count in proof['operators'].items())}",
        f"- TensorFlow operators (Flex): {', '.join(proof['flex']) or 'none'}",
    ]
    lines += [
        f"- left alone: {_cell(each['layer'])} ({each['class']}): {_cell(each['reason'])}"
        for each in metadata["untreated"]
    ]
    return "\n".join(lines)


def _privacy(promised: Mapping[str, Any]) -> str:
    return (
        f"## Privacy\n\nTrained with differential privacy: epsilon {promised['epsilon']:.2f} at delta {promised['delta']:.2g}, by DP-SGD with "
        f"noise {promised['noise']:g} and gradients of at most norm {promised['clip']:g}, {promised['updates']:,} updates of "
        f"{promised['batch_size']} of {promised['rows']:,} rows. Accountant: {promised['accountant']}; the batches were shuffled, so this is the "
        "usual approximation. Not counted: statistics of preprocessing and ranges of calibration, the choice among variants, and the raw "
        "records in `golden.json`."
    )


def _gate(gate: Mapping[str, Any]) -> str:
    keras = gate["seams"]["keras"]
    if isinstance(keras, dict):
        keras = f"differ by {keras['difference']:.3g} of their spread, {keras['tolerance']:g} allowed"
    rows = [
        ("Beam's features and this bundle's transform", gate["seams"]["beam"]),
        ("inputs as tf.data delivered them", gate["seams"]["tf.data"]),
        ("answers of the Keras model and of the file", keras),
        ("answers of the file and of this bundle", gate["seams"]["bundle"]),
    ]
    return f"## Skew gate\n\n{gate['records']} raw records went every way:\n\n{_table(('seam', 'result'), rows)}"


def _limits(metadata: Mapping[str, Any], gate: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
    lines = [
        "## Limits",
        "",
        "- The figures hold for data like the test split; nothing was checked on other data, on groups within it, or against attacks.",
        "- A probability is the softmax of the model's answer and was not calibrated."
        if metadata["labels"]
        else "- No interval comes with the value.",
        f"- `golden.json` holds {gate['records']} raw records of the data: make sure that you may pass them on. They show that the bundle "
        "computes as it did here, and measure no quality.",
    ]
    lines += ["- The skew gate left seams unchecked, see above."] if "not checked" in gate["seams"].values() else []
    return "\n".join([*lines, "", f"Made by trimline with {versions}."])
