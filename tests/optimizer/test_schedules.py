"""The schedules against the numbers of the paper."""

import math

import keras
import numpy as np
import pytest

from nlcg_tf.schedules import CifarSchedule, ImageNetSchedule

CIFAR, IMAGENET = 50000, 1281167


def rates(schedule, steps):
    return np.array([float(schedule(step)) for step in steps])


# batch: (peak, warm-up epochs, final rate), for 90 epochs
IMAGENET_RULES = {
    512: (0.2, 5, 0.001),
    8192: (3.2, 5, 0.01),
    16384: (6.4, 15, 0.01),
    32768: (12.8, 15, 0.01),
    65536: (25.6, 30, 0.01),
    98304: (38.4, 30, 0.01),
}


@pytest.mark.parametrize("batch", IMAGENET_RULES)
@pytest.mark.parametrize("epochs", [90, 180])
def test_imagenet(batch, epochs):
    peak, warmup, end = IMAGENET_RULES[batch]
    steps = IMAGENET // batch
    schedule = ImageNetSchedule(batch, epochs, steps)
    at = lambda epoch: float(schedule(round(epoch * steps)))  # noqa: E731
    assert at(0) == pytest.approx(0.001)
    assert float(schedule(warmup * steps / 2)) == pytest.approx((0.001 + peak) / 2, rel=1e-5)
    assert at(warmup) == pytest.approx(peak, rel=1e-5)
    assert at(epochs) == pytest.approx(end, rel=1e-4)
    # Stairs of two epochs with one factor between them.
    stairs = (epochs - warmup) // 2
    factor = (end / peak) ** (1 / stairs)
    for stair in (0, 1, stairs - 1):
        first = (warmup + 2 * stair) * steps
        np.testing.assert_allclose(
            rates(schedule, [first, first + 2 * steps - 1]), peak * factor**stair, rtol=1e-4
        )


@pytest.mark.parametrize("schedule", [CifarSchedule, ImageNetSchedule])
def test_the_factor_scales_the_peak(schedule):
    plain, doubled = schedule(1024, 90, 10), schedule(1024, 90, 10, factor=2)
    assert doubled.peak == 2 * plain.peak
    peak_at = math.ceil(10 * plain.warmup_epochs)
    assert float(doubled(peak_at)) == pytest.approx(2 * float(plain(peak_at)))
    assert float(doubled(0)) == float(plain(0)) == pytest.approx(0.001)
    with pytest.raises(ValueError, match="factor=0"):
        schedule(1024, 90, 10, factor=0)


@pytest.mark.parametrize("schedule", [CifarSchedule, ImageNetSchedule])
def test_a_peak_of_ones_own_hangs_on_no_batch(schedule):
    """In all else the schedule is the paper's."""
    plain, own = schedule(256, 90, 10), schedule(256, 90, 10, peak=0.03)
    assert own.peak == 0.03 and schedule(8192, 90, 10, peak=0.03).peak == 0.03
    steps = [150, 450, 700, 899]
    constant = rates(own, steps) / rates(plain, steps)
    np.testing.assert_allclose(constant, 0.3 if schedule is ImageNetSchedule else 0.15, rtol=1e-4)
    assert schedule.from_config(own.get_config()).peak == 0.03
    for arguments in ({"peak": 0.0}, {"peak": "high"}, {"peak": 0.03, "factor": 2.0}):
        with pytest.raises(ValueError, match=f"peak={arguments['peak']!r}"):
            schedule(1024, 90, 10, **arguments)


@pytest.mark.parametrize("schedule", [CifarSchedule, ImageNetSchedule])
def test_a_cosine_falls_from_the_peak_to_zero(schedule):
    """After the same warm-up."""
    plain, cosine = schedule(256, 90, 10), schedule(256, 90, 10, decay="cosine")
    warmup = cosine.warmup_epochs
    assert warmup == plain.warmup_epochs and float(cosine(20)) == float(plain(20))
    for part, share in ((0, 1), (1 / 3, 0.75), (1 / 2, 0.5), (1, 0), (2, 0)):
        step = 10 * (warmup + part * (90 - warmup))
        assert float(cosine(step)) == pytest.approx(share * plain.peak, abs=1e-6)
    assert schedule.from_config(cosine.get_config()).get_config() == cosine.get_config()
    with pytest.raises(ValueError, match=r"`decay`.*decay='linear'"):
        schedule(256, 90, 10, decay="linear")


@pytest.mark.parametrize("batch", [512, 8192, 16384, 32768, 65536, 98304])
@pytest.mark.parametrize("epochs", [200, 500])
def test_cifar(batch, epochs):
    peak = 0.1 * batch / 128
    steps = max(1, CIFAR // batch)
    schedule = CifarSchedule(batch, epochs, steps)
    assert float(schedule(0)) == pytest.approx(0.001)
    quarter = float(schedule(25 * steps / 4))
    assert quarter == pytest.approx(0.001 + (peak - 0.001) / 2, rel=1e-5)
    drops = [epochs * 102 // 200 * steps, epochs * 153 // 200 * steps]
    drops[1] = round(epochs * 153 / 200 * steps)
    around = [25 * steps, drops[0] - 1, drops[0], drops[1] - 1, drops[1], epochs * steps]
    expected = [peak, peak, peak / 10, peak / 10, peak / 100, peak / 100]
    np.testing.assert_allclose(rates(schedule, around), expected, rtol=1e-5)


def test_the_released_codes_examples():
    assert CifarSchedule(1024, 200, 48).peak == pytest.approx(0.8)
    assert CifarSchedule(2048, 200, 24).peak == pytest.approx(1.6)


@pytest.mark.parametrize("cls", [CifarSchedule, ImageNetSchedule])
def test_a_short_run_warms_up_in_proportion_and_never_above_the_peak(cls):
    schedule = cls(256, 4, 10)
    values = rates(schedule, range(41))
    assert values[0] == pytest.approx(0.001) and values.max() == pytest.approx(schedule.peak)
    assert 0 < schedule.warmup_epochs < 1


@pytest.mark.parametrize("cls", [CifarSchedule, ImageNetSchedule])
def test_saved_and_loaded(cls):
    schedule = cls(2048, 90, np.int64(24))
    config = keras.optimizers.schedules.serialize(schedule)
    copy = keras.optimizers.schedules.deserialize(config)
    np.testing.assert_array_equal(
        rates(copy, range(0, 2000, 37)), rates(schedule, range(0, 2000, 37))
    )


@pytest.mark.parametrize("cls", [CifarSchedule, ImageNetSchedule])
def test_late_steps_keep_their_boundaries(cls):
    """Steps count in float32 inside: at 300,000 updates a boundary must not move."""
    schedule = cls(512, 200, 2502)
    boundary = 153 * 2502 if cls is CifarSchedule else (5 + 2 * 80) * 2502
    before, after = rates(schedule, [boundary - 1, boundary])
    assert after < 0.99 * before
