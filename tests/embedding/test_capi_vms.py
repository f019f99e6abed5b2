"""VMs of the C functions: saved, listened to, shared with Python and between threads, and driven by a plug-in."""

import ctypes
import shutil
import subprocess
import threading

import numpy as np
import pytest
from capi import (
    API,
    DATA,
    EVENT,
    OK,
    PF,
    REFERENCES,
    STRUCTS,
    Access,
    Accesses,
    C,
    Counters,
    Guest,
    Outcome,
    error,
    made,
    structure,
)

import shadowcore as sc


def test_save_and_load(guest, tmp_path):
    path = str(tmp_path / "vm.npz").encode()
    for i in range(50):
        guest.access(C["SC_WRITE"], DATA + 4096 * i, value=i)
    assert API.save(guest.vm, path) == OK, error()
    ram = sc.embed.allocate(8 << 20)
    ram[:] = 0xFF
    again = ctypes.c_uint64()
    assert API.vm_load(path, ram.ctypes.data, ram.size, again) == OK, error()
    assert (ram == guest.memory).all()
    out = made(Outcome)
    assert API.access(again, made(Access, gva=DATA + 4096 * 7, size=8, flags=1), out) == OK
    assert (out.value[0], out.exits) == (7, 0)
    assert API.vm_destroy(again) == OK
    assert API.vm_load(path, ram.ctypes.data, 4 << 20, again) == C["SC_E_FILE"], error()
    assert API.vm_load(path, ram.ctypes.data + 8, ram.size - 4096, again) == C["SC_E_ALIGNMENT"]
    assert API.vm_load(str(tmp_path / "none").encode(), None, 0, again) == C["SC_E_FILE"]
    assert API.save(guest.vm, str(tmp_path / "no" / "such").encode()) == C["SC_E_FILE"]
    assert API.save(guest.vm, b"\xff\xfe") == C["SC_E_ARGUMENT"]
    assert again.value == 0
    # Neither failure leaves the VM locked.
    assert guest.access(C["SC_READ"], DATA)[0] == OK


def test_events(guest):
    seen = []

    @EVENT
    def on_event(context, event):
        e = event.contents
        seen.append((e.kind, e.detail, e.vcpu, e.address))
        assert (context, e.vm) == (0x1234, guest.vm.value)

    assert API.on_event(guest.vm, 0xF, on_event, 0x1234) == OK
    guest.access(C["SC_READ"], DATA)
    assert seen[-1] == (C["SC_EVENT_EXIT"], C["SC_EXIT_FILL"], 0, DATA)
    n = len(seen)
    guest.access(C["SC_READ"], DATA)
    assert len(seen) == n
    assert API.register_load(guest.vm, 0, C["SC_CR3"], guest.tables.cr3) == OK
    assert (C["SC_EVENT_EXIT"], C["SC_EXIT_CR3"], 0, guest.tables.cr3) in seen
    assert API.on_event(guest.vm, 0xF, EVENT(0), None) == OK
    n = len(seen)
    guest.access(C["SC_READ"], DATA + 4096)
    assert len(seen) == n
    assert API.on_event(guest.vm, 16, on_event, None) == C["SC_E_ARGUMENT"]


def test_tables_written_by_way_of_python():
    """Refused while they can be written and while they are not sound; checked by the first call after that."""
    vm = sc.VM("1MiB")
    number = ctypes.c_uint64()
    assert API.vm_adopt(vm, number) == OK

    def access():
        return API.access(number, made(Access, gva=0x1000, kind=1, size=8), made(Outcome))

    assert access() == OK
    held = vm.mmu.writable_arrays()["hash"]
    assert access() == C["SC_E_BUSY"]
    del held
    assert access() == OK
    kept = vm.mmu.arrays["hash"].copy()
    vm.mmu.writable_arrays()["hash"][:] = 77
    assert access() == C["SC_E_BUSY"]
    assert "written by hand" in error()
    vm.mmu.writable_arrays()["hash"][:] = kept
    assert access() == OK
    assert API.vm_destroy(number) == OK


