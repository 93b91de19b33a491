"""Whatever is wrong with a configuration is one line with place, rule, value and next step."""

import pathlib

import pytest

from components.errors import ConfigError
from pipeline.config import from_dict, load_config, template_text
from tests.pipeline.conftest import BASE, DIGITS, refusal

REFUSED = {
    "train: {epoch: 3}": "my.yaml:4: train.epoch is not a key of train, got 3; did you mean 'epochs'?",
    "seeed: 1": "my.yaml:4: seeed is not a key of the configuration, got 1; did you mean 'seed'?",
    "bundle: {xyz: 1}": "my.yaml:4: bundle.xyz is not a key of bundle, got 1; use one of golden.",
    "train:\n  epochs: -1": "my.yaml:5: train.epochs must be a whole number of at least 0, got -1; leave it out for the "
    "default, 20.",
    "train:\n\n  # more\n  epochs: 3.0": "my.yaml:7: train.epochs must be a whole number of at least 0, got 3.0; leave it "
    "out for the default, 20.",
    "train: {batch_size: '5'}": "my.yaml:4: train.batch_size must be a whole number of at least 1, got '5'; leave it out "
    "for the default, 64.",
    "seed: true": "my.yaml:4: seed must be a whole number from 0 to 2147483647, got true; leave it out for the default, 0.",
    "train: 5": "my.yaml:4: train must be a section of keys, got 5; leave it out for the default.",
    "train:": "my.yaml:4: train must be a section of keys, got null; leave it out for the default.",
    "select: {objective: siez}": "my.yaml:4: select.objective must be one of size, latency, metric, got 'siez'; write size.",
    "preprocess: {image_channels: 2}": "my.yaml:4: preprocess.image_channels must be one of 1, 3, or null, got 2; leave it "
    "out for the default, null.",
    "preprocess: {image_size: [3]}": "my.yaml:4: preprocess.image_size must be a list of 2, each a whole number of at "
    "least 1, or null, got [3]; leave it out for the default, null.",
    "preprocess:\n  image_size:\n  - 3\n  - a": "my.yaml:7: preprocess.image_size[1] must be a whole number of at least 1, "
    "got 'a'; 'trimline schema' lists every key and its range.",
    "preprocess: {max_bad_fraction: 1}": "my.yaml:4: preprocess.max_bad_fraction must be a number of at least 0 and below "
    "1, got 1; leave it out for the default, 0.01.",
    "train: {optimizer: {learning_rate: 1e999}}": "my.yaml:4: train.optimizer.learning_rate must be a number above 0, got "
    "inf; leave it out for the default, 0.001.",
    "train: {augmentation: {flip: yes}}": "my.yaml:4: train.augmentation.flip must be true or false, got 'yes'; leave it "
    "out for the default, false.",
    "compress: {recipes: int8}": "my.yaml:4: compress.recipes must be a list of at least one, each text or auto, got 'int8'; put it "
    "in brackets: [int8].",
    "compress:\n  recipes:\n  - int8\n  - prnue": "my.yaml:7: compress.recipes 'prnue': unknown step 'prnue'; use one of "
    "channels, lowrank, prune, cluster, qat, float32, float16, dynamic, int8, int16x8, int8_weights, int4_weights, rescue, strength after '@'.",
    "preprocess:\n  splits: {test: 0.9, validation: 0.2}": "my.yaml:5: preprocess.splits: test + validation + calibration "
    "must be below 1, got 1.15; lower one of them.",
    "preprocess: {columns: {a b: {kind: nubmer}}}": "my.yaml:4: preprocess.columns.'a b'.kind must be one of auto, number, "
    "category, ignore, got 'nubmer'; write number.",
    "train: {batch_size: 0, label_smoothing: 2}\nseed: -1": "my.yaml:4: train.batch_size must be a whole number of at least "
    "1, got 0; leave it out for the default, 64. (and 2 more)",
    "name: again": "my.yaml:4: name must be given once, got it in line 1 too; remove one of them.",
    "train: {epochs: 1, epochs: 2}": "my.yaml:4: train.epochs must be given once, got it in line 4 too; remove one of them.",
    "task: &a auto\nseed: *a": "my.yaml:5: must be YAML, got a fault: aliases (*name) are not supported, write the value "
    "out; check indentation, colons, brackets and quotes there.",
    "task: !!python/name:os.system x": "my.yaml:4: must be plain YAML, got the tag "
    "'tag:yaml.org,2002:python/name:os.system'; write the value without a tag.",
    "\ttask: auto": "my.yaml:4: must be YAML, got a fault: found character '\\t' that cannot start any token; check "
    "indentation, colons, brackets and quotes there.",
    "? [a]\n: b": "my.yaml:4: a key must be one word, got a list or a section; put it in quotes.",
    "task: " + "[" * 60 + "]" * 60: "my.yaml:4: must be nested at most 50 deep, got more; close the brackets.",
    "task: " + "[" * 9000: "my.yaml: must be nested at most 50 deep, got more; close the brackets.",
    "seed: " + "9" * 5000: f"my.yaml:4: must be a number of at most 4300 digits, got '{'9' * 56}...; correct it.",
    'task: "\\ud800"': "my.yaml:4: must be text of whole characters, got '\\ud800'; correct it.",
    "train: {optimizer: {momentum: 0.5}}": "my.yaml:4: train.optimizer.momentum is for sgd only, got 0.5 with adam; leave it "
    "out.",
    "train: {epochs: 2, optimizer: {warmup_epochs: 2}}": "my.yaml:4: train.optimizer.warmup_epochs must be below "
    "train.epochs=2, got 2; lower it.",
    "strategy: {name: multi_worker}": "my.yaml:4: strategy.name=multi_worker must come with strategy.workers, got null; say how "
    "many processes train together.",
    "strategy: {workers: 2}": "my.yaml:4: strategy.workers is for multi_worker only, got 2 with strategy.name=default; leave it out.",
    "compress: {recipes: auto}\nstrategy: {name: multi_worker, workers: 2}": "my.yaml:4: compress.recipes=auto must run in one "
    "process, since its clock would end a step in one worker and not in the others, got strategy.name=multi_worker; list recipes, train "
    "with --until train, then search in one process: trimline compress MODEL.keras --data CONFIG --set 'strategy={}' "
    "--budget 30m.",
    "train: {early_stopping: {patience: 1}}\npreprocess: {splits: {validation: 0}}": "my.yaml:4: train.early_stopping must "
    "have a validation split, got preprocess.splits.validation=0; give it a share, for instance 0.1.",
    "preprocess: {splits: {calibration: 0}}\ncompress: {recipes: [qat, int8]}": "my.yaml:5: compress.recipes 'int8': int8 "
    "must have calibration rows to find its ranges, got preprocess.splits.calibration=0; give it a share, for instance 0.05.",
    "preprocess: {splits: {calibration: 0}}\ncompress: {recipes: [prune@0.5+int16x8]}": "my.yaml:5: compress.recipes "
    "'prune@0.5+int16x8': int16x8 must have calibration rows to find its ranges, got preprocess.splits.calibration=0; give it a "
    "share, for instance 0.05.",
    "select: {max_metric_drop: null}\ncompress: {recipes: [prune@0.5+rescue]}": "my.yaml:5: compress.recipes 'prune@0.5+rescue': a "
    "rescue must know what may be lost, got select.max_metric_drop=null; set it, for instance to 0.01.",
    "preprocess: {splits: {validation: 0}}\ncompress: {recipes: [rescue]}": "my.yaml:5: compress.recipes 'rescue': a rescue must have "
    "validation rows to tell what is lost, got preprocess.splits.validation=0; give it a share, for instance 0.1.",
    "preprocess: {splits: {calibration: 0}}\ncompress: {recipes: [rescue]}": "my.yaml:5: compress.recipes 'rescue': rescue must have "
    "calibration rows to find its ranges, got preprocess.splits.calibration=0; give it a share, for instance 0.05.",
    "compress: {recipes: auto}\npreprocess: {splits: {validation: 0}}": "my.yaml:4: compress.recipes=auto must have validation rows to "
    "compare files of integers with, got preprocess.splits.validation=0; give it a share, for instance 0.1.",
    "compress: {recipes: auto, budget: soon}": "my.yaml:4: compress.budget: must be a positive number and s, m or h, got 'soon'; write for "
    "instance 30m.",
    "export: {keep_float: [head]}\ncompress: {recipes: [int8, qat]}": "my.yaml:5: compress.recipes 'qat': a recipe with qat must be "
    "without export.keep_float and export.int16, since it trains the precision of every layer, got head; name them in "
    "compress.qat.exclude, or leave the recipe out.",
    "export: {int16: ['a(']}": "my.yaml:4: export.int16[0]: must be a regular expression, got 'a(': missing ), unterminated subpattern "
    "at position 1; correct it.",
    "export: {io: int8}\ncompress: {recipes: [int8, int8_weights, int16x8]}": "my.yaml:5: compress.recipes 'int16x8': the input and "
    "output of an int16x8 file must be float32 or int16, got export.io=int8; change export.io, or leave the recipe out.",
    "export: {io: int16}\ncompress: {recipes: [int16x8, qat]}": "my.yaml:5: compress.recipes 'qat': the input and output of an int8 "
    "file must be float32 or int8 or uint8, got export.io=int16; change export.io, or leave the recipe out.",
    "compress: {prune: {begin: 0.5, end: 0.5}}": "my.yaml:4: compress.prune.begin must be below compress.prune.end=0.5, got "
    "0.5; lower it.",
    "compress: {prune: {initial_sparsity: 0.5}, recipes: [prune@0.4]}": "my.yaml:4: compress.recipes 'prune@0.4': the "
    "sparsity must be above compress.prune.initial_sparsity=0.5, got 0.4; lower initial_sparsity.",
    "compress: {prune: {exclude: [a, b], targets: {b: 0.5}}}": "my.yaml:4: compress.prune.targets must not name what "
    "compress.prune.exclude leaves alone, got 'b' in both; drop one.",
    "compress: {prune: {targets: {a: 0.5}}, recipes: ['prune@2:4']}": "my.yaml:4: compress.recipes 'prune@2:4': 2:4 fixes the "
    "sparsity of every kernel, got compress.prune.targets for 'a'; drop the targets, or write a sparsity.",
    "compress: {recipes: ['prune@0.9:1x4+int8+sparse']}": "my.yaml:4: compress.recipes 'prune@0.9:1x4+int8+sparse': sparse "
    "storage of int8 does not work after 'prune@0.9:1x4': XNNPACK loads sparse int8 kernels of dense layers in blocks of 1x16 "
    "only; drop '+sparse', or write 'prune@0.9:1x16+int8+sparse' or 'prune@0.9:1x4+float32+sparse'.",
    "compress: {recipes: [prune@0.5+cluster@2]}": "my.yaml:4: compress.recipes 'prune@0.5+cluster@2': clusters must be at "
    "least 3 after prune, since zero is one of them, got 2; write cluster@3 or more.",
    "train: {distill: {}}": "my.yaml:4: train.distill: give exactly one of teacher, teacher_model; got none.",
    "train: {distill: {teacher: [rows.csv], teacher_model: {name: cnn}}}": "my.yaml:4: train.distill: give exactly one of "
    "teacher, teacher_model; got both.",
    "train: {distill: {teacher_model: {builder: b.py:f}}}": "my.yaml:4: train.distill.teacher_model.builder must be a file "
    "that exists, got '{here}/b.py'; correct the path.",
    "workspace: ''": "my.yaml:4: workspace must name a file or folder, got ''; write its path.",
    'workspace: "a\\0b"': "my.yaml:4: workspace must name a file or folder, got 'a\\x00b'; write its path.",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:40])
