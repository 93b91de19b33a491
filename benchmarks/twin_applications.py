"""Every model of keras.applications: its tf_keras twin, the way back, and what compression does with it.

    .venv/bin/python benchmarks/twin_applications.py                  # twin and back
    .venv/bin/python benchmarks/twin_applications.py --outcomes       # and each of OUTCOMES, one update a step; hours
    .venv/bin/python benchmarks/twin_applications.py MobileNetV2 ...  # these only

Weights are random, and compared twice: as the builder initializes them (`own`), and since most of these models then return
the same for every input, where equal outputs show little, with scales, offsets and biases drawn anew under a seed and
statistics taken from pictures (`twin`). The outputs compared are logits; the table says how far the latter spread over
different pictures. All pictures are SYNTHETIC (uniform noise):
the outcomes say that a step runs, keeps its promises and leaves a file that loads, nothing about accuracy.

Each model and step runs in a process of its own, at the lowest priority, with a limit of processor time and memory. Small models
come first, as far as earlier results tell their size. Results go to benchmarks/out/twin_applications.json after each; a second
run does what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from typing import Any

OUT = pathlib.Path(__file__).resolve().parent / "out" / "twin_applications.json"
CLASSES = 10
SMALLEST = {"Inception": 75, "Xception": 71}  # pixels; the builders of these refuse less
OUTCOMES = ("int8", "prune@0.5", "qat", "prune@0.5+qat")


def names() -> list[str]:
    import keras

    return sorted(name for name, value in vars(keras.applications).items() if callable(value) and name[0].isupper())


def build(name: str, *, drawn: bool = True) -> Any:
    """The model at the smallest input that its builder allows, 32 pixels at least; drawn: logits depend on the input."""
    import keras

    keras.utils.set_random_seed(0)
    size = next((side for start, side in SMALLEST.items() if name.startswith(start)), 32)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=CLASSES, classifier_activation=None)
    if drawn:
        scramble(model)
    return model


def scramble(model: Any) -> None:
    """New scales, offsets and biases; then statistics of normalization as they are on pictures; kernels stay."""
    import keras
    import numpy as np

    random = np.random.default_rng(0)
    for weight in model.trainable_weights:
        if len(weight.shape) < 2:
            low, high = (0.5, 1.5) if "gamma" in weight.path else (-0.05, 0.05)
            weight.assign(random.uniform(low, high, weight.shape))
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    before = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    if norms:
        # Half of the pictures are as dark as the examples that to_twin compares with: statistics of bright ones alone make
        # EfficientNetV2B0 answer a change of 1e-7 in such an example with 0.2 of its output.
        shown = np.array(pictures(model, 16, seed=0))
        shown[::2] /= np.abs(shown).max()
        model(shown, training=True)
    for layer, momentum in zip(norms, before, strict=True):
        layer.momentum = momentum
        variance = keras.ops.convert_to_numpy(layer.moving_variance)
        # A channel that is dead on noise must not blow rounding up.
        layer.moving_variance.assign(np.maximum(variance, 0.05 * variance.mean()))


def pictures(model: Any, count: int, seed: int) -> Any:
    """SYNTHETIC: uniform noise in the range that the model asks for, [0, 255] where it rescales by itself, else [-1, 1]."""
    import keras
    import numpy as np

    noise = np.random.default_rng(seed).random((count, *model.input_shape[1:]), np.float32)
    rescales = any(isinstance(layer, keras.layers.Rescaling) for layer in model._flatten_layers())
    return noise * 255 if rescales else noise * 2 - 1


# --- one piece of work, in a process of its own ------------------------------------------------------------------


def twin(name: str) -> dict[str, Any]:
    """Outputs of twin and model on pictures that the check in `to_twin` has not seen, and of the model that came back.

    `fused`: of the twin as it trains, with the fused kernel for normalization, which rounds in another order. `sensitivity` is what a
    change of the pictures by one unit in their last place does to the model itself: what rounds in another order cannot be closer.
    """
    import numpy as np

    from components.compression.hosted import Hosted
    from components.compression.twin import _difference, to_twin

    model = build(name)
    shown = pictures(model, 4, seed=1)
    expected = model(shown, training=False)
    found = tfmot_itself(model)
    made = to_twin(model)
    return {
        **found,
        **compared(model, made, shown),
        "parameters": model.count_params(),
        "pixels": model.input_shape[1],
        "layers": len(made.layers),
        "hosted": sum(isinstance(layer, Hosted) for layer in made.layers),
        "spread": float(np.ptp(np.asarray(expected), axis=0).max() / np.abs(np.asarray(expected)).max()),
        "sensitivity": _difference(expected, model(shown * _nudge(shown), training=False)),
    }


def own(name: str) -> dict[str, Any]:
    """The same with the weights that the builder gives."""
    from components.compression.twin import to_twin

    model = build(name, drawn=False)
    return compared(model, to_twin(model), pictures(model, 4, seed=1))


def compared(model: Any, made: Any, shown: Any) -> dict[str, float]:
    """How far from the model its twin is, by both kernels, and what comes back from it."""
    from components.compression.twin import _difference, from_twin, same_kernels

    expected = model(shown, training=False)
    with same_kernels(made):
        same = made(shown, training=False)
    return {
        "difference": _difference(expected, same),
        "fused": _difference(expected, made(shown, training=False)),
        "back": _difference(expected, from_twin(made, model)(shown, training=False)),
    }


def _nudge(shown: Any) -> Any:
    import numpy as np

    return np.where(np.random.default_rng(2).random(shown.shape) < 0.5, 1 - 1e-7, 1 + 1e-7).astype(np.float32)


def tfmot_itself(model: Any) -> dict[str, Any]:
    """What tfmot says to the Keras 3 model itself."""
    import tensorflow_model_optimization as tfmot

    try:
        tfmot.sparsity.keras.prune_low_magnitude(model)
    except ValueError as error:
        return {"tfmot": f"ValueError: {str(error).splitlines()[0][:120]}"}
    return {"tfmot": "accepts it"}


def outcome(name: str, recipe: str) -> dict[str, Any]:
    """The file of a recipe, each step of one epoch of one update on synthetic pictures; it must load."""
    from ai_edge_litert.interpreter import Interpreter

    from components.artifacts import Promise
    from components.delivery.proof import check, read_proof

    with tempfile.TemporaryDirectory() as text:
        file = written(name, recipe, pathlib.Path(text))
        interpreter = Interpreter(str(file.file))
        interpreter.allocate_tensors()
        proof = read_proof(file.file)
        promises = [Promise.from_json(each) for each in file.facts["promises"]]
        broken = check(proof, promises, file.facts["format"])
    return {
        "bytes": proof.bytes,
        "gzip_bytes": proof.gzip_bytes,
        "promises": len(promises),
        "broken": broken[:3],
        "untreated": len(file.facts["untreated"]),
        "float_operators": list(proof.float_operators) if file.facts["format"] == "int8" else [],
    }


def written(name: str, text: str, folder: pathlib.Path) -> Any:
    """The TFLiteFile of a recipe."""
    import tensorflow as tf

    from components.artifacts import TrainedModel, write_json
    from components.compression.compress import compress, load
    from components.delivery.export import export
    from components.options import CompressOptions, ExportOptions, PruneOptions, QatOptions
    from components.recipe import parse_recipe
    from components.tracing import Trace

    model = build(name)
    model.save(folder / "model.keras")
    write_json(folder / "trained.json", {"outputs": "logits"})
    options = CompressOptions(
        prune=PruneOptions(epochs=1, learning_rate=1e-5), qat=QatOptions(epochs=1, learning_rate=1e-5)
    )
    recipe = parse_recipe(text, options.strengths)
    shown = pictures(model, 8, seed=2)
    batches, fixed = synthetic(shown), {"seed": 0, "trace": Trace()}
    where = {"strategy": tf.distribute.get_strategy(), "batch_size": 8}
    made, carried = None, {}
    for path in recipe.prefixes():
        (folder / str(path[-1])).mkdir()
        made = compress(
            path[-1], path, options, TrainedModel(folder), made, batches, folder / str(path[-1]), **where, **fixed
        )
        carried = {"promises": made.promises, "untreated": made.facts["untreated"]}
    given = (load(made) if made else model, batches.spec, "logits", ExportOptions(), shown, folder)
    return export(str(recipe), recipe.format, *given, **carried, **fixed)


def synthetic(shown: Any) -> Any:
    """Batches of pictures, each a class of its own."""
    import numpy as np
    import tensorflow as tf

    from components.artifacts import Batches, DataSpec

    labels = tuple(f"class {number}" for number in range(CLASSES))
    spec = DataSpec(task="classification", input_name="image", input_shape=shown.shape[1:], labels=labels)
    rows = tf.data.Dataset.from_tensor_slices((shown, np.arange(len(shown), dtype=np.int32)))
    return Batches(
        spec=spec,
        training=lambda size, seed, first: rows.repeat().batch(size, True),
        ordered=lambda split, size: rows.batch(size),
        rows={"train": len(shown), "validation": 0},
    )


def work(name: str, piece: str) -> None:
    """Prints the result as the last line."""
    clock = time.monotonic()
    try:
        compare = {"own": own, "twin": twin}.get(piece)
        result = compare(name) if compare else outcome(name, piece)
    except Exception as error:
        traceback.print_exc()
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        result = {"error": f"{type(error).__name__}: {first[:400]}"}
    print(json.dumps({**result, "seconds": round(time.monotonic() - clock, 1)}))


# --- all of them -------------------------------------------------------------------------------------------------


def run(name: str, piece: str, limit: float, memory: float) -> dict[str, Any]:
    """What `work` printed.

    Args:
      name: The model.
      piece: What to do with it.
      limit: Seconds of processor time, since a process of low priority may wait for hours.
      memory: GiB of private data; TensorFlow maps far more addresses than it uses.
    """

    def confine() -> None:
        os.nice(19)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit),) * 2)
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory * 2**30),) * 2)

    command = [sys.executable, __file__, "--work", piece, name]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=confine)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"error": f"not done after {limit:g} s of processor time, or out of memory"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": f"the process ended with {done.returncode}: {done.stderr.strip()[-200:]}"}
    return json.loads(lines[-1])


def _size(found: dict[str, Any]) -> float:
    """Parameters; unknown ones last."""
    return found.get("twin", {}).get("parameters", float("inf"))


def table(results: dict[str, dict[str, Any]], pieces: list[str]) -> str:
    head = ["model", "parameters", "own weights", "fused kernel", "drawn weights", "fused kernel"]
    head += ["sensitive by", "back differs by", "spread", "layers hosted", "tfmot itself"]
    shown = [each for each in OUTCOMES if each in pieces]
    head += [f"`{each}`" for each in shown]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, found in sorted(results.items()):
        cells = [name, *_twin_cells(found.get("own", {}), found.get("twin", {}))]
        cells += [_outcome_cell(found.get(each, {})) for each in shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _twin_cells(own: dict[str, Any], found: dict[str, Any]) -> list[str]:
    its = [f"{own[key]:.1e}" if key in own else own.get("error", "not run") for key in ("difference", "fused")]
    if "difference" not in found:
        return ["", *its, found.get("error", "not run"), *[""] * 6]
    hosted = f"{found['hosted']} of {found['layers']}"
    measured = [f"{found[key]:.1e}" for key in ("difference", "fused", "sensitivity", "back", "spread")]
    return [f"{found['parameters']:,}", *its, *measured, hosted, found["tfmot"].partition(":")[0]]


def _outcome_cell(found: dict[str, Any]) -> str:
    if "bytes" not in found:
        return found.get("error", "not run")
    if found["broken"]:
        return f"breaks its promise: {found['broken'][0]}"
    floats = f"; float: {', '.join(found['float_operators'])}" if found["float_operators"] else ""
    return f"loads, {found['untreated']} left alone{floats}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="default: all")
    parser.add_argument("--outcomes", action="store_true", help="each of OUTCOMES too")
    parser.add_argument("--pieces", nargs="+", help="these only, of own, twin and OUTCOMES")
    parser.add_argument("--limit", type=float, default=1800, help="seconds of processor time for each piece of work")
    parser.add_argument("--memory", type=float, default=12, help="GiB for each piece of work")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--again", action="store_true", help="do not reuse earlier results")
    parser.add_argument("--work", choices=["own", "twin", *OUTCOMES], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.models[0], options.work)
        return
    pieces = [*(options.pieces or ["own", "twin"]), *(OUTCOMES if options.outcomes else ())]
    results = json.loads(options.out.read_text()) if options.out.exists() and not options.again else {}
    options.out.parent.mkdir(exist_ok=True)
    for name in sorted(options.models or names(), key=lambda each: _size(results.get(each, {}))):
        for piece in pieces:
            if "error" in results.setdefault(name, {}).get(piece, {"error": ""}):
                results[name][piece] = run(name, piece, options.limit, options.memory)
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{name} {piece}: {results[name][piece]}", file=sys.stderr, flush=True)
    print(table(results, pieces))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()
