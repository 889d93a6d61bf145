# hosts.sh: two hosts on one machine, as network namespaces on a bridge that lies in a third one.  A test sources it after
# e2e.sh.  Needs root, iproute2 and unshare: hosts_up says what is missing and ends the test as skipped (77).
lan=sel$$
head=${lan}a other=${lan}b

# on HOST COMMAND...: with the host's network and name.
on() { ip netns exec "$1" unshare --uts -- /bin/bash -c 'hostname "$0"; exec "$@"' "$@"; }

hosts_up() {
    local why= i=0 h
    [ "$(id -u)" -eq 0 ] || why="not root"
    command -v ip >/dev/null && command -v unshare >/dev/null || why="no ip or unshare (iproute2, util-linux)"
    [ -n "$why" ] || ip netns add $lan 2>why || why=$(cat why)
    [ -z "$why" ] || { echo "skipped: network namespaces: $why"; exit 77; }
    trap hosts_down EXIT
    ip -n $lan link add br0 type bridge && ip -n $lan link set br0 up
    for h in $head $other; do
        i=$((i + 1))
        ip netns add $h && ip -n $h link set lo up && ip -n $lan link add p$i type veth peer name eth0 netns $h &&
            ip -n $lan link set p$i master br0 up && ip -n $h addr add 10.77.0.$i/24 dev eth0 && ip -n $h link set eth0 up
        mkdir -p /etc/netns/$h
        printf '127.0.0.1 localhost\n10.77.0.1 %s\n10.77.0.2 %s\n' $head $other >/etc/netns/$h/hosts
    done
    # what mpirun calls instead of ssh: [options] HOST COMMAND
    cat >agent <<'AGENT'
#!/bin/bash
while [ "${1#-}" != "$1" ]; do shift; done
h=$1; shift
exec ip netns exec "$h" unshare --uts -- /bin/bash -c 'hostname "$0"; cd /; eval "$1"' "$h" "$*"
AGENT
    chmod +x agent
}

# hosts_left: processes that still run on the second host.
hosts_left() { ip netns pids $other; }

hosts_down() {
    local h
    for h in $head $other $lan; do
        ip netns pids $h 2>/dev/null | xargs -r kill -9 2>/dev/null
        ip netns del $h 2>/dev/null
        rm -rf /etc/netns/$h
    done
    cd / && rm -rf "$TEMP"
}

# cut_off and heal: as a pulled cable; blackhole: the link stays up and nothing arrives.
cut_off() { ip -n $lan link set p2 down; }
blackhole() { ip -n $lan link set p2 nomaster; }
heal() { ip -n $lan link set p2 up; ip -n $lan link set p2 master br0; }

# start_hosts [-x VARIABLE] ARGS...: the program with a rank on each host, started on the first one by the words in `starter`; the
# stderr of the second rank goes to the file err.1, since nothing comes through from a host that is cut off.
start_hosts() {
    printf '#!/bin/bash\n[ $OMPI_COMM_WORLD_RANK = 0 ] || exec 2>"%s/err.1"\nexec "%s" "$@"\n' "$TEMP" "$SELECTRA" >ranked
    chmod +x ranked
    local pass_on=()
    [ "$1" != -x ] || { pass_on=(-x "$2"); shift 2; }
    on $head "${starter[@]}" --host $head,$other --map-by node --bind-to none \
        --mca plm_rsh_agent "$TEMP/agent" --mca plm_rsh_no_tree_spawn 1 --mca orte_keep_fqdn_hostnames 1 \
        --mca oob_tcp_if_include eth0 --mca pml ob1 --mca btl tcp,self --mca btl_tcp_if_include eth0 \
        --mca mpi_yield_when_idle 1 "${pass_on[@]}" -wdir "$TEMP" "$TEMP/ranked" "$@" >out 2>err &
    job=$!
}
