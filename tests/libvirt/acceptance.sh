#!/usr/bin/env bash
# libvirt drives an emulator: acceptance.sh EMULATOR [PART]...
#
# EMULATOR is the absolute path of qemu-system-x86_64, or of a program that is to
# be taken for it.  Everything that is done to a domain here is done by virsh and
# an unmodified libvirt; the same checks hold for both programs, and what only one
# of them can do is listed as skipped, with the reason.
#
# It runs as an ordinary user that has an account (libvirt looks for one) and
# needs nothing but libvirt's packages and qemu-img: home, run-time directory,
# images and daemons are its own, and gone at the end.  Each line that it prints
# is of the Test Anything Protocol, a check that failed is followed by what was
# printed, and the exit status says whether there was any.
#
# PART is one of the functions "part_..." below without that; the default is all of them.
set -uo pipefail

emulator=${1:?the path of an emulator is missing}
shift
case $emulator in /*) ;; *) echo "$0: $emulator is no absolute path" >&2; exit 2 ;; esac
[ "$(id -u)" -ne 0 ] || { echo "$0: root's session is the system's libvirt: run this as an ordinary user" >&2; exit 2; }

# -- A place of its own ---------------------------------------------------------------------------------------

# Short: libvirt makes UNIX sockets deep below it, and their names end at 107 bytes.
place=$(mktemp -d /tmp/libvirt.XXXXXX)
unset XDG_CONFIG_HOME XDG_CACHE_HOME XDG_DATA_HOME XDG_STATE_HOME
export HOME=$place XDG_RUNTIME_DIR=$place/run LIBVIRT_DEFAULT_URI=qemu:///session LC_ALL=C
mkdir -m 700 "$place/run"
cd "$place" || exit 2
umask 022

libvirtd_pid() { cat "$XDG_RUNTIME_DIR/libvirt/libvirtd.pid" 2>/dev/null; }
emulator_pid() { cat "$XDG_RUNTIME_DIR/libvirt/qemu/run/$1.pid" 2>/dev/null; }

# The process of the given number is gone, or nothing but its exit status is left.
gone() {
    local state
    state=$(sed -n 's/^State:\t\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null)
    [ -z "$state" ] || [ "$state" = Z ]
}

# Try a command ten times a second until it succeeds, for twenty seconds at most.
eventually() {
    local attempt
    for attempt in $(seq 200); do
        "$@" && return 0
        sleep 0.1
    done
    return 1
}

# End a process and see that it is gone: end SIGNAL PID.
end() {
    [ -n "${2:-}" ] || return 1
    kill "-$1" "$2" 2>/dev/null
    eventually gone "$2"
}

clean_up() {
    local file
    jobs -p | xargs --no-run-if-empty kill 2>/dev/null
    for file in "$XDG_RUNTIME_DIR"/libvirt/qemu/run/*.pid "$XDG_RUNTIME_DIR"/libvirt/{libvirtd,virtlogd}.pid; do
        [ ! -e "$file" ] || end TERM "$(cat "$file")" || end KILL "$(cat "$file")"
    done
    cd / && rm -rf "$place"
}
trap clean_up EXIT
trap 'exit 143' TERM INT

# -- Checks ---------------------------------------------------------------------------------------------------

count=0 failures=0
printed=$place/printed

# Say how a check has ended: report STATUS TITLE.
report() {
    count=$((count + 1))
    if [ "$1" -eq 0 ]; then
        echo "ok $count - $2"
    else
        failures=$((failures + 1))
        echo "not ok $count - $2"
        sed 's/^/# /' "$printed"
    fi
}

# ok TITLE COMMAND...: it succeeds.
ok() {
    local title=$1
    shift
    "$@" >"$printed" 2>&1
    report $? "$title"
}

# says TITLE PATTERN COMMAND...: it succeeds, and prints something like that.
says() {
    local title=$1 pattern=$2
    shift 2
    "$@" >"$printed" 2>&1 && grep --quiet --extended-regexp -e "$pattern" "$printed"
    report $? "$title"
}

# hides TITLE PATTERN COMMAND...: it succeeds, and prints nothing like that.
hides() {
    local title=$1 pattern=$2
    shift 2
    "$@" >"$printed" 2>&1 && ! grep --quiet --extended-regexp -e "$pattern" "$printed"
    report $? "$title"
}

# refused TITLE PATTERN COMMAND...: it fails, and the user reads something like that.
refused() {
    local title=$1 pattern=$2
    shift 2
    ! "$@" >"$printed" 2>&1 && grep --quiet --extended-regexp -e "$pattern" "$printed"
    report $? "$title"
}

# becomes TITLE PATTERN COMMAND...: sooner or later it prints something like that.
becomes() {
    local title=$1 pattern=$2
    shift 2
    eventually shows "$pattern" "$@"
    report $? "$title"
}

shows() {
    local pattern=$1
    shift
    "$@" >"$printed" 2>&1 && grep --quiet --extended-regexp -e "$pattern" "$printed"
}

# Milliseconds that the quickest detach took since the last look.
quickest=999999

# detached TITLE COMMAND...: it succeeds, and how long it took is noted.
detached() {
    local title=$1 began status took
    shift
    began=$(date +%s%N)
    "$@" >"$printed" 2>&1
    status=$?
    took=$((($(date +%s%N) - began) / 1000000))
    [ "$took" -ge "$quickest" ] || quickest=$took
    report $status "$title"
}

# Libvirt waits five seconds for an event that came before the reply to device_del, and so before it was waited
# for.  On a busy machine that may happen to any emulator once, but not every time.
in_time() {
    echo "the quickest took $quickest ms" >"$printed"
    [ "$quickest" -lt 4000 ]
    report $? "$1"
    quickest=999999
}

# only_qmpd TITLE REASON: what follows is checked with qmpd alone, and the reason is why QEMU can't do it.
only_qmpd() {
    if [ "$kind" = qmpd ]; then
        return 0
    fi
    count=$((count + 1))
    echo "ok $count - $1 # SKIP not with QEMU: $2"
    return 1
}

# -- Domains, disks, and what is typed ------------------------------------------------------------------------

secret=6d1d0c3e-0000-4000-8000-00000000cafe

# domain NAME MACHINE [DEVICES [ARGUMENTS]]: a definition without USB controller and balloon, into NAME.xml.
# QEMU leaves a disk plugged until a guest agrees, unless its PCI hot-plug is not ACPI's.
domain() {
    local ports="" number arguments=${4:-}
    if [ "$2" = q35 ]; then
        for number in 1 2 3 4 5 6; do
            ports+="<controller type='pci' index='$number' model='pcie-root-port'/>"
        done
        ports="<controller type='pci' index='0' model='pcie-root'/>$ports"
        arguments+="<qemu:arg value='-global'/><qemu:arg value='ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off'/>"
    fi
    cat >"$1.xml" <<XML
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>$1</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='$2'>hvm</type></os>
  <features><acpi/></features>
  <devices>
    <emulator>$emulator</emulator>
    <controller type='usb' model='none'/><memballoon model='none'/>
    $ports${3:-}
  </devices>
  <qemu:commandline>$arguments</qemu:commandline>
</domain>
XML
}

# disk NAME TARGET FORMAT FILE [MORE [DRIVER [BUS]]]: a disk's XML, into NAME.xml.
disk() {
    cat >"$1.xml" <<XML
<disk type='file' device='disk'>
  <driver name='qemu' type='$3' ${6:-}/>
  <source file='$place/$4'>${5:-}</source>
  <target dev='$2' bus='${7:-virtio}'/>${8:-}
</disk>
XML
}

# monitor DOMAIN COMMAND [ARGUMENTS]: what somebody types; fails when the emulator answers with an error.
monitor() {
    local reply
    reply=$(virsh qemu-monitor-command "$1" "{\"execute\": \"$2\"${3:+, \"arguments\": $3}}")
    printf '%s\n' "$reply"
    [[ $reply == *'"return":'* ]]
}

# happened EVENT-PATTERN: libvirt has told of such an event.
happened() { cp events "$printed"; grep --quiet --extended-regexp -e "$1" events; }

watch_events() {
    # Line by line, for it is killed in the end.
    stdbuf --output=L virsh qemu-monitor-event "$1" --loop >events 2>&1 &
    watcher=$!
    # It does not say when it has begun: it has when it tells of an event.
    eventually reset_is_seen "$1"
}

reset_is_seen() { virsh reset "$1" >/dev/null && happened 'event RESET'; }

nodes() { monitor "$1" query-named-block-nodes '{"flat": true}'; }

encryption="<encryption format='luks'><secret type='passphrase' uuid='$secret'/></encryption>"

prepare() {
    printf %s 'pass phrase 1' >pw
    printf %s wrong >pwbad
    local luks=(--object secret,id=s,file=pw)
    qemu-img create -q -f luks "${luks[@]}" -o key-secret=s,iter-time=10 luks.raw 16M &&
        qemu-img create -q -f qcow2 "${luks[@]}" \
            -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 16M &&
        qemu-img create -q -f raw plain.raw 8M &&
        qemu-img create -q -f qcow2 plain.qcow2 32M &&
        qemu-img create -q -f qcow2 -b plain.raw -F raw overlay.qcow2 &&
        qemu-img create -q -f raw payload.raw 16M &&
        qemu-img create -q -f qcow2 payload.qcow2 16M || return 1
    disk vda vda raw luks.raw "$encryption"
    disk vdb vdb qcow2 luks.qcow2 "$encryption"
    cat >secret.xml <<XML
<secret ephemeral='no' private='yes'><uuid>$secret</uuid></secret>
XML
}

# -- The parts ------------------------------------------------------------------------------------------------

# Always the first: the others have its domain, which is defined and shut off, and its secret.
part_define() {
    ok "images are made" prepare
    domain acc q35
    ok "a domain is defined" virsh define acc.xml
    says "it is listed" 'acc +shut off' virsh list --all
    ok "its definition is shown" virsh dumpxml acc
    virsh dumpxml acc >defined.xml
    says "it names the emulator" "<emulator>$emulator</emulator>" cat defined.xml
    says "libvirt knows what the emulator is" '<domain>qemu</domain>' virsh domcapabilities --emulatorbin "$emulator"
    ok "a secret is defined" virsh secret-define secret.xml
    ok "the secret gets its value" virsh secret-set-value $secret --file pw --plain
}

part_start() {
    ok "the domain starts paused" virsh start acc --paused
    says "it is paused" 'paused' virsh domstate acc
    says "it says its version" '"major":' monitor acc query-version
    says "it is not running" '"running":false' monitor acc query-status
    hides "there are no disks" "$place" virsh domblklist acc
    ok "its statistics are shown" virsh domstats acc
    says "it has no block nodes" '"return":\[\]' nodes acc
    refused "a command that does not exist is refused" 'has not been found' monitor acc no-such-command
    refused "a command's error reply is shown" '"class":"GenericError".*nope' \
        monitor acc blockdev-del '{"node-name": "nope"}'
    refused "and is an error where a value is wanted" "'return' member missing" \
        virsh qemu-monitor-command acc --return-value '{"execute": "no-such-command"}'
    ok "a node is added" monitor acc blockdev-add '{"driver": "null-co", "node-name": "n0", "size": 1048576}'
    ok "and deleted" monitor acc blockdev-del '{"node-name": "n0"}'
}

part_luks() {
    local target
    for target in vda vdb; do
        ok "$target: a LUKS disk is attached" virsh attach-device acc $target.xml
        says "$target: domblklist" "$target +$place/luks" virsh domblklist acc
        says "$target: domblklist --details" "file +disk +$target +$place/luks" virsh domblklist acc --details
        says "$target: domblkinfo" 'Capacity: +16777216' virsh domblkinfo acc $target
        says "$target: domblkstat" "$target rd_bytes" virsh domblkstat acc $target
        says "$target: its node is encrypted" '"encrypted":true' nodes acc
        says "$target: query-block names its device" "\"qdev\":\"/machine/peripheral/virtio-disk" monitor acc query-block
    done
    hides "domblkerror knows of no error" 'vd[ab]:' virsh domblkerror acc
    says "domstats counts them" 'block.count=2' virsh domstats acc
    says "domstats has their capacity" 'block.1.capacity=16777216' virsh domstats acc --block
    says "libvirt's secrets are objects" 'format-encryption-secret0' monitor acc qom-list '{"path": "/objects"}'
    says "its key is one" 'masterKey0' monitor acc qom-list '{"path": "/objects"}'
    says "the devices are in the tree" 'child<virtio-blk-pci>' monitor acc qom-list '{"path": "/machine/peripheral"}'
    says "a device is asked for its drive" 'libvirt-[0-9]+-format' \
        monitor acc qom-get '{"path": "/machine/peripheral/virtio-disk0", "property": "drive"}'
    refused "a second disk under the same name is refused" "target 'vda' duplicated" virsh attach-device acc vda.xml
    ok "a LUKS disk grows" virsh blockresize acc vda 20MiB
    says "and is as large as that" 'Capacity: +20971520' virsh domblkinfo acc vda
    refused "a disk that is not there is not detached" 'No disk found whose source path or target is vdz' virsh detach-disk acc vdz
    for target in vda vdb; do
        detached "$target: detached" virsh detach-device acc $target.xml
        hides "$target: it is not listed any more" "$target " virsh domblklist acc
    done
    says "no node is left" '"return":\[\]' nodes acc
    hides "no secret is left" 'encryption' monitor acc qom-list '{"path": "/objects"}'
    hides "no device is left" 'virtio-disk' monitor acc qom-list '{"path": "/machine/peripheral"}'
    refused "detached once is enough" 'not found' virsh detach-device acc vda.xml
}

part_passphrase() {
    ok "the secret gets a wrong value" virsh secret-set-value $secret --file pwbad --plain
    refused "a wrong passphrase does not open the raw disk" 'Invalid password, cannot unlock any keyslot' \
        virsh attach-device acc vda.xml
    refused "nor the qcow2 disk" 'Invalid password, cannot unlock any keyslot' virsh attach-device acc vdb.xml
    says "libvirt has rolled back the nodes" '"return":\[\]' nodes acc
    hides "and the secrets" 'encryption' monitor acc qom-list '{"path": "/objects"}'
    hides "and lists no disk" 'vd[ab]' virsh domblklist acc
    ok "the secret gets the right value again" virsh secret-set-value $secret --file pw --plain
    ok "which opens the disk" virsh attach-device acc vda.xml
    detached "and it is detached" virsh detach-device acc vda.xml
    disk wrong vda qcow2 plain.raw
    refused "a file that is not of the format is refused" 'format' virsh attach-device acc wrong.xml
    disk missing vda raw missing.raw
    refused "a file that is not there is refused" 'No such file' virsh attach-device acc missing.xml
    says "no node is left of that" '"return":\[\]' nodes acc
}

part_disks() {
    local target
    truncate --size 8M one.raw two.raw three.raw
    cp plain.raw plain2.raw
    disk serial vdc raw plain.raw "" "cache='none' discard='unmap' detect_zeroes='unmap' io='threads'" virtio "<serial>QM00001</serial>"
    quickest=999999
    ok "a disk with serial, cache, discard, detect_zeroes and io is attached" virsh attach-device acc serial.xml
    says "its node detects zeroes" '"detect_zeroes":"unmap"' nodes acc
    says "its node goes round the page cache" '"direct":true' nodes acc
    says "the device has the serial number" 'QM00001' \
        monitor acc qom-get '{"path": "/machine/peripheral/virtio-disk2", "property": "serial"}'
    disk readonly vdd qcow2 plain.qcow2 "" "" virtio "<readonly/>"
    ok "a read-only disk is attached" virsh attach-device acc readonly.xml
    says "its node is read-only" '"ro":true' nodes acc
    ok "a disk is attached by attach-disk" virsh attach-disk acc "$place/payload.raw" vde --targetbus virtio
    disk overlay vdf qcow2 overlay.qcow2 "" "" virtio "<backingStore type='file'><format type='raw'/><source file='$place/plain2.raw'/><backingStore/></backingStore>"
    ok "an overlay is attached with its backing image" virsh attach-device acc overlay.xml
    says "four disks are listed" '^4$' bash -c "virsh domblklist acc | grep -c $place"
    says "domstats tells of the backing image" 'block.*plain2.raw' virsh domstats acc --block --backing
    says "domblkinfo tells of all disks" 'vdd +33554432' virsh domblkinfo acc --all
    ok "a fifth takes the last but one root port" virsh attach-disk acc "$place/one.raw" vdg --targetbus virtio
    ok "a sixth takes the last" virsh attach-disk acc "$place/two.raw" vdh --targetbus virtio
    refused "there is no place for a seventh" 'No more available PCI slots' \
        virsh attach-disk acc "$place/three.raw" vdi --targetbus virtio
    says "six disks are listed" '^6$' bash -c "virsh domblklist acc | grep -c $place"
    detached "the fifth is detached" virsh detach-disk acc vdg
    ok "its root port is free again" virsh attach-disk acc "$place/three.raw" vdi --targetbus virtio
    for target in vdc vdd vde vdf vdh vdi; do
        detached "$target is detached" virsh detach-disk acc $target
    done
    in_time "libvirt sees the events of virtio disks"
    disk slice vdc raw one.raw "<slices><slice type='storage' offset='1048576' size='2097152'/></slices>"
    ok "a slice of a file is attached" virsh attach-device acc slice.xml
    says "and as large as it is" 'Capacity: +2097152' virsh domblkinfo acc vdc
    detached "and is detached" virsh detach-disk acc vdc
    says "no node is left" '"return":\[\]' nodes acc
}

part_snapshots() {
    qemu-img create -q -f qcow2 below.qcow2 8M
    disk below vdc qcow2 below.qcow2
    ok "an encrypted disk is attached" virsh attach-device acc vdb.xml
    ok "and one that is not" virsh attach-device acc below.xml
    ok "a disk gets an overlay" virsh snapshot-create-as acc --disk-only --no-metadata s1 \
        --diskspec "vdc,file=$place/above.qcow2" --diskspec vdb,snapshot=no
    says "it is the disk now" 'vdc +/.*/above.qcow2' virsh domblklist acc
    says "over what was the disk" "block.*below.qcow2" virsh domstats acc --block --backing
    cat >snapshot.xml <<XML
