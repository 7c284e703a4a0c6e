"""The LSQ quantizer against a plain float64 autograd expression, and its initial step sizes against their formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quan.quantizer import LsqQuan, integer_range, lsq
from quan.utils import keep_steps_positive

SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)


def plain_chain(v, s, qn, qp, scale):
    """Equations 1 to 3 of arXiv 1902.08153, written with straight-through estimators."""
    s = (s - s * scale).detach() + s * scale
    scaled = v / s
    # not torch.clamp, whose gradient exactly on a bound differs between versions of torch; LSQ's is 1 there
    clipped = torch.where(scaled < -qn, -qn, torch.where(scaled > qp, qp, scaled))
    return (clipped + (clipped.round() - clipped).detach()) * s


@st.composite
def problems(draw):
    """(values, steps, Qn, Qp, scale): any rank, per-tensor or per-channel, some values exactly on a bound."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    bit = draw(st.integers(2, 8))
    signed, symmetric = draw(st.sampled_from([(False, False), (True, False), (True, True)]))
    qn, qp = integer_range(bit, signed, symmetric)
    per_channel = draw(st.booleans())
    steps = torch.rand(shape[0] if per_channel else 1, generator=generator, dtype=torch.float64) + 0.05
    s = steps.view(-1, *[1] * (len(shape) - 1)) if per_channel else steps[0]
    v = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    on_bound = torch.rand(shape, generator=generator) < 0.2
    v = torch.where(on_bound, (s * draw(st.sampled_from([-qn, qp]))).expand(shape), v)
    return v, s, qn, qp, draw(st.sampled_from([1.0, 0.01]))


@SETTINGS
@given(problems(), st.integers(0, 2**31))
def test_values_and_gradients_equal_the_plain_expression(problem, seed):
    v, s, qn, qp, scale = problem
    incoming = torch.randn(v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours, theirs = [[v.clone().requires_grad_(), s.clone().requires_grad_()] for _ in range(2)]
    quantized, expected = lsq(*ours, qn, qp, scale), plain_chain(*theirs, qn, qp, scale)
    # the chain rebuilds s from two parts, which may round; the quantized values may differ by that rounding only
    torch.testing.assert_close(quantized, expected, rtol=1e-14, atol=0)
    quantized.backward(incoming)
    expected.backward(incoming)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-14, atol=0)  # zeros are zeros in both
    terms = (incoming.abs() * (abs(qn) + qp + 1)).sum() * scale
    assert (ours[1].grad - theirs[1].grad).abs().max() <= 1e-12 * terms


@SETTINGS
@given(problems())
def test_quantized_values_are_integers_in_range_times_the_step(problem):
    v, s, qn, qp, _ = problem
    integers = lsq(v, s, qn, qp) / s
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-9)
    assert integers.min() >= -qn - 1e-9 and integers.max() <= qp + 1e-9
    inside = (v / s >= -qn) & (v / s <= qp)
    assert ((lsq(v, s, qn, qp) - v).abs()[inside] <= (s / 2 + 1e-9).expand(v.shape)[inside]).all()


@pytest.mark.parametrize(("bit", "signed", "symmetric", "expected"), [
    (4, False, False, (0, 15)), (4, True, False, (8, 7)), (4, True, True, (7, 7)), (2, True, False, (2, 1))])
def test_integer_range(bit, signed, symmetric, expected):
    assert integer_range(bit, signed, symmetric) == expected


@pytest.mark.parametrize("channels", [None, 3])
def test_gradient_scale_counts_the_values_that_share_a_step(channels):
    weight = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    quantizer = LsqQuan([4], signed=True, channels=channels)
    quantizer.init_from_weight(weight)
    quantizer(weight).sum().backward()
    shared = weight.numel() if channels is None else weight[0].numel()
    steps = quantizer.step.detach().clone().requires_grad_()
    plain_chain(weight, steps.view(-1, 1, 1), 8, 7, 1 / math.sqrt(shared * 7)).sum().backward()
    torch.testing.assert_close(quantizer.s.grad[0], steps.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [None, 6])
def test_initial_weight_steps(channels):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.3
    rows = weight.reshape(1 if channels is None else 6, -1)
    for init, expected in {
        "lsq": lambda row, bit: 2 * row.abs().mean() / math.sqrt(2 ** (bit - 1) - 1),
        "three_sigma": lambda row, bit: max(abs(row.mean() - 3 * row.std()), abs(row.mean() + 3 * row.std()))
        / 2 ** (bit - 1),
    }.items():
        quantizer = LsqQuan([6, 3, 2], signed=True, channels=channels, init=init)
        quantizer.init_from_weight(weight)
        wanted = torch.stack([torch.stack([expected(row, bit) for row in rows]) for bit in (6, 3, 2)])
        torch.testing.assert_close(quantizer.s.detach(), wanted[:, 0] if channels is None else wanted)
        assert quantizer.init_state.tolist() == [1, 1, 1]


@pytest.mark.parametrize("init", ["lsq", "three_sigma"])
@pytest.mark.parametrize("kept", [None, True])
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 1), (1, 1, 1, 1)])
def test_one_weight_deviates_by_nothing(init, kept, shape):
    weight = torch.tensor([-0.5, 0.25, 2.0])[:shape[0]].reshape(shape)
    for channels in {None, shape[0]} if shape[0] == 1 else {shape[0]}:
        quantizer = LsqQuan([4, 2], signed=True, channels=channels, init=init)
        quantizer.init_from_weight(weight, kept and torch.ones(shape, dtype=torch.bool))
        factors = {"lsq": (2 / math.sqrt(7), 2), "three_sigma": (1 / 8, 1 / 2)}[init]
        wanted = torch.stack([weight.abs().flatten() * factor for factor in factors])
        torch.testing.assert_close(quantizer.s.detach(), wanted[:, 0] if channels is None else wanted)


def test_activation_step_starts_at_one_and_takes_its_value_from_the_first_training_batch_only():
    quantizer = LsqQuan([4, 2], signed=False)
    first, second = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)), torch.full((8, 3), 9.0)
    quantizer.eval()(first)
    assert quantizer.s.tolist() == [1, 1] and quantizer.init_state.tolist() == [0, 0]
    quantizer.train().select(2)
    quantizer(first)
    quantizer(second)
    expected = 2 * first.mean() / math.sqrt(3)
    torch.testing.assert_close(quantizer.s.detach(), torch.stack([torch.tensor(1.0), expected]))
    assert quantizer.init_state.tolist() == [0, 1]


def test_a_loaded_step_size_is_not_initialized_again():
    trained, fresh = (LsqQuan([4], signed=False).train() for _ in range(2))
    trained(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)))
    fresh.load_state_dict(trained.state_dict())
    fresh(torch.full((4, 4), 9.0))
    assert torch.equal(fresh.s, trained.s)


def test_a_step_size_driven_below_zero_is_kept_positive_and_learns_again():
    quantizer = LsqQuan([4], signed=True)
    quantizer.s.data.fill_(-0.3)
    keep_steps_positive(quantizer)
    assert quantizer.s.item() == pytest.approx(1e-5)
    quantizer.init_state.fill_(1)
    quantizer.quantize(torch.ones(4)).sum().backward()
    assert quantizer.s.grad.item() != 0
