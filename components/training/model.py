"""Model: options and a data contract become one built Keras 3 model, from the zoo, the user's builder or a file.

    ModelOptions, DataSpec --build()--> keras.Model

Whatever the origin, the model that leaves here has one input and one output of the shapes that the data demand.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pathlib
import re
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal

import keras
import pydantic

from components.artifacts import DataSpec
from components.errors import ConfigError, ModelError
from components.options import ModelOptions
from components.training.zoo import ZOO, assemble


def build(options: ModelOptions, spec: DataSpec, *, seed: int) -> keras.Model:
    """Builds the model that `options` describe; initial weights depend on `seed` only.

    Sets Python's, NumPy's and TensorFlow's global seeds, as `keras.utils.set_random_seed` does: a user's builder draws
    its initial weights from them. For a builder Keras's counters of layer names are reset too, so that the same builder
    gives the same layer names whatever was built before it in this process.

    Args:
      options: Where the model comes from. A builder is called with (spec, **options), or, where it has parameters of
        these names, with (input_shape=..., outputs=..., **options).
      spec: What the model must accept and return; an entry of the zoo names its input `spec.input_name`.
      seed: Fixes the initial weights and the layers' random states.

    Returns:
      A built model, not compiled; batch is the only free dimension.

    Raises:
      ConfigError: Unknown option, impossible value, missing file or builder.
      ModelError: The builder failed, the file cannot be loaded, or shapes do not fit the data.
    """
    keras.utils.set_random_seed(seed)
    if options.name is not None:
        model = _from_zoo(options.name, options.options, spec)
        where = f"model.name={options.name}"
    elif options.builder is not None:
        model = _from_builder(options.builder, options.options, spec)
        where = f"model.builder={options.builder}"
    else:
        for key in options.options:
            raise _unknown_option(f"model.file={options.file}", key, ())
        model = load(pathlib.Path(options.file or ""))
        where = f"model.file={options.file}"
    _check_shapes(where, model, spec)
    return model


def outputs_of(model: keras.Model, options: ModelOptions) -> Literal["logits", "probabilities"]:
    """What the model returns: as `options.outputs` says, or read from the activation of the layer that ends it.

    Softmax and sigmoid, as a layer of its own or as the last layer's activation, mean probabilities; all else is logits
    (for regression: the value itself).
    """
    if options.outputs != "auto":
        return options.outputs
    last = _last_layer(model)
    if isinstance(last, keras.layers.Softmax):
        return "probabilities"
    activation = getattr(last, "activation", None)
    name = getattr(activation, "__name__", "")
    return "probabilities" if name in ("softmax", "sigmoid") else "logits"


def load(file: pathlib.Path, options: ModelOptions | None = None) -> keras.Model:
    """Loads a `.keras` file, not compiled.

    Args:
      file: What `keras.Model.save` wrote.
      options: Where the model came from. A builder's module is imported first, so that the layer classes that it
        registers (`keras.saving.register_keras_serializable`) are known; as its code runs anyway, Lambda layers may too.

    Raises:
      ConfigError: No such file.
      ModelError: It cannot be loaded; an unknown layer class is named.
    """
    if options is not None:
        import_builder(options)
    if not file.is_file() or file.suffix != ".keras":
        raise ConfigError(f"model.file={file} must be an existing .keras file; save one with model.save('name.keras').")
    trusted = options is not None and options.builder is not None
    try:
        return keras.saving.load_model(file, compile=False, safe_mode=not trusted)
    except Exception as error:  # Keras raises TypeError, ValueError, KeyError or zip and h5 errors, by what is wrong
        raise _load_error(file, error) from error


def import_builder(options: ModelOptions) -> None:
    """Imports the module of the user's builder, if there is one, so that the layer classes that it registers are known.

    Raises:
      ConfigError: It cannot be imported, or has no such function.
      ModelError: It raised while it was imported.
    """
    if options.builder is not None:
        _load_builder(options.builder)


def _last_layer(model: keras.Model) -> keras.Layer:
    """The layer whose output is the model's; looks into nested models."""
    history = getattr(model.outputs[0], "_keras_history", None) if model.outputs else None
    last = history.operation if history is not None else model.layers[-1]
    return _last_layer(last) if isinstance(last, keras.Model) and last is not model else last


# --- the zoo -----------------------------------------------------------------------------------------------------


def _from_zoo(name: str, options: dict[str, Any], spec: DataSpec) -> keras.Model:
    architecture = ZOO[name]
    try:
        chosen = architecture(**options)
    except pydantic.ValidationError as error:
        raise _zoo_error(name, architecture, error) from None
    try:
        return assemble(chosen, spec)
    except ValueError as error:
        raise ModelError(
            f"model.name={name} cannot be built with {options} on input {spec.input_shape}: {_first_line(error)} "
            "Use fewer stages or larger pictures."
        ) from error