<domainsnapshot><disks>
  <disk name='vdb' snapshot='external'><driver type='qcow2'/><source file='$place/above.luks.qcow2'>$encryption</source></disk>
  <disk name='vdc' snapshot='no'/>
</disks></domainsnapshot>
XML
    ok "an encrypted disk gets an encrypted overlay" virsh snapshot-create acc snapshot.xml --disk-only --no-metadata
    says "it is the disk now" 'vdb +/.*/above.luks.qcow2' virsh domblklist acc
    says "and encrypted" 'encrypted: yes' qemu-img info --force-share above.luks.qcow2
    refused "no overlay is made where none can be" 'No such file or directory' \
        virsh snapshot-create-as acc --disk-only --no-metadata s2 \
        --diskspec vdc,file=/missing/above --diskspec vdb,snapshot=no
    says "the disk is what it was" 'vdc +/.*/above.qcow2' virsh domblklist acc
    if only_qmpd "a commit is refused" "QEMU does it"; then
        refused "a commit is refused" 'block-commit has not been found' virsh blockcommit acc vdc --active
        says "the disk is what it was" 'vdc +/.*/above.qcow2' virsh domblklist acc
    fi
    ok "the disk is detached with its overlay" virsh detach-disk acc vdc
    ok "and the encrypted one" virsh detach-disk acc vdb
    says "no node is left" '"return":\[\]' nodes acc
}

