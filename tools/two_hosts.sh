#!/usr/bin/env bash
# Trains with torchrun on two "hosts": network namespaces with an address each, joined by a virtual cable. Needs root.
# usage: tools/two_hosts.sh RUN [KEY=VALUE]...          exit code 77 where namespaces are not allowed
set -euo pipefail
cd "$(dirname "$0")/.."
run=$1
shift
python=${PYTHON:-.venv/bin/python}
a=dynamixer-a-$$ b=dynamixer-b-$$
cleanup() {
    kill $(jobs -p) 2>/dev/null || true
    ip netns del "$a" 2>/dev/null || true
    ip netns del "$b" 2>/dev/null || true
}
trap cleanup EXIT
if ! { ip netns add "$a" && ip netns add "$b"; }; then
    echo "network namespaces cannot be made here" >&2
    exit 77
fi
ip link add cable netns "$a" type veth peer name cable netns "$b"
for end in "$a 10.77.0.1" "$b 10.77.0.2"; do
    set -- $end "$@"
    ip -n "$1" addr add "$2/24" dev cable
    ip -n "$1" link set cable up
    ip -n "$1" link set lo up
    shift 2
done
host() { # namespace, address, whether it keeps the rendezvous, words
    local space=$1 address=$2 keeps=$3
    shift 3
    exec env GLOO_SOCKET_IFNAME=cable TP_SOCKET_IFNAME=cable ip netns exec "$space" "$python" -m torch.distributed.run \
        --nnodes 2 --nproc-per-node 1 --local-addr "$address" \
        --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29517 --rdzv-id two-hosts --rdzv-conf "is_host=$keeps" \
        -m dynamixer train fashion_nano --out "$run" model.patch_size=8 epochs=1 warmup_epochs=0 limit_train=512 "$@"
}
host "$a" 10.77.0.1 1 "$@" &
host "$b" 10.77.0.2 0 "$@" &
wait -n # whichever ends first; if it failed, the other one has nobody to wait for
wait -n
