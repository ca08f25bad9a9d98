"""Check the choice of device, dtype and operators; other machines' devices are faked."""

from __future__ import annotations

import pytest
import torch

from focus_core import hardware
from focus_core.engine import FocusEngine
from focus_core.errors import ConfigError
from focus_core.hardware import check_operators, choose_device, default_dtype
from focus_core.model import hub
from focus_core.training.processes import Processes


@pytest.fixture
def machine(monkeypatch):
    """Make this machine one that has CUDA or mps."""

    def has(*, cuda=False, mps=False, macos=(14, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: version <= macos)

    return has


@pytest.mark.parametrize(
    ("has", "wanted", "message"),
    [
        ({}, "cuda", "device cuda is not there.*this machine has cpu"),
        ({}, "mps", "device mps is not there; this machine has cpu"),
        ({"mps": True}, "cuda:1", "device cuda:1 is not there.*this machine has mps, cpu"),
        ({"cuda": True}, "cuda:3", "device cuda:3 is not there; this machine has 1 of cuda, numbered from 0"),
        ({"cuda": True}, "gpu", "no device is called 'gpu'; this machine has cuda, cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named_with_those_that_are(has, wanted, message, machine):
    """Wherever a device can be given: one clear error instead of torch's assertion."""
    machine(**has)
    for use in (choose_device, Processes, lambda name: FocusEngine.from_pretrained("no/base", device=name)):
        with pytest.raises(ConfigError, match=message):
            use(wanted)


def test_the_fastest_device_is_chosen(machine):
    """CUDA, then mps, then the CPU; a device object is taken as it is."""
    for has, expected in (({"cuda": True, "mps": True}, "cuda"), ({"mps": True}, "mps"), ({}, "cpu")):
        machine(**has)
        assert choose_device() == torch.device(expected)
    assert choose_device(torch.device("cpu")) == torch.device("cpu")


def test_mps_gets_a_dtype_that_it_has(machine):
    """bfloat16 from macOS 14 on, float16 before."""
    for macos, expected in (((14, 0), torch.bfloat16), ((13, 3), torch.float16)):
        machine(mps=True, macos=macos)
        assert default_dtype(torch.device("mps")) is expected


def test_operators_that_lack_are_found_at_loading(machine, base_folder, monkeypatch):
    """Every operator runs here; where an mps device lacks one, loading a base says which, before any weights move."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_operators(torch.device("cpu"), dtype)
    machine(mps=True)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, **_: ones(*shape))  # there is no mps memory here

    def lacks(tensor):
        raise NotImplementedError("The operator 'aten::topk' is not currently implemented for the MPS device.")

    monkeypatch.setitem(hardware._OPERATORS, "topk", lacks)
    with pytest.raises(ConfigError, match=r"mps cannot run topk in bfloat16 .*use another dtype, a newer torch, or"):
        hub.load_base(base_folder)