# passed COMMAND ARGUMENTS: a command with a descriptor of plain.raw.
passed() {
    virsh qemu-monitor-command acc --return-value --pass-fds 9 \
        "{\"execute\": \"$1\", \"arguments\": $2}" 9<>plain.raw
}

part_descriptors() {
    ok "a descriptor is passed and named" passed getfd '{"fdname": "plain"}'
    ok "its name is forgotten" monitor acc closefd '{"fdname": "plain"}'
    says "a descriptor is put into a set" '"fdset-id":7' passed add-fd '{"fdset-id": 7, "opaque": "plain"}'
    ok "a node is opened out of the set" \
        monitor acc blockdev-add '{"driver": "file", "node-name": "passed", "filename": "/dev/fdset/7"}'
    says "it is the file" '"virtual-size":8388608' nodes acc
    ok "the set is left to the node" monitor acc remove-fd '{"fdset-id": 7}'
    ok "the node is closed" monitor acc blockdev-del '{"node-name": "passed"}'
    says "and the set gone" '"return":\[\]' monitor acc query-fdsets
    cat >passed.xml <<XML
<disk type='file' device='disk'>
  <driver name='qemu' type='raw'/><source file='$place/plain.raw' fdgroup='plain'/><target dev='vdc' bus='virtio'/>
</disk>
XML
    says "a disk is attached of which libvirt passes the descriptor" 'attached successfully' \
        bash -c "printf '%s\n' 'dom-fd-associate acc plain 9' 'attach-device acc passed.xml' | virsh 9<>plain.raw"
    says "it is opened out of a set" '/dev/fdset/' nodes acc
    ok "it is detached" virsh detach-disk acc vdc
    says "and its set gone" '"return":\[\]' monitor acc query-fdsets
}