def test_a_fault_is_one_line_with_place_rule_value_and_next_step(here, text):
    assert refusal(BASE + text + "\n") == REFUSED[text].replace("{here}", str(here))


SOURCES = {
    "{kind: cvs}": "my.yaml:3: source.kind must be one of arrays, csv, digits, idx, images, line, text, got 'cvs'; write csv.",
    "{train: x}": "my.yaml:3: source.kind must be one of arrays, csv, digits, idx, images, line, text, got null; 'trimline schema' "
    "lists every key and its range.",
    "digits": "my.yaml:3: source must be a section with 'kind', one of arrays, csv, digits, idx, images, line, text, got 'digits'; "
    "'trimline schema' lists every key and its range.",
    "\n  kind: csv\n  trian: [b.csv]\n  label: y": "my.yaml:5: source.trian is not a key of source, got ['b.csv']; did you "
    "mean 'train'? (and 1 more)",
    "\n  kind: csv\n  label: y": "my.yaml:3: source.train must be given, got nothing; add 'train: ...' in section 'source', a "
    "list of at least one, each text.",
    "{kind: csv, train: [rows.csv], label: 5}": "my.yaml:3: source.label must be text, got 5; put it in quotes: '5'.",
    "{kind: csv, train: [rows.csv], label: y, delimiter: '::'}": "my.yaml:3: source.delimiter must be one character, got "
    "'::'; leave it out for the default, ','.",
    "{kind: csv, train: [rows.csv], label: y, columns: [a, yy]}": "my.yaml:3: source.label must be one of source.columns, "
    "got 'y'; did you mean 'yy'?",
    "{kind: csv, train: ['${NOT_SET}/rows.csv'], label: y}": "my.yaml:3: source.train[0] must get the environment variable "
    "NOT_SET, got none set in '${NOT_SET}/rows.csv'; set it: export NOT_SET=FOLDER.",
    "{kind: idx, train_images: rows.csv, train_labels: rows.csv, test_images: rows.csv}": "my.yaml:3: source.test_images "
    "must come with source.test_labels, got it alone; give both or neither.",
    "{kind: line}\ntask: classification": "my.yaml:4: task must be regression or auto for source kind line, got "
    "classification; leave it out.",
    "{kind: line}\npreprocess: {columns: {a: {}}}": "my.yaml:4: preprocess.columns.a must have a source of kind csv, got 'a' "
    "for kind line; leave it out.",
    "{kind: digits}\npreprocess: {splits: {group: a}}": "my.yaml:4: preprocess.splits.group must have a source of kind csv, "
    "got 'a' for kind digits; leave it out.",
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda text: text[:40])
def test_a_source_is_judged_by_its_own_kind(here, source):
    assert refusal(f"name: mine\nmodel: {{name: mlp}}\nsource: {source}\n") == SOURCES[source]


