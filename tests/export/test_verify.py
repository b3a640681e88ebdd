"""Parity reports: known errors are found to the step, and nothing wrong passes silently."""

from __future__ import annotations

import dataclasses
import json

import keras
import numpy as np
import pytest

from tfkit.export import ParityError, Runner, verify
from tfkit.export.verify import compare, output_steps


def test_a_faithful_file_agrees(small):
    report = verify(small.model, small.files["float32"], small.x, kernels=("xnnpack", "builtin", "reference"))
    assert [r.kernels for r in report.results] == ["xnnpack", "builtin", "reference"]
    assert report.samples == 40
    assert report.max_abs_error < 1e-5
    assert report.argmax_agreement == 1.0
    assert report.max_error_steps is None
    assert report.nonfinite_count == 0
    assert report.ok(atol=1e-6)
    report.raise_if_different(atol=1e-6)
    json.dumps(report.to_dict())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.samples = 1


@pytest.mark.parametrize("offset", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["int8", "int8_io", "uint8_io"])
def test_errors_are_counted_in_steps_of_the_output(small, name, offset):
    """The model is the file itself plus a known number of steps."""
    run = Runner(small.files[name])
    step = output_steps(run)["scores"]
    detail = Runner(small.files["int8_io"]).outputs["scores"]
    assert step == pytest.approx(detail["quantization"][0])  # also where the output is a dequantised float
    report = verify(lambda x: run(x) + offset * step, small.files[name], small.x, kernels=["xnnpack"])
    assert report.max_error_steps == pytest.approx(offset, rel=1e-4)
    assert report.results[0].mean_abs_error == pytest.approx(offset * step, rel=1e-4)
    assert report.ok(max_steps=1.0) == (offset <= 1)


def test_a_wrong_model_is_found(small):
    report = verify(lambda x: -small.expected, small.files["float32"], small.x, batch_size=40)
    assert not report.ok()
    assert report.argmax_agreement == pytest.approx(np.mean(small.expected.argmax(1) == (-small.expected).argmax(1)))
    with pytest.raises(ParityError, match=r"float32\.tflite.*scores with xnnpack.*scores with reference"):
        report.raise_if_different()


def test_batches_do_not_matter(small):
    a = verify(small.model, small.files["int8"], small.x, batch_size=7)
    b = verify(small.model, small.files["int8"], small.x, batch_size=40)
    for one, other in zip(a.results, b.results, strict=True):
        assert one.max_abs_error == pytest.approx(other.max_abs_error, abs=1e-6)


def test_one_error_is_measured_exactly():
    reference = np.zeros((4, 5))
    reference[:, 2] = 1.0
    got = reference.copy()
    got[3, 4] = 1.5
    result = compare(reference, got, step=0.25)
    assert result.max_abs_error == 1.5
    assert result.max_error_steps == 6.0
    assert result.mean_abs_error == pytest.approx(1.5 / 20)
    assert result.argmax_agreement == 0.75
    assert compare(reference[:, :1], got[:, :1]).argmax_agreement is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["model", "file", "both"])
def test_nan_never_passes(value, side):
    good = np.tile([0.0, 0.0, 1.0], (4, 1))
    bad = good.copy()
    bad[1, 0] = value
    result = compare(bad if side != "file" else good, bad if side != "model" else good)
    assert result.nonfinite_count == 1
    assert result.max_abs_error == np.inf
    assert result.argmax_agreement == 0.75
    complaints = result.complaints(max_steps=np.inf, atol=np.inf, min_agreement=0.0)
    assert len(complaints) == 1
    assert "NaN" in complaints[0]


def test_a_nan_from_the_model_fails_the_report(small):
    def broken(x):
        y = np.array(small.model(x))
        y[0, 0] = np.nan
        return y

    report = verify(broken, small.files["float32"], small.x)
    assert report.nonfinite_count == 2  # once with each set of kernels
    assert not report.ok(max_steps=1e9, atol=1e9, min_agreement=0)


def test_a_part_of_a_report(small):
    report = verify(small.model, small.files["int8"], small.x)
    part = report.of("reference")
    assert [r.kernels for r in part.results] == ["reference"]
    assert part.samples == report.samples


def test_step_of_an_output_behind_a_softmax(tmp_path):
    from tfkit.export import convert

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    path = convert(model, tmp_path / "m.tflite", quantization="int8", calibration=x)
    (step,) = output_steps(Runner(path)).values()
    assert step == 1 / 256  # prescribed for softmax by the int8 specification


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": ("fast",)}, "kernels"),
        ({"kernels": ()}, "kernels"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": np.zeros((0, 6), np.float32)}, "at least one sample"),
        ({"model": lambda x: np.zeros((len(x), 4))}, "shape"),
        ({"model": lambda x: [np.zeros((len(x), 3))] * 2}, "cannot be matched"),
    ],
)
def test_arguments_that_break_their_rule(small, changes, message):
    arguments = {"model": small.model, "path": small.files["float32"], "data": small.x, **changes}
    with pytest.raises(ValueError, match=message):
        verify(**arguments)