part_scsi() {
    local attempt definition="<controller type='scsi' index='0' model='virtio-scsi'/>"
    domain scsi q35 "$definition"
    ok "a domain with a SCSI controller is defined" virsh define scsi.xml
    ok "and started" virsh start scsi --paused
    disk sda sda raw luks.raw "$encryption" "" scsi
    disk sdb sdb qcow2 luks.qcow2 "$encryption" "" scsi
    ok "a LUKS disk is attached to it" virsh attach-device scsi sda.xml
    ok "and another" virsh attach-device scsi sdb.xml
    says "domblkinfo" 'Capacity: +(16777216|20971520)' virsh domblkinfo scsi sda
    says "domblkstat" 'sdb rd_req' virsh domblkstat scsi sdb
    quickest=999999
    detached "a LUKS disk is detached from it" virsh detach-device scsi sdb.xml
    detached "and the first" virsh detach-device scsi sda.xml
    for attempt in 1 2 3; do
        [ "$quickest" -ge 4000 ] || break
        virsh attach-device scsi sda.xml >/dev/null
        detached "and once more" virsh detach-device scsi sda.xml
    done
    in_time "libvirt sees the events of SCSI disks"
    says "no node is left" '"return":\[\]' nodes scsi
    ok "the domain is destroyed" virsh destroy scsi
    ok "and its definition is gone" virsh undefine scsi
}

