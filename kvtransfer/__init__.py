"""Moving KV blocks between pools: the verbs, the pure hand-off machine and planner, and one file a backend.

Here belongs everything between "these blocks are offered" and "these bytes are verified in my pool". What does not:
which worker offers to whom (router), and what is computed from the blocks (engine).

    endpoint    what a worker's event loop uses: offers, pulls, words to the source       pulls, peers   its two halves
    transport   the verbs of a backend        local, attached: shm, cuda_ipc   read        pieces, staging: tcp, ucx, nccl   are sent to
    faulty      faults around any of them     auto   which path, and why
    region      a pool's memory and words      mapping, fault_ahead   its pages             device_pool, cuda_runtime   the same on a GPU
    copying     the seqlock                   layer_clock, layers   following a source that still computes
    digest      content checks                digest_ahead          read before somebody waits for them
    lanes       threads, queues, deadlines    session   authenticated sockets              host_tier   blocks the pool evicted
    handoff     who owns an offer, pure       reshard   which bytes go where, pure         config      bounds and policy
"""
