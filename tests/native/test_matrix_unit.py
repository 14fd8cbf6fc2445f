"""Attention's products for the matrix unit (AMX), with plain C++ in its place: on any processor.

Where there is such a unit, ``test_conv_attention.py`` runs them on it.
"""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch
from torch import Tensor

from eqcvt.native import conv_attention
from tests.native import test_conv_attention, test_launchers
from tests.native.cuda_emulator import DTYPES, argument
from tests.native.test_conv_attention import ATTENTIONS, Attention, check_attention

pytestmark = test_launchers.pytestmark

SOURCES = ("conv_attention.cpp", "conv_attention_backward.cpp", "parallel.cpp")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulated") / "attention.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-Wno-psabi"]
    macros = ["EMULATE_MATRIX_UNIT", "ISA=amx", 'API=extern "C"']
    subprocess.run(
        [
            *(str(test_launchers.COMPILER), *flags, *(f"-DEQCVT_{macro}" for macro in macros)),
            *(str(test_launchers.CSRC / "cpu" / source) for source in SOURCES),
            *("-o", str(library)),
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def _emulated(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(name: str, *args: Tensor | float | None, like: Tensor) -> None:
        function = getattr(library, f"eqcvt_cpu_{name}_amx")
        values = (*map(argument, args), ctypes.c_int(torch.get_num_threads()))
        assert function(ctypes.c_int(DTYPES[like.dtype]), *values) == 0

    monkeypatch.setattr(conv_attention, "launch", launch)


@pytest.mark.usefixtures("_threads", "_nan_in_fresh_memory")
@pytest.mark.parametrize("case", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_is_as_good_as_the_primitives(case: Attention) -> None:
    check_attention(case, torch.bfloat16)


@pytest.mark.parametrize("position", [0, 3, 31, 32, 99])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_scores(value: float, position: int) -> None:
    test_conv_attention.test_nan_and_infinite_scores(value, position, torch.bfloat16)


@pytest.mark.parametrize("count", [20, 100])
def test_a_key_that_nobody_looks_at_has_no_gradient(count: int) -> None:
    test = test_conv_attention.test_a_key_that_nobody_looks_at_has_no_gradient
    test(count, torch.bfloat16)


def test_nan_stays_in_its_token_or_its_image() -> None:
    test_conv_attention.test_nan_stays_in_its_token_or_its_image(torch.bfloat16)
