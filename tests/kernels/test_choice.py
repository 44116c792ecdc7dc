"""One setting decides which form of every operation runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from peftcli.errors import ConfigError
from peftcli.kernels import choice, lora_linear
from peftcli.kernels.block_rotation import block_rotation
from peftcli.kernels.fourier_linear import fourier_linear
from peftcli.kernels.hadamard import factors, hadamard
from peftcli.kernels.hadamard_linear import Factors, Sparse, hadamard_linear
from peftcli.kernels.kron_linear import Kron, kron_linear
from peftcli.kernels.linear_cross_entropy import linear_cross_entropy
from peftcli.kernels.loha_linear import Pairs, loha_linear
from peftcli.kernels.modulated_linear import modulated_linear
from peftcli.kernels.packed_attention import Segment, packed_attention
from peftcli.kernels.sparse_linear import sparse_linear
from tests.conftest import Cli

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _chosen() -> Iterator[None]:
    with choice.using("auto", CPU):
        yield


def some(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


T, I, O, R = 6, 8, 5, 2  # noqa: E741
AT = torch.tensor([0, 7, 30, 39])
CALLS: dict[str, Callable[..., Tensor]] = {
    "lora": lambda x, W, b: lora_linear.lora_linear(x, W, b, some(R, I), some(O, R), 0.5),
    "loha": lambda x, W, b: loha_linear(
        x, W, b, Pairs(some(O, R), some(R, I), some(O, R), some(R, I)), 0.5
    ),
    "modulated": lambda x, W, b: modulated_linear(x, W, b, some(O, R), some(R, I), 0.5),
    "kron": lambda x, W, b: kron_linear(x, W, b, Kron(some(5, 2), some(1, 1), some(1, 4)), 0.5),
    "fourier": lambda x, W, b: fourier_linear(x, W, b, some(4), AT, (O, I), 0.5),
    "hadamard": lambda x, W, b: hadamard_linear(
        x, W, b, Sparse(some(4), AT, O), Factors(*factors(I)), 0.5
    ),
    "sparse": lambda x, W, b: sparse_linear(x, AT, some(4), O, W, b),
    "rotation": lambda x, W, b: block_rotation(x, some(4, 2, 2)),
    "transform": lambda x, W, b: hadamard(x, *factors(I)),
    "loss": lambda x, W, b: linear_cross_entropy(x, W, b, torch.arange(T) % O),
    "attention": lambda x, W, b: packed_attention(
        *[x.view(1, 1, T, I)] * 3, (Segment(0, 4), Segment(4, 6)), 0.3
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_is_another_program_with_the_same_result(name: str, autocast: bool) -> None:
    outputs, nodes = [], []
    for kernels in ("auto", "reference"):
        torch.manual_seed(0)
        x, W, b = some(T, I), torch.randn(O, I), torch.randn(O)
        with (
            choice.using(kernels, CPU),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.profiler.profile() as profile,
        ):
            y = CALLS[name](x, W, b)
            y.float().square().sum().backward()
        outputs += [(y.float(), x.grad)]
        nodes += [[average.key for average in profile.key_averages()]]
    tolerance = {"atol": 0.2, "rtol": 0.1} if autocast else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(*outputs, **tolerance)
    assert nodes[0] != nodes[1]


def test_the_block_ends_with_the_choice_that_was_there() -> None:
    with choice.using("reference", CPU):
        assert choice.is_reference()
        with choice.using("auto", CPU):
            assert not choice.is_reference()
        assert choice.is_reference()
    assert not choice.is_reference()


def test_require_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"trainer.kernels=require: they need a CUDA device"):
        choice.choose("require", CPU)
    assert not choice.is_reference()


def test_require_names_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "HAS_TRITON", False)
    with pytest.raises(ConfigError, match=r"triton is not installed .*peftcli\[triton\]"):
        choice.choose("require", torch.device("cuda"))


def test_an_operation_that_does_not_fit_is_an_error_under_require_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "HAS_TRITON", True)
    monkeypatch.setattr(choice, "IS_INTERPRETED", True)
    x, wide = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert choice.takes_triton("lora_linear", x, x, side=16)
    for unfit in ({"side": 129}, {}):
        operands = (x, x) if unfit else (x, wide)
        assert not choice.takes_triton("lora_linear", *operands, **unfit)
        with (
            choice.using("require", CPU),
            pytest.raises(ConfigError, match=r"lora_linear has no GPU kernel for torch\.float"),
        ):
            choice.takes_triton("lora_linear", *operands, **unfit)
    with choice.using("require", CPU):
        assert choice.takes_triton("lora_linear", x)
    with choice.using("reference", CPU):
        assert not choice.takes_triton("lora_linear", x)


def test_an_operation_on_the_cpu_imports_no_triton() -> None:
    code = (
        "import sys, torch; from peftcli.kernels.lora_linear import lora_linear as f;"
        "t = [torch.ones(2, 2, requires_grad=True) for _ in range(3)];"
        "f(t[0], torch.ones(2, 2), None, t[1], t[2], 1.0).sum().backward();"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.call([sys.executable, "-c", code]) == 0


def test_a_run_trains_by_the_plain_equations_and_says_so_where_kernels_are_required(
    cli: Cli, tiny_run: list[str]
) -> None:
    done = cli("train", *tiny_run, "trainer.kernels=require", code=2)
    assert "trainer.kernels=require" in done.stderr
    cli("train", *tiny_run, "trainer.kernels=reference", "resume=never", code=0)
    assert choice.is_reference()
