#!/usr/bin/env bash
# The cluster's first process, in namespaces of its own: a network of names and addresses, a freezer
# group for proctrack/cgroup, munge and the controller. The nodes are started after it.
#   start.sh FOLDER [inside]      Everything that it starts ends with it.
set -euo pipefail
folder=$1

if [ "${2:-}" != inside ]; then
  mount --make-rprivate /
  mkdir -p "$folder/outer" "$folder/cgroup/freezer"
  if mount -t cgroup -o freezer gammaslim "$folder/outer" 2>"$folder/cgroup.log"; then
    mkdir "$folder/outer/$(<"$folder/name")"
    echo 0 >"$folder/outer/$(<"$folder/name")/tasks"
    exec unshare --cgroup "$BASH" "$0" "$folder" inside
  fi
  exec "$BASH" "$0" "$folder" inside
fi

if mountpoint -q "$folder/outer"; then
  mount -t cgroup -o freezer gammaslim "$folder/cgroup/freezer"
fi
mount --bind "$folder/hosts" /etc/hosts
hostname controller
ip link set lo up
while read -r address _; do
  [ "$address" = 127.0.0.1 ] || ip address add "$address/8" dev lo
done <"$folder/hosts"

mungekey --create --keyfile="$folder/munge.key"
munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munge.pid" \
  --seed-file="$folder/munge.seed" --log-file="$folder/munge.log" --origin=127.0.0.1
slurmctld -c
touch "$folder/ready"
while :; do # bash also reaps what daemons leave
  sleep 3600 &
  wait $! || true
done