def test_a_vm_of_python():
    """A VM made there has a handle here; it lives on when that is given back."""
    vm = sc.VM("1MiB")
    number = ctypes.c_uint64()
    assert API.vm_adopt(vm, number) == OK
    out = made(Outcome)
    assert API.access(number, made(Access, gva=0x1000, kind=1, size=8, flags=1), out) == OK
    assert vm.stats.accesses == 1
    busy = []

    @EVENT
    def on_event(_context, _event):
        try:
            vm.vcpus[0].read(0)
        except sc.EngineError as found:
            busy.append(str(found))

    assert API.on_event(number, 1, on_event, None) == OK
    assert API.access(number, made(Access, gva=0x5000, size=8), out) == OK
    assert busy
    assert API.vm_destroy(number) == OK
    assert vm.vcpus[0].read(0x7000) == 0  # and nobody is called any more
    assert len(busy) == 1
    assert API.vm_adopt("no VM", number) == C["SC_E_ARGUMENT"]
    with pytest.raises(sc.ConfigError):
        sc.embed.release(number.value)
    with pytest.raises(sc.ConfigError):
        sc.embed.from_handle(12345)
    with pytest.raises(sc.ConfigError):
        sc.embed.handle("no VM")


def test_a_callback_may_not_use_its_vm_in_whatever_way():
    """Called from an access by handle or by way of Python, it is refused by handle and by way of Python."""
    vm = sc.VM("1MiB")
    number = ctypes.c_uint64()
    assert API.vm_adopt(vm, number) == OK
    other = sc.VM("1MiB")
    found = []

    def use(*_):
        found.append(API.access(number, made(Access, gva=0x1000, size=8), made(Outcome)))
        for call in (lambda: vm.vcpus[0].read(0x9000), vm.mmu.zap_all, lambda: vm.add_slot(1 << 30, 4096)):
            try:
                call()
                found.append("done")
            except sc.EngineError as error:
                found.append(str(error)[:17])
        other.vcpus[0].read(0)

    refused = [C["SC_E_BUSY"], *["this VM is in use"] * 3]
    on_event, on_references = EVENT(use), REFERENCES(use)
    for listen, stop in (
        (lambda: API.on_event(number, 1, on_event, 0), lambda: API.on_event(number, 0, EVENT(0), 0)),
        (lambda: API.on_references(number, on_references, 0), lambda: API.on_references(number, REFERENCES(0), 0)),
    ):
        for access in (
            lambda gva: API.access(number, made(Access, gva=gva, size=8), made(Outcome)),
            lambda gva: vm.vcpus[0].read(gva),
            lambda gva: vm.vcpus[0].run(np.array([(0, 0, 8, gva, 0)], sc.OP_DTYPE)),
        ):
            vm.mmu.zap_all()
            assert listen() == OK
            found.clear()
            access(0x5000)
            assert found
            assert found == refused * (len(found) // 4)
            assert stop() == OK
            assert vm.audit().ok
    assert API.vm_destroy(number) == OK


def test_one_vm_one_thread_and_different_vms_side_by_side():
    """Threads hammer one VM: each call is made whole, or refused. Others do their own work meanwhile, all of it."""
    shared, own = Guest(), [Guest() for _ in range(2)]
    refused, made_, errors = [0], [0], []

    def hammer():
        for i in range(3000):
            rc, _ = shared.access(C["SC_READ"], DATA + 4096 * (i % 256))
            if rc == C["SC_E_BUSY"]:
                refused[0] += 1
            elif rc == OK:
                made_[0] += 1
            else:
                errors.append(rc)

    def alone(guest):
        gva = (DATA + np.arange(100_000, dtype=np.uint64) * 8 % (256 << 12)).astype(np.uint64)
        for _ in range(10):
            rc = API.access_many(guest.vm, made(Accesses, count=len(gva), gva=gva.ctypes.data, all_size=8))
            if rc != OK:
                errors.append(rc)

    threads = [threading.Thread(target=hammer) for _ in range(3)]
    threads += [threading.Thread(target=alone, args=(guest,)) for guest in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    counters = made(Counters)
    assert API.counters(shared.vm, counters) == OK
    assert 256 <= counters.accesses <= 9000
    assert shared.audit().violations == 0
    for guest in own:
        assert API.counters(guest.vm, counters) == OK
        assert counters.accesses == 1_000_000
        guest.close()
    shared.close()


def test_other_vms_are_not_waited_for():
    """In the middle of an access of one VM, whose callback waits, another thread uses a second VM."""
    first, second = Guest(), Guest()
    inside, go = threading.Event(), threading.Event()

    @EVENT
    def wait(_context, _event):
        inside.set()
        assert go.wait(60)

    assert API.on_event(first.vm, 1, wait, None) == OK
    thread = threading.Thread(target=first.access, args=(C["SC_READ"], DATA))
    thread.start()
    assert inside.wait(60)
    assert second.access(C["SC_READ"], DATA)[0] == OK
    assert first.access(C["SC_READ"], DATA)[0] == C["SC_E_BUSY"]
    third = Guest()
    third.close()
    go.set()
    thread.join()
    assert API.on_event(first.vm, 0, EVENT(0), None) == OK
    assert first.access(C["SC_READ"], DATA)[0] == OK
    first.close()
    second.close()


PLUGIN = """
#include <shadowcore.h>
#ifdef Py_PYTHON_H
#error Python.h is not needed
#endif
#include <stddef.h>
#include <stdio.h>
#ifdef __cplusplus
extern "C"
#endif
int plugin(const sc_api *api, sc_vm vm, uint64_t gva);
int plugin(const sc_api *api, sc_vm vm, uint64_t gva) {
    sc_access access;
    sc_outcome outcome;
    if (!sc_api_fits(api))
        return -100;
    SC_INIT(&access);
    SC_INIT(&outcome);
    access.gva = gva;
    access.kind = SC_WRITE;
    access.size = 8;
    return api->access(vm, &access, &outcome);
}
"""
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic"]


@pytest.mark.parametrize(("language", "standard", "compiler"), [("c", "c11", "cc"), ("c++", "c++17", "c++")])
def test_a_plugin_without_python(tmp_path, guest, language, standard, compiler):
    """It is handed the table. Its layout of each structure is the one that these tests use."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    source = tmp_path / "plugin.src"
    sizes = "".join(
        f'    {{ {name} *s = NULL; (void)s; printf("{name} %zu", sizeof({name}));'
        + "".join(f' printf(" {f} %zu", offsetof({name}, {f}));' for f, _ in structure(name)._fields_)
        + ' puts(""); }\n'
        for name in STRUCTS
    )
    source.write_text(PLUGIN + "int main(void) {\n" + sizes + "    return 0;\n}\n")
    flags = [compiler, f"-std={standard}", *WARNINGS, "-x", language, source, "-I", sc.get_include()]
    library, program = tmp_path / "plugin.so", tmp_path / "sizes"
    subprocess.run([*flags, "-shared", "-fPIC", "-o", library], check=True)
    subprocess.run([*flags, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = []
    for name in STRUCTS:
        of = structure(name)
        fields = " ".join(f"{field} {getattr(of, field).offset}" for field, _ in of._fields_)
        wanted.append(f"{name} {ctypes.sizeof(of)} {fields}")
    assert printed == wanted
    plugin = ctypes.CDLL(str(library)).plugin
    plugin.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
    assert plugin(sc.embed.table_address(), guest.vm, DATA) == OK
    assert plugin(sc.embed.table_address(), guest.vm, 0) == PF
    assert plugin(None, guest.vm, DATA) == -100
    old = (ctypes.c_uint32 * 2)(1, 64)
    assert plugin(ctypes.addressof(old), guest.vm, DATA) == -100