# add DOMAIN NAME OPTIONS: a node is added; the last one added is the first to go.
add() {
    ok "$format: $2" monitor "$1" blockdev-add "{\"node-name\": \"$2\", $3}"
    added=("$2" "${added[@]}")
}

# make_header DOMAIN: a job makes a LUKS header that lies on a volume of its own.
make_header() {
    : >header.img
    ok "a secret for a header" monitor "$1" object-add '{"qom-type": "secret", "id": "sec0", "data": "abc123"}'
    ok "the header's file" monitor "$1" blockdev-add \
        "{\"driver\": \"file\", \"node-name\": \"header\", \"filename\": \"$place/header.img\"}"
    ok "a job makes the header" monitor "$1" blockdev-create \
        '{"job-id": "make", "options": {"driver": "luks", "header": "header", "size": 0, "key-secret": "sec0", "iter-time": 10}}'
    becomes "the job concludes" '"status":"concluded"' monitor "$1" query-jobs
    hides "without an error" '"error"' monitor "$1" query-jobs
    ok "the job is dismissed" monitor "$1" job-dismiss '{"id": "make"}'
    ok "the header's file goes" monitor "$1" blockdev-del '{"node-name": "header"}'
    ok "and the secret" monitor "$1" object-del '{"id": "sec0"}'
}

# typed_header DOMAIN FORMAT [PLACE]: a disk whose header is on another volume than its payload, which is of that
# format.  Secret, nodes and device come one by one, and go the same way back.
typed_header() {
    local domain=$1 format=$2 payload=libvirt-2-storage node added=()
    ok "$format: a secret" monitor "$domain" object-add '{"qom-type": "secret", "id": "sec0", "data": "abc123"}'
    add "$domain" libvirt-1-storage "\"driver\": \"file\", \"filename\": \"$place/header.img\""
    add "$domain" libvirt-1-format '"driver": "raw", "file": "libvirt-1-storage"'
    add "$domain" libvirt-2-storage "\"driver\": \"file\", \"filename\": \"$place/payload.$format\""
    if [ "$format" = qcow2 ]; then
        payload=libvirt-2-format
        add "$domain" $payload '"driver": "qcow2", "file": "libvirt-2-storage"'
    fi
    add "$domain" libvirt-3-format \
        "\"driver\": \"luks\", \"file\": \"$payload\", \"header\": \"libvirt-1-format\", \"key-secret\": \"sec0\""
    says "$format: the header is a detached one" '"detached-header":true' nodes "$domain"
    ok "$format: the device" monitor "$domain" device_add \
        "{\"driver\": \"virtio-blk-pci\", \"num-queues\": 1, \"drive\": \"libvirt-3-format\", \"id\": \"virtio-disk1\"${3:-}}"
    says "$format: query-block has it" '"qdev":"/machine/peripheral/virtio-disk1/virtio-backend"' \
        monitor "$domain" query-block
    says "$format: the device's drive" '"libvirt-3-format"' \
        monitor "$domain" qom-get '{"path": "/machine/peripheral/virtio-disk1", "property": "drive"}'
    says "$format: the device's type" '"virtio-blk-pci"' \
        monitor "$domain" qom-get '{"path": "/machine/peripheral/virtio-disk1", "property": "type"}'
    refused "$format: a node in use is not deleted" 'in use' \
        monitor "$domain" blockdev-del '{"node-name": "libvirt-3-format"}'

    ok "$format: the device goes" monitor "$domain" device_del '{"id": "virtio-disk1"}'
    # Where a guest would have to agree, a reset does it.
    [ "$kind" = qmpd ] || virsh reset "$domain" >/dev/null
    becomes "$format: and is gone" '"return":\[\]' monitor "$domain" query-block
    for node in "${added[@]}"; do
        ok "$format: $node goes" monitor "$domain" blockdev-del "{\"node-name\": \"$node\"}"
    done
    ok "$format: the secret goes" monitor "$domain" object-del '{"id": "sec0"}'
    says "$format: no node is left" '"return":\[\]' nodes "$domain"
}

