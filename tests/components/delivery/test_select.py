import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.delivery.select import deciding_drop, drops, failed, remarks, select
from components.errors import ConstraintError
from components.options import SelectOptions


def variant(recipe, metric=0.9, gzip=1000, p50=1.0, *, validation=None, size=2000, dtype="float32", **more):
    return {
        "recipe": recipe,
        "status": "ok",
        "reason": None,
        "metric_name": "accuracy",
        "metric": metric,
        "metric_drop": None,
        "validation_metric": metric if validation is None else validation,
        "validation_drop": None,
        "bytes": size,
        "gzip_bytes": gzip,
        "latency_ms": {"p50": p50, "p90": p50 * 1.1, "cpu": "a processor"},
        "proof": {"weight_dtypes": {dtype: 1}},
        **more,
    }


FOUR = drops(
    [
        variant("float32", 0.9, 4000, 1.0, size=5000),
        variant("int8", 0.895, 1100, 0.4, size=1500),
        variant("qat", 0.91, 1300, 0.5, size=1600),
        variant("prune@0.8+qat", 0.85, 500, 0.5, size=1600),
    ]
)


def test_the_smallest_within_the_drop_is_picked_with_the_reason_in_numbers():
    picked = select(FOUR, SelectOptions(max_metric_drop=0.01))
    assert picked.recipe == "int8"
    assert picked.because == (
        "gzip 1,100 bytes, the smallest of 3 of 4 variants that lose at most 0.0100; lost 0.0050 on validation"
    )
    assert picked.ranking == ("int8", "qat", "float32")
    assert picked.misses == {"prune@0.8+qat": "max_metric_drop is 0.0100, it has 0.0500"}
    assert json.loads(json.dumps(picked.to_json()))["ranking"] == ["int8", "qat", "float32"]


@pytest.mark.parametrize(
    ("options", "recipe", "because"),
    [
        (SelectOptions(objective="latency"), "int8", "0.4 ms median, the fastest of 3 of 4"),
        (SelectOptions(objective="metric"), "qat", "accuracy 0.9100 on validation, the best of 3 of 4"),
        (SelectOptions(max_metric_drop=None), "prune@0.8+qat", "the smallest of 4 of 4 variants; lost 0.0500"),
        (SelectOptions(size="raw"), "int8", "raw 1,500 bytes, the smallest"),
        (SelectOptions(objective="metric", max_bytes=1200), "int8", "and have at most 1,200 gzip bytes; lost"),
        (SelectOptions(objective="metric", max_bytes=1599, size="raw"), "int8", "have at most 1,599 raw bytes"),
        (SelectOptions(objective="metric", max_latency_ms=0.45), "int8", "and take at most 0.45 ms; lost"),
    ],
)
def test_objectives_and_constraints(options, recipe, because):
    picked = select(FOUR, options)
    assert picked.recipe == recipe
    assert because in picked.because


def test_the_validation_split_decides_and_the_test_split_is_only_told():
    variants = drops([variant("float32", 0.9, 9, validation=0.9), variant("int8", 0.9, 5, validation=0.8)])
    assert (variants[1]["metric_drop"], variants[1]["validation_drop"]) == (0, 0.1)
    assert select(variants, SelectOptions()).recipe == "float32"


def test_the_test_split_decides_where_there_is_no_validation_split():
    variants = [variant("float32", 0.9, 9), variant("int8", 0.8, 5)]
    variants = drops([{**each, "validation_metric": None} for each in variants])
    picked = select(variants, SelectOptions(max_metric_drop=0.2))
    assert picked.because.endswith("lost 0.1000 on test")
    assert select(variants, SelectOptions()).recipe == "float32"


def test_a_drop_is_positive_when_worse_whichever_way_the_metric_points():
    rmse = [variant("float32", 2.0, metric_name="rmse"), variant("int8", 2.5, metric_name="rmse")]
    assert [each["metric_drop"] for each in drops(rmse)] == [0, 0.5]
    accuracy = [variant("float32", 0.5), variant("int8", 0.75)]
    assert [each["metric_drop"] for each in drops(accuracy)] == [0, -0.25]


def test_a_drop_on_the_limit_is_within_it():
    variants = drops([variant("float32", 0.9), variant("int8", 0.89, 1)])  # 0.9 - 0.89 is 0.010000000000000009
    assert select(variants, SelectOptions(max_metric_drop=0.01)).recipe == "int8"


def test_the_better_rmse_is_the_lower_one():
    variants = drops([variant("float32", 2.0, metric_name="rmse"), variant("int8", 2.5, metric_name="rmse")])
    picked = select(variants, SelectOptions(objective="metric", max_metric_drop=None))
    assert (picked.recipe, "rmse 2.0000 on validation" in picked.because) == ("float32", True)


def test_ties_fall_to_the_metric_then_to_bytes_then_to_the_name():
    same = [variant(name, 0.9, 10) for name in ("float32", "b", "a")]
    assert select(drops(same), SelectOptions()).recipe == "a"
    assert select(drops([*same, variant("c", 0.905, 10)]), SelectOptions()).recipe == "c"
    better = [variant("float32", 0.9, 8), variant("e", 0.905, 9)]
    assert select(drops(better), SelectOptions(objective="latency")).recipe == "e"
    faster = [variant("float32", 0.9, 9), variant("d", 0.9, 8)]
    assert select(drops(faster), SelectOptions(objective="latency")).recipe == "d"


