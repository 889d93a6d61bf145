# many_hosts.sh: several hosts on one machine: network namespaces with names and addresses of their own on a bridge.  To be
# sourced after e2e.sh; needs root, ip and unshare.
#   hosts_up N             makes them, or leaves the test with status 77 where this machine cannot; gone at the test's exit
#   on_hosts RANKS ARGS    the program under mpirun, as many ranks on each of them
hosts_tag=st$$
hosts=()

hosts_down() {
    local name
    for name in "${hosts[@]}" "${hosts_tag}sw"; do
        ip netns pids "$name" 2>/dev/null | xargs -r kill -9 2>/dev/null
        ip netns del "$name" 2>/dev/null
        rm -rf "/etc/netns/$name"
    done
    hosts=()
}

hosts_up() {
    local i name names=
    if [ "$(id -u)" -ne 0 ] || ! command -v ip unshare >/dev/null || ! ip netns add "${hosts_tag}sw" 2>/dev/null; then
        echo "skipped: no network namespaces here"
        exit 77
    fi
    trap 'hosts_down; [ -z "$job" ] || kill -9 "$job" 2>/dev/null; cd /; rm -rf "$TEMP"' EXIT
    for ((i = 1; i <= $1; i++)); do names+="10.78.0.$i ${hosts_tag}h$i"$'\n'; done
    ip -n "${hosts_tag}sw" link add br0 type bridge && ip -n "${hosts_tag}sw" link set br0 up || exit 77
    for ((i = 1; i <= $1; i++)); do
        name=${hosts_tag}h$i
        hosts+=("$name")
        mkdir -p "/etc/netns/$name"
        printf '127.0.0.1 localhost\n%s' "$names" >"/etc/netns/$name/hosts"
        ip netns add "$name" && ip -n "$name" link set lo up &&
            ip -n "${hosts_tag}sw" link add "p$i" type veth peer name eth0 netns "$name" &&
            ip -n "${hosts_tag}sw" link set "p$i" master br0 up &&
            ip -n "$name" addr add "10.78.0.$i/24" dev eth0 && ip -n "$name" link set eth0 up || exit 77
    done
    # What mpirun takes for ssh: options, host, command.
    cat >agent.sh <<'AGENT'
#!/bin/bash
while [ "${1#-}" != "$1" ]; do shift; done
host=$1
shift
exec ip netns exec "$host" unshare --uts -- /bin/bash -c 'hostname "$0"; cd /; eval "$1"' "$host" "$*"
AGENT
    chmod +x agent.sh
}

on_hosts() {
    local each=$1 list="" host
    shift
    for host in "${hosts[@]}"; do list+=${list:+,}$host:$each; done
    ip netns exec "${hosts[0]}" unshare --uts -- /bin/bash -c 'hostname "$0"; exec "$@"' "${hosts[0]}" \
        env OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 timeout -k 5 "${LIMIT:-120}" \
        mpirun --host "$list" --wdir "$PWD" --oversubscribe --bind-to none --mca plm_rsh_agent "$PWD/agent.sh" \
        --mca plm_rsh_no_tree_spawn 1 --mca orte_keep_fqdn_hostnames 1 --mca oob_tcp_if_include eth0 --mca pml ob1 \
        --mca btl vader,tcp,self --mca btl_tcp_if_include eth0 --mca btl_vader_single_copy_mechanism none \
        --mca mpi_yield_when_idle 1 ${SELECTRA_FAULT:+-x SELECTRA_FAULT} "$SELECTRA" "$@"
}
