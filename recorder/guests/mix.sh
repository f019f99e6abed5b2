#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# The first process of the guest whose recording is published: phases of different kinds, each after a mark.
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin
ifconfig lo 127.0.0.1 up

mark 1          # shell pipelines: fork, exec, exit
i=0
while [ $i -lt 25 ]; do
    cat /proc/meminfo | grep kB | tr 0-9 a-j | wc -c >/dev/null
    i=$((i + 1))
done

mark 2          # an interpreter: a growing heap, no processes
awk 'BEGIN { for (i = 0; i < 60000; i++) a[i % 9973] = a[i % 9973] + i * 7 "x"; for (k in a) n += length(a[k]); print n }'

mark 3          # files: a tree packed, compressed, unpacked, sorted
cp -r /etc /proc/self/net /tmp 2>/dev/null
seq 1 20000 | sed 's/$/ some text of a line/' >/tmp/lines
sort -r /tmp/lines | gzip -1 >/tmp/lines.gz
gunzip -c /tmp/lines.gz | md5sum

mark 4          # a server, which starts a process for each of its requests
mkdir -p /tmp/www
seq 1 2000 >/tmp/www/index.html
httpd -h /tmp/www -p 127.0.0.1:80
i=0
while [ $i -lt 20 ]; do
    wget -q -O /dev/null http://127.0.0.1/index.html
    i=$((i + 1))
done

mark 5          # the end
poweroff -f