part_typed() {
    domain second pc
    ok "a second domain, of the machine pc, is defined" virsh define second.xml
    ok "and starts beside the first" virsh start second --paused
    says "both are listed" '^2$' bash -c "virsh list --name | grep -c ."
    make_header second
    typed_header second raw
    typed_header second qcow2
    typed_header acc raw ', "bus": "pci.1"'
    if only_qmpd "numbers and switches as strings, as in old transcripts" "it wants num-queues as a number, and has no scsi"; then
        ok "a node for a device" monitor second blockdev-add '{"driver": "null-co", "node-name": "n", "size": 1048576}'
        ok "numbers and switches as strings, as in old transcripts" monitor second device_add \
            '{"driver": "virtio-blk-pci", "num-queues": "1", "scsi": "off", "drive": "n", "id": "d"}'
        ok "the device goes" monitor second device_del '{"id": "d"}'
        becomes "and is gone" '"return":\[\]' monitor second query-block
        ok "its node goes" monitor second blockdev-del '{"node-name": "n"}'
    fi
    ok "a LUKS disk is attached to the second domain" virsh attach-device second vdb.xml
    refused "and not to the first as well" 'lock' virsh attach-device acc vdb.xml
    ok "the second domain is destroyed" virsh destroy second
    ok "the first one is not touched" virsh domstate acc
    ok "and takes the disk now" virsh attach-device acc vdb.xml
    detached "which is detached" virsh detach-device acc vdb.xml
    ok "the second domain's definition goes" virsh undefine second
}

# human DOMAIN LINE: a command of the monitor for people.
human() { virsh qemu-monitor-command "$1" --hmp "$2"; }

# iotune MEMBERS: a disk with limits, into iotune.xml.
iotune() { disk iotune vda raw plain.raw "" "" virtio "<iotune>$1</iotune>"; }

# limits DOMAIN TARGET: what libvirt asks the emulator for, in one line.
limits() { virsh blkdeviotune "$1" "$2" | sed -n 's/^\([a-z_]*\) *: \(.*[^0].*\)$/\1=\2/p' | tr '\n' ' '; }

part_iotune() {
    iotune "<total_bytes_sec>1048576</total_bytes_sec><write_iops_sec>50</write_iops_sec><read_iops_sec>70</read_iops_sec>"
    ok "a disk with limits is attached" virsh attach-device acc iotune.xml
    says "the emulator has them" '^total_bytes_sec=1048576 read_iops_sec=70 write_iops_sec=50 ' limits acc vda
    says "and they are the device's" '"bps":1048576' monitor acc query-block
    hides "libvirt has warned of nothing" 'block_set_io_throttle' cat "$HOME/.cache/libvirt/qemu/log/acc.log"
    ok "they are changed" virsh blkdeviotune acc vda --total-bytes-sec 2000000 --total-bytes-sec-max 4000000 \
        --total-bytes-sec-max-length 3 --read-iops-sec 0 --write-iops-sec 0
    says "and are others now" \
        '^total_bytes_sec=2000000 total_bytes_sec_max=4000000 .*total_bytes_sec_max_length=3 ' limits acc vda
    ok "requests are limited" virsh blkdeviotune acc vda --total-bytes-sec 0 --total-bytes-sec-max 0 \
        --total-bytes-sec-max-length 0 --total-iops-sec 9 --size-iops-sec 4096
    says "with a size" '^total_iops_sec=9 size_iops_sec=4096 ' limits acc vda
    refused "a total and a part of it are refused" 'cannot be set at the same time' \
        virsh blkdeviotune acc vda --total-bytes-sec 5 --read-bytes-sec 5
    refused "a burst below the mean is refused" 'cannot be|must be|lower' \
        virsh blkdeviotune acc vda --total-iops-sec 9 --total-iops-sec-max 5
    says "which changes nothing" '^total_iops_sec=9 size_iops_sec=4096 ' limits acc vda
    ok "all limits are taken away" virsh blkdeviotune acc vda --total-iops-sec 0 --size-iops-sec 0
    hides "and are gone" '[a-z]+_sec=[1-9]' limits acc vda
    hides "the device is in no group" '"group"' monitor acc query-block
    detached "the disk is detached" virsh detach-device acc iotune.xml
    iotune "<read_bytes_sec>4096</read_bytes_sec><group_name>shared</group_name>"
    ok "a disk in a group is attached" virsh attach-device acc iotune.xml
    disk iotune2 vdb raw payload.raw "" "" virtio \
        "<iotune><read_bytes_sec>4096</read_bytes_sec><group_name>shared</group_name></iotune>"
    ok "and another one" virsh attach-device acc iotune2.xml
    ok "the limits of one are changed" virsh blkdeviotune acc vdb --read-bytes-sec 8192
    says "and so are the other's" 'read_bytes_sec=8192.*group_name=shared' limits acc vda
    detached "one is detached" virsh detach-device acc iotune.xml
    detached "and the other" virsh detach-device acc iotune2.xml
    says "no node is left" '"return":\[\]' nodes acc
}

