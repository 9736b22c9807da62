"""Spikes told from noise, and signals answered."""

import math
import os
import random
import signal

import pytest
import torch

from sophia.guards import Readings, Signals, SpikeWatch


def noisy(count, *, deviation, seed=0):
    draw = random.Random(seed)
    return [5.0 - 0.002 * step + draw.gauss(0, deviation) for step in range(count)]


@pytest.mark.parametrize("deviation", [0.0, 0.01, 0.2])
def test_a_falling_noisy_loss_is_no_spike(deviation):
    watch = SpikeWatch(8.0)
    assert not any(watch.is_spike(loss) for loss in noisy(1000, deviation=deviation))


def test_a_jump_is_a_spike_and_does_not_enter_the_past():
    watch = SpikeWatch(8.0)
    for loss in noisy(100, deviation=0.01):
        assert not watch.is_spike(loss)
    past = watch.state()
    assert watch.is_spike(6.0)
    assert watch.is_spike(float("inf"))
    assert watch.state() == past
    assert not watch.is_spike(4.85)


def test_the_first_losses_of_a_run_are_no_spikes():
    watch = SpikeWatch(8.0)
    assert not any(watch.is_spike(loss) for loss in [1.0, 9.0, 2.0, 30.0])


def test_nan_is_another_guards_business():
    watch = SpikeWatch(8.0, [1.0] * 64)
    assert not watch.is_spike(float("nan"))
    assert watch.state() == [1.0] * 64


def test_its_state_makes_an_equal_watch():
    first = SpikeWatch(8.0)
    losses = noisy(200, deviation=0.05)
    for loss in losses[:100]:
        first.is_spike(loss)
    second = SpikeWatch(8.0, first.state())
    for loss in [*losses[100:], 7.0]:
        assert first.is_spike(loss) == second.is_spike(loss)
    assert first.state() == second.state()


def zero_d(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("loss", [1.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("norm", [2.0, math.inf, math.nan])
def test_a_flag_on_the_device_says_what_is_not_finite(loss, norm):
    flag = Readings().add(zero_d(loss), zero_d(norm, torch.float32))
    assert (flag.dtype, flag.shape) == (torch.float32, ())
    assert flag.item() == float((loss, norm) != (1.0, 2.0))


def test_readings_come_in_their_order_bit_for_bit():
    readings = Readings([[3.0, 4.0]])
    for number in range(3):
        readings.add(zero_d(0.1 + number), zero_d(0.2 + number, torch.float32))
    expected = [(3.0, 4.0), *((0.1 + number, zero_d(0.2 + number, torch.float32).item()) for number in range(3))]
    assert readings.read() == expected
    readings.add(zero_d(7.0), zero_d(8.0))
    assert readings.take() == [*expected, (7.0, 8.0)]
    assert readings.read() == []


def test_signals_are_counted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signals = Signals()
    with signals.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_first_interrupt_only_asks():
    signals = Signals()
    with signals.caught():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