MODELS = {
    "{}": "model: give exactly one of name, builder, file; got none.",
    "{name: mpl}": "model.name must be one of linear, mlp, cnn, resnet8, mobilenet, transformer, wide_and_deep, text_encoder, causal_lm, or "
    "null, got 'mpl'; write mlp.",
    "{builder: build}": "model.builder must be 'package.module:function' or 'file.py:function', got 'build'; put a colon "
    "before the function's name.",
    "{name: mlp, options: {units: [1.5]}}": "model.options.units must be a number or a whole number or text or true or false "
    "or a list, each a whole number, got [1.5]; 'trimline schema' lists every key and its range.",
}


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_given_in_exactly_one_way(here, model):
    assert refusal(f"name: mine\nsource: {{kind: digits}}\nmodel: {model}\n") == "my.yaml:3: " + MODELS[model]


def test_a_file_that_is_not_there_is_named_with_the_line_that_names_it(here):
    text = BASE.replace("[rows.csv]", "\n  [rows.csv, gone.csv, away.csv]").replace("{", "\n  {")
    said = refusal(text)
    assert said == (
        f"my.yaml:4: source.train[1] must be a file that exists, got '{here}/gone.csv'; correct the path. (and 1 more)"
    )
    said = refusal("name: mine\nsource: {kind: images, train: rows.csv}\nmodel: {file: m.keras}\n")
    assert said == (
        f"my.yaml:3: model.file must be a file that exists, got '{here}/m.keras'; correct the path. (and 1 more)"
    )
    distill = "train:\n  distill:\n    teacher: [rows.csv, u.keras]\ncompress: {distill: {teacher: [t.keras]}}\n"
    said = refusal(BASE + distill)
    assert said == (
        f"my.yaml:6: train.distill.teacher[1] must be a file that exists, got '{here}/u.keras'; correct the path. (and 1 more)"
    )
    said = refusal("name: mine\nsource: {kind: images, train: rows.csv}\nmodel: {name: cnn}\n")
    assert said == f"my.yaml:2: source.train must be a folder that exists, got '{here}/rows.csv'; correct the path."


