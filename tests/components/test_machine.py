"""The processor's name, on the systems that figures are taken on."""

from components.machine import processor


def test_the_processor_is_named_as_the_system_names_it(tmp_path):
    (tmp_path / "x86").write_text("processor\t: 0\nmodel name\t: A Fine CPU @ 2.0GHz\n")
    (tmp_path / "arm").write_text("processor\t: 0\nModel\t\t: Raspberry Pi 5 Model B\n")
    assert processor(tmp_path / "x86") == "A Fine CPU @ 2.0GHz"
    assert processor(tmp_path / "arm") == "Raspberry Pi 5 Model B"
    assert processor(tmp_path / "absent")
