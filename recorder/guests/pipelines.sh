#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# The first process of a guest that runs what tests/data/kvm-6.1/workload.tsv was counted under: pipelines of three programs,
# between marks 1 and 2.
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin
i=0
while [ $i -lt 6 ]; do /bin/echo x | cat | wc >/dev/null; i=$((i + 1)); done
mark 1
i=0
while [ $i -lt 60 ]; do /bin/echo x | cat | wc >/dev/null; i=$((i + 1)); done
mark 2
poweroff -f