@pytest.mark.parametrize("name", ["store", "STORE", "..", ".x", "a/b", "", "a b", "x" * 65, "-x", "x\n"])
def test_a_name_is_safe_as_a_folder_and_not_the_store_s(here, name):
    with pytest.raises(ConfigError, match=r"^name must be letters, digits, .* got .*; choose another\.$"):
        from_dict({**DIGITS, "name": name})


OVERRIDES = {
    "train.epoch=5": "train.epoch is not a key of train, got 5; did you mean 'epochs'?",
    "trian.epochs=5": "trian is not a key of the configuration, got {'epochs': 5}; did you mean 'train'?",
    "train.epochs.x=5": "train.epochs must be a whole number of at least 0, got {'x': 5}; leave it out for the default, 20.",
    "train.epochs": "must be KEY=VALUE, got 'train.epochs'; write for instance --set train.epochs=5.",
    "train..epochs=1": "must be KEY=VALUE, got 'train..epochs=1'; write for instance --set train.epochs=5.",
    "train.epochs=abc": "train.epochs must be a whole number of at least 0, got 'abc'; leave it out for the default, 20.",
    "train.epochs=[": "must be YAML, got a fault: expected the node content, but found '<stream end>'; check indentation, "
    "colons, brackets and quotes there.",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_that_cannot_be_is_named(here, override):
    assert refusal(BASE + "train: {epochs: 7}\n", override) == f"--set {override}: {OVERRIDES[override]}"


def test_an_override_of_the_kind_of_source_leaves_keys_that_the_new_kind_does_not_have(here):
    said = refusal(BASE, "source.kind=idx")
    assert said.startswith("my.yaml:2: source.train is not a key of source, got [")
    assert said.endswith("use one of kind, train_images, train_labels, test_images, test_labels. (and 3 more)")


def test_a_configuration_that_is_not_there_or_not_text_is_told(here):
    with pytest.raises(
        ConfigError, match=r"^'digit': there is no such file or template; did you mean the template 'digits'\?$"
    ):
        load_config("digit")
    with pytest.raises(
        ConfigError, match=r"^'gone\.yaml': there is no such file or template; templates are adult, digits"
    ):
        load_config(pathlib.Path("gone.yaml"))
    with pytest.raises(ConfigError, match=r"must be a readable file, got 'Is a directory'; check the path\.$"):
        load_config(here)
    (here / "a\nb.yaml").touch()
    with pytest.raises(ConfigError, match=r"^'a\\nb\.yaml':1: a configuration must be a section of keys, got null;"):
        load_config("a\nb.yaml")
    assert refusal(b"name: \xff") == "my.yaml: must be UTF-8 text, got byte 6 that is not; save it as UTF-8."
    assert (
        refusal("")
        == "my.yaml:1: a configuration must be a section of keys, got null; 'trimline init digits' writes one."
    )
    assert refusal("- a").startswith("my.yaml:1: a configuration must be a section of keys, got ['a'];")
    assert refusal("{}") == "my.yaml:1: name must be given, got nothing; add 'name: ...', text. (and 2 more)"
    with pytest.raises(ConfigError, match=r"^template 'nope': there is none of that name; use one of adult"):
        template_text("nope")


def test_python_values_that_no_configuration_holds_are_refused(here):
    loop: dict = {}
    loop["a"] = loop
    for value, message in [
        (object(), r"^task must be text, a number, true, .* got <object .* of type object; convert it\.$"),
        (loop, r"^task\.a\.a must be nested at most 50 deep"),
        ("\ud800", r"^task must be text, .* got '\\ud800' of type str; convert it\.$"),
        (float("nan"), r"^task must be one of auto, classification, regression, got nan;"),
    ]:
        with pytest.raises(ConfigError, match=message):
            from_dict({**DIGITS, "task": value})


# --- templates, schema, reference --------------------------------------------------------------------------------
