#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# The first process of the guest whose recording is published: phases of different kinds, each after a mark. Linux hands
# on `scale=PERCENT` of its command line: how much of each.
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin
scale=${scale:-100}
ifconfig lo 127.0.0.1 up

mark 1          # shell pipelines: fork, exec, exit
i=0
while [ $i -lt $((scale / 10)) ]; do
    cat /proc/meminfo | grep kB | tr 0-9 a-j | wc -c >/dev/null
    i=$((i + 1))
done

mark 2          # an interpreter: a growing heap, no processes
awk -v n=$((scale * 240)) 'BEGIN { for (i = 0; i < n; i++) a[i % 9973] = a[i % 9973] + i * 7 "x"; for (k in a) sum += length(a[k]); print sum }'

mark 3          # files: a tree packed, compressed, unpacked, sorted
cp -r /etc /proc/self/net /tmp 2>/dev/null
seq 1 $((scale * 80)) | sed 's/$/ some text of a line/' >/tmp/lines
sort -r /tmp/lines | gzip -1 >/tmp/lines.gz
gunzip -c /tmp/lines.gz | md5sum

mark 4          # a server, which starts a process for each of its requests
mkdir -p /tmp/www
seq 1 2000 >/tmp/www/index.html
httpd -h /tmp/www -p 127.0.0.1:80
i=0
while [ $i -lt $((scale / 12)) ]; do
    wget -q -O /dev/null http://127.0.0.1/index.html
    i=$((i + 1))
done

mark 5          # the end
poweroff -f
