"""Messages say what was meant, by the name that was given."""

import pytest
from commands import refused, run

import shadowcore as sc


def test_a_setting_by_its_own_name():
    assert "pool: 3 is not within 4 to" in refused("compare", "pingpong", "--set", "pool=3")
    assert "host_levels: " in refused("compare", "pingpong", "--mmu", "nested", "--set", "host_levels=3")


def test_a_general_protection_names_the_address():
    vm = sc.VM("16MiB")
    sc.PageTables(vm.memory, mode="64", allocate=range(256, 512)).activate(vm.vcpus[0])
    for call in (vm.vcpus[0].read, vm.vcpus[0].translate, vm.vcpus[0].walk_levels):
        with pytest.raises(sc.GeneralProtection, match="#GP, error code 0x0, at 0x4000000000000") as caught:
            call(1 << 50)
        assert caught.value.address == 1 << 50
    with pytest.raises(sc.GeneralProtection, match=r"0x0$") as caught:
        vm.vcpus[0].cr4 = 1 << 40
    assert caught.value.address is None


def test_a_processor_that_there_is_not():
    with pytest.raises(IndexError, match="vcpus: there is no number 1; the VM has one, number 0"):
        sc.VM("16MiB").vcpus[1]
    vm = sc.VM("16MiB", vcpus=3)
    with pytest.raises(IndexError, match="the VM has 3, numbers 0 to 2"):
        vm.vcpus[3]
    assert vm.vcpus[-1].number == 2
    assert [cpu.number for cpu in vm.vcpus[1:]] == [1, 2]


def test_the_bundled_recording_is_one_by_blocks():
    assert "shadowcore recording" in run("info")


def test_registers_print_in_hexadecimal():
    tables = sc.PageTables(sc.VM("16MiB").memory, mode="64", allocate=range(256, 512))
    assert repr(tables.registers) == "{'efer': 0x900, 'cr4': 0xb0, 'cr3': 0x100000, 'cr0': 0x80010001}".replace(
        "0x80010001", hex(tables.registers["cr0"])
    )
