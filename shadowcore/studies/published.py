"""Figures that others published of shadow paging and nested paging, as numbers, by source and table.

Of PVM: W. Huang et al., "PVM: Efficient Shadow Paging for Deploying Secure Containers in Cloud-native Environment",
SOSP 2023; what stands there in a figure was read off its drawing. Of shadowbox: github.com/aledbf/shadowbox, the log of
work on PVM in Linux 7.3, September 2026.
"""

from __future__ import annotations

PVM = "Huang et al., PVM, SOSP 2023: 2 x Xeon Platinum 8269CY, Linux 4.19 at each level, isolation of page tables on"
SHADOWBOX = "shadowbox, 2026: i9-13900HK, Linux 7.3 as a guest of KVM; medians of five runs"

KVM_EPT, KVM_SPT, PVM_BM = "kvm-ept", "kvm-spt", "pvm"
EPT_IN_A_VM, SPT_IN_A_VM, PVM_IN_A_VM = "kvm-ept in a VM", "kvm-spt in a VM", "pvm in a VM"
"""Columns: KVM with EPT, with shadow tables, PVM; on the hardware, and in a VM that has EPT."""

ROUND_TRIPS = {
    KVM_SPT: (0.46, 1.66, 0.54),
    PVM_BM: (0.54, 1.67, 0.60),
    SPT_IN_A_VM: (7.43, 9.20, 7.10),
    PVM_IN_A_VM: (0.48, 2.21, 0.51),
}
"""Table 1, microseconds: a hypercall, an exception that is passed on, CPUID. Of KVM the paper has one column each, on
the hardware and in a VM."""
GETPID = {KVM_EPT: 0.22, KVM_SPT: 2.09, PVM_BM: 0.29, EPT_IN_A_VM: 0.23, PVM_IN_A_VM: 0.30}
GETPID_OPEN = {KVM_EPT: 0.06, KVM_SPT: 0.06}
"""Table 2, microseconds; PVM with its direct switch; OPEN: without isolation."""

_COLUMNS = (KVM_EPT, KVM_SPT, PVM_BM, EPT_IN_A_VM, PVM_IN_A_VM)


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


LMBENCH = {
    "null I/O": _row(0.27, 2.15, 0.33, 0.28, 0.33),
    "stat": _row(0.72, 2.66, 0.78, 0.76, 0.79),
    "open/close": _row(25.07, 32.63, 30.83, 36.43, 25.73),
    "select, TCP": _row(2.16, 4.09, 2.18, 2.24, 2.22),
    "signal installed": _row(0.29, 2.16, 0.32, 0.30, 0.33),
    "fork": _row(82.13, 504.67, 436.67, 113.0, 466.33),
    "exec": _row(422.33, 1500, 1290, 725.67, 1330),
    "sh": _row(1600, 4200, 3580, 2290, 3550),
    "protection fault": _row(0.66, 3.17, 2.65, 0.69, 2.69),
    "page fault of a file": _row(0.15, 0.93, 0.88, 0.19, 1.01),
}
"""Tables 3 and 4, one process, microseconds. A page fault is for each page: the guest maps 16 at a fault."""
SYSTEM_CALLS = {"null I/O": 1, "stat": 1, "open/close": 2, "select, TCP": 1, "signal installed": 1}
"""What each of these enters the kernel for, in a round."""

FAULTS = {
    KVM_EPT: 3.65,
    KVM_SPT: 7.7,
    PVM_BM: 6.6,
    EPT_IN_A_VM: 9.2,
    PVM_IN_A_VM: 7.2,
    SPT_IN_A_VM: 100.0,
}
FAULTS_WITHOUT = {"only PCIDs": 7.3, "only prefault": 10.2, "only locks": 11.9}
"""Figures 10 and 4, one process, seconds for 1,048,576 pages, give or take a second; WITHOUT: PVM in a VM with one of
its optimizations."""
PAGES = 1 << 20

BUILD = {KVM_EPT: 142.0, KVM_SPT: 241.0, PVM_BM: 176.0, EPT_IN_A_VM: 164.0, PVM_IN_A_VM: 181.0}
"""Figure 11a, one container, seconds, give or take five."""
PROCESS_MS, PROCESS_FAULTS = 38.4, 1081
"""Of a process of a kernel build, natively (Linux 4.13, perf.mvermeulen.com): milliseconds, minor faults."""

COUNTS = {
    ("page-fault", 1): (2.009, 1.000, 1.006),
    ("page-fault", 8): (2.013, 1.000, 1.011),
    ("parallel-fault", 1): (2.006, 1.000, 1.003),
    ("parallel-fault", 4): (2.067, 1.000, 1.063),
    ("parallel-fault", 8): (2.026, 1.000, 1.022),
    ("fault-scaling", 1): (2.009, 1.001, 1.005),
    ("fault-scaling", 8): (2.009, 1.000, 1.006),
}
"""Workload and processors: page faults that exit, those passed on, those fixed; by page."""
MARKERS = {("page-fault", 1): (65418, 65418, 0, 65563), ("parallel-fault", 8): (195859, 195856, 43, 196684)}
"""Entries marked as not present at the walk, and of these stale when met; of marks in tables in sync alone, met, and
faults passed on meanwhile."""
TIMES = {
    "page-fault": {"pvm": 4435.0, "kvm-ept": 1008.0},
    "page-fault, cold": {"pvm": 7028.0, "kvm-ept": 9038.0},
    "parallel-fault": {"pvm": 4362.0, "kvm-ept": 692.0},
    "fault-scaling, cold": {"pvm": 5713.0, "kvm-ept": 3344.0, "kvm-spt": 18293.0},
    "unmap-scaling": {"pvm": 72.0, "kvm-ept": 96.0},
    "fork-exec": {"pvm": 1658e3, "kvm-ept": 402e3},
    "syscall": {"pvm": 210.8, "kvm-ept": 56.6},
    "pipe round trip": {"pvm": 7837.0, "kvm-ept": 5117.0},
}
"""One processor, nanoseconds a page or call. Huge pages under the guest; cold: pages of 4 KiB that the host has yet to
find."""
