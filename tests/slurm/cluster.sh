#!/bin/bash
# A real Slurm for the tests: one node on the loopback interface, without systemd.
#   bash tests/slurm/cluster.sh start FOLDER    prints what to set to use it
#   bash tests/slurm/cluster.sh stop FOLDER
# Needs root and: apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd slurm-client munge
set -euo pipefail
export PATH=$PATH:/usr/sbin
root=$(mkdir -p "$2" && cd "$2" && pwd)
export SLURM_CONF=$root/slurm.conf
daemons="slurmd slurmctld munged"

pid_of() { # prints the number of a daemon that runs
    local pid
    pid=$(tr -dc 0-9 <"$root/$1.pid" 2>/dev/null) || return 1
    [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && echo "$pid"
}

configure() {
    local host
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=27817
SlurmdPort=27818
SrunPortRange=27900-27999
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$root/munge.socket,cred_expire=5
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd.pid
SlurmctldLogFile=$root/slurmctld.log
SlurmdLogFile=$root/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
NodeName=node0 NodeHostname=$host NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=low Nodes=node0 Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=node0 MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
CONF
}

start() {
    umask 022
    mkdir -p "$root/state" "$root/spool"
    (umask 077 && head -c 128 /dev/urandom >"$root/munge.key")
    configure
    munged --socket="$root/munge.socket" --key-file="$root/munge.key" --log-file="$root/munged.log" \
        --pid-file="$root/munged.pid" --seed-file="$root/munge.seed" --force
    slurmctld </dev/null
    slurmd -N node0 </dev/null
    for _ in $(seq 150); do
        case $(sinfo -h -n node0 -o %T 2>/dev/null | head -n 1) in
            idle | mixed | allocated) echo "SLURM_CONF=$SLURM_CONF" && return ;;
            down* | drain*) scontrol update nodename=node0 state=resume || true ;;
        esac
        sleep 0.2
    done
    echo "The node is not ready after 30 seconds; see $root/*.log." >&2
    return 1
}

stop() {
    local jobs daemon pid
    jobs=$(timeout 5 squeue -h -o %A 2>/dev/null || true)
    if [ -n "$jobs" ]; then
        # shellcheck disable=SC2086  # several numbers
        timeout 5 scancel $jobs || true
        for _ in $(seq 100); do [ -z "$(timeout 5 squeue -h -o %A 2>/dev/null)" ] && break || sleep 0.2; done
    fi
    for daemon in $daemons; do
        pid=$(pid_of "$daemon") || continue
        kill "$pid"
        for _ in $(seq 100); do [ -e "/proc/$pid" ] || break; sleep 0.1; done
        [ ! -e "/proc/$pid" ] || kill -KILL "$pid"
    done
}

"$1"
