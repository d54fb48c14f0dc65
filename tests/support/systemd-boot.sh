#!/bin/bash
# Boots a real systemd as PID 1 of its own namespaces, with a system bus. Needs root.
#
# usage: systemd-boot.sh WORK_DIR TBOT_BINARY
#
# Nothing outside the namespaces changes: the root file system is read-only in there, /etc, /var,
# /opt, /root and /usr/local/bin are overlays whose changes stay in memory, /tmp, /run and /dev are
# new (systemd-tmpfiles empties /tmp at boot!), and the processes live in a cgroup of their own. The network is the host's, so that units reach servers on 127.0.0.1. Killing this
# process kills everything in it; what is left then is an empty cgroup, named in WORK_DIR.cgroup.
set -euo pipefail
work=$1 binary=$2
repository=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$work"

unified=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/self/mounts)
if [ -z "$unified" ]; then
    echo "no cgroup2 hierarchy is mounted" >&2
    exit 3
fi
cgroup=$unified/tbot-test-$$
mkdir "$cgroup"
echo "$cgroup" > "$work.cgroup"
echo $$ > "$cgroup/cgroup.procs"

inside() {
    set -euo pipefail
    mount --make-rprivate /
    hostname ip-10-0-0-1
    mount -t tmpfs -o mode=755 tmpfs "$work"
    for dir in etc var opt root usr/local/bin; do
        layer=$work/${dir//\//-}
        mkdir -p "$layer/upper" "$layer/work"
        chmod --reference="/$dir" "$layer/upper"
        mount -t overlay overlay -o "lowerdir=/$dir,upperdir=$layer/upper,workdir=$layer/work" "/$dir"
    done

    # The host's own services must not start here: only what this script puts there.
    mkdir -p "$work/units"
    mount --bind "$work/units" /etc/systemd/system
    for unit in systemd-udevd.service systemd-udev-trigger.service systemd-sysctl.service \
        systemd-modules-load.service systemd-remount-fs.service systemd-random-seed.service \
        systemd-timesyncd.service systemd-logind.service systemd-hwdb-update.service \
        systemd-tmpfiles-setup-dev.service systemd-binfmt.service systemd-pstore.service \
        systemd-machine-id-commit.service systemd-firstboot.service systemd-ask-password-console.path \
        systemd-journald-audit.socket systemd-journal-flush.service systemd-update-utmp.service \
        systemd-udevd-control.socket systemd-udevd-kernel.socket \
        e2scrub_reap.service proc-sys-fs-binfmt_misc.automount dev-hugepages.mount dev-mqueue.mount \
        sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
        sys-fs-fuse-connections.mount swap.target getty.target timers.target; do
        ln -s /dev/null "/etc/systemd/system/$unit"
    done
    rm -rf /etc/systemd/system-generators && mkdir -p /etc/systemd/system-generators
    for generator in /lib/systemd/system-generators/*; do
        ln -s /dev/null "/etc/systemd/system-generators/${generator##*/}"
    done
    : > /etc/fstab
    echo ip-10-0-0-1 > /etc/hostname
    mkdir -p /etc/systemd/journald.conf.d
    printf '[Journal]\nStorage=volatile\nReadKMsg=no\nForwardToSyslog=no\n' > /etc/systemd/journald.conf.d/test.conf
    tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id

    # Of the outside world's files only the binary under test is needed.
    cp "$binary" /usr/local/bin/tbot
    chmod 755 /usr/local/bin/tbot

    # Devices: the harmless ones.
    mkdir "$work/dev"
    mount -t tmpfs -o mode=755 tmpfs "$work/dev"
    for node in null zero full random urandom tty; do
        touch "$work/dev/$node"
        mount --bind "/dev/$node" "$work/dev/$node"
    done
    mkdir -m 1777 "$work/dev/shm"
    ln -s /proc/self/fd "$work/dev/fd"
    ln -s /proc/self/fd/0 "$work/dev/stdin"
    ln -s /proc/self/fd/1 "$work/dev/stdout"
    ln -s /proc/self/fd/2 "$work/dev/stderr"
    ln -s null "$work/dev/console"
    mkdir "$work/dev/pts"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$work/dev/pts"
    ln -s pts/ptmx "$work/dev/ptmx"
    mount --rbind "$work/dev" /dev

    # A repository that lies under one of these stays visible, read-only like everything else.
    mount --bind "$repository" /mnt
    for dir in tmp var/tmp; do
        mount -t tmpfs -o mode=1777 tmpfs "/$dir"
    done
    if ! [ -e "$repository/Cargo.toml" ]; then
        # Else systemd-tmpfiles would try to empty the repository with the rest of /tmp.
        ln -s /dev/null /etc/systemd/system/systemd-tmpfiles-setup.service
        mkdir -p "$repository"
        mount --bind /mnt "$repository"
        mount -o remount,bind,ro "$repository"
    fi
    umount /mnt
    mount -o remount,bind,ro /
    mount -o remount,bind,ro /sys
    mount -t proc proc /proc
    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
    mkdir -p /run/lock
    umount -R /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    exec env -i container=tbot-test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        LANG=C.UTF-8 /lib/systemd/systemd --system --unit=multi-user.target \
        --log-target=console --log-level=warning --show-status=no </dev/null
}
export -f inside
export work binary repository
# The machine ends with the test that booted it, whichever way that ends.
exec setpriv --pdeathsig KILL unshare --pid --mount --uts --ipc --cgroup --fork --kill-child=KILL bash -c inside