part_human() {
    says "a person asks for the run state" '^VM status: paused' human acc 'info status'
    says "and the name" '^acc' human acc 'info name'
    says "and the version" '^10\.' human acc 'info version'
    ok "a disk is attached" virsh attach-device acc vda.xml
    says "a person sees the disk" 'luks, encrypted' human acc 'info block'
    says "on its device" 'Attached to: +/machine/peripheral/virtio-disk0/virtio-backend' human acc 'info block'
    says "and its images" '^file format: luks' human acc 'info block -n -v'
    says "and its counters" 'rd_operations=[0-9]+ wr_operations=' human acc 'info blockstats'
    says "and where it is plugged in" 'dev: virtio-blk-pci, id "virtio-disk0"' human acc 'info qtree -b'
    says "a disk without a model is refused" "'frob' is not a valid device model name" human acc 'device_add frob'
    detached "the disk is detached" virsh detach-device acc vda.xml
    says "a wrong command is answered" "^unknown command: 'frob'" human acc 'frob it'
    says "a wrong line is answered" 'Try "help info block" for more information' human acc 'info block -x'
    ok "a person makes a secret" human acc 'object_add secret,id=people,data=hunter2'
    says "it is there" '"secret"' human acc 'qom-get /objects/people type'
    ok "and removes it" human acc 'object_del people'
    ok "a person lets the machine go on" human acc cont
    becomes "libvirt notices" 'running' virsh domstate acc
    ok "and stops it" human acc stop
    becomes "libvirt notices that too" 'paused' virsh domstate acc
}

part_states() {
    local event
    watch_events acc
    ok "a disk is attached to the paused domain" virsh attach-device acc vda.xml
    detached "and is detached" virsh detach-device acc vda.xml
    ok "the domain is resumed" virsh resume acc
    says "it runs" 'running' virsh domstate acc
    says "and says so" '"running":true' monitor acc query-status
    ok "it is suspended" virsh suspend acc
    says "it is paused by the user" 'paused \(user\)' virsh domstate acc --reason
    ok "it is reset" virsh reset acc
    ok "it is resumed again" virsh resume acc
    if only_qmpd "a disk is detached from a running domain" "no guest runs in it that would let the disk go"; then
        ok "a disk is attached to the running domain" virsh attach-device acc vda.xml
        ok "the domain is reset" virsh reset acc
        says "the disk is still there" 'vda' virsh domblklist acc
        detached "and is detached from the running domain" virsh detach-device acc vda.xml
    fi
    for event in 'DEVICE_DELETED .*"device":"virtio-disk0"' 'DEVICE_DELETED .*virtio-backend"' STOP RESUME RESET; do
        eventually happened "event $event"
        report $? "event $event"
    done
    kill "$watcher"
    wait "$watcher" 2>/dev/null
}

part_destroy() {
    ok "a disk is attached" virsh attach-device acc vda.xml
    ok "the domain is destroyed, with the disk attached" virsh destroy acc
    says "it was destroyed" 'shut off \(destroyed\)' virsh domstate acc --reason
    ok "the disk is free" qemu-img info --object secret,id=s,file=pw --image-opts driver=luks,key-secret=s,file.filename=luks.raw
    ok "it starts again" virsh start acc --paused
    ok "a disk is attached for good" virsh attach-device acc vda.xml --persistent
    ok "and another" virsh attach-device acc vdb.xml --persistent
    ok "the domain is destroyed" virsh destroy acc
    ok "and starts with the disks on its command line" virsh start acc --paused
    says "which are listed" "vda +$place/luks.raw" virsh domblklist acc
    says "which are open" '"encrypted":true' nodes acc
    says "domblkinfo" 'Capacity: +(16777216|20971520)' virsh domblkinfo acc vda
    says "domblkstat" 'vdb rd_req' virsh domblkstat acc vdb
}

part_reconnect() {
    local pid
    pid=$(emulator_pid acc)
    ok "libvirtd is killed" end KILL "$(libvirtd_pid)"
    says "the next one finds the domain" 'paused' virsh domstate acc
    says "and its disks" "vda +$place/luks.raw" virsh domblklist acc
    ok "in the same process" test "$pid" = "$(emulator_pid acc)"
    says "domblkinfo" 'Capacity: +(16777216|20971520)' virsh domblkinfo acc vda
    ok "libvirtd ends in peace" end TERM "$(libvirtd_pid)"
    says "the next one finds the domain again" 'paused' virsh domstate acc
    ok "and resumes it" virsh resume acc
    ok "libvirtd is killed while the domain runs" end KILL "$(libvirtd_pid)"
    says "the next one finds it running" 'running' virsh domstate acc
    says "and talks to it" '"running":true' monitor acc query-status
}

part_crash() {
    ok "the emulator is killed" end KILL "$(emulator_pid acc)"
    becomes "the domain has crashed" 'shut off \(crashed\)' virsh domstate acc --reason
    ok "it starts again" virsh start acc --paused
    ok "libvirtd is killed" end KILL "$(libvirtd_pid)"
    ok "and the emulator, with nobody looking" end KILL "$(emulator_pid acc)"
    becomes "the next libvirtd sees that the domain has crashed" 'shut off \(crashed\)' virsh domstate acc --reason
    ok "the emulator is told to quit" virsh start acc --paused
    monitor acc quit >"$printed" 2>&1
    becomes "and has not crashed then" 'shut off' virsh domstate acc --reason
    ok "its disks are taken out of its definition" bash -c \
        "virsh detach-disk acc vda --config && virsh detach-disk acc vdb --config"
    ok "it starts once more" virsh start acc --paused
}