def test_a_failed_variant_is_never_picked_however_small_it_is():
    small = variant("qat", 0.99, 1, status="failed", reason="layer 'a': sparsity 0.8000 was promised")
    variants = drops([variant("float32"), small, failed("prune+qat", "training diverged")])
    picked = select(variants, SelectOptions(max_metric_drop=None))
    assert picked.recipe == "float32"
    assert picked.misses == {
        "qat": "failed: layer 'a': sparsity 0.8000 was promised",
        "prune+qat": "failed: training diverged",
    }


def test_without_float32_a_drop_is_not_known_and_not_assumed():
    variants = drops([variant("int8")])
    assert deciding_drop(variants[0]) is None
    with pytest.raises(ConstraintError, match=r"max_metric_drop=0\.0100 cannot be checked, no variant has the figure"):
        select(variants, SelectOptions())
    assert select(variants, SelectOptions(max_metric_drop=None)).recipe == "int8"


def test_when_nothing_fits_each_constraint_names_who_comes_nearest_and_by_how_much():
    options = SelectOptions(max_metric_drop=0.01, max_bytes=450, max_latency_ms=0.3)
    with pytest.raises(ConstraintError) as caught:
        select(FOUR, options)
    assert str(caught.value) == (
        "select: none of 4 variants meets every constraint: max_metric_drop=0.0100 is met by 'qat' with -0.0100; "
        "max_bytes=450 is missed by 50 at least ('prune@0.8+qat', 500); "
        "max_latency_ms=0.3 is missed by 0.1 at least ('int8', 0.4). Loosen one, or add recipes."
    )


def test_when_nothing_works_the_reasons_are_told():
    with pytest.raises(ConstraintError, match=r"0 of 1 variants work \(int8: no examples\); repair the first"):
        select([failed("int8", "no examples")], SelectOptions())
    with pytest.raises(ConstraintError, match=r"0 of 0 variants work \(none was made\)"):
        select([], SelectOptions())


def test_integer_files_that_are_slower_than_float32_are_remarked():
    variants = [variant("float32", p50=0.2), variant("int8", p50=0.3, dtype="int8"), variant("float16", p50=0.4)]
    (remark,) = remarks(variants)
    assert remark.startswith("slower than float32 (0.2 ms) on a processor: int8 0.3 ms; integer kernels are not faster")
    (remark,) = remarks([*variants, variant("qat", p50=0.5, dtype="int8")])
    assert "on a processor: int8 0.3 ms, qat 0.5 ms; integer" in remark
    assert remarks([variant("float32", p50=0.2), variant("int8", p50=0.205, dtype="int8")]) == []
    assert remarks([variant("int8", dtype="int8")]) == []


@pytest.mark.parametrize(
    ("recipe", "dense"),
    [("prune@0.9:1x16+int8+sparse", "prune@0.9:1x16+int8"), ("prune@2:4+float32+sparse", "prune@2:4")],
)
def test_sparse_storage_that_is_neither_smaller_nor_faster_is_remarked(recipe, dense):
    plain = variant(dense, p50=1.0, size=2000)
    (remark,) = remarks([plain, variant(recipe, p50=0.99, size=2000)])
    assert remark == (
        f"{recipe} has 2,000 raw bytes and takes 0.99 ms, with zeros stored 2,000 bytes and 1 ms on a processor: "
        "sparse storage is neither smaller nor faster here, so drop '+sparse'."
    )
    assert remarks([plain, variant(recipe, p50=2.0, size=1999)]) == []
    assert remarks([plain, variant(recipe, p50=0.9, size=2001)]) == []
    assert remarks([variant(recipe, p50=2.0, size=2001)]) == []


MEASURED = st.builds(
    lambda metric, validation, gzip, size, p50, status: variant(
        "", metric, gzip, p50, validation=validation, size=size, status=status
    ),
    *[st.floats(0, 1).map(lambda value: round(value, 3))] * 2,
    *[st.integers(1, 50)] * 2,
    st.integers(1, 9).map(lambda value: value / 4),
    st.sampled_from(["ok", "ok", "ok", "failed"]),
)
CONSTRAINTS = st.builds(
    SelectOptions,
    objective=st.sampled_from(["size", "latency", "metric"]),
    size=st.sampled_from(["gzip", "raw"]),
    max_metric_drop=st.none() | st.floats(0, 0.5),
    max_bytes=st.none() | st.integers(1, 50),
    max_latency_ms=st.none() | st.floats(0.1, 2.5),
)


@given(st.lists(MEASURED, min_size=1, max_size=8), CONSTRAINTS, st.randoms())
def test_the_choice_meets_every_constraint_and_none_that_does_is_better(measured, options, random):
    names = ["float32", *(f"r{number}" for number in range(1, len(measured)))]
    variants = drops([{**each, "recipe": name} for each, name in zip(measured, names, strict=True)])
    size = "gzip_bytes" if options.size == "gzip" else "bytes"

    def fits(each):
        return (
            each["status"] == "ok"
            and (options.max_metric_drop is None or each["validation_drop"] <= options.max_metric_drop)
            and (options.max_bytes is None or each[size] <= options.max_bytes)
            and (options.max_latency_ms is None or each["latency_ms"]["p50"] <= options.max_latency_ms)
        )

    def goal(each):
        figures = {"size": each[size], "latency": each["latency_ms"]["p50"], "metric": -each["validation_metric"]}
        return figures[options.objective]

    fitting = {each["recipe"]: each for each in variants if fits(each)}
    if not fitting:
        with pytest.raises(ConstraintError):
            select(variants, options)
        return
    picked = select(variants, options)
    assert picked.recipe in fitting
    assert goal(fitting[picked.recipe]) == min(map(goal, fitting.values()))
    assert set(picked.ranking) == set(fitting)
    assert set(picked.misses) == set(names) - set(fitting)
    random.shuffle(variants)
    assert select(variants, options).ranking == picked.ranking
