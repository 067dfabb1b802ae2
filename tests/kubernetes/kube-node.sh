#!/bin/bash
# One kube node, in namespaces of its own: kube-node.sh NAME ADDRESS ZONE CGROUP IMAGE… (paths of archives).
# All of its files are below /run/collab/NAME, which it sees as /run/node; whoever ends this process ends the kube node.
set -eu
name=$1 address=$2 zone=$3 cgroup=$4 configuration=$(dirname "$0")
shift 4

# Mounts of pods are seen by the container runtime, and by nobody outside.
mount --make-rprivate /
mount --bind /run/collab /mnt
mount -t tmpfs tmpfs /run
mkdir -p /run/collab /run/node /run/netns /run/lock /var/lib/cni
mount --move /mnt /run/collab
mount --bind /run/collab/"$name" /run/node
mount -t tmpfs tmpfs /var/lib/cni
mount -t tmpfs tmpfs /var/log
mount --make-rshared /
hostname "$name"
sysctl -qw net.ipv4.ip_forward=1
sysctl -qw net.bridge.bridge-nf-call-iptables=1 || true
cd /run/node
# Images in memory: a few GiB, but nothing to write to a disk, and nothing to remove from it afterwards.
mkdir -p containerd && mount -t tmpfs tmpfs containerd

containerd --config "$configuration/containerd.toml" >containerd.log 2>&1 &
ctr() { command ctr -a /run/node/containerd.sock -n k8s.io "$@"; }
until ctr version >/dev/null 2>&1; do sleep 0.1; done
import() { for image in "$@"; do ctr images import "$image" >>images.log 2>&1; done; }
# The first two are what the kube node itself needs; whoever waits for the file `ready` has the others as well.
import "${@:1:2}"

kubelet --config="$configuration/kubelet.yaml" --kubeconfig=/run/collab/pki/"$name".kubeconfig \
    --tls-cert-file=/run/collab/pki/"$name".crt --tls-private-key-file=/run/collab/pki/"$name".key \
    --hostname-override="$name" --node-ip="$address" --node-labels=topology.kubernetes.io/zone="$zone" \
    --root-dir=/run/node/kubelet --cgroup-root="$cgroup" >kubelet.log 2>&1 &
kube-proxy --kubeconfig=/run/collab/pki/kube-proxy.kubeconfig --proxy-mode=nftables --hostname-override="$name" \
    --cluster-cidr=198.19.128.0/17 --conntrack-max-per-core=0 >kube-proxy.log 2>&1 &
import "${@:3}"
touch ready
# None of them ends by itself.
wait -n