# An attach is cut off: the emulator stands still, libvirtd waits for it and is killed.
part_interrupted() {
    local pid
    pid=$(emulator_pid acc)
    kill -STOP "$pid"
    virsh attach-device acc vda.xml >attached 2>&1 &
    sleep 2
    ok "libvirtd is killed while it attaches a disk" end KILL "$(libvirtd_pid)"
    kill -CONT "$pid"
    wait $!
    says "which virsh notices" 'Failed to attach device' cat attached
    says "the next libvirtd finds the domain" 'paused|running' virsh domstate acc
    says "and talks to it" '"running":' monitor acc query-status
    hides "it has no half of a disk" 'vda' virsh domblklist acc
    says "nor a node" '"return":\[\]' nodes acc
    ok "the domain is destroyed" virsh destroy acc
    ok "and starts" virsh start acc --paused
    ok "the disk is attached now" virsh attach-device acc vda.xml
    detached "and detached" virsh detach-device acc vda.xml
}

# unusable TITLE PATTERN DEVICES [EDIT]: a domain with these devices, edited by sed, is refused when it is defined or started.
unusable() {
    domain unusable q35 "$3"
    sed -i "${4:-}" unusable.xml
    refused "$1" "$2" bash -c "virsh define unusable.xml && virsh start unusable --paused"
    virsh undefine unusable >/dev/null 2>&1
}

# What the user reads who wants too much.
part_messages() {
    local what="it has got one"
    printf '#!/bin/sh\necho out of order >&2\nexit 1\n' >broken
    chmod 755 broken
    unusable "an emulator that does not work is quoted" 'out of order' "" "s|<emulator>.*<|<emulator>$place/broken<|"
    unusable "an option that does not exist is named" '-no-such-option: invalid option' "" \
        "s|<qemu:commandline>|&<qemu:arg value='-no-such-option'/>|"
    unusable "a device that does not exist is named" "'no-such-device' is not a valid device model name" "" \
        "s|<qemu:commandline>|&<qemu:arg value='-device'/><qemu:arg value='no-such-device'/>|"
    unusable "a machine that does not exist is named" "does not support machine type 'virt'" "" "s/'q35'/'virt'/"
    unusable "another processor is refused" "does not support arch 'aarch64'" "" "s/x86_64'/aarch64'/"
    [ -w /dev/kvm ] || unusable "KVM is refused" "does not support virt type 'kvm'" "" "s/type='qemu'/type='kvm'/"
    if only_qmpd "a network card is refused" "$what"; then
        unusable "a network card is refused" 'not supported with this QEMU binary' "<interface type='user'/>"
    fi
    if only_qmpd "a graphics card is refused" "$what"; then
        unusable "a graphics card is refused" 'does not support video model' "<video><model type='virtio'/></video>"
    fi
    if only_qmpd "a CD-ROM drive is refused" "$what"; then
        unusable "a CD-ROM drive is refused" "'ide-cd' is not a valid device model name" \
            "<disk type='file' device='cdrom'><source file='$place/plain.raw'/><target dev='sda' bus='sata'/></disk>"
    fi
    if only_qmpd "the balloon that libvirt adds is refused" "$what"; then
        unusable "the balloon that libvirt adds is refused" "'virtio-balloon-pci' is not a valid device model name" \
            "" "s/<memballoon model='none'.>//"
    fi
    if only_qmpd "a USB controller is refused" "$what"; then
        unusable "a USB controller is refused" 'USB controller model' "" "s/usb' model='none'/usb' model='qemu-xhci'/"
    fi
    if only_qmpd "a serial port is refused" "$what"; then
        unusable "a serial port is refused" "'isa-serial' is not supported" "<serial type='pty'/>"
    fi
}

part_shutdown() {
    if only_qmpd "shutdown, reboot" "no guest runs in this domain that would react to the power button"; then
        ok "the domain runs" virsh resume acc
        ok "the domain is rebooted" virsh reboot acc
        becomes "it still runs" 'running' virsh domstate acc
        ok "the domain is shut down" virsh shutdown acc
        becomes "it has shut down" 'shut off \(shutdown\)' virsh domstate acc --reason
    fi
    virsh destroy acc >/dev/null 2>&1
    virsh dumpxml acc --inactive >afterwards.xml
    ok "its definition is what it was" diff defined.xml afterwards.xml
    ok "the definition is gone" virsh undefine acc
    ok "the secret is gone" virsh secret-undefine $secret
    hides "nothing is left" 'acc' virsh list --all
}

# -- All of them ----------------------------------------------------------------------------------------------

parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(luks passphrase disks snapshots descriptors scsi iotune typed human states destroy
    reconnect crash interrupted messages)

kind=unknown
part_define
part_start
# What it is it says itself.
if ! commands=$(monitor acc query-commands 2>&1); then
    sed 's/^/# /' "$HOME/.cache/libvirt/qemu/log/acc.log"
    echo "Bail out! The domain does not run."
    exit 1
fi
case $commands in *'"__org.qmpd_'*) kind=qmpd ;; *) kind=QEMU ;; esac
echo "# $emulator is $kind"
for part in "${parts[@]}"; do
    echo "# $part"
    "part_$part"
done
echo "# shutdown"
part_shutdown
echo "1..$count"
echo "# $((count - failures)) of $count checks passed"
[ "$failures" -eq 0 ]
