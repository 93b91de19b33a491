import collections
import threading
import time

import numpy as np
import pytest
from PIL import Image

from components.artifacts import PreparedData, read_json, write_json
from components.data.dataset import batches, first_batches, make_batches, training_batches
from components.data.opened import OPENING, OpenedData, in_order, number, records, waves
from components.data.preprocess import preprocess
from components.errors import ContractError
from components.options import ArraysSource, Augmentation, CsvSource, ImagesSource, PreprocessOptions
from components.tracing import Trace


def write_rows(path, rows=900):
    rng = np.random.default_rng(0)
    x = rng.normal(size=rows)
    words = rng.integers(0, 3, rows)
    path.write_text("x,word,y\n" + "".join(f"{x[i]:.6f},w{words[i]},{'ab'[int(x[i] > 0)]}\n" for i in range(rows)))
    return CsvSource(kind="csv", train=[str(path)], label="y")


def prepare(source, folder, *, opens=False, seed=5, on_pulse=lambda: None, **options):
    folder.mkdir()
    made = PreprocessOptions.model_validate({"block_rows": 16, **options})
    return preprocess(source, made, folder, task=None, seed=seed, opens=opens, trace=Trace(on_pulse=on_pulse))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_written_for_a_reader_beside_it_the_artifact_is_the_same_and_was_foretold(tmp_path):
    source = write_rows(tmp_path / "rows.csv")
    seen, foretold = [], []

    def look():
        seen.append({path.name for path in (tmp_path / "open").glob("train-*.tfrecord")})
        foretold.append(read_json(tmp_path / "open" / OPENING))

    whole = prepare(source, tmp_path / "whole", split_bytes=1024)
    made = prepare(source, tmp_path / "open", split_bytes=1024, opens=True, on_pulse=look)
    assert contents(whole.folder) == contents(made.folder)
    assert len(seen) == len(list(waves(whole.files("train")))) == 4
    assert seen[0] == set()  # the transform is fitted, no file is there
    assert all(one < other for one, other in zip(seen[:-1], seen[1:], strict=True))  # then each wave brings some
    # The first wave is what a training reads first.
    files = [path.name for path in whole.files("train")]
    assert seen[1] == set(in_order(files, 5, number)[: len(seen[1])])
    told = foretold[0]["manifest"]
    assert foretold[0]["transform"] == whole.transform
    for name in ("spec", "columns", "block_rows"):
        assert told[name] == whole.manifest[name]
    for split, entry in whole.manifest["splits"].items():
        assert told["splits"][split]["rows"] == entry["rows"]
        assert told["splits"][split]["files"] == [
            {"name": file["name"], "rows": file["rows"]} for file in entry["files"]
        ]


def appearing(whole: PreparedData, folder, pause=0.02) -> OpenedData:
    """The files of `whole`, one after the other in a folder that gets its name at last."""
    partial, done = folder.with_name("growing"), threading.Event()
    partial.mkdir()
    opening = {"manifest": whole.manifest, "transform": whole.transform}
    write_json(partial / OPENING, opening)

    def work():
        for path in in_order(sorted(whole.folder.glob("*.tfrecord")), 5, lambda each: number(each.name)):
            time.sleep(pause)
            (partial / f".{path.name}").write_bytes(path.read_bytes())
            (partial / f".{path.name}").rename(partial / path.name)
        for name in ("manifest.json", "transform.json"):
            (partial / name).write_bytes((whole.folder / name).read_bytes())
        partial.rename(folder)
        done.set()

    threading.Thread(target=work).start()
    return OpenedData(folder, partial, done.is_set, 5)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(noise=0.1)])
