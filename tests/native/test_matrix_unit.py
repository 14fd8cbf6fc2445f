"""Attention's products for the matrix unit (AMX), with plain C++ in its place: on any processor.

Where there is such a unit, ``test_conv_attention.py`` runs them on it.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eqcvt.native import conv_attention
from tests.native import test_launchers
from tests.native.cuda_emulator import DTYPES, argument
from tests.native.test_conv_attention import ATTENTIONS, Attention, check_attention

pytestmark = test_launchers.pytestmark

SOURCES = ("conv_attention.cpp", "conv_attention_backward.cpp", "parallel.cpp")


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
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
    loaded = ctypes.CDLL(str(library))

    def call(name: str, *args: Tensor | float | None, like: Tensor) -> None:
        function = getattr(loaded, f"eqcvt_cpu_{name}_amx")
        values = (*map(argument, args), ctypes.c_int(torch.get_num_threads()))
        assert function(ctypes.c_int(DTYPES[like.dtype]), *values) == 0

    return call


@pytest.mark.usefixtures("_threads", "_nan_in_fresh_memory")
@pytest.mark.parametrize("case", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_is_as_good_as_the_primitives(
    case: Attention, launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_attention, "launch", launch)
    check_attention(case, torch.bfloat16)