def _zoo_error(name: str, architecture: Any, error: pydantic.ValidationError) -> ConfigError:
    """The first finding as one line; pydantic's own text runs over several."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return _unknown_option(f"model.name={name}", key, architecture.model_fields)
    return ConfigError(
        f"model.options.{key} of {name}: {first['msg']}, got {first['input']!r}; "
        f"the default is {architecture.model_fields[str(first['loc'][0])].default!r}."
    )


def _unknown_option(where: str, key: str, legal: Iterable[str]) -> ConfigError:
    legal = sorted(legal)
    near = difflib.get_close_matches(key, legal, 1, 0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ConfigError(f"{where} has no option {key!r}{hint}; legal: {', '.join(legal) or 'none'}.")


# --- the user's builder ------------------------------------------------------------------------------------------


def _from_builder(path: str, options: dict[str, Any], spec: DataSpec) -> keras.Model:
    builder = _load_builder(path)
    signature = inspect.signature(builder)
    by_parts = {"input_shape", "outputs"} <= set(signature.parameters)
    given: tuple[Any, ...] = () if by_parts else (spec,)
    named = {"input_shape": spec.input_shape, "outputs": spec.outputs} if by_parts else {}
    _check_arguments(path, signature, given, named, options)
    policy = keras.config.dtype_policy()
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy(policy)  # clear_session forgets what the user set
    try:
        model = builder(*given, **named, **options)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"model.builder={path} raised {type(error).__name__}: {_first_line(error)} Call it with {spec} to see where."
        ) from error
    if not isinstance(model, keras.Model):
        raise ModelError(
            f"model.builder={path} must return a keras.Model (Keras 3), got {type(model).__module__}.{type(model).__name__}."
        )
    if not model.built:
        model.build((None, *spec.input_shape))
    return model


def _check_arguments(
    path: str, signature: inspect.Signature, given: tuple[Any, ...], named: dict[str, Any], options: dict[str, Any]
) -> None:
    parameters = signature.parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        first = len(given)
        legal = [each.name for index, each in enumerate(parameters) if index >= first and each.name not in named]
        for key in options:
            if key not in legal:
                raise _unknown_option(f"model.builder={path}", key, legal)
    try:
        signature.bind(*given, **named, **options)
    except TypeError as error:
        raise ConfigError(
            f"model.builder={path}{signature} cannot be called: {error}; take (spec) or (input_shape, outputs), and set the rest in model.options."
        ) from None


def _load_builder(path: str) -> Callable[..., Any]:
    module_path, colon, function = path.rpartition(":")
    if not colon or not module_path or not function:
        raise ConfigError(
            f"model.builder={path!r} must be 'package.module:function' or 'file.py:function'; add ':' and the function's name."
        )
    module = _load_file(path, module_path) if module_path.endswith(".py") else _load_module(path, module_path)
    found = getattr(module, function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(function, names, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(names)) or 'no function'}."
        raise ConfigError(f"model.builder={path}: {module_path} has no function {function!r}; {hint}")
    return found


def _load_module(path: str, name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"model.builder={path}: cannot import {name!r} ({error}); install it, or give 'file.py:function'."
        ) from error


def _load_file(path: str, name: str) -> types.ModuleType:
    file = pathlib.Path(name)
    if not file.is_file():
        raise ConfigError(f"model.builder={path}: no file {file}; give the path of an existing .py file.")
    spec = importlib.util.spec_from_file_location(f"_model_builder_{file.stem}", file)
    assert spec is not None  # a .py suffix always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"model.builder={path}: {file.name} raised {type(error).__name__}: {_first_line(error)} Run it with python to see where."
        ) from error
    return module


# --- a saved model -----------------------------------------------------------------------------------------------


def _load_error(file: pathlib.Path, error: Exception) -> ModelError:
    unknown = re.search(r"Could not locate (?:class|function) '([^']+)'", str(error))
    if unknown:
        return ModelError(
            f"model.file={file} uses {unknown[1]!r}, which this process does not know; give model.builder a function "
            "that defines it and loads the file with custom_objects."
        )
    return ModelError(
        f"model.file={file} cannot be loaded by Keras {keras.__version__}: {_first_line(error)} Save it again with this version."
    )


# --- the contract ------------------------------------------------------------------------------------------------


def _check_shapes(where: str, model: keras.Model, spec: DataSpec) -> None:
    if len(model.inputs or ()) != 1 or len(model.outputs or ()) != 1:
        raise ModelError(
            f"{where} has {len(model.inputs or ())} inputs and {len(model.outputs or ())} outputs; one of each is needed: "
            "join them in a functional model."
        )
    taken, given = tuple(model.inputs[0].shape[1:]), tuple(model.outputs[0].shape[1:])
    if taken != spec.input_shape:
        raise ModelError(
            f"{where} takes {taken}, the data are {spec.input_shape}; build it on keras.Input({spec.input_shape})"
            + (" or set preprocess.image_size." if len(spec.input_shape) == 3 else ".")
        )
    if given != (spec.outputs,):
        wanted = f"{spec.outputs} classes" if spec.labels else "one value (regression)"
        raise ModelError(
            f"{where} returns {given}, the data have {wanted}: ({spec.outputs},); end it with Dense({spec.outputs})."
        )


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith((".", "!", "?")) else line + "."
