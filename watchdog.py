"""
Ends a job of several processes that hangs, and names the rank that the others wait for.

    missing = missing_ranks(store, rank, world_size, seconds)  # before the processes are connected
    watch(store, rank, world_size, groups, seconds)            # from then on, in a thread

Each process beats BEATS times in `seconds`: its thread writes to the store of the job how many
collectives the process has entered. After `seconds` two kinds of ranks are given up:

* A rank that has stopped beating. Its process was stopped, or its machine.
* A rank that has entered fewer collectives than another, and enters no more. It waits for something
  that the others do not wait for, such as a disk.

Each process that notices ends with status 1, and one on each machine says why. torchrun then ends
the others, or starts all of them again (--max-restarts). A process measures time in its own beats
and not in seconds: so a job that was suspended as a whole goes on.
"""

import atexit
import itertools
import os
import socket
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

BEATS = 20  # in the time after which a rank is given up


class Peer:
    """Another process: what it wrote last, and for how many of our beats that has not changed.

    silent      our beats since its last beat
    still       our beats since it last entered a collective
    """

    def __init__(self):
        self.beat = self.entered = -1
        self.silent = self.still = 0

    def hear(self, beat, entered):
        """beat: the number of its last beat. entered: how many collectives it has entered."""
        self.silent = 0 if beat != self.beat else self.silent + 1
        self.still = 0 if entered != self.entered else self.still + 1
        self.beat, self.entered = beat, entered


def missing_ranks(store, rank, world_size, seconds):
    """Wait until every rank is there. -> those that did not come within `seconds`, mostly []."""
    store.set(f"process/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
    store.set(f"beat/{rank}", "0 0")
    wanted = [f"beat/{other}" for other in range(world_size)]
    try:
        store.wait(wanted, timedelta(seconds=seconds))
    except dist.DistStoreError:
        return [other for other in range(world_size) if not store.check([wanted[other]])]
    return []


def watch(store, rank, world_size, groups, seconds):
    """Start the thread that beats and listens, once `missing_ranks` has found all ranks.

    groups: the process groups whose collectives are counted.
    """
    own = store.clone()  # only for the thread: no other wait of this process delays its beat
    ended = threading.Event()
    arguments = (own, rank, world_size, groups, seconds, ended)
    thread = threading.Thread(target=beat_and_listen, args=arguments, daemon=True)
    thread.start()
    # Python aborts if it ends while a daemon thread is inside C++ code, here that of the store.
    atexit.register(stop, thread, ended)


def stop(thread, ended):
    ended.set()
    thread.join(timeout=10)  # longer only where the store does not answer


def beat_and_listen(store, rank, world_size, groups, seconds, ended):
    peers = {other: Peer() for other in range(world_size) if other != rank}
    keys = [f"beat/{other}" for other in peers]
    for beat in itertools.count(1):
        if ended.wait(seconds / BEATS):
            return
        # torch has no public name for this. The tests check that it counts entered collectives.
        entered = sum(group._get_sequence_number_for_group() for group in groups)
        try:
            store.set(f"beat/{rank}", f"{beat} {entered}")
            heard = store.multi_get(keys)
        except RuntimeError as error:
            if ended.wait(seconds):  # the whole job has ended, this process too
                return
            end(f"the store of the job does not answer ({str(error).splitlines()[0]})")
        for peer, text in zip(peers.values(), heard):
            peer.hear(*map(int, text.split()))
        if verdict := given_up(peers, entered):
            ranks, reason = verdict
            names = [f"rank {other} ({store.get(f'process/{other}').decode()})" for other in ranks]
            first = store.add(f"ended/{socket.gethostname()}", 1) == 1
            end(f"{', '.join(names)} {reason} {seconds:.0f} s" if first else "")


def given_up(peers, entered):
    """-> (ranks, reason) of the ranks that are given up; None where there are none.

    peers: {rank: Peer}. entered: how many collectives this process has entered.
    """
    silent = [rank for rank, peer in peers.items() if peer.silent >= BEATS]
    if silent:
        return silent, "gave no sign of life for"
    least = min((peer.entered for peer in peers.values()), default=entered)
    if least >= entered:
        return None  # no rank is behind this one
    behind = [rank for rank, peer in peers.items() if peer.entered == least and peer.still >= BEATS]
    return (behind, "did not come to where the others wait, for") if behind else None


def end(reason):
    """End this process, whatever its main thread waits for. reason: "" where another process of
    this machine has said it."""
    if reason:
        print(
            f"RunError: {reason}, so this run ends. Look at that process and its machine, then "
            "go on with --init_from=resume. --hang_minutes sets how long a run waits",
            file=sys.stderr,
            flush=True,
        )
    os._exit(1)
