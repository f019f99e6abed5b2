"""The C interface: the functions of shadowcore.h, in a table that is published as a capsule."""
import os

from cpython.pycapsule cimport PyCapsule_New
from libc.string cimport memset

from shadowcore._capi.accesses cimport (
    api_access, api_access_many, api_host_address, api_store, api_stored, api_translate,
)
from shadowcore._capi.handles cimport INDEX_BITS, MAX_VMS, api_last_error, handle_new, places
from shadowcore._capi.header cimport SC_ABI_VERSION, SC_CAPSULE, sc_api, sc_vm
from shadowcore._capi.lifecycle cimport api_save, api_vm_adopt, api_vm_create, api_vm_destroy, api_vm_load
from shadowcore._capi.look cimport (
    api_audit, api_counters, api_cycles, api_invlpg, api_invpcid, api_on_event, api_on_references, api_prices,
    api_prices_for, api_register_load, api_register_read, api_set_prices, api_vcpu_init,
)
from shadowcore._capi.shadow cimport api_shadow_page, api_shadow_pool, api_shadow_root
from shadowcore._capi.slots cimport (
    api_host_collapse, api_host_touch, api_host_unmap, api_slot_add, api_slot_move, api_slot_remove,
)
from shadowcore._capi.tables cimport (
    api_tables_activate, api_tables_entry, api_tables_map, api_tables_protect, api_tables_unmap,
)
from shadowcore.engine.types cimport u64

from shadowcore._version import __version__
from shadowcore.engine.machine import VM
from shadowcore.errors import ConfigError

cdef bytes _version = __version__.encode()
cdef sc_api _api
memset(&_api, 0, sizeof(_api))
_api.abi_version = SC_ABI_VERSION
_api.struct_size = sizeof(sc_api)
_api.version = _version
_api.vm_create = api_vm_create
_api.vm_destroy = api_vm_destroy
_api.register_read = api_register_read
_api.register_load = api_register_load
_api.invlpg = api_invlpg
_api.access = api_access
_api.translate = api_translate
_api.access_many = api_access_many
_api.store = api_store
_api.stored = api_stored
_api.host_address = api_host_address
_api.counters = api_counters
_api.on_event = api_on_event
_api.audit = api_audit
_api.save = api_save
_api.vm_load = api_vm_load
_api.last_error = api_last_error
_api.vm_adopt = api_vm_adopt
_api.prices = api_prices
_api.set_prices = api_set_prices
_api.cycles = api_cycles
_api.slot_add = api_slot_add
_api.slot_remove = api_slot_remove
_api.slot_move = api_slot_move
_api.host_unmap = api_host_unmap
_api.host_touch = api_host_touch
_api.host_collapse = api_host_collapse
_api.invpcid = api_invpcid
_api.vcpu_init = api_vcpu_init
_api.on_references = api_on_references
_api.prices_for = api_prices_for
_api.shadow_root = api_shadow_root
_api.shadow_pool = api_shadow_pool
_api.shadow_page = api_shadow_page
_api.tables_map = api_tables_map
_api.tables_unmap = api_tables_unmap
_api.tables_protect = api_tables_protect
_api.tables_entry = api_tables_entry
_api.tables_activate = api_tables_activate
_C_API = PyCapsule_New(&_api, SC_CAPSULE, NULL)


def get_include() -> str:
    """The directory that holds shadowcore.h, for a C or C++ compiler.

    >>> sc.get_include().endswith("include")
    True
    """
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "include")


def handle(vm) -> int:
    """A handle of `vm` for C code that has the table of functions; `release` gives it back."""
    cdef sc_vm number
    if not isinstance(vm, VM):
        raise ConfigError(f"vm: a VM is needed, not {type(vm).__name__}")
    handle_new(vm, &number)
    return number


def release(number) -> None:
    """Give a handle back; the VM lives on where Python holds it. ConfigError if there is none such, or it is in use."""
    if not isinstance(number, int) or not 0 <= number < 1 << 64 or api_vm_destroy(number) < 0:
        raise ConfigError(f"handle: {number!r} is that of no VM, or the VM is in use")


def from_handle(number):
    """The VM of a handle. ConfigError if there is none such."""
    cdef u64 index = ((<object>number) & ((1 << INDEX_BITS) - 1)) - 1 if isinstance(number, int) and number > 0 else -1
    if index >= MAX_VMS or places[index].handle != number:
        raise ConfigError(f"handle: {number!r} is that of no VM")
    return <object>places[index].owner


def table_address() -> int:
    """Address of the table of functions, for a plug-in that is handed it by a foreign function interface."""
    return <size_t>&_api
