"""Products by 16-bit integers are the products, to four digits, whatever the sizes and whatever is in the rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ivideogpt.rollout.cpu import fixed
from ivideogpt.rollout.cpu.fixed import GROUP, FixedRows, has_fixed_products

ERROR = 3e-4  # relative, of products of random numbers; bfloat16 makes 3e-3


@pytest.fixture(autouse=True)
def _fixed() -> None:
    if not has_fixed_products():
        pytest.skip("no compiled kernel, or no instructions for products of 16-bit integers")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 128, 32), (13, 768, 70), (14, 129, 5), (15, 100, 33), (57, 384, 64), (3, 7, 1)]
)
def test_products(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(2, rows, inputs)
    weight, bias, residual = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, outputs)
    expected = x.double() @ weight.double().T
    found = FixedRows.of(x).linear(weight)
    assert found.shape == (rows, outputs) and error(found, expected) < ERROR
    assert torch.equal(FixedRows.of(x).linear(weight, bias, residual), found + bias + residual)
    assert error(FixedRows.of(x, gate).linear(weight), (F.silu(gate) * x).double() @ weight.double().T) < ERROR
    batch = torch.stack([x, gate])
    assert torch.equal(FixedRows.of(batch).linear(weight)[0], found)
    assert error(FixedRows.of(x).linear(weight.bfloat16()), x.double() @ weight.bfloat16().double().T) < ERROR


def test_each_output_and_group_has_its_own_scale() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(20, 3 * GROUP), torch.randn(40, 3 * GROUP)
    x[:, :GROUP] *= 1e6  # against weights of zero: what is large must not cost the others their digits
    weight[:, :GROUP] = 0
    weight *= torch.logspace(-6, 6, 40)[:, None]
    expected = x.double() @ weight.double().T
    found = FixedRows.of(x).linear(weight)
    for output in range(40):
        assert error(found[:, output], expected[:, output]) < ERROR


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_sums_do_not_overflow(size: float) -> None:
    signs = torch.randint(0, 2, (30, 2 * GROUP), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    x, weight = size * signs, signs  # rows of largest integers, all of whose products with one output have one sign
    torch.testing.assert_close(FixedRows.of(x).linear(weight), x @ weight.T, rtol=1e-3, atol=size / 2)
    x = torch.zeros(3, GROUP)
    x[1, 5] = size
    one = torch.eye(GROUP)
    torch.testing.assert_close(FixedRows.of(x).linear(one), x, rtol=1e-3, atol=0)


def test_what_is_not_finite_is_seen() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 2 * GROUP), torch.randn(9, 2 * GROUP)
    clean = FixedRows.of(x).linear(weight)
    x[1, 3], x[4, GROUP] = float("nan"), float("inf")
    found = FixedRows.of(x).linear(weight)
    assert found[[1, 4]].isnan().all()
    assert torch.equal(found[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])
    weight[7, 0] = float("-inf")
    found = FixedRows.of(x).linear(weight)
    assert found[:, 7].isnan().all() and found[0, :7].isfinite().all()


def test_silu_of_extreme_values() -> None:
    gate = torch.tensor([-1e4, -200.0, -88.0, -20.0, -0.0, 20.0, 88.0, 1e20]).repeat_interleave(GROUP)[:, None]
    rows = FixedRows.of(torch.ones_like(gate), gate)
    expected = F.silu(gate.double())
    torch.testing.assert_close(rows.linear(torch.ones(1, 1)).double(), expected, rtol=1e-3, atol=1e-30)


def test_threads_do_not_change_the_result() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 300), torch.randn(200, 300)
    threads = torch.get_num_threads()
    found = FixedRows.of(x).linear(weight)
    try:
        torch.set_num_threads(3)
        assert torch.equal(FixedRows.of(x).linear(weight), found)
    finally:
        torch.set_num_threads(threads)


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "ERROR", 1e-6)
    assert not has_fixed_products.__wrapped__()
