"""The processor in shadowcore.h: INVPCID, INIT, implicit accesses, AMD's rules. Each does what Python's does."""

import ctypes

import pytest
from capi import API, DATA, GP, OK, PF, C, Guest

import shadowcore as sc

UNDEFINED = C["SC_UNDEFINED"]


def invpcid(guest, kind, pcid, gva=0):
    return API.invpcid(guest.vm, 0, kind, (ctypes.c_uint64 * 2)(pcid, gva))


@pytest.mark.parametrize("design", ["native", "flush", "cached", "unsync", "kvm-6.1"])
def test_invpcid_and_init(design):
    guest = Guest(design)
    for kind, pcid, gva in [(0, 0, DATA), (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (1 << 40, 0, 0), (0, 1, 0)]:
        guest.access(C["SC_WRITE"], DATA, value=kind & 0xFF)
        guest.cpu.write(DATA, kind & 0xFF)
        rc = invpcid(guest, kind, pcid, gva)
        try:
            guest.cpu.invpcid(kind, pcid, gva)
            assert rc == OK
        except sc.GeneralProtection:
            assert rc == GP
        guest.same()
    assert API.vcpu_init(guest.vm, 0) == OK
    guest.cpu.init()
    value = ctypes.c_uint64()
    for name in ("cr0", "cr3", "cr4", "efer", "cpl"):
        assert API.register_read(guest.vm, 0, C[f"SC_{name.upper()}"], value) == OK
        assert value.value == getattr(guest.cpu, name)
    guest.same()
    guest.close()


def test_bad_operands(guest):
    assert API.invpcid(guest.vm, 0, 0, None) == C["SC_E_NULL"]
    assert API.invpcid(guest.vm, 9, 0, (ctypes.c_uint64 * 2)()) == C["SC_E_ARGUMENT"]
    assert API.invpcid(ctypes.c_uint64(7), 0, 0, (ctypes.c_uint64 * 2)()) == C["SC_E_HANDLE"]
    assert API.vcpu_init(guest.vm, 9) == C["SC_E_ARGUMENT"]
    assert guest.access(C["SC_FETCH"], DATA, flags=C["SC_IMPLICIT"])[0] == C["SC_E_ARGUMENT"]
    assert API.register_load(guest.vm, 0, C["SC_CPL"], 3) == OK
    assert invpcid(guest, 2, 0) == GP


def test_without_the_feature():
    guest = Guest("cached", features=C["SC_FEATURE_NX"] | C["SC_FEATURE_PCID"])
    assert invpcid(guest, 2, 0) == UNDEFINED
    guest.close()


@pytest.mark.parametrize("design", ["native", "cached", "unsync"])
def test_implicit_accesses(design):
    guest = Guest(design)
    for name, value in (("cr4", guest.cpu.cr4 | 1 << 21), ("ac", 1)):
        assert API.register_load(guest.vm, 0, C[f"SC_{name.upper()}"], value) == OK
        setattr(guest.cpu, name, value)
    for _ in range(3):
        for user in (0, 1):
            rc, out = guest.access(C["SC_READ"], DATA, user=user)
            assert (rc, out.error_code) == (OK, 0)
            assert guest.cpu.read(DATA, user=bool(user)) == 0
            rc, out = guest.access(C["SC_READ"], DATA, user=user, flags=C["SC_IMPLICIT"])
            with pytest.raises(sc.PageFault) as raised:
                guest.cpu.read(DATA, implicit=True)
            assert (rc, out.error_code) == (PF, raised.value.error_code) == (PF, 1)
    guest.same()
    guest.close()


def test_vendor():
    guest = Guest("native", vendor=C["SC_AMD"])
    assert sc.embed.from_handle(guest.vm.value).features.vendor == "amd"
    guest.close()
    with pytest.raises(AssertionError, match="vendor: 2 is not SC_INTEL or SC_AMD"):
        Guest("native", vendor=2)