def test_the_first_epoch_is_the_same_whether_its_files_are_there_or_come_one_by_one(tmp_path, augmentation):
    whole = prepare(write_rows(tmp_path / "rows.csv"), tmp_path / "whole", split_bytes=1024)
    growing = appearing(whole, tmp_path / "grown")
    sides = [
        list(first_batches(data, batch_size=32, seed=5, augmentation=augmentation).as_numpy_iterator())
        for data in (growing, whole)
    ]
    assert len(sides[0]) == len(sides[1]) == whole.rows("train") // 32
    for (x, y), (other_x, other_y) in zip(*sides, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(y, other_y)
    assert growing.whole().rows("train") == whole.rows("train")


def test_the_first_epoch_has_each_row_once_in_another_order_for_another_seed(tmp_path):
    whole = prepare(write_rows(tmp_path / "rows.csv"), tmp_path / "whole", split_bytes=1024)
    rows = whole.rows("train")

    def numbers(made):
        return [float(value) for x, _ in made.as_numpy_iterator() for value in x[:, 0]]

    usual = numbers(training_batches(whole, batch_size=1, seed=5).take(rows))
    ours = numbers(first_batches(whole, batch_size=1, seed=5))
    assert collections.Counter(ours) == collections.Counter(usual)
    assert ours != usual
    assert numbers(first_batches(whole, batch_size=1, seed=6)) != ours


def test_batches_of_the_first_epoch_stand_apart_and_their_rows_are_told(tmp_path):
    whole = prepare(write_rows(tmp_path / "rows.csv"), tmp_path / "whole", split_bytes=1024)
    made = make_batches(whole, augmentation=Augmentation(), overlap=True)
    assert made.first_apart
    assert not make_batches(whole, augmentation=Augmentation()).first_apart
    stored = np.concatenate([x for x, _ in make_all(whole)])
    third = list(made.training(32, 5, 0).as_numpy_iterator())[2]
    np.testing.assert_array_equal(stored[made.rows_of(32, 5, 0, 2)], third[0])
    usual = next(iter(training_batches(whole, batch_size=32, seed=5, first_epoch=1).as_numpy_iterator()))
    later = next(iter(made.training(32, 5, 1).as_numpy_iterator()))
    np.testing.assert_array_equal(later[0], usual[0])


def make_all(data):
    return batches(data, "train", batch_size=100).as_numpy_iterator()


def test_what_ended_the_preprocessing_ends_the_reading(tmp_path):
    whole = prepare(write_rows(tmp_path / "rows.csv", 100), tmp_path / "whole")

    def ended():
        raise ContractError("the disk is full")

    broken = OpenedData(tmp_path / "none", whole.folder.with_name("nothing"), ended, 5)
    broken.__dict__["manifest"] = whole.manifest
    with pytest.raises(ContractError, match="the disk is full"):
        next(records(broken, 5))


def test_pictures_that_cannot_be_read_are_found_out_when_all_are_there(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(30):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    (tmp_path / "pictures" / "cat" / "broken.png").write_bytes(b"no picture at all")
    source = ImagesSource(kind="images", train=str(tmp_path / "pictures"))
    foretold = []
    made = prepare(
        source,
        tmp_path / "open",
        opens=True,
        max_bad_fraction=0.1,
        on_pulse=lambda: foretold.append(read_json(tmp_path / "open" / OPENING)),
    )
    data = OpenedData(made.folder, tmp_path / "gone", lambda: True, 5)
    data.__dict__["manifest"] = foretold[0]["manifest"]
    sound, told = made.rows("train"), data.rows("train")
    assert told == sound + 1
    with pytest.raises(ContractError, match=rf"{told} training rows were promised, {sound} are sound"):
        data.whole()


def test_waves_hold_every_part_once():
    for count in (1, 3, 4, 5, 100):
        made = list(waves(range(count)))
        assert [each for wave in made for each in wave] == list(range(count))
        assert len(made) <= 4


def test_arrays_open_too(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(200, 3)), y=rng.integers(0, 2, 200))
    source = ArraysSource(kind="arrays", train=str(tmp_path / "a.npz"))
    whole = prepare(source, tmp_path / "whole")
    assert contents(prepare(source, tmp_path / "open", opens=True).folder) == contents(whole.folder)


def test_one_worker_writes_file_after_file_in_the_order_of_the_reader(tmp_path):
    made = prepare(write_rows(tmp_path / "rows.csv"), tmp_path / "open", split_bytes=1024, opens=True)
    written = sorted(made.files("train"), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in written] == in_order([path.name for path in made.files("train")], 5, number)
