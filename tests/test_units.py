"""Numbers as text."""

import pytest

from calm_jax import units


@pytest.mark.parametrize(
    "shown, text",
    [
        (units.size(0), "0 B"),
        (units.size(999), "999 B"),
        (units.size(1023), "0.999 KiB"),
        (units.size(1536), "1.5 KiB"),
        (units.size(1023.7 * 2**20), "1 GiB"),
        (units.size(15.75 * 2**30), "15.8 GiB"),
        (units.size(-72.96 * 2**30), "-73 GiB"),
        (units.size(5000 * 2**50), "5,000 PiB"),
        (units.flops(999), "999 FLOP"),
        (units.flops(999.7e9), "1 TFLOP"),
        (units.flops(1_050.6e12), "1.05 PFLOP"),
        (units.count(358_000_000), "358 M"),
        (units.count(540_358_815_744), "540 B"),
        (units.count(12), "12"),
        (units.seconds(0.000_25), "250 µs"),
        (units.seconds(0.3154), "315 ms"),
        (units.seconds(1.427), "1.43 s"),
        (units.seconds(90), "90 s"),
        (units.seconds(7.56 * 3600), "7.56 h"),
        (units.seconds(1200 * 86_400), "1,200 days"),
    ],
)
def test_the_unit_fits_the_number(shown, text):
    assert shown == text
